"""The editors: from facts to a Delta.

    moments = second_moments(lm, texts, layers=[1])
    delta = rome(lm, Fact("Danielle Darrieux", "The mother tongue of {} is", "English"), RomeConfig(layer=1), moments=moments)
    delta = memit(lm, facts, MemitConfig(layers=(0, 1, 2)), moments=second_moments(lm, texts, layers=[0, 1, 2]))

The model is as before when an editor returns; `applied(lm, delta)` puts the edit in. ROME and r-ROME write one fact after another into one
layer. The others write all facts at once into several layers, in the same way: find what should stand in the stream after the last of
them, and let every layer add its share, from the lowest up (`_write`). They differ in the formula of a layer, which is a line of `solve`
named in their settings (`update`).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..checks import check_count, check_items, check_number, whole_number
from ..errors import InputError, LayerError, NumericsError
from ..fact import Fact, listed
from ..model.load import LanguageModel
from ..progress import Progress, tell
from ..tables import counted
from . import solve
from .contexts import SUBJECT, generate_contexts, generate_openings
from .contexts import weights as context_weights
from .delta import Delta, applied
from .moments import SecondMoment
from .target import Site, TargetConfig, Targets, check_contexts, check_layer, find_targets, known_targets, read_keys, read_stream, to_down

if TYPE_CHECKING:
    from typing_extensions import Self

Moments = SecondMoment | Mapping[int, SecondMoment]
_Known = Callable[[Sequence[Fact], int, Site], Targets]
"""Gives targets of facts at a layer and site that were found before."""


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
        raise InputError(f"{lm.name}: config.json has settings {brought!r} under factsmith.{name}; expected some of {sorted(known)}")
    return dict(brought)


@dataclass(frozen=True)
class EditConfig(TargetConfig):
    """Settings of any editor: what all of them have in common."""

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
            layer = check_count(self.layer, "layer", "the number of a layer, counted from 0, or None", least=0, error=LayerError)
            object.__setattr__(self, "layer", layer)

    @property
    def edited(self) -> tuple[int, ...] | None:
        """The layer as a tuple, or None."""
        return None if self.layer is None else (self.layer,)

    def at(self, layers: Sequence[int]) -> Self:
        """The same settings for one layer; raises LayerError for several."""
        if len(layers) != 1:
            raise LayerError(f"ROME edits one layer; got {tuple(layers)}: name one, or use a method that spreads its edits, such as memit")
        return dataclasses.replace(self, layer=layers[0])

    @classmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """The settings that came with the model, else scale="auto" with up to 80 steps of 0.1 at layer n_layers // 6.

        A sixth of the depth is where the published layers lie on average (GPT-J 5 of 28, Llama-3 5 of 32, GPT-2 XL 17 of 48); what was
        published or measured for this model is better: `recommend_layers`. Steps are smaller than the authors' 0.5, and more, since they
        find nearer targets (200 single edits of the atlas: efficacy 97.5 to 99.5 %, generalization 94.5 to 95.8, specificity 97.0 to 97.9);
        an easy fact stops long before the last. Raises InputError as `shipped`.
        """
        return cls(**{"layer": lm.n_layers // 6, **(shipped(cls, lm) or {"scale": "auto", "steps": 80, "lr": 0.1})})


def _set_positive(config: EditConfig, name: str, expected: str = "a finite number above 0") -> None:
    """Keep a setting as a plain number; raises InputError unless it is one above 0."""
    value = check_number(getattr(config, name), name, expected)
    if value <= 0:
        raise InputError(f"{name} is {value!r}; expected {expected}")
    object.__setattr__(config, name, value)


def _layers(layers: object) -> tuple[int, ...]:
    """Numbers of layers, ascending; raises LayerError for anything else, and for one that is there twice."""
    given = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes)) else [layers]
    found = [number for number in map(whole_number, given) if number is not None and number >= 0]
    if not found or len(found) < len(given) or len(set(found)) < len(found):
        raise LayerError(f"layers are numbers of layers, counted from 0, each once, or None; got {layers!r}")
    return tuple(sorted(found))


def by_depth(n_layers: int) -> tuple[int, ...]:
    """Layers for the MEMIT family where nothing is known: from below a sixth of the depth to a third of it, as the published ranges lie."""
    rome = n_layers // 6
    return tuple(range(max(0, rome - 1), max(rome, min(rome + 3, n_layers // 3)) + 1))


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
        share = check_number(self.subject_share, "subject_share", "a share from 0 to below 1")
        if not 0 <= share < 1 or (share and self.keys != "each"):
            raise InputError(f'subject_share is a share from 0 to below 1, above 0 only with keys="each"; got {share!r} with {self.keys!r}')
        object.__setattr__(self, "subject_share", share)
        if self.norm_anchor not in (None, "mean"):
            _set_positive(self, "norm_anchor", 'a norm above 0, "mean" or None')
        if self.moment_weight is not None:
            _set_positive(self, "moment_weight")
        object.__setattr__(self, "repair", check_count(self.repair, "repair", "a whole number of at least 0", least=0))

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
            self if self.moment_weight is not None else dataclasses.replace(self, moment_weight=min(10.0 * count / n_layers, float(d_ff)))
        )

    @abstractmethod
    def update(self, keys: Tensor, residuals: Tensor, moment: SecondMoment, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer's update, (d_model, n) and (n, d_ff), from keys (n, d_ff), residuals (n, d_model), and Σ k kᵀ of earlier edits."""


@dataclass(frozen=True)
class MemitConfig(SpreadConfig):
    """Settings of MEMIT."""

    _: KW_ONLY
    moment_weight: float | None = 15_000.0
    """λ; the authors' value for GPT-J (20,000 for GPT-2 XL). None as in SpreadConfig."""

    def update(self, keys: Tensor, residuals: Tensor, moment: SecondMoment, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
        """MEMIT, equation 14."""
        assert self.moment_weight is not None
        return solve.memit(keys, residuals, _factor(moment, earlier, self.moment_weight), self.moment_weight)


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
        ridge = check_number(self.ridge, "ridge", "a finite number of at least 0")
        if ridge < 0:
            raise InputError(f"ridge is {ridge!r}; expected a finite number of at least 0")
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

    def update(self, keys: Tensor, residuals: Tensor, moment: SecondMoment, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
        """EMMET, equation 15."""
        assert self.moment_weight is not None
        factor = _factor(moment, earlier, self.moment_weight * (self.ridge or 1.0))  # λ, also where one fact is asked for exactly
        return solve.emmet(keys, residuals, factor, self.moment_weight, self.ridge if len(keys) > 1 else 0.0)


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
            raise InputError(f"AlphaEdit takes a threshold or an energy, the other None; got {self.threshold!r} and {self.energy!r}")
        if self.threshold is not None:
            _set_positive(self, "threshold")
        if self.energy is not None:
            _set_positive(self, "energy", "a share between 0 and 1")
            if self.energy >= 1:
                raise InputError(f"energy is {self.energy!r}; expected a share between 0 and 1")
        if self.l2 is not None:
            _set_positive(self, "l2")
            if self.moment_weight is not None:
                raise InputError(f"AlphaEdit takes an l2 or a moment_weight, the other None; got {self.l2!r} and {self.moment_weight!r}")

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

    def update(self, keys: Tensor, residuals: Tensor, moment: SecondMoment, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
        """AlphaEdit, equation 14."""
        basis = moment.null_space(threshold=self.threshold, energy=self.energy)
        l2 = self.l2
        if l2 is None:
            assert self.moment_weight is not None
            values = moment.spectrum[0]
            smallest = values[: basis.shape[1]].mean()  # of the eigenvalues of its directions
            if basis.shape[1] and smallest <= solve.JITTERS[1] * values.mean():
                raise NumericsError(f"its text leaves the null space empty, so there is nothing to size l2 by: {moment.too_little}")
            l2 = self.moment_weight * float(smallest)
        return solve.alphaedit(keys, residuals, basis, l2, earlier)


def rome(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: RomeConfig | None = None,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    earlier: Sequence[Delta] = (),
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> Delta:
    """Rank-one model editing: one rank-one update of one down-projection for each fact. https://arxiv.org/abs/2202.05262

    moments   the second moment of the edited layer, or {layer: SecondMoment}
    contexts  templates with `{}` for the prompt, the bare "{}" among them; None: generated by the model from `seed`
    earlier   deltas that are in the model already, in their order, the first made on the unedited model; ROME does not look at them, and
              the second moment is then the unedited model's
    targets   of a single fact, found before on this model: `find_targets` at the layer; then there is no search
    progress  called with what is being done, how much of it is done, and how much there is

    ROME writes one fact. Several are written one after another, each solved on the model with the earlier ones in it, so the result has
    rank n_facts and depends on the order. The model itself is untouched. Raises LayerError, SubjectError, InputError (no facts, two targets
    for a prompt, no moment for the layer, contexts without "{}"), UnsupportedModelError (mixture of experts), NumericsError.
    """
    return _one_by_one(lm, facts, config, "rome", moments, contexts, seed, earlier, targets, progress)


def r_rome(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: RomeConfig | None = None,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    earlier: Sequence[Delta] = (),
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> Delta:
    """ROME with one key: the mean over contexts stands for the fact everywhere, not only in the numerator. https://arxiv.org/abs/2403.07175

    It is the update of ROME's equation 2 to the letter, and free of the edits that break a model because two keys hardly overlap.
    Arguments, result and errors as `rome`.
    """
    return _one_by_one(lm, facts, config, "r-rome", moments, contexts, seed, earlier, targets, progress)


def rome_each(
    lm: LanguageModel,
    facts: Iterable[Fact],
    config: RomeConfig | None = None,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Delta]:
    """What `rome` gives for each fact alone, all found in one batch: for measuring many single edits, as the paper's tables do."""
    facts = listed(facts)
    layer, config, moment, contexts = _prepare(lm, config, moments, contexts, seed)
    targets = find_targets(lm, facts, layer, config, contexts)
    return _deltas(lm, facts, targets, "rome", config, moment, contexts, lm.fingerprint)


def memit(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: MemitConfig | None = None,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    earlier: Sequence[Delta] = (),
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> Delta:
    """Mass-editing memory: all facts at once, spread over several layers. https://arxiv.org/abs/2210.07229

    moments   {layer: SecondMoment} of the edited layers, of the unedited model
    contexts  templates with `{}` for the prompt, the bare "{}" among them; it weighs one half in a key, the others the other half. None:
              generated by the model from `seed`
    earlier   deltas that are in the model already, in their order, the first made on the unedited model: their keys are kept, Σ k kᵀ, as in
              the authors' sequential variant (MEMIT_seq)
    targets   found before for these facts, on this model: `find_targets` at the last of the layers, site="stream"; then there is no search
    progress  called with what is being done, how much of it is done, and how much there is

    The model itself is untouched. Raises LayerError, SubjectError, InputError (no facts, two targets for a prompt, no moment for a layer,
    contexts without "{}"), UnsupportedModelError (mixture of experts), NumericsError.
    """
    return _all_at_once(lm, facts, config or MemitConfig.recommended(lm), "memit", moments, contexts, seed, earlier, targets, progress)


def emmet(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: EmmetConfig | None = None,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    earlier: Sequence[Delta] = (),
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> Delta:
    """Equality-constrained mass-editing: ROME's constraint for a whole batch of facts. https://arxiv.org/abs/2403.14236

    Arguments, result and errors as `memit`.
    """
    return _all_at_once(lm, facts, config or EmmetConfig.recommended(lm), "emmet", moments, contexts, seed, earlier, targets, progress)


def alphaedit(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: AlphaEditConfig | None = None,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    earlier: Sequence[Delta] = (),
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> Delta:
    """Null-space constrained editing: the update leaves what ordinary text uses alone. https://arxiv.org/abs/2410.02355

    Arguments, result and errors as `memit`.
    """
    return _all_at_once(
        lm, facts, config or AlphaEditConfig.recommended(lm), "alphaedit", moments, contexts, seed, earlier, targets, progress
    )


METHODS: dict[str, tuple[Callable[..., Delta], type[EditConfig]]] = {
    "rome": (rome, RomeConfig),
    "r-rome": (r_rome, RomeConfig),
    "memit": (memit, MemitConfig),
    "emmet": (emmet, EmmetConfig),
    "alphaedit": (alphaedit, AlphaEditConfig),
}
"""Every editor by its name, with the class of its settings."""


def resolve(
    lm: LanguageModel,
    delta: Delta,
    facts: Iterable[Fact] | None = None,
    *,
    moments: Moments,
    earlier: Sequence[Delta] = (),
    progress: Progress | None = None,
) -> Delta:
    """A patch, or some of its facts, solved again on the model as it is: in closed form, from the targets v_star it was made with.

    facts    of the delta, those that stay; None: all
    moments  of the edited layers, of the unedited model, as when it was made
    earlier  deltas that are in the model already

    Nothing is searched and no gradient is taken: keys are read anew in forward passes, since what lies below may have changed, and the
    layers' systems are solved for the old targets. Facts that a pass leaves short get another, as often as the patch's settings repair.
    Raises InputError for facts that are none of the delta's, or a delta whose method or settings are not known; else as the methods.
    """
    if not isinstance(delta, Delta):
        raise InputError(f"expected a Delta to solve again; got {type(delta).__name__}")
    wanted = list(delta.facts if facts is None else facts)
    place = {fact.text: i for i, fact in enumerate(delta.facts)}
    if not wanted or any(delta.facts[place[fact.text]] != fact if fact.text in place else True for fact in wanted):
        raise InputError(f"expected some of the {counted(len(delta.facts), 'fact')} of the patch; got {[str(fact) for fact in wanted][:3]}")
    _, kind = editor(delta.method)
    fields: dict[str, Any] = {field.name: delta.config[field.name] for field in dataclasses.fields(kind) if field.name in delta.config}
    try:
        config = kind(**fields)
        contexts = [str(context) for context in delta.config["contexts"]]
    except (TypeError, KeyError) as error:
        raise InputError(f"the patch's settings cannot be read ({error}); write its facts again instead") from None
    v_star = {fact.text: delta.v_star[place[fact.text]] for fact in wanted}
    convergence = {fact.text: delta.convergence[place[fact.text]] for fact in wanted if len(delta.convergence) == len(delta.facts)}

    def known(some: Sequence[Fact], layer: int, site: Site) -> Targets:
        targets = known_targets(lm, some, layer, contexts, torch.stack([v_star[fact.text] for fact in some]), site=site)
        told = [{k: v for k, v in convergence.get(f.text, {}).items() if k not in ("shares_key_with", "cosine")} for f in some]
        return dataclasses.replace(targets, convergence=tuple({**each, "solved": "again"} for each in told))

    if isinstance(config, SpreadConfig):
        config = dataclasses.replace(config, norm_anchor=None)  # v_star was brought to it already
        found = _all_at_once(lm, wanted, config, delta.method, moments, contexts, 0, earlier, None, progress, known)
    else:
        assert isinstance(config, RomeConfig)
        found = _one_by_one(lm, wanted, config, delta.method, moments, contexts, 0, earlier, None, progress, known)
    return dataclasses.replace(found, config=delta.config)  # the recipe is the same


def editor(method: str, config: object = None) -> tuple[Callable[..., Delta], type[EditConfig]]:
    """An editor by its name, and the class of its settings; raises InputError for an unknown name, or for settings of another class."""
    if method not in METHODS:
        raise InputError(f"no method {method!r}; expected one of {', '.join(METHODS)}")
    solver, kind = METHODS[method]
    if config is not None and not isinstance(config, kind):
        raise InputError(f"{method} takes a {kind.__name__}; got {type(config).__name__}")
    return solver, kind


def _checked(config: EditConfig | None, method: str, earlier: Sequence[Delta]) -> list[Delta]:
    """The earlier deltas as a list; raises InputError for anything else, and for the settings of another method."""
    editor(method, config)
    deltas = [earlier] if isinstance(earlier, Delta) else check_items(earlier, "earlier", "the deltas that are in the model already")
    if wrong := [type(delta).__name__ for delta in deltas if not isinstance(delta, Delta)]:
        raise InputError(f"earlier are the deltas that are in the model already; got {wrong[0]}")
    return deltas


def _distinct(facts: Sequence[Fact]) -> list[Fact]:
    """Each fact once; raises InputError for two targets of one prompt, which would be averaged to something nobody asked for."""
    found: dict[str, Fact] = {}
    for fact in facts:
        first = found.setdefault(fact.text, fact)
        if (first.target and first.target.strip()) != (fact.target and fact.target.strip()):
            raise InputError(
                f"two targets for one prompt: {fact.text!r} is to be continued by {first.target!r} and by {fact.target!r}; leave one out"
            )
    return list(found.values())


SHARED_KEY = 0.95
"""Cosine of two keys under C⁻¹ from which the result says that they are nearly one. On the atlas models keys of different subjects stay
below it, but for such as North and South Korea; one subject in different prompts has 0.4 to 0.999; where it begins the prompt, 1."""


def _with_shared_keys(
    convergence: Sequence[Mapping[str, Any]], facts: Sequence[Fact], keys: Mapping[int, Tensor], moments: Mapping[int, SecondMoment]
) -> tuple[Mapping[str, Any], ...]:
    """How the targets were found, and for each fact which other with another target it shares its key with in some layer, if any."""
    wanted = [fact.text if fact.target is None else fact.target.strip() for fact in facts]
    numbers = {target: number for number, target in enumerate(wanted)}
    groups = torch.tensor([numbers[target] for target in wanted])
    by_layer = [zip(*(x.tolist() for x in solve.closest(k, moments[layer].factor, groups)), strict=True) for layer, k in keys.items()]
    most = [max(found, key=lambda pair: pair[1]) for found in zip(*by_layer, strict=True)]
    return tuple(
        {**record, "shares_key_with": other, "cosine": cosine} if cosine >= SHARED_KEY else record
        for record, (other, cosine) in zip(convergence, most, strict=True)
    )


def _one_by_one(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: RomeConfig | None,
    method: str,
    moments: Moments,
    contexts: Sequence[str] | None,
    seed: int,
    earlier: Sequence[Delta],
    given: Targets | None,
    progress: Progress | None,
    known: _Known | None = None,
) -> Delta:
    facts, earlier = _distinct(listed(facts)), _checked(config, method, earlier)
    layer, config, moment, contexts = _prepare(lm, config, moments, contexts, seed, earlier)
    if given is not None:
        if len(facts) > 1:
            raise InputError(
                f"targets can be given for a single fact; got {len(facts)} facts, each of which is solved on what is written by then"
            )
        _check_targets(given, facts, layer, "ffn")
    fingerprint = lm.fingerprint
    deltas: list[Delta] = []
    for done, fact in enumerate(facts):
        tell(progress, "facts", done, len(facts))
        with applied(lm, deltas):
            if given is not None:
                targets = given
            else:
                targets = known([fact], layer, "ffn") if known is not None else find_targets(lm, [fact], layer, config, contexts)
            deltas += _deltas(lm, [fact], targets, method, config, moment, contexts, fingerprint)
    keys = torch.cat([d.k_star[layer] for d in deltas])
    return dataclasses.replace(
        deltas[0],
        layers={layer: (torch.cat([d.layers[layer][0] for d in deltas], dim=1), torch.cat([d.layers[layer][1] for d in deltas]))},
        k_star={layer: keys},
        v_star=torch.cat([d.v_star for d in deltas]),
        facts=tuple(facts),
        convergence=_with_shared_keys([c for d in deltas for c in d.convergence], facts, {layer: keys}, {layer: moment}),
    )


def _prepare(
    lm: LanguageModel, config: RomeConfig | None, moments: Moments, contexts: Sequence[str] | None, seed: int, earlier: Sequence[Delta] = ()
) -> tuple[int, RomeConfig, SecondMoment, list[str]]:
    """The layer, the settings with the layer filled in, its second moment and the contexts: all defaults resolved and checked."""
    config = config or RomeConfig.recommended(lm)
    layer = check_layer(lm, config.layer if config.layer is not None else RomeConfig.recommended(lm).layer)
    moment = _moments_of(lm, moments, [layer], earlier)[layer]
    contexts = generate_contexts(lm, seed) if contexts is None else check_contexts(contexts)
    return layer, dataclasses.replace(config, layer=layer), moment, contexts


def _moments_of(lm: LanguageModel, moments: Moments, layers: Sequence[int], earlier: Sequence[Delta]) -> dict[int, SecondMoment]:
    """The second moment of every layer, of the model without its `earlier` edits, the first of which was made on it.

    Raises InputError when one is missing or they are from different texts, FingerprintError when it is another model's or layer's.
    """
    if not isinstance(moments, (SecondMoment, Mapping)):
        raise InputError(f"moments are a SecondMoment, or those of the layers by number; got {type(moments).__name__}: see second_moments")
    held = {layers[0]: moments} if isinstance(moments, SecondMoment) and len(layers) == 1 else moments
    if isinstance(held, SecondMoment) or (missing := [layer for layer in layers if layer not in held]):
        given = "one matrix" if isinstance(held, SecondMoment) else f"layers {sorted(held)}"
        missing = list(layers) if isinstance(held, SecondMoment) else missing
        raise InputError(
            f"no second moment for layer {', '.join(map(str, missing))}; got {given}: "
            f"compute it with `factsmith moments` or second_moments(lm, texts, {missing}), or load a saved one"
        )
    found = {layer: held[layer] for layer in layers}
    for layer, moment in found.items():
        if not isinstance(moment, SecondMoment):
            raise InputError(
                f"the second moment of layer {layer} is a {type(moment).__name__}; expected a SecondMoment, as second_moments gives it; "
                "SecondMoment.from_matrix makes one of a matrix computed elsewhere"
            )
        moment.check(lm, layer, base=earlier[0].fingerprint if earlier else None)
    corpora = {layer: moment.corpus[:12] for layer, moment in found.items() if moment.corpus}
    if len(set(corpora.values())) > 1:
        told = ", ".join(f"layer {layer} from {digest}" for layer, digest in corpora.items())
        raise InputError(
            f"the second moments of the layers are from different texts ({told}), so they would be weighed by different measures; compute "
            f"them in one go: factsmith moments {' '.join(f'--layer {layer}' for layer in layers)} --texts FILE"
        )
    return found


def _deltas(
    lm: LanguageModel,
    facts: Sequence[Fact],
    targets: Targets,
    method: str,
    config: RomeConfig,
    moment: SecondMoment,
    contexts: list[str],
    fingerprint: str,
) -> list[Delta]:
    """One rank-one Delta for each fact, from its target."""
    assert config.layer is not None
    k_prompt, v_initial = targets.k_prompt, targets.v_initial
    if method == "r-rome":  # what the layer puts out for the mean key, which no prompt has: W k̄ = W k + W (k̄ − k)
        weight = lm.ffn[config.layer].weight().to(v_initial)
        k_prompt, v_initial = targets.k_star, v_initial + (targets.k_star - k_prompt) @ weight.T
    deltas = []
    for i, fact in enumerate(facts):
        residual = targets.v_star[i] - v_initial[i]
        left, right = solve.rome(targets.k_star[i].cpu(), k_prompt[i].cpu(), residual.cpu(), moment.factor.cpu())
        deltas.append(
            Delta(
                layers={config.layer: (left.float().cpu(), right.float().cpu())},
                k_star={config.layer: targets.k_star[i : i + 1].cpu()},
                v_star=targets.v_star[i : i + 1].cpu(),
                facts=(fact,),
                method=method,
                config={**dataclasses.asdict(config), "contexts": contexts},
                fingerprint=fingerprint,
                convergence=targets.convergence[i : i + 1],
            )
        )
    return deltas


_FARTHER = 1.5
"""How much farther than the clamp a repair may look for a fact that did not take: near targets cost the model less, and do for most."""

_REACHED = 1.0
"""Nats: a target that even the wider search left with less probability than 1/e is not to be had at this site, and asking again for it
would only cost what the other facts and the model hold."""


def _all_at_once(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: SpreadConfig,
    method: str,
    moments: Moments,
    contexts: Sequence[str] | None,
    seed: int,
    earlier: Sequence[Delta],
    given: Targets | None,
    progress: Progress | None,
    known: _Known | None = None,
) -> Delta:
    """The editors of the MEMIT family: targets once, then layer by layer what is still missing; repaired as often as the settings say.

    known: gives targets that were found before, instead of a search.
    """
    facts, earlier = _distinct(listed(facts)), _checked(config, method, earlier)
    layers = config.layers or type(config).recommended(lm).layers
    assert layers is not None
    for layer in layers:
        check_layer(lm, layer)
    held = _moments_of(lm, moments, layers, earlier)
    contexts = generate_openings(lm, seed) if contexts is None else check_contexts(contexts)
    if given is not None:
        _check_targets(given, facts, layers[-1], "stream")
    count = len(facts) + sum(len(delta.facts) for delta in earlier if set(delta.layers) & set(layers))
    config = config.for_facts(count, len(layers), lm.ffn[layers[0]].d_ff)
    fingerprint, last = lm.fingerprint, layers[-1]
    kept = {layer: _keys_kept(earlier, layer) for layer in layers}
    anchor = _anchor(config, earlier)
    wanted: Tensor | None = None  # (n, d_model)
    keys: dict[int, Tensor] = {}
    convergence: list[Mapping[str, Any]] = [{}] * len(facts)
    written: list[Delta] = []
    for attempt in range(config.repair + 1):
        with applied(lm, written):
            if wanted is None:
                short = list(range(len(facts)))
            else:
                again = [i for i, found in enumerate(convergence) if known is None and found["attempt"] > 1]
                lost = {i for i in again if convergence[i].get("nll", 0.0) >= _REACHED}
                short = [i for i in _not_taken(lm, facts, contexts) if i not in lost]
            if not short:
                break
            what = "targets" if wanted is None else f"targets, repair {attempt}"
            some = [facts[i] for i in short]
            targets = given if given is not None and wanted is None else None
            if targets is None and known is not None:
                targets = known(some, last, "stream")
            if targets is None:
                search = config if wanted is None else dataclasses.replace(config, clamp=_FARTHER * config.clamp)
                targets = find_targets(lm, some, last, search, contexts, site="stream", progress=_counting(progress, what, len(some)))
            v_star = targets.v_star
            if config.norm_anchor is not None:
                ffn = targets.ffn_initial + v_star - targets.v_initial  # what the FFN alone should put out
                anchor = float(ffn.norm(dim=-1).mean()) if anchor is None else anchor
                v_star = v_star - ffn + solve.anchored(ffn, anchor)
            for i, found in zip(short, targets.convergence, strict=True):
                convergence[i] = {**found, "attempt": attempt + 1}
            holding = [facts[i] for i in sorted(set(range(len(facts))) - set(short))]
            part = _write(lm, some, v_star, holding, config, method, layers, held, kept, contexts, fingerprint, progress)
            written.append(part)
            if wanted is None:
                # Copies: what the caller gave, and what the first part keeps, stay as they are.
                wanted, keys = v_star.clone(), {layer: k.clone() for layer, k in part.k_star.items()}
            else:
                wanted[short] = v_star
                for layer in layers:
                    keys[layer][short] = part.k_star[layer]
    assert wanted is not None
    return dataclasses.replace(
        written[0],
        layers={layer: _joined([delta.layers[layer] for delta in written]) for layer in layers},
        k_star=keys,
        v_star=wanted.cpu(),
        config={**dataclasses.asdict(config), "layers": list(layers), "norm_anchor": anchor, "contexts": contexts},
        convergence=_with_shared_keys(convergence, facts, keys, held),
    )


def _check_targets(given: Targets, facts: Sequence[Fact], layer: int, site: Site) -> None:
    """Raises InputError unless the targets are those of these facts, in their order, at a site of a layer."""
    if not isinstance(given, Targets):
        raise InputError(f"targets are what find_targets gives; got {type(given).__name__}")
    if (given.layer, given.site) != (layer, site):
        raise InputError(
            f'the targets are of site "{given.site}" at layer {given.layer}; expected "{site}" at layer {layer}, the last that is edited: '
            f'find_targets(lm, facts, {layer}, config, contexts, site="{site}")'
        )
    if [(f.text, f.subject, f.target) for f in given.facts] != [(f.text, f.subject, f.target) for f in facts]:
        raise InputError(
            f"the targets are those of {len(given.facts)} other facts, or in another order; expected one for each of the {len(facts)} "
            "facts given, each prompt once"
        )


def _write(
    lm: LanguageModel,
    facts: Sequence[Fact],
    wanted: Tensor,
    holding: Sequence[Fact],
    config: SpreadConfig,
    method: str,
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
    kept: Mapping[int, Tensor | None],
    contexts: list[str],
    fingerprint: str,
    progress: Progress | None,
) -> Delta:
    """One pass over the layers, lowest first: each adds its share of what is still missing from `wanted` (n, d_model) in the stream.

    MEMIT, algorithm 1. Keys and stream are read on the model with the layers below edited already. `holding` are facts whose outputs stay:
    their keys count as those of earlier edits do.
    """
    parts: list[Delta] = []
    weights = torch.tensor(context_weights(contexts))
    share = config.subject_share
    roots = torch.cat([weights * (1 - share), torch.full((len(SUBJECT) if share else 0,), share / len(SUBJECT))]).sqrt()[:, None]

    def read(facts: Sequence[Fact], layer: int) -> Tensor:
        return read_keys(lm, facts, layer, contexts).cpu()  # (n, contexts, d_ff)

    def rows(keys: Tensor, facts: Sequence[Fact], layer: int) -> Tensor:
        if config.keys == "mean":
            return torch.einsum("ncm,c->nm", keys, weights)
        if share:
            alone = read_keys(lm, [Fact(fact.subject, "{}", fact.target) for fact in facts], layer, SUBJECT).cpu()
            keys = torch.cat([keys, alone], dim=1)
        return (keys * roots).flatten(0, 1)  # a row for every context, counted by its weight

    with ExitStack() as stack:
        for done, layer in enumerate(layers):
            tell(progress, "layers", done, len(layers))
            keys, earlier = read(facts, layer), kept[layer]
            asked = rows(keys, facts, layer)
            if holding:
                stay = rows(read(holding, layer), holding, layer).double()
                earlier = stay.T @ stay if earlier is None else earlier + stay.T @ stay
            missing = wanted - read_stream(lm, facts, layers[-1]).to(wanted)
            # The share is one of the stream: behind a norm, part of an addition is not that part of its effect.
            residuals = to_down(lm, facts, layer, solve.share(missing, len(layers) - done, config.spread)).cpu()
            if config.keys == "mean":
                left, right = config.update(asked, residuals, moments[layer], earlier)
            else:  # the rows of a fact share its residual, so the rank stays that of the facts
                _, right = config.update(asked, (residuals[:, None] * roots).flatten(0, 1), moments[layer], earlier)
                left, right = residuals.T, (right.view(len(facts), len(roots), -1) * roots.to(right)).sum(1)
            part = Delta(
                layers={layer: (left.float().cpu(), right.float().cpu())},
                k_star={layer: torch.einsum("ncm,c->nm", keys, weights)},
                v_star=wanted.cpu(),
                facts=tuple(facts),
                method=method,
                config={},
                fingerprint=fingerprint,
            )
            stack.enter_context(applied(lm, part))
            parts.append(part)
    return dataclasses.replace(
        parts[0],
        layers={layer: factors for part in parts for layer, factors in part.layers.items()},
        k_star={layer: keys for part in parts for layer, keys in part.k_star.items()},
    )


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of several updates of one layer as one pair of factors, float32."""
    left, right = solve.compact(torch.cat([left for left, _ in parts], dim=1), torch.cat([right for _, right in parts]))
    return left.float(), right.float()


def _not_taken(lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str]) -> list[int]:
    """The facts that the model does not assert in some context (that it still asserts, where one is to be forgotten)."""
    asked = [(i, fact.target or fact.target_true) for i, fact in enumerate(facts)]
    pairs = [(i, context.replace("{}", facts[i].text), target) for i, target in asked if target is not None for context in contexts]
    said = lm.says([prompt for _, prompt, _ in pairs], [target for *_, target in pairs]) if pairs else []
    return sorted({i for (i, *_), says in zip(pairs, said, strict=True) if says == (facts[i].target is None)})


def _keys_kept(earlier: Sequence[Delta], layer: int) -> Tensor | None:
    """Σ k kᵀ over what earlier edits wrote into a layer, (d_ff, d_ff) float64; None when they wrote nothing."""
    keys = [delta.k_star[layer].double() for delta in earlier if layer in delta.layers and len(delta.k_star[layer])]
    return sum((k.T @ k for k in keys[1:]), keys[0].T @ keys[0]) if keys else None


def _anchor(config: SpreadConfig, earlier: Sequence[Delta]) -> float | None:
    """The norm to rescale to: the setting, or that of the first round; None when it is not known yet."""
    if isinstance(config.norm_anchor, (int, float)):
        return float(config.norm_anchor)
    first = next((delta.config["norm_anchor"] for delta in earlier if delta.config.get("norm_anchor")), None)
    return None if config.norm_anchor is None or first is None else float(first)


def _factor(moment: SecondMoment, earlier: Tensor | None, weight: float) -> Tensor:
    return moment.factor if earlier is None else solve.cholesky(solve.with_earlier(moment.matrix, earlier, weight))


def _counting(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    return lambda done: tell(progress, what, done, total)
