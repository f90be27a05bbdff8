"""What a map restores, checked when it is named."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from factsmith.core.errors import InputError, LayerError
from factsmith.locate.kinds import Restoration


@pytest.mark.parametrize(
    ("kind", "window", "expected"),
    [
        ("state", 10, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        ("mlp", 1, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        ("mlp", 2, [range(1), range(2), range(1, 3), range(2, 4)]),
        ("attention", 3, [range(2), range(3), range(1, 4), range(2, 4)]),
        ("mlp", 10, [range(4)] * 4),
    ],
)
def test_spans_are_those_of_the_reference(kind: Any, window: int, expected: list[range]) -> None:
    assert Restoration(kind, window).spans(4) == expected


def test_names_and_parts() -> None:
    severed = Restoration("state", sever="mlp")
    assert severed.name == "state, mlp severed" and severed.part is None
    assert severed.window == 10 and severed.layers_together == 1
    restored = Restoration("attention", 4)
    assert restored.name == restored.part == "attention" and restored.layers_together == 4


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"kind": "neuron"}, InputError, "kind"),
        ({"window": 0}, LayerError, "window"),
        ({"window": 1.5}, LayerError, "window"),
        ({"sever": "state"}, InputError, "sever"),
        ({"kind": "mlp", "sever": "mlp"}, InputError, "sever"),
    ],
)
def test_what_cannot_be_restored_is_refused(
    options: dict[str, Any], error: type[InputError], argument: str
) -> None:
    with pytest.raises(error) as refused:
        Restoration(**options)
    assert refused.value.argument == argument


def test_the_names_are_there_without_torch() -> None:
    code = "import sys, factsmith.locate.kinds; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
