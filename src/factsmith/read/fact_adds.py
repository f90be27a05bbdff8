"""The facts that each neuron adds most to.

    adds = fact_adds(lm, [3])          # all neurons of layer 3, in one pass over the facts
    adds.of((3, 17))                   # one neuron's facts, with what it adds to each

A neuron adds to a fact its coefficient where the answer is due, times what one unit of its value
adds to the logit of the answer's first token. This is a correlation: the model may answer without
the neuron. `card` silences a neuron and measures.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .. import atlas
from ..core.checks import check_count, check_items
from ..core.errors import InputError, LayerError
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..corpus.scan import Bank, bank_of, banks, scan
from ..model.address import Neuron, check_layers
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from ..model.turns import asking
from .index import Index
from .index_store import find_index
from .unembedding import find_unembedding, output_scales

FactPair: TypeAlias = tuple[str, str]
"""(prompt, answer)."""

_POOL = 400
"""Bundled facts that are tried when the caller gives none."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FactAdds:
    """For every neuron of some layers the facts that it adds most to.

    Attributes:
        known: The (prompt, answer) pairs that the model answers correctly.
        facts: {bank: (d_ff, n) int64}, indices into `known`, the best first.
        coefficients: {bank: (d_ff, n) float32}, the neuron's coefficient where the answer is due.
        adds: {bank: (d_ff, n) float32}, what the neuron adds to the logit of the answer's first
            token, without the final norm's division. 0 where it adds to no further fact.
        fingerprint: The model's fingerprint.
    """

    known: tuple[FactPair, ...]
    facts: Mapping[Bank, Tensor]
    coefficients: Mapping[Bank, Tensor]
    adds: Mapping[Bank, Tensor]
    fingerprint: str

    def __repr__(self) -> str:
        n = counted(sum(map(len, self.facts.values())), "neuron")
        return f"FactAdds({n}, {counted(len(self.known), 'fact')})"

    def of(self, neuron: Neuron) -> list[tuple[str, str, float, float]]:
        """Return a neuron's facts as (prompt, answer, coefficient, what it adds), best first.

        Raises:
            LayerError: when the neuron's layer was not read.
        """
        bank, i = bank_of(neuron)
        if bank not in self.facts or not 0 <= i < len(self.facts[bank]):
            raise LayerError(
                f"the facts of neuron {tuple(neuron)} were not looked at. "
                f"Ask for a neuron of a bank that was: {', '.join(map(str, self.facts))}."
            )
        rows = zip(
            *(part[bank][i].tolist() for part in (self.facts, self.coefficients, self.adds)),
            strict=True,
        )
        return [(*self.known[t], m, added) for t, m, added in rows if added > 0]


@asking()
def fact_adds(
    lm: LanguageModel,
    layers: Iterable[int] | None = None,
    facts: Sequence[FactPair] | None = None,
    *,
    n: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> FactAdds:
    """Return the n facts that each neuron of some layers adds most to.

    Args:
        lm: The model.
        layers: The layers. None: all.
        facts: (prompt, answer) pairs. Those that the model does not answer correctly are left out.
            None: some hundred bundled facts.
        n: Number of facts for each neuron.
        seed: Seed of the draw of bundled facts.
        progress: Gets the number of facts read.

    Raises:
        LayerError: when a layer does not exist.
        InputError: when `facts` are not pairs.
    """
    check_model(lm)
    n = check_count(n, "n", "the number of facts to keep for each neuron")
    wanted = sorted(set(check_layers(layers, lm.n_layers)))
    known = known_facts(lm, facts, seed)
    best = most_added(lm, known, {bank: slice(None) for bank in banks(lm, wanted)}, n, progress)
    return FactAdds(
        known=tuple(known),
        facts={bank: each.facts for bank, each in best.items()},
        coefficients={bank: each.coefficients for bank, each in best.items()},
        adds={bank: each.adds for bank, each in best.items()},
        fingerprint=lm.fingerprint,
    )


def find_index_and_facts(
    lm: LanguageModel,
    folder: str | os.PathLike[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
    max_tokens: float | None = None,
    facts: bool = True,
    progress: Progress | None = None,
) -> tuple[Index, FactAdds | None]:
    """Return the model's index, and the bundled facts that neurons of some layers add most to.

    Args:
        lm: The model.
        folder: As `find_index`.
        layers: The layers. None: all. They are checked before an index is made.
        texts: As `find_index`.
        max_tokens: As `find_index`.
        facts: Whether to look for facts. False: None is returned for them.
        progress: Gets how far each step is.

    Raises:
        LayerError: when a layer does not exist.
        FactsmithError: as `find_index`.
    """
    check_model(lm)
    wanted = check_layers(layers, lm.n_layers)
    index = find_index(lm, folder, texts=texts, max_tokens=max_tokens, progress=progress)
    return index, fact_adds(lm, wanted, progress=progress) if facts else None


def known_facts(
    lm: LanguageModel, facts: Sequence[FactPair] | None, seed: int = 0
) -> list[FactPair]:
    """Return the facts that the model answers correctly.

    Args:
        lm: The model.
        facts: (prompt, answer) pairs. None: some hundred bundled facts.
        seed: Seed of the draw of bundled facts.

    Raises:
        InputError: when `facts` are not pairs.
    """
    if facts is None:
        drawn = random.Random(seed).sample(atlas.facts(), _POOL)
        facts = [
            (atlas.phrasings(f.relation).trained[0].replace("{}", f.subject), f.object)
            for f in drawn
        ]
    else:
        pairs = check_items(facts, "facts", "pairs of a prompt and its answer")
        wrong = [p for p in pairs if not isinstance(p, (tuple, list)) or len(p) != 2]
        if wrong:
            raise InputError(
                f"facts holds {wrong[0]!r}: it must hold pairs of a prompt and its answer",
                argument="facts",
            )
    if not facts:
        return []
    prompts, answers = [prompt for prompt, _ in facts], [answer for _, answer in facts]
    right = lm.says(prompts, answers, by_tokens=True)
    return [(prompt, answer) for (prompt, answer), ok in zip(facts, right, strict=True) if ok]


@dataclass(frozen=True, eq=False)
class MostAdded:
    """The n facts that some neurons of a bank add most to, best first, on the CPU.

    Attributes:
        facts: (neurons, n) int64, the numbers of the facts.
        coefficients: (neurons, n) float32, the neuron's coefficient where the answer is due.
        adds: (neurons, n) float32, what it adds. 0 where it adds to fewer facts.
    """

    facts: Tensor
    coefficients: Tensor
    adds: Tensor

    @classmethod
    def none(cls, neurons: int, n: int) -> MostAdded:
        """Return the start, before any fact was read."""
        return cls(
            torch.zeros(neurons, n, dtype=torch.int64),
            torch.zeros(neurons, n, dtype=torch.float32),
            torch.zeros(neurons, n, dtype=torch.float32),
        )

    def with_more(self, facts: Tensor, coefficients: Tensor, adds: Tensor) -> MostAdded:
        """Return the best of these and further facts (neurons, m)."""
        every = (
            torch.cat((self.facts, facts), 1),
            torch.cat((self.coefficients, coefficients), 1),
            torch.cat((self.adds, adds), 1),
        )
        order = every[2].topk(self.adds.shape[1], dim=1).indices
        return MostAdded(*(part.gather(1, order) for part in every))


@torch.no_grad()
def most_added(
    lm: LanguageModel,
    known: Sequence[FactPair],
    wanted: Mapping[Bank, slice],
    n: int,
    progress: Progress | None = None,
) -> dict[Bank, MostAdded]:
    """Return the n facts that some neurons add most to, in one pass over the facts' prompts.

    Only the best so far are held.

    Args:
        lm: The model.
        known: (prompt, answer) pairs.
        wanted: {bank: which of its neurons}.
        n: Number of facts for each neuron.
        progress: Gets the number of facts read.
    """
    layers = sorted({bank[0] for bank in wanted})
    head, scales = find_unembedding(lm), output_scales(lm, layers)
    neurons = banks(lm, layers)
    sequences = [lm.prompt_ids(prompt) for prompt, _ in known]
    gaps = lm.gaps([prompt for prompt, _ in known], [answer for _, answer in known])
    due = torch.tensor(
        [target_ids(lm, *pair, gap=gap)[0] for pair, gap in zip(known, gaps, strict=True)],
        dtype=torch.int64,
    )
    best = {
        bank: MostAdded.none(len(neurons[bank].values[rows]), n) for bank, rows in wanted.items()
    }
    done = 0
    for group in lm.groups([len(ids) for ids in sequences]):
        lengths = torch.tensor([len(sequences[t]) for t in group])
        coefficients = scan(lm, [sequences[t] for t in group], layers)
        for bank, rows in wanted.items():
            if (of_bank := coefficients.get(bank)) is None:
                continue
            row = of_bank.row.cpu()
            at_end = of_bank.column.cpu() == lengths[row] - 1
            facts = torch.tensor(group)[row[at_end]]
            value = neurons[bank].values[rows].float() * scales[bank[0]]
            units = (
                head.fold(value.to(head.scale))
                @ head.weight[due[facts].to(head.weight.device)].float().T
            )
            m = of_bank.m[at_end.to(of_bank.m.device)][:, rows].float().T.cpu()
            best[bank] = best[bank].with_more(facts.expand_as(m), m, m * units.cpu())
        tell(progress, "facts", done := done + len(group), len(known))
    return best
