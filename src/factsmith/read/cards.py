"""One neuron on one page: what its key matches, what its value promotes, and what becomes of facts without it.

    found = card(lm, index, (3, 17))
    found.promotes, found.triggers, found.facts
    adds = fact_adds(lm, [3])                       # for a whole layer: the facts that each neuron adds most to
    adds.of((3, 17))

That a neuron fires on a fact's prompt does not say that the fact needs it: for the facts it adds most to, the neuron is silenced and the
answer's probability measured again. `fact_adds` leaves that out: what it finds goes together with the facts, and may do without.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import atlas
from ..core.checks import check_count, check_items
from ..core.errors import InputError, LayerError
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table, counted, ending, quoted
from ..corpus.scan import Bank, Coefficients, bank_of, banks, scan
from ..model.address import Neuron, check_layer, find_neuron
from ..model.intervene import intervene
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from .index import Index
from .triggers import Trigger
from .unembedding import behind, find_unembedding


@dataclass(frozen=True)
class FactUse:
    """A fact that a neuron takes part in: its coefficient where the answer is due, and the answer's probability with and without it."""

    prompt: str
    answer: str
    coefficient: float
    p: float
    p_silenced: float


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Card(Shown):
    """A neuron.

    neuron       (layer, i) or (layer, expert, i)
    model        what the model was loaded as; fingerprint: the model's
    corpus       sha256 of the tokens its triggers are of; n_texts, n_tokens: how many were read
    promotes     the tokens its value promotes, with scores; demotes: those it demotes
    triggers     where it fires most, bottom: where its coefficient is lowest
    fired        share of the corpus' tokens at which its coefficient is above zero
    edges        (bins + 1,) of the histogram of its coefficient over texts of the corpus; counts (bins,) tokens
    facts        those of the facts asked that it adds most to, by what silencing it takes from the answer
    n_asked      facts that were asked and are known
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
        """Plain JSON-able fields."""
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
        """The value's tokens, the coefficients, the key's triggers, and facts with and without the neuron."""
        low, high = float(self.edges[0]), float(self.edges[-1])
        title = f"neuron {' '.join(map(str, self.neuron))} of {self.model}; on at {self.fired:.1%} of the tokens"
        value = [
            ("promotes", quoted([token for token, _ in self.promotes])),
            ("demotes", quoted([token for token, _ in self.demotes])),
            (
                "coefficients",
                f"{_bars(self.counts.tolist())} from {low:.2f} to {high:.2f} at {int(self.counts.sum()):,} tokens",
            ),
        ]
        found = [Table(title, {"": "<", " ": "<"}, value)]
        for name, triggers in (("fires most at", self.triggers), ("is lowest at", self.bottom[:3])):
            rows = [(f"{t.coefficient:+.2f}", ending(t.prefix)) for t in triggers]
            columns = {"coefficient": ">", "text up to the token": "<"} if rows else {}
            found.append(Table(name if rows else f"{name} nothing", columns, rows))
        uses = [
            (f"{use.p:.1%}", f"{use.p_silenced:.1%}", f"{use.prompt} {use.answer}")
            for use in self.facts
        ]
        asked = (
            f"the facts it adds most to, of {self.n_asked:,} known ones"
            if uses
            else "it adds to no fact asked"
        )
        return [
            *found,
            Table(asked, {"p": ">", "p without it": ">", "fact": "<"} if uses else {}, uses),
        ]


def _bars(counts: list[int]) -> str:
    """A histogram in one line, its heights by logarithm."""
    most = math.log1p(max(counts))
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * math.log1p(n) / most) if most else 0] for n in counts)


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
    k, n_facts = (
        check_count(k, "k", "the number of triggers to show"),
        check_count(n_facts, "n_facts", "the number of facts to try", least=0),
    )
    layer, place, i = find_neuron(lm.ffn, neuron)
    bank: Bank = (layer, place) if lm.ffn[layer].n_experts else (layer,)
    own: Neuron = (*bank, i)
    triggers, bottom = index.triggers.of(own, k=k), index.triggers.of(own, sign="bottom", k=k)
    parts = [
        found.m[:, 0]
        for _, found in _coefficients(lm, index.triggers.texts[:_TEXTS], layer, bank, i)
    ]
    seen = torch.cat(parts) if parts else torch.zeros(1)  # an expert to which no token went
    low, high = float(seen.min()), float(seen.max())
    edges = torch.linspace(low, high if high > low else low + 1, _BINS + 1)
    known = _known(lm, facts, seed)
    return Card(
        neuron=own,
        model=lm.name,
        fingerprint=index.triggers.fingerprint,
        corpus=index.triggers.corpus,
        n_texts=index.triggers.n_texts,
        n_tokens=index.triggers.n_tokens,
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


def _coefficients(
    lm: LanguageModel, texts: Sequence[str], layer: int, bank: Bank, i: int
) -> Iterator[tuple[list[int], Coefficients]]:
    """A neuron's coefficients at every token of some texts: for each group of texts which they are, and m (n, 1) with its places."""
    sequences = [lm.prompt_ids(text) for text in texts]
    for group in lm.groups([len(ids) for ids in sequences]):
        own = scan(lm, [sequences[t] for t in group], [layer]).get(bank)
        if own is not None:
            yield (
                group,
                Coefficients(own.m[:, i : i + 1].float().cpu(), own.row.cpu(), own.column.cpu()),
            )


def _known(
    lm: LanguageModel, facts: Sequence[tuple[str, str]] | None, seed: int
) -> list[tuple[str, str]]:
    """Those facts that the model says."""
    if facts is None:
        drawn = random.Random(seed).sample(atlas.facts(), _POOL)
        facts = [
            (atlas.phrasings(f.relation).trained[0].replace("{}", f.subject), f.object)
            for f in drawn
        ]
    elif any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in facts):
        raise InputError("facts are pairs of a prompt and its answer; got something else")
    if not facts:
        return []
    right = lm.says([prompt for prompt, _ in facts], [answer for _, answer in facts])
    return [(prompt, answer) for (prompt, answer), ok in zip(facts, right, strict=True) if ok]


def _uses(
    lm: LanguageModel, known: Sequence[tuple[str, str]], neuron: Neuron, bank: Bank, n_facts: int
) -> tuple[FactUse, ...]:
    """The facts that the neuron adds most to, and their answers with and without it."""
    if not known or not n_facts:
        return ()
    i = neuron[-1]
    facts, coefficients, adds = (
        part[0] for part in _most_added(lm, known, {bank: slice(i, i + 1)}, n_facts)[bank]
    )
    best = facts[adds > 0].tolist()
    if not best:
        return ()
    prompts, answers = [known[t][0] for t in best], [known[t][1] for t in best]
    before = lm.log_prob(prompts, answers).exp().tolist()
    with intervene(lm, [neuron], 0.0):
        after = lm.log_prob(prompts, answers).exp().tolist()
    found = [
        FactUse(prompt=prompt, answer=answer, coefficient=m, p=p, p_silenced=silenced)
        for prompt, answer, m, p, silenced in zip(
            prompts, answers, coefficients[adds > 0].tolist(), before, after, strict=True
        )
    ]
    return tuple(sorted(found, key=lambda use: use.p_silenced - use.p))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FactAdds:
    """For every neuron of some layers the facts that it adds most to: what goes together, without an intervention.

    known         the (prompt, answer) pairs asked that the model says
    facts         {bank: (d_ff, n) int64}, indices into `known`, best first
    coefficients  {bank: (d_ff, n) float32}, the neuron's, where the answer is due
    adds          {bank: (d_ff, n) float32}, coefficient times what one unit adds to the logit of the answer's first token, but for the
                  final norm's divisor; 0 where it adds to no more facts
    fingerprint   the model's
    """

    known: tuple[tuple[str, str], ...]
    facts: Mapping[Bank, Tensor]
    coefficients: Mapping[Bank, Tensor]
    adds: Mapping[Bank, Tensor]
    fingerprint: str

    def __repr__(self) -> str:
        n = counted(sum(map(len, self.facts.values())), "neuron")
        return f"FactAdds({n}, {counted(len(self.known), 'fact')})"

    def of(self, neuron: Neuron) -> list[tuple[str, str, float, float]]:
        """A neuron's facts: (prompt, answer, coefficient, what it adds). Raises LayerError for one that was not looked at."""
        bank, i = bank_of(neuron)
        if bank not in self.facts or not 0 <= i < len(self.facts[bank]):
            raise LayerError(
                f"what {tuple(neuron)} adds to was not looked at; there is that of {', '.join(map(str, self.facts))}"
            )
        rows = zip(
            *(part[bank][i].tolist() for part in (self.facts, self.coefficients, self.adds)),
            strict=True,
        )
        return [(*self.known[t], m, added) for t, m, added in rows if added > 0]


@torch.no_grad()
def fact_adds(
    lm: LanguageModel,
    layers: Iterable[int] | None = None,
    facts: Sequence[tuple[str, str]] | None = None,
    *,
    n: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> FactAdds:
    """The n facts that each neuron of some layers (None: all) adds most to, in one pass over the facts' prompts.

    facts: (prompt, answer) pairs; None: some hundred bundled facts. Those that the model does not know are left out.
    Raises LayerError for a layer that does not exist, InputError for facts that are no pairs.
    """
    check_model(lm)
    n = check_count(n, "n", "the number of facts to keep for each neuron")
    wanted = (
        range(lm.n_layers)
        if layers is None
        else [
            check_layer(x, lm.n_layers)
            for x in check_items(layers, "layers", "layer numbers", also="None for all")
        ]
    )
    if not wanted:
        raise InputError("no layer was asked for; expected at least one, or None for all")
    known = _known(lm, facts, seed)
    found = _most_added(
        lm, known, {bank: slice(None) for bank in banks(lm, sorted(set(wanted)))}, n, progress
    )
    return FactAdds(
        known=tuple(known),
        facts={bank: parts[0] for bank, parts in found.items()},
        coefficients={bank: parts[1] for bank, parts in found.items()},
        adds={bank: parts[2] for bank, parts in found.items()},
        fingerprint=lm.fingerprint,
    )


def _most_added(
    lm: LanguageModel,
    known: Sequence[tuple[str, str]],
    wanted: Mapping[Bank, slice],
    n: int,
    progress: Progress | None = None,
) -> dict[Bank, tuple[Tensor, Tensor, Tensor]]:
    """For some neurons of some banks the n facts they add most to, best first: which fact, the coefficient, and what it adds, each
    (neurons, n) on the CPU; zeros where they add to fewer. Only the best so far are held."""
    layers = sorted({bank[0] for bank in wanted})
    head, every, scale = (
        find_unembedding(lm),
        banks(lm, layers),
        {layer: behind(lm, layer) for layer in layers},
    )
    sequences = [lm.prompt_ids(prompt) for prompt, _ in known]
    due = torch.tensor(
        [target_ids(lm.tokenizer, prompt, answer)[0] for prompt, answer in known], dtype=torch.int64
    )
    sizes = {bank: len(every[bank].values[rows]) for bank, rows in wanted.items()}
    best = {
        bank: (torch.zeros(size, n, dtype=torch.int64), torch.zeros(size, n), torch.zeros(size, n))
        for bank, size in sizes.items()
    }
    done = 0
    for group in lm.groups([len(ids) for ids in sequences]):
        lengths = torch.tensor([len(sequences[t]) for t in group])
        coefficients = scan(lm, [sequences[t] for t in group], layers)
        for bank, rows in wanted.items():
            if (own := coefficients.get(bank)) is None:
                continue
            at_end = own.column.cpu() == lengths[own.row.cpu()] - 1
            facts = torch.tensor(group)[own.row.cpu()[at_end]]
            value = every[bank].values[rows].float() * scale[bank[0]]
            units = (
                head.fold(value.to(head.scale))
                @ head.weight[due[facts].to(head.weight.device)].float().T
            )
            m = (
                own.m[at_end.to(own.m.device)][:, rows].float().T.cpu()
            )  # (neurons, facts of the group)
            new = (facts.expand_as(m), m, m * units.cpu())
            both = tuple(torch.cat(pair, 1) for pair in zip(best[bank], new, strict=True))
            order = both[2].topk(n, dim=1).indices
            best[bank] = tuple(part.gather(1, order) for part in both)  # type: ignore[assignment]
        tell(progress, "facts", done := done + len(group), len(known))
    return best
