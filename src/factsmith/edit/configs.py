"""edit.configs."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Self

from ..core.checks import check_count, check_number, whole_number
from ..core.errors import InputError, LayerError, NumericsError
from ..corpus.factors import JITTERS, cholesky
from ..corpus.moments import SecondMoment
from ..model.language_model import LanguageModel
from . import solve
from .contexts import generate_contexts, generate_openings
from .keys import Site
from .target import TargetConfig


def shipped(settings: type[TargetConfig], lm: LanguageModel) -> dict[str, Any]:
    """The settings of an editor that came with the model, {} when none did.

    A model brings settings in its config.json: {"factsmith": {"rome": {"layer": 1, ...}}}. Raises InputError when they are no set of
    these fields.
    """
    name = settings.__name__.removesuffix("Config").lower()
    brought = getattr(lm.config, "factsmith", None) or {}
    brought = brought.get(name, {}) if isinstance(brought, Mapping) else brought
    known = {field.name for field in dataclasses.fields(settings)}
    if not isinstance(brought, Mapping) or not known >= set(brought):
        raise InputError(
            f"{lm.name}: config.json has settings {brought!r} under factsmith.{name}; expected some of {sorted(known)}"
        )
    return dict(brought)


@dataclass(frozen=True)
class EditConfig(TargetConfig, ABC):
    """Settings of any editor: what all of them have in common."""

    @property
    @abstractmethod
    def site(self) -> Site:
        """Where the method's targets are searched: the layer's "ffn", or the "stream" after it."""

    @abstractmethod
    def own_contexts(self, lm: LanguageModel, seed: int) -> list[str]:
        """The contexts that the model writes for this method; templates with `{}` for the prompt."""

    @property
    @abstractmethod
    def edited(self) -> tuple[int, ...] | None:
        """The layers to edit; None when they are still to be chosen."""

    @abstractmethod
    def at(self, layers: Sequence[int]) -> Self:
        """The same settings for these layers."""

    @classmethod
    @abstractmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """The settings that came with the model, else those for a model nothing is known about."""


@dataclass(frozen=True)
class RomeConfig(EditConfig):
    """Settings of ROME: where, and how the target is searched (the fields of TargetConfig)."""

    layer: int | None = None
    """The layer to edit. None: the one of `recommended`; a Workbench, and `propose`, look further (kept, published, measured)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            layer = check_count(
                self.layer,
                "layer",
                "the number of the layer to edit",
                least=0,
                also="None",
                error=LayerError,
            )
            object.__setattr__(self, "layer", layer)

    @property
    def site(self) -> Site:
        """ROME's targets are outputs of the down-projection."""
        return "ffn"

    def own_contexts(self, lm: LanguageModel, seed: int) -> list[str]:
        """The bare prompt and 20 beginnings that the model writes."""
        return generate_contexts(lm, seed)

    @property
    def edited(self) -> tuple[int, ...] | None:
        """The layer as a tuple, or None."""
        return None if self.layer is None else (self.layer,)

    def at(self, layers: Sequence[int]) -> Self:
        """The same settings for one layer; raises LayerError for several."""
        if len(layers) != 1:
            raise LayerError(
                f"ROME edits one layer; got {tuple(layers)}: name one, or use a method that spreads its edits, such as memit"
            )
        return dataclasses.replace(self, layer=layers[0])

    @classmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """The settings that came with the model, else scale="auto" with up to 80 steps of 0.1 at layer n_layers // 6.

        A sixth of the depth is where the published layers lie on average (GPT-J 5 of 28, Llama-3 5 of 32, GPT-2 XL 17 of 48); what was
        published or measured for this model is better: `recommend_layers`. Steps are smaller than the authors' 0.5, and more, since they
        find nearer targets (200 single edits of the atlas: efficacy 97.5 to 99.5 %, generalization 94.5 to 95.8, specificity 97.0 to 97.9);
        an easy fact stops long before the last. Raises InputError as `shipped`.
        """
        return cls(
            **{
                "layer": lm.n_layers // 6,
                **(shipped(cls, lm) or {"scale": "auto", "steps": 80, "lr": 0.1}),
            }
        )


def _set_positive(
    config: EditConfig, name: str, *, below: float | None = None, also: str = "None"
) -> None:
    """Keep a setting as a plain number; raises InputError unless it is one above 0."""
    value = check_number(getattr(config, name), name, above=0, below=below, also=also)
    object.__setattr__(config, name, value)


def _layers(layers: object) -> tuple[int, ...]:
    """Numbers of layers, ascending; raises LayerError for anything else, and for one that is there twice."""
    given = (
        list(layers)
        if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes))
        else [layers]
    )
    found = [number for number in map(whole_number, given) if number is not None and number >= 0]
    if not found or len(found) < len(given) or len(set(found)) < len(found):
        raise LayerError(
            f"layers are numbers of layers, counted from 0, each once, or None; got {layers!r}"
        )
    return tuple(sorted(found))


def by_depth(n_layers: int, rome: int | None = None) -> tuple[int, ...]:
    """Return layers for the MEMIT family from the depth alone, for a model nothing is known about.

    They begin one layer below ROME's and end three layers above it, but not after a third of the
    depth. This is how the published ranges lie around ROME's layer 5 of 28 or 32, and each of them
    ends at about a third of the depth.

    Args:
        n_layers: Layers of the model.
        rome: ROME's layer. None: a sixth of the depth.
    """
    rome = n_layers // 6 if rome is None else rome
    last = max(rome, min(rome + 3, n_layers // 3))
    return tuple(range(max(0, rome - 1), last + 1))


@dataclass(frozen=True)
class SpreadConfig(EditConfig):
    """Settings of the editors that write many facts into several layers at once; the formula of a layer is the method's (`update`)."""

    layers: tuple[int, ...] | None = None
    """The layers to edit, lowest first. None: those of `recommended`; a Workbench, and `propose`, look further."""
    _: KW_ONLY
    clamp: float = 0.75
    """Largest ‖δ‖ in units of the stream's norm where δ is added ("paper"; the authors' value) or of half of it ("auto")."""
    spread: Literal["even", "sqrt"] = "even"
    """What a layer takes of what is missing: an equal part of it among the layers left (MEMIT), or 1/√ of them (PMET), which gives the
    lower layers more to do."""
    keys: Literal["mean", "each"] = "mean"
    """"mean": one key a fact, averaged over contexts (the papers). "each": the fact's output is asked for at its key in every context,
    which other phrasings of the fact profit from."""
    subject_share: float = 0.0
    """With keys="each": the share of a fact's weight that goes to its subject without the prompt's words, after others. 0 as published.
    On the atlas 0.3 makes four more of a hundred other phrasings follow, at the cost of one of a hundred other facts."""
    norm_anchor: float | Literal["mean"] | None = None
    """Rescale what the last layer's FFN should put out to this norm ("mean": of all facts of the first round), so that the norms of later
    rounds do not grow on those of earlier ones. None, the authors' setting, leaves it."""
    moment_weight: float | None = None
    """λ, how many tokens of ordinary text stand against each fact. None: ten for each fact in a layer, since the more facts are written,
    the more of what one of them asks for is the others' noise, and at most as many as the layer has neurons. On the atlas, three layers of
    1,024, by harmonic mean: 9 facts take λ = 30, 92 facts 300 and 307 facts 1,000."""
    repair: int = 0
    """How often facts that did not take get a new target on the edited model and are written again, while those that did are kept
    (UnderEdit, https://arxiv.org/abs/2503.11895). 0 is the authors' single pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
        if self.spread not in ("even", "sqrt"):
            raise InputError(f'spread is "even" or "sqrt"; got {self.spread!r}')
        if self.keys not in ("mean", "each"):
            raise InputError(f'keys is "mean" or "each"; got {self.keys!r}')
        share = check_number(self.subject_share, "subject_share", least=0, below=1)
        if share and self.keys != "each":
            raise InputError(
                f'subject_share is {share!r} with keys={self.keys!r}: it must be 0 unless keys is "each"',
                argument="subject_share",
            )
        object.__setattr__(self, "subject_share", share)
        if self.norm_anchor not in (None, "mean"):
            _set_positive(self, "norm_anchor", also='"mean" or None')
        if self.moment_weight is not None:
            _set_positive(self, "moment_weight")
        object.__setattr__(
            self,
            "repair",
            check_count(self.repair, "repair", least=0),
        )

    @property
    def site(self) -> Site:
        """These targets are states of the stream."""
        return "stream"

    def own_contexts(self, lm: LanguageModel, seed: int) -> list[str]:
        """The bare prompt and 5 openings that the model continues."""
        return generate_openings(lm, seed)

    @property
    def edited(self) -> tuple[int, ...] | None:
        """The layers, or None."""
        return self.layers

    def at(self, layers: Sequence[int]) -> Self:
        """The same settings for these layers."""
        return dataclasses.replace(self, layers=tuple(layers))

    @classmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """The settings that came with the model, else those of `scale_free`, in the layers `by_depth`.

        What was published or measured for this model is better: `recommend_layers`. Raises InputError as `shipped`.
        """
        layers = by_depth(lm.n_layers)
        return cls(**{"layers": layers, **(shipped(cls, lm) or cls.scale_free())})

    @classmethod
    def scale_free(cls) -> dict[str, Any]:
        """Settings in the model's own units, for a model nothing is known about.

        Small steps find near targets: with lr 0.5 the first steps already reach the clamp, and what is too long costs every other fact
        (measured on the bundled models: a third shorter at 0.05, and eight points of specificity). No target moves the stream by more than
        its own length: twice as far does not write more on the bundled models, and costs a small GPT-2 five points of the rest.
        """
        return {
            "scale": "auto",
            "steps": 80,
            "lr": 0.05,
            "clamp": 2.0,
            "stop_loss": 0.02,
            "keys": "each",
            "subject_share": 0.3,
            "moment_weight": None,
            "repair": 4,
        }

    def for_facts(self, count: int, n_layers: int, d_ff: int) -> Self:
        """The settings for `count` facts, new and earlier, in `n_layers` layers of `d_ff` neurons: λ filled in if it is left open."""
        return (
            self
            if self.moment_weight is not None
            else dataclasses.replace(self, moment_weight=min(10.0 * count / n_layers, float(d_ff)))
        )

    @abstractmethod
    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One layer's update, (d_model, n) and (n, d_ff), from keys (n, d_ff), residuals (n, d_model), and Σ k kᵀ of earlier edits."""


@dataclass(frozen=True)
class MemitConfig(SpreadConfig):
    """Settings of MEMIT."""

    _: KW_ONLY
    moment_weight: float | None = 15_000.0
    """λ; the authors' value for GPT-J (20,000 for GPT-2 XL). None as in SpreadConfig."""

    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """MEMIT, equation 14."""
        assert self.moment_weight is not None
        return solve.memit(
            keys, residuals, _factor(moment, stored, self.moment_weight), self.moment_weight
        )


@dataclass(frozen=True)
class EmmetConfig(SpreadConfig):
    """Settings of EMMET: like ROME it asks for equality, and for all facts at once."""

    _: KW_ONLY
    moment_weight: float | None = 1_000.0
    """Factor of the second moment beside `ridge`; the authors' value for GPT-2 XL (1 for GPT-J). With a ridge it is MEMIT with
    λ = moment_weight · ridge; None sets that λ as in SpreadConfig."""
    ridge: float = 0.1
    """Added to the keys' Gram matrix when there is more than one fact, the authors' value; with 0 every key gets its output exactly, which
    keys that nearly coincide pay for with a large update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ridge = check_number(self.ridge, "ridge", least=0)
        object.__setattr__(self, "ridge", ridge)

    def for_facts(self, count: int, n_layers: int, d_ff: int) -> Self:
        """λ is filled in as in SpreadConfig, divided by the ridge."""
        if self.moment_weight is not None:
            return self
        filled = super().for_facts(count, n_layers, d_ff)
        assert filled.moment_weight is not None
        return dataclasses.replace(filled, moment_weight=filled.moment_weight / (self.ridge or 1.0))

    @classmethod
    def scale_free(cls) -> dict[str, Any]:
        """One key a fact, since equality at six nearly equal keys asks for too much."""
        return {**super().scale_free(), "keys": "mean", "subject_share": 0.0}

    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """EMMET, equation 15."""
        assert self.moment_weight is not None
        factor = _factor(
            moment, stored, self.moment_weight * (self.ridge or 1.0)
        )  # λ, also where one fact is asked for exactly
        return solve.emmet(
            keys, residuals, factor, self.moment_weight, self.ridge if len(keys) > 1 else 0.0
        )


@dataclass(frozen=True)
class AlphaEditConfig(SpreadConfig):
    """Settings of AlphaEdit: it writes only into directions that ordinary text hardly uses."""

    _: KW_ONLY
    threshold: float | None = None
    """Eigenvalues of the second moment below it make the null space; the authors' 0.02 where no energy is given. It does not carry over to
    models whose coefficients have another size: there `energy` does."""
    energy: float | None = None
    """Instead of a threshold: the share of the second moment's trace that stays outside the null space."""
    l2: float | None = 10.0
    """Ridge of the update inside the null space, in squared coefficients; the authors' value. None: λ (`moment_weight`) times what ordinary
    text has in an average direction of the null space, so that it follows the size of the coefficients and the number of facts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None and self.energy is None:
            object.__setattr__(self, "threshold", 0.02)
        if self.threshold is not None and self.energy is not None:
            raise InputError(
                f"AlphaEdit takes a threshold or an energy, the other None; got {self.threshold!r} and {self.energy!r}"
            )
        if self.threshold is not None:
            _set_positive(self, "threshold")
        if self.energy is not None:
            _set_positive(self, "energy", below=1)
        if self.l2 is not None:
            _set_positive(self, "l2")
            if self.moment_weight is not None:
                raise InputError(
                    f"AlphaEdit takes an l2 or a moment_weight, the other None; got {self.l2!r} and {self.moment_weight!r}"
                )

    def for_facts(self, count: int, n_layers: int, d_ff: int) -> Self:
        """λ is filled in as in SpreadConfig where there is no l2."""
        return self if self.l2 is not None else super().for_facts(count, n_layers, d_ff)

    @classmethod
    def scale_free(cls) -> dict[str, Any]:
        """The null space by energy, and its ridge by λ, since a threshold and an l2 depend on how large coefficients are.

        Of the atlas' second moment 0.7 leaves 86 to 97 % of the directions: at a load of 0.1 ten points better than 0.9, which leaves too
        little room for 307 facts.
        """
        return {**super().scale_free(), "threshold": None, "energy": 0.7, "l2": None}

    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """AlphaEdit, equation 14."""
        basis = moment.null_space(threshold=self.threshold, energy=self.energy)
        l2 = self.l2
        if l2 is None:
            assert self.moment_weight is not None
            values = moment.spectrum[0]
            smallest = values[: basis.shape[1]].mean()  # of the eigenvalues of its directions
            if basis.shape[1] and smallest <= JITTERS[1] * values.mean():
                raise NumericsError(
                    f"its text leaves the null space empty, so there is nothing to size l2 by: {moment.too_little}"
                )
            l2 = self.moment_weight * float(smallest)
        return solve.alphaedit(keys, residuals, basis, l2, stored)


def _factor(moment: SecondMoment, stored: Tensor | None, weight: float) -> Tensor:
    """The Cholesky factor of C, or of C + Σ stored k kᵀ / λ."""
    if stored is None:
        return moment.factor
    return cholesky(solve.with_stored(moment.matrix, stored, weight))
