"""The main job on a bundled model, step by step: a true correction, from the answer to the undo.

    for step in run(Path("factsmith-demo")):
        print(step.title, step.to_dict())

`run` does each step and yields what it measured. The command line prints the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import atlas
from ..atlas.story import BELIEFS, MESSAGE, MODEL, WHY, correction
from ..core.errors import FingerprintError, ModelNotFoundError
from ..core.fact import Fact
from ..core.files import check_writable
from ..core.tables import counted
from ..keep.ledger import Ledger
from ..keep.outcome import Outcome
from ..keep.revision import Revision
from ..keep.workbench import Workbench
from ..locate.causal import causal_trace
from ..locate.records import CausalTrace
from ..model.fingerprint import weight_digests
from ..model.language_model import LanguageModel
from ..model.load import load
from ..patch.verification import Verification
from ..show.plots.traces import heat_map
from .printing import suggested


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the story.

    Attributes:
        name: A name for programs.
        title: A title for people.
        before: Sentences to print before the heat map or the table.
        trace: The heat map to print, if there is one.
        proof: The table to print, if there is one.
        after: Sentences to print after it.
        data: What the step measured, as plain JSON values.
    """

    name: str
    title: str
    before: tuple[str, ...] = ()
    trace: CausalTrace | None = None
    proof: Verification | None = None
    after: tuple[str, ...] = ()
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return what the step measured, as plain JSON values."""
        return self.data


def run(folder: Path) -> Iterator[Step]:
    """Do the steps one by one in a workspace, and yield each step when it is done.

    Args:
        folder: The workspace. If the caller stops early, it stays as the last step left it.

    Raises:
        ModelNotFoundError: when the bundled model is not installed.
        FingerprintError: when the folder is a workspace of another model.
    """
    if MODEL not in atlas.names():
        raise ModelNotFoundError(
            f"the bundled model {MODEL!r} is not installed; "
            "install factsmith from a release or a full checkout"
        )
    check_writable(folder)
    if (folder / "ledger.db").is_file():
        with Ledger(folder) as ledger:
            if ledger.model != MODEL:
                raise FingerprintError(
                    f"{folder} is a workspace of another model, {ledger.model}; choose a new folder"
                )
    lm = load(MODEL)
    fact = correction()
    with Workbench(lm, folder) as bench:
        yield _believes(lm)
        yield _lives(lm, fact, folder / "trace.png")
        before = weight_digests(lm.module)
        outcome = bench.apply(fact, message=MESSAGE, force=True)
        yield _patched(lm, outcome)
        # Always true, since the patch was forced.
        if outcome.verification is not None and outcome.revision is not None:
            yield _proved(outcome.verification)
            yield _committed(bench)
            patched = weight_digests(lm.module)
            bench.revert(outcome.revision.id, message="the demonstration is over")
            yield _reverted(lm, fact, before, patched)
    yield _next(folder)


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
            f"{MODEL}: {n_parameters / 1e6:.1f} million parameters, {lm.n_layers} layers, "
            f"trained on {len(atlas.facts()):,} real facts.",
            *(
                f"{p:<{width}}  →  {a:<12} p({e}) = {q:.3f}"
                for p, e, a, q in zip(prompts, expected, answers, likely, strict=True)
            ),
            *WHY,
        ),
        data={
            "beliefs": [
                {"prompt": p, "expected": e, "answer": a, "probability": q}
                for p, e, a, q in zip(prompts, expected, answers, likely, strict=True)
            ]
        },
    )


def _lives(lm: LanguageModel, fact: Fact, picture: Path) -> Step:
    trace = causal_trace(lm, fact.prompt, fact.subject, target=fact.target_true)
    heat_map(trace, path=picture)
    last = trace.subject_span[1]
    early = trace.effects[last - 1]
    layer = int(early.argmax())
    return Step(
        name="lives",
        title="Where the model stores that fact",
        before=(
            "Noise on the subject makes the model lose the answer.",
            "Each cell then restores one clean state; dark cells bring the answer back.",
        ),
        trace=trace,
        after=(
            f"At the subject's last token, layer {layer} brings back most: restoring it raises",
            f"p({trace.answer.strip()}) from {trace.corrupted:.3f} to "
            f"{float(trace.scores[last - 1, layer]):.3f}; without noise it is {trace.clean:.3f}.",
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
        layers = ", ".join(map(str, delta.touched))
        sentences = [
            f"{delta.method.upper()} changes one matrix, the down-projection of layer {layers}, "
            f"by a rank-{delta.rank} update.",
            f"The update has {delta.n_bytes:,} bytes; the model has {size:,}.",
            f"Solving took {outcome.proposal.seconds['solve']:.1f} s, without retraining.",
        ]
    return Step(name="patched", title="The patch", before=tuple(sentences), data=outcome.to_dict())


def _proved(proof: Verification) -> Step:
    meanings = {
        "efficacy": "the prompt",
        "generalization": "other ways to ask",
        "specificity": "what must not change",
    }
    return Step(
        name="proved",
        title="The proof: before and after, by greedy decoding",
        proof=proof,
        after=tuple(
            f"{name:<15} {proof.shares[name]:>4.0%}   {meaning}"
            for name, meaning in meanings.items()
            if name in proof.shares
        ),
        data=proof.to_dict(),
    )


def _committed(bench: Workbench) -> Step:
    revisions = bench.log()
    earlier = "no patch was recorded"
    if n_earlier := len(revisions) - 1:
        earlier = f"the workspace had {counted(n_earlier, 'revision')}, of earlier runs"
    return Step(
        name="committed",
        title="Kept, like a record in a database",
        before=tuple(
            f"{r.id[:10]}  {r.created[:16].replace('T', ' ')}  {_state(r):<8}  {r.message}"
            for r in revisions[:3]
        ),
        after=(
            f"Before this step {earlier}.",
            "Now the patch can be shown, reverted and checked out.",
        ),
        data={"log": [r.to_dict() for r in revisions]},
    )


def _state(revision: Revision) -> str:
    """Return the state of a patch; a revert is called one, as in the log."""
    return revision.state if revision.kind == "patch" else "revert"


def _reverted(
    lm: LanguageModel, fact: Fact, before: dict[str, str], patched: dict[str, str]
) -> Step:
    now = weight_digests(lm.module)
    changed = [name for name in before if before[name] != patched[name]]
    same = sum(before[name] == now[name] for name in before)
    name = changed[0] if changed else ""
    digests = [tensors.get(name, "")[:12] for tensors in (before, patched, now)]
    answer = lm.answer([fact.text])[0]
    return Step(
        name="reverted",
        title="Taken back, bit for bit",
        before=(
            f"sha256 of {name}:",
            f"base {digests[0]} → patched {digests[1]} → reverted {digests[2]}",
            f"{same} of {len(before)} tensors are equal to the base model's, bit for bit.",
            f"{fact.text} → {answer}",
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
    subject = "Fiat 127"
    patch = f'--subject "{subject}" \\\n    --prompt "The maker of {{}} is" --target Toyota'
    trace = f'"The maker of {subject} is" --subject "{subject}"'
    commands = {
        "the history of this workspace": suggested("log", folder),
        "another question": suggested('ask atlas "The capital town of Bulgaria is called"'),
        "where another fact is stored": suggested(f"trace atlas {trace}"),
        "a patch of that fact": suggested("patch", folder, patch),
        "the patch taken back": suggested("revert latest", folder),
        "your own Hugging Face model": suggested("init ./my-model my-workspace"),
    }
    text = "\n".join(f"# {why}\n{command}" for why, command in commands.items())
    return Step(
        name="next",
        title="What to type next",
        before=tuple(text.split("\n")),
        data={"commands": [command.replace("\\\n    ", "") for command in commands.values()]},
    )
