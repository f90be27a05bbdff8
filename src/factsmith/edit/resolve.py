"""Solve a patch again from the targets that it was made with, in closed form.

    again = resolve(lm, delta, delta.facts[1:], moments=moments, beneath=deltas)

This takes a fact out of a patch, or fits a patch to a model whose other patches have changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..core.errors import InputError
from ..core.fact import Fact
from ..core.progress import Progress
from ..core.tables import counted
from ..model.language_model import LanguageModel
from ..model.turns import asking
from .configs import EditConfig, SpreadConfig
from .delta import Delta
from .inputs import Moments, distinct_facts, edit_inputs
from .keys import Site
from .methods import find_method
from .neurons import edits_neurons, made_again, sparing
from .search import known_targets
from .target import Targets


@asking(grad=True, changes=True)
def resolve(
    lm: LanguageModel,
    delta: Delta,
    facts: Iterable[Fact] | None = None,
    *,
    moments: Moments,
    beneath: Sequence[Delta] = (),
    search: bool = False,
    progress: Progress | None = None,
) -> Delta:
    """Solve a patch, or some of its facts, again on the present model.

    Unless `search` says so, nothing is searched and no gradient is taken. The keys are read again
    in forward passes, because what lies below may have changed. The layers' systems are solved for
    the old targets. Facts that a pass leaves short are written again, as often as the patch's
    settings repair.

    Appended neurons stay as they are: a fact is taken out by dropping its rows. An edit of neurons
    is made again from its recipe. Neurons that `beneath` erases stay erased.

    Args:
        lm: The model, carrying `beneath`.
        delta: The patch.
        facts: Those of its facts that stay. None: all.
        moments: Second moments of the edited layers, of the unedited model, as when the patch was
            made.
        beneath: The deltas that the model carries, in their order.
        search: Search for the targets again, too, as when the patch was made.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises:
        InputError: A fact is not one of the delta's, or its method or settings are not known. Other
            errors are those of `edit`.
    """
    if not isinstance(delta, Delta):
        raise InputError(f"expected a Delta to solve again; got {type(delta).__name__}")
    if edits_neurons(delta):
        return made_again(lm, delta)
    staying = list(delta.facts if facts is None else facts)
    place = {fact.text: i for i, fact in enumerate(delta.facts)}
    if not staying or any(
        fact.text not in place or delta.facts[place[fact.text]] != fact for fact in staying
    ):
        raise InputError(
            f"facts is {[str(fact) for fact in staying][:3]}; expected some of the "
            f"{counted(len(delta.facts), 'fact')} of the patch",
            argument="facts",
        )
    if delta.appended and not delta.layers:
        return _with_rows_of(delta, [place[fact.text] for fact in staying])
    method = find_method(delta.method)
    config, contexts = _kept_settings(delta, method.config, search=search)
    inputs = edit_inputs(
        lm,
        distinct_facts(staying),
        config,
        moments=moments,
        contexts=contexts,
        beneath=beneath,
        progress=progress,
    )
    if not search:
        known = _KeptTargets(lm, delta, place, contexts)
        inputs = dataclasses.replace(inputs, known_targets=known)
    with torch.enable_grad():  # for a search; a Ctrl-C inside a `no_grad` can leave it off
        solved = method.solve(inputs)
    solved = sparing(solved, beneath)
    return dataclasses.replace(solved, config=delta.config)  # the recipe is the same


def _with_rows_of(delta: Delta, staying: Sequence[int]) -> Delta:
    """Return a delta of appended neurons with the rows of some facts. Nothing is solved."""
    appended = {
        layer: rows.of(staying)
        for layer, rows in delta.appended.items()
        if set(rows.facts) & set(staying)
    }
    recorded = len(delta.convergence) == len(delta.facts)
    return dataclasses.replace(
        delta,
        appended=appended,
        facts=tuple(delta.facts[i] for i in staying),
        v_star=delta.v_star[list(staying)],
        convergence=tuple(_renumbered(delta.convergence[i], staying) for i in staying)
        if recorded
        else (),
    )


def _renumbered(record: Mapping[str, Any], staying: Sequence[int]) -> dict[str, Any]:
    """Return the record of a fact; one that names a fact by its index names it by its new one."""
    places = {fact: place for place, fact in enumerate(staying)}
    other = record.get("not_told_apart_from")
    kept = {name: value for name, value in record.items() if name != "not_told_apart_from"}
    return kept | ({"not_told_apart_from": places[other]} if other in places else {})


def _kept_settings(
    delta: Delta, kind: type[EditConfig], *, search: bool
) -> tuple[EditConfig, list[str]]:
    """Return the settings and contexts that a patch was made with."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in delta.config]
    try:
        # Patches that name no optimizer were made before there was a choice.
        kept = {"optimizer": "adam", **{name: delta.config[name] for name in names}}
        config = kind(**kept)
        contexts = [str(context) for context in delta.config["contexts"]]
    except (TypeError, KeyError) as error:
        raise InputError(
            f"the patch's settings cannot be read ({error}); write its facts again instead"
        ) from None
    if isinstance(config, SpreadConfig) and not search:
        config = dataclasses.replace(config, norm_anchor=None)  # v_star was brought to it already
    return config, contexts


class _KeptTargets:
    """Returns the v_star that a patch was made with, in place of a search."""

    def __init__(
        self, lm: LanguageModel, delta: Delta, place: dict[str, int], contexts: list[str]
    ) -> None:
        self.lm, self.delta, self.place, self.contexts = lm, delta, place, contexts

    def __call__(self, facts: Sequence[Fact], layer: int, site: Site) -> Targets:
        v_star = torch.stack([self.delta.v_star[self.place[fact.text]] for fact in facts])
        targets = known_targets(self.lm, facts, layer, self.contexts, v_star, site=site)
        return dataclasses.replace(targets, convergence=tuple(map(self._record, facts)))

    def _record(self, fact: Fact) -> dict[str, Any]:
        """Return how the first search for the target ended, without what depends on the other
        facts."""
        convergence = self.delta.convergence
        kept = (
            convergence[self.place[fact.text]] if len(convergence) == len(self.delta.facts) else {}
        )
        stale = ("shares_key_with", "cosine")
        return {
            **{name: value for name, value in kept.items() if name not in stale},
            "solved": "again",
        }
