"""Lines with bands: they are drawn as given."""

from __future__ import annotations

import pytest

from factsmith.core.errors import InputError
from factsmith.show.plots.curves import curves


def test_curves_draw_what_they_are_given_and_refuse_ragged_series() -> None:
    figure = curves(
        {"a": ([1, 2], [0.1, 0.2], [0, 0.1], [0.2, 0.3])}, x_label="k", y_label="share", mark_x=1.5
    )
    line, mark = figure.axes[0].get_lines()
    assert list(line.get_ydata()) == [0.1, 0.2] and list(mark.get_xdata()) == [1.5, 1.5]
    with pytest.raises(InputError, match="'a'"):
        curves({"a": ([1, 2], [0.1], [0, 0.1], [0.2, 0.3])}, x_label="k", y_label="share")
    with pytest.raises(InputError):
        curves({}, x_label="k", y_label="share")
