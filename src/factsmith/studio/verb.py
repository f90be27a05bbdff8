"""What pages, the HTTP API and workers share: a verb and its answer.

    def run(desk: Desk, arguments: AskArguments, tell: Progress) -> Answer:
        with desk.reading(arguments, tell) as lm:
            return Answer({"answer": lm.answer([arguments.prompt])[0]})

    ASK = Verb("ask", "Ask", "Ask a model to continue a text.", AskArguments, run, python, command)

A verb is written once. Its arguments (`arguments`) make the form of its page, the query of the
page's address, the body of its API call and the text of OpenAPI.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from ..core.progress import Progress
from ..core.tables import Table
from ..show.charts.chart import Chart
from .arguments import Arguments
from .desk import Desk, Place

Kind: TypeAlias = Literal["instant", "read", "write"]
"""How a verb runs: "instant" needs no model and runs at once; "read" and "write" wait for their
turn with the model, and "write" changes the workspace or files."""

Worker: TypeAlias = Literal["workbench", "campaign"]
"""Which worker runs a verb: the one that has the workbench, or the one for campaigns."""


@dataclass(frozen=True)
class Answer:
    """What a verb gives.

    Attributes:
        result: The JSON document, as the command prints it with --json.
        tables: The same for people.
        charts: The pictures of it.
        notes: Sentences that explain the result.
        warnings: Sentences that the reader must not miss.
        view: What the template of the page needs besides; plain values or records.
        failed: Whether the verb ran and said no, as a gate does. A page says so in red.
    """

    result: Mapping[str, Any]
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    view: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False


A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True)
class Verb(Generic[A]):
    """One thing that studio does.

    Attributes:
        name: Its name in addresses and in the API, as the command's where there is one.
        title: Its name on pages.
        summary: One sentence: what it does.
        arguments: The class of its arguments.
        run: Does it. Called in a worker, except for the kind "instant".
        python: Returns the Python program that does the same, and prints the result as JSON.
        command: Returns the lines of shell that do the same; the last one is the command.
        kind: How it runs.
        worker: Which worker runs it.
        cached: Whether a reading verb's answer is given again while the workspace stays as it is.
        template: The template in the folder `answers` that shows its answer.
        button: What the button of its form says.
        needs_form: Whether the page waits for the user's input. False: it runs as it is opened.
        depends: Returns what else decides a cached answer, such as files outside the workspace.
        options: Returns what the fields of the form offer, where that depends on the workspace.
        disabled: Returns why fields cannot be used now, by their names; "" names the whole form.
        examples: Returns arguments to begin with, each after a few words.
    """

    name: str
    title: str
    summary: str
    arguments: type[A]
    run: Callable[[Desk, A, Progress], Answer]
    python: Callable[[A, Place], str]
    command: Callable[[A, Place], list[str]]
    kind: Kind = "read"
    worker: Worker = "workbench"
    cached: bool = True
    template: str = "answer.html"
    button: str = "Run"
    needs_form: bool = True
    depends: Callable[[], Hashable] | None = None
    options: Callable[[Desk], Mapping[str, Sequence[Any]]] | None = None
    disabled: Callable[[Desk, Mapping[str, Any]], Mapping[str, str]] | None = None
    examples: Callable[[Desk], Sequence[tuple[str, A]]] | None = None
