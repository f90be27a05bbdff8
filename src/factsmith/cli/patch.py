"""Patch: solve for a change, prove it and record it; and the second moments that it is weighed by."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..core.errors import InputError, NumericsError
from ..core.fact import Fact
from ..core.factfile import FactFile
from ..keep.revision import Revision
from .common import (
    LARGEST_SEED,
    Device,
    Json,
    Model,
    Paragraphs,
    Where,
    checks_table,
    complain,
    in_workspace,
    line,
    model_and_facts,
    need_model,
    opened,
    print_result,
    progress,
    read_settings,
)

if TYPE_CHECKING:
    from ..patch.proposal import Proposal


_MANY_CHECKS = 40
"""A patch of many facts is shown as shares and failures; one of fewer checks than this, check by check."""


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
        str,
        typer.Option(
            help="rome, r-rome, memit, emmet or alphaedit; the last three write many facts at once."
        ),
    ] = "rome",
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
    facts = _facts(file, subject, prompt, target, forget, paraphrase or [], neighbour or [])
    corpus = None if texts is None else Paragraphs([texts])
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
        from ..corpus.moments_store import load_moments
        from ..edit.settings import changed_settings
        from ..model.address import check_dense_layer
        from ..patch.proposal import propose

        for number in layer or ():
            check_dense_layer(number, lm.ffn)  # also where nothing is to be written
        given = None if moments is None else load_moments(moments)
        config = changed_settings(lm, method, layer, read_settings(setting or []), paper=paper)
        revision: Revision | None = None
        conflicts: tuple[str, ...] = ()
        if bench is None:
            proposal = propose(
                lm,
                facts,
                method,
                config,
                moments=given,
                texts=corpus,
                seed=seed,
                force=force,
                progress=tell,
            )
        elif dry_run:
            proposal = bench.propose(
                facts,
                method,
                config,
                moments=given,
                texts=corpus,
                seed=seed,
                force=force,
                progress=tell,
            )
        else:
            outcome = bench.apply(
                facts,
                method,
                config,
                moments=given,
                texts=corpus,
                seed=seed,
                force=force,
                message=message,
                progress=tell,
            )
            proposal, revision = outcome.proposal, outcome.revision
            conflicts = proposal.plan.contradictions if proposal.delta is None else ()
    where = None if bench is None else str(bench.ledger.folder.resolve())
    for warning in proposal.warnings:
        complain("warning", warning)

    def show(console: Console) -> None:
        _show_proposal(console, proposal)
        if revision is not None:
            line(
                console,
                f"committed {revision.id[:10]};",
                f"to take it back: factsmith revert {revision.id[:10]}{in_workspace(workspace)}",
            )
        elif proposal.failed and not dry_run and bench is not None:
            line(
                console,
                "nothing was kept:",
                "the patch does not hold; try another --layer, or keep it all the same with --force",
            )
        elif proposal.thin and not dry_run and bench is not None:
            line(
                console,
                "nothing was kept:",
                "too little text says what must stay; give more, or keep it all the same with --force",
            )
        elif proposal.delta is not None and bench is None:
            line(
                console,
                "nothing was kept:",
                f"to keep patches, make a workspace with `factsmith init {model}` and run this in it",
            )
        elif proposal.delta is not None:
            line(console, "dry run:", "nothing was kept; run this again without --dry-run")

    print_result(
        {**proposal.to_dict(), "workspace": where, "revision": revision and revision.to_dict()},
        show,
        as_json,
    )
    for one in conflicts:
        complain("conflict", one)
    if conflicts:
        complain("error", "nothing was written; revert what is there, or --force")
    if conflicts or (revision is None and (proposal.failed or (proposal.thin and not force))):
        raise typer.Exit(NumericsError.exit_code)


def _facts(
    file: Path | None,
    subject: str | None,
    prompt: str | None,
    target: str | None,
    forget: bool,
    paraphrases: list[str],
    neighbours: list[str],
) -> list[Fact]:
    options = {
        "--subject": subject,
        "--prompt": prompt,
        "--target": "--forget" if forget else target,
    }
    given = [name for name, value in options.items() if value is not None]
    if forget and target is not None:
        raise InputError(
            f"got --target {target} and --forget; give one: what the model should say, or that it should stop"
        )
    if file is not None:
        if given or paraphrases or neighbours:
            raise InputError(
                f"got {file} and options that describe a fact; put the fact into the file, or leave the file out"
            )
        return FactFile.read(file)
    if subject is None or prompt is None or (target is None and not forget):
        missing = ", ".join(name for name in options if name not in given)
        raise InputError(
            f"a patch needs --subject, --prompt and --target (or --forget), or a file of facts; {missing} not given"
        )
    return [
        Fact(
            subject=subject,
            prompt=prompt,
            target=target,
            paraphrases=tuple(paraphrases),
            neighbours=tuple(neighbours),
        )
    ]


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


def _show_proposal(console: Console, proposal: Proposal) -> None:
    delta, proof = proposal.delta, proposal.verification
    if delta is None or proof is None:
        return
    where = f"layer {', '.join(map(str, sorted(delta.layers)))}, rank {delta.rank}, {delta.n_bytes:,} bytes"
    times = ", ".join(
        f"{'solved' if name == 'solve' else 'verified'} in {seconds:.1f} s"
        for name, seconds in proposal.seconds.items()
    )
    line(console, delta.method, f"{where}; {times}")
    checks = proof.to_dict()["checks"]
    if len(checks) <= _MANY_CHECKS:
        console.print(checks_table(checks))
        return
    for name in ("efficacy", "chat", "generalization", "specificity", "retention"):
        share = getattr(proof, name)
        if share is not None:
            line(console, f"{name:14}", f"{100 * share:.1f} %")
    failed = [check for check in checks if not check["held"]]
    if failed:
        console.print(checks_table(failed[:_MANY_CHECKS]))
    shown = "" if len(failed) <= _MANY_CHECKS else f"(the first {_MANY_CHECKS} are shown)"
    line(console, f"{len(failed)} of {len(checks)} checks failed", shown)
