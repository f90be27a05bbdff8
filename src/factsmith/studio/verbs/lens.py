"""The room Lens: what the model would say after each layer, at each token.

LENS        the logit lens of one text
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ...core.gap import gap_notes
from ...core.progress import Progress
from ...read.lens import lens
from ...show.charts.predictions import answer_line, lens_map
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import call, command, literal, program
from .fields import PROMPT, OptionalText, Text, naming, prompts_for
from .trace import AtArguments


class LensArguments(Source):
    """What to read through the lens."""

    prompt: Text = Field(
        title="Prompt",
        description="The text. Each of its tokens is read after each layer.",
        json_schema_extra=PROMPT,
    )
    target: OptionalText = Field(
        default="",
        title="Answer",
        description="The answer whose rank is followed. Empty: what the model says.",
    )
    top: int = Field(
        default=5,
        ge=1,
        le=50,
        title="Tokens",
        description="How many of the likeliest tokens to keep for each state.",
        json_schema_extra={"advanced": True},
    )


def _run_lens(desk: Desk, arguments: LensArguments, tell: Progress) -> Answer:
    """Read every state of a text as tokens."""
    with desk.reading(arguments, tell) as lm, naming("prompt"):
        read = lens(lm, arguments.prompt, target=arguments.target or None, top=arguments.top)

    def neurons_at(row: Mapping[str, Any]) -> str:
        if row["layer"] is None:
            return ""
        return AtArguments(
            prompt=arguments.prompt,
            layer=int(row["layer"]),
            position=int(row["column"]),
            model=arguments.model,
            revision=arguments.revision,
        ).address("/trace/at")

    return Answer(
        read.to_dict(),
        read.tables(),
        [lens_map(read).linked(neurons_at), answer_line(read)],
        warnings=gap_notes([arguments.prompt]),
    )


def _lens_python(arguments: LensArguments, place: Place) -> str:
    """Return the program that reads the same."""
    read = call(
        "read = fs.lens",
        "lm",
        literal(arguments.prompt),
        target=arguments.target,
        top=arguments.top,
    )
    return program(arguments, place, [read, "print(json.dumps(read.to_dict()))"])


def _lens_command(arguments: LensArguments, place: Place) -> list[str]:
    """Return the command that reads the same."""
    options = {"--target": arguments.target, "--top": arguments.top}
    return command(arguments, place, "lens", [arguments.prompt], options)


def lens_examples(desk: Desk) -> list[tuple[str, LensArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    return [(prompt, LensArguments(prompt=prompt)) for prompt in prompts_for(desk)]


LENS = Verb(
    "lens",
    "Lens",
    "See which token the model would say if it ended after each layer, at every token.",
    LensArguments,
    _run_lens,
    _lens_python,
    _lens_command,
    template="answers/lens.html",
    button="Read",
    examples=lens_examples,
)
