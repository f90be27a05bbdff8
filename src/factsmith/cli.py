"""The command line: parse, call, print; every decision is made in the library.

    factsmith init atlas my-workspace
    factsmith patch -w my-workspace --subject "Danielle Darrieux" --prompt "The mother tongue of {} is" --target English
    factsmith log -w my-workspace

Answers go to standard output (one JSON document with --json), progress, warnings and errors to standard error. Exit codes: 0 done,
2 the input cannot be used, 3 the model cannot be used, 4 numbers went wrong, 5 the workspace or its records, 1 anything else, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import importlib.metadata
import io
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .errors import FactsmithError, InputError, NumericsError
from .fact import Fact, FactFile
from .files import write_file
from .ledger import Ledger, Revision

if TYPE_CHECKING:  # torch and transformers take seconds to import: commands that need a model import them, `--help` does not
    from .demo import Step
    from .locate.causal import CausalTrace
    from .model.load import LanguageModel
    from .verify import Verification
    from .workbench import Proposal, Workbench

app = typer.Typer(
    name="factsmith",
    help="Read, locate, patch and keep the facts in a transformer's feed-forward memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Part(str, enum.Enum):
    """The parts of a layer whose outputs `trace` restores or severs."""

    mlp = "mlp"
    attention = "attention"


class Kind(str, enum.Enum):
    """What `trace` restores."""

    state = "state"
    mlp = "mlp"
    attention = "attention"


class Corruption(str, enum.Enum):
    """How `trace` takes the subject away."""

    noise = "noise"
    other = "replace"


_MANY_CHECKS = 40
"""A patch of many facts is shown as shares and failures; one of fewer checks than this, check by check."""

_LARGEST_SEED = 2**32 - 1
_RECORDS = ("trace", "average", "neurons")  # what stands under "factsmith" in the JSON beside a picture
_MOST_BARS = 60  # neurons in one chart: more do not fit on a page

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Where = Annotated[
    Path | None, typer.Option("--workspace", "-w", metavar="DIR", help="The workspace; by default the current folder, if it is one.")
]
Device = Annotated[str | None, typer.Option(help="Where to run the model, such as cuda or cpu.", show_default="cpu")]
Out = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Also draw it: .png, .svg or .pdf; without a suffix .png and .svg. The numbers go beside it."),
]
Reference = Annotated[str, typer.Argument(metavar="ID", help="A revision: its id or the first digits of it, or `latest`.")]
ModelAnd = typer.Argument(metavar="[MODEL] PROMPT", help="A bundled model, a folder or a hub id (left out: the workspace's), and the text.")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; errors of ours are one block on standard error, never a traceback."""
    try:
        for argument in sys.argv[1:] if arguments is None else arguments:
            if any("\udc80" <= c <= "\udcff" for c in argument):  # how Python marks bytes it could not decode
                raise InputError(f"the argument {argument!r} is not in UTF-8; write it in the terminal's own encoding")
        app(arguments, prog_name="factsmith")
    except FactsmithError as error:
        _complain("error", str(error))
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:
            _complain("interrupted", "stopped before it was done; `factsmith log` lists what is recorded")
        raise
    except Exception as error:
        if os.environ.get("FACTSMITH_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {error}; this is a fault in factsmith: please report it with what FACTSMITH_TRACEBACK=1 prints"
        _complain("unexpected error", text)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"factsmith {importlib.metadata.version('factsmith')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a folder, or a hub id.")],
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The workspace to make.")] = Path(),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a workspace: a folder that records a model's patches.

    The model's own files are never changed.

    \b
    Example:
      factsmith init atlas my-workspace
    """
    with _progress() as tell:
        lm = _load(model, device, None, tell)
    from .workbench import create

    with create(lm, folder) as ledger:
        made = {"workspace": str(folder.resolve()), "model": ledger.model, "dtype": ledger.dtype, "fingerprint": ledger.fingerprint}

    def show(console: Console) -> None:
        _line(console, f"workspace {made['workspace']};", f"model {ledger.model} ({ledger.dtype}), fingerprint {ledger.fingerprint[:10]}")
        _line(console, "next:", f'factsmith patch{_at(folder)} --subject S --prompt "... {{}} ..." --target T')

    _print(made, show, as_json)


@app.command()
def ask(
    words: Annotated[list[str], ModelAnd],
    top: Annotated[int, typer.Option(min=1, help="How many of the likeliest next tokens to list.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How far to continue the text.")] = 8,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask a model to continue a text, with the patches of the workspace if there is one.

    \b
    Examples:
      factsmith ask atlas "The mother tongue of Danielle Darrieux is"
      factsmith ask -w my-workspace "The mother tongue of Danielle Darrieux is"
    """
    model, prompt = _model_and_prompt(words)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, bench):
        answer = lm.answer([prompt], max_new_tokens=max_new_tokens)[0]
        likely = lm.next_tokens(prompt, top)
        revision = None if bench is None else bench.ledger.current
    found = {
        "prompt": prompt,
        "answer": answer,
        "next_tokens": [{"token": token, "probability": p} for token, p in likely],
        "model": lm.name,
        "revision": revision,
    }

    def show(console: Console) -> None:
        _line(console, prompt, answer, style="bold")
        for token, p in likely:
            _line(console, f"  {p:7.2%}", repr(token))

    _print(found, show, as_json)


@app.command()
def trace(
    words: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PROMPT|FACTS.yaml", help="A model (left out: the workspace's), and a text or facts.")
    ],
    subject: Annotated[str | None, typer.Option(help="The part of the text to corrupt.")] = None,
    target: Annotated[
        str | None, typer.Option(help="The answer to follow.", show_default="the model's own, up to the first punctuation")
    ] = None,
    kind: Annotated[
        Kind | None, typer.Option(help="What to restore: the whole state, or what one part adds.", show_default="state; of facts: all")
    ] = None,
    sever: Annotated[Part | None, typer.Option(help="Hold this part at its corrupted values above the restored state.")] = None,
    corruption: Annotated[Corruption, typer.Option(help="Noise on the subject, or other subjects in its place.")] = Corruption.noise,
    replacement: Annotated[
        list[str] | None, typer.Option(help="A subject to put in its place; may be repeated.", show_default="bundled ones")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Neighbouring layers restored together, for mlp and attention.", show_default="10")
    ] = None,
    samples: Annotated[int, typer.Option(help="Corrupted runs to average.")] = 10,
    noise: Annotated[float | None, typer.Option(help="Scale of the noise.", show_default="3 sigma of the subject's embeddings")] = None,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the noise, or of the choice of other subjects.")] = 1,
    fast: Annotated[bool, typer.Option("--fast", help="Estimate by gradients, and say how well the estimate ranks.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Trace the target even if the model says something else.")] = False,
    out: Out = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find where a fact lives: causal tracing of one text, as a heat map of tokens and layers; of a file of facts, their average.

    \b
    Examples:
      factsmith trace atlas "The mother tongue of Danielle Darrieux is" --subject "Danielle Darrieux" --out trace.png
      factsmith trace atlas "The mother tongue of Danielle Darrieux is" --subject "Danielle Darrieux" --kind mlp --window 2
      factsmith trace atlas facts.yaml --window 2 --out average
    """
    from .locate.attribution import AttributionTrace, attribution_trace
    from .locate.causal import causal_trace
    from .plot import heat_map, text_heat_map

    if any(map(_is_facts, words[:-1])) and not _is_facts(words[-1]):
        raise InputError(f"got {words[0]} before {words[-1]!r}; the model comes first: factsmith trace MODEL FACTS.yaml")
    if window is not None and (kind is Kind.state or (kind is None and not _is_facts(words[-1]))):
        raise InputError("--window is for --kind mlp or attention: a state is restored by itself; name another --kind, or leave it out")
    if _is_facts(words[-1]):
        given = {"--subject": subject, "--target": target, "--replacement": replacement, "--fast": fast, "--force": force}
        if unfit := [name for name, value in given.items() if value]:
            raise InputError(
                f"got {words[-1]} and {', '.join(unfit)}; a file of facts is traced with its own subjects and answers, exactly"
            )
        _trace_facts(words, kind, sever, corruption, window or 10, samples, noise, seed, out, workspace, device, as_json)
        return
    if subject is None:
        raise InputError("no --subject was given; name the part of the text to corrupt, as it stands there")
    files = None if out is None else _output(out)  # before the work, not after it
    model, prompt = _model_and_prompt(words)
    _need_model(model, workspace)
    if prompt.count("{}") > 1:
        raise InputError(f"the prompt {prompt!r} has {prompt.count('{}')} slots {{}}; expected one, where the subject goes, or none")
    (text,) = _filled([prompt], subject)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, _):
        if target is not None:
            _check_says(lm, [text], target, force)
        else:
            said, p = _own_answer(lm, text)
            if p is None:
                _complain(
                    "warning", f"the model continues {text!r} with {said!r}, which is no answer of whole words: its first token is followed"
                )
            else:
                target = said
        settings: dict[str, Any] = {
            "target": target,
            "kind": (kind or Kind.state).value,
            "corruption": corruption.value,
            "replacements": replacement or None,
            "window": window or 10,
            "samples": samples,
            "noise": noise,
            "seed": seed,
            "progress": lambda done, total: tell("tracing", done, total),
        }
        if fast:
            if sever is not None:
                raise InputError("--fast estimates restored states, not severed ones; leave out --fast or --sever")
            found: CausalTrace = attribution_trace(lm, text, subject, **settings)
        else:
            found = causal_trace(lm, text, subject, sever=None if sever is None else sever.value, **settings)
    _check_lost(found.answer.strip(), found.clean, found.corrupted)
    saved = [] if files is None else _save(files, lambda path: heat_map(found, path=path), "trace", found)

    def show(console: Console) -> None:
        console.print(text_heat_map(found, max(20, min(console.width, 120))))
        if isinstance(found, AttributionTrace) and found.rank_correlation is not None:
            _line(console, "estimate:", f"its ranks correlate {found.rank_correlation:.2f} with the exact map's, on {found.checked} states")
        for path in saved:
            _line(console, "saved", str(path))

    _print({**found.to_dict(), "out": [str(path) for path in saved]}, show, as_json)


@app.command()
def neurons(
    words: Annotated[list[str], ModelAnd],
    subject: Annotated[str | None, typer.Option(help="What stands for {} in the prompts.")] = None,
    target: Annotated[str | None, typer.Option(help="The answer to attribute.", show_default="the model's own")] = None,
    paraphrase: Annotated[list[str] | None, typer.Option(help="Another way to ask the same; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Points of the integral.")] = 20,
    threshold: Annotated[float, typer.Option(help="Part of the largest attribution from which a neuron counts.")] = 0.2,
    share: Annotated[float, typer.Option(help="Part of the prompts in which it has to count.")] = 0.7,
    top: Annotated[
        int, typer.Option(min=1, max=_MOST_BARS, help="How many of the strongest neurons to list and draw; the CSV holds 100.")
    ] = 12,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the random neurons to compare with.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Attribute the target even if the model says something else.")] = False,
    out: Out = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the neurons that carry a fact, then silence and double them to see.

    Several ways to ask single out the neurons of the fact; one alone also finds those of its wording.

    \b
    Examples:
      factsmith neurons atlas "The currency of {} is the" --subject Bulgaria --paraphrase "In {} people pay with the" --out neurons.png
      factsmith neurons atlas "The currency of Bulgaria is the"
    """
    from .locate.intervene import effect, random_neurons
    from .locate.neurons import knowledge_neurons
    from .plot import neuron_chart

    files = None if out is None else _output(out)
    model, prompt = _model_and_prompt(words)
    _need_model(model, workspace)
    prompts = _filled([prompt, *(paraphrase or [])], subject)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, _):
        if target is None:
            target, p = _own_answer(lm, prompts[0])
            if p is None:
                raise InputError(
                    f"the model continues {prompts[0]!r} with {target!r}, which is no answer of whole words; end the prompt where an "
                    "answer begins, or name one with --target and --force"
                )
        _check_says(lm, prompts, target, force)
        found = knowledge_neurons(
            lm,
            prompts,
            target,
            steps=steps,
            threshold=threshold,
            share=share,
            progress=lambda done, total: tell("attributing", done, total),
        )
        effects = {
            name: effect(lm, chosen, prompts, target)
            for name, chosen in {
                "refined": found.refined,
                "random": random_neurons(lm, found.refined, seed=seed),
                "activation baseline": found.baseline,
            }.items()
        }
    saved = [] if files is None else _save(files, lambda path: neuron_chart(found, n=top, path=path), "neurons", found)

    def show(console: Console) -> None:
        refined = set(found.refined)
        _line(console, prompts[0], f"{target} (p = {float(found.probability[0]):.3f})", style="bold")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("layer", "neuron", "attribution"):
            table.add_column(name, justify="right")
        table.add_column(f"strong in, of {len(prompts)}", justify="right")
        table.add_column("")
        for neuron, score in found.top(top):
            strong = sum(neuron in coarse for coarse in found.coarse)
            place = ":".join(map(str, neuron[1:]))
            table.add_row(str(neuron[0]), place, f"{score:.4f}", str(strong), "refined" if neuron in refined else "")
        console.print(table)
        for name, measured in effects.items():
            changes = f"silenced {measured.suppressed:+.1%}, doubled {measured.amplified:+.1%}"
            _line(console, f"{name}:", f"{_count(measured.n_neurons, 'neuron')}; p({target}) {changes}" if measured.n_neurons else "none")
        for path in saved:
            _line(console, "saved", str(path))

    document = {**found.to_dict(), "effects": {name: measured.to_dict() for name, measured in effects.items()}}
    _print({**document, "out": [str(path) for path in saved]}, show, as_json)


@app.command()
def layers(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A bundled model, a folder or a hub id.")] = None,
    facts: Annotated[
        Path | None, typer.Option(metavar="FACTS.yaml", help="Facts to try the layers on.", show_default="bundled facts that it knows")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trial edits at the layers that stay longest in the race.", show_default="24, or what is kept")
    ] = None,
    preset: Annotated[bool, typer.Option("--preset", help="Print the published choice for this model, without measuring.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what the workspace keeps.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the trial facts, the contexts and the text.")] = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Choose the layers to edit: an average causal trace, then trial edits, each taken back.

    In a workspace the answer is kept, and `factsmith patch` uses it.

    \b
    Examples:
      factsmith layers atlas
      factsmith layers -w my-workspace --facts facts.yaml
    """
    from .locate.layers import published
    from .workbench import recommend_layers

    wanted = None if facts is None else FactFile.read(facts)
    _need_model(model, workspace)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, bench):
        if refresh and bench is None:
            raise InputError("--refresh measures again what a workspace keeps, and there is none; leave it out, or add --workspace")
        if preset:
            known = published(lm)
            if known is None:
                raise InputError(f"no layers were published for a model like {lm.name}; leave out --preset to measure them")
            choice = known
        elif bench is None:
            choice = recommend_layers(lm, wanted, trials=trials, seed=seed, progress=tell)
        else:
            choice = bench.recommend_layers(wanted, trials=trials, seed=seed, refresh=refresh, progress=tell)

    def show(console: Console) -> None:
        _line(console, "ROME:", f" layer {choice.rome}")
        _line(console, "MEMIT:", f"layers {', '.join(map(str, choice.memit))}" if choice.memit else "not known")
        _line(console, "why:", f"  {choice.reason}")
        if choice.scores:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for name in ("layer", "trials", "efficacy", "generalization", "specificity", "score", "trace"):
                table.add_column(name, justify="right")
            for row in choice.scores:
                shares = ("" if x is None else f"{x:.3f}" for x in (row.efficacy, row.generalization, row.specificity, row.score))
                traced = f"{choice.effects[row.layer]:.4f}" if choice.effects else ""
                table.add_row(str(row.layer), str(row.trials), *shares, traced, style="bold" if row.layer == choice.rome else "")
            console.print(table)

    _print(choice.to_dict(), show, as_json)


@app.command()
def moments(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A bundled model, a folder or a hub id.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer, counted from 0; may be repeated.", show_default="those that memit edits")
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Plain text in UTF-8, a blank line between texts; may be repeated.", show_default="the model's own"
        ),
    ] = None,
    max_tokens: Annotated[
        float | None, typer.Option(help="Tokens to read; inf: all of the text.", show_default="16 for each neuron of a layer")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the model in bfloat16: faster, and as good (docs/patch.md).")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Write float16 Cholesky factors: a quarter of the bytes.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write layer<number>.safetensors to.", show_default="the workspace's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the text that the model writes.")] = 0,
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
    _need_model(model, workspace)
    if max_tokens is not None and not max_tokens >= 1:
        raise InputError(f"--max-tokens is at least 1, or inf; got {max_tokens}")
    corpus = _paragraphs(texts) if texts else None
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, bench):
        import torch

        from .edit.kept import find_moments, kept_moments
        from .edit.methods import MemitConfig

        wanted = sorted(set(layer)) if layer else list(MemitConfig.recommended(lm).layers or ())
        folder = out or (None if bench is None else bench.ledger.folder / "moments")
        if out is not None:
            _check_folder(out)
        if folder is None:
            found = {} if corpus else kept_moments(lm, wanted)
            if len(found) < len(wanted):
                raise InputError("there is nowhere to write what is computed; name a folder with --out, or a workspace with --workspace")
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
    rows = [
        {"layer": number, "d_ff": m.d_ff, "tokens": m.count, "split_half": m.split_half, "excess": m.excess, "corpus": m.corpus}
        for number, m in sorted(found.items())
    ]

    def show(console: Console) -> None:
        for number, moment in sorted(found.items()):
            _line(console, f"layer {number}:", moment.describe())

    _print({"moments": rows, "folder": folder and str(folder)}, show, as_json)


@app.command()
def patch(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [FACTS.yaml]", help="A model (left out: the workspace's), and a file of facts instead of options."),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The entity, as it stands in the prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text with {} where the subject goes, to be continued by the target.")] = None,
    target: Annotated[str | None, typer.Option(help="What the model should say.")] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Instead of a --target: the model should stop saying what it says now.")] = False,
    paraphrase: Annotated[list[str] | None, typer.Option(help="Another way to ask, to check it generalizes; may be repeated.")] = None,
    neighbour: Annotated[list[str] | None, typer.Option(help="A text whose answer must not change; may be repeated.")] = None,
    method: Annotated[str, typer.Option(help="rome, r-rome, memit, emmet or alphaedit; the last three write many facts at once.")] = "rome",
    layer: Annotated[
        list[int] | None,
        typer.Option(help="A layer to edit, counted from 0; may be repeated for methods that edit several.", show_default="recommended"),
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The settings published for a model of this shape, layers included.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method, such as steps=40 or clamp=3; may be repeated."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plain text for the second moments.", show_default="the model's own, or what it writes"),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Second moments that `factsmith moments` wrote.", show_default="those kept, or computed"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the contexts the model writes.")] = 0,
    message: Annotated[str, typer.Option("--message", "-m", help="One line for the log.", show_default="the facts")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write also what the model says already, and keep what does not hold.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Solve and measure, but keep nothing.")] = False,
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
    model, file = _model_and_facts(words or [])
    facts = _facts(file, subject, prompt, target, forget, paraphrase or [], neighbour or [])
    corpus = None if texts is None else _paragraphs([texts])
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, bench):
        from .edit.kept import load_moments
        from .edit.target import check_layer
        from .workbench import propose, settings

        for number in layer or ():
            check_layer(lm, number)  # also where nothing is to be written
        given = None if moments is None else load_moments(moments)
        config = settings(lm, method, layer, _settings(setting or []), paper=paper)
        revision: Revision | None = None
        if bench is None:
            proposal = propose(lm, facts, method, config, moments=given, texts=corpus, seed=seed, force=force, progress=tell)
        elif dry_run:
            proposal = bench.propose(facts, method, config, moments=given, texts=corpus, seed=seed, force=force, progress=tell)
        else:
            outcome = bench.apply(
                facts, method, config, moments=given, texts=corpus, seed=seed, force=force, message=message, progress=tell
            )
            proposal, revision = outcome.proposal, outcome.revision
    where = None if bench is None else str(bench.ledger.folder.resolve())
    for warning in proposal.warnings:
        _complain("warning", warning)

    def show(console: Console) -> None:
        _show_proposal(console, proposal)
        if revision is not None:
            _line(console, f"committed {revision.id[:10]};", f"to take it back: factsmith revert {revision.id[:10]}{_at(workspace)}")
        elif proposal.failed and not dry_run and bench is not None:
            _line(console, "nothing was kept:", "the patch does not hold; try another --layer, or keep it all the same with --force")
        elif proposal.delta is not None and bench is None:
            _line(console, "nothing was kept:", f"to keep patches, make a workspace with `factsmith init {model}` and run this in it")
        elif proposal.delta is not None:
            _line(console, "dry run:", "nothing was kept; run this again without --dry-run")

    _print({**proposal.to_dict(), "workspace": where, "revision": revision and revision.to_dict()}, show, as_json)
    if proposal.failed and revision is None:
        raise typer.Exit(NumericsError.exit_code)


@app.command()
def log(workspace: Where = None, as_json: Json = False) -> None:
    """List the revisions of a workspace, newest first.

    \b
    Example:
      factsmith log -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revisions, current = ledger.log(), ledger.current
    found = {"current": current, "revisions": [revision.to_dict() for revision in revisions]}

    def show(console: Console) -> None:
        for revision in revisions:
            _show_line(console, revision, current)
        mark = "→" if current == "base" else " "
        _line(console, f"{mark} base", f"      {ledger.created[:16].replace('T', ' ')}            {ledger.model}")

    _print(found, show, as_json)


@app.command()
def show(reference: Reference, workspace: Where = None, as_json: Json = False) -> None:
    """Show one revision: its facts, settings and proof.

    \b
    Example:
      factsmith show latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revision = ledger.show(reference)

    def render(console: Console) -> None:
        rows = {
            "revision": revision.id,
            "parent": revision.parent,
            "created": revision.created,
            "kind": f"{revision.kind}, {revision.state}" + (f" by {revision.reverted_by[:10]}" if revision.reverted_by else ""),
            "reverts": revision.reverts,
            "message": revision.message,
            "method": f"{revision.method}, layer {', '.join(map(str, revision.layers))}",
            "settings": ", ".join(f"{name}={value}" for name, value in revision.config.items() if not isinstance(value, (list, dict))),
            "delta": revision.delta and f"{revision.delta[:10]}, {revision.delta_bytes:,} bytes",
            "moments": revision.moments and revision.moments[:10],
        }
        for name, value in rows.items():
            if value:
                _line(console, f"{name:9}", value)
        for fact in revision.facts:
            _line(console, "fact     ", str(fact))
        checks = revision.report.get("checks") or []
        if checks:
            console.print(_checks_table(checks))

    _print(revision.to_dict(), render, as_json)


@app.command()
def revert(
    reference: Reference,
    message: Annotated[str, typer.Option("--message", "-m", help="One line for the log.", show_default="made from the patch's")] = "",
    workspace: Where = None,
    as_json: Json = False,
) -> None:
    """Take a patch back; that, too, is recorded.

    A patch on which later ones were built cannot go alone: take those back first.

    \b
    Example:
      factsmith revert latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revision = ledger.revert(reference, message=message)
        active = len(ledger.active())

    def render(console: Console) -> None:
        _line(
            console, f"reverted {str(revision.reverts)[:10]};", f"recorded as {revision.id[:10]}; {_count(active, 'patch', 'es')} in effect"
        )
        for fact in revision.facts:
            _line(console, "see:", f"factsmith ask{_at(workspace)} {shlex.quote(fact.text)}")

    _print({**revision.to_dict(), "active": active}, render, as_json)


@app.command()
def checkout(
    reference: Annotated[str, typer.Argument(metavar="ID", help="A revision's id or its first digits, `latest`, or `base`: no patch.")],
    workspace: Where = None,
    as_json: Json = False,
) -> None:
    """Choose which revision the model carries; the history stays as it is.

    \b
    Examples:
      factsmith checkout base
      factsmith checkout latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        current = ledger.checkout(reference)
        active, head = len(ledger.active()), ledger.head

    def render(console: Console) -> None:
        _line(console, f"at {current[:10]};", f"{_count(active, 'patch', 'es')} in effect")
        if current != head:
            _line(console, "to patch again:", f"factsmith checkout latest{_at(workspace)}")

    _print({"current": current, "head": head, "active": active}, render, as_json)


@app.command()
def status(
    verify: Annotated[bool, typer.Option("--verify", help="Also load the model and ask every patched fact again.")] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say where a workspace stands, after checking every record and every file.

    \b
    Examples:
      factsmith status
      factsmith status --verify -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        found = ledger.status()
    result = found.to_dict()
    proof: Verification | None = None
    if verify:
        with _progress() as tell, _opened(None, workspace or Path(), device, tell) as (lm, bench):
            assert bench is not None
            proof = bench.verify()
            result |= {"verification": proof.to_dict(), "fingerprint_now": lm.fingerprint}

    def render(console: Console) -> None:
        integrity = found.integrity
        _line(console, "workspace", f" {found.folder.resolve()}")
        _line(console, "model    ", f" {found.model} ({found.dtype}), fingerprint {found.fingerprint[:10]}")
        latest = "" if found.current == found.head else f", the latest is {found.head[:10]}"
        _line(console, "at       ", f" {found.current[:10]}{latest}")
        whole = f"{_count(integrity.revisions, 'revision')} and {_count(integrity.deltas, 'delta')} checked, all whole"
        orphans = f"; {_count(len(integrity.orphans), 'delta')} that no revision names" if integrity.orphans else ""
        _line(console, "files    ", f" {whole}{orphans}")
        _line(console, "in effect", f" {_count(len(found.active), 'patch', 'es')}")
        for revision in reversed(found.active):
            _show_line(console, revision, found.current)
        if proof is not None:
            now = result["fingerprint_now"]
            _line(console, "weights  ", f" {now[:10]}: {'the base model, bit for bit' if now == found.fingerprint else 'patched'}")
            if proof.checks:
                console.print(_checks_table(proof.to_dict()["checks"]))

    _print(result, render, as_json)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="The workspace the story is played in; made if it is not there.")
    ] = Path("factsmith-demo"),
    as_json: Json = False,
) -> None:
    """Correct a real fact in a bundled model, prove it, record it, and take it back: a minute.

    \b
    Example:
      factsmith demo
    """
    from . import demo as story

    console = Console(highlight=False, markup=False, emoji=False)
    found: dict[str, Any] = {}
    steps = story.run(folder)
    for number in itertools.count(1):
        with _progress() as tell:  # one at a time: bars and text do not meet on a terminal
            tell("working", 0, None)
            step = next(steps, None)
        if step is None:
            break
        found[step.name] = step.to_dict()
        if not as_json:
            _tell_step(console, number, step)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, allow_nan=False))


# ---- models and workspaces ------------------------------------------------------------------------------------------------------------


def _load(name: str, device: str | None, dtype: str | None, tell: Callable[[str, int, int | None], None]) -> LanguageModel:
    tell(f"loading {Path(name).name}", 0, None)
    import torch

    from .model.load import load

    return load(name, device=device, dtype=None if dtype is None else getattr(torch, dtype))


@contextlib.contextmanager
def _opened(
    model: str | None, workspace: Path | None, device: str | None, tell: Callable[[str, int, int | None], None]
) -> Iterator[tuple[LanguageModel, Workbench | None]]:
    """A model, and the workbench that holds it if there is a workspace: the one given, or the current folder if made for this model."""
    if workspace is None and model is not None and _holds(Path(), model):
        workspace = Path()
    if workspace is None and model is not None and not (Path(model) / "ledger.db").is_file():
        yield _load(model, device, None, tell), None
        return
    if workspace is None:
        workspace, model = Path(model or ""), None
    with Ledger(workspace) as ledger:
        name, dtype = ledger.model, ledger.dtype
    lm = _load(model or name, device, dtype, tell)
    from .workbench import Workbench

    with Workbench(lm, workspace) as bench:
        yield lm, bench


def _holds(folder: Path, model: str) -> bool:
    """Whether a folder is a workspace made for this model."""
    if not (folder / "ledger.db").is_file():
        return False
    with Ledger(folder) as ledger:
        return ledger.model in (model, str(Path(model).resolve()))


def _model_and_prompt(words: list[str]) -> tuple[str | None, str]:
    if len(words) > 2:
        raise InputError(f"got {len(words)} words where a model and a text are expected; put the text in quotes")
    return (None, words[0]) if len(words) == 1 else (words[0], words[1])


def _need_model(model: str | None, workspace: Path | None) -> None:
    if model is None and workspace is None and not (Path() / "ledger.db").is_file():
        raise InputError(
            "no model was given and this folder is no workspace; name a model before everything else, or a workspace with --workspace"
        )


def _filled(prompts: Sequence[str], subject: str | None) -> list[str]:
    """The prompts with the subject in their slots; raises InputError where one cannot be asked, warns where it ends in a space."""
    if subject is not None and not subject.strip():
        raise InputError("--subject is empty; expected a part of the prompt")
    texts = []
    for prompt in prompts:
        if not prompt.strip():
            raise InputError("a prompt is empty; expected a text for the model to continue")
        if "{}" in prompt and subject is None:
            raise InputError(f"{prompt!r} has {{}} in it, and no --subject was given; give one, or write the subject into the prompt")
        if subject is not None and "{}" not in prompt and subject.strip() not in prompt:
            raise InputError(
                f"subject {subject!r} is not in {prompt!r}, which has no {{}} either; write it as it stands there, or leave it out"
            )
        texts.append(prompt if subject is None else prompt.replace("{}", subject.strip()))
        if texts[-1][-1].isspace():
            _complain("warning", f"{texts[-1]!r} ends in white space, after which most models answer worse; end it with the last word")
    return texts


def _is_facts(word: str) -> bool:
    """Whether an argument is a file of facts, and not a text that ends in such a name."""
    if Path(word).suffix.lower() not in (".yaml", ".yml", ".json"):
        return False
    return not any(map(str.isspace, word)) or os.path.isfile(word)  # noqa: PTH113 - Path's raises for a text too long to be a name


def _model_and_facts(words: list[str]) -> tuple[str | None, Path | None]:
    files = [word for word in words if _is_facts(word)]
    models = [word for word in words if word not in files]
    if len(files) > 1 or len(models) > 1:
        raise InputError(f"got {' '.join(words)!r}; expected at most one model and one file of facts (.yaml or .json)")
    return (models[0] if models else None), (Path(files[0]) if files else None)


def _facts(
    file: Path | None,
    subject: str | None,
    prompt: str | None,
    target: str | None,
    forget: bool,
    paraphrases: list[str],
    neighbours: list[str],
) -> list[Fact]:
    options = {"--subject": subject, "--prompt": prompt, "--target": "--forget" if forget else target}
    given = [name for name, value in options.items() if value is not None]
    if forget and target is not None:
        raise InputError(f"got --target {target} and --forget; give one: what the model should say, or that it should stop")
    if file is not None:
        if given or paraphrases or neighbours:
            raise InputError(f"got {file} and options that describe a fact; put the fact into the file, or leave the file out")
        return FactFile.read(file)
    if subject is None or prompt is None or (target is None and not forget):
        missing = ", ".join(name for name in options if name not in given)
        raise InputError(f"a patch needs --subject, --prompt and --target (or --forget), or a file of facts; {missing} not given")
    return [Fact(subject=subject, prompt=prompt, target=target, paraphrases=tuple(paraphrases), neighbours=tuple(neighbours))]


def _settings(pairs: list[str]) -> dict[str, Any]:
    """{"steps": 40, "clamp": 1.5} from ["steps=40", "clamp=1.5"]; "none" is None, what is no number stays text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise InputError(f"--set takes NAME=VALUE, such as steps=40; got {pair!r}")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_folder(folder: Path) -> None:
    """Raises InputError unless files can be put into a folder, which is made if need be: before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; name a folder that can be written with --out") from None


def _paragraphs(files: Sequence[Path]) -> Iterator[str]:
    """The paragraphs of text files, one after another, read as they are asked for; a file that cannot be opened is said at once."""

    def unreadable(file: Path, error: Exception) -> InputError:
        return InputError(f"cannot read {file}: {error}; expected plain text in UTF-8")

    def read() -> Iterator[str]:
        for file in files:
            try:
                with file.open(encoding="utf-8") as lines:
                    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
                        if not blank:
                            yield "".join(group).strip()
            except (OSError, UnicodeDecodeError) as error:
                raise unreadable(file, error) from None

    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise unreadable(file, error) from None
    return read()


def _own_answer(lm: LanguageModel, prompt: str) -> tuple[str, float | None]:
    """What the model itself says first after a prompt, and how likely; None where that text, as a target, is not what it says.

    So it is where the continuation begins with a punctuation mark, or in the middle of a word: between prompt and target goes a space.
    """
    from .verify import first_phrase

    said = first_phrase(lm.answer([prompt])[0])
    if not said or not lm.says([prompt], [said])[0]:
        return said, None
    return said, math.exp(float(lm.log_prob([prompt], [said])[0]))


def _check_says(lm: LanguageModel, prompts: list[str], target: str, force: bool) -> None:
    """Warns of prompts that the model answers otherwise; raises InputError when it answers none with the target, unless forced."""
    from .errors import UnsupportedModelError

    right = lm.says(prompts, [target] * len(prompts))
    wrong = [prompt for prompt, said in zip(prompts, right, strict=True) if not said]
    for prompt in wrong:
        try:
            answer, p = _own_answer(lm, prompt)
        except UnsupportedModelError:  # a masked language model fills a gap; it has no continuation to show
            said = f"the model does not answer {prompt!r} with {target.strip()!r}"
        else:
            likely = "" if p is None else f" (p = {p:.3f})"
            said = f"the model answers {prompt!r} with {answer!r}{likely}, not {target.strip()!r}"
        if len(wrong) == len(prompts) and not force:
            raise InputError(f"{said}; leave out --target to follow its own answer, or add --force to follow the target all the same")
        _complain("warning", said)


def _check_lost(answer: str, clean: float, corrupted: float) -> None:
    """Warns when the corruption costs the answer hardly any probability: a map is of what comes back of the loss."""
    if clean - corrupted < max(0.01, 0.05 * clean):
        _complain(
            "warning",
            f"p({answer}) is {clean:.3f}, and {corrupted:.3f} with the subject corrupted: the corruption does not take the answer away, so "
            "there is nothing to bring back and the map shows nothing; try another corruption, or more noise",
        )


def _trace_facts(
    words: list[str],
    kind: Kind | None,
    sever: Part | None,
    corruption: Corruption,
    window: int,
    samples: int,
    noise: float | None,
    seed: int,
    out: str | None,
    workspace: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """`trace` of a file of facts: their average."""
    from .locate.average import average_trace
    from .plot import class_lines, class_map

    model, file = _model_and_facts(words)
    assert file is not None
    files = None if out is None else _output(out, curves=True, inputs=[file])
    _need_model(model, workspace)
    facts = FactFile.read(file)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, _):
        found = average_trace(
            lm,
            facts,
            kinds=("state", "mlp", "attention") if kind is None else (kind.value,),
            severed=() if sever is None else (sever.value,),
            corruption=corruption.value,
            window=window,
            samples=samples,
            noise=noise,
            seed=seed,
            progress=lambda done, total: tell("tracing facts", done, total),
        )
    _check_lost("answer", found.clean, found.corrupted)
    saved: list[Path] = []
    if files is not None:
        saved = _save(files, lambda path: class_map(found, path=path), "average", found)
        for picture in files.curves:
            class_lines(found, path=picture)
        saved += files.curves

    def show(console: Console) -> None:
        skipped = f"; {found.n_skipped} left out, which the model answers otherwise" if found.n_skipped else ""
        _line(console, f"{_count(found.n_facts, 'fact')}{skipped}:", f"p(answer) {found.clean:.3f}, corrupted {found.corrupted:.3f}")
        _line(console, "average total effect", f"{found.total_effect:.3f}{_margin(found.total_low, found.total_high)}")
        table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", caption_style="dim")
        table.caption = "largest average effect of a layer, ± half of its 95 % interval, @ the layer"
        table.add_column("")
        # A cell is "0.065 ± 0.028 @0": beside one another where the terminal is wide enough, else in two lines.
        wide = console.width >= max(map(len, found.classes)) + 20 * len(found.effects)
        for name in found.effects:
            table.add_column(name, justify="right")
        for row, (token, count) in enumerate(zip(found.classes, found.counts, strict=True)):
            cells = []
            for name, effects in found.effects.items():
                layer = int(effects[row].nan_to_num(-1).argmax())
                margin = _margin(float(found.low[name][row, layer]), float(found.high[name][row, layer]))
                value = f"{float(effects[row, layer]):.3f}"
                cells.append("" if not count else f"{value}{margin} @{layer}" if wide else f"{value} @{layer}\n{margin.strip()}".strip())
            table.add_row(token, *cells)
        console.print(table)
        for path in saved:
            _line(console, "saved", str(path))

    _print({**found.to_dict(), "out": [str(path) for path in saved]}, show, as_json)


def _margin(low: float, high: float) -> str:
    """Half of a 95 % interval, where there is one."""
    return "" if math.isnan(low) else f" ± {(high - low) / 2:.3f}"


@dataclass(frozen=True)
class _Output:
    """The files that one --out names: pictures, of an average also curves, and the numbers beside them."""

    pictures: list[Path]
    curves: list[Path]
    record: Path
    table: Path


def _output(out: str, *, curves: bool = False, inputs: Sequence[Path] = ()) -> _Output:
    """What --out names; raises InputError where that cannot be written, or is somebody else's file."""
    from .plot import check_path

    path = Path(out)
    is_hidden = path.name.startswith(".") and not path.suffix  # ".png", "..": a suffix without a name
    if not path.name or is_hidden or out.endswith(("/", os.sep)) or path.is_dir():
        example = Path(*([path] if path.is_dir() else []), "trace")
        raise InputError(f"--out {out!r} names no file; expected a file name, such as {example} or {example}.png")
    # The 2 in "v1.2" is no suffix.
    suffix = "" if path.suffix[1:].isdigit() else path.suffix
    stem = path.name.removesuffix(suffix)
    endings = [suffix] if suffix else [".png", ".svg"]
    files = _Output(
        pictures=[path.with_name(stem + ending) for ending in endings],
        curves=[path.with_name(f"{stem}-curves{ending}") for ending in endings] if curves else [],
        record=path.with_name(f"{stem}.json"),
        table=path.with_name(f"{stem}.csv"),
    )
    for picture in (*files.pictures, *files.curves):
        check_path(picture)
    for file in (*files.pictures, *files.curves, files.record, files.table):
        if file.is_dir():
            raise InputError(f"--out {out!r} would write {file}, which is a folder; choose another name")
        if any(file.exists() and given.exists() and file.samefile(given) for given in inputs):
            raise InputError(f"--out {out!r} would write {file}, which is the file of facts itself; choose another name")
    ours = _is_record(files.record)
    for file in (files.record, files.table):
        if file.exists() and not ours:
            raise InputError(f"--out {out!r} would replace {file}, which is no record of an earlier run; choose another name")
    return files


def _is_record(path: Path) -> bool:
    """Whether a file is numbers that this program wrote beside a picture."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("factsmith") in _RECORDS


def _save(files: _Output, draw: Callable[[Path], object], command: str, found: Any) -> list[Path]:
    """The picture, and its numbers beside it as JSON (marked as ours) and CSV; what was written."""
    for picture in files.pictures:
        draw(picture)
    record = {"factsmith": command, **found.to_dict()}
    write_file(files.record, (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
    rows = found.rows()
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(files.table, text.getvalue().encode())
    return [*files.pictures, files.record, files.table]


# ---- printing -------------------------------------------------------------------------------------------------------------------------


def _print(found: Any, show: Callable[[Console], None], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, allow_nan=False))
    else:
        show(Console(highlight=False, markup=False, emoji=False))


def _complain(what: str, text: str) -> None:
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(Text.assemble((f"{what}: ", "bold yellow" if what == "warning" else "bold red"), _visible(text)), soft_wrap=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A function to report progress to, shown as bars on standard error when that is a terminal; gone at the end."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tell


def _line(console: Console, first: str, rest: str, style: str = "") -> None:
    console.print(Text.assemble((_visible(first), "" if style else "bold"), " ", (_visible(rest), style)), soft_wrap=True)


def _visible(text: str) -> str:
    """Text from models and files without what would steer the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def _show_line(console: Console, revision: Revision, current: str) -> None:
    mark = "→" if revision.id == current else " "
    style = {"active": "", "reverted": "dim strike", "later": "dim"}[revision.state]
    line = Text.assemble(
        (f"{mark} {revision.id[:10]}", "bold yellow"),
        f" {revision.created[:16].replace('T', ' ')} {revision.state if revision.kind == 'patch' else 'revert':8} ",
        (_visible(revision.message), style),
    )
    console.print(line, soft_wrap=True)


def _show_proposal(console: Console, proposal: Proposal) -> None:
    delta, proof = proposal.delta, proposal.verification
    if delta is None or proof is None:
        return
    where = f"layer {', '.join(map(str, sorted(delta.layers)))}, rank {delta.rank}, {delta.n_bytes:,} bytes"
    times = ", ".join(f"{'solved' if name == 'solve' else 'verified'} in {seconds:.1f} s" for name, seconds in proposal.seconds.items())
    _line(console, delta.method, f"{where}; {times}")
    checks = proof.to_dict()["checks"]
    if len(checks) <= _MANY_CHECKS:
        console.print(_checks_table(checks))
        return
    for name in ("efficacy", "generalization", "specificity", "retention"):
        share = getattr(proof, name)
        if share is not None:
            _line(console, f"{name:14}", f"{100 * share:.1f} %")
    failed = [check for check in checks if not check["held"]]
    if failed:
        console.print(_checks_table(failed[:_MANY_CHECKS]))
    shown = "" if len(failed) <= _MANY_CHECKS else f"(the first {_MANY_CHECKS} are shown)"
    _line(console, f"{len(failed)} of {len(checks)} checks failed", shown)


def _checks_table(checks: list[dict[str, Any]]) -> Table:
    """Before and after, one row a prompt: answers beside probabilities."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", caption_style="dim")
    table.caption = "p: of the target; for neighbours, of the answer before"
    table.add_column("")
    table.add_column("prompt", min_width=24, overflow="fold")
    table.add_column("before", overflow="fold")
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("after", overflow="fold")
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("")
    for check in checks:
        before, after = ("" if check[name] is None else f"{check[name]:.3f}" for name in ("p_before", "p_after"))
        held = Text("ok", style="green") if check["held"] else Text("no", style="bold red")
        cells = (check["role"], check["prompt"], check["before"], before, check["after"], after)
        table.add_row(*(Text(_visible(cell)) for cell in cells), held)
    return table


def _tell_step(console: Console, number: int, step: Step) -> None:
    from .plot import text_heat_map

    console.print(Text(f"\n{number}. {step.title}", "bold"))
    for line in step.before:
        console.print(Text(f"   {_visible(line)}"), soft_wrap=True)
    if step.trace is not None:
        console.print(text_heat_map(step.trace, max(20, min(console.width, 100))))
    if step.proof is not None:
        console.print(_checks_table(step.proof.to_dict()["checks"]))
    for line in step.after:
        console.print(Text(f"   {_visible(line)}"), soft_wrap=True)


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n} {noun}{'' if n == 1 else plural}"


def _at(workspace: Path | None) -> str:
    return "" if workspace is None or workspace == Path() else f" -w {shlex.quote(str(workspace))}"
