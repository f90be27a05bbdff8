"""The pass behind second moments: how much of a text is read, and what is kept of it meanwhile.

    corpus, until = how_much(lm, texts, [3])
    measure(lm, corpus, [3], until, checkpoint=None, progress=None)    # {3: Estimate(...)}, Swept

Of texts that a caller gives, a fixed number of tokens is read. The bundled corpus is read until its
halves agree, since it is in random order and any beginning of it stands for the whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..core.artefact import Checkpoint
from ..core.checks import check_limit
from ..model.address import check_layer
from ..model.language_model import LanguageModel
from .accumulator import Swept
from .moment_sums import Estimate, MomentSums, Until
from .ordinary import OrdinaryTexts
from .scan import Site
from .sweep import Corpus, sweep

TOKENS_PER_NEURON = 16
"""Tokens of given texts that are read for each neuron if the caller does not say how many.

Published work finds half as many enough (0.3 % of 44 million for 16,384 neurons), and edits of
trained models got no better with more. The excess is then 9 to 12 %
(`benchmarks/results/moments.json`)."""

ENOUGH_EXCESS = 0.2
"""Excess at which reading the bundled corpus ends.

On SmolLM2-135M, edits with an excess of 0.25 to 0.32 were within a point of those with 0.02, by
each measure; with 0.53 to 0.61 MEMIT's specificity was 9 points lower (twelve facts)."""

FIRST_COMPARED, LIKELY, MOST = 6, 11, 64
"""Tokens of the bundled corpus for each neuron of the widest layer: after which the halves are
compared for the first time, that are likely to be enough, and that are read at most."""

FEWEST_INPUTS = 24_576
"""Tokens that are read for input statistics at least. They also have to show how often a key that
is meant for one subject fires on ordinary text, which is rare."""

_FEWEST_PASSAGES, _PASSAGE_TOKENS = 8, 100
"""Passages of a window, at least, and about the tokens of one.

Reading may end after a window, which has about one token for each neuron."""


def enough_tokens(
    lm: LanguageModel,
    layers: Iterable[int],
    max_tokens: float | None = None,
    site: Site = "coefficients",
) -> float:
    """Return how many tokens of given texts second moments are computed from.

    Args:
        lm: The model.
        layers: The layers.
        max_tokens: The number itself. None: TOKENS_PER_NEURON for each neuron of the widest layer,
            or for each dimension of the inputs, but at least FEWEST_INPUTS of these.
        site: What is read.

    Raises:
        InputError: max_tokens is not a number of at least 1. Infinity is accepted.
        LayerError: The model has no such layer.
    """
    if max_tokens is not None:
        return check_limit(max_tokens, "max_tokens")
    return max(TOKENS_PER_NEURON * _widest(lm, layers, site), _fewest(site))


def width_of(lm: LanguageModel, layer: int, site: Site) -> int:
    """Return the width of a layer's second moment: d_ff, or d_model + 1 for inputs."""
    return lm.d_model + 1 if site == "inputs" else lm.ffn[layer].d_ff


def _widest(lm: LanguageModel, layers: Iterable[int], site: Site) -> int:
    return max(width_of(lm, check_layer(layer, lm.n_layers), site) for layer in layers)


def _fewest(site: Site) -> int:
    return FEWEST_INPUTS if site == "inputs" else 0


def how_much(
    lm: LanguageModel,
    texts: Iterable[str],
    layers: Sequence[int],
    max_tokens: float | None = None,
    *,
    batch_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    site: Site = "coefficients",
) -> tuple[Corpus, Until | None]:
    """Return the corpus to sweep, and when its halves say that it is enough (None: at its limit).

    Args:
        lm: The model.
        texts: The texts.
        layers: Layers that the model has.
        max_tokens: As for `second_moments`.
        batch_tokens: As for `second_moments`.
        dtype: As for `second_moments`.
        site: What is read.
    """
    if not isinstance(texts, OrdinaryTexts):
        limit = enough_tokens(lm, layers, max_tokens, site)
        return Corpus(texts, limit, batch_tokens, dtype, halves=True), None
    until = None
    widest, fewest = _widest(lm, layers, site), _fewest(site)
    window = max(_FEWEST_PASSAGES, widest // _PASSAGE_TOKENS)
    if max_tokens is None:
        counts = (max(n * widest, fewest) for n in (FIRST_COMPARED, LIKELY, MOST))
        until = Until(ENOUGH_EXCESS, *counts)
    limit = check_limit(math.inf if max_tokens is None else max_tokens, "max_tokens")
    return Corpus(texts, limit, batch_tokens, dtype, halves=True, window=window), until


def measure(
    lm: LanguageModel,
    corpus: Corpus,
    layers: Sequence[int],
    until: Until | None,
    *,
    site: Site,
    checkpoint: str | os.PathLike[str] | None,
    progress: Callable[[int, int | None], object] | None,
) -> tuple[dict[int, Estimate], Swept]:
    """Read a corpus and return each layer's estimate, and what was read.

    Args:
        lm: The model.
        corpus: The corpus.
        layers: Layers without experts, ascending.
        until: When it is enough. None: at the end of the corpus.
        site: What is read: coefficients, or inputs.
        checkpoint: File that keeps the sums now and then. It is removed at the end.
        progress: Called with the number of tokens done, and with how many there will be as far as
            that is known now.

    Raises:
        FactsmithError: As `second_moments`.
    """
    made_from = {
        "format": "unfinished second moments 1",
        "fingerprint": lm.fingerprint,
        "layers": str(list(layers)),
        **corpus.settings(),
        **({} if until is None else {"until": str(tuple(until))}),
        **({} if site == "coefficients" else {"site": site}),
    }
    partial = None if checkpoint is None else Checkpoint(Path(checkpoint), made_from)
    sizes = {layer: width_of(lm, layer, site) for layer in layers}
    sums = MomentSums(sizes, until, site)

    def report(done: int) -> None:
        total = sums.expected if until is not None else corpus.max_tokens
        if progress is not None:
            progress(done, None if math.isinf(total) else max(round(total), done))

    swept = sweep(
        lm,
        corpus,
        layers,
        [sums],
        checkpoint=partial,
        until=None if until is None else sums,
        progress=report,
    )
    estimates = sums.result(swept)
    if partial is not None:
        partial.remove()
    return estimates, swept
