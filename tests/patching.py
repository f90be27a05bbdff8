"""Plan and propose on a model without a workspace, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from factsmith.core.fact import Fact
from factsmith.model.language_model import LanguageModel
from factsmith.patch.bench import Scratch
from factsmith.patch.plan import plan
from factsmith.patch.proposal import Proposal, propose
from factsmith.patch.recipe import Recipe, Sources


def proposed(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    method: str | None = None,
    config: Any = None,
    *,
    force: bool = False,
    progress: Callable[..., object] | None = None,
    **drawn: Any,
) -> Proposal:
    """A proposal on a bare model; what is not named goes to Sources."""
    bench, sources = Scratch(lm), Sources(**drawn)
    options: dict[str, Any] = {"force": force, "progress": progress}
    decided = plan(bench, facts, Recipe(method, config), sources, **options)
    return propose(bench, decided, sources, **options)
