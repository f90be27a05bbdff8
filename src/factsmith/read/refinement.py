"""Over many predictions: whether a layer says what one of its memories says, and how the answer comes up through the layers.

    found = refinement(lm, prompts)                       # at each prompt's last token; of the token the model says there
    found.composed, found.chance                          # by layer: how often the layer's own prediction is no single memory's
    found.cases["composition"]                            # by layer: how often the stream then says neither's
    found.ranks, found.probabilities, found.first         # of the answer, behind each attention and memory
    found.half                                            # per prompt: sub-updates that carry half of what speaks for the answer

Geva et al. 2021 (arXiv 2012.14913), section 5. There a layer's prediction is the token on which its output has the largest product with
the unembedding, and a memory's the same of its value; memories count where their coefficient is above zero, as ReLU leaves few. GELU and
gated models leave none at zero: a memory with a negative coefficient says what its value demotes most, and beside all of them `among`
takes the fewest that carry a given share of Σ |mᵢ|·‖vᵢ‖.

How often that happens by itself depends on how many tokens the memories cover: a thousand of them cover much of a small vocabulary. So
`chance` is the same with the predictions of a layer dealt out over the prompts: every prediction against every prompt's memories.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_items, check_number, whole_number
from ..core.errors import InputError
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table
from ..corpus.scan import banks
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from .extremes import extreme_tokens
from .stream import Fired, Stream, carrying_half, read_logits, read_stream, shares, unfold, way_up
from .unembedding import Unembedding, behind, find_unembedding
from .values import ValueTokens, value_tokens

CASES = ("residual", "ffn", "agreement", "composition")

_ROWS = 64  # prompts in a batch: each brings the coefficients of all layers


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Refinement(Shown):
    """n predictions of a model with L layers, layer by layer; shares are float64.

    answers        (n,) int64, the token looked at: the one the model says, or the target's first
    ranks          (n, 2 L + 1) int64, the answer's rank (0: the likeliest) in the stream: embedding, behind each attention and memory
    probabilities  (n, 2 L + 1) float32, its probability there, read through the model's own tail
    half           (n,) int64, how many sub-updates carry half of what speaks for the answer (`Composition.half`), of `neurons`
    neurons        how many sub-updates a prediction is made of: of experts those chosen
    among          shares of Σ |mᵢ|·‖vᵢ‖ in a layer: 1 all memories that are not at zero, 0 the strongest alone
    composed       (len(among), L) of the predictions, in how many the layer's own prediction is that of none of these memories
    chance         (len(among), L) the same, were the layer's predictions dealt out over the prompts
    counted        (len(among), L) how many memories these are on average
    half_of_layer  (n, L) int64, how many of a layer's sub-updates carry half of what speaks for the layer's own prediction
    says           (L,) in how many the layer's own prediction is the answer
    cases          {case: (L,)} what the stream predicts behind the layer's memory, before it r, and the memory's own prediction y:
                   "residual" r and not y, "ffn" y and not r, "agreement" both, "composition" neither; they sum to 1
    norm           whether the layers' and memories' own predictions have the final norm folded in
    model          what it was loaded as
    """

    answers: Tensor
    ranks: Tensor
    probabilities: Tensor
    half: Tensor
    neurons: int
    among: tuple[float, ...]
    composed: Tensor
    chance: Tensor
    counted: Tensor
    half_of_layer: Tensor
    says: Tensor
    cases: Mapping[str, Tensor]
    norm: bool
    model: str

    def tables(self) -> list[Table]:
        """Layer by layer what its own prediction is, and how far the answer is."""
        title = (
            f"{len(self.answers):,} predictions of {self.model}; half of what speaks for the answer: "
            f"{int(self.half.median()):,} of {self.neurons:,} sub-updates"
        )
        median, first = self.quantiles(0.5)[0].tolist(), self.first.tolist()
        rows = [
            (
                str(layer),
                f"{float(self.composed[0, layer]):.1%}",
                f"{float(self.says[layer]):.1%}",
                *(f"{float(self.cases[case][layer]):.1%}" for case in self.cases),
                f"{median[2 * layer + 2]:,.0f}",
                f"{first[2 * layer + 2]:.1%}",
            )
            for layer in range(len(self.says))
        ]
        names = ("layer", "no memory's", "says the answer", *self.cases, "median rank", "first")
        return [
            Table(
                title,
                dict.fromkeys(names, ">"),
                rows,
                "no memory's: the layer's prediction is that of none of its memories",
            )
        ]

    @property
    def first(self) -> Tensor:
        """(2 L + 1,) of the predictions, in how many the answer is the likeliest token already."""
        return (self.ranks == 0).double().mean(0)

    def quantiles(self, *which: float) -> Tensor:
        """(len(which), 2 L + 1) quantiles of the answer's rank: 0.5 the median."""
        return self.ranks.double().quantile(torch.tensor(which, dtype=torch.float64), dim=0)

    def rows(self) -> list[dict[str, Any]]:
        """The averages as a table, a row a layer."""
        median, first, probability = (
            self.quantiles(0.5)[0],
            self.first,
            self.probabilities.double().mean(0),
        )
        found = []
        for layer in range(len(self.says)):
            row: dict[str, Any] = {"layer": layer}
            for share, composed, chance in zip(
                self.among, self.composed[:, layer], self.chance[:, layer], strict=True
            ):
                row |= {f"composed {share:g}": float(composed), f"chance {share:g}": float(chance)}
            row |= {
                "half of layer": float(self.half_of_layer[:, layer].double().median()),
                "says": float(self.says[layer]),
            }
            row |= {case: float(shares[layer]) for case, shares in self.cases.items()}
            for name, at in (("attention", 2 * layer + 1), ("ffn", 2 * layer + 2)):
                row |= {
                    f"{name} rank": float(median[at]),
                    f"{name} first": float(first[at]),
                    f"{name} p": float(probability[at]),
                }
            found.append(row)
        return found


@torch.no_grad()
def refinement(
    lm: LanguageModel,
    prompts: Iterable[str],
    targets: Iterable[str] | None = None,
    *,
    positions: Iterable[int] | None = None,
    among: Sequence[float] = (1.0, 0.5, 0.0),
    norm: bool = False,
    values: ValueTokens | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Refinement:
    """Take many predictions apart, some dozens in one pass, and put together by layer what they have in common.

    targets       for each prompt the text whose first token is looked at; None: the token the model says
    positions     for each prompt which of its tokens predicts (negative: from its end); None: the last. A text may be given many times
    among         which memories count for `composed`: the fewest that carry such a share of Σ |mᵢ|·‖vᵢ‖; 1: all, 0: the strongest
    norm          fold the final norm into what layers and memories say by themselves; False: the paper's bare projection
    values        the model's, of all layers, where they were read before; they say with what norm
    batch_tokens  padded tokens in one forward pass

    Raises InputError for no prompts, lists that differ in length, a position outside its prompt, a target without a token, or values of
    another model or other layers; UnsupportedModelError as `compose`.
    """
    check_model(lm)
    kept = tuple(_share(share) for share in check_items(among, "among", "shares from 0 to 1"))
    budget = check_count(batch_tokens, "batch_tokens")
    rows, at, wanted = _asked(lm, prompts, targets, positions)
    if not kept:
        raise InputError("among is empty; expected shares from 0 to 1, at least one")
    scales = [behind(lm, layer) for layer in range(lm.n_layers)]
    told = _Memories(lm, norm, values, kept, scales)
    head = find_unembedding(lm)
    n, points = len(rows), 2 * lm.n_layers + 1
    answers, half, half_of_layer = (
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, lm.n_layers).long(),
    )
    ranks, probabilities = torch.zeros(n, points, dtype=torch.long), torch.zeros(n, points)
    likeliest, own = (
        torch.zeros(n, points, dtype=torch.long),
        torch.zeros(n, lm.n_layers, dtype=torch.long),
    )
    done = 0
    for group in lm.groups([len(ids) for ids in rows], budget):
        for part in (group[start : start + _ROWS] for start in range(0, len(group), _ROWS)):
            stream = read_stream(lm, [rows[i] for i in part], [at[i] for i in part], scales)
            reading = read_logits(lm, head, stream.states[-1])
            answers[part] = reading.logits.argmax(-1).cpu() if wanted is None else wanted[part]
            directions, _, _ = reading.directions(head, answers[part])
            speaking = _shares(lm, stream, directions)
            half[part] = carrying_half(speaking)
            ranks[part], probabilities[part], likeliest[part] = (
                t.T for t in way_up(lm, stream.states, answers[part])
            )
            own[part] = told.predictions(stream)
            half_of_layer[part] = told.add(stream, own[part])
            done += len(part)
            tell(progress, "predictions", done, n)
    composed, chance, counted = told.result(n)
    before, after = likeliest[:, 1::2], likeliest[:, 2::2]
    same_before, same_own = after == before, after == own
    cases = (
        same_before & ~same_own,
        same_own & ~same_before,
        same_before & same_own,
        ~same_before & ~same_own,
    )
    return Refinement(
        answers=answers,
        ranks=ranks,
        probabilities=probabilities,
        half=half,
        neurons=speaking.shape[1],
        among=kept,
        composed=composed,
        chance=chance,
        counted=counted,
        half_of_layer=half_of_layer,
        says=(own == answers[:, None]).double().mean(0),
        cases={name: case.double().mean(0) for name, case in zip(CASES, cases, strict=True)},
        norm=told.norm,
        model=lm.name,
    )


def _share(value: object) -> float:
    share = check_number(value, "a share in among", least=0, most=1)
    return share


def _asked(
    lm: LanguageModel,
    prompts: Iterable[str],
    targets: Iterable[str] | None,
    positions: Iterable[int] | None,
) -> tuple[list[list[int]], list[int], Tensor | None]:
    """Rows of token ids, which token of each predicts, and the tokens looked at where they are given."""
    texts = check_items(prompts, "prompts", "texts")
    ends = (
        [-1] * len(texts)
        if positions is None
        else check_items(positions, "positions", "whole numbers, one for each prompt", also="None")
    )
    wanted = (
        None
        if targets is None
        else check_items(targets, "targets", "texts, one for each prompt", also="None")
    )
    if not texts or len(ends) != len(texts) or (wanted is not None and len(wanted) != len(texts)):
        given = f"{len(texts)} prompts, {len(ends)} positions" + (
            "" if wanted is None else f", {len(wanted)} targets"
        )
        raise InputError(f"got {given}; expected at least one prompt, and as many of each")
    rows, at = [], []
    for text, end in zip(texts, ends, strict=True):
        ids, place = lm.prompt_ids(text), whole_number(end)
        if place is None or not -len(ids) <= place < len(ids):
            raise InputError(
                f"a position is {end!r}; expected one of the {len(ids)} tokens of {text!r}, or negative from its end"
            )
        at.append(place % len(ids))
        rows.append(ids[: at[-1] + 1] if lm.is_causal else ids)
    if wanted is None:
        return rows, at, None
    return (
        rows,
        at,
        torch.tensor(
            [
                target_ids(lm.tokenizer, text, target)[0]
                for text, target in zip(texts, wanted, strict=True)
            ]
        ),
    )


def _shares(lm: LanguageModel, stream: Stream, directions: Tensor) -> Tensor:
    """What every sub-update of all layers adds along each prediction's direction (n, d_model): (n, neurons), on the CPU."""
    found = []
    for ffn, factor, fired in zip(lm.ffn, stream.behind, stream.fired, strict=True):
        found += [
            shares(ffn, some, directions.to(factor.device) * factor).flatten(1).cpu()
            for some in fired
        ]
    return torch.cat(found, 1)


class _Memories:
    """What layers and their memories say by themselves, and how often the one is among the other.

    A sum over predictions as they come in: how many of the memories that count there say the layer's own prediction, and for `chance` how
    often each token is predicted and in how many predictions one of the memories that count says it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        norm: bool,
        values: ValueTokens | None,
        among: Sequence[float],
        scales: Sequence[Tensor],
    ) -> None:
        if values is not None and (
            values.fingerprint != lm.fingerprint
            or {bank[0] for bank in values.top_ids} != set(range(lm.n_layers))
        ):
            there = f"the values of {values.model} are not those of all layers of {lm.name}"
            raise InputError(f"{there}; read them with value_tokens(lm), or leave them out")
        values = value_tokens(lm, top=1, norm=norm) if values is None else values
        self.lm, self.norm, self.among = lm, values.norm, among
        self.head: Unembedding = find_unembedding(lm, norm=self.norm)
        self.scales = [
            scale.to(self.head.scale) if self.norm else torch.ones_like(self.head.scale)
            for scale in scales
        ]
        self.says = [  # by layer and bank: (d_ff,) and (d_ff,), the tokens for a positive and for a negative coefficient
            [
                (values.top_ids[bank][:, 0], values.bottom_ids[bank][:, 0])
                for bank in banks(lm, [layer])
            ]
            for layer in range(lm.n_layers)
        ]
        self.lengths = [
            [
                (bank.values.float() * scale.to(bank.values.device)).norm(dim=1).cpu()
                for bank in ffn.banks
            ]
            for ffn, scale in zip(lm.ffn, self.scales, strict=True)
        ]
        shape = (len(among), lm.n_layers)
        self.hits, self.counts = (
            torch.zeros(shape, dtype=torch.float64),
            torch.zeros(shape, dtype=torch.float64),
        )
        self.predicted = torch.zeros(lm.n_layers, len(self.head.weight), dtype=torch.int32)
        self.covered = torch.zeros(*shape, len(self.head.weight), dtype=torch.int32)

    def predictions(self, stream: Stream) -> Tensor:
        """What each layer says by itself: (n, n_layers)."""
        written = torch.stack(
            [
                self.head.fold(out.to(scale) * scale)
                for out, scale in zip(stream.written, self.scales, strict=True)
            ],
            1,
        )
        ids, *_ = extreme_tokens(written.flatten(0, 1), self.head.weight, 1)
        return ids.view(written.shape[:2])

    def add(self, stream: Stream, own: Tensor) -> Tensor:
        """Take in some predictions, of what each layer says by itself (n, n_layers); `half_of_layer` of each."""
        n = len(own)
        row = torch.arange(n)
        half = torch.zeros_like(own)
        for layer, (ffn, fired) in enumerate(zip(self.lm.ffn, stream.fired, strict=True)):
            direction = unfold(self.head, self.head.weight[own[:, layer]]) * self.scales[layer]
            half[:, layer] = carrying_half(
                torch.cat([shares(ffn, some, direction).flatten(1).cpu() for some in fired], 1)
            )
            said, weights = (
                torch.cat(each, 1)
                for each in zip(*(self._weighed(layer, some) for some in fired), strict=True)
            )
            weights, order = weights.double().sort(1, descending=True)
            said = said.gather(1, order)
            before = weights.cumsum(1) - weights
            self.predicted[layer] += torch.bincount(
                own[:, layer], minlength=self.predicted.shape[1]
            ).int()
            for i, share in enumerate(self.among):
                counts = weights > 0
                if share < 1:  # of all, rounding must not lose the smallest
                    counts &= before < share * weights.sum(1, keepdim=True)
                    counts[:, 0] = weights[:, 0] > 0
                of, place = counts.nonzero(as_tuple=True)
                covered = torch.zeros(n, self.covered.shape[2], dtype=torch.bool)
                covered[of, said[of, place]] = True
                self.hits[i, layer] += covered[row, own[:, layer]].sum()
                self.counts[i, layer] += len(of)
                self.covered[i, layer] += covered.sum(0, dtype=torch.int32)
        return half

    def _weighed(self, layer: int, fired: Fired) -> tuple[Tensor, Tensor]:
        """What each sub-update says by itself, and |m| times the length of its value: (n, neurons) on the CPU."""
        here = Fired(fired.places.cpu(), fired.m.cpu())
        said, weights = torch.zeros(here.m.shape, dtype=torch.long), torch.zeros_like(here.m)
        for place, row, slot in here.by_bank():
            own = here.m[row, slot]
            promoted, demoted = self.says[layer][place]
            said[row, slot] = torch.where(own > 0, promoted, demoted)
            weights[row, slot] = own.abs() * self.lengths[layer][place]
        return said.flatten(1), weights.flatten(1)

    def result(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """`composed`, `chance` and `counted` of n predictions."""
        dealt = (self.covered.double() * self.predicted.double()).sum(-1) / n**2
        return 1 - self.hits / n, 1 - dealt, self.counts / n
