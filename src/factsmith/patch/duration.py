"""How long the search for targets will take, from one timed forward pass.

seconds_to_search(lm, facts[:4], n_contexts=6, steps=80)     # seconds for one fact
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..core.fact import Fact
from ..edit.configs import EditConfig, SpreadConfig
from ..edit.contexts import CONTEXTS, OPENINGS
from ..model.language_model import LanguageModel


def seconds_to_search(
    lm: LanguageModel, facts: Sequence[Fact], *, n_contexts: int, steps: int
) -> float:
    """Estimate how long the search for one fact's target takes, in seconds.

    A step of Adam is a forward pass and a backward one of twice its work, in every context. Most
    searches end at a third of their steps. `TargetConfig.passes` counts this for both searches.

    Args:
        lm: The model.
        facts: A few of the facts.
        n_contexts: The contexts that each is searched in.
        steps: Forward passes that take as long as a search: the settings' `passes`.
    """
    if not facts:
        return 0.0
    asked = [
        (fact.text, fact.target or fact.target_true or "?")
        for fact in facts
        for _ in range(n_contexts)
    ]
    lm.log_prob([asked[0][0]], [asked[0][1]])  # a model's first pass takes longer than the others
    began = time.perf_counter()
    lm.log_prob([text for text, _ in asked], [target for _, target in asked])
    return (time.perf_counter() - began) / len(facts) * steps


def seconds_to_solve(lm: LanguageModel, config: EditConfig | None, facts: Sequence[Fact]) -> float:
    """Estimate how long the search for targets takes, from one timed forward pass over a few facts.

    Args:
        lm: The model.
        config: The method's settings. None: nothing is searched.
        facts: The facts to write.
    """
    if config is None:
        return 0.0
    openings = isinstance(config, SpreadConfig) or config.draws_on == "inputs"
    n_contexts = len(OPENINGS) + 1 if openings else 1 + sum(count for _, count in CONTEXTS)
    some, steps = facts[:4], config.passes
    return len(facts) * seconds_to_search(lm, some, n_contexts=n_contexts, steps=steps)
