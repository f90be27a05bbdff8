"""Text that the model writes itself: contexts for keys, and a corpus where there is none.

sample(lm, count=20, length=10, top_k=5, seed=0)       # 20 strings of 10 tokens
own_text(lm, n_tokens=8000, seed=0)                    # strings with about that many tokens
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import DynamicCache

from ..core.checks import check_count
from ..core.errors import InputError
from .language_model import LanguageModel
from .turns import asking

_ROWS, _LENGTH = 64, 64
"""Strings that `own_text` samples together, and their tokens: sentences, not words."""


@asking()
def sample(
    lm: LanguageModel,
    count: int,
    length: int,
    *,
    top_k: int | None = None,
    seed: int = 0,
    openings: Sequence[str] | None = None,
    apart: bool = False,
) -> list[list[int]]:
    """Sample `count` lists of `length` token ids in one batch, without special tokens.

    The same model, arguments and seed give the same ids.

    Args:
        lm: The model.
        count: Number of lists.
        length: Tokens in each.
        top_k: Sample among this many likeliest tokens. None: among all.
        seed: The seed.
        openings: `count` texts to begin with, cut at `length` tokens. None: begin with the start
            token, which is not returned.
        apart: Draw for each opening by itself, whatever else is in the batch.

    Raises:
        InputError: The tokenizer has neither BOS nor EOS to start from.
    """
    tokenizer = lm.tokenizer
    start = next(
        (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None
    )
    if start is None:
        raise InputError(
            f"{lm.name} has neither a BOS nor an EOS token to start a text with; give contexts or "
            "texts"
        )
    seed = check_count(seed, "seed", least=-(2**63), below=2**63)
    sampler = torch.Generator().manual_seed(seed)
    samplers = [
        torch.Generator().manual_seed(zlib.crc32(f"{seed} {text}".encode()))
        for text in (openings or () if apart else ())
    ]
    special = [i for i in tokenizer.all_special_ids if i is not None]
    cache = DynamicCache() if lm.caches_prefix else None
    given = [
        lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in openings or [""] * count
    ]
    sequences = [[start] for _ in range(count)]
    for column in range(length):
        batch = lm.align(sequences, [column] * count)
        logits = (
            lm.forward(batch, start=0 if cache is None else column, cache=cache)
            .logits[:, -1]
            .float()
            .cpu()
        )
        logits[:, special] = -torch.inf
        top = logits.topk(top_k or logits.shape[-1])
        if samplers:
            # The largest of logits with Gumbel noise follows their softmax.
            noise = torch.stack(
                [
                    torch.rand(top.values.shape[-1], generator=generator, dtype=torch.float32)
                    for generator in samplers
                ]
            )
            picked = (top.values - (-noise.clamp(1e-20, 1 - 1e-7).log()).log()).argmax(
                -1, keepdim=True
            )
        else:
            picked = torch.multinomial(top.values.softmax(-1), 1, generator=sampler)
        for ids, opening, token in zip(
            sequences, given, top.indices.gather(1, picked)[:, 0].tolist(), strict=True
        ):
            ids.append(opening[column] if column < len(opening) else token)
    return [ids[1:] for ids in sequences]


def own_text(
    lm: LanguageModel,
    n_tokens: int,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Return strings that the model writes itself, with about `n_tokens` tokens in all.

    They stand in for a corpus in `second_moments`. What the model writes is what its neurons are
    used for, so it weighs a change much as the model's training text would.

    Args:
        lm: The model.
        n_tokens: About how many tokens.
        seed: The seed.
        progress: Called with the number of tokens done, after every batch.

    Raises:
        InputError: The tokenizer has neither BOS nor EOS to start from.
    """
    length = min(_LENGTH, (lm.max_tokens or _LENGTH) - 1)
    rows = min(_ROWS, math.ceil(n_tokens / length))
    texts: list[str] = []
    while len(texts) * length < n_tokens:
        texts += [
            lm.tokenizer.decode(ids) for ids in sample(lm, rows, length, seed=seed + len(texts))
        ]
        if progress is not None:
            progress(len(texts) * length)
    return texts
