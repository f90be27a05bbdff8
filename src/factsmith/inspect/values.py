"""What the memory's values promote: each value read out through the unembedding, as the model's own last layer is.

    found = value_tokens(lm, layers=[3], top=10)       # top and bottom tokens of every value of layer 3
    found.of((3, 17))                                  # those of one neuron, with their scores
    head = find_unembedding(lm)                        # the model's tail as scale, shift and a matrix

Geva et al. 2022 (arXiv 2203.14680): a value v is a distribution over the vocabulary, softmax(E v), and tokens with a large score are what
it promotes; with a negative coefficient it demotes them. The paper leaves the final norm out (`norm=False`); folded in, a value is
centred where the norm centres and weighed by the norm's scale, which is what becomes of it on the way to the logits.

Thousands of values times a whole vocabulary are screened by a rough product, and what comes near the top is scored again in float32.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import check_count, check_items
from ..errors import InputError, LayerError, UnsupportedModelError
from ..model.ffn import Neuron, check_layer, find_neuron, same, tolerance
from ..model.load import LanguageModel, check_model
from ..model.scan import Bank, bank_name, bank_of, banks, named_bank
from ..model.tokens import word_ids
from ..model.trace import recording, replacing
from ..progress import Progress, tell
from ..tables import Shown, Table, counted
from ..tensors import read_artefact, write_tensors


@dataclass(frozen=True, eq=False, kw_only=True)
class Unembedding:
    """How a last hidden state h becomes logits: weight @ (scale * centre(h) / size(h) + shift) + bias, before any softcap.

    weight      (vocab, d_model), a view of the model's own
    bias        (vocab,), or None
    scale       (d_model,) of the final norm, times the multiplier; ones where there is neither
    shift       (d_model,) of the final norm, times the multiplier; zeros where it has none
    centres     whether the norm takes the mean off first (LayerNorm)
    divides     whether it divides by the root mean square; False where no norm comes last
    multiplier  what the model multiplies its logits by (Cohere, Granite); 1 in most; the bias is multiplied as well
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    shift: Tensor
    centres: bool
    divides: bool
    multiplier: float = 1.0

    def fold(self, values: Tensor) -> Tensor:
        """What becomes of additions to the stream, but for the division: (..., d_model) to (..., d_model)."""
        values = values.to(self.scale)
        return (values - values.mean(-1, keepdim=True) if self.centres else values) * self.scale

    def size(self, hidden: Tensor) -> Tensor:
        """The root mean square that the norm divides a state by, without its epsilon: (..., d_model) to (...)."""
        if not self.divides:
            return hidden.new_ones(hidden.shape[:-1])
        hidden = hidden - hidden.mean(-1, keepdim=True) if self.centres else hidden
        return hidden.square().mean(-1).sqrt()


@torch.no_grad()
def find_unembedding(lm: LanguageModel, *, norm: bool = True) -> Unembedding:
    """The model's unembedding and its final norm, which is told by what it does with a few random states; without it: norm=False.

    Raises UnsupportedModelError when the model has no single unembedding matrix, or does more before it than normalise.
    """
    last: nn.Module | None = lm.module.get_output_embeddings()
    weight = getattr(last, "weight", None)
    if last is None or not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != lm.d_model:
        raise UnsupportedModelError(f"{lm.name} has no single matrix from its last hidden state to the vocabulary to read values with")
    bias = getattr(last, "bias", None)
    plain = Unembedding(
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        scale=torch.ones(lm.d_model, device=weight.device),
        shift=torch.zeros(lm.d_model, device=weight.device),
        centres=False,
        divides=False,
    )
    if not norm:
        return plain

    def read(states: Tensor) -> tuple[Tensor, Tensor]:
        with recording({"last": last}, copy=False) as calls:
            logits = lm.head(states.to(next(lm.layers[-1].parameters())))
        return calls["last"][0].input.reshape(states.shape).to(plain.scale), logits.to(plain.scale)

    states = _probes(lm).to(weight.device)
    (found, logits), (shift, _) = read(states), read(torch.zeros_like(states))
    multiplier = _multiplier(plain, found, logits, lm.dtype)
    for centres, divides in ((False, True), (True, True), (False, False)):
        kind = dataclasses.replace(plain, centres=centres, divides=divides)
        scale = _scale(lm, kind.fold(states) / kind.size(states)[:, None], found - shift[0])
        if scale is not None:
            return dataclasses.replace(
                kind,
                scale=scale * multiplier,
                shift=shift[0] * multiplier,
                bias=None if bias is None else bias.detach() * multiplier,
                multiplier=multiplier,
            )
    raise UnsupportedModelError(
        f"{lm.name} does more than normalise its last hidden state before the vocabulary; read values with norm=False"
    )


@torch.no_grad()
def behind(lm: LanguageModel, layer: int) -> Tensor:
    """What a layer multiplies its memory's output by on the way to the stream, (d_model,): ones in most models, else a norm's scale.

    The division by the output's size, which such a norm also does, is left out. Raises UnsupportedModelError for anything else.
    """
    ffn = lm.ffn[layer]
    probes = _probes(lm).to(next(lm.layers[layer].parameters()).device)
    if ffn.adds_directly:
        return torch.ones_like(probes[0])
    batch = lm.batch(["The name of the place is"])

    def added(output: Tensor) -> Tensor:
        with replacing({ffn.module: lambda own: output.to(own).expand_as(own)}), recording({"layer": lm.layers[layer]}, stop=True) as calls:
            lm.forward(batch)
        return calls["layer"][0].output[0, -1].float()

    without = added(torch.zeros_like(probes[0]))
    found = torch.stack([added(probe) - without for probe in probes])
    for divisor in (probes.square().mean(-1, keepdim=True).sqrt(), 1.0):
        scale = _scale(lm, probes / divisor, found)
        if scale is not None:
            return scale
    raise UnsupportedModelError(
        f"{lm.name}: what layer {layer} puts behind its memory is no norm of its output and no multiplier, so sub-updates have no share of "
        "what follows; values alone can be read with norm=False"
    )


def _behind(lm: LanguageModel, layers: Iterable[int], norm: bool) -> dict[int, Tensor | float]:
    """`behind` for each of some layers; 1 where norms are left out."""
    return {layer: behind(lm, layer) if norm else 1.0 for layer in layers}


def _probes(lm: LanguageModel) -> Tensor:
    """A few random states whose mean is not zero, exact in the model's dtype: (4, d_model) float32."""
    return (torch.randn(4, lm.d_model, generator=torch.Generator().manual_seed(0)) + 1).to(lm.dtype).float()


def _scale(lm: LanguageModel, given: Tensor, found: Tensor) -> Tensor | None:
    """The one vector (d,) whose product with the rows given (n, d) is what was found (n, d); None when there is none.

    Where a vector of the model's own (or one more than it, as some norms count) is that within the dtype's rounding, it is that vector,
    and exact.
    """
    scale = (found / given).median(0).values  # of several, since one may be near zero
    if not same(given * scale, found, tolerance(lm.dtype)):
        return None
    own = [p.detach().to(scale) + more for p in lm.module.parameters() if p.shape == scale.shape for more in (0, 1)]
    own.append(torch.ones_like(scale))
    errors = torch.stack([(vector - scale).abs().mean() for vector in own]) / scale.abs().mean()
    best = int(errors.argmin())
    return own[best] if float(errors[best]) < _ROUNDING else scale


_ROUNDING = 0.01


def _multiplier(plain: Unembedding, given: Tensor, logits: Tensor, dtype: torch.dtype) -> float:
    """What the model multiplies weight @ given + bias by to have its logits (n, vocab); 1 where they are no multiple (a softcap)."""
    raw = given @ plain.weight.to(given).T + (0 if plain.bias is None else plain.bias.to(given))
    found = float((raw * logits).sum() / raw.square().sum())
    if same(raw, logits, tolerance(dtype)) or not same(raw * found, logits, tolerance(dtype)):
        return 1.0
    return found


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ValueTokens(Shown):
    """The tokens that values promote most and least, by bank of neurons.

    top_ids, bottom_ids        {bank: (d_ff, k) int64}, best first; bottom: the most demoted first
    top_scores, bottom_scores  {bank: (d_ff, k) float32}, what one unit of coefficient adds to the token's logit, but for the norm's divisor
    words                      {id: text} of every token among them
    norm                       whether the final norm is folded in
    model, fingerprint         what the model was loaded as, and its fingerprint
    """

    top_ids: Mapping[Bank, Tensor]
    top_scores: Mapping[Bank, Tensor]
    bottom_ids: Mapping[Bank, Tensor]
    bottom_scores: Mapping[Bank, Tensor]
    words: Mapping[int, str]
    norm: bool
    model: str
    fingerprint: str

    def of(self, neuron: Neuron, *, bottom: bool = False) -> list[tuple[str, float]]:
        """The tokens of one neuron's value with their scores. Raises LayerError for one whose value was not read."""
        bank, i = bank_of(neuron)
        if bank not in self.top_ids or not 0 <= i < len(self.top_ids[bank]):
            raise LayerError(f"the value of {tuple(neuron)} was not read; there are those of {', '.join(map(str, self.top_ids))}")
        ids, scores = (self.bottom_ids, self.bottom_scores) if bottom else (self.top_ids, self.top_scores)
        return [(self.words[token], score) for token, score in zip(ids[bank][i].tolist(), scores[bank][i].tolist(), strict=True)]

    def tables(self) -> list[Table]:
        """What was read, of which model."""
        k = max((ids.shape[1] for ids in self.top_ids.values()), default=0)
        rows = [
            ("values", f"{sum(map(len, self.top_ids.values())):,} in {counted(len(self.top_ids), 'bank')}"),
            ("tokens each", f"{k} most promoted, {k} most demoted"),
            ("final norm", "folded in" if self.norm else "left out"),
        ]
        return [Table(f"values of {self.model}", {"": "<", " ": "<"}, rows)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `values.safetensors` in one step. Raises WorkspaceError."""
        tensors = {f"{bank_name(bank)}/{part}": t.contiguous() for part in _PARTS for bank, t in getattr(self, part).items()}
        described = {"model": self.model, "fingerprint": self.fingerprint, "norm": str(self.norm), "words": json.dumps(dict(self.words))}
        write_tensors(Path(folder) / FILE, tensors, {"format": _FORMAT, **described})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ValueTokens:
        """Read what `save` wrote. Raises DamagedError when it is missing or altered."""
        tensors, metadata = read_artefact(Path(folder) / FILE, "values", _FORMAT, "ValueTokens.save", "read the values again")
        parts: dict[str, dict[Bank, Tensor]] = {part: {} for part in _PARTS}
        for name, tensor in tensors.items():
            bank, _, part = name.partition("/")
            parts[part][named_bank(bank)] = tensor
        return cls(
            **{part: dict(sorted(own.items())) for part, own in parts.items()},
            words={int(i): word for i, word in json.loads(metadata["words"]).items()},
            norm=metadata["norm"] == "True",
            model=metadata["model"],
            fingerprint=metadata["fingerprint"],
        )


FILE = "values.safetensors"
_FORMAT = "values 1"
_PARTS = ("top_ids", "top_scores", "bottom_ids", "bottom_scores")


@torch.no_grad()
def value_tokens(
    lm: LanguageModel,
    layers: Iterable[int] | None = None,
    *,
    top: int = 10,
    norm: bool = True,
    progress: Progress | None = None,
) -> ValueTokens:
    """The `top` most promoted and most demoted tokens of every value of some layers (None: all).

    norm: fold the final norm in, and what the layer puts behind its memory (Gemma 2); False: the paper's bare projection.
    Raises LayerError for a layer that does not exist, InputError for `top`, UnsupportedModelError as `find_unembedding`.
    """
    check_model(lm)
    head = find_unembedding(lm, norm=norm)
    top = check_count(top, f"top (of {len(head.weight)} tokens)", "the number of tokens wanted for each value")
    wanted = range(lm.n_layers) if layers is None else [check_layer(x, lm.n_layers) for x in check_items(layers, "layers", "layer numbers")]
    if not wanted:
        raise InputError("no layer was asked for; expected at least one, or None for all")
    found: dict[Bank, tuple[Tensor, ...]] = {}
    every, scale, screen = banks(lm, wanted), _behind(lm, wanted, norm), Screen.of(head.weight)
    for bank, neurons in every.items():
        found[bank] = extreme_tokens(head.fold(neurons.values.float() * scale[neurons.layer]), head.weight, top, screen)
        tell(progress, "values", len(found), len(every))
    used = torch.unique(torch.cat([ids.flatten() for tensors in found.values() for ids in tensors[::2]])).tolist()
    return ValueTokens(
        **{part: {bank: tensors[i] for bank, tensors in found.items()} for i, part in enumerate(_PARTS)},
        words={token: lm.tokenizer.decode([token]) for token in used},
        norm=norm,
        model=lm.name,
        fingerprint=lm.fingerprint,
    )


@torch.no_grad()
def tokens_of(
    lm: LanguageModel, head: Unembedding, scales: Sequence[Tensor], neurons: Sequence[Neuron], negative: Sequence[bool], k: int
) -> list[list[tuple[str, float]]]:
    """The k tokens that each neuron's sub-update promotes most, with their scores for one unit: of a negative coefficient those the value
    demotes. scales: `behind` of every layer. Raises LayerError for a neuron the model does not have."""
    places = [find_neuron(lm.ffn, neuron) for neuron in neurons]
    if not places:
        return []
    own = [lm.ffn[layer].banks[bank].values[i].float() * scales[layer] for layer, bank, i in places]
    values = torch.stack([value.to(head.weight.device) for value in own])
    top, top_scores, bottom, bottom_scores = extreme_tokens(head.fold(values), head.weight, k)
    found = []
    for row, is_negative in enumerate(negative):
        ids, scores = (bottom[row], -bottom_scores[row]) if is_negative else (top[row], top_scores[row])
        found.append([(lm.tokenizer.decode([token]), score) for token, score in zip(ids.tolist(), scores.tolist(), strict=True)])
    return found


@dataclass(frozen=True)
class Promotion:
    """A neuron whose value has a word among its tokens: which token, its rank (0: the first), and the score."""

    neuron: Neuron
    token: str
    rank: int
    score: float


@torch.no_grad()
def promoters(lm: LanguageModel, word: str, k: int = 20, *, demoted: bool = False, norm: bool = True) -> list[Promotion]:
    """The k neurons, of all the model's, whose values promote (or demote) a word most, by its rank among all tokens, then by score.

    Any word will do: of one that is no single token its first is looked for (`word_ids`). Ranks are counted for the `_NEAR` · k values with
    the largest share of their length along a token. Raises InputError for a word without a token, UnsupportedModelError as
    `find_unembedding`.
    """
    check_model(lm)
    k = check_count(k, "k", "how many neurons to find")
    ids = word_ids(lm.tokenizer, word)
    head, sign = find_unembedding(lm, norm=norm), -1.0 if demoted else 1.0
    rows = head.weight[ids].float() * sign
    every = banks(lm)
    scale = _behind(lm, {bank[0] for bank in every}, norm)

    def folded(bank: Bank, chosen: Tensor | slice) -> Tensor:
        return head.fold((every[bank].values[chosen].float() * scale[bank[0]]).to(rows.device))

    best: list[tuple[float, Bank, int, int]] = []
    for bank in every:
        values = folded(bank, slice(None))
        along = (values @ rows.T) / values.norm(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        share, column = along.max(1)
        top = share.topk(min(_NEAR * k, len(share)))
        best += [(float(s), bank, int(i), int(column[i])) for s, i in zip(top.values, top.indices, strict=True) if s > 0]
        best = sorted(best, key=lambda entry: -entry[0])[: _NEAR * k]
    if not best:
        return []
    chosen = torch.stack([folded(bank, torch.tensor([i], device=every[bank].values.device))[0] for _, bank, i, _ in best])
    own = (chosen * rows[[column for *_, column in best]]).sum(1)
    ranks = torch.zeros(len(best), dtype=torch.int64, device=rows.device)
    for part in torch.split(head.weight, 16_384):
        ranks += (sign * (chosen @ part.float().T) > own[:, None] + own.abs()[:, None] * 1e-6).sum(1)  # itself is not above itself
    found = [
        Promotion((*bank, i), lm.tokenizer.decode([ids[column]]), rank, sign * score)
        for (_, bank, i, column), rank, score in zip(best, ranks.tolist(), own.tolist(), strict=True)
    ]
    return sorted(found, key=lambda p: (p.rank, -abs(p.score), p.neuron))[:k]


_NEAR = 16


_ROWS, _GROUP, _MARGIN, _ERRORS = 256, 64, 14, 5


def extreme_tokens(vectors: Tensor, weight: Tensor, k: int, screen: Screen | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rows of a matrix (vocab, d), the k with the largest and the k with the smallest product with each vector (n, d).

    Returns (ids, scores, ids, scores), each (n, k), best and most negative first. Rows are screened by a rough product: kept by groups of
    64, then one by one, `_MARGIN` more than asked for, and these are scored in float32. How far the rough scores are off is seen there;
    a vector whose k best do not lie `_ERRORS` of these errors clear of what was left out is multiplied with the whole matrix instead.
    `screen` is `Screen.of(weight)`, for who asks often.
    """
    k = min(k, len(weight))
    vectors = vectors.to(weight.device, torch.float32)
    if screen is None:
        if len(vectors) <= _ROWS:
            return _plain_extremes(vectors, weight, k)
        screen = Screen.of(weight)
    near = min(len(weight), k + _MARGIN)
    buffer = screen.empty(min(_ROWS, len(vectors)))
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for part in torch.split(vectors, _ROWS):
        rough, unit = screen.scores(part, buffer[: len(part)])
        row: list[Tensor] = []
        doubtful = torch.zeros(len(part), dtype=torch.bool, device=part.device)
        for sign in (1, -1):
            columns, guessed = _largest(rough, near, len(weight), sign)
            exact = torch.cat([_products(part[a : a + 32], weight, columns[a : a + 32]) for a in range(0, len(part), 32)])
            best = (sign * exact).topk(k, dim=1)
            row += [columns.gather(1, best.indices), sign * best.values]
            guessed = guessed * unit
            error = (guessed - exact).square().mean(1).sqrt()
            if near < len(weight):
                doubtful |= best.values[:, -1] - sign * guessed[:, -1] < _ERRORS * error
        again = doubtful.nonzero()[:, 0]
        if len(again):
            for own, plain in zip(row, _plain_extremes(part[again], weight, k), strict=True):
                own[again] = plain.to(own)
        found.append(tuple(tensor.cpu() for tensor in row))  # type: ignore[arg-type]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


def _plain_extremes(vectors: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = vectors @ weight.float().T
    top, bottom = scores.topk(k, dim=1), scores.topk(k, dim=1, largest=False)
    return top.indices.cpu(), top.values.cpu(), bottom.indices.cpu(), bottom.values.cpu()


def _products(vectors: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Products of each vector (n, d) with some rows of a matrix, numbered (n, m): (n, m). Few at a time stay in the cache."""
    products: Tensor = torch.linalg.vecdot(nn.functional.embedding(rows, weight).float(), vectors[:, None])
    return products


def _largest(scores: Tensor, near: int, vocab: int, sign: int) -> tuple[Tensor, Tensor]:
    """Columns (n, near) of the largest scores (n, vocab and padding), or of the smallest, and these scores, best first.

    The largest lie in as many groups as there are of them, those with the largest maxima.
    """
    ends = torch.iinfo(scores.dtype) if scores.dtype == torch.int32 else torch.finfo(scores.dtype)
    scores[:, vocab:] = ends.min if sign > 0 else ends.max
    groups = scores.view(len(scores), -1, _GROUP)
    extremes = groups.amax(2) if sign > 0 else groups.amin(2)
    kept = extremes.topk(min(near, extremes.shape[1]), dim=1, largest=sign > 0).indices
    rows = torch.arange(len(scores), device=scores.device)[:, None] * groups.shape[1]
    members = groups.view(-1, _GROUP).index_select(0, (rows + kept).flatten()).view(len(scores), -1)
    best = members.topk(near, dim=1, largest=sign > 0)
    return kept.gather(1, best.indices // _GROUP) * _GROUP + best.indices % _GROUP, best.values


@dataclass(frozen=True, eq=False)
class Screen:
    """A matrix (vocab, d) to be multiplied with quickly and roughly, with zeros up to whole groups of rows.

    rows     (vocab and padding, d): int8 or bfloat16 where the processor multiplies them by instruction, else float32
    columns  (d,) float32, what one step of int8 is worth in each column; None for other dtypes
    """

    rows: Tensor
    columns: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> Screen:
        """For a matrix, on its device."""
        padding = (0, 0, 0, -len(weight) % _GROUP)
        dtype = _fastest(weight.device)
        if dtype != torch.int8:
            return cls(nn.functional.pad(weight.to(dtype), padding))
        columns = (weight.abs().amax(0).float() / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        rows = torch.cat([(part / columns).round_().to(torch.int8) for part in torch.split(weight, 4096)])
        return cls(nn.functional.pad(rows, padding), columns)

    def empty(self, n: int) -> Tensor:
        """Room for the scores of n vectors."""
        return torch.empty(n, len(self.rows), dtype=self.rows.dtype if self.columns is None else torch.int32, device=self.rows.device)

    def scores(self, vectors: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Rough products with vectors (n, d), written to `out` (n, vocab and padding), and what one of their units is worth, (n, 1)."""
        if self.columns is None:
            return torch.mm(vectors.to(self.rows.dtype), self.rows.T, out=out), vectors.new_ones(len(vectors), 1)
        vectors = vectors * self.columns
        unit = (vectors.abs().amax(1, keepdim=True) / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        return torch._int_mm((vectors / unit).round_().to(torch.int8), self.rows.T, out=out), unit


_STEPS = 127


def _fastest(device: torch.device) -> torch.dtype:
    """The dtype whose products a device makes fastest."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        if any(known.get(name) for name in ("amx_int8", "avx512_vnni", "avx_vnni")):
            return torch.int8
        if any(known.get(name) for name in ("amx_bf16", "avx512_bf16")):
            return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float32
