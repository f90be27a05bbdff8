"""Causal tracing: corrupt the subject, restore one state, and see how much of the answer returns.

    trace = causal_trace(lm, "The Space Needle is in the city of", "Space Needle")
    trace.scores                       # (n_tokens, n_layers) p(answer) with that state restored
    trace.effects                      # the indirect effect: the gain over the corrupted run
    trace.peak                         # (token, layer) where restoring helps most

Several maps of one prompt can share its recorded runs:

    runs = record_runs(lm, prompt, subject, Corruption())
    trace_runs(runs, Restoration("mlp")), trace_runs(runs, Restoration("state", sever="mlp"))

The method is section 2.1 of Meng et al. 2022 (arXiv 2202.05262). The plain way runs the whole model
once for each token and layer. This way a restored state costs only what it can change: positions
from the restored token on, and layers from the restored layer up. The rest is the corrupted run,
which is recorded once. An MLP is run only at the positions whose output is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..model.language_model import LanguageModel
from ..model.turns import asking
from .corruption import Corruption
from .kinds import CorruptionKind, Part, Restoration, TraceKind
from .records import CausalTrace
from .runs import record_runs
from .sweep import trace_runs


@asking(grad=True)
def causal_trace(  # house: the promised public signature; the settings go into a Corruption
    lm: LanguageModel,
    prompt: str,
    subject: str,
    *,
    target: str | None = None,
    occurrence: int | None = None,
    kind: TraceKind = "state",
    sever: Part | None = None,
    corruption: CorruptionKind = "noise",
    replacements: Sequence[str] | None = None,
    window: int = 10,
    samples: int = 10,
    noise: float | None = None,
    noise_tensor: Tensor | np.ndarray[Any, Any] | None = None,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> CausalTrace:
    """Restore every (token, layer) of one prompt in turn, and measure p(answer).

    Meng et al. 2022, section 2.1 (arXiv 2202.05262). The model is not changed. In a causal model a
    token before the subject cannot have an effect: its scores are the corrupted probability,
    without a computation.

    Args:
        lm: The model.
        prompt: A text that has the subject, or a template with one `{}` in its place. For the two
            characters `{}` themselves, write `{{}}`.
        subject: The part of the text to corrupt.
        target: The answer to follow, of one or more tokens. None: the model's own most likely next
            token.
        occurrence: Which occurrence of the subject in a text is meant, counted from 1. None: the
            only one, or the only one that is a whole word.
        kind: "state" restores a layer's output. "mlp" and "attention" restore what that part adds
            in the layers [l - window // 2, l + ceil(window / 2)).
        sever: With kind "state": hold the outputs of the "mlp" or "attention" at the restored
            token, in all layers above, at the values of the corrupted run (section 2.2, figure 3).
            The effect that disappears went through them.
        corruption: "noise" is added to the subject's embeddings. "replace" puts another subject
            with as many tokens in its place.
        replacements: These other subjects, one for each corrupted run; they decide the number of
            samples. None: drawn by `seed` from the atlas's subjects that have as many tokens in
            this prompt and leave its other tokens unchanged.
        window: Number of neighbouring layers restored together.
        samples: Number of corrupted runs. Each has its own noise, the same for every restored
            state.
        noise: Standard deviation of the normal noise on the subject's input embeddings. None:
            three times the standard deviation of the entries of this subject's own embeddings. The
            paper takes it over all subjects of its data set: to average over many prompts, pass
            one number to all, or use `average_trace`.
        noise_tensor: (samples, n_subject_tokens, d_model) noise to add, instead of noise drawn by
            `seed`. It is multiplied by `noise` if that is given too. Its first dimension decides
            the number of samples.
        seed: Seed of numpy's RandomState, whose randn(samples, n_subject_tokens, d_model) is the
            noise.
        progress: Called with (tokens done, tokens to do) after each token.

    Raises:
        SubjectError: when the subject is empty, is not in the text, or is there several times and
            `occurrence` does not say which one is meant.
        LayerError: when the window is not accepted.
        InputError: when another argument is not accepted.
        UnsupportedModelError: when a layer has no attention part to restore.
        NumericsError: when a probability is not finite, or the answer has the probability 0.
    """
    restoration = Restoration(kind, window, sever)
    settings = Corruption(corruption, samples, noise, noise_tensor, replacements, seed)
    runs = record_runs(lm, prompt, subject, settings, target=target, occurrence=occurrence)
    return trace_runs(runs, restoration, progress=progress)
