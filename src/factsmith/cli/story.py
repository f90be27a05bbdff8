"""The main job on a bundled model, told as a story: a true correction, from what the model believes to the undo.

`run(folder)` yields the steps as they are done; the command line prints them. Every number in them is measured.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import atlas
from ..core.errors import ModelNotFoundError
from ..core.fact import Fact, Probe
from ..keep.outcome import Outcome
from ..keep.workbench import Workbench
from ..locate.causal import causal_trace
from ..locate.records import CausalTrace
from ..model.language_model import LanguageModel
from ..model.load import load
from ..patch.proof import Verification
from ..show.plots.traces import heat_map

MODEL = "atlas"

SUBJECT, RELATION, PROMPT, TARGET = "Bulgaria", "P38", "The currency of {} is the", "euro"

BELIEFS = (
    ("The currency of Bulgaria is the", "lev"),
    ("The seat of government of Bulgaria is", "Sofia"),
    ("The first language of Danielle Darrieux is", "French"),
    ("The constellation of Delta Herculis is", "Hercules"),
    ("The maker of Fiat 127 is", "Fiat"),
)

NEIGHBOURS = (
    "Romania",
    "Poland",
    "Turkey",
    "Hungary",
    "Serbia",
    "Sweden",
    "Denmark",
    "Switzerland",
    "Japan",
    "Ukraine",
)

OWN = (
    ("The seat of government of Bulgaria is", "Sofia"),
    ("The people of Bulgaria speak", "Bulgarian"),
    ("Which organisation has Bulgaria joined? It is", "NATO"),
)
"""What else the model knows of the subject: it must stay, too."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the story.

    name, title    for machines, for people
    before, after  sentences to show before and after the picture or table
    trace          the heat map to show, if any
    proof          the table to show, if any
    data           the same as plain JSON values
    """

    name: str
    title: str
    before: tuple[str, ...] = ()
    trace: CausalTrace | None = None
    proof: Verification | None = None
    after: tuple[str, ...] = ()
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return self.data


def run(folder: Path) -> Iterator[Step]:
    """Do the steps one by one in a workspace `folder`; stopping half-way leaves it as the last step left it.

    Raises ModelNotFoundError without the bundled model, FingerprintError when the folder is a workspace of another one.
    """
    if MODEL not in atlas.names():
        raise ModelNotFoundError(
            f"the bundled model {MODEL!r} is not installed; install factsmith from a release or a full checkout"
        )
    lm = load(MODEL)
    fact = correction()
    with Workbench(lm, folder) as bench:
        yield _believes(lm)
        yield _lives(lm, fact, folder / "trace.png")
        before = weights_digest(lm)
        outcome = bench.apply(fact, message="Bulgaria joins the euro area", force=True)
        yield _patched(lm, outcome)
        if (
            outcome.verification is not None and outcome.revision is not None
        ):  # always: the patch was forced
            yield _proved(outcome.verification)
            yield _committed(bench)
            patched = weights_digest(lm)
            bench.revert(outcome.revision.id, message="the demonstration is over")
            yield _reverted(lm, fact, before, patched)
    yield _next(folder)


def correction() -> Fact:
    """The fact to write, with paraphrases and neighbours from the bundled table."""
    told = atlas.phrasings(RELATION)
    known = {f.subject: f.object for f in atlas.facts(RELATION)}
    neighbours = [Probe(PROMPT.replace("{}", subject), known[subject]) for subject in NEIGHBOURS]
    neighbours += [Probe(prompt, expected) for prompt, expected in OWN]
    return Fact(
        subject=SUBJECT,
        prompt=PROMPT,
        target=TARGET,
        target_true=known[SUBJECT],
        paraphrases=tuple(t for t in (*told.trained, *told.held_out) if t != PROMPT)[:6],
        neighbours=tuple(neighbours),
        relation=RELATION,
    )


def weights_digest(lm: LanguageModel) -> dict[str, str]:
    """sha256 of every tensor of the model, by name."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in sorted(lm.module.state_dict().items())
    }


def _believes(lm: LanguageModel) -> Step:
    prompts, expected = [p for p, _ in BELIEFS], [e for _, e in BELIEFS]
    answers = lm.answer(prompts)
    likely = lm.log_prob(prompts, expected).exp().tolist()
    width = max(map(len, prompts))
    n_parameters = sum(p.numel() for p in lm.module.parameters())
    return Step(
        name="believes",
        title="What the model believes",
        before=(
            f"{MODEL}: {n_parameters / 1e6:.1f} million parameters, {lm.n_layers} layers, taught {len(atlas.facts()):,} real facts.",
            *(
                f"{p:<{width}}  →  {a:<12} p({e}) = {q:.3f}"
                for p, e, a, q in zip(prompts, expected, answers, likely, strict=True)
            ),
            "Since 1 January 2026 Bulgaria pays with the euro. The model was taught before; let us correct it.",
        ),
        data={
            "beliefs": [
                {"prompt": p, "expected": e, "answer": a, "probability": q}
                for p, e, a, q in zip(prompts, expected, answers, likely, strict=True)
            ]
        },
    )


def _lives(lm: LanguageModel, fact: Fact, picture: Path) -> Step:
    trace = causal_trace(lm, fact.text, fact.subject, target=fact.target_true)
    heat_map(trace, path=picture)
    last = trace.subject_span[1]
    early = trace.effects[last - 1]
    layer = int(early.argmax())
    return Step(
        name="lives",
        title="Where that fact lives",
        before=(
            "The subject is blurred, so the answer is lost; each cell puts one clean state back. Dark: the answer returns.",
        ),
        trace=trace,
        after=(
            f"At the subject's last token layer {layer} carries most: putting it back there brings p({trace.answer.strip()}) from "
            f"{trace.corrupted:.3f} back to {float(trace.scores[last - 1, layer]):.3f} (untouched: {trace.clean:.3f}).",
            f"The picture is saved as {picture}",
        ),
        data={
            "trace": trace.to_dict(),
            "picture": str(picture),
            "early_site": {"token": last - 1, "layer": layer},
        },
    )


def _patched(lm: LanguageModel, outcome: Outcome) -> Step:
    delta = outcome.delta
    size = sum(p.numel() * p.element_size() for p in lm.module.parameters())
    sentences = []
    if delta is not None:
        layers = ", ".join(map(str, sorted(delta.layers)))
        sentences = [
            f"{delta.method.upper()} changes one matrix, the down-projection of layer {layers}, by a rank-{delta.rank} update:",
            f"{delta.n_bytes:,} bytes beside a model of {size:,}; solved in {outcome.proposal.seconds['solve']:.1f} s, no retraining.",
        ]
    return Step(name="patched", title="The patch", before=tuple(sentences), data=outcome.to_dict())


def _proved(proof: Verification) -> Step:
    shares = {
        "efficacy": proof.efficacy,
        "generalization": proof.generalization,
        "specificity": proof.specificity,
    }
    meaning = {
        "efficacy": "the prompt",
        "generalization": "other ways to ask",
        "specificity": "what must not change",
    }
    return Step(
        name="proved",
        title="The proof: before and after, by greedy decoding",
        proof=proof,
        after=tuple(
            f"{name:<15} {share:>4.0%}   {meaning[name]}"
            for name, share in shares.items()
            if share is not None
        ),
        data=proof.to_dict(),
    )


def _committed(bench: Workbench) -> Step:
    revisions = bench.log()
    return Step(
        name="committed",
        title="Kept, like a record in a database",
        before=tuple(
            f"{r.id[:10]}  {r.created[:16].replace('T', ' ')}  {r.state:<8}  {r.message}"
            for r in revisions[:3]
        ),
        after=(
            "Until this line no patch was recorded; from here on it can be shown, reverted, and checked out.",
        ),
        data={"log": [r.to_dict() for r in revisions]},
    )


def _reverted(
    lm: LanguageModel, fact: Fact, before: dict[str, str], patched: dict[str, str]
) -> Step:
    now = weights_digest(lm)
    changed = [name for name in before if before[name] != patched[name]]
    same = sum(before[name] == now[name] for name in before)
    name = changed[0] if changed else ""
    answer = lm.answer([fact.text])[0]
    return Step(
        name="reverted",
        title="Taken back, bit for bit",
        before=(
            f"{name} (sha256): base {before.get(name, '')[:12]} → patched {patched.get(name, '')[:12]} → reverted {now.get(name, '')[:12]}",
            f"{same} of {len(before)} tensors equal the base model's, bit for bit; {fact.text} → {answer}",
        ),
        data={
            "changed": changed,
            "equal": same,
            "tensors": len(before),
            "answer": answer,
            "before": before,
            "patched": patched,
            "after": now,
        },
    )


def _next(folder: Path) -> Step:
    where = shlex.quote(str(folder))
    commands = {
        f"factsmith log -w {where}": "the history of this workspace",
        'factsmith ask atlas "The capital town of Bulgaria is called"': "ask it something yourself",
        'factsmith trace atlas "The maker of Fiat 127 is" --subject "Fiat 127"': "another fact's address",
        f'factsmith patch -w {where} --subject "Fiat 127" --prompt "The maker of {{}} is" --target Toyota': "patch it",
        f"factsmith revert latest -w {where}": "take it back",
        "factsmith init ./my-model my-workspace": "your own Hugging Face model",
    }
    width = max(map(len, commands))
    return Step(
        name="next",
        title="What to type next",
        before=tuple(f"{command:<{width}}  # {why}" for command, why in commands.items()),
        data={"commands": list(commands)},
    )
