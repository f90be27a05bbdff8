"""The oracles of `patch.py`: a plain loop that searches v_star, and the least work of a search.

v_star = plain(lm, fact, layer, config, contexts, site)
work = multiply_adds(lm, facts, layer, config, contexts)
seconds = sum(work.values()) / gemm_rate()
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factsmith.core.fact import Fact
from factsmith.edit.keys import Site
from factsmith.edit.target import TargetConfig
from factsmith.model.language_model import LanguageModel
from factsmith.model.subject import subject_span
from factsmith.model.tokens import encode, target_ids


def plain_search(
    module: nn.Module,
    site: nn.Module,
    rows: Sequence[Sequence[int]],
    places: Sequence[int],
    target: Sequence[int],
    config: TargetConfig,
) -> tuple[Tensor, float]:
    """Return v_star of one fact and the last loss, by whole passes: ROME, equation 4.

    Args:
        module: The model.
        site: The part with the output that δ is added to.
        rows: Token ids of each context, followed by the target's tokens without the last. The bare
            prompt is first. The guard's ids are the last row.
        places: The column of the subject's last token in each row.
        target: The target's tokens.
        config: How the search runs.
    """
    device = next(module.parameters()).device
    width = max(map(len, rows))
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=device)
    at, each = torch.tensor(places, device=device), torch.arange(len(rows), device=device)
    initial: list[Tensor] = []
    delta: Tensor | None = None

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal delta
        states = output[0] if isinstance(output, tuple) else output
        initial.append(states[0, at[0]].detach().float())
        if delta is None:
            delta = torch.zeros_like(initial[0], requires_grad=True)
        changed = states.index_put(
            (each, at), delta.to(states).expand(len(rows), -1), accumulate=True
        )
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = site.register_forward_hook(add)
    first, adam = None, None
    for step in range(config.steps):
        log_p = (
            module(input_ids=tokens, attention_mask=mask, use_cache=False)
            .logits.float()
            .log_softmax(-1)
        )
        assert delta is not None
        adam = adam or torch.optim.Adam([delta], lr=config.lr)
        last = [len(ids) - len(target) for ids in rows[:-1]]
        nll = torch.stack(
            [-log_p[r, last[r] + i, t] for r in range(len(last)) for i, t in enumerate(target)]
        ).mean()
        guard = log_p[-1, at[-1]]
        first = guard.detach() if first is None else first
        loss = nll + config.kl_factor * torch.nn.functional.kl_div(
            first, guard, log_target=True, reduction="sum"
        )
        loss = loss + config.weight_decay * delta.norm() / initial[0].norm() ** 2
        if step == config.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= (config.clamp * initial[0].norm() / delta.norm()).clamp(max=1)
    handle.remove()
    assert delta is not None
    return initial[0] + delta.detach(), loss.item()


def plain(
    lm: LanguageModel,
    fact: Fact,
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
    site: Site,
) -> Tensor:
    """Run `plain_search` with the ids and modules of a model."""
    target = target_ids(lm.tokenizer, fact.text, str(fact.target))
    texts = [*(c.replace("{}", fact.text) for c in contexts), f"{fact.subject} is a"]
    ids = [encode(lm.tokenizer, text)[0] for text in texts]
    places = [subject_span(lm, text, fact.subject)[1] - 1 for text in texts]
    rows = [*(x + target[:-1] for x in ids[:-1]), ids[-1]]
    module = lm.ffn[layer].down if site == "ffn" else lm.layers[layer]
    return plain_search(lm.module, module, rows, places, target, config)[0]


def multiply_adds(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
) -> dict[str, float]:
    """Return the multiply-adds of the floor, by part: "prefix", "below", "above" and "logits"."""
    weights = [sum(p.numel() for p in module.parameters() if p.dim() == 2) for module in lm.layers]
    head = lm.module.get_output_embeddings().weight.numel()
    prefixes: set[tuple[int, ...]] = set()
    live, read = 0, 0
    for fact in facts:
        target = target_ids(lm.tokenizer, fact.text, str(fact.target))
        seen: set[tuple[int, ...]] = set()
        for text in (*(c.replace("{}", fact.text) for c in contexts), fact.subject):
            ids, _ = encode(lm.tokenizer, text)
            place = subject_span(lm, text, fact.subject)[1] - 1
            prefixes |= {tuple(ids[: i + 1]) for i in range(place)}
            is_guard = text == fact.subject
            # A prompt that begins with the subject serves as the guard too.
            if not (is_guard and tuple(ids) in seen):
                live += len(ids) - place + (0 if is_guard else len(target) - 1)
            seen.add(tuple(ids[: place + 1]))
            read += 1 if is_guard else len(target)
    passes = 2 * config.steps - 1
    return {
        "prefix": float(len(prefixes) * sum(weights)),
        "below": float(live * sum(weights[: layer + 1])),
        "above": float(passes * live * sum(weights[layer + 1 :])),
        "logits": float(passes * read * head),
    }


def gemm_rate() -> float:
    """Return the multiply-adds in a second of one thread in large products, the best of three."""
    matrix = torch.randn(2048, 2048)
    times = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(2):
            matrix @ matrix
        times.append((time.process_time() - start) / 2)
    return float(2048**3 / min(times))
