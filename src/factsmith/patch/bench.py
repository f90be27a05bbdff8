"""Where a patch is tried: a model, what it carries, and what is known of it.

    bench = Scratch(lm)                     # a model alone: nothing is kept
    with bench.carrying(delta):
        lm.answer([prompt])

`Bench` is what planning and proposing need to know. There are two: `Scratch` here, and
`keep.Workbench`, which adds a ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from ..core.fact import Fact
from ..core.progress import Progress
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import find_moments, kept_moments
from ..corpus.scan import Site
from ..edit.delta import Delta, applied
from ..model.language_model import LanguageModel
from .layer_choice import LayerChoice, first_choice
from .layers import published_choice
from .recipe import Sources


class Bench(Protocol):
    """A model, the deltas that it carries, and what is kept for it."""

    @property
    def lm(self) -> LanguageModel:
        """The model. It carries `beneath`."""

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the model without the deltas."""

    @property
    def beneath(self) -> tuple[Delta, ...]:
        """The deltas that the model carries, in order; the first counts as made on the base."""

    @property
    def facts_in_effect(self) -> list[tuple[str, Fact]]:
        """The facts that these deltas write, each after words that say who has it; of one prompt
        the newest.
        """

    @property
    def asked_again(self) -> Sequence[Fact]:
        """Facts that must still hold after a new patch."""

    def on_base(self) -> AbstractContextManager[None]:
        """A block in which the model has its base weights."""

    def carrying(self, *deltas: Delta) -> AbstractContextManager[None]:
        """A block in which the model carries these deltas on top of `beneath`."""

    def kept_moments(
        self, layers: Sequence[int], site: Site = "coefficients"
    ) -> Mapping[int, SecondMoment]:
        """The second moments of these layers that are there without work."""

    def moments(
        self,
        layers: Sequence[int],
        sources: Sources,
        progress: Progress | None,
        site: Site = "coefficients",
    ) -> Mapping[int, SecondMoment]:
        """The second moments of these layers, of the base weights: kept, or computed now."""

    def known_layers(self) -> LayerChoice | None:
        """The layers to edit as far as they are known without work."""

    def first_layers(self) -> LayerChoice:
        """The layers to edit where none are known: a first choice, without trial edits."""


@dataclass(frozen=True)
class Scratch:
    """A model without a workspace: it carries nothing, and nothing is kept."""

    lm: LanguageModel
    beneath: tuple[Delta, ...] = ()
    asked_again: Sequence[Fact] = ()

    @property
    def base_fingerprint(self) -> str:
        """The model's own fingerprint."""
        return self.lm.fingerprint

    @property
    def facts_in_effect(self) -> list[tuple[str, Fact]]:
        """Nothing was written."""
        return []

    def on_base(self) -> AbstractContextManager[None]:
        """The model as it is."""
        return nullcontext()

    def carrying(self, *deltas: Delta) -> AbstractContextManager[None]:
        """The model with these deltas."""
        return applied(self.lm, deltas)

    def kept_moments(
        self, layers: Sequence[int], site: Site = "coefficients"
    ) -> Mapping[int, SecondMoment]:
        """Those that came with the model."""
        return kept_moments(self.lm, layers, site=site)

    def moments(
        self,
        layers: Sequence[int],
        sources: Sources,
        progress: Progress | None,
        site: Site = "coefficients",
    ) -> Mapping[int, SecondMoment]:
        """Those that came with the model, or computed now."""
        return find_moments(
            self.lm, layers, texts=sources.texts, seed=sources.seed, site=site, progress=progress
        )

    def known_layers(self) -> LayerChoice | None:
        """Those that came with the model, or were published for its shape."""
        return published_choice(self.lm)

    def first_layers(self) -> LayerChoice:
        """Those of `first_choice`."""
        return first_choice(self.lm)
