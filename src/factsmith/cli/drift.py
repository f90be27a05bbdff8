"""Drift: what a patch does to everything else."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..core.checks import check_number
from ..core.errors import InputError, NumericsError
from ..core.tables import visible
from ..corpus.own import texts_of
from ..keep.ledger import Ledger
from .models import need_model, opened, workspace_of
from .options import Device, Json, Model, Seed, Where
from .printing import complain_of, print_result
from .waiting import progress

SavedDelta = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A saved delta; without one all patches of the workspace."),
]

DriftLimits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Exit with code 4 if this measure is larger: kl_text, kl_text_worst, kl_facts, "
        "changed_share or perplexity. May be repeated.",
    ),
]

DriftTexts = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Plain text to compare on; may be repeated.",
        show_default="the model's own",
    ),
]


def drift(  # house: Typer reads one parameter for each option
    model: Model = None,
    delta: SavedDelta = None,
    limit: DriftLimits = None,
    texts: DriftTexts = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="How much of it.")] = 2000,
    facts: Annotated[int, typer.Option(min=0, help="How many unrelated facts to ask.")] = 200,
    seed: Seed = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure what a patch does to everything else.

    It is compared on prose and on unrelated facts, against limits.

    \b
    Examples:
      factsmith drift -w my-workspace \\
          --limit kl_text=0.05 --limit changed_share=0.02
      factsmith drift atlas --delta my-delta
    """
    need_model(model, workspace)
    corpus = texts_of(texts)
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(progress())
        tell("checking the arguments", 0, None)
        limits = _limits(limit or [])
        saved = _saved(delta, workspace_of(model, workspace))
        lm, bench = stack.enter_context(opened(model, workspace, device, tell))
        from ..patch.drift import drift_of_saved

        options: dict[str, Any] = {
            "texts": corpus,
            "max_tokens": max_tokens,
            "n_facts": facts,
            "seed": seed,
            "progress": tell,
        }
        if saved is None:
            assert bench is not None  # `_saved` looked
            measured = bench.drift(**options)
        else:
            measured = drift_of_saved(lm, saved, **options)
    broken = measured.exceeded(**limits)
    result = {**measured.to_dict(), "model": lm.name, "exceeded": list(broken)}
    print_result(result, [*measured.tables(), *(_broken(words) for words in broken)], as_json)
    if broken:
        complain_of(NumericsError, "; ".join(broken), NumericsError.exit_code, argument="limit")
        raise typer.Exit(NumericsError.exit_code)


def _saved(folder: Path | None, workspace: Path | None) -> Any:
    """Return the saved delta; None for the patches of the workspace, of which there must be one."""
    if folder is not None:
        from ..patch.drift import saved_change

        return saved_change(folder)
    if workspace is None:
        raise InputError(
            "there is nothing to measure; name a saved delta with --delta, "
            "or a workspace with --workspace"
        )
    with Ledger(workspace) as ledger:
        if not ledger.active():
            raise InputError(
                "the workspace carries no patch, so nothing can have drifted; `factsmith log` "
                "lists the patches"
            )
    return None


def _broken(limit: str) -> Text:
    """Return a line about a limit that is broken."""
    return Text.assemble("limit: ", (visible(limit), "bold red"))


def _limits(pairs: list[str]) -> dict[str, float]:
    """Return {"kl_text": 0.05} for kl_text=0.05."""
    from ..judge.drift import check_limits

    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        name = name.strip()
        if name in limits:
            raise InputError(f"--limit gives {name} twice; leave one out")
        try:
            limits[name] = check_number(float(value), f"the limit of {name}", least=0)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"--limit is {pair!r}; give NAME=VALUE, such as kl_text=0.05"
            ) from None
    return check_limits(limits)
