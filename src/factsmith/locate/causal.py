"""Causal tracing: corrupt the subject, restore one internal state from the clean run, and see how much of the answer comes back.

    trace = causal_trace(lm, "The Space Needle is in the city of", "Space Needle")
    trace.scores                       # (n_tokens, n_layers) p(answer) with that state restored
    trace.effects                      # the indirect effect: what restoring it gains over the corrupted run
    trace.peak                         # (token, layer) where restoring helps most

    runs = record_runs(lm, prompt, subject)                 # the clean and the corrupted runs, once for all maps:
    runs.trace("mlp"), runs.trace("state", sever="mlp")

The method is section 2.1 of Meng et al. 2022 (arXiv 2202.05262). The plain way runs the whole model once for each token and layer. Here
a restored state costs only what it can change: positions from the restored token on, layers from the restored layer up. Everything else is
the corrupted run, recorded once. For each token one sweep climbs the layers, carrying every variant that has been restored so far as one
batch. Variants that are still the same (windows that begin at the same layer) are carried once, and a feed-forward memory is asked only at
the positions where somebody reads its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..model.language_model import LanguageModel
from .kinds import CausalTrace, Corruption, Kind, Part, check_map
from .runs import record_runs


def causal_trace(
    lm: LanguageModel,
    prompt: str,
    subject: str,
    *,
    target: str | None = None,
    kind: Kind = "state",
    sever: Part | None = None,
    corruption: Corruption = "noise",
    replacements: Sequence[str] | None = None,
    window: int = 10,
    samples: int = 10,
    noise: float | None = None,
    noise_tensor: Tensor | np.ndarray[Any, Any] | None = None,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> CausalTrace:
    """Restore every (token, layer) of one prompt in turn and measure p(answer): Meng et al. 2022, section 2.1 (arXiv 2202.05262).

    prompt        whole text that holds the subject once, or a template with one `{}` where it goes
    target        the answer to follow, of one or more tokens; None: the model's own most likely next token
    kind          "state": the layer's output. "mlp", "attention": what that part adds, in layers [l - window // 2, l + ceil(window / 2))
    sever         with kind "state": hold the "mlp" or "attention" outputs at the restored token, in all layers above, at the values they
                  have in the corrupted run (section 2.2, figure 3): what is lost went through them
    corruption    "noise": added to the subject's embeddings. "replace": another subject of as many tokens stands in its place
    replacements  those other subjects, each one corrupted run, whatever `samples` says; None: `samples` of them drawn by `seed` from the
                  atlas's subjects that have as many tokens here and leave the rest of the prompt as it is
    samples       number of corrupted runs; each has its own noise, the same for every restored state
    noise         scale of the normal noise on the subject's input embeddings. None: three times the standard deviation of the entries of
                  this subject's own embeddings. The paper takes it over all subjects of its data set: to average over many prompts, pass
                  one number to all, or use `average_trace`
    noise_tensor  (samples, n_subject_tokens, d_model) corruption to add instead of drawing it from `seed`; scaled by `noise` when that is
                  given too, else added as it is. Its first dimension decides the number of samples, whatever `samples` says
    seed          of numpy's RandomState, whose randn(samples, n_subject_tokens, d_model) is the noise
    progress      called with (tokens done, tokens to do) after each token

    Tokens before the subject cannot have an effect in a causal model: their scores are the corrupted probability, without being computed.
    Raises SubjectError (subject empty, absent or repeated), LayerError (window), InputError (anything else that was given),
    UnsupportedModelError (no attention part to restore), and NumericsError when the probabilities are not finite or the answer has none.
    The model is not changed.
    """
    window = check_map(kind, window, sever)
    runs = record_runs(
        lm,
        prompt,
        subject,
        target=target,
        corruption=corruption,
        replacements=replacements,
        samples=samples,
        noise=noise,
        noise_tensor=noise_tensor,
        seed=seed,
    )
    return runs.trace(kind, window=window, sever=sever, progress=progress)
