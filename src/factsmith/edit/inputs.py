"""What an editor works from: everything the caller gave, checked, with every default filled in.

    inputs = edit_inputs(lm, facts, config, moments=moments)
    inputs.layers, inputs.contexts, inputs.moments[3]

An editor's formula then never has to ask what was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.checks import check_items
from ..core.errors import InputError
from ..core.fact import Fact, listed
from ..core.progress import Progress
from ..corpus.moments import SecondMoment
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from . import solve
from .configs import EditConfig
from .contexts import check_contexts
from .delta import Delta
from .keys import Site
from .target import Targets

Moments: TypeAlias = SecondMoment | Mapping[int, SecondMoment]
"""The second moment of the one edited layer, or second moments by layer."""

KnownTargets: TypeAlias = Callable[[Sequence[Fact], int, Site], Targets]
"""Gives the kept targets of some facts at a layer and a site, in place of a search."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EditInputs:
    """What an editor works from.

    Attributes:
        lm: The model. It carries the deltas in `beneath`.
        facts: The facts to write, each prompt once.
        config: The method's settings, with the layers filled in.
        moments: The second moment of every edited layer.
        contexts: Templates with `{}` for the prompt.
        beneath: The deltas that the model carries, in ledger order.
        targets: Targets that the caller has already searched. None: search.
        known_targets: Gives kept targets in place of every search. None: search.
        progress: Called with the step's name, how much is done, and how much there is.
    """

    lm: LanguageModel
    facts: list[Fact]
    config: EditConfig
    moments: dict[int, SecondMoment]
    contexts: list[str]
    beneath: list[Delta]
    targets: Targets | None = None
    known_targets: KnownTargets | None = None
    progress: Progress | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, lowest first."""
        layers = self.config.edited
        assert layers is not None  # `edit_inputs` filled them in
        return layers


def edit_inputs(  # house: these are the arguments of `edit`, less the method
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: EditConfig,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    beneath: Sequence[Delta] = (),
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> EditInputs:
    """Check the arguments of an edit and fill in what was left out; the arguments are those of `edit`.

    Raises:
        InputError: No facts, two targets for one prompt, a missing second moment, contexts without "{}", or targets of other facts.
        LayerError: The model does not have a layer.
        UnsupportedModelError: A layer is a mixture of experts.
        FingerprintError: A second moment belongs to another model.
    """
    wanted, carried = _distinct(listed(facts)), _checked_deltas(beneath)
    if config.edited is None:
        config = config.at(type(config).recommended(lm).edited or ())
    layers = [check_dense_layer(layer, lm.ffn) for layer in config.edited or ()]
    inputs = EditInputs(
        lm=lm,
        facts=wanted,
        config=config.at(layers),
        moments=_moments_of(lm, moments, layers, carried),
        contexts=config.own_contexts(lm, seed) if contexts is None else check_contexts(contexts),
        beneath=carried,
        targets=targets,
        progress=progress,
    )
    if targets is not None:
        _check_targets(inputs, targets)
    return inputs


def shared_keys(
    inputs: EditInputs, keys: Mapping[int, Tensor], convergence: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    """Add to each fact's record which other fact, with another target, has nearly the same key in some layer.

    Args:
        inputs: The edit.
        keys: {layer: (n, d_ff)} the facts' keys.
        convergence: For each fact, how its target was found.
    """
    wanted = [fact.text if fact.target is None else fact.target.strip() for fact in inputs.facts]
    numbers = {target: number for number, target in enumerate(wanted)}
    groups = torch.tensor([numbers[target] for target in wanted])
    by_layer = []
    for layer, rows in keys.items():
        others, cosines = solve.closest(rows, inputs.moments[layer].factor, groups)
        by_layer.append(zip(others.tolist(), cosines.tolist(), strict=True))
    closest = [max(pairs, key=lambda pair: pair[1]) for pairs in zip(*by_layer, strict=True)]
    return tuple(
        {**record, "shares_key_with": other, "cosine": cosine} if cosine >= SHARED_KEY else record
        for record, (other, cosine) in zip(convergence, closest, strict=True)
    )


SHARED_KEY = 0.95
"""Cosine of two keys under C⁻¹ from which they count as nearly one. On the atlas models, keys of different subjects stay below it, except
for subjects such as North and South Korea. One subject in different prompts has 0.4 to 0.999, and 1 where it begins the prompt."""


def _checked_deltas(beneath: Sequence[Delta]) -> list[Delta]:
    expected = "the deltas that the model carries, in their order"
    deltas = (
        [beneath]
        if isinstance(beneath, Delta)
        else check_items(beneath, "beneath", "deltas", also="one Delta")
    )
    if wrong := [type(delta).__name__ for delta in deltas if not isinstance(delta, Delta)]:
        raise InputError(f"beneath holds a {wrong[0]}; expected {expected}")
    return deltas


def _distinct(facts: Sequence[Fact]) -> list[Fact]:
    """Each fact once. Two targets of one prompt would be averaged to something nobody asked for."""
    by_prompt: dict[str, Fact] = {}
    for fact in facts:
        first = by_prompt.setdefault(fact.text, fact)
        if (first.target and first.target.strip()) != (fact.target and fact.target.strip()):
            raise InputError(
                f"two targets for one prompt: {fact.text!r} is to be continued by {first.target!r} and by {fact.target!r}; leave one out"
            )
    return list(by_prompt.values())


def _moments_of(
    lm: LanguageModel, moments: Moments, layers: Sequence[int], beneath: Sequence[Delta]
) -> dict[int, SecondMoment]:
    """The second moment of every layer, of the model without the deltas that it carries; the first of these was made on it."""
    if not isinstance(moments, (SecondMoment, Mapping)):
        raise InputError(
            f"moments is a {type(moments).__name__}; expected a SecondMoment, or one by layer number. See second_moments"
        )
    if isinstance(moments, SecondMoment):
        if len(layers) > 1:
            raise _missing(layers, "one matrix")
        by_layer: Mapping[int, SecondMoment] = {layers[0]: moments}
    else:
        by_layer = moments
    if missing := [layer for layer in layers if layer not in by_layer]:
        raise _missing(missing, f"layers {sorted(by_layer)}")
    chosen = {layer: by_layer[layer] for layer in layers}
    for layer, moment in chosen.items():
        if not isinstance(moment, SecondMoment):
            raise InputError(
                f"the second moment of layer {layer} is a {type(moment).__name__}; expected a SecondMoment, as second_moments gives it. "
                "SecondMoment.from_matrix makes one from a matrix"
            )
        moment.check(lm, layer, base=beneath[0].fingerprint if beneath else None)
    corpora = {layer: moment.corpus[:12] for layer, moment in chosen.items() if moment.corpus}
    if len(set(corpora.values())) > 1:
        listed_corpora = ", ".join(
            f"layer {layer} from {digest}" for layer, digest in corpora.items()
        )
        raise InputError(
            f"the second moments of the layers are from different texts ({listed_corpora}), so the layers would be weighed by different "
            f"measures; compute them in one call: second_moments(lm, texts, {list(layers)}), or `factsmith moments`"
        )
    return chosen


def _missing(layers: Sequence[int], given: str) -> InputError:
    return InputError(
        f"no second moment for layer {', '.join(map(str, layers))}; got {given}. Compute it with "
        f"second_moments(lm, texts, {list(layers)}) or `factsmith moments`, or load a saved one"
    )


def _check_targets(inputs: EditInputs, targets: Targets) -> None:
    """Raise InputError unless the targets are those of these facts, in their order, at the place that the method edits."""
    if not isinstance(targets, Targets):
        raise InputError(
            f"targets is a {type(targets).__name__}; expected what find_targets returns"
        )
    site, layer, facts = inputs.config.site, inputs.layers[-1], inputs.facts
    if site == "ffn" and len(facts) > 1:
        raise InputError(
            f"targets were given with {len(facts)} facts; this method solves each fact on the model that carries the ones before, "
            "so it takes the targets of a single fact"
        )
    if (targets.layer, targets.site) != (layer, site):
        raise InputError(
            f'the targets are of site "{targets.site}" at layer {targets.layer}; expected "{site}" at layer {layer}, the last that is '
            f'edited: find_targets(lm, facts, {layer}, config, contexts, site="{site}")'
        )
    if [(f.text, f.subject, f.target) for f in targets.facts] != [
        (f.text, f.subject, f.target) for f in facts
    ]:
        raise InputError(
            f"the targets are those of {len(targets.facts)} other facts, or in another order; expected one for each of the {len(facts)} "
            "facts given, each prompt once"
        )


def recipe_of(inputs: EditInputs, **changed: object) -> dict[str, Any]:
    """The settings and contexts as a Delta keeps them, plain JSON values."""
    return {**dataclasses.asdict(inputs.config), "contexts": inputs.contexts, **changed}
