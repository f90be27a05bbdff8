"""Explain, in the room Ask: what each part of the model adds to the logit of the answer."""

from __future__ import annotations

from pydantic import Field

from ...core.gap import gap_notes
from ...core.progress import Progress
from ...model.address import Neuron
from ...read.composition import Composition, compose
from ...show.charts.predictions import part_bars
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import call, command, literal, program
from .fields import PROMPT, OptionalText, Text, is_bundled, naming, prompts_for, unless
from .memory import card_links


class ExplainArguments(Source):
    """Which prediction to explain."""

    prompt: Text = Field(
        title="Prompt",
        description="The text. The token that follows it is explained.",
        json_schema_extra=PROMPT,
    )
    target: OptionalText = Field(
        default="",
        title="Answer",
        description="The answer to explain. Empty: what the model says.",
    )
    instead_of: OptionalText = Field(
        default="",
        title="Instead of",
        description="Explain why the answer and not this text: shares of the logits' difference.",
    )
    top: int = Field(
        default=10,
        ge=1,
        le=100,
        title="Neurons",
        description="How many neurons to list that add most, and that take most.",
        json_schema_extra={"advanced": True},
    )
    tokens: int = Field(
        default=5,
        ge=1,
        le=50,
        title="Tokens",
        description="How many tokens of each neuron's value to list.",
        json_schema_extra={"advanced": True},
    )


def _run_explain(desk: Desk, arguments: ExplainArguments, tell: Progress) -> Answer:
    """Explain one prediction."""
    with desk.reading(arguments, tell) as lm, naming("prompt", contrast="instead_of"):
        composition = compose(
            lm,
            arguments.prompt,
            arguments.target or None,
            contrast=arguments.instead_of or None,
            top=arguments.top,
            tokens=arguments.tokens,
            progress=tell,
        )
        name = lm.name
    instead = arguments.instead_of or None
    return Answer(
        {**composition.to_dict(arguments.top), "instead_of": instead, "model": name},
        composition.tables(arguments.top),
        [part_bars(composition)],
        warnings=gap_notes([arguments.prompt]),
        view={"neuron_links": card_links(_listed(composition, arguments.top), arguments)},
    )


def _listed(composition: Composition, top: int) -> list[Neuron]:
    """Return the neurons that the table lists, in its order."""
    both = [*composition.strongest(top), *composition.strongest(top, against=True)]
    return [each.neuron for each in both]


def _explain_python(arguments: ExplainArguments, place: Place) -> str:
    """Return the program that explains the same."""
    compose_it = call(
        "composition = fs.compose",
        "lm",
        literal(arguments.prompt),
        target=arguments.target,
        contrast=arguments.instead_of,
        top=arguments.top,
        tokens=arguments.tokens,
    )
    show = f"print(json.dumps(composition.to_dict({arguments.top})))"
    return program(arguments, place, [compose_it, show])


def _explain_command(arguments: ExplainArguments, place: Place) -> list[str]:
    """Return the command that explains the same."""
    options = {
        "--target": arguments.target,
        "--instead-of": arguments.instead_of,
        "--top": unless(arguments.top, 10),
        "--tokens": unless(arguments.tokens, 5),
    }
    return command(arguments, place, "explain", [arguments.prompt], options)


def explain_examples(desk: Desk) -> list[tuple[str, ExplainArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    examples = [(prompt, ExplainArguments(prompt=prompt)) for prompt in prompts_for(desk)[:2]]
    if is_bundled(desk):
        prompt = prompts_for(desk)[0]
        examples.append(
            (f"{prompt} … not euro", ExplainArguments(prompt=prompt, instead_of="euro"))
        )
    return examples


EXPLAIN = Verb(
    "explain",
    "Explain",
    "Explain a prediction by what neurons, heads and layers add to it.",
    ExplainArguments,
    _run_explain,
    _explain_python,
    _explain_command,
    template="answers/explain.html",
    button="Explain",
    examples=explain_examples,
)
