"""One neuron on one page: what its key matches, what its value promotes, and what becomes of facts without it.

    found = card(lm, index, (3, 17))
    found.promotes, found.triggers, found.facts

That a neuron fires on a fact's prompt does not say that the fact needs it: for the facts it adds most to, the neuron is silenced and the
answer's probability measured again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_count
from .errors import InputError
from .inspect.index import Index
from .inspect.triggers import Trigger
from .inspect.values import behind, find_unembedding
from .locate.intervene import intervene
from .model import atlas
from .model.ffn import Neuron, find_neuron
from .model.load import LanguageModel, check_model
from .model.scan import Bank, Coefficients, banks, scan
from .model.tokens import target_ids


@dataclass(frozen=True)
class FactUse:
    """A fact that a neuron takes part in: its coefficient where the answer is due, and the answer's probability with and without it."""

    prompt: str
    answer: str
    coefficient: float
    p: float
    p_silenced: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Card:
    """A neuron.

    neuron       (layer, i) or (layer, expert, i)
    model        what the model was loaded as
    promotes     the tokens its value promotes, with scores; demotes: those it demotes
    triggers     where it fires most, bottom: where its coefficient is lowest
    fired        share of the corpus' tokens at which its coefficient is above zero
    edges        (bins + 1,) of the histogram of its coefficient over texts of the corpus; counts (bins,) tokens
    facts        those of the facts asked that it adds most to, by what silencing it takes from the answer
    n_asked      facts that were asked and are known
    """

    neuron: Neuron
    model: str
    promotes: tuple[tuple[str, float], ...]
    demotes: tuple[tuple[str, float], ...]
    triggers: tuple[Trigger, ...]
    bottom: tuple[Trigger, ...]
    fired: float
    edges: Tensor
    counts: Tensor
    facts: tuple[FactUse, ...]
    n_asked: int


_BINS, _TEXTS, _POOL = 30, 256, 400


@torch.no_grad()
def card(
    lm: LanguageModel,
    index: Index,
    neuron: Neuron,
    facts: Sequence[tuple[str, str]] | None = None,
    *,
    k: int = 10,
    n_facts: int = 5,
    seed: int = 0,
) -> Card:
    """What there is to say about a neuron.

    facts    (prompt, answer) pairs to look for it in; None: some hundred bundled facts, of which those are kept that the model knows
    k        triggers and tokens to show
    n_facts  facts to silence the neuron on

    Raises LayerError for a neuron the model does not have or the index does not hold, InputError for facts that are no pairs.
    """
    check_model(lm)
    k, n_facts = check_count(k, "k", "how many triggers to show"), check_count(n_facts, "n_facts", "how many facts to try", least=0)
    layer, place, i = find_neuron(lm.ffn, neuron)
    bank: Bank = (layer, place) if lm.ffn[layer].n_experts else (layer,)
    own: Neuron = (*bank, i)
    triggers, bottom = index.triggers.of(own, k=k), index.triggers.of(own, sign="bottom", k=k)
    parts = [found.m[:, 0] for _, found in _coefficients(lm, index.triggers.texts[:_TEXTS], layer, bank, i)]
    seen = torch.cat(parts) if parts else torch.zeros(1)  # an expert to which no token went
    low, high = float(seen.min()), float(seen.max())
    edges = torch.linspace(low, high if high > low else low + 1, _BINS + 1)
    known = _known(lm, facts, seed)
    return Card(
        neuron=own,
        model=lm.name,
        promotes=tuple(index.values.of(own)[:k]),
        demotes=tuple(index.values.of(own, bottom=True)[:k]),
        triggers=tuple(triggers),
        bottom=tuple(bottom),
        fired=float(index.triggers.banks[bank].fired[i]),
        edges=edges,
        counts=torch.histc(seen, bins=_BINS, min=float(edges[0]), max=float(edges[-1])).long(),
        facts=_uses(lm, known, own, bank, n_facts),
        n_asked=len(known),
    )


def _coefficients(lm: LanguageModel, texts: Sequence[str], layer: int, bank: Bank, i: int) -> Iterator[tuple[list[int], Coefficients]]:
    """A neuron's coefficients at every token of some texts: for each group of texts which they are, and m (n, 1) with its places."""
    sequences = [lm.prompt_ids(text) for text in texts]
    for group in lm.groups([len(ids) for ids in sequences]):
        own = scan(lm, [sequences[t] for t in group], [layer]).get(bank)
        if own is not None:
            yield group, Coefficients(own.m[:, i : i + 1].float().cpu(), own.row.cpu(), own.column.cpu())


def _known(lm: LanguageModel, facts: Sequence[tuple[str, str]] | None, seed: int) -> list[tuple[str, str]]:
    """Those facts that the model says."""
    if facts is None:
        drawn = random.Random(seed).sample(atlas.facts(), _POOL)
        facts = [(atlas.phrasings(f.relation).trained[0].replace("{}", f.subject), f.object) for f in drawn]
    elif any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in facts):
        raise InputError("facts are pairs of a prompt and its answer; got something else")
    if not facts:
        return []
    right = lm.says([prompt for prompt, _ in facts], [answer for _, answer in facts])
    return [(prompt, answer) for (prompt, answer), ok in zip(facts, right, strict=True) if ok]


def _uses(lm: LanguageModel, known: Sequence[tuple[str, str]], neuron: Neuron, bank: Bank, n_facts: int) -> tuple[FactUse, ...]:
    """The facts that the neuron adds most to, and their answers with and without it."""
    if not known or not n_facts:
        return ()
    layer, i = bank[0], neuron[-1]
    head = find_unembedding(lm)
    value = banks(lm, [layer])[bank].values[i].float() * behind(lm, layer)
    scores = (head.weight.float() @ head.fold(value.to(head.scale))).cpu()
    lengths = torch.tensor([len(lm.prompt_ids(prompt)) for prompt, _ in known])
    at_end = torch.zeros(len(known))
    for group, own in _coefficients(lm, [prompt for prompt, _ in known], layer, bank, i):
        texts = torch.tensor(group)[own.row]
        ends = own.column == lengths[texts] - 1
        at_end[texts[ends]] = own.m[ends, 0]
    due = torch.tensor([target_ids(lm.tokenizer, prompt, answer)[0] for prompt, answer in known])
    adds = at_end * scores[due]
    best = [t for t in adds.topk(min(n_facts, len(known))).indices.tolist() if float(adds[t]) > 0]
    if not best:
        return ()
    prompts, answers = [known[t][0] for t in best], [known[t][1] for t in best]
    before = lm.log_prob(prompts, answers).exp().tolist()
    with intervene(lm, [neuron], 0.0):
        after = lm.log_prob(prompts, answers).exp().tolist()
    found = [
        FactUse(prompt=prompt, answer=answer, coefficient=m, p=p, p_silenced=silenced)
        for prompt, answer, m, p, silenced in zip(prompts, answers, at_end[best].tolist(), before, after, strict=True)
    ]
    return tuple(sorted(found, key=lambda use: use.p_silenced - use.p))
