"""Neurons for linear reads: a read of a layer's input becomes rows of the layer's own kind.

    form = form_of(lm, layer, mean, second_moment)     # activation, gate and biases, measured
    rows = make_rows(weights, offsets, floor, ceiling, form)
    strengths = rows.own_strengths(x)                  # (n, contexts) at the facts' inputs
    rows.appended(change, strengths[:, 0])             # with values: AppendedRows

A read is a(x) = w·x + w₀. It is about 1 at its fact's subject token and about 0 elsewhere. A row
has the pre-activation z = b (a − θ) with the threshold θ, so its coefficient act(z) is about 0
below the threshold and grows above it. With θ from the floor on, the slope b is `REACH` / (ceiling
− floor).

    with biases     key = b w,               bias = b (w₀ − θ)
    without         key = b (w + (w₀ − θ) c)                       where c·x ≈ 1
    gated           gate as above, up = 0 with the bias 1, or up = c

An activation of degree p grows as zᵖ: 1 for ReLU, GELU and SiLU, 2 for squared ReLU. A saturating
read has p + 1 rows, with thresholds from the floor to the ceiling. Their sum with binomial weights
is a finite difference of order p. It is 0 below the floor and constant above the ceiling. A ramp
has one row, with the floor as its threshold.

Everything except `form_of` and `probe_activation` is plain tensors: no transformer is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import overload

import torch
from torch import Tensor

from ..core.errors import InputError, NumericsError, UnsupportedModelError
from ..model.address import check_dense_layer
from ..model.appended import AppendedRows
from ..model.ffn import FeedForward
from ..model.language_model import LanguageModel
from ..model.neurons import rows_of
from ..model.replay import Replay, record
from ..model.trace import recording, replacing

REACH = 10.0
"""The pre-activation at the ceiling. There GELU equals its input, and at -10 it is 0. SiLU differs
from both by 5e-4."""

_EDGE, _POINTS = 40.0, 4096
"""Half of the width, and the number of points, of the grid on which activations are probed."""

_QUIET = 1e-2
"""Largest |act(z)| at z = -20 to -40, in units of act(20)."""

_UNLIKE = 0.05
"""How far the growth from z = 20 to 40 may be from 2ᵖ, as a share."""

_INSTEAD = "Choose a method that changes the present neurons, such as memit."

_PROMPT = "A"
"""The text that runs while an activation is probed. What it says does not matter."""


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation function as it was measured.

    Attributes:
        points: (k,) float64, ascending pre-activations.
        values: (k,) float64, the activation at these points.
        degree: p, where the function grows as zᵖ: 1 or 2.
        slope: s, where the function is s·zᵖ for large z.
    """

    points: Tensor
    values: Tensor
    degree: int
    slope: float

    def __call__(self, z: Tensor) -> Tensor:
        """Return the activation: linear between the points, and s·zᵖ or 0 outside them."""
        points, values = self.points.to(z.device), self.values.to(z.device)
        right = torch.searchsorted(points, z.double().contiguous()).clamp(1, len(points) - 1)
        low, high = points[right - 1], points[right]
        share = (z.double() - low) / (high - low)
        inside = values[right - 1] + share * (values[right] - values[right - 1])
        grown = self.slope * z.double() ** self.degree
        result = torch.where(z > points[-1], grown, torch.where(z < points[0], 0.0, inside))
        return result.to(z.dtype)

    @classmethod
    def measured(cls, points: Tensor, values: Tensor) -> Activation:
        """Return the activation with these values, if neurons can be built from it.

        Args:
            points: (k,) pre-activations that reach from below -20 to above 20, in any order.
            values: (k,) the activation at these points.

        Raises:
            UnsupportedModelError: It is not about 0 for very negative pre-activations, or it does
                not grow in proportion to z or z² for large ones.
        """
        order = points.double().argsort()
        points, values = points.double()[order], values.double()[order]
        once = torch.cat([points.diff() > 0, points.new_ones(1, dtype=torch.bool)])
        points, values = points[once], values[once]
        far = float(points[-1])
        top, half = (float(values[(points - at).abs().argmin()]) for at in (far, far / 2))
        quiet = float(values[points < -far / 2].abs().max())
        if not torch.isfinite(values).all() or half <= 0 or quiet > _QUIET * half:
            raise UnsupportedModelError(
                f"the activation is {quiet:.3g} for very negative inputs and {half:.3g} at "
                f"{far / 2:.0f}; a new neuron must be silent below its threshold and grow above "
                f"it, as with ReLU, GELU or SiLU. {_INSTEAD}"
            )
        growth = top / half
        degree = round(math.log2(growth)) if growth > 0 else 0
        if degree not in (1, 2) or abs(growth / 2**degree - 1) > _UNLIKE:
            raise UnsupportedModelError(
                f"the activation grows by a factor of {growth:.3g} from {far / 2:.0f} to "
                f"{far:.0f}; a new neuron needs a factor of 2, as with ReLU, GELU or SiLU, or of "
                f"4, as with squared ReLU. {_INSTEAD}"
            )
        return cls(points, values, degree, top / far**degree)


@torch.no_grad()
def probe_activation(lm: LanguageModel, layer: int) -> Activation:
    """Return the activation of a layer's neurons, measured by setting their pre-activations.

    The layer runs on one token, while the outputs of its first linears are replaced by a grid. What
    enters the down-projection then is the activation on the grid. In a gated layer the other factor
    is set to 1.

    Args:
        lm: The model. It is not changed.
        layer: The layer.

    Raises:
        LayerError: The model does not have the layer.
        UnsupportedModelError: The layer is a mixture of experts; the neurons influence each other,
            as with a norm between the two linears; or no neuron can be built from the activation.
    """
    layer = check_dense_layer(layer, lm.ffn)
    batch = lm.batch([_PROMPT])
    replay = record(lm, batch, start=batch.pivot, until=layer + 1, top=layer + 1)
    probe = partial(_probed, replay, layer)
    grid = torch.linspace(-_EDGE, _EDGE, _POINTS, dtype=torch.float64)
    # The grid in the model's number range: what the neurons really get.
    grid = grid.to(lm.ffn[layer].dtype).double()
    d_ff = lm.ffn[layer].d_ff
    mixed = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]
    chunks = torch.split(mixed, d_ff)
    values = torch.cat([probe(chunk, 1.0) for chunk in chunks])
    points, (first, *_) = torch.cat(chunks), chunks
    some = first[: len(first) // 2]
    alone = values[: len(some)]
    # Other neurons at the same points, while the rest are at 0.
    moved = probe(some.flip(0), 1.0).flip(0)
    doubled = probe(some, 2.0) / 2 if lm.ffn[layer].is_gated else alone
    near = 0.02 * (1 + alone.abs())
    if ((moved - alone).abs() > near).any() or ((doubled - alone).abs() > near).any():
        raise UnsupportedModelError(
            f"layer {layer}: a neuron's coefficient depends on more than its own key, or the two "
            f"halves of a key are not multiplied; a new neuron would change the others. {_INSTEAD}"
        )
    return Activation.measured(points, values)


def _probed(replay: Replay, layer: int, points: Tensor, up: float) -> Tensor:
    """Return the coefficients of the first neurons, where their pre-activations are `points`.

    Args:
        replay: A pass with one live token.
        layer: The layer.
        points: (k,) pre-activations, k at most d_ff. The other neurons get 0.
        up: The other factor of gated neurons.
    """
    ffn = replay.lm.ffn[layer]
    key, other = (ffn._gate, ffn._up) if ffn.is_gated else (ffn._up, None)
    assert key is not None
    fills = (
        [(key, points)] if other is None else [(key, points), (other, torch.full((ffn.d_ff,), up))]
    )

    def fill(output: Tensor, module: torch.nn.Module) -> Tensor:
        output = torch.zeros_like(output)
        for matrix, numbers in fills:
            if matrix.module is module:
                # Gate and up may be rows of one linear.
                output[..., rows_of(matrix.rows, output.shape[-1])][..., : len(numbers)] = (
                    numbers.to(output)
                )
        return output

    changes: dict[torch.nn.Module, Callable[[Tensor], Tensor]] = {
        matrix.module: partial(fill, module=matrix.module) for matrix, _ in fills
    }
    with recording({"down": ffn.down}, stop=True) as calls, replacing(changes):
        replay.layer(layer, replay.hidden[layer])
    coefficients = calls["down"][0].input.reshape(-1, ffn.d_ff)[-1]
    return coefficients[: len(points)].double().cpu()


# ── forms ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class NeuronForm:
    """What the neurons of a layer are made of.

    Attributes:
        activation: The layer's activation.
        gated: Whether a coefficient is act(gate·x)·(up·x), not act(key·x).
        biased: Whether the key, or the gate key, has a bias.
        up_biased: Whether the up key has a bias. Only gated layers have up keys.
        constant: (d_model,) the direction c with c·x ≈ 1 (`constant_direction`). It is needed if
            one of the biases is missing.
        dtype: The number format of the layer's weights.

    Raises:
        InputError: The constant is missing.
    """

    activation: Activation
    gated: bool = False
    biased: bool = True
    up_biased: bool = False
    constant: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.constant is None and not (self.biased and (self.up_biased or not self.gated)):
            raise InputError(
                "the layer has a key without a bias, and no constant direction; compute one with "
                "constant_direction"
            )


@dataclass(frozen=True, eq=False)
class NeuronRows:
    """Neurons for n reads. Row r belongs to read `facts[r]`.

    Attributes:
        keys: (r, d_model) the keys, or the gate keys of gated neurons, in the layer's dtype.
        biases: (r,), or None for a layer without.
        up_keys: (r, d_model), or None if the neurons are not gated.
        up_biases: (r,), or None for a layer without.
        parts: (r,) how a row counts in its read's strength: 1 for a ramp; 1 and -1 for a pair.
        facts: (r,) int64.
        activation: The layer's activation.
    """

    keys: Tensor
    biases: Tensor | None
    up_keys: Tensor | None
    up_biases: Tensor | None
    parts: Tensor
    facts: Tensor
    activation: Activation

    def coefficients(self, x: Tensor) -> Tensor:
        """Return the coefficients of all rows: (..., r) for inputs (..., d_model)."""
        up = None if self.up_keys is None else x @ self.up_keys.to(x).T
        return self._act(x @ self.keys.to(x).T, up)

    def strengths(self, x: Tensor) -> Tensor:
        """Return the strength of each read: (..., n), the sum of its rows' coefficients by `parts`.

        Args:
            x: (..., d_model) inputs of the layer.
        """
        coefficients = self.coefficients(x) * self.parts.to(x)
        n = int(self.facts.max()) + 1
        total = coefficients.new_zeros(*x.shape[:-1], n)
        return total.index_add_(-1, self.facts.to(x.device), coefficients)

    def own_strengths(self, x: Tensor) -> Tensor:
        """Return the strength of each read on inputs of its fact alone: (n, c) for (n, c, d_model).

        The cost does not grow with n².
        """
        each = x[self.facts]
        z = torch.einsum("rcd,rd->cr", each, self.keys.to(x))
        up = None
        if self.up_keys is not None:
            up = torch.einsum("rcd,rd->cr", each, self.up_keys.to(x))
        coefficients = self._act(z, up).T
        total = x.new_zeros(x.shape[:2])
        return total.index_add_(0, self.facts, coefficients * self.parts.to(x)[:, None])

    def values(self, change: Tensor, strengths: Tensor) -> Tensor:
        """Return the value of each row, (r, d_model), so that each read writes its change.

        Args:
            change: (n, d_model) what is wanted in addition to the layer's output.
            strengths: (n,) the strength of each read where the change is wanted.

        Raises:
            NumericsError: A strength is not above 0: the fact's neurons do not fire on its own
                subject.
        """
        if not (strengths > 0).all():
            bad = (~(strengths > 0)).nonzero().flatten().tolist()
            raise NumericsError(
                f"the neurons of {len(bad)} facts, the first is number {bad[0]}, are silent on "
                "their own subject; lower their thresholds, or leave these facts out"
            )
        each = change / strengths.to(change)[:, None]
        return each[self.facts] * self.parts.to(change)[:, None]

    def appended(self, change: Tensor, strengths: Tensor) -> AppendedRows:
        """Return the rows with their values, as a delta holds them.

        Args:
            change: As for `values`.
            strengths: As for `values`.
        """
        gated = self.up_keys is not None
        keys, biases = _plain(self.keys), _plain(self.biases)
        return AppendedRows(
            values=_plain(self.values(change, strengths)),
            facts=tuple(self.facts.tolist()),
            keys=None if gated else keys,
            biases=None if gated else biases,
            gate_keys=keys if gated else None,
            gate_biases=biases if gated else None,
            up_keys=_plain(self.up_keys),
            up_biases=_plain(self.up_biases),
        )

    def _act(self, z: Tensor, up: Tensor | None) -> Tensor:
        """Return coefficients from products with the keys, (..., r)."""
        z = z if self.biases is None else z + self.biases.to(z)
        acted = self.activation(z)
        if up is None:
            return acted
        return acted * (up if self.up_biases is None else up + self.up_biases.to(up))


def make_rows(
    weights: Tensor,
    offsets: Tensor,
    floor: Tensor,
    ceiling: Tensor,
    form: NeuronForm,
    *,
    saturating: bool = True,
) -> NeuronRows:
    """Return the neurons for n reads a(x) = weights·x + offsets.

    Args:
        weights: (n, d_model).
        offsets: (n,). In a layer without biases, reads that need no offset are best: then the
            constant direction carries the threshold alone.
        floor: (n,) the read below which a fact's neurons are silent.
        ceiling: (n,) the read above which a saturating read has its full strength. For a ramp it
            only decides on the slope.
        form: What the layer's neurons are made of.
        saturating: True: two rows for each read, or three with an activation of degree 2. The
            strength is then constant above the ceiling. False: one row, a ramp.

    Raises:
        InputError: The shapes do not fit, or a ceiling is not above its floor.
        NumericsError: A key or bias is too large for the layer's number format.
    """
    n, degree = len(weights), form.activation.degree
    _check_reads(weights, offsets, floor, ceiling)
    steps = degree if saturating else 0
    weights, offsets, floor = weights.double(), offsets.double(), floor.double()
    span = ceiling.double() - floor
    slopes = (REACH / span)[:, None]
    keys, biases, parts = [], [], []
    for step in range(steps + 1):
        levels = offsets - floor - (step / max(steps, 1)) * span
        keys.append(slopes * _affine(weights, levels, None if form.biased else form.constant))
        biases.append(slopes[:, 0] * levels)
        parts.append(weights.new_full((n,), (-1.0) ** step * math.comb(degree, step)))
    count = n * (steps + 1)
    up_keys = up_biases = None
    if form.gated:
        ones, nothing = weights.new_ones(count), weights.new_zeros(count, weights.shape[1])
        up_keys = _affine(nothing, ones, None if form.up_biased else form.constant)
        up_biases = ones if form.up_biased else None
    return NeuronRows(
        keys=_stored(torch.cat(keys), form.dtype),
        biases=_stored(torch.cat(biases), form.dtype) if form.biased else None,
        up_keys=None if up_keys is None else _stored(up_keys, form.dtype),
        up_biases=None if up_biases is None else _stored(up_biases, form.dtype),
        parts=torch.cat(parts),
        facts=torch.arange(n, device=weights.device).repeat(steps + 1),
        activation=form.activation,
    )


def form_of(lm: LanguageModel, layer: int, mean: Tensor, second_moment: Tensor) -> NeuronForm:
    """Return what a layer's neurons are made of.

    Args:
        lm: The model. It is not changed.
        layer: The layer.
        mean: As for `constant_direction`.
        second_moment: As for `constant_direction`.

    Raises:
        LayerError: The model does not have the layer.
        UnsupportedModelError: As for `probe_activation`.
    """
    activation, ffn = probe_activation(lm, layer), lm.ffn[layer]
    biased, up_biased = has_biases(ffn)
    return NeuronForm(
        activation,
        gated=ffn.is_gated,
        biased=biased,
        up_biased=up_biased,
        constant=constant_direction(mean, second_moment)[0],
        dtype=ffn.dtype,
    )


def has_biases(ffn: FeedForward) -> tuple[bool, bool]:
    """Return whether the keys of a layer have biases: the key or gate key, and the up key."""
    gate, up = (
        matrix is not None and getattr(matrix.module, "bias", None) is not None
        for matrix in (ffn._gate, ffn._up)
    )
    return (gate, up) if ffn.is_gated else (up, False)


def constant_direction(
    mean: Tensor, second_moment: Tensor, *, ridge: float = 1e-4
) -> tuple[Tensor, float]:
    """Return the direction c with c·x ≈ 1 by least squares, and its scatter.

    Args:
        mean: (d_model,) mean of the layer's inputs. Those of the facts should weigh as much as
            those of ordinary text, because the threshold of a fact is θ c·x.
        second_moment: (d_model, d_model) mean of x xᵀ over the same inputs, not centred.
        ridge: Added to the diagonal, in units of its mean.

    Returns:
        (d_model,) float64, and the root mean square of c·x − 1 over the inputs.

    Raises:
        NumericsError: The second moment is not finite, or not positive.
    """
    moment, mu = second_moment.double(), mean.double()
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    factor, info = torch.linalg.cholesky_ex(moment + ridge * moment.diagonal().mean() * eye)
    if int(info) or not torch.isfinite(factor).all():
        raise NumericsError(
            "the second moment of the layer's inputs is not positive or not finite; compute it "
            "from more text"
        )
    c = torch.cholesky_solve(mu[:, None], factor)[:, 0]
    square = c @ moment @ c - 2 * c @ mu + 1  # E (c·x − 1)²
    return c, float(square.clamp_min(0).sqrt())


def _check_reads(weights: Tensor, offsets: Tensor, floor: Tensor, ceiling: Tensor) -> None:
    shapes = [tuple(numbers.shape) for numbers in (offsets, floor, ceiling)]
    if weights.dim() != 2 or any(shape != (len(weights),) for shape in shapes):
        raise InputError(
            f"reads have weights of shape {tuple(weights.shape)}, and offsets, floor and ceiling "
            f"of {shapes}; expected (n, d_model), and (n,) for each of the others"
        )
    if not (ceiling > floor).all():
        raise InputError("a ceiling is not above its floor; give one that is")


def _affine(weights: Tensor, levels: Tensor, constant: Tensor | None) -> Tensor:
    """Return keys for weights·x + levels. With a bias for the levels, these are the weights."""
    return weights if constant is None else weights + levels[:, None] * constant.to(weights)


@overload
def _plain(numbers: Tensor) -> Tensor: ...
@overload
def _plain(numbers: None) -> None: ...
def _plain(numbers: Tensor | None) -> Tensor | None:
    """Return numbers as float32 on the CPU."""
    return None if numbers is None else numbers.detach().to("cpu", torch.float32)


def _stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in the layer's format.

    Raises:
        NumericsError: One is not finite there.
    """
    stored = numbers.to(dtype)
    if not torch.isfinite(stored).all():
        raise NumericsError(
            f"a key of a new neuron is {float(numbers.abs().max()):.3g}, too large for {dtype}; "
            "give a ceiling farther above the floor, or load the model in bfloat16 or float32"
        )
    return stored
