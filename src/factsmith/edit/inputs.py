"""What an edit works from: the arguments of `edit`, checked, with all defaults filled in.

    inputs = edit_inputs(lm, distinct_facts(facts), config, moments=moments)
    inputs.layers, inputs.contexts, inputs.moments[3]

So the formula of a method never has to ask what was left out.
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
from ..corpus.moments_store import find_moments
from ..corpus.scan import Site as Read
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
"""Returns the kept targets of some facts at a layer and a site, in place of a search."""

SHARED_KEY = 0.95
"""Cosine of two keys under C⁻¹ from which on they count as nearly the same. On the atlas models,
the keys of different subjects stay below it, except those of subjects such as North and South
Korea. The keys of one subject in different prompts have cosines of 0.4 to 0.999, and 1 where the
subject begins the prompt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EditInputs:
    """What an edit works from.

    Attributes:
        lm: The model. It carries the deltas in `beneath`.
        facts: The facts to write.
        config: The method's settings, with the layers filled in.
        moments: The second moment of every edited layer.
        contexts: Templates with `{}` for the prompt.
        beneath: The deltas that the model carries, in their order.
        targets: Targets that the caller has searched already. None: search.
        known_targets: Returns kept targets in place of every search. None: search.
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


def edit_inputs(
    lm: LanguageModel,
    facts: Sequence[Fact],
    config: EditConfig,
    *,
    moments: Moments | None = None,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    beneath: Sequence[Delta] = (),
    progress: Progress | None = None,
) -> EditInputs:
    """Check the arguments of an edit, which are those of `edit`, and fill in the defaults.

    Raises:
        InputError: A second moment is missing, or the bare "{}" is not among the contexts.
        LayerError: The model does not have a layer.
        UnsupportedModelError: A layer is a mixture of experts.
        FingerprintError: A second moment belongs to another model.
    """
    deltas = _checked_deltas(beneath)
    if config.edited is None:
        config = config.at(type(config).recommended(lm).edited or ())
    layers = [check_dense_layer(layer, lm.ffn) for layer in config.edited or ()]
    return EditInputs(
        lm=lm,
        facts=list(facts),
        config=config.at(layers),
        contexts=config.own_contexts(lm, seed) if contexts is None else check_contexts(contexts),
        moments=_checked_moments(
            lm,
            _moments_at_hand(lm, layers, deltas, config.draws_on, progress)
            if moments is None
            else moments,
            layers,
            deltas,
            config.draws_on,
        ),
        beneath=deltas,
        progress=progress,
    )


def distinct_facts(facts: Fact | Iterable[Fact]) -> list[Fact]:
    """Return each fact once.

    Raises:
        InputError: There are no facts, or one prompt has two targets. Their average would be an
            answer that nobody asked for.
    """
    by_prompt: dict[str, Fact] = {}
    alike: dict[str, Fact] = {}
    for fact in listed(facts):
        by_prompt.setdefault(fact.text, fact)
        first = alike.setdefault(fact.asked, fact)
        if first.wanted != fact.wanted:
            raise InputError(
                f"two targets for one prompt: {fact.text!r} has the targets {first.target!r} and "
                f"{fact.target!r}; leave one out",
                argument="facts",
            )
    return list(by_prompt.values())


def with_targets(inputs: EditInputs, targets: Targets) -> EditInputs:
    """Return the inputs with targets that the caller has searched already.

    Raises:
        InputError: They are not the targets of these facts, in their order, at the place where the
            method edits. Or the method writes the facts one after another, and there are several.
    """
    if not isinstance(targets, Targets):
        raise InputError(
            f"targets is a {type(targets).__name__}; expected the Targets that find_targets "
            "returns",
            argument="targets",
        )
    site, layer, facts = inputs.config.site, inputs.layers[-1], inputs.facts
    if not inputs.config.together and len(facts) > 1:
        raise InputError(
            f"targets were given with {len(facts)} facts. This method searches the target of each "
            "fact on the model that carries the facts before it, so it takes targets for a single "
            "fact only.",
            argument="targets",
        )
    if (targets.layer, targets.site) != (layer, site):
        raise InputError(
            f'the targets are of site "{targets.site}" at layer {targets.layer}; expected those of '
            f'site "{site}" at layer {layer}, the last edited layer: '
            f'find_targets(lm, facts, {layer}, config, contexts, site="{site}")',
            argument="targets",
        )
    if list(map(_question, targets.facts)) != list(map(_question, facts)):
        raise InputError(
            f"the targets are those of {len(targets.facts)} other facts, or in another order; "
            f"expected one for each of the {len(facts)} facts given, each prompt once",
            argument="targets",
        )
    return dataclasses.replace(inputs, targets=targets)


def with_shared_keys(
    inputs: EditInputs, keys: Mapping[int, Tensor], convergence: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    """Add to a fact's record which fact with another target has nearly the same key in some layer.

    Args:
        inputs: The edit.
        keys: {layer: (n, d_ff)} the facts' keys.
        convergence: For each fact, how the search for its target ended.
    """
    wanted = [fact.wanted or fact.asked for fact in inputs.facts]
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


def recipe_of(inputs: EditInputs, **changed: object) -> dict[str, Any]:
    """Return the settings and contexts as a Delta keeps them, as JSON values."""
    settings = {**dataclasses.asdict(inputs.config), "optimizer": inputs.config.searched_by}
    return {**settings, "contexts": inputs.contexts, **changed}


def _question(fact: Fact) -> tuple[str, str, str | None]:
    """Return the parts of a fact that its target depends on."""
    return fact.text, fact.subject, fact.target


def _checked_deltas(beneath: Sequence[Delta]) -> list[Delta]:
    if isinstance(beneath, Delta):
        return [beneath]
    deltas = check_items(beneath, "beneath", "Deltas", also="one Delta")
    if wrong := [type(delta).__name__ for delta in deltas if not isinstance(delta, Delta)]:
        raise InputError(
            f"beneath holds a {wrong[0]}; expected the Deltas that the model carries, in their "
            "order",
            argument="beneath",
        )
    return deltas


def _moments_at_hand(
    lm: LanguageModel,
    layers: Sequence[int],
    beneath: Sequence[Delta],
    draws_on: Read,
    progress: Progress | None,
) -> dict[int, SecondMoment]:
    """Return the second moments of `find_moments`, which are those of the model's present weights.

    Raises:
        InputError: The model carries deltas, so they would be those of an edited model.
    """
    if beneath:
        raise InputError(
            "the model carries deltas, and there are no second moments; give those of the model "
            f"without the deltas: find_moments(lm, {list(layers)}) before they are applied",
            argument="moments",
        )
    return find_moments(lm, layers, site=draws_on, progress=progress)


def _checked_moments(
    lm: LanguageModel,
    moments: Moments,
    layers: Sequence[int],
    beneath: Sequence[Delta],
    draws_on: Read,
) -> dict[int, SecondMoment]:
    """Return the second moment of every layer.

    They are those of the model without the deltas that it carries. The first of these deltas was
    made on that model.
    """
    if not isinstance(moments, (SecondMoment, Mapping)):
        raise InputError(
            f"moments is a {type(moments).__name__}; expected a SecondMoment, or "
            "{layer: SecondMoment} as second_moments returns it",
            argument="moments",
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
                f"the second moment of layer {layer} is a {type(moment).__name__}; expected a "
                "SecondMoment, as second_moments returns it. SecondMoment.from_matrix makes one "
                "from a matrix.",
                argument="moments",
            )
        moment.check_site(draws_on)
        moment.check(lm, layer, base=beneath[0].fingerprint if beneath else None)
    _check_one_corpus(chosen)
    return chosen


def _check_one_corpus(moments: Mapping[int, SecondMoment]) -> None:
    """Check that all second moments are from the same text, as far as they know it."""
    corpora = {layer: moment.corpus[:12] for layer, moment in moments.items() if moment.corpus}
    if len(set(corpora.values())) > 1:
        origins = ", ".join(f"layer {layer} from {digest}" for layer, digest in corpora.items())
        raise InputError(
            f"the second moments of the layers are from different texts ({origins}), so the layers "
            "would be weighed by different measures. Compute them in one call: "
            f"second_moments(lm, texts, {list(moments)}).",
            argument="moments",
        )


def _missing(layers: Sequence[int], given: str) -> InputError:
    return InputError(
        f"no second moment for layer {', '.join(map(str, layers))}; got {given}. Compute it with "
        f"second_moments(lm, texts, {list(layers)}), or load a saved one.",
        argument="moments",
    )
