"""The room Memory: cards of neurons, and what the model says without them.

FIND        neurons that promote a word, or fire after it
NEURON      the card of one neuron
INTERVENE   silence or amplify neurons, beside the untouched model
CENSUS      what the model is made of
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from pydantic import Field, field_validator

from ...core.errors import InputError
from ...core.gap import gap_notes
from ...core.progress import Progress
from ...model.address import Neuron, find_neurons, neuron_of
from ...read import census as reading
from ...read.cards import Card, ValueCard, card, value_card
from ...read.index_store import kept_index, kept_indices
from ...read.intervention import ask_scaled
from ...show.charts.chart import Chart
from ...show.charts.neurons import fact_chart, histogram, promoted_bars
from ...show.charts.predictions import scaled_chart
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import call, command, literal, program
from .fields import PROMPT, Continued, Text, naming
from .index import NO_INDEX, index_form

# ── one neuron ────────────────────────────────────────────────────────────────────────────────────


class NeuronArguments(Source):
    """Which neuron to show."""

    layer: int = Field(ge=0, title="Layer", description="The layer, counted from 0.")
    expert: int | None = Field(
        default=None,
        ge=0,
        title="Expert",
        description="The expert, in a layer that has several. Empty in other layers.",
        json_schema_extra={"advanced": True},
    )
    number: int = Field(ge=0, title="Number", description="The neuron's number in its layer.")
    top: int = Field(
        default=10,
        ge=1,
        le=25,
        title="Triggers and tokens",
        description="How many triggers and promoted tokens to list.",
        json_schema_extra={"advanced": True},
    )
    facts: int = Field(
        default=5,
        ge=0,
        le=50,
        title="Facts",
        description="How many facts to ask without the neuron.",
        json_schema_extra={"advanced": True},
    )

    @classmethod
    def of_neuron(cls, neuron: Neuron, source: Source) -> Self:
        """Return the arguments for a neuron of the model that a source names."""
        layer, *expert, number = neuron
        return cls(
            layer=layer,
            expert=expert[0] if expert else None,
            number=number,
            model=source.model,
            revision=source.revision,
        )

    @property
    def neuron(self) -> Neuron:
        """(layer, i) or (layer, expert, i)."""
        if self.expert is None:
            return self.layer, self.number
        return self.layer, self.expert, self.number


def _run_neuron(desk: Desk, arguments: NeuronArguments, tell: Progress) -> Answer:
    """Show the card of one neuron."""
    shown: Card | ValueCard
    with desk.reading(arguments, tell) as lm, naming("number"):
        index = kept_index(lm, progress=tell)
        k, n_facts = arguments.top, arguments.facts
        if index is None:
            shown = value_card(lm, arguments.neuron, k=k, n_facts=n_facts)
        else:
            shown = card(lm, index, arguments.neuron, k=k, n_facts=n_facts)
    prompt = shown.facts[0].prompt if shown.facts else ""
    return Answer(
        shown.to_dict(),
        shown.tables(),
        _card_charts(shown),
        notes=[NO_INDEX] if index is None else [],
        view={
            "prompt": prompt,
            "tries": _tries(prompt, shown, arguments) if prompt else [],
            "index": index_form(arguments) if index is None else {},
        },
    )


def _card_charts(shown: Card | ValueCard) -> list[Chart]:
    """Return the charts of a card."""
    charts = [fact_chart(shown)] if shown.facts else []
    charts.append(promoted_bars(shown))
    return [*charts, histogram(shown)] if isinstance(shown, Card) else charts


def _tries(prompt: str, shown: Card | ValueCard, source: Source) -> list[tuple[str, str]]:
    """Return (label, address) of views that silence or amplify the neuron on a prompt."""
    factors = (("silence it", 0.0), ("double it", 2.0), ("times 5", 5.0))
    return [
        (
            label,
            InterveneArguments.of_neurons(prompt, [shown.neuron], source, factor).address(
                "/memory/intervene"
            ),
        )
        for label, factor in factors
    ]


def _neuron_python(arguments: NeuronArguments, place: Place) -> str:
    """Return the program that shows the same card."""
    find = call(
        "card = find_card",
        "lm",
        literal(arguments.neuron),
        k=arguments.top,
        n_facts=arguments.facts,
    )
    imports = ["from factsmith.read.cards import find_card"]
    return program(arguments, place, [find, "print(json.dumps(card.to_dict()))"], imports)


def _neuron_command(arguments: NeuronArguments, place: Place) -> list[str]:
    """Return the command that shows the same card."""
    options = {
        "--top": None if arguments.top == 10 else arguments.top,
        "--facts": None if arguments.facts == 5 else arguments.facts,
    }
    return command(arguments, place, "neuron", [*map(str, arguments.neuron)], options)


def neuron_examples(desk: Desk) -> list[tuple[str, NeuronArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    if desk.place.model != "atlas":
        return [("layer 0, neuron 0", NeuronArguments(layer=0, number=0))]
    numbers = ((5, 992), (1, 296), (5, 409))
    return [(f"neuron {a} {b}", NeuronArguments(layer=a, number=b)) for a, b in numbers]


def card_links(neurons: Sequence[Neuron], source: Source) -> list[str]:
    """Return the addresses of the cards of neurons."""
    return [
        NeuronArguments.of_neuron(neuron, source).address("/memory/neuron") for neuron in neurons
    ]


def card_link(source: Source) -> Callable[[Mapping[str, Any]], str]:
    """Return what gives the card's address for a chart's row with layer, expert and neuron."""

    def address(row: Mapping[str, Any]) -> str:
        expert = () if row["expert"] is None else (int(row["expert"]),)
        neuron: Any = (int(row["layer"]), *expert, int(row["neuron"]))
        return card_links([neuron], source)[0]

    return address


# ── silence and amplify ───────────────────────────────────────────────────────────────────────────


class InterveneArguments(Continued):
    """Which neurons to scale, and what to ask."""

    prompt: Text = Field(
        title="Prompt",
        description="The text that the model continues.",
        json_schema_extra=PROMPT,
    )
    neurons: list[str] = Field(
        title="Neurons",
        description="Each as layer and number, such as 5 992; with experts as layer, expert and "
        "number.",
        json_schema_extra={"placeholder": "5 992"},
    )
    factor: float = Field(
        default=0.0,
        title="Factor",
        description="What their coefficients are multiplied by: 0 silences, 2 doubles.",
        allow_inf_nan=False,
    )

    @field_validator("neurons")
    @classmethod
    def _are_neurons(cls, neurons: list[str]) -> list[str]:
        """Check that each text is two or three numbers."""
        if not neurons:
            raise ValueError("give at least one neuron, such as 5 992")
        for text in neurons:
            neuron_of(text)
        return neurons

    @classmethod
    def of_neurons(
        cls, prompt: str, neurons: Sequence[Neuron], source: Source, factor: float = 0.0
    ) -> Self:
        """Return the arguments for neurons of the model that a source names."""
        return cls(
            prompt=prompt,
            neurons=[" ".join(map(str, neuron)) for neuron in neurons],
            factor=factor,
            model=source.model,
            revision=source.revision,
        )

    @property
    def addresses(self) -> list[Neuron]:
        """The neurons as numbers."""
        return [neuron_of(text) for text in self.neurons]


def _run_intervene(desk: Desk, arguments: InterveneArguments, tell: Progress) -> Answer:
    """Ask with and without the change."""
    with desk.reading(arguments, tell) as lm:
        with naming("neurons", layer="neurons"):
            find_neurons(lm.ffn, arguments.addresses)
        with naming("prompt", scale="factor"):
            tried = ask_scaled(
                lm,
                arguments.prompt,
                arguments.addresses,
                arguments.factor,
                top=arguments.top,
                max_new_tokens=arguments.max_new_tokens,
            )
    cards = card_links(tried.neurons, arguments)
    names = [" ".join(map(str, neuron)) for neuron in tried.neurons]
    others = []
    for label, factor in (("silence", 0.0), ("halve", 0.5), ("double", 2.0), ("times 5", 5.0)):
        if factor != arguments.factor:
            other = arguments.model_copy(update={"factor": factor})
            others.append((label, other.address("/memory/intervene")))
    return Answer(
        tried.to_dict(),
        tried.tables(),
        [scaled_chart(tried)],
        warnings=gap_notes([arguments.prompt]),
        view={
            "tried": tried,
            "cards": list(zip(names, cards, strict=True)),
            "others": others,
        },
    )


def _intervene_python(arguments: InterveneArguments, place: Place) -> str:
    """Return the program that asks the same."""
    ask = call(
        "tried = fs.ask_scaled",
        "lm",
        literal(arguments.prompt),
        literal(arguments.addresses),
        literal(arguments.factor),
        top=arguments.top,
        max_new_tokens=arguments.max_new_tokens,
    )
    return program(arguments, place, [ask, "print(json.dumps(tried.to_dict()))"])


def _intervene_command(arguments: InterveneArguments, place: Place) -> list[str]:
    """Return the command that asks the same."""
    options = {
        "--neuron": arguments.neurons,
        "--factor": arguments.factor,
        "--top": arguments.top,
        "--max-new-tokens": arguments.max_new_tokens,
    }
    return command(arguments, place, "intervene", [arguments.prompt], options)


def intervene_examples(desk: Desk) -> list[tuple[str, InterveneArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    if desk.place.model != "atlas":
        return []
    neurons = [(0, i) for i in _BULGARIA]
    arguments = InterveneArguments.of_neurons("The currency of Bulgaria is the", neurons, Source())
    return [("Bulgaria's currency without the neurons of its name", arguments)]


_BULGARIA = (693, 878, 646, 441, 95, 168, 546, 688, 763, 782, 701, 977, 569, 839, 930, 746)
"""The strongest neurons of layer 0 of the bundled model at the token " Bulgaria"."""


# ── census ────────────────────────────────────────────────────────────────────────────────────────


class CensusArguments(Source):
    """What to count."""

    quick: bool = Field(
        default=True,
        title="Parameters only",
        description="Read no text. Otherwise idle neurons are counted too, which takes minutes.",
    )


def _run_census(desk: Desk, arguments: CensusArguments, tell: Progress) -> Answer:
    """Count what the model is made of."""
    with desk.reading(arguments, tell) as lm:
        if arguments.quick:
            counts = reading.ReadCensus(reading.census(lm))
        elif kept_index(lm, progress=tell) is None:
            raise InputError(
                "there is no index of this model, on which idle neurons are counted; build it on "
                "the page Find, or count parameters only",
                argument="quick",
            )
        else:
            counts = reading.find_census(lm, progress=tell)
    return Answer(counts.to_dict(), counts.tables())


def _census_python(arguments: CensusArguments, place: Place) -> str:
    """Return the program that counts the same."""
    if arguments.quick:
        body = ["counts = ReadCensus(fs.census(lm))", "print(json.dumps(counts.to_dict()))"]
        imports = ["from factsmith.read.census import ReadCensus"]
    else:
        body = ["counts = find_census(lm)", "print(json.dumps(counts.to_dict()))"]
        imports = ["from factsmith.read.census import find_census"]
    return program(arguments, place, body, imports)


def _census_command(arguments: CensusArguments, place: Place) -> list[str]:
    """Return the command that counts the same."""
    return command(arguments, place, "census", [], {"--quick": arguments.quick})


def neuron_limits(desk: Desk, values: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: why it cannot be used}, for the form of a neuron's card."""
    if not desk.is_own(str(values.get("model") or "")):
        return {}
    if any(ffn.n_experts for ffn in desk.lm.ffn):
        return {}
    return {"expert": f"{desk.place.model} has no experts."}


NEURON = Verb(
    "neuron",
    "Neuron",
    "Show one neuron: where it fires, what its value promotes, and which facts it supports.",
    NeuronArguments,
    _run_neuron,
    _neuron_python,
    _neuron_command,
    depends=kept_indices,
    template="answers/neuron.html",
    button="Show",
    disabled=neuron_limits,
    examples=neuron_examples,
)

INTERVENE = Verb(
    "intervene",
    "Silence or amplify",
    "Multiply the coefficients of neurons, and compare the answer with the unchanged model's.",
    InterveneArguments,
    _run_intervene,
    _intervene_python,
    _intervene_command,
    template="answers/intervene.html",
    button="Ask both",
    examples=intervene_examples,
)

CENSUS = Verb(
    "census",
    "Census",
    "Count what the model is made of, layer by layer.",
    CensusArguments,
    _run_census,
    _census_python,
    _census_command,
    depends=kept_indices,
    button="Count",
    needs_form=False,
)
