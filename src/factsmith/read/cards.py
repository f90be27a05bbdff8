"""One neuron on a card: what its key matches, what its value promotes, and which facts need it.

    result = card(lm, index, (3, 17))
    result.promotes, result.triggers, result.facts
    result = find_card(lm, (3, 17))                # the same, with an index that is made if needed

A neuron that fires on a fact's prompt may not be needed for the fact. So for the facts that it adds
most to, the card silences the neuron and measures the answer's probability again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count
from ..core.progress import Progress
from ..core.tables import Shown, Table, ending, quoted
from ..corpus.scan import Bank, scan
from ..model.address import Neuron, find_neuron
from ..model.intervene import intervene
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .fact_adds import FactPair, known_facts, most_added
from .index import Index
from .index_store import find_index
from .triggers import Trigger
from .unembedding import find_unembedding, output_scales
from .values import tokens_of


@dataclass(frozen=True)
class FactUse:
    """A fact that a neuron takes part in.

    Attributes:
        prompt: The fact's prompt.
        answer: Its answer.
        coefficient: The neuron's coefficient where the answer is due.
        p: The answer's probability.
        p_silenced: Its probability with the neuron silenced.
    """

    prompt: str
    answer: str
    coefficient: float
    p: float
    p_silenced: float


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Card(Shown):
    """A neuron.

    Attributes:
        neuron: (layer, i) or (layer, expert, i).
        model: The name that the model was loaded by.
        fingerprint: The model's fingerprint.
        corpus: sha256 of the tokens of the corpus that the triggers are from.
        n_texts: Number of texts read.
        n_tokens: Number of tokens read.
        promotes: The tokens that its value promotes, with scores.
        demotes: The tokens that it demotes, with scores.
        triggers: Where it fires most.
        bottom: Where its coefficient is lowest.
        fired: The share of the corpus' tokens at which its coefficient is above zero.
        edges: (bins + 1,), the edges of a histogram of its coefficient over texts of the corpus.
        counts: (bins,), the number of tokens in each bin.
        facts: Of the known facts those that it adds most to. The fact that loses most when the
            neuron is silenced comes first.
        n_asked: Number of known facts.
    """

    neuron: Neuron
    model: str
    fingerprint: str
    corpus: str
    n_texts: int
    n_tokens: int
    promotes: tuple[tuple[str, float], ...]
    demotes: tuple[tuple[str, float], ...]
    triggers: tuple[Trigger, ...]
    bottom: tuple[Trigger, ...]
    fired: float
    edges: Tensor
    counts: Tensor
    facts: tuple[FactUse, ...]
    n_asked: int

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        return {
            "neuron": list(self.neuron),
            "promotes": [{"token": token, "score": score} for token, score in self.promotes],
            "demotes": [{"token": token, "score": score} for token, score in self.demotes],
            "triggers": [{"coefficient": t.coefficient, "prefix": t.prefix} for t in self.triggers],
            "bottom": [{"coefficient": t.coefficient, "prefix": t.prefix} for t in self.bottom],
            "fired": self.fired,
            "histogram": {"edges": self.edges.tolist(), "counts": self.counts.tolist()},
            "facts": [dict(vars(fact)) for fact in self.facts],
            "n_asked": self.n_asked,
            "model": self.model,
            "n_texts": self.n_texts,
            "n_tokens": self.n_tokens,
        }

    def tables(self) -> list[Table]:
        """Return the value's tokens, the coefficients, the triggers, and the facts."""
        low, high = float(self.edges[0]), float(self.edges[-1])
        n_counted = f"{int(self.counts.sum()):,} tokens"
        name = " ".join(map(str, self.neuron))
        value = [
            ("promotes", quoted([token for token, _ in self.promotes])),
            ("demotes", quoted([token for token, _ in self.demotes])),
            (
                "coefficients",
                f"{_bars(self.counts.tolist())} from {low:z.2f} to {high:z.2f} at {n_counted}",
            ),
        ]
        return [
            Table(
                f"neuron {name} of {self.model}; on at {self.fired:z.1%} of the tokens",
                {"": "<", " ": "<"},
                value,
            ),
            _trigger_table("fires most at", self.triggers),
            _trigger_table("is lowest at", self.bottom[:3]),
            _fact_table(self.facts, self.n_asked),
        ]


def _fact_table(facts: Sequence[FactUse], n_asked: int) -> Table:
    """Return the facts that a neuron adds most to as a table."""
    if not facts:
        return Table("it adds to no fact asked", {})
    return Table(
        f"the facts it adds most to, of {n_asked:,} known ones",
        {"p": ">", "p without it": ">", "fact": "<"},
        [
            (f"{use.p:z.1%}", f"{use.p_silenced:z.1%}", f"{use.prompt} {use.answer}")
            for use in facts
        ],
    )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ValueCard(Shown):
    """What is known of a neuron without an index: no text was scanned.

    Attributes:
        neuron: (layer, i) or (layer, expert, i).
        model: The name that the model was loaded by.
        promotes: The tokens that its value promotes, with scores.
        demotes: The tokens that it demotes, with scores.
        facts: As of a `Card`.
        n_asked: Number of known facts.
    """

    neuron: Neuron
    model: str
    promotes: tuple[tuple[str, float], ...]
    demotes: tuple[tuple[str, float], ...]
    facts: tuple[FactUse, ...]
    n_asked: int

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values; what an index would add is None."""
        return {
            "neuron": list(self.neuron),
            "promotes": [{"token": token, "score": score} for token, score in self.promotes],
            "demotes": [{"token": token, "score": score} for token, score in self.demotes],
            "triggers": None,
            "bottom": None,
            "fired": None,
            "histogram": None,
            "facts": [dict(vars(fact)) for fact in self.facts],
            "n_asked": self.n_asked,
            "model": self.model,
            "n_texts": None,
            "n_tokens": None,
        }

    def tables(self) -> list[Table]:
        """Return the value's tokens, and the facts."""
        value = [
            ("promotes", quoted([token for token, _ in self.promotes])),
            ("demotes", quoted([token for token, _ in self.demotes])),
        ]
        name = " ".join(map(str, self.neuron))
        return [
            Table(f"neuron {name} of {self.model}", {"": "<", " ": "<"}, value),
            _fact_table(self.facts, self.n_asked),
        ]


def _trigger_table(name: str, triggers: Sequence[Trigger]) -> Table:
    """Return triggers as a table, or a line if there are none."""
    if not triggers:
        return Table(f"{name} nothing", {})
    rows = [(f"{t.coefficient:+z.2f}", ending(t.prefix)) for t in triggers]
    return Table(name, {"coefficient": ">", "text up to the token": "<"}, rows)


def _bars(counts: list[int]) -> str:
    """Return a histogram in one line, with logarithmic heights."""
    most = math.log1p(max(counts))
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * math.log1p(n) / most) if most else 0] for n in counts)


_BINS = 30
"""Bins of the histogram."""

_TEXTS = 256
"""Texts of the index that the histogram is of."""


@asking()
def card(
    lm: LanguageModel,
    index: Index,
    neuron: Neuron,
    facts: Sequence[FactPair] | None = None,
    *,
    k: int = 10,
    n_facts: int = 5,
    seed: int = 0,
) -> Card:
    """Return the card of a neuron.

    Args:
        lm: The model.
        index: The model's index.
        neuron: (layer, i) or (layer, expert, i).
        facts: (prompt, answer) pairs among which to look for the neuron's. Those that the model
            does not answer correctly are left out. None: some hundred bundled facts.
        k: Number of triggers and tokens to show.
        n_facts: Number of facts for which to silence the neuron.
        seed: Seed of the draw of bundled facts.

    Raises:
        LayerError: when the model does not have the neuron, or the index does not hold it.
        InputError: when `facts` are not pairs.
    """
    check_model(lm)
    k = check_count(k, "k", "the number of triggers to show")
    n_facts = check_count(n_facts, "n_facts", "the number of facts to try", least=0)
    layer, place, i = find_neuron(lm.ffn, neuron)
    bank: Bank = (layer, place) if lm.ffn[layer].n_experts else (layer,)
    address: Neuron = (*bank, i)
    scanned, values = index.triggers, index.values
    triggers, bottom = scanned.of(address, k=k), scanned.of(address, sign="bottom", k=k)
    edges, counts = _histogram(lm, scanned.texts[:_TEXTS], bank, i)
    known = known_facts(lm, facts, seed)
    return Card(
        neuron=address,
        model=lm.name,
        fingerprint=scanned.fingerprint,
        corpus=scanned.corpus,
        n_texts=scanned.n_texts,
        n_tokens=scanned.n_tokens,
        promotes=tuple(values.of(address)[:k]),
        demotes=tuple(values.of(address, bottom=True)[:k]),
        triggers=tuple(triggers),
        bottom=tuple(bottom),
        fired=float(scanned.banks[bank].fired[i]),
        edges=edges,
        counts=counts,
        facts=_uses(lm, known, address, bank, n_facts),
        n_asked=len(known),
    )


@asking()
def value_card(lm: LanguageModel, neuron: Neuron, *, k: int = 10, n_facts: int = 5) -> ValueCard:
    """Return what is known of a neuron without an index.

    Args:
        lm: The model.
        neuron: (layer, i) or (layer, expert, i).
        k: Number of tokens to show.
        n_facts: Number of facts for which to silence the neuron.

    Raises:
        LayerError: when the model does not have the neuron.
        UnsupportedModelError: as `find_unembedding`.
    """
    check_model(lm)
    k = check_count(k, "k", "the number of tokens to show")
    n_facts = check_count(n_facts, "n_facts", "the number of facts to try", least=0)
    layer, place, i = find_neuron(lm.ffn, neuron)
    bank: Bank = (layer, place) if lm.ffn[layer].n_experts else (layer,)
    address: Neuron = (*bank, i)
    head, scales = find_unembedding(lm), output_scales(lm)
    promotes, demotes = tokens_of(lm, head, scales, [address] * 2, [False, True], k)
    known = known_facts(lm, None, 0)
    return ValueCard(
        neuron=address,
        model=lm.name,
        promotes=tuple(promotes),
        demotes=tuple((token, -score) for token, score in demotes),
        facts=_uses(lm, known, address, bank, n_facts),
        n_asked=len(known),
    )


def find_card(
    lm: LanguageModel,
    neuron: Neuron,
    folder: str | os.PathLike[str] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
    max_tokens: float | None = None,
    k: int = 10,
    n_facts: int = 5,
    progress: Progress | None = None,
) -> Card:
    """Return the card of a neuron, with the model's index. The index is made if there is none.

    Args:
        lm: The model.
        neuron: (layer, i) or (layer, expert, i).
        folder: As `find_index`.
        texts: As `find_index`.
        max_tokens: As `find_index`.
        k: Number of triggers and tokens to show.
        n_facts: Number of facts for which to silence the neuron.
        progress: Gets how far the index is.

    Raises:
        LayerError: when the model does not have the neuron. Raised before an index is made.
        FactsmithError: as `find_index`.
    """
    check_model(lm)
    find_neuron(lm.ffn, neuron)
    index = find_index(lm, folder, texts=texts, max_tokens=max_tokens, progress=progress)
    return card(lm, index, neuron, k=k, n_facts=n_facts)


def _histogram(
    lm: LanguageModel, texts: Sequence[str], bank: Bank, i: int
) -> tuple[Tensor, Tensor]:
    """Return the edges and counts of a neuron's coefficient over some texts."""
    parts = list(_coefficients(lm, texts, bank, i))
    seen = (
        torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float32)
    )  # no token went to this expert
    low, high = float(seen.min()), float(seen.max())
    edges = torch.linspace(low, high if high > low else low + 1, _BINS + 1, dtype=torch.float32)
    return edges, torch.histc(seen, bins=_BINS, min=float(edges[0]), max=float(edges[-1])).long()


def _coefficients(lm: LanguageModel, texts: Sequence[str], bank: Bank, i: int) -> Iterator[Tensor]:
    """Yield a neuron's coefficients at every token of some texts, (n,), batch by batch."""
    # A text that was sampled may have more tokens when it is read again.
    sequences = [lm.prompt_ids(text)[: lm.max_tokens] for text in texts]
    for group in lm.groups([len(ids) for ids in sequences]):
        of_bank = scan(lm, [sequences[t] for t in group], [bank[0]]).get(bank)
        if of_bank is not None:
            yield of_bank.m[:, i].float().cpu()


def _uses(
    lm: LanguageModel, known: Sequence[FactPair], neuron: Neuron, bank: Bank, n_facts: int
) -> tuple[FactUse, ...]:
    """Return the facts that a neuron adds most to, and their answers with and without it."""
    if not known or not n_facts:
        return ()
    i = neuron[-1]
    most = most_added(lm, known, {bank: slice(i, i + 1)}, n_facts)[bank]
    helped = most.adds[0] > 0
    best = [known[t] for t in most.facts[0][helped].tolist()]
    if not best:
        return ()
    prompts, answers = [prompt for prompt, _ in best], [answer for _, answer in best]
    before = lm.log_prob(prompts, answers).exp().tolist()
    with intervene(lm, [neuron], 0.0):
        after = lm.log_prob(prompts, answers).exp().tolist()
    uses = [
        FactUse(prompt=prompt, answer=answer, coefficient=m, p=p, p_silenced=silenced)
        for (prompt, answer), m, p, silenced in zip(
            best, most.coefficients[0][helped].tolist(), before, after, strict=True
        )
    ]
    return tuple(sorted(uses, key=lambda use: use.p_silenced - use.p))
