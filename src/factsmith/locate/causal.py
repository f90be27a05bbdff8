"""Causal tracing: corrupt the subject, restore one internal state from the clean run, and see how much of the answer comes back.

    trace = causal_trace(lm, "The Space Needle is in the city of", "Space Needle")
    trace.scores                       # (n_tokens, n_layers) p(answer) with that state restored
    trace.effects                      # the indirect effect: what restoring it gains over the corrupted run
    trace.peak                         # (token, layer) where restoring helps most

The method is section 2.1 of Meng et al. 2022 (arXiv 2202.05262). The plain way runs the whole model once for each token and layer. Here
a restored state costs only what it can change: positions from the restored token on, layers from the restored layer up. Everything else is
the corrupted run, recorded once. For each token one sweep climbs the layers, carrying every variant that has been restored so far as one
batch; variants that are still the same (windows that begin at the same layer) are carried once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, LayerError, NumericsError, UnsupportedModelError
from ..model.load import LanguageModel
from ..model.replay import Replay, record
from ..model.tokens import align, encode, subject_span, target_ids
from ..model.trace import recording, replacing

Kind: TypeAlias = Literal["state", "mlp", "attention"]

# Variants run together up to about this much working memory; beyond it a batch is cut. Enough to keep a GPU busy, little for a laptop.
_BATCH_BYTES = 512 * 2**20
_HEAD_ROWS = 256  # rows unembedded at once: a vocabulary's worth of numbers each


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalTrace:
    """What restoring each state of one prompt brings back of its answer. Probabilities are joint over the answer's tokens.

    prompt, subject  the whole text, and the part of it that was corrupted
    answer           the text whose probability was measured
    answer_ids       its tokens
    kind, window     "state", "mlp" or "attention"; number of neighbouring layers restored together (1 for "state")
    tokens           (n_tokens,) the prompt's tokens as printed, a BOS included
    subject_span     token columns [start, stop) of the subject
    scores           (n_tokens, n_layers) float32 on the CPU: mean p(answer) over the samples after restoring, `corrupted` not taken off
    clean            p(answer) of the untouched run
    corrupted        mean p(answer) with the subject corrupted and nothing restored
    noise            standard deviation of the noise on the subject's embeddings; of the given tensor, where one was given
    samples          number of corrupted runs averaged
    seed             what their noise was drawn from; None when it was given
    """

    prompt: str
    subject: str
    answer: str
    answer_ids: tuple[int, ...]
    kind: Kind
    window: int
    tokens: tuple[str, ...]
    subject_span: tuple[int, int]
    scores: Tensor
    clean: float
    corrupted: float
    noise: float
    samples: int
    seed: int | None

    @property
    def effects(self) -> Tensor:
        """(n_tokens, n_layers) the indirect effect of each state: scores - corrupted."""
        return self.scores - self.corrupted

    @property
    def peak(self) -> tuple[int, int]:
        """(token, layer) with the largest indirect effect."""
        token, layer = divmod(int(self.scores.argmax()), self.scores.shape[1])
        return token, layer

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON-able values."""
        return {**vars(self), "scores": self.scores.tolist()}


def causal_trace(
    lm: LanguageModel,
    prompt: str,
    subject: str,
    *,
    target: str | None = None,
    kind: Kind = "state",
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
    samples       number of corrupted runs; each has its own noise, the same for every restored state
    noise         scale of the normal noise on the subject's input embeddings. None: three times the standard deviation of the entries of
                  this subject's own embeddings. The paper takes it over all subjects of its data set: to average over many prompts, pass
                  one number to all
    noise_tensor  (samples, n_subject_tokens, d_model) corruption to add instead of drawing it from `seed`; scaled by `noise` when that is
                  given too, else added as it is. Its first dimension decides the number of samples
    seed          of numpy's RandomState, whose randn(samples, n_subject_tokens, d_model) is the noise
    progress      called with (tokens done, tokens to do) after each token

    Tokens before the subject cannot have an effect in a causal model: their scores are the corrupted probability, without being computed.
    Raises SubjectError (subject empty, absent or repeated), LayerError (window), InputError (anything else that was given),
    UnsupportedModelError (no attention part to restore), and NumericsError when the probabilities are not finite. The model is not changed.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind is {kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}")
    if window < 1:
        raise LayerError(f"window is {window}; expected the number of layers restored together, 1 or more")
    if samples < 1:
        raise InputError(f"samples is {samples}; expected 1 or more corrupted runs")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise InputError(f"noise is {noise}; expected a positive scale, or None for three standard deviations of the subject's embeddings")
    text = prompt.replace("{}", subject) if prompt.count("{}") == 1 and subject not in prompt else prompt
    start, stop = subject_span(lm, text, subject)
    prompt_ids, offsets = encode(lm.tokenizer, text)
    subject_ids = prompt_ids[start:stop]

    with torch.no_grad():
        answer_ids = target_ids(lm.tokenizer, text, target) if target is not None else [_next_token(lm, prompt_ids)]
        sequence = [*prompt_ids, *answer_ids[:-1]]
        corruption, scale = _corruption(lm, subject_ids, samples, noise, noise_tensor, seed)
        samples = len(corruption)

        def corrupt(embeddings: Tensor) -> Tensor:  # (samples, T, d_model)
            noisy = embeddings.clone()
            noisy[:, start:stop] += corruption.to(noisy)
            return noisy

        sites = _sites(lm, kind)
        with recording(dict(enumerate(sites))) as calls:
            clean = record(lm, align(lm, [sequence], [0]), start=start)
        corrupted = record(lm, align(lm, [sequence] * samples, [0] * samples), start=start, embed=corrupt)
        p_clean, p_corrupted = (float(_answer_probability(lm, run.hidden[-1], answer_ids).mean()) for run in (clean, corrupted))
        if not (math.isfinite(p_clean) and math.isfinite(p_corrupted)):
            raise NumericsError(
                f"p(answer) is {p_clean} in the clean run and {p_corrupted} in the corrupted one; expected finite numbers. "
                "Load the model in float32, or use less noise"
            )

        # What is put back, per layer: (columns from `start` on, d_model).
        clean_outputs = [calls[layer][-1].output.reshape(-1, lm.d_model)[start - len(sequence) :] for layer in range(lm.n_layers)]
        spans = [_window(layer, window if kind != "state" else 1, lm.n_layers) for layer in range(lm.n_layers)]
        scores = torch.full((len(prompt_ids), lm.n_layers), p_corrupted)
        for token in range(start, len(prompt_ids)):
            live = corrupted.at(token)
            values = [output[token - start] for output in clean_outputs]
            final = _restore_states(live, values) if kind == "state" else _restore_outputs(live, values, sites, spans)
            each = _answer_probability(lm, torch.cat(list(final.values())), answer_ids)
            means = dict(zip(final, each.view(-1, samples).mean(1).tolist(), strict=True))
            scores[token] = torch.tensor([means[span] for span in spans])
            if progress is not None:
                progress(token - start + 1, len(prompt_ids) - start)
    return CausalTrace(
        prompt=text,
        subject=subject.strip(),
        answer=lm.tokenizer.decode(answer_ids),
        answer_ids=tuple(answer_ids),
        kind=kind,
        window=window if kind != "state" else 1,
        tokens=tuple(_printed(lm.tokenizer.decode([i]), text[a:b]) for i, (a, b) in zip(prompt_ids, offsets, strict=True)),
        subject_span=(start, stop),
        scores=scores,
        clean=p_clean,
        corrupted=p_corrupted,
        noise=scale,
        samples=samples,
        seed=seed if noise_tensor is None else None,
    )


def _restore_states(live: Replay, values: Sequence[Tensor]) -> dict[range, Tensor]:
    """{restored layer: last hidden states (samples, S, d_model)}, the state at the first live column put back at one layer each.

    live: the corrupted run from the traced token on; values: n_layers × (d_model,) the clean outputs of the layers there.
    """
    carried: list[Tensor] = []  # ((number restored so far) * samples, S, d_model) in all
    for layer, value in enumerate(values):
        if carried:
            carried = [_run(live, layer, torch.cat(carried))]
        restored = live.hidden[layer + 1].clone()  # a layer whose output is replaced need not run
        restored[:, 0] = value
        carried.append(restored)
    parts = torch.split(torch.cat(carried), live.batch.size)
    return {range(layer, layer + 1): own for layer, own in enumerate(parts)}


def _restore_outputs(live: Replay, values: Sequence[Tensor], sites: Sequence[nn.Module], spans: Sequence[range]) -> dict[range, Tensor]:
    """{restored layers: last hidden states (samples, S, d_model)}, the part's output at the first live column put back in each span.

    values: n_layers × (d_model,) the clean outputs of `sites` there.
    """
    samples = live.batch.size
    active: dict[range, Tensor] = {}  # layers restored so far -> what enters the next layer
    for layer, (value, site) in enumerate(zip(values, sites, strict=True)):
        reached = list(dict.fromkeys(range(span.start, min(span.stop, layer + 1)) for span in spans if span.start <= layer))
        entering = []
        for span in reached:
            before = range(span.start, min(span.stop, layer))
            entering.append(active[before] if before else live.hidden[layer])
        restore = torch.tensor([layer in span for span in reached]).repeat_interleave(samples)
        active = dict(zip(reached, torch.split(_run(live, layer, torch.cat(entering), (site, value, restore)), samples), strict=True))
    return active


def _run(live: Replay, layer: int, hidden: Tensor, put_back: tuple[nn.Module, Tensor, Tensor] | None = None) -> Tensor:
    """One layer over (n * samples, S, d_model), cut to the memory budget.

    put_back: (part, value, rows): in the rows marked (n * samples,), `value` (d_model,) replaces what the part puts out at the first live
    column.
    """
    samples, width = live.batch.size, hidden.shape[1]
    rows = torch.arange(samples).repeat(len(hidden) // samples)
    # Alive inside a layer: each column widened (coefficients, gate, their copies: about sixteen times), and the row's keys and values.
    per_row = hidden.element_size() * live.lm.d_model * (16 * width + 4 * live.batch.width)
    out = []
    for batch in torch.split(torch.arange(len(hidden)), max(1, _BATCH_BYTES // per_row)):
        some = slice(int(batch[0]), int(batch[-1]) + 1)
        with replacing({} if put_back is None else {put_back[0]: _putting_back(put_back[1], put_back[2][some], width)}):
            out.append(live.layer(layer, hidden[some], rows[some]))
    return torch.cat(out)


def _putting_back(value: Tensor, rows: Tensor, width: int) -> Callable[[Tensor], Tensor]:
    """A change of a part's output: `value` at the first of the last `width` columns, in the rows marked (R,)."""

    def change(output: Tensor) -> Tensor:  # (R, columns, d_model), or (R * columns, d_model)
        changed = output.reshape(len(rows), -1, output.shape[-1]).clone()
        changed[rows.to(output.device), -width] = value.to(output)
        return changed.view(output.shape)

    return change


def _answer_probability(lm: LanguageModel, hidden: Tensor, answer_ids: Sequence[int]) -> Tensor:
    """(R,) float32: joint probability of the answer, read off the last columns of last-layer states (R, S, d_model)."""
    wanted = torch.tensor(answer_ids, device=hidden.device)
    found = []
    for part in torch.split(hidden[:, -len(answer_ids) :], _HEAD_ROWS):
        logits = lm.head(part).float()  # (R, n_answer, vocab)
        of_answer = logits.gather(-1, wanted.to(logits.device).expand(len(part), -1)[..., None])[..., 0]
        found.append((of_answer - logits.logsumexp(-1)).sum(-1).exp())
    return torch.cat(found)


def _next_token(lm: LanguageModel, ids: list[int]) -> int:
    """The model's most likely next token."""
    replay = record(lm, align(lm, [ids], [0]), start=len(ids) - 1)
    return int(replay.logits(replay.hidden[-1][0, -1]).argmax())


def _window(layer: int, window: int, n_layers: int) -> range:
    """The layers restored together around `layer`, cut at the model's ends (the reference's [l - w//2, l + ceil(w/2)))."""
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))


def _sites(lm: LanguageModel, kind: Kind) -> list[nn.Module]:
    """The modules, one a layer, whose outputs are restored."""
    if kind == "state":
        return list(lm.layers)
    if kind == "mlp":
        return [ffn.module for ffn in lm.ffn]
    missing = [layer for layer, attention in enumerate(lm.attention) if attention is None]
    if missing:
        raise UnsupportedModelError(f"layers {missing} have no single part where positions meet; trace kind='state' or 'mlp' instead")
    return [attention for attention in lm.attention if attention is not None]


def _corruption(
    lm: LanguageModel,
    subject_ids: Sequence[int],
    samples: int,
    noise: float | None,
    noise_tensor: Tensor | np.ndarray[Any, Any] | None,
    seed: int,
) -> tuple[Tensor, float]:
    """What is added to the subject's embeddings (samples, n_subject_tokens, d_model), and its scale."""
    # The embedding module's own output: some families scale it inside the module, and that is what the noise is added to.
    embedded = lm.embedding(torch.tensor([*subject_ids], device=lm.device)).float()
    if noise_tensor is None:
        scale = noise if noise is not None else 3 * float(embedded.std())
        if not 0 <= seed < 2**32:
            raise InputError(f"seed {seed} cannot be used; expected a whole number from 0 to 2**32 - 1")
        drawn = np.random.RandomState(seed).randn(samples, *embedded.shape)
        return torch.from_numpy(drawn * scale).float().to(embedded.device), scale
    given = torch.as_tensor(noise_tensor).detach().float().to(embedded.device)
    if given.dim() != 3 or given.shape[1:] != embedded.shape or not len(given):
        raise InputError(f"noise_tensor has shape {tuple(given.shape)}; expected (samples, {', '.join(map(str, embedded.shape))})")
    if not bool(given.isfinite().all()):
        raise InputError("noise_tensor holds entries that are not finite; expected ordinary numbers")
    given = given * noise if noise is not None else given
    return given, noise if noise is not None else float(given.std())


def _printed(decoded: str, characters: str) -> str:
    """A token as text; one that holds only part of a character's bytes as the character it belongs to."""
    return characters if "�" in decoded else decoded
