"""Find, in the room Memory: neurons that promote a word, or fire after it."""

from __future__ import annotations

from pydantic import Field

from ...core.progress import Progress
from ...read.index_store import kept_indices
from ...read.search import search_kept
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import call, command, literal, program
from .fields import Text, is_bundled, naming
from .index import NO_INDEX, index_form
from .memory import card_links


class FindArguments(Source):
    """Which word to look for."""

    word: Text = Field(
        title="Word",
        description="A word or a few words.",
        json_schema_extra={"placeholder": "Paris"},
    )
    top: int = Field(
        default=10,
        ge=1,
        le=200,
        title="Neurons",
        description="How many neurons to list that promote the word, and that fire after it.",
        json_schema_extra={"advanced": True},
    )


def _run_find(desk: Desk, arguments: FindArguments, tell: Progress) -> Answer:
    """Search the values of the model and the triggers of its index."""
    with desk.reading(arguments, tell) as lm, naming("word"):
        neurons = search_kept(lm, arguments.word, k=arguments.top, progress=tell)
    firing = neurons.firing
    return Answer(
        neurons.to_dict(),
        neurons.tables(),
        notes=[NO_INDEX] if firing is None else [],
        view={
            "promoting_links": card_links([each.neuron for each in neurons.promoting], arguments),
            "firing_links": card_links([each.neuron for each in firing or ()], arguments),
            "index": index_form(arguments) if firing is None else {},
        },
    )


def _find_python(arguments: FindArguments, place: Place) -> str:
    """Return the program that finds the same."""
    find = call("neurons = search_word", "lm", literal(arguments.word), k=arguments.top)
    imports = ["from factsmith.read.search import search_word"]
    return program(arguments, place, [find, "print(json.dumps(neurons.to_dict()))"], imports)


def _find_command(arguments: FindArguments, place: Place) -> list[str]:
    """Return the command that finds the same."""
    top = None if arguments.top == 10 else arguments.top
    return command(arguments, place, "find", [arguments.word], {"--top": top})


def find_examples(desk: Desk) -> list[tuple[str, FindArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    words = ("Bulgaria", "Fiat", "Paris") if is_bundled(desk) else ("Paris",)
    return [(word, FindArguments(word=word)) for word in words]


FIND = Verb(
    "find",
    "Find",
    "Find the neurons that promote a word, or that fire after it.",
    FindArguments,
    _run_find,
    _find_python,
    _find_command,
    depends=kept_indices,
    template="answers/find.html",
    button="Find",
    examples=find_examples,
)
