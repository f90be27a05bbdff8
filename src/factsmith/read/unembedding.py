"""The way from the stream to the logits: the final norm, the unembedding, and norms after a layer.

    head = find_unembedding(lm)                 # scale, shift and matrix of the model's last step
    head.fold(values) @ head.weight.T           # what values of neurons add to the logits
    output_scale(lm, 3)                         # what layer 3 multiplies its FFN's output by

Models spell these steps in many ways. This module does not read their code: it sends a few random
states through each step, and takes the norm that explains what comes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModelError
from ..model.absent import device_of, whole
from ..model.language_model import LanguageModel
from ..model.tolerance import same, tolerance
from ..model.trace import recording, replacing
from ..model.turns import asking


@dataclass(frozen=True, eq=False, kw_only=True)
class Unembedding:
    """How a last hidden state h becomes logits.

    The logits are weight @ (scale * centre(h) / size(h) + shift) + bias, before any softcap.

    Attributes:
        weight: The unembedding matrix, (vocab, d_model). A view of the model's own.
        bias: The bias of the logits, (vocab,), times the multiplier. None where the model has none.
        scale: Scale of the final norm times the multiplier, (d_model,). Ones without a norm.
        shift: Shift of the final norm times the multiplier, (d_model,). Zeros without a shift.
        centres: Whether the norm subtracts the mean first (LayerNorm).
        divides: Whether the norm divides by the root mean square. False where no norm comes last.
        multiplier: What the model multiplies its logits by (Cohere, Granite). 1 in most models.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    shift: Tensor
    centres: bool
    divides: bool
    multiplier: float = 1.0

    def fold(self, values: Tensor) -> Tensor:
        """Send additions to the stream through the final norm, without its division.

        Takes and returns (..., d_model).
        """
        values = values.to(self.scale)
        return (values - values.mean(-1, keepdim=True) if self.centres else values) * self.scale

    def unfold(self, rows: Tensor) -> Tensor:
        """Move the final norm to the other side of the product, without its division.

        `fold(values) @ row` equals `values @ unfold(row)`. Takes rows of the unembedding matrix,
        (..., d_model), and returns the same shape in float32.
        """
        rows = rows.float() * self.scale
        return rows - rows.mean(-1, keepdim=True) if self.centres else rows

    def size(self, hidden: Tensor) -> Tensor:
        """Return the root mean square that the norm divides states by, without its epsilon.

        Takes (..., d_model) and returns (...).
        """
        if not self.divides:
            return hidden.new_ones(hidden.shape[:-1])
        hidden = hidden - hidden.mean(-1, keepdim=True) if self.centres else hidden
        return hidden.square().mean(-1).sqrt()


@asking()
def find_unembedding(lm: LanguageModel, *, norm: bool = True) -> Unembedding:
    """Return the model's unembedding and its final norm.

    Args:
        lm: The model.
        norm: Include the final norm. False: the bare matrix and bias.

    Raises:
        UnsupportedModelError: when the model has no single unembedding matrix, or does more than
            normalise its last hidden state before the matrix.
    """
    last: nn.Module | None = lm.module.get_output_embeddings()
    weight = getattr(last, "weight", None)
    if (
        last is None
        or not isinstance(weight, Tensor)
        or weight.dim() != 2
        or weight.shape[1] != lm.d_model
    ):
        raise UnsupportedModelError(
            f"{lm.name} has no single matrix from its last hidden state to the vocabulary, "
            "so its values cannot be read as tokens. Use a model with one unembedding matrix."
        )
    bias = getattr(last, "bias", None)
    plain = Unembedding(
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        scale=torch.ones(lm.d_model, device=weight.device, dtype=torch.float32),
        shift=torch.zeros(lm.d_model, device=weight.device, dtype=torch.float32),
        centres=False,
        divides=False,
    )
    return _with_norm(lm, last, plain) if norm else plain


def _with_norm(lm: LanguageModel, last: nn.Module, plain: Unembedding) -> Unembedding:
    """Add the final norm and the multiplier to a bare unembedding, which `last` computes."""

    def read(states: Tensor) -> tuple[Tensor, Tensor]:
        above = next(lm.layers[-1].parameters())
        with recording({"last": last}, copy=False) as calls:
            logits = lm.head(states.to(device_of(above), above.dtype))
        return calls["last"][0].input.reshape(states.shape).to(plain.scale), logits.to(plain.scale)

    states = _probes(lm).to(plain.weight.device)
    (normed, logits), (shift, _) = read(states), read(torch.zeros_like(states))
    multiplier = _multiplier(plain, normed, logits, lm.dtype)
    for centres, divides in ((False, True), (True, True), (False, False)):
        kind = dataclasses.replace(plain, centres=centres, divides=divides)
        scale = _scale(lm, kind.fold(states) / kind.size(states)[:, None], normed - shift[0])
        if scale is not None:
            return dataclasses.replace(
                kind,
                scale=scale * multiplier,
                shift=shift[0] * multiplier,
                bias=None if plain.bias is None else plain.bias * multiplier,
                multiplier=multiplier,
            )
    raise UnsupportedModelError(
        f"{lm.name} does more than normalise its last hidden state before the vocabulary, "
        "so the final norm cannot be folded into values. Read values with norm=False."
    )


@torch.no_grad()
def output_scale(lm: LanguageModel, layer: int) -> Tensor:
    """Return what a layer multiplies its FFN's output by before the stream, (d_model,).

    In most models these are ones. Where a norm follows the FFN (Gemma 2), it is the scale of that
    norm; the division by the output's size is left out.

    Raises:
        UnsupportedModelError: when something other than a norm or a multiplier follows the FFN.
    """
    ffn = lm.ffn[layer]
    probes = _probes(lm).to(device_of(next(lm.layers[layer].parameters())))
    if ffn.adds_directly:
        return torch.ones_like(probes[0])
    batch = lm.batch(["The name of the place is"])

    def added(output: Tensor) -> Tensor:
        with (
            replacing({ffn.module: lambda current: output.to(current).expand_as(current)}),
            recording({"layer": lm.layers[layer]}, stop=True) as calls,
        ):
            lm.forward(batch)
        return calls["layer"][0].output[0, -1].float()

    without = added(torch.zeros_like(probes[0]))
    changes = torch.stack([added(probe) - without for probe in probes])
    for divisor in (probes.square().mean(-1, keepdim=True).sqrt(), 1.0):
        scale = _scale(lm, probes / divisor, changes)
        if scale is not None:
            return scale
    raise UnsupportedModelError(
        f"{lm.name}: what layer {layer} applies after its FFN is neither a norm of the FFN's "
        "output nor a multiplier, so a sub-update has no share of what follows. "
        "Values alone can be read with norm=False."
    )


def output_scales(
    lm: LanguageModel, layers: Iterable[int] | None = None, *, norm: bool = True
) -> dict[int, Tensor]:
    """Return `output_scale` of some layers by layer. None: of all layers.

    With norm=False each is a single one, ().
    """
    wanted = range(lm.n_layers) if layers is None else layers
    return {
        layer: output_scale(lm, layer) if norm else torch.ones((), dtype=torch.float32)
        for layer in wanted
    }


def _probes(lm: LanguageModel) -> Tensor:
    """Return random states whose mean is not zero, exact in the model's dtype: (4, d_model)."""
    return (
        (
            torch.randn(
                4, lm.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32
            )
            + 1
        )
        .to(lm.dtype)
        .float()
    )


def _scale(lm: LanguageModel, given: Tensor, seen: Tensor) -> Tensor | None:
    """Return the vector (d,) whose product with rows (n, d) gives the rows seen, or None.

    A norm usually multiplies by a vector of the model's own, and some norms by one more than it.
    Where such a vector equals the computed scale within the dtype's rounding, return that vector:
    it is exact.
    """
    scale = (seen / given).median(0).values  # of several rows, since one may be near zero
    if not same(given * scale, seen, tolerance(lm.dtype)):
        return None
    candidates = [
        whole(p).to(scale) + more
        for p in lm.module.parameters()
        if p.shape == scale.shape
        for more in (0, 1)
    ]
    candidates.append(torch.ones_like(scale))
    errors = (
        torch.stack([(vector - scale).abs().mean() for vector in candidates]) / scale.abs().mean()
    )
    best = int(errors.argmin())
    return candidates[best] if float(errors[best]) < _ROUNDING else scale


_ROUNDING = 0.01


def _multiplier(plain: Unembedding, given: Tensor, logits: Tensor, dtype: torch.dtype) -> float:
    """Return what the model multiplies weight @ given + bias by to get its logits (n, vocab).

    1 where the logits are not a multiple of that product: the model applies a softcap.
    """
    raw = given @ plain.weight.to(given).T + (0 if plain.bias is None else plain.bias.to(given))
    multiple = float((raw * logits).sum() / raw.square().sum())
    if same(raw, logits, tolerance(dtype)) or not same(raw * multiple, logits, tolerance(dtype)):
        return 1.0
    return multiple
