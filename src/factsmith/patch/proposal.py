"""A change that was solved for and measured, and is in no model.

decided = plan(bench, facts, Recipe("memit"))
proposal = propose(bench, decided)              # solved, put in for a moment, asked, taken out
proposal.verification.efficacy, proposal.delta, proposal.warnings
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from ..core.forms import canonical
from ..core.progress import Progress, stage, tell
from ..core.tables import Shown, Table, counted
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import moments_digest
from ..edit.delta import Delta
from ..edit.methods import edit
from ..edit.solve import disturbance
from ..model.language_model import LanguageModel
from ..model.turns import asking
from .bench import Bench
from .firing import recorded_firing
from .layer_choice import LayerChoice
from .plan import Plan
from .proof import chat_questions, prove
from .recipe import Sources
from .verification import Check, Verification

_BROKEN = 0.25
"""Change of a layer's output on ordinary text from which a warning is given. On the atlas model one
fact changes it by 4 %, and three in three layers by 12 % at most. Forced to 12 %, one fact's target
spills over to other subjects; at 42 %, to other questions."""

_MOST_WARNINGS = 20
"""Warnings that are shown; the others are counted."""

_LOST = {
    "prompt": "the patch did not take",
    "known": "the model no longer says what it already said",
    "earlier": "an earlier patch no longer holds",
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Proposal(Shown):
    """A change that was solved for and measured, and is in no model.

    Attributes:
        plan: What the model said before, and what was decided.
        delta: The change. None: the model already said every fact.
        verification: Its proof. None: there is no delta.
        layers: How the layers were chosen. None: the caller named them, or there is no delta.
        moments: sha256 of the second moments used. None: there is no delta.
        seconds: Time to "solve" (second moments not counted) and to "verify".
        disturbance: For each edited layer, by what share its output changes on ordinary text
            (`solve.disturbance`): 0.05 is 5 %. Layers in `thin` are left out, since too little is
            known of what they would change.
        thin: For each edited layer whose second moment is from too little text
            (`SecondMoment.is_thin`), a sentence that says so. Such a change may break what the text
            does not show, so a workbench keeps it only if forced.
    """

    plan: Plan
    delta: Delta | None = None
    verification: Verification | None = None
    moments: str | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers: LayerChoice | None = None
    disturbance: Mapping[int, float] = dataclasses.field(default_factory=dict)
    thin: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def proof_tables(self) -> list[Table]:
        """What was solved for, and its proof; nothing where there was nothing to write."""
        if self.delta is None or self.verification is None:
            return []
        return [Table(self.summary, {}), *self.verification.tables()]

    def tables(self) -> list[Table]:
        """What was solved for, its proof, and the warnings; the plan, where there was nothing to
        write.

        The table of the proof says which checks failed, so the warnings do not repeat them.
        """
        rest = [warning for warning in self.warnings if warning not in self._failed_checks]
        warnings = [Table(warning, {}) for warning in rest[:_MOST_WARNINGS]]
        if len(rest) > _MOST_WARNINGS:
            warnings.append(Table(f"{len(rest) - _MOST_WARNINGS:,} more warnings", {}))
        return [*(self.proof_tables() or self.plan.tables()), *warnings]

    @property
    def summary(self) -> str:
        """The change in a line: method, layers, rank, size, and how long it took."""
        if self.delta is None:
            return "nothing to write"
        delta = self.delta
        layers = ", ".join(map(str, delta.touched))
        names = {"solve": "solved", "verify": "verified"}
        times = ", ".join(
            f"{names[step]} in {seconds:.1f} s" for step, seconds in self.seconds.items()
        )
        return f"{delta.method} layer {layers}, {delta.size}, {delta.n_bytes:,} bytes; {times}"

    @property
    def failed(self) -> bool:
        """Whether some fact, written now or earlier, would not be answered with its target."""
        return self.verification is not None and bool(self.verification.failed("prompt", "earlier"))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know about the layers, in words; `plan.advice`."""
        return self.plan.advice

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know, in words."""
        return (
            *self._already_known,
            *self.notes,
            *self._measured_layers,
            *self.thin.values(),
            *self._shared_keys,
            *self._alike_subjects,
            *self._contexts_left_out,
            *self._disturbed,
            *self._failed_checks,
        )

    @property
    def _already_known(self) -> list[str]:
        written = () if self.delta is None else self.delta.facts
        return [
            f"the model does not say {fact.target_true!r} after {fact.text!r}: nothing to forget "
            "(force it to write anyway)"
            if fact.target is None
            else f"the model already answers {fact.text!r} with {fact.target.strip()!r}: "
            "nothing to write (force it to write anyway)"
            for fact in self.plan.known
            if fact not in written
        ]

    @property
    def _measured_layers(self) -> list[str]:
        if (
            self.layers is None
            or self.delta is None
            or self.layers.source not in ("trials", "depth")
        ):
            return []
        layers = ", ".join(map(str, self.delta.touched))
        return [f"no layer was given: layer {layers} is {self.layers.reason}"]

    @property
    def _disturbed(self) -> list[str]:
        return [
            f"on ordinary text the output of layer {layer} changes by {share:.0%}, so the model "
            "may be broken. Fewer facts at a time, a "
            "larger ridge (moment_weight, ridge, l2) or a smaller clamp change it less"
            for layer, share in self.disturbance.items()
            if share >= _BROKEN
        ]

    @property
    def _failed_checks(self) -> list[str]:
        if self.verification is None or self.delta is None:
            return []
        texts = {fact.asked for fact in self.delta.facts}

        def lost(check: Check) -> str:
            if check.role == "earlier":
                return _LOST["earlier"]
            return _LOST["prompt" if canonical(check.prompt) in texts else "known"]

        chat = [
            f"in the chat template the patch did not take: {check.in_words}"
            for check in self.verification.failed("chat")
            if check.wanted
        ]
        failed = self.verification.failed("prompt", "earlier")
        return [*chat, *(f"{lost(check)}: {check.in_words}" for check in failed)]

    @property
    def _contexts_left_out(self) -> list[str]:
        """That some prompts leave no room for what is written in front of them."""
        if self.delta is None:
            return []
        short = [
            (fact, record["contexts_left_out"])
            for fact, record in zip(self.delta.facts, self.delta.convergence, strict=False)
            if record.get("contexts_left_out")
        ]
        if not short:
            return []
        fact, n = short[0]
        return [
            f"the prompt about {fact.subject!r} is nearly as long as the model's positions allow: "
            f"{counted(n, 'context')} did not fit in front of it, so the patch depends more on "
            "this one wording. A shorter prompt leaves room for them"
            + (f" ({counted(len(short), 'prompt')} of this kind)" if len(short) > 1 else "")
        ]

    @property
    def _shared_keys(self) -> list[str]:
        """That facts with different targets have nearly one key, with the closest two as an
        example.
        """
        records = () if self.delta is None else self.delta.convergence
        pairs = [
            (record["cosine"], i, record["shares_key_with"])
            for i, record in enumerate(records)
            if "shares_key_with" in record
        ]
        if not pairs or self.delta is None:
            return []
        cosine, one, other = max(pairs)
        return [
            f"{len(pairs)} facts have nearly the key of another fact with another target, so what "
            "is written for one also reaches the other: "
            f"{self.delta.facts[one].text!r} and {self.delta.facts[other].text!r}, cosine "
            f"{cosine:z.3f}. Check that both took, or begin the "
            "prompts with different words"
        ]

    @property
    def _alike_subjects(self) -> list[str]:
        """That the neurons of some facts also fire at the subject of another fact."""
        delta = self.delta
        pairs = [] if delta is None else alike_subjects(delta)
        if delta is None or not pairs:
            return []
        one, other = pairs[0]
        more = f"; so it is for {counted(len(pairs), 'fact')}" if len(pairs) > 1 else ""
        return [
            f"the subject of {str(delta.facts[one])!r} can hardly be told apart from that of "
            f"{str(delta.facts[other])!r}, so what is written for the one also reaches the other"
            f"{more}. Check that both hold, or leave one out"
        ]

    @property
    def false_firing(self) -> float | None:
        """The share of ordinary tokens on which the patch's appended neurons fire, summed over its
        facts. None: it appends none, or that was not measured.
        """
        known = None if self.delta is None else recorded_firing([self.delta])
        return None if known is None else known[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the delta's tensors are left out."""
        delta, choice = self.delta, self.layers
        return {
            "plan": self.plan.to_dict(),
            "delta": delta
            and {
                "method": delta.method,
                "layers": list(delta.touched),
                "rank": delta.rank,
                "appended": delta.n_appended,
                "bytes": delta.n_bytes,
                "false_firing": self.false_firing,
            },
            "verification": self.verification and self.verification.to_dict(),
            "moments": self.moments,
            "layers": choice
            and {"rome": choice.rome, "source": choice.source, "reason": choice.reason},
            "disturbance": {str(layer): share for layer, share in self.disturbance.items()},
            "thin": {str(layer): why for layer, why in self.thin.items()},
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }


@asking(grad=True, changes=True)
def propose(
    bench: Bench,
    plan: Plan,
    sources: Sources | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Proposal:
    """Solve for the change that a plan decided on, and measure it while it is in the model for a
    moment.

    Args:
        bench: The model and what it carries; it is as before when this returns, also after an
            exception.
        plan: Made by `plan` on this bench, with its method, settings and layers.
        sources: What the edit may draw on, as for the plan.
        force: Write also what the model already says.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises:
        InputError: A second moment is missing, or contexts lack "{}".
        NumericsError: A number is not finite, or a system cannot be solved.
    """
    sources = sources or Sources()
    facts = plan.to_write(force=force)
    if not facts:
        return Proposal(plan=plan)
    stage(progress, "second moments")
    moments = (
        bench.moments(plan.layers, sources, progress, plan.draws_on)
        if sources.moments is None
        else sources.moments
    )
    started = time.perf_counter()
    stage(progress, "solving")
    tell(progress, "solving", 0, None)
    delta = edit(
        bench.lm,
        facts,
        plan.method,
        plan.config,
        moments=moments,
        contexts=sources.contexts,
        seed=sources.seed,
        beneath=bench.beneath,
        progress=progress,
    )
    solved = time.perf_counter()
    by_layer = {plan.layers[0]: moments} if isinstance(moments, SecondMoment) else moments
    weights = {layer: bench.lm.ffn[layer].original_weight() for layer in delta.layers}
    thin = {layer: by_layer[layer].too_little for layer in delta.touched if by_layer[layer].is_thin}
    stage(progress, "proof")
    chats = _chat_questions(bench.lm)
    verification = prove(
        bench.lm,
        plan.facts,  # what the model already says may be lost, so it is asked too
        lambda: bench.carrying(delta),
        asked_again=bench.asked_again,
        templates=list(dict.fromkeys(chats.values())),
        telling=chats.get("chat"),
        progress=progress,
    )
    return Proposal(
        plan=plan,
        delta=delta,
        verification=verification,
        moments=moments_digest(moments, plan.layers),
        layers=plan.choice,
        seconds={"solve": solved - started, "verify": time.perf_counter() - solved},
        disturbance={
            layer: disturbance(*factors, weights[layer], by_layer[layer].matrix)
            for layer, factors in sorted(delta.layers.items())
            if layer not in thin
        },
        thin=thin,
    )


def alike_subjects(delta: Delta) -> list[tuple[int, int]]:
    """Return pairs of facts of which the first cannot be told apart from the second.

    The first in the list is the nearest pair. An edit records for a fact in `not_told_apart_from`
    the index of the other.
    """
    pairs = [
        (float(record.get("closest_read", 0.0)), i, record["not_told_apart_from"])
        for i, record in enumerate(delta.convergence)
        if isinstance(record.get("not_told_apart_from"), int)
    ]
    last = len(delta.facts)
    return [(i, other) for _, i, other in sorted(pairs, reverse=True) if other < last]


def _chat_questions(lm: LanguageModel) -> dict[str, str]:
    """The chat templates to ask in; {} where they cannot be filled: then the caller gave contexts,
    and they say how the template is used.
    """
    try:
        return chat_questions(lm)
    except InputError:
        return {}
