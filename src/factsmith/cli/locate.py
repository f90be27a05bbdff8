"""Locate facts: by causal tracing, by neurons, and by trial edits of layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.checks import check_number
from ..core.errors import InputError
from ..core.factfile import FactFile
from ..core.slots import escape
from ..locate.kinds import CorruptionKind, Part, TraceKind, uses_window
from . import completing
from .engine import engine, on_workers
from .models import need_model, opened, workspace_of
from .options import (
    LARGEST_SEED,
    Device,
    Json,
    Model,
    ModelAndPrompt,
    Out,
    Where,
    is_facts,
    model_and_facts,
    model_and_prompt,
    need_text,
)
from .pictures import output, save
from .printing import complain, plain_console, print_result
from .waiting import during, progress

_MOST_BARS = 60
"""Neurons in one chart. More do not fit on a page."""

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] PROMPT|FACTS.yaml",
        autocompletion=completing.models,
        help="A model (left out: the workspace's), and a text or facts.",
    ),
]

Kind = Annotated[
    TraceKind | None,
    typer.Option(
        metavar="KIND",
        help="What to restore: the whole `state`, or what `mlp` or `attention` adds.",
        show_default="state; of facts: all",
    ),
]

Sever = Annotated[
    Part | None,
    typer.Option(
        metavar="PART",
        help="Hold this part at its corrupted values above the restored state: mlp or attention.",
    ),
]

Occurrence = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Which occurrence of the subject, counted from 1.",
        show_default="the only one",
    ),
]

Replacement = Annotated[
    list[str] | None,
    typer.Option(
        help="A subject to put in its place; may be repeated.", show_default="bundled ones"
    ),
]

Window = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Neighbouring layers restored together, for mlp and attention.",
        show_default="10",
    ),
]

Noise = Annotated[
    float | None,
    typer.Option(help="Scale of the noise.", show_default="3 sigma of the subject's embeddings"),
]

NoiseSeed = Annotated[
    int,
    typer.Option(min=0, max=LARGEST_SEED, help="Of the noise, or of the choice of other subjects."),
]

_LEAST_WIDTH, _MOST_WIDTH = 20, 120
"""Columns of a terminal between which a heat map is as wide as the terminal."""

_TEXT_KIND: TraceKind = "state"
_OWN_TARGET = "the model's own, up to the first punctuation"
_FORCE_HELP = "Follow the target even if the model says something else."


@dataclass(frozen=True)
class _Place:
    """Where a command runs, and where its result goes."""

    out: str | None
    workspace: Path | None
    device: str | None
    as_json: bool


def trace(  # house: Typer reads one parameter for each option
    words: Words,
    subject: Annotated[
        str | None, typer.Option(help="The part of the text to corrupt, or what goes into its {}.")
    ] = None,
    occurrence: Occurrence = None,
    target: Annotated[
        str | None, typer.Option(help="The answer to follow.", show_default=_OWN_TARGET)
    ] = None,
    kind: Kind = None,
    sever: Sever = None,
    corruption: Annotated[
        CorruptionKind,
        typer.Option(
            metavar="KIND",
            help="`noise` on the subject, or `replace`: other subjects in its place.",
        ),
    ] = "noise",
    replacement: Replacement = None,
    window: Window = None,
    samples: Annotated[int, typer.Option(min=1, help="Corrupted runs to average.")] = 10,
    noise: Noise = None,
    seed: NoiseSeed = 1,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Estimate by gradients, and say how well the estimate ranks."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help=_FORCE_HELP)] = False,
    out: Out = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find where a fact lives, by causal tracing.

    Of one text there is a heat map; of a file of facts, the average.

    \b
    Examples:
      factsmith trace atlas "The currency of Bulgaria is the" \\
          --subject Bulgaria --out trace.png
      factsmith trace atlas "The currency of Bulgaria is the" \\
          --subject Bulgaria --kind mlp
      factsmith trace atlas "The maker of {} is" --subject "Fiat 127"
      factsmith trace atlas facts.yaml --window 2 --out average
    """
    place = _Place(out, workspace, device, as_json)
    need_text(target, "--target")
    _check_corruption(corruption, noise, replacement)
    settings: dict[str, Any] = {
        "corruption": corruption,
        "samples": samples,
        "noise": noise,
        "seed": seed,
    }
    settings |= {} if window is None else {"window": window}
    if is_facts(words[-1]):
        of_a_text = {
            "--subject": subject,
            "--occurrence": occurrence,
            "--target": target,
            "--replacement": replacement,
            "--fast": fast,
            "--force": force,
        }
        _refuse_options(words[-1], (name for name, value in of_a_text.items() if value))
        _refuse_window(window, kind)
        kinds = {} if kind is None else {"kinds": (kind,)}
        severed = {} if sever is None else {"severed": (sever,)}
        _trace_facts(words, {**settings, **kinds, **severed}, place)
        return
    if any(map(is_facts, words[:-1])):
        raise InputError(
            f"got {words[0]} before {words[-1]!r}. Name the model first: "
            "factsmith trace MODEL FACTS.yaml"
        )
    if subject is None:
        raise InputError(
            "no --subject was given. Name the part of the text to corrupt, or what goes into "
            "the {} of the prompt."
        )
    _refuse_window(window, kind or _TEXT_KIND)
    if fast and sever is not None:
        raise InputError(
            "got --fast and --sever; an estimate cannot hold a part at its corrupted values. "
            "Leave one out."
        )
    settings |= {"kind": kind or _TEXT_KIND, "replacements": replacement or None}
    settings["occurrence"] = occurrence
    settings |= {} if sever is None else {"sever": sever}
    _trace_text(words, subject, target, settings, place, fast=fast, force=force)


def _trace_text(
    words: list[str],
    subject: str,
    target: str | None,
    settings: dict[str, Any],
    place: _Place,
    *,
    fast: bool,
    force: bool,
) -> None:
    """Trace one text."""
    with during("starting"):
        from ..locate.attribution import attribution_trace
        from ..locate.causal import causal_trace
        from ..locate.question import answer_to_follow, fill_prompts, prompt_warnings
        from ..model.subject import read_prompt
        from ..show.plots.traces import heat_map, text_heat_map

    files = output(place.out)  # before the work, not after it
    model, prompt = model_and_prompt(words)
    need_model(model, place.workspace, text=prompt)
    (text,) = fill_prompts([prompt], subject, single_slot=True)
    read_prompt(prompt, subject, occurrence=settings["occurrence"])  # before the model is loaded
    _warn(prompt_warnings([text]))
    with progress() as tell, opened(model, place.workspace, place.device, tell) as (lm, _):
        answer = answer_to_follow(lm, [text], target, force=force)
        _warn(answer.warnings)
        result = (attribution_trace if fast else causal_trace)(
            lm,
            prompt,
            subject,
            target=answer.target,
            progress=lambda done, total: tell("tracing", done, total),
            **settings,
        )
    _warn(result.warnings)
    saved = save(files, "trace", result, lambda path: heat_map(result, path=path))
    drawing = text_heat_map(result, max(_LEAST_WIDTH, min(plain_console().width, _MOST_WIDTH)))
    notes = [("note:", note) for note in result.notes]
    print_result(result.to_dict(), [drawing], place.as_json, notes, saved=saved)


def _trace_facts(words: list[str], settings: dict[str, Any], place: _Place) -> None:
    """Average the traces of a file of facts."""
    with during("starting"):
        from ..locate.average import average_trace
        from ..show.plots.traces import class_lines, class_map

    model, file = model_and_facts(words)
    assert file is not None
    files = output(place.out, curves=True, inputs=[file])
    need_model(model, place.workspace)
    facts = FactFile.read(file)
    with progress() as tell, opened(model, place.workspace, place.device, tell) as (lm, _):
        average = average_trace(
            lm,
            facts,
            progress=lambda done, total: tell("tracing facts", done, total),
            **settings,
        )
    _warn(average.warnings)
    saved = save(
        files,
        "average",
        average,
        lambda path: class_map(average, path=path),
        lambda path: class_lines(average, path=path),
    )
    print_result(average.to_dict(), average.tables(), place.as_json, saved=saved)


def neurons(  # house: Typer reads one parameter for each option
    words: ModelAndPrompt,
    subject: Annotated[str | None, typer.Option(help="Goes into the {} of the prompts.")] = None,
    target: Annotated[
        str | None, typer.Option(help="The answer to attribute.", show_default=_OWN_TARGET)
    ] = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="Another way to ask the same; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Points of the integral.")] = 20,
    threshold: Annotated[
        float, typer.Option(help="The smallest attribution that counts, as a share of the largest.")
    ] = 0.2,
    share: Annotated[
        float, typer.Option(help="The share of the prompts in which a neuron must count.")
    ] = 0.7,
    top: Annotated[
        int,
        typer.Option(
            min=1,
            max=_MOST_BARS,
            help="How many of the strongest neurons to list and draw; the CSV holds 100.",
        ),
    ] = 12,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the random neurons to compare with.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help=_FORCE_HELP)] = False,
    out: Out = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the neurons that carry a fact, and check them.

    The check silences them and doubles them. Several ways to ask single out the neurons of the
    fact; one alone also finds those of its wording.

    \b
    Examples:
      factsmith neurons atlas "The currency of {} is the" \\
          --subject Bulgaria --out neurons.png
      factsmith neurons atlas "The currency of Bulgaria is the" \\
          --paraphrase "In Bulgaria people pay with the"
    """
    with during("starting"):
        from ..locate.effects import check_neurons
        from ..locate.neurons import knowledge_neurons
        from ..locate.question import answer_to_follow, fill_prompts, prompt_warnings
        from ..show.plots.neurons import neuron_chart

    model, prompt = model_and_prompt(words)
    need_text(target, "--target")
    check_number(threshold, "threshold", above=0, most=1)
    check_number(share, "share", above=0, most=1)
    files = output(out)
    need_model(model, workspace, text=prompt)
    prompts = fill_prompts([prompt, *(paraphrase or [])], subject)
    _warn(prompt_warnings(prompts))
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        answer = answer_to_follow(lm, prompts, target, force=force, whole_words=True)
        _warn(answer.warnings)
        located = knowledge_neurons(
            lm,
            [escape(text) for text in prompts],
            answer.text,
            steps=steps,
            threshold=threshold,
            share=share,
            progress=lambda done, total: tell("attributing", done, total),
        )
        check = check_neurons(lm, located, seed=seed)
    saved = save(files, "neurons", located, lambda path: neuron_chart(located, n=top, path=path))
    print_result(check.to_dict(), check.tables(top), as_json, saved=saved)


@on_workers
def layers(  # house: Typer reads one parameter for each option
    model: Model = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="FACTS.yaml",
            help="Facts to try the layers on.",
            show_default="bundled facts that it knows",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Trial edits for each layer that is not dropped early.",
            show_default="24, or what is kept",
        ),
    ] = None,
    preset: Annotated[
        bool,
        typer.Option(
            "--preset", help="Print the published choice for this model, without measuring."
        ),
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again what the workspace keeps.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Of the trial facts, the contexts and the text."
        ),
    ] = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Choose the layers to edit, by trial edits.

    Each trial edit is taken back, and how long they take is said before. In a workspace the answer
    is kept, and `factsmith patch` uses it. Without it a patch takes layers by depth.

    \b
    Examples:
      factsmith layers atlas
      factsmith layers -w my-workspace --facts facts.yaml
    """
    with during("starting"):
        from ..patch.layer_choice import published
        from ..patch.layers import recommend_layers

    if preset and (facts is not None or trials is not None or refresh):
        raise InputError(
            "--preset prints the published layers and measures nothing. Leave out --facts, "
            "--trials and --refresh, or --preset."
        )
    wanted = None if facts is None else FactFile.read(facts)
    need_model(model, workspace)
    if refresh and workspace_of(model, workspace) is None:
        raise InputError(
            "--refresh measures again what a workspace keeps, and there is no workspace. "
            "Leave it out, or add --workspace."
        )
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench), engine(tell):
        if preset:
            choice = published(lm)
            if choice is None:
                raise InputError(
                    f"no layers were published for a model like {lm.name}. "
                    "Leave out --preset to measure them."
                )
        elif bench is None:
            choice = recommend_layers(lm, wanted, trials=trials, seed=seed, progress=tell)
        else:
            choice = bench.recommend_layers(
                wanted, trials=trials, seed=seed, refresh=refresh, progress=tell
            )
    print_result(choice.to_dict(), choice.tables(), as_json)


def _warn(warnings: Iterable[str]) -> None:
    """Print warnings to standard error."""
    for text in warnings:
        complain("warning", text)


def _check_corruption(
    kind: CorruptionKind, noise: float | None, replacements: list[str] | None
) -> None:
    """Raise an InputError for options of a corruption that do not go together."""
    if noise is not None:
        check_number(noise, "noise", above=0)
        if kind == "replace":
            raise InputError(
                "--noise is given, and --corruption is replace. Other subjects replace the noise: "
                "leave one out."
            )
    if replacements and kind == "noise":
        raise InputError(
            "--replacement is given, and --corruption is noise. Give --corruption replace with it, "
            "or leave it out."
        )


def _refuse_options(file: str, options: Iterable[str]) -> None:
    """Raise an InputError for options that do not go with a file of facts."""
    if unfit := ", ".join(options):
        raise InputError(
            f"got {file} and {unfit}. A file of facts is traced with its own subjects and "
            "answers, exactly: leave the options out."
        )


def _refuse_window(window: int | None, kind: TraceKind | None) -> None:
    """Raise an InputError for a window that would have no effect. No kind: all of them."""
    if window is not None and kind is not None and not uses_window(kind):
        raise InputError(
            "--window is for --kind mlp or attention: a state is restored alone. "
            "Name another --kind, or leave the window out."
        )
