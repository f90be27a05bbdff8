"""Second moments of the coefficients: how often each neuron of a layer is on, and with what others.

    moments = second_moments(lm, texts, layers=[3, 4, 5], checkpoint="moments.partial")   # one pass
    moments[3]         # SecondMoment(layer=3, d_ff=3072, count=49152, split_half=0.14, excess=0.09)
    moments[3].save("moments/layer3.safetensors")
    moment = SecondMoment.load("moments/layer3.safetensors", lm, 3)     # refuses another model's
    moment.solve(keys)                                                  # C⁻¹ k
    second_moments(lm, texts, layers=[3], site="inputs")                # of what enters the layer
    SecondMoment.from_matrix(matrix, count=50_000)                      # computed elsewhere

A second moment is E[m mᵀ], not centred; papers call it the covariance. Editors weigh a change by
it, so that the layer does the same as before on ordinary text.

The result shows whether there was enough text. Each text goes to one of two halves. The text's
digest decides, so copies stay together. Two figures compare the halves:

- `split_half` is ‖A − B‖ / ‖C‖ (Frobenius) of the halves' matrices A and B. C itself is about half
  as far from the truth. A few large directions decide this figure.
- `excess` measures what an editor feels. Among all changes that give a key its new value, C⁻¹ k
  disturbs other text least. A C from finite text fits that text too well, so the change disturbs
  unseen text more than necessary. For keys k ~ N(0, A) and u = A⁻¹ k,

      ρ = E[uᵀ B u] / E[uᵀ A u],      q = ½ (1 − 1/ρ),      excess = q / (1 − q)

  where B takes the place of the unseen text. With Gaussian coefficients ρ is 1 / (1 − 2 d_ff / n)
  and q is d_ff / n, and the excess is that of a matrix of all n tokens. On trained models the
  figure agrees with the excess measured on much more text (`benchmarks/moments.py`). Above 0.5 the
  halves are almost singular and the figure is a lower bound. It is at most 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..core.checks import check_items
from ..core.errors import InputError
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from ..model.turns import asking
from .measuring import how_much, measure
from .ordinary import DIGEST, OrdinaryTexts
from .scan import Site, check_dtype
from .second_moment import MOST_EXCESS as MOST_EXCESS
from .second_moment import SecondMoment as SecondMoment


@asking()
def second_moments(  # house: a promised public signature
    lm: LanguageModel,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    max_tokens: float | None = None,
    batch_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    site: Site = "coefficients",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[int, SecondMoment]:
    """Compute E[m mᵀ] of the down-projection's input over every token, for all layers in one pass.

    With site="inputs", m is what enters the feed-forward network, with a constant 1 after it.

    Texts longer than the model's context are cut into pieces. The pass ends before the highest
    layer's down-projection. Products are taken in float32 (float64 for a float64 model) for one
    batch and summed in float64. Padding is left out.

    Args:
        lm: The model.
        texts: The texts, read as they are needed. `ordinary_texts()` is the bundled corpus.
        layers: Layers without experts.
        max_tokens: Stop after this many tokens; the last text is cut. math.inf: read all texts.
            None: TOKENS_PER_NEURON for each neuron of the widest layer; of the bundled corpus as
            many as it takes until no layer has an excess above ENOUGH_EXCESS.
        batch_tokens: Padded tokens in one forward pass.
        dtype: torch.bfloat16 runs the forward pass in it. That is faster, and its error is much
            smaller than the difference between the halves of the text. The weights stay as they
            are. None: the model's own dtype.
        site: What m is: the "coefficients", or the "inputs", on which appended neurons draw.
        checkpoint: File that keeps the sums now and then. A run that was killed, called again with
            the same arguments and texts, goes on from there and gives the same numbers. The file
            is removed at the end.
        progress: Called with the number of tokens done, after every batch.

    Returns:
        {layer: SecondMoment}, in ascending order of layers.

    Raises:
        LayerError: The model has no such layer.
        UnsupportedModelError: A layer is a mixture of experts.
        InputError: There is no text, an argument is out of range, or the checkpoint was made with
            other arguments or texts.
        FingerprintError: The checkpoint was made from another model.
        DamagedError: The checkpoint cannot be read.
        WorkspaceError: The checkpoint cannot be written.
        NumericsError: A state is not finite.
    """
    return moments_with_total(
        lm,
        texts,
        layers,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        dtype=dtype,
        site=site,
        checkpoint=checkpoint,
        progress=None if progress is None else lambda done, _: progress(done),
    )


@asking()
def moments_with_total(
    lm: LanguageModel,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    progress: Callable[[int, int | None], object] | None,
    checkpoint: str | os.PathLike[str] | None = None,
    site: Site = "coefficients",
    **options: Any,
) -> dict[int, SecondMoment]:
    """Do what `second_moments` does, and report how many tokens there will be.

    Args:
        lm: The model.
        texts: The texts.
        layers: Layers without experts.
        progress: Called with the number of tokens done, and with how many there will be as far as
            that is known now.
        checkpoint: File that keeps the sums now and then.
        site: What m is.
        options: max_tokens, batch_tokens and dtype.
    """
    items = check_items(layers, "layers", "layer numbers, such as [3, 4]")
    if not items:
        raise InputError("layers is empty; give at least one layer, such as [3]", argument="layers")
    layers = sorted({check_dense_layer(layer, lm.ffn) for layer in items})
    check_dtype(lm, options.get("dtype"))
    corpus, until = how_much(lm, texts, layers, site=site, **options)
    estimates, swept = measure(
        lm, corpus, layers, until, site=site, checkpoint=checkpoint, progress=progress
    )
    return {
        layer: SecondMoment(
            matrix=estimate.mean,
            count=estimate.n_tokens,
            fingerprint=lm.fingerprint,
            corpus=DIGEST if isinstance(texts, OrdinaryTexts) else swept.digest,
            layer=layer,
            split_half=estimate.split_half,
            excess=estimate.excess,
            site=site,
            sample=estimate.sample,
            tails=estimate.tails,
        )
        for layer, estimate in estimates.items()
    }
