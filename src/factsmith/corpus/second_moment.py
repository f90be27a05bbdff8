"""Second moments of one layer: E[m mᵀ], what it was computed from, and how sure it is.

    moment = SecondMoment.load("moments/layer3.safetensors", lm, 3)     # refuses another model's
    moment.solve(keys)                                                  # C⁻¹ k
    inputs = second_moments(lm, texts, [3], site="inputs")[3]           # of what enters the layer
    inputs.mean, inputs.covariance                                      # (d_model,), squared

`corpus.moments` explains the figures, and computes them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..core.artefact import (
    believing,
    read_tensors,
    stated_count,
    stated_digest,
    stated_number,
    stored,
    write_tensors,
)
from ..core.checks import check_count
from ..core.errors import DamagedError, FingerprintError, InputError, NumericsError
from ..core.identity import same_model
from ..core.tables import counted
from ..model.language_model import LanguageModel
from .factors import jittered, null_space, solve_moment, spectrum
from .measuring import TOKENS_PER_NEURON
from .moments_file import lower_triangle, stored_matrix
from .scan import Site

MOST_EXCESS = 0.5
"""Excess above which a second moment is thin.

Its halves are then almost singular, and it cannot tell how much a change disturbs."""

_FORMAT = "1"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SecondMoment:
    """E[m mᵀ] of the input of one layer's down-projection, or of what enters the layer.

    Attributes:
        matrix: (d_ff, d_ff) float32 or float64, symmetric, already divided by `count`. With
            site="inputs" it is (d_model + 1, d_model + 1): the vectors are the inputs of the
            feed-forward network with a constant 1 after them, so that it holds their mean.
        count: Number of tokens it is averaged over.
        fingerprint: The model's fingerprint; "" if unknown.
        corpus: sha256 of the token ids it was computed from; "" if unknown. For any beginning of
            the bundled corpus it is the name and the digest of the whole (`ordinary.DIGEST`).
        layer: The layer; None if unknown.
        split_half: Relative difference between two halves of the text. None if unknown, or if all
            text fell into one half.
        excess: How much more a change weighed by this matrix disturbs other text than a change
            weighed by endless text, as the halves estimate it. 0.05 is 5 % of the squared norm.
            A lower bound above 0.5. None as for `split_half`.
        site: "coefficients", or "inputs".
        sample: Some of the inputs, (m, d_model) float16. None: none were kept.
        tails: The last token ids up to each of them, (m, TAIL) int32, filled with -1. None: none
            were kept.

    Raises:
        InputError: The matrix is not a square floating-point matrix, or the count is below 1.
        NumericsError: A number is not finite.
    """

    matrix: Tensor
    count: int
    fingerprint: str = ""
    corpus: str = ""
    layer: int | None = None
    split_half: float | None = None
    excess: float | None = None
    site: Site = "coefficients"
    sample: Tensor | None = None
    tails: Tensor | None = None

    def __repr__(self) -> str:
        names = ("layer", "d_ff", "count", "split_half", "excess")
        values = {name: getattr(self, name) for name in names}
        shown = {
            name: f"{value:z.3g}" if isinstance(value, float) else str(value)
            for name, value in values.items()
            if value is not None
        }
        return f"SecondMoment({', '.join(f'{name}={text}' for name, text in shown.items())})"

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Tensor):
            raise InputError(
                f"the matrix is a {type(self.matrix).__name__}; give a tensor (d_ff, d_ff)"
            )
        is_square = self.matrix.ndim == 2 and self.matrix.shape[0] == self.matrix.shape[1]
        if not is_square or not self.matrix.is_floating_point():
            raise InputError(
                f"the matrix is {tuple(self.matrix.shape)} {self.matrix.dtype}; give a "
                "floating-point matrix (d_ff, d_ff)"
            )
        count = check_count(
            self.count, "count", "the number of tokens that the second moment is averaged over"
        )
        object.__setattr__(self, "count", count)
        if not torch.isfinite(self.matrix).all():
            raise NumericsError(
                "the second moment holds NaN or infinity; compute it from a model whose states are "
                "finite"
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
        """Make a second moment of a matrix that was computed elsewhere.

        Args:
            matrix: E[m mᵀ] (d_ff, d_ff), a tensor or a numpy array, already divided by `count`.
            count: A whole number in any type: 44_000_000, 44e6, or a tensor of one element.
            fingerprint: The model's fingerprint; "" if unknown.
            corpus: sha256 of the token ids; "" if unknown.
            layer: The layer; None if unknown.
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
        """Check that the second moment is of this model and layer, as far as it knows its own.

        Args:
            lm: The model.
            layer: The layer. None: any.
            base: For a model that carries edits, the fingerprint of the model without them, which
                the second moment was computed from; "" if unknown.

        Raises:
            FingerprintError: It is of another model or layer.
        """
        if self.fingerprint:
            # The model's own fingerprint takes a pass over its weights.
            expected, when = (
                (lm.fingerprint, "now") if base is None else (base, "without its edits")
            )
            if expected and not same_model(self.fingerprint, expected):
                raise FingerprintError(
                    "the second moment was computed from a model with fingerprint "
                    f"{self.fingerprint[:12]}; {lm.name} has {expected[:12]} {when}. Compute it "
                    "again with second_moments or `factsmith moments`"
                )
        if layer is None:
            return
        if self.layer is not None and self.layer != layer:
            raise FingerprintError(
                f"the second moment is of layer {self.layer}; layer {layer} was asked for. Load "
                f"the second moment of layer {layer}"
            )
        if self.site == "inputs":
            if self.d_ff != lm.d_model + 1:
                raise FingerprintError(
                    f"the input statistics are of width {self.d_ff - 1}; {lm.name} has width "
                    f"{lm.d_model}, so they belong to another model"
                )
        elif lm.ffn[layer].n_original != self.d_ff:
            raise FingerprintError(
                f"the second moment is of {self.d_ff} neurons; layer {layer} of {lm.name} has "
                f"{lm.ffn[layer].n_original}, so it belongs to another model"
            )

    def describe(self) -> str:
        """Say how much text the second moment saw, and how well it generalizes."""
        what = "a neuron" if self.site == "coefficients" else "a dimension of what enters the layer"
        text = f"{self.count:,} tokens, {self.count / self.d_ff:z.1f} {what}"
        if self.split_half is None or self.excess is None:
            return f"{text}; halves not compared"
        if self.site == "inputs":
            return f"{text}; halves differ by {100 * self.split_half:z.1f} %"
        more = f"{'at least ' if self.excess > 0.5 else ''}{100 * self.excess:z.1f} %"
        return (
            f"{text}; halves differ by {100 * self.split_half:z.1f} %, edits disturb unseen text "
            f"{more} more than necessary"
        )

    @property
    def d_ff(self) -> int:
        """Number of neurons of the layer; of inputs d_model + 1."""
        return self.matrix.shape[0]

    @property
    def mean(self) -> Tensor:
        """The mean of the inputs, (d_model,) float64.

        Raises:
            InputError: The second moment is one of coefficients.
        """
        self.check_site("inputs")
        return self.matrix[:-1, -1].double()

    @property
    def covariance(self) -> Tensor:
        """The covariance of the inputs, centred, (d_model, d_model) float64.

        Raises:
            InputError: The second moment is one of coefficients.
        """
        mean = self.mean
        return self.matrix[:-1, :-1].double() - torch.outer(mean, mean)

    def check_site(self, site: Site) -> None:
        """Check that this is what a method draws on.

        Raises:
            InputError: It is of the other site.
        """
        if self.site != site:
            raise InputError(
                f"the second moment is one of {self.site}, and the method needs one of {site}; "
                f'give second_moments(lm, texts, layers, site="{site}"), or leave moments out',
                argument="moments",
            )

    @cached_property
    def is_thin(self) -> bool:
        """Whether there was too little text to tell what ordinary text needs.

        A harmful change can then look harmless. A second moment with an `excess` is thin if it has
        fewer tokens than neurons, or an excess above MOST_EXCESS. Without one it is thin if it has
        fewer than TOKENS_PER_NEURON tokens a neuron (unless it comes from `from_matrix`, where the
        text is unknown), or if the factor of those neurons that are ever on needs a jitter.
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
        """The sentence to show if the second moment is thin, with the way out."""
        least = TOKENS_PER_NEURON * self.d_ff
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return (
            f"the second moment{layer} is from too little text ({counted(self.count, 'token')}, "
            f"{self.count / self.d_ff:z.2g} a neuron) to tell what ordinary text needs; give more "
            f"text, at least {least:,} tokens"
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
        """Which of `JITTERS` the factor needed.

        It is 0 for a matrix from enough text, apart from rounding and neurons that are never on.
        """
        return self._factored[1]

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d_ff,), ascending, and eigenvectors (d_ff, d_ff), float64, computed once."""
        return spectrum(self.matrix)

    def null_space(self, *, threshold: float | None = None, energy: float | None = None) -> Tensor:
        """Return a basis (d_ff, q) float64 of what text hardly uses; see `null_space`."""
        return null_space(*self.spectrum, threshold=threshold, energy=energy)

    def solve(self, keys: Tensor) -> Tensor:
        """Return C⁻¹ kᵢ for every row of keys (n, d_ff), as float64."""
        return solve_moment(self.factor, keys)

    def save(
        self, path: str | os.PathLike[str], *, packed: bool = False, triangle: bool = False
    ) -> None:
        """Write one safetensors file in one step. An older file is replaced.

        Args:
            path: Where to write.
            packed: Keep the Cholesky factor in float16, each row scaled to unit norm. That takes
                d_ff·(d_ff + 1) bytes: 1 MB for 1,024 neurons, a quarter of the float32 matrix.
                u = C⁻¹ k then differs by 0.15 % (measured on three layers with condition numbers
                of 1e4 to 2e5), and the matrix is positive definite by construction. Rounding C
                itself to float16 costs 20 to 40 times as much.
            triangle: Keep the lower triangle in float32, 2·d_ff·(d_ff + 1) bytes: half of the
                float32 matrix. A symmetric float32 matrix comes back with the same bits. `packed`
                goes first.

        Raises:
            WorkspaceError: The file cannot be written.
        """
        if packed:
            scale = self.factor.norm(dim=1)
            rows, columns = torch.tril_indices(self.d_ff, self.d_ff)
            tensors = {
                "packed": (self.factor / scale[:, None])[rows, columns].half(),
                "scale": scale.float(),
            }
        elif triangle:
            tensors = {"triangle": lower_triangle(self.matrix)}
        else:
            tensors = {"matrix": self.matrix}
        if self.sample is not None:
            tensors["sample"] = self.sample
        if self.tails is not None:
            tensors["tails"] = self.tails
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": _FORMAT,
            "count": str(self.count),
            "fingerprint": self.fingerprint,
            "corpus": self.corpus,
            **{key: repr(value) for key, value in self._stated.items()},
        }
        write_tensors(Path(path), tensors, metadata)

    @property
    def _stated(self) -> dict[str, Any]:
        """The optional fields to write. A file of coefficients looks as in earlier versions."""
        values = {key: getattr(self, key) for key in _OPTIONAL}
        return {key: value for key, value in values.items() if value not in (None, "coefficients")}

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], lm: LanguageModel | None = None, layer: int | None = None
    ) -> SecondMoment:
        """Read a file that `save` wrote, packed or not, in this version or an earlier one.

        Args:
            path: The file.
            lm: The model it must belong to. None: any.
            layer: The layer it must belong to. None: any.

        Raises:
            DamagedError: The file is missing, altered, or something else.
            FingerprintError: It belongs to another model or layer.
        """
        path = Path(path)
        if not path.is_file():
            raise DamagedError(
                f"there is no second moment at {path}; give a file that SecondMoment.save wrote"
            )
        advice = "compute the second moment again"
        tensors, metadata = read_tensors(path, advice)
        layouts = ({"matrix"}, {"triangle"}, {"packed", "scale"})
        parts = set(tensors) - {"sample", "tails"}
        if metadata.get("format") != _FORMAT or parts not in layouts:
            raise DamagedError(
                f"{path} is not a second moment of format {_FORMAT}: it holds "
                f"{', '.join(sorted(tensors))[:200]}. Compute the second moment again"
            )
        with believing(path, "a second moment", advice):
            moment = cls(
                matrix=stored_matrix(tensors),
                count=stated_count(metadata, "count", least=1),
                fingerprint=stated_digest(metadata, "fingerprint"),
                corpus=stated_digest(metadata, "corpus"),
                sample=_optional(tensors, "sample", torch.float16),
                tails=_optional(tensors, "tails", torch.int32),
                **{key: read(metadata, key) for key, read in _OPTIONAL.items() if key in metadata},
            )
        if lm is not None:
            moment.check(lm, layer)
        return moment


def _optional(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor | None:
    """Return a matrix of a file, or None if it has none of this name."""
    return stored(tensors, name, (None, None), (dtype,)) if name in tensors else None


def _site(metadata: Mapping[str, str], key: str) -> Site:
    site = metadata[key].strip("'")
    if site not in ("coefficients", "inputs"):
        raise ValueError(f"its site is {site!r:.40}")
    return cast("Site", site)


_OPTIONAL: Mapping[str, Callable[[Mapping[str, str], str], Any]] = {
    "layer": stated_count,
    "split_half": stated_number,
    "excess": stated_number,
    "site": _site,
}
"""Fields that a file may lack: files of the first version have none of them."""
