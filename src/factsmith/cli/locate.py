"""Locate: where a fact lives, by causal tracing, by neurons, and by trial edits of layers."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..core.errors import InputError, UnsupportedModelError
from ..core.factfile import FactFile
from ..core.tables import counted
from .common import (
    LARGEST_SEED,
    Device,
    Json,
    Model,
    ModelAndPrompt,
    Out,
    Where,
    complain,
    is_facts,
    line,
    model_and_facts,
    model_and_prompt,
    need_model,
    opened,
    output,
    plain_table,
    print_result,
    progress,
    save,
)

if TYPE_CHECKING:
    from ..locate.records import CausalTrace
    from ..model.language_model import LanguageModel


_MOST_BARS = 60  # neurons in one chart: more do not fit on a page


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


def trace(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT|FACTS.yaml",
            help="A model (left out: the workspace's), and a text or facts.",
        ),
    ],
    subject: Annotated[str | None, typer.Option(help="The part of the text to corrupt.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The answer to follow.",
            show_default="the model's own, up to the first punctuation",
        ),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(
            help="What to restore: the whole state, or what one part adds.",
            show_default="state; of facts: all",
        ),
    ] = None,
    sever: Annotated[
        Part | None,
        typer.Option(help="Hold this part at its corrupted values above the restored state."),
    ] = None,
    corruption: Annotated[
        Corruption, typer.Option(help="Noise on the subject, or other subjects in its place.")
    ] = Corruption.noise,
    replacement: Annotated[
        list[str] | None,
        typer.Option(
            help="A subject to put in its place; may be repeated.", show_default="bundled ones"
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Neighbouring layers restored together, for mlp and attention.", show_default="10"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Corrupted runs to average.")] = 10,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Scale of the noise.", show_default="3 sigma of the subject's embeddings"
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Of the noise, or of the choice of other subjects."
        ),
    ] = 1,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Estimate by gradients, and say how well the estimate ranks."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Trace the target even if the model says something else."),
    ] = False,
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
    from ..locate.attribution import AttributionTrace, attribution_trace
    from ..locate.causal import causal_trace
    from ..show.plots.traces import heat_map, text_heat_map

    if any(map(is_facts, words[:-1])) and not is_facts(words[-1]):
        raise InputError(
            f"got {words[0]} before {words[-1]!r}; the model comes first: factsmith trace MODEL FACTS.yaml"
        )
    if window is not None and (kind is Kind.state or (kind is None and not is_facts(words[-1]))):
        raise InputError(
            "--window is for --kind mlp or attention: a state is restored by itself; name another --kind, or leave it out"
        )
    if is_facts(words[-1]):
        given = {
            "--subject": subject,
            "--target": target,
            "--replacement": replacement,
            "--fast": fast,
            "--force": force,
        }
        if unfit := [name for name, value in given.items() if value]:
            raise InputError(
                f"got {words[-1]} and {', '.join(unfit)}; a file of facts is traced with its own subjects and answers, exactly"
            )
        _trace_facts(
            words,
            kind,
            sever,
            corruption,
            window or 10,
            samples,
            noise,
            seed,
            out,
            workspace,
            device,
            as_json,
        )
        return
    if subject is None:
        raise InputError(
            "no --subject was given; name the part of the text to corrupt, as it stands there"
        )
    files = output(out)  # before the work, not after it
    model, prompt = model_and_prompt(words)
    need_model(model, workspace)
    if prompt.count("{}") > 1:
        raise InputError(
            f"the prompt {prompt!r} has {prompt.count('{}')} slots {{}}; expected one, where the subject goes, or none"
        )
    (text,) = _filled([prompt], subject)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        if target is not None:
            _check_says(lm, [text], target, force)
        else:
            said, p = _own_answer(lm, text)
            if p is None:
                complain(
                    "warning",
                    f"the model continues {text!r} with {said!r}, which is no answer of whole words: its first token is followed",
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
                raise InputError(
                    "--fast estimates restored states, not severed ones; leave out --fast or --sever"
                )
            found: CausalTrace = attribution_trace(lm, text, subject, **settings)
        else:
            found = causal_trace(
                lm, text, subject, sever=None if sever is None else sever.value, **settings
            )
    _check_lost(found.answer.strip(), found.clean, found.corrupted)
    saved = save(files, "trace", found, lambda path: heat_map(found, path=path))

    def show(console: Console) -> None:
        console.print(text_heat_map(found, max(20, min(console.width, 120))))
        if isinstance(found, AttributionTrace) and found.rank_correlation is not None:
            line(
                console,
                "estimate:",
                f"its ranks correlate {found.rank_correlation:.2f} with the exact map's, on {found.checked} states",
            )

    print_result(found.to_dict(), show, as_json, saved)


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
    from ..locate.average import average_trace
    from ..show.plots.traces import class_lines, class_map

    model, file = model_and_facts(words)
    assert file is not None
    files = output(out, curves=True, inputs=[file])
    need_model(model, workspace)
    facts = FactFile.read(file)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
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
    saved = save(
        files,
        "average",
        found,
        lambda path: class_map(found, path=path),
        lambda path: class_lines(found, path=path),
    )

    def show(console: Console) -> None:
        skipped = (
            f"; {found.n_skipped} left out, which the model answers otherwise"
            if found.n_skipped
            else ""
        )
        line(
            console,
            f"{counted(found.n_facts, 'fact')}{skipped}:",
            f"p(answer) {found.clean:.3f}, corrupted {found.corrupted:.3f}",
        )
        line(
            console,
            "average total effect",
            f"{found.total_effect:.3f}{_margin(found.total_low, found.total_high)}",
        )
        table = plain_table(
            caption="largest average effect of a layer, ± half of its 95 % interval, @ the layer"
        )
        table.add_column("")
        # A cell is "0.065 ± 0.028 @0": beside one another where the terminal is wide enough, else in two lines.
        wide = console.width >= max(map(len, found.classes)) + 20 * len(found.effects)
        for name in found.effects:
            table.add_column(name, justify="right")
        for row, (token, count) in enumerate(zip(found.classes, found.counts, strict=True)):
            cells = []
            for name, effects in found.effects.items():
                layer = int(effects[row].nan_to_num(-1).argmax())
                margin = _margin(
                    float(found.low[name][row, layer]), float(found.high[name][row, layer])
                )
                value = f"{float(effects[row, layer]):.3f}"
                cells.append(
                    ""
                    if not count
                    else f"{value}{margin} @{layer}"
                    if wide
                    else f"{value} @{layer}\n{margin.strip()}".strip()
                )
            table.add_row(token, *cells)
        console.print(table)

    print_result(found.to_dict(), show, as_json, saved)


def neurons(
    words: ModelAndPrompt,
    subject: Annotated[str | None, typer.Option(help="What stands for {} in the prompts.")] = None,
    target: Annotated[
        str | None, typer.Option(help="The answer to attribute.", show_default="the model's own")
    ] = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="Another way to ask the same; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Points of the integral.")] = 20,
    threshold: Annotated[
        float, typer.Option(help="Part of the largest attribution from which a neuron counts.")
    ] = 0.2,
    share: Annotated[
        float, typer.Option(help="Part of the prompts in which it has to count.")
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
    force: Annotated[
        bool,
        typer.Option("--force", help="Attribute the target even if the model says something else."),
    ] = False,
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
    from ..locate.effects import effect, random_neurons
    from ..locate.neurons import knowledge_neurons
    from ..show.plots.neurons import neuron_chart

    files = output(out)
    model, prompt = model_and_prompt(words)
    need_model(model, workspace)
    prompts = _filled([prompt, *(paraphrase or [])], subject)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
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
    saved = save(files, "neurons", found, lambda path: neuron_chart(found, n=top, path=path))

    def show(console: Console) -> None:
        refined = set(found.refined)
        line(console, prompts[0], f"{target} (p = {float(found.probability[0]):.3f})", style="bold")
        table = plain_table("layer", "neuron", "attribution", f"strong in, of {len(prompts)}")
        table.add_column("")
        for neuron, score in found.top(top):
            strong = sum(neuron in coarse for coarse in found.coarse)
            place = ":".join(map(str, neuron[1:]))
            table.add_row(
                str(neuron[0]),
                place,
                f"{score:.4f}",
                str(strong),
                "refined" if neuron in refined else "",
            )
        console.print(table)
        for name, measured in effects.items():
            changes = f"silenced {measured.suppressed:+.1%}, doubled {measured.amplified:+.1%}"
            line(
                console,
                f"{name}:",
                f"{counted(measured.n_neurons, 'neuron')}; p({target}) {changes}"
                if measured.n_neurons
                else "none",
            )

    document = {
        **found.to_dict(),
        "effects": {name: measured.to_dict() for name, measured in effects.items()},
    }
    print_result(document, show, as_json, saved)


def layers(
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
            help="Trial edits at the layers that stay longest in the race.",
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
    """Choose the layers to edit: an average causal trace, then trial edits, each taken back.

    In a workspace the answer is kept, and `factsmith patch` uses it.

    \b
    Examples:
      factsmith layers atlas
      factsmith layers -w my-workspace --facts facts.yaml
    """
    from ..patch.layer_choice import published
    from ..patch.layers import recommend_layers

    wanted = None if facts is None else FactFile.read(facts)
    need_model(model, workspace)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
        if refresh and bench is None:
            raise InputError(
                "--refresh measures again what a workspace keeps, and there is none; leave it out, or add --workspace"
            )
        if preset:
            known = published(lm)
            if known is None:
                raise InputError(
                    f"no layers were published for a model like {lm.name}; leave out --preset to measure them"
                )
            choice = known
        elif bench is None:
            choice = recommend_layers(lm, wanted, trials=trials, seed=seed, progress=tell)
        else:
            choice = bench.recommend_layers(
                wanted, trials=trials, seed=seed, refresh=refresh, progress=tell
            )

    def show(console: Console) -> None:
        line(console, "ROME:", f" layer {choice.rome}")
        line(
            console,
            "MEMIT:",
            f"layers {', '.join(map(str, choice.memit))}" if choice.memit else "not known",
        )
        line(console, "why:", f"  {choice.reason}")
        if choice.scores:
            (own,) = choice.tables()
            table = plain_table(*own.columns)
            for row in own.rows:
                table.add_row(*row, style="bold" if row[0] == str(choice.rome) else "")
            console.print(table)

    print_result(choice.to_dict(), show, as_json)


def _filled(prompts: Sequence[str], subject: str | None) -> list[str]:
    """The prompts with the subject in their slots; raises InputError where one cannot be asked, warns where it ends in a space."""
    if subject is not None and not subject.strip():
        raise InputError("--subject is empty; expected a part of the prompt")
    texts = []
    for prompt in prompts:
        if not prompt.strip():
            raise InputError("a prompt is empty; expected a text for the model to continue")
        if "{}" in prompt and subject is None:
            raise InputError(
                f"{prompt!r} has {{}} in it, and no --subject was given; give one, or write the subject into the prompt"
            )
        if subject is not None and "{}" not in prompt and subject.strip() not in prompt:
            raise InputError(
                f"subject {subject!r} is not in {prompt!r}, which has no {{}} either; write it as it stands there, or leave it out"
            )
        texts.append(prompt if subject is None else prompt.replace("{}", subject.strip()))
        if texts[-1][-1].isspace():
            complain(
                "warning",
                f"{texts[-1]!r} ends in white space, after which most models answer worse; end it with the last word",
            )
    return texts


def _own_answer(lm: LanguageModel, prompt: str) -> tuple[str, float | None]:
    """What the model itself says first after a prompt, and how likely; None where that text, as a target, is not what it says.

    So it is where the continuation begins with a punctuation mark, or in the middle of a word: between prompt and target goes a space.
    """
    from ..model.answers import first_phrase

    said = first_phrase(lm.answer([prompt])[0])
    if not said or not lm.says([prompt], [said])[0]:
        return said, None
    return said, math.exp(float(lm.log_prob([prompt], [said])[0]))


def _check_says(lm: LanguageModel, prompts: list[str], target: str, force: bool) -> None:
    """Warns of prompts that the model answers otherwise; raises InputError when it answers none with the target, unless forced."""
    right = lm.says(prompts, [target] * len(prompts))
    wrong = [prompt for prompt, said in zip(prompts, right, strict=True) if not said]
    for prompt in wrong:
        try:
            answer, p = _own_answer(lm, prompt)
        except (
            UnsupportedModelError
        ):  # a masked language model fills a gap; it has no continuation to show
            said = f"the model does not answer {prompt!r} with {target.strip()!r}"
        else:
            likely = "" if p is None else f" (p = {p:.3f})"
            said = f"the model answers {prompt!r} with {answer!r}{likely}, not {target.strip()!r}"
        if len(wrong) == len(prompts) and not force:
            raise InputError(
                f"{said}; leave out --target to follow its own answer, or add --force to follow the target all the same"
            )
        complain("warning", said)


def _check_lost(answer: str, clean: float, corrupted: float) -> None:
    """Warns when the corruption costs the answer hardly any probability: a map is of what comes back of the loss."""
    if clean - corrupted < max(0.01, 0.05 * clean):
        complain(
            "warning",
            f"p({answer}) is {clean:.3f}, and {corrupted:.3f} with the subject corrupted: the corruption does not take the answer away, so "
            "there is nothing to bring back and the map shows nothing; try another corruption, or more noise",
        )


def _margin(low: float, high: float) -> str:
    """Half of a 95 % interval, where there is one."""
    return "" if math.isnan(low) else f" ± {(high - low) / 2:.3f}"
