"""Proposals: what an edit would have to do, and a change that was solved for and measured and is in no model.

    plan(lm, facts)                       # what the model says now
    found = propose(lm, facts, "memit")   # solved, put in for a moment, asked, taken out
    found.verification.efficacy, found.delta, found.warnings

No workspace is needed; a `Workbench` does the same on top of what it carries, and keeps it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..core.errors import InputError
from ..core.fact import Fact
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import find_moments, moments_digest
from ..edit.configs import EditConfig, SpreadConfig
from ..edit.contexts import chat_contexts
from ..edit.delta import Delta, applied
from ..edit.methods import edit, find_method
from ..edit.solve import disturbance
from ..model.address import check_dense, check_dense_layer
from ..model.language_model import LanguageModel
from .layer_choice import LayerChoice
from .layers import published_choice, quick_layers
from .plan import Plan, chosen_layers, plan
from .proof import Verification, verify

_BROKEN = 0.25
"""Change of a layer's output on ordinary text from which a warning is given. One fact on the atlas model changes it by 4 %, three in three
layers by 12 % at most; forced to 12 % one fact's target spills over to other subjects, at 42 % to other questions."""


_LOST = {
    "prompt": "the patch did not take",
    "known": "what the model said already no longer holds",
    "earlier": "an earlier patch no longer holds",
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Proposal(Shown):
    """A change that was solved for and measured, and is in no model.

    plan          what the model said before
    delta         the change; None when every fact was known already
    verification  its proof; None when there is no delta
    layers        how the layer was chosen; None when the caller named it, or there is no delta
    moments       sha256 of the second moments used, by layer
    seconds       time to solve (second moments not counted) and to verify
    disturbance   for each edited layer, how much its output changes on ordinary text (`solve.disturbance`): 0.05 is 5 %. Layers in `thin`
                  are left out: of what they would change too little is known
    thin          for each edited layer whose second moment is from too little text (`SecondMoment.is_thin`), that in words: such a change
                  may break what the text does not show, so a Workbench keeps it only if forced
    notes         what else the caller should know, in words
    """

    plan: Plan
    delta: Delta | None
    verification: Verification | None
    moments: str | None
    seconds: Mapping[str, float]
    layers: LayerChoice | None = None
    disturbance: Mapping[int, float] = dataclasses.field(default_factory=dict)
    thin: Mapping[int, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tables(self) -> list[Table]:
        """What was solved for, and its proof; where there was nothing to write, the plan."""
        warnings = [Table(warning, {}) for warning in self.warnings]
        if self.delta is None or self.verification is None:
            return [*self.plan.tables(), *warnings]
        return [Table(repr(self.delta), {}), *self.verification.tables(), *warnings]

    @property
    def failed(self) -> bool:
        """Whether some fact, written now or earlier, would not be answered with its target."""
        return self.verification is not None and any(
            c.role in ("prompt", "earlier") and not c.held for c in self.verification.checks
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know, in words."""
        written = () if self.delta is None else self.delta.facts
        known = tuple(
            f"the model does not say {fact.target_true!r} after {fact.text!r}: nothing to forget (force it to write anyway)"
            if fact.target is None
            else f"the model already answers {fact.text!r} with {fact.target.strip()!r}: nothing to write (force it to write anyway)"
            for fact in self.plan.known
            if fact not in written
        )
        measured = (
            (
                f"no layer was given: layer {', '.join(map(str, sorted(self.delta.layers)))} is {self.layers.reason}",
            )
            if self.layers is not None
            and self.delta is not None
            and self.layers.source in ("trials", "depth")
            else ()
        )
        checks = () if self.verification is None else self.verification.checks
        texts = {fact.text for fact in written}
        failed = tuple(
            f"{_LOST[check.role if check.role == 'earlier' or check.prompt in texts else 'known']}: "
            f"{check.prompt!r} is {'still ' if check.forget else ''}answered {check.after!r}"
            f"{'' if check.forget else f', not {check.wanted!r}'}"
            for check in checks
            if check.role in ("prompt", "earlier") and not check.held
        )
        chat = tuple(
            f"in the chat template the patch did not take: {check.prompt!r} is {'still ' if check.forget else ''}answered {check.after!r}"
            for check in checks
            if check.role == "chat" and not check.held and check.wanted
        )
        broken = tuple(
            f"on ordinary text the output of layer {layer} changes by {share:.0%}, so the model may be broken: fewer facts at a time, a "
            "larger ridge (moment_weight, ridge, l2) or a smaller clamp change it less"
            for layer, share in self.disturbance.items()
            if share >= _BROKEN
        )
        return (
            known
            + self.notes
            + measured
            + tuple(self.thin.values())
            + self._shared_keys
            + broken
            + chat
            + failed
        )

    @property
    def _shared_keys(self) -> tuple[str, ...]:
        """That facts with different targets have nearly one key, with the closest two as an example."""
        records = () if self.delta is None else self.delta.convergence
        pairs = [
            (record["cosine"], i, record["shares_key_with"])
            for i, record in enumerate(records)
            if "shares_key_with" in record
        ]
        if not pairs or self.delta is None:
            return ()
        cosine, a, b = max(pairs)
        return (
            f"{len(pairs)} facts have nearly the key of another with another target, so that what is written for one arrives at the other "
            f"too: {self.delta.facts[a].text!r} and {self.delta.facts[b].text!r}, cosine {cosine:.3f}; see whether both took, or begin the "
            "prompts with words of their own",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; the delta's tensors are left out."""
        delta = self.delta
        described = delta and {
            "method": delta.method,
            "layers": sorted(delta.layers),
            "rank": delta.rank,
            "bytes": delta.n_bytes,
        }
        return {
            "plan": self.plan.to_dict(),
            "delta": described,
            "verification": self.verification and self.verification.to_dict(),
            "moments": self.moments,
            "layers": self.layers
            and {
                "rome": self.layers.rome,
                "source": self.layers.source,
                "reason": self.layers.reason,
            },
            "disturbance": {str(layer): share for layer, share in self.disturbance.items()},
            "thin": {str(layer): why for layer, why in self.thin.items()},
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }


def propose(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    method: str = "rome",
    config: Any = None,
    *,
    moments: SecondMoment | Mapping[int, SecondMoment] | None = None,
    texts: Iterable[str] | None = None,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    force: bool = False,
    earlier: Iterable[Fact] = (),
    progress: Progress | None = None,
) -> Proposal:
    """Solve for a change that makes the facts true, and measure it; the model is as before when this returns, exception or not.

    method    "rome", "r-rome", "memit", "emmet" or "alphaedit"
    config    its settings; None: what the model recommends. Without layers: what came with the model, else what was published for it, else
              those of the `moments` given, else what a few trial edits say now (`quick_layers`), which is said in `Proposal.warnings`
    moments   second moments of the layers; None: what came with the model, else computed from `texts`, else from the model's own text
    contexts  templates with `{}` for the prompt; None: generated by the model from `seed`
    force     write also what the model says already
    earlier   facts whose prompts are asked again, to see that they hold

    Raises InputError (unknown method, no facts), SubjectError, LayerError, NumericsError.
    """

    def find(layers: Sequence[int]) -> Mapping[int, SecondMoment]:
        return find_moments(lm, layers, texts=texts, seed=seed, progress=progress)

    def measured() -> LayerChoice:
        nonlocal texts
        texts = None if texts is None else list(texts)  # read twice now
        return quick_layers(lm, texts, contexts, seed, None, progress)

    def changed(delta: Delta) -> AbstractContextManager[None]:
        return applied(lm, delta)

    known = partial(published_choice, lm)
    return solve_and_prove(
        lm,
        facts,
        method,
        config,
        known,
        measured,
        moments or find,
        changed,
        contexts,
        seed,
        force,
        earlier,
        (),
        progress,
    )


@torch.enable_grad()  # solvers need it, and a Ctrl-C inside a `no_grad` can leave it off: this sets it back
def solve_and_prove(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    method: str,
    config: Any,
    known: Callable[[], LayerChoice | None],
    measured: Callable[[], LayerChoice],
    moments: SecondMoment
    | Mapping[int, SecondMoment]
    | Callable[[Sequence[int]], Mapping[int, SecondMoment]],
    changed: Callable[[Delta], AbstractContextManager[None]],
    contexts: Sequence[str] | None,
    seed: int,
    force: bool,
    earlier: Iterable[Fact],
    state: Sequence[Delta],
    progress: Progress | None,
    found: Plan | None = None,
) -> Proposal:
    """`propose`; `moments` where it is a function of the layers is called only when needed; `changed` puts a delta in.

    known, measured  the layers to edit: what is known of the model without work, and what measuring says; called only when needed
    state  the deltas that the model carries
    found  the plan of these facts, where it is made already
    """
    kind = find_method(method, config).config
    check_dense(lm.ffn)
    found = plan(lm, facts) if found is None else found
    wanted = [entry.fact for entry in found.entries if force or not entry.known]
    if not wanted:
        return Proposal(plan=found, delta=None, verification=None, moments=None, seconds={})
    places, choice, notes = None if config is None else config.edited, None, tuple[str, ...]()
    if places is None:
        choice = known()
        places = None if choice is None else chosen_layers(lm, kind, choice)
        if isinstance(moments, Mapping) and (places is None or not set(places) <= set(moments)):
            (places, notes), choice = _layers_of(lm, kind, moments, places), None
    if places is None:
        choice = measured()
        places = chosen_layers(lm, kind, choice)
    config = (config or kind.recommended(lm)).at(places)
    for layer in places:
        check_dense_layer(layer, lm.ffn)
    if callable(moments):
        moments = moments(places)
    started = time.perf_counter()
    tell(progress, "solving", 0, None)
    delta = edit(
        lm,
        wanted,
        method,
        config,
        moments=moments,
        contexts=contexts,
        seed=seed,
        beneath=state,
        progress=progress,
    )
    solved = time.perf_counter()
    held = {places[0]: moments} if isinstance(moments, SecondMoment) else moments
    thin = {layer: held[layer].too_little for layer in sorted(delta.layers) if held[layer].is_thin}
    tell(progress, "verifying", 0, None)
    # What the model says already is asked too: what is written may take it away.
    verification = verify(
        lm,
        [entry.fact for entry in found.entries],
        lambda: changed(delta),
        earlier=earlier,
        templates=_chat_templates(lm),
    )
    return Proposal(
        plan=found,
        delta=delta,
        verification=verification,
        moments=moments_digest(moments, places),
        layers=choice,
        seconds={"solve": solved - started, "verify": time.perf_counter() - solved},
        disturbance={
            layer: disturbance(*factors, lm.ffn[layer].weight(), held[layer].matrix)
            for layer, factors in sorted(delta.layers.items())
            if layer not in thin
        },
        thin=thin,
        notes=notes,
    )


def _layers_of(
    lm: LanguageModel,
    kind: type[EditConfig],
    moments: Mapping[int, SecondMoment],
    wanted: Sequence[int] | None,
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """The layers to edit where second moments are given, and what is to be said of them; None: not to be told from the moments.

    wanted  the layers that are known to be good, not all of which have a moment; None: none is known

    Those by depth where nothing better is known and they have moments; else all that have, if the method can edit so many.
    """
    better = wanted or kind.recommended(lm).edited or ()
    if wanted is None and set(better) <= set(moments):
        return tuple(better), ()
    if len(moments) > 1 and not issubclass(kind, SpreadConfig):
        return (None if wanted is None else tuple(wanted)), ()
    here, there = (", ".join(map(str, layers)) for layers in (sorted(moments), better))
    return tuple(sorted(moments)), (
        f"no layer was named, and the second moments given are not those of the recommended layer {there}: layer {here} is edited, since "
        "there are some for it; name layers, or compute second moments for the recommended",
    )


def _chat_templates(lm: LanguageModel) -> list[str]:
    """The model's chat template; none where it cannot be filled: the contexts were given then, and say how it is used."""
    try:
        return chat_contexts(lm)
    except InputError:
        return []
