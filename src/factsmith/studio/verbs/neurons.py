"""Knowledge neurons, in the room Trace: the neurons that carry a fact, and a check of them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...core.progress import Progress
from ...core.slots import escape
from ...locate.effects import check_neurons
from ...locate.neurons import knowledge_neurons
from ...locate.question import answer_to_follow, fill_prompts, prompt_warnings
from ...show.charts.neurons import layer_bars, neuron_bars
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import call, command, literal, program
from .fields import LARGEST_SEED, PROMPT, OptionalText, Text, is_bundled, naming
from .memory import InterveneArguments, card_link, card_links


class NeuronsArguments(Source):
    """Whose neurons to find."""

    prompt: Text = Field(
        title="Prompt",
        description="A text that ends where the answer begins, or one with {} for the subject.",
        json_schema_extra=PROMPT,
    )
    subject: str = Field(
        default="",
        title="Subject",
        description="Goes into the {} of the prompts.",
        json_schema_extra={"placeholder": "Bulgaria"},
    )
    paraphrases: list[str] = Field(
        default=[],
        title="Paraphrases",
        description="Other ways to ask the same. Several single out the neurons of the fact.",
        json_schema_extra={"placeholder": "In Bulgaria people pay with the"},
    )
    target: OptionalText = Field(
        default="",
        title="Answer",
        description="The answer to attribute. Empty: the model's own, up to the first punctuation.",
    )
    steps: int = Field(
        default=20,
        ge=1,
        le=1000,
        title="Steps",
        description="Points of the integral.",
        json_schema_extra={"advanced": True},
    )
    threshold: float = Field(
        default=0.2,
        gt=0,
        le=1,
        title="Threshold",
        description="The smallest attribution that counts, as a share of the largest.",
        json_schema_extra={"advanced": True},
    )
    share: float = Field(
        default=0.7,
        gt=0,
        le=1,
        title="Share",
        description="The share of the prompts in which a neuron must count.",
        json_schema_extra={"advanced": True},
    )
    top: int = Field(
        default=12,
        ge=1,
        le=60,
        title="Neurons",
        description="How many of the strongest neurons to list.",
        json_schema_extra={"advanced": True},
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=LARGEST_SEED,
        title="Seed",
        description="Of the random neurons to compare with.",
        json_schema_extra={"advanced": True},
    )
    force: bool = Field(
        default=False,
        title="Follow this answer",
        description="Follow the answer even if the model says something else.",
        json_schema_extra={"advanced": True},
    )


def _run_neurons(desk: Desk, arguments: NeuronsArguments, tell: Progress) -> Answer:
    """Find the neurons that carry a fact, and check them."""
    prompts = fill_prompts([arguments.prompt, *arguments.paraphrases], arguments.subject or None)
    with desk.reading(arguments, tell) as lm, naming("prompt"):
        answer = answer_to_follow(
            lm, prompts, arguments.target or None, force=arguments.force, whole_words=True
        )
        located = knowledge_neurons(
            lm,
            [escape(text) for text in prompts],
            answer.text,
            steps=arguments.steps,
            threshold=arguments.threshold,
            share=arguments.share,
            progress=lambda done, total: tell("attributing", done, total),
        )
        check = check_neurons(lm, located, seed=arguments.seed)
    strongest = [neuron for neuron, _ in located.top(arguments.top)]
    chosen = located.refined or tuple(strongest[:1])
    silence = InterveneArguments.of_neurons(prompts[0], chosen, arguments)
    return Answer(
        check.to_dict(),
        check.tables(arguments.top),
        [
            neuron_bars(located, arguments.top).linked(card_link(arguments)),
            layer_bars(located),
        ],
        warnings=[*prompt_warnings(prompts), *answer.warnings],
        view={
            "neuron_links": card_links(strongest, arguments),
            "silence": silence.address("/memory/intervene"),
        },
    )


def _neurons_python(arguments: NeuronsArguments, place: Place) -> str:
    """Return the program that finds the same."""
    imports = [
        "from factsmith.core.slots import escape",
        "from factsmith.locate.effects import check_neurons",
        "from factsmith.locate.question import answer_to_follow, fill_prompts",
    ]
    given = {} if not arguments.force else {"force": True}
    body = [
        call(
            "prompts = fill_prompts",
            literal([arguments.prompt, *arguments.paraphrases]),
            literal(arguments.subject or None),
        ),
        call(
            "answer = answer_to_follow",
            "lm",
            "prompts",
            literal(arguments.target or None),
            whole_words=True,
            **given,
        ),
        call(
            "neurons = fs.knowledge_neurons",
            "lm",
            "[escape(text) for text in prompts]",
            "answer.text",
            steps=arguments.steps,
            threshold=arguments.threshold,
            share=arguments.share,
        ),
        call("check = check_neurons", "lm", "neurons", seed=arguments.seed),
        "print(json.dumps(check.to_dict()))",
    ]
    return program(arguments, place, body, imports)


def _neurons_command(arguments: NeuronsArguments, place: Place) -> list[str]:
    """Return the command that finds the same."""
    fields = NeuronsArguments.model_fields
    options: dict[str, Any] = {}
    for name, flag in (
        ("subject", "--subject"),
        ("target", "--target"),
        ("paraphrases", "--paraphrase"),
        ("steps", "--steps"),
        ("threshold", "--threshold"),
        ("share", "--share"),
        ("top", "--top"),
        ("seed", "--seed"),
        ("force", "--force"),
    ):
        value = getattr(arguments, name)
        options[flag] = None if value == fields[name].default else value
    return command(arguments, place, "neurons", [arguments.prompt], options)


def neurons_examples(desk: Desk) -> list[tuple[str, NeuronsArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    if not is_bundled(desk):
        return []
    return [
        (
            "Bulgaria's currency, asked in two ways",
            NeuronsArguments(
                prompt="The currency of {} is the",
                subject="Bulgaria",
                paraphrases=["In {} people pay with the"],
            ),
        ),
        ("Fiat 127's maker", NeuronsArguments(prompt="The maker of Fiat 127 is")),
    ]


NEURONS = Verb(
    "neurons",
    "Knowledge neurons",
    "Find the neurons that carry a fact, and check them by silencing and doubling.",
    NeuronsArguments,
    _run_neurons,
    _neurons_python,
    _neurons_command,
    template="answers/neurons.html",
    button="Find",
    examples=neurons_examples,
)
