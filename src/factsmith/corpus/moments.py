"""Second moments of the coefficients: how often, and together with what, each neuron of a layer is on.

    moments = second_moments(lm, texts, layers=[3, 4, 5], checkpoint="moments.partial")      # {3: SecondMoment, ...}, one pass
    moments[3]                                            # SecondMoment(layer=3, d_ff=3072, count=49152, split_half=0.14, excess=0.09)
    moments[3].save("moments/layer3.safetensors")
    SecondMoment.load("moments/layer3.safetensors", lm, 3).solve(keys)      # C⁻¹ k; a file of another model or layer is refused
    SecondMoment.from_matrix(matrix, count=50_000)        # computed elsewhere

The editors weigh a change by it: what the layer does on ordinary text should stay. It is E[m mᵀ], not centred; papers say covariance.

How much text is enough shows in the result. Each text goes to one of two halves (by its digest, so that copies stay together), and two
figures compare them:

- `split_half` is ‖A − B‖ / ‖C‖ of the halves' matrices (Frobenius); C itself is about half as far from the truth. Few large directions
  decide it.
- `excess` is what an editor feels. Among all changes that give a key its new value, C⁻¹ k is the one that disturbs other text least; from
  finite text it fits that text too well, and disturbs unseen text more than it had to. For keys k ~ N(0, A), u = A⁻¹ k,

      ρ = E[uᵀ B u] / E[uᵀ A u],      q = ½ (1 − 1/ρ),      excess = q / (1 − q)

  where B stands for the unseen text: with Gaussian coefficients ρ is 1 / (1 − 2 d_ff / n), q is d_ff / n, and the excess that of a matrix
  of all n tokens. On trained models it agrees with the excess measured on much more text (`benchmarks/moments.py`). Above 0.5 the
  halves are all but singular, and it is a lower bound; 1 is the most it can be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..core.artefact import Checkpoint, read_tensors, write_tensors
from ..core.checks import check_count, check_items, check_limit
from ..core.errors import (
    DamagedError,
    FingerprintError,
    InputError,
    NumericsError,
    UnsupportedModelError,
)
from ..core.tables import counted
from ..model.address import check_layer
from ..model.language_model import LanguageModel
from .factors import cholesky, jittered, null_space, solve_moment, spectrum
from .scan import check_dtype, scan
from .text import Piece, batches, pieces, windows

TOKENS_PER_NEURON = 16
"""Tokens read for each neuron when nobody says how many: twice as many as published work finds enough (0.3 % of 44 million for 16,384
neurons), and as edits of trained models stopped getting better from; the excess is then 9 to 12 % (`benchmarks/results/moments.json`)."""

MOST_EXCESS = 0.5
"""Excess above which a second moment is thin: its halves are all but singular then, and what a change disturbs cannot be told from it."""

_FORMAT = "1"

_STRIPS = 8
"""A symmetric sum is kept as strips from the diagonal to the right edge: 9/16 of the products and of the memory of all of it."""

_PROBES = 64
"""Keys drawn for `excess`; they add less than 1 % to what the choice of halves makes it vary."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SecondMoment:
    """E[m mᵀ] of the input of one layer's down-projection.

    matrix       (d_ff, d_ff) float32 or float64, symmetric, already divided by `count`
    count        tokens it was averaged over
    fingerprint  of the model; "" when unknown
    corpus       sha256 of the token ids it was computed from; "" when unknown
    layer        it belongs to; None when unknown
    split_half   relative difference between two halves of the text; None when unknown, or when all of it fell into one half
    excess       how much more a change weighed by it disturbs other text than one weighed by endless text would, estimated from the
                 halves: 0.05 is 5 % (of the squared norm); a lower bound above 0.5; None as above

    Raises InputError for what is no square matrix of floating-point numbers or no count of at least 1, NumericsError when a number is not
    finite.
    """

    matrix: Tensor
    count: int
    fingerprint: str = ""
    corpus: str = ""
    layer: int | None = None
    split_half: float | None = None
    excess: float | None = None

    def __repr__(self) -> str:
        known = {
            "layer": self.layer,
            "d_ff": self.d_ff,
            "count": self.count,
            "split_half": self.split_half,
            "excess": self.excess,
        }
        return f"SecondMoment({', '.join(f'{k}={v:.3g}' if isinstance(v, float) else f'{k}={v}' for k, v in known.items() if v is not None)})"

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Tensor):
            raise InputError(
                f"a second moment is a tensor (d_ff, d_ff); got a {type(self.matrix).__name__}"
            )
        if (
            self.matrix.ndim != 2
            or self.matrix.shape[0] != self.matrix.shape[1]
            or not self.matrix.is_floating_point()
        ):
            raise InputError(
                f"expected a floating-point matrix (d_ff, d_ff); got {tuple(self.matrix.shape)} {self.matrix.dtype}"
            )
        count = check_count(
            self.count, "count", "the number of tokens that the second moment is averaged over"
        )
        object.__setattr__(self, "count", count)
        if not torch.isfinite(self.matrix).all():
            raise NumericsError(
                "the second moment holds NaN or infinity; the model that gave it does not compute finite states"
            )

    @classmethod
    def from_matrix(
        cls,
        matrix: Tensor | np.ndarray,
        *,
        count: float | Tensor,
        fingerprint: str = "",
        corpus: str = "",
        layer: int | None = None,
    ) -> SecondMoment:
        """Take E[m mᵀ] (d_ff, d_ff), a tensor or a numpy array, already divided by `count`, computed elsewhere.

        count  a whole number, however it is kept: 44_000_000, 44e6, a tensor of one element
        """
        if isinstance(matrix, np.ndarray) and matrix.dtype.kind in "fiub":
            matrix = torch.tensor(matrix)
        if isinstance(count, Tensor) and count.numel() == 1:
            count = count.item()
        if isinstance(count, float) and count.is_integer():
            count = int(count)
        return cls(
            matrix=cast("Tensor", matrix),
            count=cast("int", count),
            fingerprint=fingerprint,
            corpus=corpus,
            layer=layer,
        )

    def check(
        self, lm: LanguageModel, layer: int | None = None, *, base: str | None = None
    ) -> None:
        """Raises FingerprintError unless it was computed from this model, and from this layer of it; what is unknown is not asked.

        base: for a model that carries edits, the fingerprint of the model without them, which the matrix is of; "" when unknown.
        """
        if self.fingerprint:  # a model's own fingerprint takes a pass over its weights
            expected, which = (
                (lm.fingerprint, "now") if base is None else (base, "without its edits")
            )
            if expected not in ("", self.fingerprint):
                raise FingerprintError(
                    f"the second moment was computed from a model with fingerprint {self.fingerprint[:12]}; {lm.name} has {expected[:12]} "
                    f"{which}: compute it again with `factsmith moments` or second_moments"
                )
        if layer is None:
            return
        if self.layer is not None and self.layer != layer:
            raise FingerprintError(
                f"the second moment is of layer {self.layer}; layer {layer} was asked for: load that layer's"
            )
        if lm.ffn[layer].d_ff != self.d_ff:
            raise FingerprintError(
                f"the second moment is of {self.d_ff} neurons; layer {layer} of {lm.name} has {lm.ffn[layer].d_ff}: "
                "it belongs to another model"
            )

    def describe(self) -> str:
        """How much text it saw, and how far that carries, in words."""
        text = f"{self.count:,} tokens, {self.count / self.d_ff:.1f} a neuron"
        if self.split_half is None or self.excess is None:
            return f"{text}; halves not compared"
        more = f"{'at least ' if self.excess > 0.5 else ''}{100 * self.excess:.1f} %"
        return f"{text}; halves differ by {100 * self.split_half:.1f} %, edits disturb unseen text {more} more than need be"

    @property
    def d_ff(self) -> int:
        """Number of neurons of the layer."""
        return self.matrix.shape[0]

    @cached_property
    def is_thin(self) -> bool:
        """Whether it comes from too little text to tell what ordinary text needs: a change then looks harmless that is not.

        It does where there are fewer tokens than neurons or `excess` is above MOST_EXCESS; where the excess is unknown, where there are
        fewer than TOKENS_PER_NEURON (of a matrix from `from_matrix`, whose text is unknown, that is not asked), or the neurons that are
        ever on have a singular matrix: its factor needs a jitter.
        """
        if self.excess is not None:
            return self.count < self.d_ff or self.excess > MOST_EXCESS
        if self.corpus and self.count < TOKENS_PER_NEURON * self.d_ff:
            return True
        if self.jitter == 0:
            return False
        used = self.matrix.diagonal() > 0
        return bool(used.all()) or jittered(self.matrix[used][:, used])[1] > 0

    @property
    def too_little(self) -> str:
        """What to say of it where it is thin, and what to do."""
        more = TOKENS_PER_NEURON * self.d_ff
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return (
            f"the second moment{layer} is from too little text ({counted(self.count, 'token')}, {self.count / self.d_ff:.2g} a neuron) to "
            f"tell what ordinary text needs; give more text, at least {more:,} tokens"
        )

    @cached_property
    def _factored(self) -> tuple[Tensor, float]:
        return jittered(self.matrix)

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factor (d_ff, d_ff) float64, computed once; see `cholesky`."""
        return self._factored[0]

    @property
    def jitter(self) -> float:
        """Which of `JITTERS` the factor needed: 0 for a matrix from enough text, but for neurons that are never on and rounding."""
        return self._factored[1]

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d_ff,), ascending, and eigenvectors (d_ff, d_ff), float64, computed once; see `spectrum`."""
        return spectrum(self.matrix)

    def null_space(self, *, threshold: float | None = None, energy: float | None = None) -> Tensor:
        """Basis (d_ff, q) float64 of what text hardly uses; see `null_space`."""
        return null_space(*self.spectrum, threshold=threshold, energy=energy)

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ kᵢ for every row of keys (n, d_ff), as float64."""
        return solve_moment(self.factor, keys)

    def save(self, path: str | os.PathLike[str], *, packed: bool = False) -> None:
        """Write one safetensors file, replacing an older one in one step. Raises WorkspaceError when it cannot be written.

        packed: keep the Cholesky factor in float16, each row scaled to unit norm, which takes d_ff·(d_ff + 1) bytes: 1 MB for 1,024
        neurons, a quarter of the float32 matrix. u = C⁻¹ k then differs by 0.15 % (measured on three layers with condition numbers of
        1e4 to 2e5), and the result is positive definite by construction. Rounding C itself to float16 costs 20 to 40 times as much.
        """
        if packed:
            scale = self.factor.norm(dim=1)
            rows, columns = torch.tril_indices(self.d_ff, self.d_ff)
            tensors = {
                "packed": (self.factor / scale[:, None])[rows, columns].half(),
                "scale": scale.float(),
            }
        else:
            tensors = {"matrix": self.matrix}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": _FORMAT,
            "count": str(self.count),
            "fingerprint": self.fingerprint,
            "corpus": self.corpus,
            **{key: repr(value) for key in _OPTIONAL if (value := getattr(self, key)) is not None},
        }
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], lm: LanguageModel | None = None, layer: int | None = None
    ) -> SecondMoment:
        """Read what `save` wrote, packed or not, by this version or an earlier one.

        lm, layer: what it has to belong to. Raises DamagedError when the file is missing, altered, or something else, FingerprintError
        when it belongs to another model or layer.
        """
        path = Path(path)
        if not path.is_file():
            raise DamagedError(
                f"no second moment at {path}; expected a file written by SecondMoment.save"
            )
        tensors, metadata = read_tensors(path, "compute the second moment again")
        if metadata.get("format") != _FORMAT or set(tensors) not in (
            {"matrix"},
            {"packed", "scale"},
        ):
            raise DamagedError(
                f"{path} is not a second moment of format {_FORMAT}; it holds {sorted(tensors)}"
            )
        matrix = (
            tensors["matrix"]
            if "matrix" in tensors
            else _unpack(tensors["packed"], tensors["scale"])
        )
        moment = cls(
            matrix=matrix,
            count=int(metadata["count"]),
            fingerprint=metadata["fingerprint"],
            corpus=metadata["corpus"],
            **{key: kind(metadata[key]) for key, kind in _OPTIONAL.items() if key in metadata},
        )
        if lm is not None:
            moment.check(lm, layer)
        return moment


_OPTIONAL: Mapping[str, Callable[[str], Any]] = {"layer": int, "split_half": float, "excess": float}
"""What a file may state beside the rest; files of the first version do not."""


def second_moments(
    lm: LanguageModel,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    max_tokens: float | None = None,
    batch_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[int, SecondMoment]:
    """E[m mᵀ] of the down-projection's input over every token of `texts`, for several layers in one pass.

    max_tokens    stop after this many tokens (the last text is cut); None: TOKENS_PER_NEURON for each neuron of the widest layer;
                  math.inf: read all of them
    batch_tokens  padded tokens in one forward pass
    dtype         torch.bfloat16 runs the forward pass in it: faster, and off by much less than the halves of the text differ. The weights
                  are cast on their way and stay as they are. None: the model's own
    checkpoint    file that keeps the sums, written now and then; called again with the same arguments and texts, a run that was killed goes
                  on where it stood, and gives the same numbers. It is removed at the end
    progress      called with the number of tokens done, after every batch

    Texts longer than the model's context are cut into pieces. The pass ends before the highest layer's down-projection. Products are taken
    in float32 (float64 for a float64 model) for one batch and summed in float64; padding is left out.

    Raises LayerError for a layer the model does not have, UnsupportedModelError for one with experts, InputError when there is no text,
    for another dtype, for a batch of no tokens, or when the checkpoint was made with other arguments or texts, FingerprintError when it was
    made from another model, DamagedError when it is not whole, WorkspaceError when it cannot be written, NumericsError when a state is not
    finite.
    """
    layers = _checked(lm, layers, dtype)
    batch_tokens = check_count(
        batch_tokens, "batch_tokens", "the number of padded tokens in one forward pass"
    )
    limit = enough_tokens(lm, layers, max_tokens)
    fingerprint = lm.fingerprint
    sums = {layer: _Sum(lm.ffn[layer].d_ff) for layer in layers}
    settings = {
        "layers": str(layers),
        "max_tokens": str(limit),
        "batch_tokens": str(batch_tokens),
        "dtype": str(dtype),
    }
    made_from = {
        "format": f"unfinished second moments {_FORMAT}",
        "fingerprint": fingerprint,
        **settings,
    }
    kept = None if checkpoint is None else Checkpoint(Path(checkpoint), made_from)
    held = None if kept is None else kept.load()
    at = _At(0, "", [0, 0]) if held is None else _restore(sums, *held)
    plan = enumerate(_plan(pieces(lm, texts, limit), batch_tokens), 1)
    if at.batch:
        last = next(itertools.islice(plan, at.batch - 1, None), None)
        if last is None or last[1].digest != at.digest:
            raise InputError(
                f"{checkpoint} was made from other text; give the same text again, or another checkpoint, or delete it"
            )
        if progress is not None:
            progress(sum(at.counts))
    for number, batch in plan:
        for (layer, *_), found in scan(lm, batch.rows, layers, dtype).items():
            sums[layer].add(batch.half, found.m)
        at.counts[batch.half] += sum(map(len, batch.rows))
        at = _At(number, batch.digest, at.counts)
        if kept is not None:
            kept.save(partial(_state, sums, at))
        if progress is not None:
            progress(sum(at.counts))
    if not at.batch:
        raise InputError("second_moments got no text; expected strings with at least one token")
    moments: dict[int, SecondMoment] = {}
    for layer in layers:
        matrix, split_half, excess = sums.pop(layer).compared(at.counts)
        moments[layer] = SecondMoment(
            matrix=matrix,
            count=sum(at.counts),
            fingerprint=fingerprint,
            corpus=at.digest,
            layer=layer,
            split_half=split_half,
            excess=excess,
        )
    if kept is not None:
        kept.remove()
    return moments


def enough_tokens(
    lm: LanguageModel, layers: Iterable[int], max_tokens: float | None = None
) -> float:
    """How many tokens second moments are computed from: `max_tokens`, or TOKENS_PER_NEURON for each neuron of the widest layer.

    Raises InputError for anything but a number of at least 1 (infinity included), LayerError for a layer the model does not have.
    """
    if max_tokens is None:
        return TOKENS_PER_NEURON * max(
            lm.ffn[check_layer(layer, lm.n_layers)].d_ff for layer in layers
        )
    return check_limit(max_tokens, "max_tokens")


def _checked(lm: LanguageModel, layers: Iterable[int], dtype: torch.dtype | None) -> list[int]:
    """The layers in order, each once; raises what `second_moments` says about its arguments."""
    layers = sorted(set(check_items(layers, "layers", "layer numbers, such as [3, 4]")))
    if not layers:
        raise InputError("second_moments needs at least one layer; got none")
    for layer in layers:
        if lm.ffn[check_layer(layer, lm.n_layers)].n_experts:
            raise UnsupportedModelError(
                f"layer {layer} is a mixture of experts; second moments are for dense layers: choose another"
            )
    check_dtype(lm, dtype)
    return layers


class _Sum:
    """Σ m mᵀ of one layer in float64, apart for two halves of the text.

    strips[half][i] holds rows starts[i] to starts[i] + width from the diagonal to the right edge.
    """

    def __init__(self, d_ff: int) -> None:
        self.width = math.ceil(d_ff / _STRIPS)
        self.starts = range(0, d_ff, self.width)
        self.strips = [
            [
                torch.zeros(min(self.width, d_ff - start), d_ff - start, dtype=torch.float64)
                for start in self.starts
            ]
            for _ in range(2)
        ]

    def add(self, half: int, m: Tensor) -> None:
        """Count coefficients (tokens, d_ff) in."""
        strips = self.strips[half]
        for i, start in enumerate(self.starts):
            strips[i] = (
                strips[i].to(m.device).add_(m[:, start : start + self.width].T @ m[:, start:])
            )

    def compared(self, counts: Sequence[int]) -> tuple[Tensor, float | None, float | None]:
        """The mean over all tokens (d_ff, d_ff), and how far its halves are apart: `split_half` and `excess`, None with one half empty."""
        halves = [self._matrix(half) for half in range(2)]
        count = sum(counts)
        mean = (
            (halves[0].to(halves[1].device) + halves[1]) / count
            if all(counts)
            else halves[counts.index(count)] / count
        )
        if not all(counts):
            return mean, None, None
        a, b = (half.div_(n) for half, n in zip(halves, counts, strict=True))
        balance = (
            2 * math.sqrt(counts[0] * counts[1]) / count
        )  # halves of different size differ more; 1 for equal ones
        difference = balance * (a - b).norm() / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
        return mean, float(difference), _excess(a, b, counts)

    def _matrix(self, half: int) -> Tensor:
        strips = self.strips[half]
        full = strips[0].new_empty(strips[0].shape[1], strips[0].shape[1])
        for start, strip in zip(self.starts, strips, strict=True):
            block = strip[:, : len(strip)]
            strip[:, : len(strip)] = (
                block + block.T
            ) / 2  # products of rounded numbers are symmetric but for rounding
            full[start : start + len(strip), start:] = strip
            full[start:, start : start + len(strip)] = strip.T
        return full


def _excess(a: Tensor, b: Tensor, counts: Sequence[int]) -> float | None:
    """The module's formula with the halves in both roles; None when a half has no neuron that is ever on."""
    unused = []
    for own, other, n in ((a, b, counts[0]), (b, a, counts[1])):
        try:
            factor = cholesky(own)
        except NumericsError:
            return None
        normal = torch.randn(
            len(own), _PROBES, dtype=factor.dtype, generator=torch.Generator().manual_seed(0)
        ).to(factor.device)
        u = torch.linalg.solve_triangular(
            factor.T, normal, upper=True
        )  # own⁻¹ k of keys k = factor @ normal
        # Over what u does to the half itself, not over |normal|²: neurons that are never on count on neither side.
        ratio = float((u * (other @ u)).sum() / (u * (own @ u)).sum())
        unused.append(max(1 - 1 / ratio, 0.0) * n / sum(counts))
    share = sum(unused) / 2
    return min(share / (1 - share), 1.0)


@dataclasses.dataclass(frozen=True)
class _At:
    """How far a run is: batches done, the digest of the text up to the window of the last, tokens of either half."""

    batch: int
    digest: str
    counts: list[int]


def _state(sums: Mapping[int, _Sum], at: _At) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Sums and how far they are, for a checkpoint."""
    tensors = {
        f"{layer}.{half}.{i}": strip.cpu()
        for layer, held in sums.items()
        for half, strips in enumerate(held.strips)
        for i, strip in enumerate(strips)
    }
    return tensors, {
        "batch": str(at.batch),
        "digest": at.digest,
        "count0": str(at.counts[0]),
        "count1": str(at.counts[1]),
    }


def _restore(
    sums: Mapping[int, _Sum], tensors: Mapping[str, Tensor], stand: Mapping[str, str]
) -> _At:
    """The inverse of `_state`."""
    for layer, held in sums.items():
        for half, strips in enumerate(held.strips):
            for i in range(len(strips)):
                strips[i] = tensors[f"{layer}.{half}.{i}"]
    return _At(int(stand["batch"]), stand["digest"], [int(stand["count0"]), int(stand["count1"])])


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Token ids to run together, which half of the text they belong to, and the digest of the text up to the end of their window."""

    rows: list[list[int]]
    half: int
    digest: str


def _plan(found: Iterator[Piece], batch_tokens: int) -> Iterator[_Rows]:
    """The batches of a corpus; the same pieces give the same batches."""
    digest = hashlib.sha256()
    for window in windows(found):
        halves: tuple[list[Piece], list[Piece]] = ([], [])
        for piece in window:
            text = repr(piece.ids).encode()
            digest.update(text)
            halves[hashlib.sha256(text).digest()[0] & 1].append(piece)
        for half, members in enumerate(halves):
            for rows in batches(members, batch_tokens):
                yield _Rows([piece.ids for piece in rows], half, digest.hexdigest())


def _unpack(packed: Tensor, scale: Tensor) -> Tensor:
    n = len(scale)
    if packed.shape != (n * (n + 1) // 2,):
        raise DamagedError(
            f"packed second moment has {packed.numel()} numbers for {n} neurons; expected {n * (n + 1) // 2}"
        )
    factor = torch.zeros(n, n, dtype=torch.float64)
    rows, columns = torch.tril_indices(n, n)
    factor[rows, columns] = packed.double()
    factor *= scale.double()[:, None]
    return factor @ factor.T
