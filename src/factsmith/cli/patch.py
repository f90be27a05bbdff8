"""Patch: solve for a change, prove it and record it; and second moments, which weigh it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError, NumericsError, WorkspaceError
from ..core.fact import Fact
from ..core.factfile import FactFile, FactSheet
from ..core.files import check_writable
from ..core.progress import Progress
from ..corpus.own import texts_of
from ..keep.ledger import Ledger
from . import completing
from .engine import engine, on_workers
from .models import need_model, opened, read_moments, workspace_of
from .options import (
    Device,
    Json,
    Message,
    Method,
    Model,
    Seed,
    Settings,
    Texts,
    Where,
    model_and_facts,
    read_settings,
)
from .printing import complain_all, complain_of, print_result, suggested
from .waiting import PATCH_STAGES, progress

if TYPE_CHECKING:
    from ..patch.attempt import Attempt
    from ..patch.recipe import Recipe


@on_workers
def moments(  # house: Typer reads one parameter for each option
    model: Model = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="A layer, counted from 0. May be repeated.",
            show_default="those that memit edits",
        ),
    ] = None,
    texts: Texts = None,
    max_tokens: Annotated[
        float | None,
        typer.Option(
            help="Tokens to read; inf for all of the text. Kept moments of fewer tokens are "
            "computed again.",
            show_default="16 for each neuron of a layer",
        ),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16",
            help="Run in bfloat16: faster, and about 0.5 % off.",
        ),
    ] = False,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Write float16 Cholesky factors: a quarter of the bytes."),
    ] = False,
    inputs: Annotated[
        bool,
        typer.Option(
            "--inputs",
            help="Statistics of what enters the layers, on which append draws, instead of second "
            "moments.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write layer<number>.safetensors or inputs<number>.safetensors to.",
            show_default="the workspace's",
        ),
    ] = None,
    seed: Seed = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compute the second moments of layers, which weigh edits.

    Kept ones are described, and not computed again. A run that is killed goes on where it stopped.
    With --inputs they are statistics of what enters the layers, which tell appended neurons apart.

    \b
    Examples:
      factsmith moments atlas
      factsmith moments atlas --inputs
      factsmith moments path/to/model --texts wiki.txt \\
          --layer 3 --layer 4 --out moments
    """
    need_model(model, workspace)
    if max_tokens is not None and not max_tokens >= 1:
        raise InputError(f"--max-tokens is {max_tokens}; expected a number of at least 1, or inf")
    if layer and len(set(layer)) < len(layer):
        raise InputError(
            f"--layer names layers {', '.join(map(str, layer))}; name each once", argument="layer"
        )
    if out is not None:
        check_writable(out)
    corpus = texts_of(texts)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench), engine(tell):
        import torch

        from ..patch.moments import gather_moments

        kept = None if bench is None else bench.ledger.folder / "moments"
        result = gather_moments(
            lm,
            layer,
            folder=out or kept,
            find=None if bench is None else bench.find_moments,
            max_tokens=max_tokens,
            texts=corpus,
            packed=packed,
            copy=out is not None,
            dtype=torch.bfloat16 if bf16 else None,
            seed=seed,
            site="inputs" if inputs else "coefficients",
            progress=tell,
        )
    print_result(result.to_dict(), result.tables(), as_json)


PatchWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [FACTS.yaml]",
        autocompletion=completing.models,
        help="A model (default: the workspace's), and a file of facts instead of options: YAML, "
        "JSON, JSON lines or CSV. The file's gates, method and settings count.",
    ),
]
Subject = Annotated[str | None, typer.Option(help="The entity, as the prompt writes it.")]
Prompt = Annotated[
    str | None,
    typer.Option(help="A text with {} for the subject, which the target continues."),
]
Forget = Annotated[
    bool,
    typer.Option(
        "--forget", help="Instead of --target: the model should stop saying what it says now."
    ),
]
Paraphrase = Annotated[
    list[str] | None,
    typer.Option(help="Another way to ask, to see whether it generalizes. May be repeated."),
]
Neighbour = Annotated[
    list[str] | None,
    typer.Option(help="A text whose answer must not change. May be repeated."),
]
Layers = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        help="A layer to edit, counted from 0. May be repeated for methods that edit several.",
        show_default="recommended",
    ),
]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper", help="Use the settings published for a model of this shape, layers included."
    ),
]
GivenMoments = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Second moments that `factsmith moments` wrote, for append with --inputs. Their "
        "layers are edited where the recommended layers have none.",
        show_default="the kept ones, or computed",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Write also what the model already says, and keep what does not hold."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Solve and measure, but keep nothing.")]


@on_workers
def patch(  # house: Typer reads one parameter for each option
    words: PatchWords = None,
    subject: Subject = None,
    prompt: Prompt = None,
    target: Annotated[str | None, typer.Option(help="What the model should say.")] = None,
    forget: Forget = False,
    paraphrase: Paraphrase = None,
    neighbour: Neighbour = None,
    method: Method = None,
    layer: Layers = None,
    paper: Paper = False,
    setting: Settings = None,
    texts: Texts = None,
    moments: GivenMoments = None,
    seed: Seed = 0,
    message: Message = "",
    force: Force = False,
    dry_run: DryRun = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a fact true: solve for the change, prove it, and record it.

    It is recorded in the workspace. Without a workspace the proof is shown and nothing is kept.

    \b
    Examples:
      factsmith patch --subject "Danielle Darrieux" \\
          --prompt "The mother tongue of {} is" --target English
      factsmith patch atlas facts.yaml --dry-run
    """
    model, file = model_and_facts(words or [])
    need_model(model, workspace, error=WorkspaceError)
    _check_newest(workspace_of(model, workspace), dry_run=dry_run)
    described = _Described(subject, prompt, target, forget, paraphrase or [], neighbour or [])
    sheet = described.sheet() if file is None else described.of_file(file)
    changes = read_settings(setting)
    corpus = texts_of(texts)
    with progress(*PATCH_STAGES) as tell:
        recipe = read_recipe(tell, sheet, method, changes, layers=layer, paper=paper)
        given = read_moments(moments, tell, recipe.draws_on(sheet.facts))
        with opened(model, workspace, device, tell) as (lm, bench), engine(tell):
            from ..patch.attempt import attempt_patch
            from ..patch.bench import Scratch
            from ..patch.recipe import Sources

            options: dict[str, Any] = {
                "gates": sheet.named_gates,
                "force": force,
                "progress": tell,
            }
            attempt: Attempt
            if bench is None:
                sources = Sources(moments=given, texts=corpus, seed=seed)
                attempt = attempt_patch(Scratch(lm), sheet.facts, recipe, sources, **options)
            else:
                options |= {"message": message, "dry_run": dry_run}
                attempt = bench.apply(
                    sheet.facts, recipe, moments=given, texts=corpus, seed=seed, **options
                )
    revision = getattr(attempt, "revision", None)
    stops = _stops(attempt, force=force)
    failures = attempt.failures if stops else ()
    complain_all(
        [
            ("warning", warning)
            for warning in attempt.warnings
            if not any(warning in failure for failure in failures)  # it is said below
        ],
        "warnings",
    )
    result = {
        **attempt.proposal.to_dict(),
        "gates": [gate.to_dict() for gate in attempt.gates],
        "workspace": None if bench is None else str(bench.ledger.folder.resolve()),
        "revision": revision and revision.to_dict(),
    }
    lines = replaced(attempt)
    if revision is not None:
        undo = suggested(f"revert {revision.id[:10]}", workspace)
        lines.append((f"committed {revision.id[:10]};", f"to take it back: {undo}"))
    elif attempt.delta is not None and (bench is None or dry_run) and not stops:
        lines.append(_not_kept(model if bench is None else None))
    print_result(result, attempt.proof_tables(), as_json, lines)
    if revision is None:
        stop_if_failed(attempt, force=force)


def _check_newest(folder: Path | None, *, dry_run: bool) -> None:
    """Raise WorkspaceError, before the model is loaded, where an older revision is checked out."""
    if folder is None or dry_run:
        return
    with Ledger(folder) as ledger:
        if ledger.current != ledger.head:
            ledger.expect(ledger.current)


def read_recipe(
    tell: Progress, sheet: FactSheet, method: str | None, changes: dict[str, Any], **options: Any
) -> Recipe:
    """Return the recipe of a fact file and options; raises InputError before a model is loaded."""
    tell("reading the settings", 0, None)
    from ..patch.recipe import Recipe

    recipe = Recipe.for_sheet(sheet, method, changes, **options)
    recipe.check(sheet.facts)
    return recipe


def replaced(attempt: Attempt) -> list[tuple[str, str]]:
    """Return a line for each fact of an earlier patch that a new target replaces."""
    if attempt.delta is None:
        return []
    entries = attempt.proposal.plan.entries
    return [("replaces:", entry.because) for entry in entries if entry.standing == "changed"]


def stop_if_failed(attempt: Attempt, *, force: bool) -> None:
    """Say what failed and exit with 4, if something did that was not forced."""
    if not _stops(attempt, force=force):
        return
    failures = []
    for failure in attempt.failures:
        kind, _, why = failure.partition(": ")
        failures.append((kind, why) if kind == "conflict" else ("failed", failure))
    complain_all(failures, "failures")
    if attempt.delta is None:
        advice = "revert the other facts, correct these, or --force"
    else:
        advice = "correct the facts, the gates or the settings, or --force"
    text, code = f"nothing was written; {advice}", NumericsError.exit_code
    complain_of(NumericsError, text, code)
    raise typer.Exit(code)


def _stops(attempt: Attempt, *, force: bool) -> bool:
    """Whether something failed that was not forced."""
    return attempt.failed and not (force and not attempt.proposal.failed)


def _not_kept(model: str | None) -> tuple[str, str]:
    """Why a change that was only tried was not kept, and what to do next."""
    if model is None:
        return "dry run:", "nothing was kept; run this again without --dry-run"
    keep = f"make a workspace with `factsmith init {model}` and run this in it"
    return "nothing was kept:", f"to keep patches, {keep}"


@dataclass(frozen=True)
class _Described:
    """The options of `patch` that describe a fact."""

    subject: str | None
    prompt: str | None
    target: str | None
    forget: bool
    paraphrases: list[str]
    neighbours: list[str]

    @property
    def _given(self) -> dict[str, str | None]:
        target = "--forget" if self.forget else self.target
        return {"--subject": self.subject, "--prompt": self.prompt, "--target": target}

    def sheet(self) -> FactSheet:
        """The fact that the options describe; raises InputError for one that is not whole."""
        if self.forget and self.target is not None:
            raise InputError(
                f"got --target {self.target} and --forget; give one: what the model should say, or "
                "that it should stop"
            )
        for name, value in self._given.items():
            if value is not None and not value.strip():
                advice = (
                    "a text" if name != "--target" else "what the model should say, or --forget"
                )
                raise InputError(f"{name} is empty; give {advice}")
        missing = [name for name, value in self._given.items() if value is None]
        if missing or self.subject is None or self.prompt is None:
            raise InputError(
                "a patch needs --subject, --prompt and --target (or --forget), or a file of "
                f"facts; {', '.join(missing)} not given"
            )
        fact = Fact(
            subject=self.subject,
            prompt=self.prompt,
            target=self.target,
            paraphrases=tuple(self.paraphrases),
            neighbours=tuple(self.neighbours),
        )
        return FactSheet(facts=(fact,))

    def of_file(self, file: Path) -> FactSheet:
        """What the file says; raises InputError where options describe a fact, too."""
        if any(self._given.values()) or self.paraphrases or self.neighbours:
            raise InputError(
                f"got {file} and options that describe a fact; put the fact into the file, or "
                "leave the file out"
            )
        return FactFile.sheet(file)
