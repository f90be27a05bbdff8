"""The addresses of banks. tests/model/test_families.py compares `scan` with plain passes."""

from __future__ import annotations

import pytest

from factsmith.core.errors import LayerError
from factsmith.corpus.scan import bank_of


def test_a_neuron_lies_in_a_bank() -> None:
    assert bank_of((1, 2)) == ((1,), 2) and bank_of((1, 2, 3)) == ((1, 2), 3)
    for neuron in (0, (0,), (0.5, 1.2), "12", (1, 2, 3, 4), ("x",), (True, 1)):
        with pytest.raises(LayerError, match="not a neuron"):
            bank_of(neuron)  # type: ignore[arg-type]
