"""How an edit is made: the method with its settings, and what it may draw on.

    Recipe("memit")                              # the settings recommended for the model
    Recipe("rome", RomeConfig(layer=5))          # settings of your own
    Recipe.of("memit", paper=True, steps=40)     # the published settings, with one changed
    Sources(texts=lines, seed=1)

Both are values: nothing is loaded or computed until a plan is made with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import InputError
from ..core.fact import Fact
from ..core.factfile import FactSheet
from ..corpus.moments import SecondMoment
from ..corpus.scan import Site
from ..edit.configs import EditConfig
from ..edit.methods import find_method, method_for
from ..edit.settings import changed_settings, check_settings
from ..model.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What an edit may draw on.

    Attributes:
        moments: Second moments of the edited layers: one SecondMoment, or {layer: SecondMoment}.
            None: the kept ones; otherwise they are computed from `texts`.
        texts: Ordinary text for second moments and drift. None: the bundled corpus for second
            moments, and for drift text that the model writes. "own": the model writes both.
        contexts: Templates with `{}` for the prompt. None: the model writes them.
        seed: Seed of the contexts and of the text that the model writes.
    """

    moments: SecondMoment | Mapping[int, SecondMoment] | None = None
    texts: Iterable[str] | None = None
    contexts: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.texts is not None and iter(self.texts) is self.texts:
            object.__setattr__(self, "texts", list(self.texts))  # they are read more than once


@dataclass(frozen=True)
class Recipe:
    """A method and its settings.

    Attributes:
        method: The method's name. None: "rome" for one fact, "memit" for several (`method_for`).
        config: Its settings. None: those recommended for the model, with `changes`.
        layers: The layers to edit, a number or several. None: those of `config`, or else the plan
            chooses them.
        paper: Start from the settings published for a model of this shape, not from the recommended
            ones.
        changes: {setting: value} that differ.

    Raises InputError for an unknown method, or settings of another method.
    """

    method: str | None = None
    config: EditConfig | None = None
    layers: Any = field(default=None, kw_only=True)
    paper: bool = field(default=False, kw_only=True)
    changes: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if self.method is not None:
            find_method(self.method, self.config)

    @classmethod
    def of(
        cls, method: str | None = None, *, layers: Any = None, paper: bool = False, **changes: Any
    ) -> Recipe:
        """Return a recipe that changes some of the recommended, or of the published settings."""
        return cls(method, layers=layers, paper=paper, changes=changes)

    @classmethod
    def for_sheet(
        cls,
        sheet: FactSheet,
        method: str | None = None,
        changes: Mapping[str, Any] | None = None,
        *,
        layers: Any = None,
        paper: bool = False,
    ) -> Recipe:
        """Return the recipe of a fact file.

        Args:
            sheet: The file. Its settings count for the method that it names, and for any method if
                it names none.
            method: Overrules the file's method.
            changes: Overrule the file's settings one by one. "layer" or "layers" names the layers
                to edit.
            layers: The layers to edit; they overrule those of file and changes.
            paper: Start from the published settings.
        """
        name = method or sheet.method
        merged = dict(sheet.settings) if sheet.method in (None, name) else {}
        merged.update(changes or {})
        named = merged.pop("layers", merged.pop("layer", None))
        return cls(name, layers=layers or named, paper=paper, changes=merged)

    def method_for(self, facts: Sequence[Fact]) -> str:
        """Return the method's name for these facts; without one, that of the rule of `edit`."""
        return self.method or method_for(facts, self.config)

    def draws_on(self, facts: Sequence[Fact]) -> Site:
        """Return of what the method for these facts needs second moments."""
        return find_method(self.method_for(facts)).config().draws_on

    def check(self, facts: Sequence[Fact]) -> None:
        """Check the settings before there is a model.

        Raises:
            InputError: An unknown setting, or a value that is not valid.
            LayerError: What names the layers is not layer numbers.
        """
        if self.config is None:
            check_settings(self.method_for(facts), self.layers, self.changes)

    def config_for(self, lm: LanguageModel, facts: Sequence[Fact]) -> EditConfig:
        """Return the settings for a model. Their `edited` is None where the layers are still to be
        chosen.

        Raises:
            InputError: An unknown setting, or nothing was published for such a model.
            LayerError: What names the layers is not layer numbers.
        """
        method = self.method_for(facts)
        if self.config is not None:
            return self.config if self.layers is None else self.config.at(self.layers)
        changed: EditConfig | None = changed_settings(
            lm, method, self.layers, self.changes, paper=self.paper
        )
        if changed is not None:
            return changed
        recommended = find_method(method).config.recommended(lm)
        names = {"layer", "layers"} & {field.name for field in dataclasses.fields(recommended)}
        unset: dict[str, Any] = dict.fromkeys(names)
        return dataclasses.replace(recommended, **unset)


def as_recipe(method: str | Recipe | None, config: EditConfig | None) -> Recipe:
    """Return a recipe, from a recipe or from a method's name and its settings."""
    if not isinstance(method, Recipe):
        return Recipe(method, config)
    if config is not None:
        raise InputError("got a Recipe and settings; put the settings into the recipe")
    return method
