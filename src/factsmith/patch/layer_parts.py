"""Trial edits at several layers in parts, which an executor may run on many machines.

    targets = search_at_layers(lm, config, contexts, chunks, layers)     # {layer: targets by chunk}
    trials = judge_edits(lm, edits)                                      # of each list of edits

A part is some of the facts at one layer. How they are cut does not depend on the workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.executor import executor_in_use, report_done
from ..core.fact import Fact
from ..edit.configs import RomeConfig
from ..edit.delta import Delta, applied
from ..edit.search import find_targets
from ..edit.target import Targets
from ..model.language_model import LanguageModel
from .layer_choice import Trial
from .trial_facts import judge


def search_at_layers(
    lm: LanguageModel,
    config: RomeConfig,
    contexts: Sequence[str],
    chunks: Sequence[Sequence[Fact]],
    layers: Sequence[int],
    progress: Callable[[int], object] | None = None,
) -> dict[int, list[Targets]]:
    """Search targets at several layers, and return them by layer, for each chunk of facts.

    Args:
        lm: The model.
        config: The settings of the edits.
        contexts: Templates with `{}` for the prompt.
        chunks: The facts. Those of a chunk are searched together.
        layers: The layers.
        progress: Called with the number of targets done.
    """
    parts = [(layer, chunk) for layer in layers for chunk in chunks]
    task = _Search(lm, config, list(contexts))
    targets = list(executor_in_use().map(task, parts, progress=progress))
    n = len(chunks)
    return {
        layer: [each.to(lm.device) for each in targets[i * n : (i + 1) * n]]
        for i, layer in enumerate(layers)
    }


def judge_edits(
    lm: LanguageModel,
    edits: Sequence[Sequence[Delta]],
    progress: Callable[[int], object] | None = None,
) -> list[list[Trial]]:
    """Return how each edit of one fact holds.

    Args:
        lm: The model.
        edits: The edits. Each list is one part.
        progress: Called with the number of edits done.
    """
    return list(executor_in_use().map(_Judge(lm), edits, progress=progress))


@dataclass(frozen=True)
class _Search:
    """Searches the targets of some facts at one layer.

    Attributes:
        lm: The model.
        config: The settings of the edits.
        contexts: Templates with `{}` for the prompt.
    """

    lm: LanguageModel
    config: RomeConfig
    contexts: list[str]

    def __call__(self, part: tuple[int, Sequence[Fact]]) -> Targets:
        """Search, and return the targets on the CPU."""
        layer, facts = part
        config = dataclasses.replace(self.config, layer=layer)
        targets = find_targets(self.lm, facts, layer, config, self.contexts, progress=report_done)
        return targets.to("cpu")


@dataclass(frozen=True)
class _Judge:
    """Judges edits, each carried for a moment.

    Attributes:
        lm: The model.
    """

    lm: LanguageModel

    def __call__(self, edits: Sequence[Delta]) -> list[Trial]:
        """Return how each edit holds."""
        trials = []
        for done, delta in enumerate(edits, start=1):
            with applied(self.lm, delta):
                trials.append(judge(self.lm, delta.facts[0]))
            report_done(done)
        return trials
