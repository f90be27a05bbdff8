"""Read: what a model says."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .common import Device, Json, ModelAndPrompt, Where, line, model_and_prompt, opened, print_result, progress


def ask(
    words: ModelAndPrompt,
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
    model, prompt = model_and_prompt(words)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
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
        line(console, prompt, answer, style="bold")
        for token, p in likely:
            line(console, f"  {p:7.2%}", repr(token))

    print_result(found, show, as_json)
