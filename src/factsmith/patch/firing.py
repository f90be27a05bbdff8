"""On how many ordinary tokens appended neurons fire, and which fire on other facts' subjects.

    fired = firing(rows, activation, sample)        # plain tensors
    fired.share, fired.shares, fired.crossed
    uses = firing_of(lm, deltas, moments)           # of each layer with appended neurons

An appended neuron should fire at its fact's subject and nowhere else. So what limits their number
is not room, as with weights that facts share, but a budget of false firing: the share of ordinary
tokens on which any of them writes something.

A fact fires where its neurons together write more than a tenth of what they write at its own
subject (`FIRES`). Neurons that cancel each other, as the two of a saturating pair do, do not fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UnsupportedModelError
from ..core.fact import Fact
from ..core.forms import canonical
from ..core.settled import settled
from ..corpus.moments import SecondMoment
from ..edit.append_inputs import SubjectEnds, subject_forms
from ..edit.delta import Delta
from ..edit.forms import probe_activation
from ..model.appended import AppendedRows, joined
from ..model.language_model import LanguageModel

FIRES = 0.1
"""Share of what a fact's neurons write at its own subject from which on they fire."""

BUDGET = 0.01
"""Share of ordinary tokens on which appended neurons may fire before there is a warning."""

_BLOCK = 2**22
"""Numbers in memory at once: inputs times neurons."""

_SHOWN = 5
"""Facts, and pairs of facts, that are kept as examples."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Firing:
    """Where the neurons of a layer fire besides at their own subjects.

    Attributes:
        shares: (n,) float64, for each fact the share of the tokens on which it fires.
        share: The share on which any fact fires.
        patches: For each patch, the share on which any of its facts fires.
        crossed: (k, 2) int64: pairs of a fact, and another fact at whose subject it fires.
    """

    shares: Tensor
    share: float
    patches: tuple[float, ...]
    crossed: Tensor


@dataclass(frozen=True, kw_only=True)
class AppendedUse:
    """The appended neurons of a layer, and how often they fire.

    Attributes:
        layer: Its number.
        neurons: How many neurons are appended.
        facts: How many facts they belong to.
        tokens: Size of the sample of ordinary tokens. 0: there is none.
        share: Share of these tokens on which any fact fires. None: there is no sample, or what
            enters the layer at the facts' subjects is not recorded.
        patches: The same for each patch.
        most: The facts that fire most often, with their shares.
        n_crossed: How many pairs of facts of two subjects there are of which the first fires at the
            subject of the second.
        crossed: Some of these pairs.
    """

    layer: int
    neurons: int
    facts: int
    tokens: int = 0
    share: float | None = None
    patches: tuple[float, ...] = ()
    most: tuple[tuple[str, float], ...] = ()
    n_crossed: int = 0
    crossed: tuple[tuple[str, str], ...] = ()

    def share_with(self, more: int) -> float | None:
        """Predict the share with more facts that fire as often as those on average.

        None: nothing is known.
        """
        if self.share is None or not more:
            return self.share
        silent: float = (1 - self.share) ** (1 + more / self.facts)
        return 1 - silent


@settled()
def strengths(
    rows: AppendedRows, activation: Callable[[Tensor], Tensor], inputs: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the norm of what each fact's neurons write together at some inputs, block by block.

    Args:
        rows: The neurons.
        activation: The layer's activation function.
        inputs: (m, d_model) what enters the layer.

    Yields:
        Which of the inputs, and (block, n_facts) float64 in the order of the facts' indices.
    """
    facts = sorted(set(rows.facts))
    of_fact: dict[int, list[int]] = {fact: [] for fact in facts}
    for row, fact in enumerate(rows.facts):
        of_fact[fact].append(row)
    most = max(map(len, of_fact.values()))
    n = len(rows)  # stands for no neuron
    places = torch.tensor([each + [n] * (most - len(each)) for each in of_fact.values()])
    values = torch.cat([rows.values, torch.zeros(1, rows.values.shape[1])]).double()[places]
    gram = values @ values.transpose(1, 2)
    for first in range(0, len(inputs), step := max(1, _BLOCK // max(n, 1))):
        x = inputs[first : first + step].float().cpu()
        m = _coefficients(rows, activation, x).double()
        m = torch.cat([m, m.new_zeros(len(m), 1)], dim=1)[:, places]
        square = torch.einsum("mnk,nkl,mnl->mn", m, gram, m)
        yield slice(first, first + len(x)), square.clamp_min(0).sqrt()


def _coefficients(rows: AppendedRows, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the coefficients of all neurons, (m, n)."""

    def read(keys: Tensor, biases: Tensor | None) -> Tensor:
        return x @ keys.T if biases is None else x @ keys.T + biases

    if rows.keys is not None:
        return activation(read(rows.keys, rows.biases))
    assert rows.gate_keys is not None and rows.up_keys is not None
    gates = activation(read(rows.gate_keys, rows.gate_biases))
    return gates * read(rows.up_keys, rows.up_biases)


def firing(
    rows: AppendedRows,
    activation: Callable[[Tensor], Tensor],
    sample: Tensor,
    *,
    known: Tensor | None = None,
    patches: Sequence[int] | None = None,
    subjects: Sequence[str] | None = None,
) -> Firing:
    """Measure where appended neurons fire besides at their own subjects.

    Args:
        rows: The neurons of a layer, with the inputs at their facts' subjects.
        activation: The layer's activation function.
        sample: (m, d_model) what enters the layer at ordinary tokens.
        known: (k, 2) int64: pairs of a token and a fact whose subject ends there, so that it may
            fire. None: there are none.
        patches: How many facts each patch has, in their order. None: all are of one.
        subjects: The subject of each fact; facts of one subject may fire at each other's. None: all
            differ.
    """
    n = len(set(rows.facts))
    assert rows.inputs is not None
    own_strength = torch.cat(
        [block[:, place].diagonal() for place, block in strengths(rows, activation, rows.inputs)]
    )
    least = FIRES * own_strength.clamp_min(torch.finfo(torch.float64).tiny)
    sizes = [n] if patches is None else list(patches)
    counts, total = torch.zeros(n, dtype=torch.float64), torch.zeros(len(sizes) + 1).double()
    for place, block in strengths(rows, activation, sample):
        fires = block > least
        if known is not None and len(known):
            inside = known[(known[:, 0] >= place.start) & (known[:, 0] < place.stop)]
            fires[inside[:, 0] - place.start, inside[:, 1]] = False
        counts += fires.sum(0)
        parts = torch.split(fires, sizes, dim=1)
        total += torch.stack([x.any(1).sum() for x in (*parts, fires)])
    pairs = []
    for place, block in strengths(rows, activation, rows.inputs):
        at, fact = (block > least).nonzero(as_tuple=True)
        pairs.append(torch.stack([fact, at + place.start], dim=1))
    crossed = torch.cat(pairs)
    names = list(range(n)) if subjects is None else [*map(canonical, subjects)]
    other = [names[fact] != names[at] for fact, at in crossed.tolist()]
    m = max(len(sample), 1)
    return Firing(
        shares=counts / m,
        share=float(total[-1]) / m,
        patches=tuple(count / m for count in total[:-1].tolist()),
        crossed=crossed[torch.tensor(other, dtype=torch.bool)],
    )


def recorded_firing(deltas: Sequence[Delta]) -> tuple[float, int] | None:
    """Return how often the appended neurons of some deltas fire by the records of their edits.

    Returns:
        The sum of the facts' expected shares of ordinary tokens, which is at least the share on
        which any fires, and the number of facts. None: nothing is appended, or it was not measured
        for some fact.
    """
    widening = [delta for delta in deltas if delta.appended]
    rates = [record.get("false_firing") for delta in widening for record in delta.convergence]
    known = [float(rate) for rate in rates if isinstance(rate, (int, float))]
    if not known or len(known) != sum(len(delta.facts) for delta in widening):
        return None
    return sum(known), len(known)


def firing_of(
    lm: LanguageModel, deltas: Sequence[Delta], moments: Mapping[int, SecondMoment]
) -> tuple[AppendedUse, ...]:
    """Measure how often the appended neurons of some deltas fire, layer by layer.

    Args:
        lm: The model, without or with the deltas.
        deltas: The deltas, in their order.
        moments: {layer: statistics of inputs} with samples. Where they are missing, the neurons are
            counted, and nothing is measured.
    """
    layers = sorted({layer for delta in deltas for layer in delta.appended})
    return tuple(
        _use(lm, layer, [delta for delta in deltas if layer in delta.appended], moments.get(layer))
        for layer in layers
    )


def _use(
    lm: LanguageModel, layer: int, deltas: Sequence[Delta], moment: SecondMoment | None
) -> AppendedUse:
    rows = joined([delta.appended[layer] for delta in deltas])
    by_patch = [
        [delta.facts[i] for i in sorted(set(delta.appended[layer].facts))] for delta in deltas
    ]
    facts = [fact for some in by_patch for fact in some]
    counted = AppendedUse(layer=layer, neurons=len(rows), facts=len(facts))
    sample = None if moment is None else moment.sample
    if moment is None or sample is None or rows.inputs is None:
        return counted
    try:
        activation = probe_activation(lm, layer)
    except UnsupportedModelError:  # rows that were made elsewhere
        return counted
    fired = firing(
        rows,
        activation,
        sample,
        known=_known(lm, facts, moment.tails),
        patches=[len(some) for some in by_patch],
        subjects=[fact.subject for fact in facts],
    )
    order = fired.shares.argsort(descending=True)[:_SHOWN].tolist()
    return AppendedUse(
        layer=layer,
        neurons=len(rows),
        facts=len(facts),
        tokens=len(sample),
        share=fired.share,
        patches=fired.patches,
        most=tuple(
            (str(facts[i]), float(fired.shares[i])) for i in order if float(fired.shares[i])
        ),
        n_crossed=len(fired.crossed),
        crossed=tuple(
            (str(facts[fact]), facts[at].subject) for fact, at in fired.crossed[:_SHOWN].tolist()
        ),
    )


def _known(lm: LanguageModel, facts: Sequence[Fact], tails: Tensor | None) -> Tensor:
    """Return pairs of a token and a fact whose subject ends there, (k, 2) int64.

    Args:
        lm: The model.
        facts: The facts.
        tails: (m, TAIL) the last token ids up to each token. None: not known.
    """
    ends = SubjectEnds([subject_forms(lm, fact) for fact in facts])
    pairs = ends.pairs([] if tails is None else tails.tolist())
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
