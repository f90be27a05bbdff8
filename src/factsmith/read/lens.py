"""The logit lens: what the model would say after each layer, at each token of a prompt.

    read = lens(lm, "The currency of Bulgaria is the")
    read.says[3][-1]               # the likeliest token after layer 2, at the prompt's last token
    read.settled[-1]               # the state from which the final answer stays the likeliest token
    read.probabilities[:, -1]      # the answer's probability, from the embedding up

State 0 is the embedding, and state k is the stream after layer k - 1. Each state goes through the
model's own final norm and unembedding (nostalgebraist 2020; Geva et al. 2022, arXiv 2203.14680).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count
from ..core.tables import Shown, Table, quoted
from ..model.language_model import LanguageModel, check_model
from ..model.replay import record
from ..model.tokens import target_ids
from ..model.turns import asking

_HEAD_ROWS = 256
"""States read through the unembedding at a time: logits are the largest tensors of all."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Lens(Shown):
    """What a model with L layers would say after each layer, at each of S tokens.

    Attributes:
        prompt: The text.
        tokens: Its tokens, as text.
        target: The token that is followed, as text.
        target_id: Its id.
        top_ids: (L + 1, S, k) int64, the likeliest tokens, likeliest first.
        top_probabilities: (L + 1, S, k) float32, their probabilities.
        words: {id: text} of every token among them.
        ranks: (L + 1, S) int64, the rank of the target. 0 is the likeliest token.
        probabilities: (L + 1, S) float32, the probability of the target.
        settled: (S,) int64, the first state from which the likeliest token stays the final one.
        model: The name that the model was loaded by.
    """

    prompt: str
    tokens: tuple[str, ...]
    target: str
    target_id: int
    top_ids: Tensor
    top_probabilities: Tensor
    words: dict[int, str]
    ranks: Tensor
    probabilities: Tensor
    settled: Tensor
    model: str

    @property
    def says(self) -> list[list[str]]:
        """The likeliest token of each state, at each token of the prompt."""
        return [[self.words[i] for i in row] for row in self.top_ids[:, :, 0].tolist()]

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.top_ids) - 1

    def likeliest(self, state: int, position: int) -> list[tuple[str, float]]:
        """Return the likeliest tokens of one state with their probabilities, likeliest first."""
        ids, p = self.top_ids[state, position], self.top_probabilities[state, position]
        return [(self.words[i], q) for i, q in zip(ids.tolist(), p.tolist(), strict=True)]

    def tables(self) -> list[Table]:
        """Return what each layer says at the last token, and from where each answer stays."""
        up = [
            (
                state_name(state),
                repr(says[-1]),
                f"{self.likeliest(state, -1)[0][1]:z.1%}",
                f"{int(self.ranks[state, -1]) + 1:,}",
                f"{float(self.probabilities[state, -1]):z.1%}",
                quoted([token for token, _ in self.likeliest(state, -1)[1:]]),
            )
            for state, says in enumerate(self.says)
        ]
        answer = self.target.strip()
        columns = {
            "after": "<",
            "says": "<",
            "p": ">",
            f"rank of {answer!r}": ">",
            f"p({answer})": ">",
            "then": "<",
        }
        each = [
            (token, repr(says), f"{p:z.1%}", state_name(state))
            for token, says, p, state in zip(
                self.tokens,
                self.says[-1],
                self.top_probabilities[-1, :, 0].tolist(),
                self.settled.tolist(),
                strict=True,
            )
        ]
        stays = f"the model says {self.says[-1][-1].strip()!r}, the same from "
        return [
            Table(f"{self.prompt}: {stays}{state_name(int(self.settled[-1]))} on", columns, up),
            Table(
                "what the model says after each token",
                {"token": "<", "next": "<", "p": ">", "the same from": "<"},
                each,
            ),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return the map as a table: one row for each token and state.

        The layer of the embedding is None.
        """
        return [
            {
                "column": t,
                "token": token,
                "layer": None if state == 0 else state - 1,
                "says": self.likeliest(state, t)[0][0],
                "probability": self.likeliest(state, t)[0][1],
                "target_rank": int(self.ranks[state, t]),
                "target_probability": float(self.probabilities[state, t]),
                "settled": state >= int(self.settled[t]),
            }
            for t, token in enumerate(self.tokens)
            for state in range(self.n_layers + 1)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values. States are numbered from the embedding up."""
        return {
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "target": self.target,
            "target_id": self.target_id,
            "states": [
                [
                    {
                        "likeliest": [
                            {"token": token, "probability": p}
                            for token, p in self.likeliest(state, t)
                        ],
                        "target_rank": int(self.ranks[state, t]),
                        "target_probability": float(self.probabilities[state, t]),
                    }
                    for t in range(len(self.tokens))
                ]
                for state in range(self.n_layers + 1)
            ],
            "settled": self.settled.tolist(),
            "model": self.model,
        }


def state_name(state: int) -> str:
    """Return the name of a state: "the embedding", or "layer 3"."""
    return "the embedding" if state == 0 else f"layer {state - 1}"


@asking()
def lens(lm: LanguageModel, prompt: str, *, target: str | None = None, top: int = 5) -> Lens:
    """Read every state of a prompt as tokens.

    Args:
        lm: The model.
        prompt: The text.
        target: Text whose first token is followed. None: the model's own most likely next token.
        top: Number of tokens to keep for each state.

    Raises:
        InputError: when the prompt or the target has no token, or `top` is below 1.
    """
    check_model(lm)
    top = min(check_count(top, "top", "the number of tokens of each state"), lm.vocabulary)
    batch = lm.batch([prompt])
    states = torch.stack([hidden[0] for hidden in record(lm, batch).hidden])  # (L + 1, S, d_model)
    wanted = None if target is None else target_ids(lm, prompt, target)[0]
    if wanted is None:
        wanted = int(lm.head(states[-1, -1:]).argmax())
    parts = [_read(lm, part, wanted, top) for part in torch.split(states.flatten(0, 1), _HEAD_ROWS)]
    shape = states.shape[:2]
    ids, p, ranks, chances = (
        torch.cat(each).reshape(*shape, *each[0].shape[1:]) for each in zip(*parts, strict=True)
    )
    prompt_ids = batch.input_ids[0].tolist()
    return Lens(
        prompt=prompt,
        tokens=tuple(lm.tokenizer.decode([i]) for i in prompt_ids),
        target=lm.tokenizer.decode([wanted]),
        target_id=wanted,
        top_ids=ids,
        top_probabilities=p,
        words={i: lm.tokenizer.decode([i]) for i in torch.unique(ids).tolist()},
        ranks=ranks,
        probabilities=chances,
        settled=settled_from(ids[:, :, 0]),
        model=lm.name,
    )


def settled_from(likeliest: Tensor) -> Tensor:
    """Return the first state from which each column keeps its last value.

    Takes (states, S) and returns (S,).
    """
    differs = likeliest != likeliest[-1]
    last = torch.arange(1, len(likeliest) + 1)[:, None] * differs
    return last.amax(0)


@torch.no_grad()
def _read(
    lm: LanguageModel, states: Tensor, wanted: int, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the likeliest tokens (n, k), their probabilities, and rank and p of one token (n,)."""
    p = lm.head(states).float().softmax(-1)
    best, of_wanted = p.topk(top), p[:, wanted]
    ranks = (p > of_wanted[:, None]).sum(1)
    return best.indices.cpu(), best.values.cpu(), ranks.cpu(), of_wanted.cpu()
