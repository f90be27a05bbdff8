"""Look inside one text: what each layer would say, which neurons fire, and what they do."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import WorkspaceError
from .models import need_model, opened
from .options import (
    Device,
    Json,
    ModelAndPrompt,
    NewTokens,
    NextTokens,
    Where,
    model_and_prompt,
    need_text,
)
from .printing import print_result
from .read import prompt_of
from .waiting import progress


def lens(
    words: ModelAndPrompt,
    target: Annotated[
        str | None,
        typer.Option(help="The answer whose rank to follow.", show_default="what the model says"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many tokens to keep for each state.")] = 5,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say what the model would say after each layer, at each token.

    This is the logit lens: each state is read as if it was the last one.

    \b
    Examples:
      factsmith lens atlas "The currency of Bulgaria is the"
      factsmith lens atlas "The currency of Bulgaria is the" --target euro
    """
    need_text(target, "--target")
    model, prompt = prompt_of(words, workspace)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        from ..read.lens import lens as read_lens

        read = read_lens(lm, prompt, target=target, top=top)
    print_result(read.to_dict(), read.tables(), as_json)


def at(
    words: ModelAndPrompt,
    layer: Annotated[int, typer.Option(min=0, help="The layer, counted from 0.")],
    position: Annotated[
        int,
        typer.Option("--token", metavar="N", help="The token, counted from 0; -1 is the last one."),
    ] = -1,
    top: Annotated[int, typer.Option(min=1, help="How many neurons to list.")] = 15,
    tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens of each neuron's value to list.")
    ] = 6,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """List the neurons that add most in one layer at one token.

    \b
    Example:
      factsmith at atlas "The currency of Bulgaria is the" \\
          --layer 1 --token 3
    """
    model, prompt = model_and_prompt(words)
    need_model(model, workspace, text=prompt, error=WorkspaceError)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        from ..read.token_neurons import token_neurons

        spot = token_neurons(lm, prompt, layer, position, top=top, tokens=tokens)
    print_result(spot.to_dict(), spot.tables(), as_json)


def intervene(  # house: Typer reads one parameter for each option
    words: ModelAndPrompt,
    neuron: Annotated[
        list[str],
        typer.Option(
            metavar='"LAYER I"',
            help="A neuron, such as '5 992'; with experts '5 1 992'. May be repeated.",
        ),
    ],
    factor: Annotated[
        float,
        typer.Option(help="What their coefficients are multiplied by: 0 silences, 2 doubles."),
    ] = 0.0,
    top: NextTokens = 10,
    max_new_tokens: NewTokens = 8,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Silence or amplify neurons, and compare what the model says.

    No weight changes.

    \b
    Examples:
      factsmith intervene atlas "The currency of Bulgaria is the" \\
          --neuron "5 992"
      factsmith intervene atlas "The currency of Bulgaria is the" \\
          --neuron "0 3" --neuron "0 17" --factor 2
    """
    model, prompt = prompt_of(words, workspace)
    with progress() as tell:
        tell("reading the neurons", 0, None)
        from ..model.address import neuron_of

        neurons = [neuron_of(text) for text in neuron]
        with opened(model, workspace, device, tell) as (lm, _):
            from ..read.intervention import ask_scaled

            tried = ask_scaled(lm, prompt, neurons, factor, top=top, max_new_tokens=max_new_tokens)
    print_result(tried.to_dict(), tried.tables(), as_json)
