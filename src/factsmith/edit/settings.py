"""A method's settings with some of them changed by name, as a file or a command gives them.

changed_settings(lm, "memit", [3, 4, 5], {"steps": 40})        # the recommended settings, changed
changed_settings(lm, "rome", None, {"lr": 0.1}, paper=True)    # the published settings, changed
changed_settings(lm, "rome")                                   # None: nothing is changed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.checks import whole_number
from ..core.errors import InputError, LayerError
from ..model.language_model import LanguageModel
from .configs import EditConfig
from .methods import find_method
from .published import published_settings

_EITHER = ("threshold", "energy")
"""AlphaEdit takes one of these settings or the other."""


def changed_settings(
    lm: LanguageModel,
    method: str,
    layers: int | Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    paper: bool = False,
) -> EditConfig | None:
    """Return a method's settings with some layers or values changed, or None if nothing changes.

    Args:
        lm: The model that the settings are for.
        method: A name from `METHODS`.
        layers: The layers to edit. None: those of the published settings with `paper`. Otherwise
            the settings leave the layers open, and `propose` chooses them.
        changes: {name: value}. A threshold for AlphaEdit unsets the energy, and the reverse.
        paper: Start from the settings published for a model of this shape, not from the
            recommended ones.

    Raises:
        InputError: The method or a setting does not exist, a value is not valid, or nothing was
            published for such a model.
        LayerError: A layer is not a whole number, or ROME was given several layers.
    """
    kind = find_method(method).config
    if not _numbers(layers) and not changes and not paper:
        return None
    base = published_settings(lm, method)[0] if paper else kind.recommended(lm)
    return _changed(base, method, layers, changes, paper=paper)


def check_settings(
    method: str, layers: Any = None, changes: Mapping[str, Any] | None = None
) -> None:
    """Check the layers and values that a file or a command gives, before there is a model.

    Raises:
        InputError: as `changed_settings`.
        LayerError: as `changed_settings`.
    """
    _changed(find_method(method).config(), method, layers, changes, paper=False)


def _changed(
    base: EditConfig,
    method: str,
    layers: int | Sequence[int] | None,
    changes: Mapping[str, Any] | None,
    *,
    paper: bool,
) -> EditConfig:
    """Return settings with some layers and values changed."""
    numbers = _numbers(layers)
    names = {field.name for field in dataclasses.fields(base)}
    places = {"layer", "layers"} & names
    if unknown := sorted(set(changes or {}) - (names - places)):
        raise _no_such_setting(method, unknown, names - places)
    values: dict[str, Any] = {**({} if paper else dict.fromkeys(places)), **(changes or {})}
    for one, other in (_EITHER, _EITHER[::-1]):
        if values.get(one) is not None:
            values.setdefault(other, None)
    config = dataclasses.replace(base, **values)
    return config.at(numbers) if numbers else config


def _no_such_setting(method: str, unknown: Sequence[str], names: set[str]) -> InputError:
    message = f"{method} has no setting {', '.join(unknown)}; expected some of "
    message += ", ".join(sorted(names))
    if {"layer", "layers"} & set(unknown):
        message += ". The layers are not a setting: give them separately"
        return InputError(message, argument="layer")
    return InputError(message)


def _numbers(layers: object) -> list[int] | None:
    """Return layers from a file or a caller as a list, or None if there are none."""
    if layers is None:
        return None
    given = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    numbers = [number for number in map(whole_number, given) if number is not None]
    if numbers == given:
        return numbers
    raise LayerError(
        f"layers is {layers!r:.60}; expected the numbers of layers, counted from 0, such as 5 or "
        "[3, 4, 5]",
        argument="layer",
    )
