"""read.unembedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModelError
from ..model.ffn import same, tolerance
from ..model.language_model import LanguageModel
from ..model.trace import recording, replacing


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
    if (
        last is None
        or not isinstance(weight, Tensor)
        or weight.dim() != 2
        or weight.shape[1] != lm.d_model
    ):
        raise UnsupportedModelError(
            f"{lm.name} has no single matrix from its last hidden state to the vocabulary to read values with"
        )
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
        with (
            replacing({ffn.module: lambda own: output.to(own).expand_as(own)}),
            recording({"layer": lm.layers[layer]}, stop=True) as calls,
        ):
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


def norm_after(lm: LanguageModel, layers: Iterable[int], norm: bool) -> dict[int, Tensor | float]:
    """`behind` for each of some layers; 1 where norms are left out."""
    return {layer: behind(lm, layer) if norm else 1.0 for layer in layers}


def _probes(lm: LanguageModel) -> Tensor:
    """A few random states whose mean is not zero, exact in the model's dtype: (4, d_model) float32."""
    return (
        (torch.randn(4, lm.d_model, generator=torch.Generator().manual_seed(0)) + 1)
        .to(lm.dtype)
        .float()
    )


def _scale(lm: LanguageModel, given: Tensor, found: Tensor) -> Tensor | None:
    """The one vector (d,) whose product with the rows given (n, d) is what was found (n, d); None when there is none.

    Where a vector of the model's own (or one more than it, as some norms count) is that within the dtype's rounding, it is that vector,
    and exact.
    """
    scale = (found / given).median(0).values  # of several, since one may be near zero
    if not same(given * scale, found, tolerance(lm.dtype)):
        return None
    own = [
        p.detach().to(scale) + more
        for p in lm.module.parameters()
        if p.shape == scale.shape
        for more in (0, 1)
    ]
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
