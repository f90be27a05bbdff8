"""Patch: solve for a change, prove it and record it; and the second moments that it is weighed by."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..core.errors import InputError, NumericsError
from ..core.fact import Fact
from ..core.factfile import FactFile, FactSheet
from ..core.gates import Gates
from ..corpus.paragraphs import Paragraphs
from ..keep.revision import Revision
from .common import (
    LARGEST_SEED,
    Device,
    Json,
    Model,
    Where,
    complain,
    in_workspace,
    line,
    model_and_facts,
    need_model,
    opened,
    print_result,
    progress,
    read_settings,
    show_tables,
)

if TYPE_CHECKING:
    from ..patch.attempt import Attempt


def moments(
    model: Model = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A layer, counted from 0; may be repeated.", show_default="those that memit edits"
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text in UTF-8, a blank line between texts; may be repeated.",
            show_default="the model's own",
        ),
    ] = None,
    max_tokens: Annotated[
        float | None,
        typer.Option(
            help="Tokens to read; inf: all of the text. What is kept from fewer is computed anew.",
            show_default="16 for each neuron of a layer",
        ),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16", help="Run the model in bfloat16: faster, and as good (docs/patch.md)."
        ),
    ] = False,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Write float16 Cholesky factors: a quarter of the bytes."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write layer<number>.safetensors to.",
            show_default="the workspace's",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the text that the model writes.")
    ] = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compute the second moments of a model's layers, which editors weigh their changes by, or describe those that are there.

    Killed and started again it goes on where it stood.

    \b
    Examples:
      factsmith moments atlas
      factsmith moments path/to/model --texts wiki.txt --layer 3 --layer 4 --out moments
    """
    need_model(model, workspace)
    if max_tokens is not None and not max_tokens >= 1:
        raise InputError(f"--max-tokens is at least 1, or inf; got {max_tokens}")
    corpus = Paragraphs(texts) if texts else None
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
        import torch

        from ..corpus.moments_store import find_moments, keep_moments, kept_moments
        from ..edit.configs import MemitConfig

        wanted = sorted(set(layer)) if layer else list(MemitConfig.recommended(lm).layers or ())
        folder = out or (None if bench is None else bench.ledger.folder / "moments")
        if out is not None:
            _check_folder(out)
        if folder is None:
            found = {} if corpus else kept_moments(lm, wanted, least=max_tokens or 0)
            if len(found) < len(wanted):
                raise InputError(
                    "there is nowhere to write what is computed; name a folder with --out, or a workspace with --workspace"
                )
        else:
            find = partial(find_moments, lm) if bench is None else bench.find_moments
            found = find(
                wanted,
                folder=folder,
                texts=corpus,
                max_tokens=max_tokens,
                dtype=torch.bfloat16 if bf16 else None,
                checkpoint=folder / "unfinished.safetensors",
                packed=packed,
                seed=seed,
                progress=tell,
            )
        if out is not None:
            keep_moments(found, out, packed=packed)  # also what came with the model
    rows = [
        {
            "layer": number,
            "d_ff": m.d_ff,
            "tokens": m.count,
            "split_half": m.split_half,
            "excess": m.excess,
            "corpus": m.corpus,
        }
        for number, m in sorted(found.items())
    ]

    def show(console: Console) -> None:
        for number, moment in sorted(found.items()):
            line(console, f"layer {number}:", moment.describe())

    print_result({"moments": rows, "folder": folder and str(folder)}, show, as_json)


def patch(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [FACTS.yaml]",
            help="A model (left out: the workspace's), and a file of facts instead of options.",
        ),
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="The entity, as it stands in the prompt.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="A text with {} where the subject goes, to be continued by the target."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="What the model should say.")] = None,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget", help="Instead of a --target: the model should stop saying what it says now."
        ),
    ] = False,
    paraphrase: Annotated[
        list[str] | None,
        typer.Option(help="Another way to ask, to check it generalizes; may be repeated."),
    ] = None,
    neighbour: Annotated[
        list[str] | None, typer.Option(help="A text whose answer must not change; may be repeated.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="rome, r-rome, memit, emmet or alphaedit; the last three write many facts at once.",
            show_default="the file's; else memit, or rome for one fact",
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A layer to edit, counted from 0; may be repeated for methods that edit several.",
            show_default="recommended",
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="The settings published for a model of this shape, layers included."
        ),
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the method, such as steps=40 or clamp=3; may be repeated. A threshold of alphaedit unsets its energy.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Plain text for the second moments.",
            show_default="the model's own, or what it writes",
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Second moments that `factsmith moments` wrote; the layers they are of are edited where the recommended have none.",
            show_default="those kept, or computed",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the contexts the model writes.")
    ] = 0,
    message: Annotated[
        str, typer.Option("--message", "-m", help="One line for the log.", show_default="the facts")
    ] = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write also what the model says already, and keep what does not hold."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Solve and measure, but keep nothing.")
    ] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a fact true: solve for the change, prove it, and record it in the workspace.

    Without a workspace the proof is shown and nothing is kept.

    \b
    Examples:
      factsmith patch --subject "Danielle Darrieux" --prompt "The mother tongue of {} is" --target English
      factsmith patch atlas facts.yaml --dry-run
    """
    model, file = model_and_facts(words or [])
    described = _Described(subject, prompt, target, forget, paraphrase or [], neighbour or [])
    sheet = described.sheet() if file is None else described.of_file(file)
    corpus = None if texts is None else Paragraphs([texts])
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
        from ..corpus.moments_store import load_moments
        from ..patch.attempt import attempt_patch
        from ..patch.bench import Scratch
        from ..patch.recipe import Recipe, Sources

        changes = read_settings(setting or [])
        recipe = Recipe.for_sheet(sheet, method, changes, layers=layer, paper=paper)
        given = None if moments is None else load_moments(moments)
        gates = None if file is None or sheet.gates == Gates() else sheet.gates
        if bench is None:
            sources = Sources(moments=given, texts=corpus, seed=seed)
            attempt: Attempt = attempt_patch(
                Scratch(lm), sheet.facts, recipe, sources, gates=gates, force=force, progress=tell
            )
        else:
            attempt = bench.apply(
                sheet.facts,
                recipe,
                moments=given,
                texts=corpus,
                seed=seed,
                gates=gates,
                force=force,
                message=message,
                dry_run=dry_run,
                progress=tell,
            )
    revision: Revision | None = getattr(attempt, "revision", None)
    proposal = attempt.proposal
    folder = None if bench is None else str(bench.ledger.folder.resolve())
    for warning in attempt.warnings:
        complain("warning", warning)

    def show(console: Console) -> None:
        show_tables(attempt.proof_tables())(console)
        if revision is not None:
            take_back = f"factsmith revert {revision.id[:10]}{in_workspace(workspace)}"
            line(console, f"committed {revision.id[:10]};", f"to take it back: {take_back}")
        elif proposal.delta is not None:
            line(console, *_why_not_kept(attempt, dry_run, model if bench is None else None))

    kept = {"workspace": folder, "revision": revision and revision.to_dict()}
    measured = {"gates": [gate.to_dict() for gate in attempt.gates]}
    print_result({**proposal.to_dict(), **measured, **kept}, show, as_json)
    stopped = proposal.plan.contradictions if proposal.delta is None else ()
    for contradiction in stopped:
        complain("conflict", contradiction)
    if stopped:
        complain("error", "nothing was written; revert what is there, or --force")
    for gate in attempt.gates:
        for failure in gate.failures if not gate.passed else ():
            complain("failed", f"{gate.name}: {failure}")
    broken = proposal.delta is not None and not attempt.holds
    if stopped or (broken and revision is None and not (force and not proposal.failed)):
        raise typer.Exit(NumericsError.exit_code)


def _why_not_kept(attempt: Attempt, dry_run: bool, model: str | None) -> tuple[str, str]:
    """Why a change was not kept, and what to do next."""
    if model is not None:
        return (
            "nothing was kept:",
            f"to keep patches, make a workspace with `factsmith init {model}` and run this in it",
        )
    if dry_run:
        return "dry run:", "nothing was kept; run this again without --dry-run"
    if attempt.proposal.thin:
        return (
            "nothing was kept:",
            "too little text says what must stay; give more with --texts, or keep it all the same with --force",
        )
    return (
        "nothing was kept:",
        "the patch does not hold; try another --layer, or keep it all the same with --force",
    )


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
                f"got --target {self.target} and --forget; give one: what the model should say, or that it should stop"
            )
        missing = [name for name, value in self._given.items() if value is None]
        if missing or self.subject is None or self.prompt is None:
            raise InputError(
                "a patch needs --subject, --prompt and --target (or --forget), or a file of facts; "
                f"{', '.join(missing)} not given"
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
        """The file's facts, gates, method and settings; raises InputError where options describe a fact too."""
        if any(self._given.values()) or self.paraphrases or self.neighbours:
            raise InputError(
                f"got {file} and options that describe a fact; put the fact into the file, or leave the file out"
            )
        return FactFile.sheet(file)


def _check_folder(folder: Path) -> None:
    """Raises InputError unless files can be put into a folder, which is made if need be: before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into {folder}: {error.strerror}; name a folder that can be written with --out"
        ) from None
