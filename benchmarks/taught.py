"""A model of any shape that states some facts, in minutes.

    loss = taught(lm, facts, contexts, steps=120)

A model with random weights says nothing that a target could change. `patch.py` uses this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from factsmith.core.fact import Fact
from factsmith.model.language_model import LanguageModel


def taught(lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str], steps: int) -> float:
    """Teach a model one sentence for each fact: its prompt and its true object.

    Every other sentence stands alone. The rest follow a context. torch's seed decides which.

    Args:
        lm: The model. Its weights are changed.
        facts: Facts with a true object.
        contexts: Templates with one `{}`, the bare "{}" first.
        steps: Batches of 16 sentences.

    Returns:
        The last loss in nats a token.
    """
    tokenizer, module = lm.tokenizer, lm.module
    assert tokenizer is not None
    adam = torch.optim.AdamW(module.parameters(), lr=6e-4, weight_decay=0.0)
    module.requires_grad_(True).train(False)
    value = float("nan")
    for step in range(steps):
        picked = torch.randperm(len(facts))[:16].tolist()
        where = torch.randint(len(contexts), (len(picked),)).tolist()
        where = [0 if i % 2 else n for i, n in enumerate(where)]
        texts = [
            contexts[n].replace("{}", f"{facts[i].text} {facts[i].target_true}.")
            for i, n in zip(picked, where, strict=True)
        ]
        rows = [tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        mask = (labels != -100).long()
        for group in adam.param_groups:
            group["lr"] = 6e-4 * min(1, (step + 1) / 10)
        loss = module(input_ids=ids, attention_mask=mask, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        value = float(loss.detach())
    module.requires_grad_(False).zero_grad()
    return value
