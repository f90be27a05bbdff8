"""locate.runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..core.checks import check_count, check_number, check_seed, check_text
from ..core.errors import InputError, NumericsError, UnsupportedModelError
from ..model.language_model import LanguageModel, check_model
from ..model.replay import Replay, record
from ..model.tokens import encode, subject_span, target_ids
from ..model.trace import (
    first_tensor,
    recording,
    replacing,
    standing_in,
    tensors,
    with_first_tensor,
)
from .corruption import corrupting, drawn_subjects, given_subjects, subject_noise
from .kinds import CausalTrace, Corruption, Kind, Part, check_map, window_spans

# Variants run together up to about this much working memory; beyond it a batch is cut: enough to keep a GPU busy, and what a CPU's caches
# hold, since it computes no faster in larger batches and slower beyond them.
_BATCH_BYTES, _CPU_BATCH_BYTES = 512 * 2**20, 32 * 2**20

_HEAD_ROWS = 128  # rows unembedded at once: a vocabulary's worth of numbers each


# ── the recorded runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """The clean and the corrupted runs of one prompt, from which every map is made.

    clean      one row, live from the subject's first token on
    corrupted  `samples` rows, likewise
    outputs    {"mlp" or "attention": per layer (1 + samples, S, d_model)}: what the parts put out, the clean run first; attention is
               left out where a layer has no single such part
    The other fields are those of `CausalTrace`.
    """

    lm: LanguageModel
    prompt: str
    subject: str
    answer_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    subject_span: tuple[int, int]
    clean: Replay
    corrupted: Replay
    outputs: Mapping[Part, Sequence[Tensor]]
    p_clean: float
    p_corrupted: float
    corruption: Corruption
    replacements: tuple[str, ...]
    noise: float
    seed: int | None
    _meets_last: tuple[bool, ...] = field(
        repr=False
    )  # per layer: whether its attention runs after its MLP

    @property
    def is_correct(self) -> bool:
        """Whether the answer is what the model says by itself."""
        return self.predicted_ids == self.answer_ids

    @property
    def samples(self) -> int:
        """Number of corrupted runs."""
        return self.corrupted.batch.size

    @torch.no_grad()
    def trace(
        self,
        kind: Kind = "state",
        *,
        window: int = 10,
        sever: Part | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> CausalTrace:
        """One map; the arguments are those of `causal_trace`."""
        window = check_map(kind, window, sever)
        scores = self.scores(
            kind,
            range(self.subject_span[0], len(self.tokens)),
            window=window,
            sever=sever,
            progress=progress,
        )
        return CausalTrace(**self.described(kind, scores, window=window, sever=sever))

    def described(
        self, kind: Kind, scores: Tensor, *, window: int, sever: Part | None = None
    ) -> dict[str, Any]:
        """The fields of a `CausalTrace` with these scores of the subject's first token and those after it, (S, n_layers)."""
        untouched = torch.full((self.subject_span[0], self.lm.n_layers), self.p_corrupted)
        return {
            "prompt": self.prompt,
            "subject": self.subject,
            "answer": self.lm.tokenizer.decode(self.answer_ids),
            "answer_ids": self.answer_ids,
            "predicted": self.lm.tokenizer.decode(self.predicted_ids),
            "is_correct": self.is_correct,
            "kind": kind,
            "window": window if kind != "state" else 1,
            "sever": sever,
            "tokens": self.tokens,
            "subject_span": self.subject_span,
            "scores": torch.cat([untouched, scores]),
            "clean": self.p_clean,
            "corrupted": self.p_corrupted,
            "corruption": self.corruption,
            "replacements": self.replacements,
            "noise": self.noise,
            "samples": self.samples,
            "seed": self.seed,
        }

    @torch.no_grad()
    def scores(
        self,
        kind: Kind,
        columns: Sequence[int],
        *,
        window: int = 10,
        sever: Part | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Tensor:
        """Mean p(answer) with each state of some tokens restored: (len(columns), n_layers); columns from the subject's first on."""
        spans = window_spans(self.lm.n_layers, window if kind != "state" else 1)
        part: Part | None = None if kind == "state" else kind
        for wanted in {part, sever} - {None}:
            self.check_part(wanted)
        entered = self._entered(part, spans)
        scores = torch.full((len(columns), self.lm.n_layers), self.p_corrupted)
        finals: list[tuple[int, range, Tensor]] = []
        for index, column in enumerate(columns):
            sweep = _Sweep(self, self.corrupted.at(column), spans, entered, part, sever)
            finals.extend((index, span, states) for span, states in sweep.climb())
            if (
                sum(len(states) for _, _, states in finals) >= _HEAD_ROWS
                or index == len(columns) - 1
            ):
                self._read_off(finals, spans, scores)
                finals = []
            if progress is not None:
                progress(index + 1, len(columns))
        return scores

    def _read_off(
        self, finals: Sequence[tuple[int, range, Tensor]], spans: Sequence[range], scores: Tensor
    ) -> None:
        """Fill in p(answer) of last-layer states, unembedding many together."""
        if not finals:
            return
        each = answer_probability(
            self.lm, torch.cat([states for _, _, states in finals]), self.answer_ids
        )
        means = each.view(len(finals), -1).mean(1).tolist()
        for (index, span, _), mean in zip(finals, means, strict=True):
            for layer, own in enumerate(spans):
                if own == span:
                    scores[index, layer] = mean

    def check_part(self, part: Part | None) -> None:
        if part is not None and part not in self.outputs:
            missing = [
                layer for layer, attention in enumerate(self.lm.attention) if attention is None
            ]
            raise UnsupportedModelError(
                f"layers {missing} have no single part where positions meet; use 'state' or 'mlp' instead"
            )

    def _entered(self, part: Part | None, spans: Sequence[range]) -> dict[int, Tensor | None]:
        """{first restored layer: that layer's output at every live column with the restoration there}, (samples or 1, S, d_model).

        Where a restoration begins, it changes its own column only: the layer takes what the corrupted run gives it, and after what is
        restored nothing but position-wise parts follow. So one pass with all columns restored holds the entry of each. None where
        positions meet once more behind the restored part, so that the layer has to be run for each column.
        """
        if part is None:
            return {span.start: self.clean.hidden[span.start + 1] for span in spans}
        entered: dict[int, Tensor | None] = {}
        for layer in sorted({span.start for span in spans}):
            if self.lm.attention[layer] is None or (part == "mlp" and self._meets_last[layer]):
                entered[layer] = None
                continue
            clean = self.outputs[part][layer][:1].expand(self.samples, -1, -1)
            put = _Put(part, clean, torch.ones(clean.shape[:2], dtype=torch.bool))
            entered[layer] = _run_layer(
                self.corrupted, layer, self.corrupted.hidden[layer], torch.arange(self.samples), put
            )
        return entered


def record_runs(
    lm: LanguageModel,
    prompt: str,
    subject: str,
    *,
    target: str | None = None,
    corruption: Corruption = "noise",
    replacements: Sequence[str] | None = None,
    samples: int = 10,
    noise: float | None = None,
    noise_tensor: Tensor | np.ndarray[Any, Any] | None = None,
    seed: int = 1,
) -> Runs:
    """The clean and the corrupted runs of a prompt in one pass; arguments and errors are those of `causal_trace`."""
    check_model(lm)
    prompt, subject = check_text(prompt, "the prompt"), check_text(subject, "the subject")
    if corruption not in get_args(Corruption):
        raise InputError(
            f"corruption is {corruption!r}; expected one of {', '.join(map(repr, get_args(Corruption)))}"
        )
    samples, seed = (
        check_count(samples, "samples", "the number of corrupted runs"),
        check_seed(seed),
    )
    if noise is not None:
        noise = check_number(
            noise,
            "noise",
            above=0,
            also="None for three standard deviations of the subject's embeddings",
        )
    if corruption == "replace" and (noise is not None or noise_tensor is not None):
        raise InputError(
            "noise was given with corruption='replace'; expected one of the two corruptions"
        )
    if corruption == "noise" and replacements is not None:
        raise InputError(
            "replacements were given with corruption='noise'; expected corruption='replace' with them"
        )
    text = (
        prompt.replace("{}", subject)
        if prompt.count("{}") == 1 and subject not in prompt
        else prompt
    )
    subject = subject.strip()
    start, stop = subject_span(lm, text, subject)
    prompt_ids, offsets = encode(lm.tokenizer, text)
    answer_ids = target_ids(lm.tokenizer, text, target) if target is not None else []

    others: dict[str, list[int]] = {}
    scale = 0.0
    if corruption == "replace":
        others = (
            given_subjects(lm, text, subject, replacements)
            if replacements is not None
            else drawn_subjects(lm, text, subject, samples, seed)
        )
        sequences = [prompt_ids, *others.values()]
        embed = None
    else:
        added, scale = subject_noise(lm, prompt_ids[start:stop], samples, noise, noise_tensor, seed)
        sequences = [prompt_ids] * (1 + len(added))
        embed = corrupting(added, start, stop)

    with torch.no_grad():
        batch = lm.align([[*ids, *answer_ids[:-1]] for ids in sequences], [0] * len(sequences))
        parts: dict[tuple[str, int], nn.Module] = {
            ("mlp", layer): ffn.module for layer, ffn in enumerate(lm.ffn)
        }
        parts |= {
            ("attention", layer): module
            for layer, module in enumerate(lm.attention)
            if module is not None
        }
        with recording(parts) as calls:
            both = record(lm, batch, start=start, embed=embed)
        outputs: dict[Part, list[Tensor]] = {}
        for part in get_args(Part):
            if all((part, layer) in parts for layer in range(lm.n_layers)):
                put_out = (calls[part, layer][-1].output for layer in range(lm.n_layers))
                outputs[part] = [
                    out.reshape(batch.size, -1, out.shape[-1])[:, start - batch.width :]
                    for out in put_out
                ]  # of the live pass
        ran = {key: call[-1].order for key, call in calls.items()}
        meets_last = tuple(
            ran.get(("attention", layer), 0) > ran["mlp", layer] for layer in range(lm.n_layers)
        )

        rows = torch.arange(batch.size)
        clean, corrupted = both.keep(rows[:1]), both.keep(rows[1:])
        logits = lm.head(
            both.hidden[-1][:, len(prompt_ids) - 1 - start :]
        ).float()  # (1 + samples, n_answer, vocab)
        greedy = logits[0].argmax(-1).tolist()
        answer_ids = answer_ids or greedy
        # Given the answer's own tokens, the model would say each of them next: then it says them all by itself.
        predicted = (
            greedy
            if greedy == answer_ids
            else lm.continue_greedily([prompt_ids], len(answer_ids))[0]
        )
        each = _joint(logits, answer_ids)
        p_clean, p_corrupted = float(each[0]), float(each[1:].mean())
    if not (math.isfinite(p_clean) and math.isfinite(p_corrupted)):
        raise NumericsError(
            f"p(answer) is {p_clean} in the clean run and {p_corrupted} in the corrupted one; expected finite numbers. "
            "Load the model in float32, or use less noise"
        )
    if not p_clean:
        raise NumericsError(
            f"the model gives {lm.tokenizer.decode(answer_ids)!r} after {text!r} the probability 0, so nothing can bring it back; "
            "trace an answer it may give, or None for its own"
        )
    return Runs(
        lm=lm,
        prompt=text,
        subject=subject,
        answer_ids=tuple(answer_ids),
        predicted_ids=tuple(predicted),
        tokens=tuple(
            _printed(lm.tokenizer.decode([i]), text[a:b])
            for i, (a, b) in zip(prompt_ids, offsets, strict=True)
        ),
        subject_span=(start, stop),
        clean=clean,
        corrupted=corrupted,
        outputs=outputs,
        p_clean=p_clean,
        p_corrupted=p_corrupted,
        corruption=corruption,
        replacements=tuple(others),
        noise=scale,
        seed=None if noise_tensor is not None or replacements is not None else seed,
        _meets_last=meets_last,
    )


def answer_probability(lm: LanguageModel, hidden: Tensor, answer_ids: Sequence[int]) -> Tensor:
    """(R,) float32: joint probability of the answer, read off the last columns of last-layer states (R, S, d_model)."""
    parts = torch.split(hidden[:, -len(answer_ids) :], max(1, _HEAD_ROWS // len(answer_ids)))
    return torch.cat([_joint(lm.head(part).float(), answer_ids) for part in parts])


def _joint(logits: Tensor, answer_ids: Sequence[int]) -> Tensor:
    """(R,) joint probability of the answer's tokens, from logits (R, n_answer, vocab)."""
    wanted = torch.tensor([*answer_ids], device=logits.device).expand(len(logits), -1)
    return (logits.gather(-1, wanted[..., None])[..., 0] - logits.logsumexp(-1)).sum(-1).exp()


# ── the sweep ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Put:
    """What a part is made to put out: `values` (R, S, d_model) in the `cells` marked (R, S), its own elsewhere."""

    part: Part
    values: Tensor
    cells: Tensor


@dataclass(frozen=True, eq=False)
class _Sweep:
    """All restorations at one token, carried up the layers together.

    live     the corrupted runs from that token on
    spans    the restored layers of each variant
    entered  of `Runs._entered`
    part     what is restored in them besides the first; None: nothing, the state was
    sever    what is held at the corrupted values in every layer above
    """

    runs: Runs
    live: Replay
    spans: Sequence[range]
    entered: Mapping[int, Tensor | None]
    part: Part | None
    sever: Part | None

    def climb(self) -> Iterator[tuple[range, Tensor]]:
        """(restored layers, last hidden states (samples, answer tokens, d_model)) of every variant that differs from the corrupted run."""
        runs, live = self.runs, self.live
        n_layers, n_answer = runs.lm.n_layers, len(runs.answer_ids)
        column = live.start - runs.corrupted.start
        carried: dict[
            range, Tensor
        ] = {}  # layers restored so far -> what enters the next layer, (samples, S, d_model)
        for layer in range(n_layers):
            # Whoever shares the layers restored so far is one variant until the shorter window ends.
            reached = list(
                dict.fromkeys(
                    range(s.start, min(s.stop, layer + 1)) for s in self.spans if s.start <= layer
                )
            )
            run = [
                span for span in reached if span.start < layer or self.entered[span.start] is None
            ]
            below = [
                carried[range(s.start, min(s.stop, layer))]
                if s.start < layer
                else live.hidden[layer]
                for s in run
            ]
            after = self._run(layer, run, torch.cat(below)) if run else ()
            carried = dict(zip(run, after, strict=True))
            first = range(layer, layer + 1)
            # At the top nobody reads a column that is not the answer's: restoring it there changes nothing.
            if (
                first in reached
                and (layer < n_layers - 1 or live.n_live <= n_answer)
                and (entry := self.entered[layer]) is not None
            ):
                carried[first] = live.hidden[layer + 1].clone()
                carried[first][:, 0] = entry[:, column]
        for span, states in carried.items():
            yield span, states[:, -n_answer:]

    def _run(self, layer: int, spans: Sequence[range], hidden: Tensor) -> Sequence[Tensor]:
        """One layer over the variants (n * samples, S, d_model), cut to the memory budget."""
        live, samples, width = self.live, self.runs.samples, self.live.n_live
        rows = torch.arange(samples).repeat(len(spans))
        column = live.start - self.runs.corrupted.start
        put = None
        if part := self.sever or self.part:
            source = self.runs.outputs[part][layer][:, column]  # (1 + samples, d_model)
            values = source[1:] if self.sever else source[:1].expand(samples, -1)
            marked = torch.tensor(
                [self.sever is not None or layer in span for span in spans]
            ).repeat_interleave(samples)
            cells = torch.zeros(len(hidden), width, dtype=torch.bool)
            cells[:, 0] = marked
            put = _Put(part, values[rows.to(values.device), None], cells)
        read = len(self.runs.answer_ids) if layer == self.runs.lm.n_layers - 1 else width
        # Alive inside a layer: each column widened (coefficients, gate, their copies: about sixteen times), and the row's keys and values.
        per_row = hidden.element_size() * live.lm.d_model * (16 * width + 4 * live.batch.width)
        at_once = max(
            1, (_CPU_BATCH_BYTES if hidden.device.type == "cpu" else _BATCH_BYTES) // per_row
        )
        at_once -= (
            at_once % samples if at_once > samples else 0
        )  # whole variants share their arguments
        out = []
        for some in torch.split(torch.arange(len(hidden)), at_once):
            own = slice(int(some[0]), int(some[-1]) + 1)
            part_put = None if put is None else _Put(put.part, put.values[own], put.cells[own])
            out.append(_run_layer(live, layer, hidden[own], rows[own], part_put, read))
        return torch.split(torch.cat(out), samples)


def _run_layer(
    live: Replay,
    layer: int,
    hidden: Tensor,
    rows: Tensor,
    put: _Put | None,
    read: int | None = None,
) -> Tensor:
    """One layer over (R, S, d_model), with what one of its parts puts out replaced; only the last `read` columns need be right."""
    lm = live.lm
    needed = torch.ones(hidden.shape[:2], dtype=torch.bool)
    if read is not None:
        needed[:, : hidden.shape[1] - read] = False
    if put is not None and put.part == "mlp":
        needed &= ~put.cells
    own = put if put is not None and put.part == "mlp" else None
    attention = lm.attention[layer]
    changes: AbstractContextManager[None] = nullcontext()
    if put is not None and own is None and attention is not None:
        changes = replacing({attention: lambda output: _with_cells(output, put)})
    with (
        changes,
        _asked_only(lm.ffn[layer].module, needed, own) if not bool(needed.all()) else nullcontext(),
    ):
        return live.layer(layer, hidden, rows)


def _asked_only(
    module: nn.Module, needed: Tensor, put: _Put | None
) -> AbstractContextManager[None]:
    """Ask a position-wise module for the `needed` cells (R, S) of its last S columns only; the others hold `put`, or nothing of use."""
    forward = module.forward  # may be an instance's own, where models are spread over devices

    def play(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (
            sum(1 for _ in tensors((args, kwargs))) != 1
        ):  # something besides the hidden state, of unknown shape
            result = forward(*args, **kwargs)
            return (
                result
                if put is None
                else with_first_tensor(result, _with_cells(first_tensor(result), put))
            )
        given = first_tensor((args, kwargs))
        shaped = given.reshape(len(needed), -1, given.shape[-1])
        asked = needed.to(given.device).nonzero()
        asked = (
            asked if len(asked) else asked.new_zeros(1, 2)
        )  # not every module can be asked nothing
        row, column = asked[:, 0], asked[:, 1] + shaped.shape[1] - needed.shape[1]
        few = shaped[row, column]
        few = few[None] if given.dim() == 3 else few
        result = forward(
            *(few if isinstance(a, Tensor) else a for a in args),
            **{k: few if isinstance(v, Tensor) else v for k, v in kwargs.items()},
        )
        answered = first_tensor(result)
        output = answered.new_zeros(*shaped.shape[:2], answered.shape[-1])
        output[row, column] = answered.reshape(len(row), -1)
        output = output.view(*given.shape[:-1], -1)
        return with_first_tensor(result, output if put is None else _with_cells(output, put))

    return standing_in([module], play)


def _with_cells(output: Tensor, put: _Put) -> Tensor:
    """A part's output, (R, columns, d_model) or (R * columns, d_model), with some cells of the last S columns replaced."""
    changed = output.reshape(len(put.cells), -1, output.shape[-1]).clone()
    cells = put.cells.to(output.device)
    last = changed[:, changed.shape[1] - cells.shape[1] :]
    last[cells] = put.values.to(output).expand(*cells.shape, -1)[cells]
    return changed.view(output.shape)


def _printed(decoded: str, characters: str) -> str:
    """A token as text; one that holds only part of a character's bytes as the character it belongs to."""
    return characters if "�" in decoded else decoded
