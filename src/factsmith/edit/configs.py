"""The settings of each editing method.

    RomeConfig(layer=5)                                         # the authors' values
    MemitConfig((3, 4, 5, 6, 7, 8), moment_weight=20_000)       # the authors' values with another λ
    MemitConfig.recommended(lm)                                 # for any model, by its own norms

All of them extend `TargetConfig`, which says how the search for v_star runs. An `EditConfig` adds
where the method edits. A `SpreadConfig` adds what the methods of the MEMIT family have in common.
Its subclasses differ in one formula, `update`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.documented import documented
from ..core.errors import InputError, LayerError, NumericsError
from ..corpus.factors import JITTERS, cholesky
from ..corpus.moments import SecondMoment
from ..corpus.scan import Site as Read
from ..model.language_model import LanguageModel
from . import solve
from .config_checks import check_choice, set_positive, sorted_layers
from .contexts import generate_contexts, generate_openings
from .keys import Site
from .target import TargetConfig


def shipped(settings: type[TargetConfig], lm: LanguageModel) -> dict[str, Any]:
    """Return the settings of a method that came with the model, or {} if none did.

    A model brings settings in its config.json: {"factsmith": {"rome": {"layer": 1, ...}}}.

    Raises:
        InputError: These settings are not fields of the class.
    """
    name = settings.__name__.removesuffix("Config").lower()
    values = getattr(lm.config, "factsmith", None) or {}
    values = values.get(name, {}) if isinstance(values, Mapping) else values
    fields = {field.name for field in dataclasses.fields(settings)}
    if not isinstance(values, Mapping) or not fields >= set(values):
        raise InputError(
            f"config.json of {lm.name} has the settings {values!r} under factsmith.{name}; "
            f"expected some of {sorted(fields)}. Correct the file, or give the settings yourself."
        )
    return dict(values)


@dataclass(frozen=True)
class EditConfig(TargetConfig, ABC):
    """What the settings of all methods have in common."""

    @property
    @abstractmethod
    def site(self) -> Site:
        """Where the method searches its targets: the layer's "ffn", or the "stream" after it."""

    @abstractmethod
    def own_contexts(self, lm: LanguageModel, seed: int) -> list[str]:
        """Return the contexts that the model writes for this method, with `{}` for the prompt."""

    @property
    def together(self) -> bool:
        """Whether the facts' targets are searched together, on the model as it is."""
        return True

    @property
    def draws_on(self) -> Read:
        """Of what the method needs second moments."""
        return "coefficients"

    @property
    @abstractmethod
    def edited(self) -> tuple[int, ...] | None:
        """The layers to edit. None: not chosen yet."""

    @abstractmethod
    def at(self, layers: Sequence[int]) -> Self:
        """Return the same settings for these layers."""

    @classmethod
    @abstractmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """Return the settings that came with the model, or settings that suit any model."""


@dataclass(frozen=True)
class OneLayerConfig(EditConfig):
    """What the settings of methods that edit one layer have in common."""

    kind: ClassVar[str] = "the method"
    layer: int | None = None
    """The layer to edit. None: the layer of `recommended`. `propose` and a Workbench first look for
    a layer that was kept, published or measured for this model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            meaning = "the number of the layer to edit"
            layer = check_count(
                self.layer, "layer", meaning, least=0, also="None", error=LayerError
            )
            object.__setattr__(self, "layer", layer)

    @property
    def site(self) -> Site:
        """The targets are outputs of the down-projection."""
        return "ffn"

    @property
    def edited(self) -> tuple[int, ...] | None:
        """The layer as a tuple, or None."""
        return None if self.layer is None else (self.layer,)

    def at(self, layers: Sequence[int]) -> Self:
        """Return the same settings for one layer.

        Raises:
            LayerError: There is not exactly one layer.
        """
        if len(layers) != 1:
            raise LayerError(
                f"{self.kind} edits one layer; got {tuple(layers)}. Give one layer, or a method "
                "that edits several, such as memit.",
                argument="layer",
            )
        return dataclasses.replace(self, layer=layers[0])


@documented
@dataclass(frozen=True)
class RomeConfig(OneLayerConfig):
    """Settings of ROME: the layer, and how the target is searched (the fields of TargetConfig)."""

    kind: ClassVar[str] = "ROME"

    @property
    def together(self) -> bool:
        """Each target is searched on the model that carries the facts before it."""
        return False

    def own_contexts(self, lm: LanguageModel, seed: int) -> list[str]:
        """Return the bare prompt and 20 contexts that the model writes.

        Those in the chat template follow, except with scale="paper": the papers have none.
        """
        return generate_contexts(lm, seed, chat=self.scale != "paper")

    @classmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """Return the settings that came with the model, or settings that suit any model.

        The latter use scale="auto", up to 80 steps of 0.1, and the layer n_layers // 6. The
        published layers lie at about a sixth of the depth (GPT-J 5 of 28, Llama-3 5 of 32, GPT-2 XL
        17 of 48). A layer that was published or measured for this model is better; see
        `recommend_layers`.

        The steps are smaller than the authors' 0.5, because small steps find nearer targets. With
        Adam, in 200 single edits of the atlas, efficacy rose from 97.5 to 99.5 %, generalization
        from 94.5 to 95.8 % and specificity from 97.0 to 97.9 %. With the margin search, which is
        the default here, a search takes 5 to 15 of the 80 steps.

        Raises:
            InputError: The settings that came with the model cannot be used.
        """
        settings = shipped(cls, lm) or {"scale": "auto", "steps": 80, "lr": 0.1}
        return cls(**{"layer": lm.n_layers // 6, **settings})


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
    """Settings of the methods that write many facts at once into several layers.

    `update` is the formula of one layer. Each method has its own.
    """

    layers: tuple[int, ...] | None = None
    """The layers to edit, in ascending order. None: the layers of `recommended`. `propose` and a
    Workbench first look for layers that were kept, published or measured for this model."""
    _: KW_ONLY
    clamp: float = 0.75
    """Largest ‖δ‖. With scale="paper" the unit is the norm of the stream where δ is added, and 0.75
    is the authors' value. With "auto" the unit is half of that norm."""
    spread: Literal["even", "sqrt"] = "even"
    """The part of the missing output that a layer takes if n layers are left. "even": 1/n, as in
    MEMIT. "sqrt": 1/√n, as in PMET, so that the lower layers take more."""
    keys: Literal["mean", "each"] = "mean"
    """"mean": a fact has one key, the average over the contexts, as in the papers. "each": a fact
    has a key for each context, and its output is asked for at all of them. Then other phrasings of
    the fact follow more often."""
    subject_share: float = 0.0
    """Share of a fact's weight for keys of the subject alone, after other words than the prompt's.
    It needs keys="each". The papers use 0. On the atlas, 0.3 makes four more of a hundred other
    phrasings follow, and changes one more of a hundred other facts."""
    norm_anchor: float | Literal["mean"] | None = None
    """Norm to which the wanted output of the last layer's feed-forward network is rescaled. Then
    the norms do not grow from round to round. "mean": the mean norm over the facts of the first
    round.
    None: no rescaling, as in the papers."""
    moment_weight: float | None = None
    """λ, the number of tokens of ordinary text that weigh as much as one fact. None: ten for each
    fact in a layer, but not more than the layer has neurons. With more facts, a larger part of what
    one fact asks for is noise from the others, so λ grows. On the atlas (three layers of 1,024
    neurons), the harmonic mean is best at λ = 30 for 9 facts, 300 for 92 facts and 1,000 for
    307."""
    repair: int = 0
    """How often the facts that the model does not assert yet get a new target, searched on the
    edited model, and are written again while the other facts are kept (UnderEdit,
    https://arxiv.org/abs/2503.11895). 0: the authors' single pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", sorted_layers(self.layers))
        check_choice(self.spread, "spread", ("even", "sqrt"))
        check_choice(self.keys, "keys", ("mean", "each"))
        share = check_number(self.subject_share, "subject_share", least=0, below=1)
        if share and self.keys != "each":
            raise InputError(
                f"subject_share is {share!r} with keys={self.keys!r}: it must be 0 unless keys is "
                '"each"',
                argument="subject_share",
            )
        object.__setattr__(self, "subject_share", share)
        if self.norm_anchor not in (None, "mean"):
            set_positive(self, "norm_anchor", also='"mean" or None')
        if self.moment_weight is not None:
            set_positive(self, "moment_weight")
        object.__setattr__(self, "repair", check_count(self.repair, "repair", least=0))

    @property
    def site(self) -> Site:
        """The targets of these methods are states of the stream."""
        return "stream"

    def own_contexts(self, lm: LanguageModel, seed: int) -> list[str]:
        """Return the bare prompt and 5 openings that the model continues.

        Those in the chat template follow, except with scale="paper": the papers have none.
        """
        return generate_openings(lm, seed, chat=self.scale != "paper")

    @property
    def edited(self) -> tuple[int, ...] | None:
        """The layers, or None."""
        return self.layers

    def at(self, layers: Sequence[int]) -> Self:
        """Return the same settings for these layers."""
        return dataclasses.replace(self, layers=tuple(layers))

    @classmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """Return the settings that came with the model, or those of `scale_free`.

        Layers that did not come with the model are those of `by_depth`. Layers that were published
        or measured for this model are better; see `recommend_layers`.

        Raises:
            InputError: The settings that came with the model cannot be used.
        """
        settings = shipped(cls, lm) or cls.scale_free()
        return cls(**{"layers": by_depth(lm.n_layers), **settings})

    @classmethod
    def scale_free(cls) -> dict[str, Any]:
        """Return settings in the model's own units, for a model nothing is known about.

        Small steps find near targets. With Adam and lr=0.5 the first steps already reach the clamp,
        and a target that is too far costs all other facts. On the bundled models, lr=0.05 gives
        targets that are a third shorter, and eight points more specificity. The margin search finds
        targets of that length too, in a fifth of the steps.

        With clamp=2 a target moves the stream by at most the stream's own norm. Twice that distance
        writes no more facts on the bundled models, and costs a small GPT-2 five points of the
        other facts.
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
        """Return the settings with λ filled in, if it is None.

        Args:
            count: Number of facts, new and already stored.
            n_layers: Number of edited layers.
            d_ff: Neurons of a layer.
        """
        if self.moment_weight is not None:
            return self
        return dataclasses.replace(self, moment_weight=min(10.0 * count / n_layers, float(d_ff)))

    @abstractmethod
    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the update of one layer as factors (d_model, n) and (n, d_ff), float64.

        Args:
            keys: (n, d_ff).
            residuals: (n, d_model) the wanted changes of the output at these keys.
            moment: The layer's second moment.
            stored: (d_ff, d_ff) Σ k kᵀ over the keys of earlier edits. None: no such keys.
        """


@documented
@dataclass(frozen=True)
class MemitConfig(SpreadConfig):
    """Settings of MEMIT."""

    _: KW_ONLY
    moment_weight: float | None = 15_000.0
    """λ, the number of tokens of ordinary text that weigh as much as one fact. 15,000 is the
    authors' value for GPT-J (20,000 for GPT-2 XL). None: ten for each fact in a layer, but not more
    than the layer has neurons."""

    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return MEMIT's update, equation 14."""
        assert self.moment_weight is not None
        factor = _factor(moment, stored, self.moment_weight)
        return solve.memit(keys, residuals, factor, self.moment_weight)


@documented
@dataclass(frozen=True)
class EmmetConfig(SpreadConfig):
    """Settings of EMMET: it asks for exact outputs as ROME does, and for all facts at once."""

    _: KW_ONLY
    moment_weight: float | None = 1_000.0
    """Factor of the second moment. 1,000 is the authors' value for GPT-2 XL (1 for GPT-J). With a
    ridge, EMMET is MEMIT with λ = moment_weight · ridge. None: this λ is as in SpreadConfig."""
    ridge: float = 0.1
    """Added to the diagonal of the keys' Gram matrix if there is more than one fact. 0.1 is the
    authors' value. With 0 each key gets its output exactly, which takes a large update if two keys
    nearly coincide."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ridge", check_number(self.ridge, "ridge", least=0))

    def for_facts(self, count: int, n_layers: int, d_ff: int) -> Self:
        """Return the settings with λ filled in as in SpreadConfig, divided by the ridge."""
        if self.moment_weight is not None:
            return self
        filled = super().for_facts(count, n_layers, d_ff)
        assert filled.moment_weight is not None
        return dataclasses.replace(filled, moment_weight=filled.moment_weight / (self.ridge or 1.0))

    @classmethod
    def scale_free(cls) -> dict[str, Any]:
        """Return the settings of SpreadConfig with one key for each fact.

        Exact outputs at several keys of one fact, which nearly coincide, ask for too much.
        """
        return {**super().scale_free(), "keys": "mean", "subject_share": 0.0}

    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return EMMET's update, equation 15."""
        assert self.moment_weight is not None
        # Stored keys count by λ also for a single fact, which is written without the ridge.
        factor = _factor(moment, stored, self.moment_weight * (self.ridge or 1.0))
        ridge = self.ridge if len(keys) > 1 else 0.0
        return solve.emmet(keys, residuals, factor, self.moment_weight, ridge)


@documented
@dataclass(frozen=True)
class AlphaEditConfig(SpreadConfig):
    """Settings of AlphaEdit: it writes only into directions that ordinary text hardly uses."""

    _: KW_ONLY
    threshold: float | None = None
    """The null space is spanned by the eigenvectors of the second moment with eigenvalues below
    this threshold. If neither threshold nor energy is given, it is the authors' 0.02. That value
    does not suit models whose coefficients have another size. For those use `energy`."""
    energy: float | None = None
    """Share of the second moment's trace outside the null space, instead of a threshold."""
    l2: float | None = 10.0
    """Ridge of the update inside the null space, in squared coefficients. 10 is the authors' value.
    None: λ (`moment_weight`) times the mean eigenvalue of the null space's directions. Then it
    follows the size of the coefficients and the number of facts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None and self.energy is None:
            object.__setattr__(self, "threshold", 0.02)
        if self.threshold is not None and self.energy is not None:
            raise InputError(
                f"threshold is {self.threshold!r} and energy is {self.energy!r}: AlphaEdit takes a "
                "threshold or an energy. Set the other to None.",
                argument="energy",
            )
        if self.threshold is not None:
            set_positive(self, "threshold")
        if self.energy is not None:
            set_positive(self, "energy", below=1)
        if self.l2 is not None:
            set_positive(self, "l2")
            if self.moment_weight is not None:
                raise InputError(
                    f"l2 is {self.l2!r} and moment_weight is {self.moment_weight!r}: AlphaEdit "
                    "takes an l2 or a moment_weight. Set the other to None.",
                    argument="l2",
                )

    def for_facts(self, count: int, n_layers: int, d_ff: int) -> Self:
        """Return the settings with λ filled in as in SpreadConfig, if there is no l2."""
        return self if self.l2 is not None else super().for_facts(count, n_layers, d_ff)

    @classmethod
    def scale_free(cls) -> dict[str, Any]:
        """Return the settings of SpreadConfig with an energy, and with l2 from λ.

        A threshold and an l2 depend on the size of the coefficients. An energy of 0.7 leaves 86 to
        97 % of the directions of the atlas' second moment in the null space. At a load of 0.1 it is
        ten points better than 0.9, which leaves too little room for 307 facts.
        """
        return {**super().scale_free(), "threshold": None, "energy": 0.7, "l2": None}

    def update(
        self, keys: Tensor, residuals: Tensor, moment: SecondMoment, stored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return AlphaEdit's update, equation 14."""
        basis = moment.null_space(threshold=self.threshold, energy=self.energy)
        l2 = self._l2_of(moment, basis.shape[1]) if self.l2 is None else self.l2
        return solve.alphaedit(keys, residuals, basis, l2, stored)

    def _l2_of(self, moment: SecondMoment, dimensions: int) -> float:
        """Return λ times the mean eigenvalue of the null space's directions."""
        assert self.moment_weight is not None
        values = moment.spectrum[0]
        mean = values[:dimensions].mean()
        if dimensions and mean <= JITTERS[1] * values.mean():
            raise NumericsError(
                "ordinary text does not use the null space at all, so l2 cannot be computed from "
                f"it: {moment.too_little}"
            )
        return self.moment_weight * float(mean)


def _factor(moment: SecondMoment, stored: Tensor | None, weight: float) -> Tensor:
    """Return the Cholesky factor of C, or of C + Σ stored k kᵀ / λ."""
    if stored is None:
        return moment.factor
    return cholesky(solve.with_stored(moment.matrix, stored, weight))
