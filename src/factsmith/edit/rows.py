"""What both searches for v_star work on: the questions of a batch as rows of recorded passes.

A batch holds a row for each fact in each context, and one for each fact's guard. The last token of
the subject is in the same column of all rows of a pass. The columns before it do not change, so
they live in the key/value cache. The layers up to the edited one do not change either. So an
evaluation runs only the layers above, on the columns from the subject on, and reads logits only
where a target token is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import NumericsError
from ..model.language_model import LanguageModel
from ..model.replay import Replay, record
from .keys import Site, read_down
from .questions import Places, Question, log_probs_without_subject
from .target import TargetConfig, Targets


class RecordedRows:
    """The rows of a batch of questions, recorded up to the edited layer.

    Attributes:
        questions: The questions of the batch.
        passes: The recorded passes, each with the numbers of its rows in ascending order.
        without: For each fact to forget, what the model says without the subject.
        places: Where the answers are read, counted in all rows of the batch.
        keys: (n, n_contexts, d_ff) the coefficients at the subject token.
        k_prompt: (n, d_ff) those of the bare prompt.
        ffn_initial: (n, d_model) the output of the down-projection on the bare prompt.
        v_initial: (n, d_model) v₀, the output at the site on the bare prompt.
        length: (n,) the norm of the stream after the layer.
        rate: (n,) the learning rate of a coordinate.
        decay: (n,) the factor of ‖δ‖ in the loss.
        limit: (n,) the largest ‖δ‖.
        v_star: (n, d_model) the targets, v₀ until a question is done.
        bare: The index of the context "{}".
        convergence: How each question's search ended.
    """

    def __init__(
        self,
        lm: LanguageModel,
        questions: Sequence[Question],
        layer: int,
        config: TargetConfig,
        site: Site,
        bare: int,
    ) -> None:
        """Record the passes and read what the layer gives today.

        Args:
            lm: The model.
            questions: The questions of the batch.
            layer: The layer where δ is added.
            config: How the search runs.
            site: The place in the layer.
            bare: The index of the context "{}".
        """
        self.questions, self.layer, self.config = questions, layer, config
        self.site, self.bare = site, bare
        sequences = [ids for question in questions for ids in question.sequences]
        pivots = [pivot for question in questions for pivot in question.pivots]
        self.passes: list[tuple[Replay, list[int]]] = []
        for rows in self.groups(lm, list(zip(map(len, sequences), pivots, strict=True))):
            batch = lm.align([sequences[row] for row in rows], [pivots[row] for row in rows])
            self.passes.append((record(lm, batch, start=batch.pivot, until=layer + 1), rows))
        self.without = [log_probs_without_subject(lm, question) for question in questions]
        self.places = Places.of(questions, self.without, self.passes[0][0].batch.input_ids.device)
        keys, outputs, streams = self.read_site()
        contexts, prompts = self.places.contexts, self.places.contexts[:, bare]
        self.keys = keys[contexts.to(keys.device)]
        self.k_prompt = self.keys[:, bare]
        self.ffn_initial = outputs[prompts.to(outputs.device)]
        stream = streams[prompts.to(streams.device)].float()
        self.v_initial = stream if site == "stream" else self.ffn_initial
        self.length = stream.norm(dim=-1)
        self.rate, self.decay, self.limit = _scales(config, self.v_initial, stream)
        self.v_star = self.v_initial.clone()
        self.convergence: list[dict[str, Any]] = [{} for _ in questions]

    def groups(self, lm: LanguageModel, lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Return the rows of each recorded pass, in ascending order: all of them in one.

        Args:
            lm: The model.
            lengths: Each row's number of tokens, and the column of its subject token.
        """
        return [list(range(len(lengths)))]

    def read_site(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's key, output of the down-projection and stream at the subject token."""
        parts = [
            (*read_down(replay, self.layer), replay.hidden[self.layer + 1][:, 0])
            for replay, _ in self.passes
        ]
        order = torch.tensor([row for _, rows in self.passes for row in rows]).argsort()
        keys, outputs, streams = (torch.cat(each) for each in zip(*parts, strict=True))
        keys, outputs, streams = (each[order.to(each.device)] for each in (keys, outputs, streams))
        return keys, outputs, streams

    def check_finite(self, loss: Tensor, numbers: Sequence[int], step: int) -> None:
        """Raise NumericsError if the loss of a question is not finite.

        Args:
            loss: (m,) the losses.
            numbers: The questions that they belong to.
            step: The number of the evaluation.
        """
        finite = torch.isfinite(loss)
        if not finite.all():
            pairs = zip(numbers, finite.tolist(), strict=True)
            subjects = [self.questions[i].fact.subject for i, good in pairs if not good]
            raise NumericsError(
                f"the loss of {subjects} is not finite at step {step}. Lower lr, or check the "
                "model's weights for NaN.",
                argument="lr",
            )

    def note(self, i: int, step: int, numbers: dict[str, float], stopped: str) -> None:
        """Store how the search for question i ended."""
        self.convergence[i] = {"steps": step, **numbers, "stopped": stopped}
        if left_out := self.questions[i].left_out:
            self.convergence[i]["contexts_left_out"] = left_out

    def report(self, progress: Callable[[int], object] | None) -> None:
        """Report how many questions are done."""
        if progress is not None:
            progress(sum(map(bool, self.convergence)))

    def targets(self) -> Targets:
        """Return the targets of all questions."""
        return Targets(
            v_star=self.v_star,
            v_initial=self.v_initial,
            k_star=self.keys.mean(1),
            k_prompt=self.k_prompt,
            ffn_initial=self.ffn_initial,
            convergence=tuple(self.convergence),
            facts=tuple(question.fact for question in self.questions),
            layer=self.layer,
            site=self.site,
        )


def _scales(
    config: TargetConfig, v_initial: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each fact's learning rate, factor of ‖δ‖ in the loss, and largest ‖δ‖, each (n,).

    Args:
        config: The settings.
        v_initial: (n, d_model) v₀.
        stream: (n, d_model) the layer's output at the subject, which δ has to outweigh.
    """
    if config.scale == "paper":
        norm = v_initial.norm(dim=-1)
        return torch.full_like(norm, config.lr), config.weight_decay / norm**2, config.clamp * norm
    norm = stream.norm(dim=-1)
    limit = config.clamp * norm / 2
    return config.lr * norm / stream.shape[-1] ** 0.5, config.weight_decay / (10 * limit), limit
