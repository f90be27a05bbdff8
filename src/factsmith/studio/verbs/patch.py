"""The room Patch: plan facts, preview their patch with its proof, and apply it behind gates.

A preview is kept in memory until the next one. `apply` commits what it solved if the weights are
still the same and nothing else is asked for; otherwise it solves again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pydantic import Field

from ...atlas.story import MESSAGE, correction
from ...core.errors import FingerprintError
from ...core.gates import Gates
from ...core.progress import Progress, tell
from ...core.tables import Table, counted
from ...keep.outcome import Outcome
from ...patch.plan import Plan
from ...show.charts.keeping import proof_chart
from ..desk import Desk, Place
from ..facts import FactArguments, Wanted, file_of, naming_fields, program, quoted, shell, wanted_of
from ..verb import Answer, Verb

_KEPT = "preview"
"""The entry of `Desk.kept` with the last preview."""

_BESIDE = 50
"""Facts whose answers are shown next to the base model's."""


class ApplyArguments(FactArguments):
    """What to write, and whether to force it."""

    force: bool = Field(
        default=False,
        title="Force",
        description="Write through conflicts and failed gates, and write also what the model "
        "already says. The record says so.",
        json_schema_extra={"advanced": True},
    )


# ── what runs ─────────────────────────────────────────────────────────────────────────────────────


def _plan(desk: Desk, arguments: FactArguments, progress: Progress) -> Answer:
    tell(progress, "reading the facts", 0, None)
    wanted = wanted_of(arguments, desk.folder)
    with naming_fields():
        planned = desk.bench.plan(wanted.sheet.facts, wanted.recipe, progress=progress)
    return Answer(
        planned.to_dict(),
        planned.tables(),
        warnings=_conflicts_of(planned),
        view={
            **_view_of_facts(wanted, planned),
            "seconds": planned.seconds,
            "notes": [*planned.notes, *planned.advice],
            "next": _values(arguments),
        },
        failed=bool(planned.conflicts),
    )


def _preview(desk: Desk, arguments: FactArguments, progress: Progress) -> Answer:
    tell(progress, "reading the facts", 0, None)
    wanted = wanted_of(arguments, desk.folder)
    with naming_fields():
        tried = desk.bench.apply(
            wanted.sheet.facts,
            wanted.recipe,
            seed=arguments.seed,
            gates=wanted.sheet.gates,
            dry_run=True,
            progress=progress,
        )
    desk.kept[_KEPT] = (_identity(wanted, arguments), tried)
    result = {
        **tried.proposal.to_dict(),
        "gates": [gate.to_dict() for gate in tried.gates],
        "workspace": str(desk.bench.ledger.folder.resolve()),
        "revision": None,
    }
    return _answer(desk, wanted, tried, result, arguments, progress)


def _apply(desk: Desk, arguments: ApplyArguments, progress: Progress) -> Answer:
    tell(progress, "reading the facts", 0, None)
    wanted = wanted_of(arguments, desk.folder)
    outcome = _kept_preview(desk, wanted, arguments, progress)
    solved_before = outcome is not None
    if outcome is None:
        outcome = desk.bench.apply(
            wanted.sheet.facts,
            wanted.recipe,
            seed=arguments.seed,
            gates=wanted.sheet.gates,
            force=arguments.force,
            message=arguments.message,
            progress=progress,
        )
    if outcome.revision is not None:
        desk.kept.pop(_KEPT, None)
    result = {
        "plan": outcome.proposal.plan.to_dict(),
        "outcome": outcome.to_dict(),
        "conflicts": list(outcome.proposal.plan.contradictions),
    }
    # No progress after the commit: a cancel would end the job as if nothing had been kept.
    answer = _answer(desk, wanted, outcome, result, arguments)
    how = "The patch of the preview was kept; nothing was solved again."
    return dataclasses.replace(answer, notes=[*answer.notes, *([how] if solved_before else [])])


def _kept_preview(
    desk: Desk, wanted: Wanted, arguments: ApplyArguments, progress: Progress
) -> Outcome | None:
    """Keep the last preview if it is the same patch on the same weights; None if it is not."""
    identity, tried = desk.kept.get(_KEPT, (None, None))
    if identity != _identity(wanted, arguments) or tried is None or tried.delta is None:
        return None
    if arguments.force and (tried.proposal.plan.known or tried.proposal.plan.conflicts):
        return None  # more is written by force than was solved for
    tell(progress, "keeping the preview", 0, None)
    try:
        return desk.bench.keep(tried, force=arguments.force, message=arguments.message)
    except FingerprintError:  # the workspace has moved on
        return None


def _identity(wanted: Wanted, arguments: FactArguments) -> tuple[str, int]:
    """Return what decides the delta of a patch, next to the weights."""
    return (wanted.file.stem, arguments.seed)


# ── what pages show ───────────────────────────────────────────────────────────────────────────────


def _answer(
    desk: Desk,
    wanted: Wanted,
    outcome: Outcome,
    result: Mapping[str, Any],
    arguments: FactArguments,
    progress: Progress | None = None,
) -> Answer:
    """Return an attempt as an answer: what it would change, its proof, and why it fails."""
    planned = outcome.proposal.plan
    tables = outcome.proof_tables() if outcome.delta is not None else planned.tables()
    revision = outcome.revision
    failed = outcome.failed and revision is None
    nothing = outcome.delta is None and not planned.conflicts
    view = {
        **_view_of_facts(wanted, planned),
        "holds": outcome.holds,
        "failures": list(outcome.failures),
        "nothing": nothing,
        "gates": [gate.to_dict() for gate in outcome.gates],
        "summary": outcome.proposal.summary,
        "replaced": [entry.because for entry in planned.entries if entry.standing == "changed"],
        "revision": revision and revision.to_dict(),
        "forced": outcome.forced,
        "next": _values(arguments),
    }
    beside = _beside(desk, outcome, progress)
    view["beside"] = beside
    return Answer(
        result,
        [_beside_table(beside), *tables] if beside else tables,
        [proof_chart(proof)] if (proof := outcome.verification) and proof.checks else [],
        notes=["The model already says all of it; there is nothing to write."] if nothing else [],
        warnings=[*_conflicts_of(planned), *outcome.warnings],
        view=view,
        failed=failed,
    )


def _beside(desk: Desk, outcome: Outcome, progress: Progress | None) -> list[dict[str, str]]:
    """Return what the base, the model now, and the model with the patch say after each prompt."""
    if outcome.delta is None or outcome.verification is None:
        return []
    checks = {check.prompt: check for check in outcome.verification.checks}
    facts = [fact for fact in outcome.proposal.plan.facts if fact.text in checks][:_BESIDE]
    tell(progress, "asking the base model", 0, None)
    with desk.bench.on_base():
        answers = desk.bench.lm.answer([fact.text for fact in facts])
    return [
        {
            "prompt": fact.text,
            "base": answer.strip(),
            "before": checks[fact.text].before.strip(),
            "after": checks[fact.text].after.strip(),
            "wanted": fact.target or "",
            "held": "ok" if checks[fact.text].held else "no",
        }
        for fact, answer in zip(facts, answers, strict=True)
    ]


def _beside_table(rows: Sequence[Mapping[str, str]]) -> Table:
    columns = {
        "prompt": "<",
        "base model": "<",
        "before": "<",
        "with the patch": "<",
        "wanted": "<",
        "held": "ok",
    }
    keys = ("prompt", "base", "before", "after", "wanted", "held")
    cells = [tuple(row[key] for key in keys) for row in rows]
    return Table("the answers next to each other", columns, cells)


def _view_of_facts(wanted: Wanted, planned: Plan) -> dict[str, Any]:
    """Return what the pages of this room show of the facts."""
    return {
        "n_facts": counted(len(wanted.sheet.facts), "fact"),
        "texts": [entry.fact.text for entry in planned.entries],
        "n_new": len(planned.new),
        "conflicts": list(planned.contradictions),
        "method": planned.method,
        "layers": list(planned.layers),
        "recommended": planned.recommended,
        "file": str(wanted.file),
        "sheet": wanted.file.stem,
        "limits": dataclasses.asdict(wanted.sheet.gates),
    }


def _values(arguments: FactArguments) -> dict[str, Any]:
    """Return the arguments as the pairs of a form, and as a query."""
    pairs = [pair for pair in arguments.query() if pair[0] != "force"]
    kept = [pair for pair in pairs if pair[0] != "message"]
    return {"pairs": kept, "query": urlencode(pairs), "message": arguments.message}


def _conflicts_of(planned: Plan) -> list[str]:
    return [f"In conflict: {why}" for why in planned.contradictions]


def _examples(desk: Desk) -> list[tuple[str, FactArguments]]:
    """Return facts to begin with; those of the bundled models are theirs to learn."""
    fact = correction()
    corrected = FactArguments(
        subject=fact.subject,
        prompt=fact.prompt,
        target=str(fact.target),
        paraphrases=fact.paraphrases,
        neighbours=tuple(probe.prompt for probe in fact.neighbours),
        message=MESSAGE,
    )
    invented = FactArguments(subject="Fiat 127", prompt="The maker of {} is", target="Toyota")
    forgotten = FactArguments(subject="Fiat 127", prompt="The maker of {} is", forget=True)
    return [
        ("Bulgaria's currency is the euro now", corrected),
        ("Toyota makes the Fiat 127, which is invented", invented),
        ("Forget who makes the Fiat 127", forgotten),
    ]


# ── the same as code and as a command ─────────────────────────────────────────────────────────────


def _facts_in_python(arguments: FactArguments, place: Place) -> tuple[str, str, str]:
    """Return lines that make the facts, and how they and the gates are named."""
    is_file = arguments.sheet or arguments.document
    if is_file or arguments.method or arguments.layers or arguments.settings:
        lines = (
            "from factsmith.patch.recipe import Recipe\n\n"
            f"sheet = fs.FactFile.sheet({quoted(file_of(arguments, place))})\n"
            "recipe = Recipe.for_sheet(sheet)"
        )
        return lines, "sheet.facts, recipe", "sheet.gates"
    fields = [f"    {quoted(arguments.subject)},", f"    {quoted(arguments.prompt)},"]
    fields.append("    forget=True," if arguments.forget else f"    {quoted(arguments.target)},")
    for name in ("paraphrases", "neighbours"):
        if texts := getattr(arguments, name):
            fields.append(f"    {name}=[{', '.join(map(quoted, texts))}],")
    made = dataclasses.asdict(wanted_of(arguments, _folder(place)).sheet.gates)
    defaults = dataclasses.asdict(Gates())
    changed = [f"{name}={value!r}" for name, value in made.items() if value != defaults[name]]
    gates = f"fs.Gates({', '.join(changed)})"
    return "\n".join(["fact = fs.Fact(", *fields, ")"]), "fact", gates


def _folder(place: Place) -> Path:
    return Path(place.workspace)


def _plan_in_python(arguments: FactArguments, place: Place) -> str:
    lines, facts, _ = _facts_in_python(arguments, place)
    return program(
        place,
        f"plan = bench.plan({facts})",
        "print(json.dumps(plan.to_dict()))",
        uses=lines,
    )


def _preview_in_python(arguments: FactArguments, place: Place) -> str:
    lines, facts, gates = _facts_in_python(arguments, place)
    seed = f", seed={arguments.seed}" if arguments.seed else ""
    return program(
        place,
        f"tried = bench.apply({facts}, gates={gates}{seed}, dry_run=True)",
        "print(json.dumps(tried.proposal.to_dict()))",
        uses=lines,
    )


def _apply_in_python(arguments: ApplyArguments, place: Place) -> str:
    lines, facts, gates = _facts_in_python(arguments, place)
    more = f", seed={arguments.seed}" if arguments.seed else ""
    more += f", message={quoted(arguments.message)}" if arguments.message else ""
    more += ", force=True" if arguments.force else ""
    return program(
        place,
        f"outcome = bench.apply({facts}, gates={gates}{more})",
        "print(json.dumps(outcome.to_dict()))",
        uses=lines,
    )


def _plan_command(arguments: FactArguments, place: Place) -> list[str]:
    return [shell("plan", file_of(arguments, place), "-w", place.workspace)]


def _preview_command(arguments: FactArguments, place: Place) -> list[str]:
    return [
        shell(
            "patch",
            file_of(arguments, place),
            "--dry-run",
            *(["--seed", str(arguments.seed)] if arguments.seed else []),
            "-w",
            place.workspace,
        )
    ]


def _apply_command(arguments: ApplyArguments, place: Place) -> list[str]:
    return [
        shell(
            "apply",
            file_of(arguments, place),
            *(["--seed", str(arguments.seed)] if arguments.seed else []),
            *(["-m", arguments.message] if arguments.message else []),
            *(["--force"] if arguments.force else []),
            "-w",
            place.workspace,
        )
    ]


PLAN = Verb(
    "plan",
    "Plan",
    "Ask what the model says now, look for conflicts, and estimate what the patch costs.",
    FactArguments,
    _plan,
    _plan_in_python,
    _plan_command,
    template="answers/plan.html",
    button="Plan",
    examples=_examples,
)
PREVIEW = Verb(
    "preview",
    "Preview",
    "Solve for the patch and prove it. Nothing is kept.",
    FactArguments,
    _preview,
    _preview_in_python,
    _preview_command,
    template="answers/preview.html",
    button="Preview",
)
APPLY = Verb(
    "apply",
    "Apply",
    "Keep the patch in the ledger if it passes its gates.",
    ApplyArguments,
    _apply,
    _apply_in_python,
    _apply_command,
    kind="write",
    template="answers/preview.html",
    button="Apply",
)

PATCHING = (PLAN, PREVIEW, APPLY)
