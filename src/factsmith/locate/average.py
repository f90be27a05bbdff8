"""Causal traces of many facts, and their average: where facts live, by kind of token and layer.

    found = average_trace(lm, facts)
    found.effects["mlp"]                       # (6, n_layers) average indirect effect; rows are found.classes
    found.low["mlp"], found.high["mlp"]        # its 95 % interval
    found.total_effect, found.n_facts, found.n_skipped

    for traces in causal_traces(lm, facts):    # {"state": CausalTrace, ...} of one fact after another
        ...

The averages of Meng et al. 2022, section 2.2 and figure 3 (arXiv 2202.05262). All maps of a fact share one recording of its runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.checks import check_items
from ..core.errors import InputError
from ..core.fact import Fact
from ..core.tables import Shown, Table, counted
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import encode, subject_span
from .corruption import noise_scale
from .kinds import CausalTrace, Corruption, Kind, Part, check_map
from .runs import record_runs

CLASSES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)

Map: TypeAlias = tuple[str, Kind, Part | None]  # its name, what is restored, what is severed


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageTrace(Shown):
    """Average indirect effects (AIE) of many facts by class of token and layer, and their average total effect (ATE).

    classes       the six kinds of token, the rows of all arrays. As in the paper's figures a token counts in every class whose words fit
                  it: a subject's only token is its first and its last, one token behind the subject is the first subsequent and the last
    effects       {map: (6, n_layers) float32} mean of (score - corrupted); nan where no fact has such a token. A map is "state", "mlp",
                  "attention", or a severed one: "state, mlp severed", "state, attention severed"
    low, high     the same: the 95 % interval of the mean over facts, by Student's t; nan for fewer than two facts
    counts        (6,) facts that have such a token. A fact counts once in a class: the mean of its tokens there
    total_effect  mean of (clean - corrupted), with total_low and total_high likewise
    clean         mean p(answer) of the untouched runs
    corrupted     mean p(answer) with the subject corrupted
    n_facts       facts averaged
    n_skipped     facts left out, because the model does not say their answer
    each          {map: (n_facts, 6, n_layers)} what was averaged; nan where the fact has no such token
    noise         standard deviation of the noise on the subjects' embeddings, one for all facts; 0 with corruption "replace"
    window, corruption, samples, seed   as in `CausalTrace`
    """

    classes: tuple[str, ...] = CLASSES
    effects: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    counts: tuple[int, ...]
    total_effect: float
    total_low: float
    total_high: float
    clean: float
    corrupted: float
    n_facts: int
    n_skipped: int
    each: dict[str, Tensor] = field(repr=False)
    noise: float
    window: int
    corruption: Corruption
    samples: int
    seed: int

    def tables(self) -> list[Table]:
        """The largest average effect of each class of token, by map; all of them is `class_map(average)`."""
        title = f"p(answer) of {counted(self.n_facts, 'fact')}: {self.clean:.3f}, with the subject corrupted {self.corrupted:.3f}"
        rows = []
        for row, (name, count) in enumerate(zip(self.classes, self.counts, strict=True)):
            best = {
                kind: effects[row].nan_to_num(-torch.inf).max(0)
                for kind, effects in self.effects.items()
            }
            rows.append(
                (
                    name,
                    str(count),
                    *(
                        f"{float(b.values):.3f} @{int(b.indices)}" if count else ""
                        for b in best.values()
                    ),
                )
            )
        columns = {"": "<", "facts": ">", **dict.fromkeys(self.effects, ">")}
        return [Table(title, columns, rows, "the largest average effect of a layer, @ the layer")]

    def peak(self, kind: str) -> tuple[str, int]:
        """(class, layer) with the largest average effect of a map."""
        row, layer = divmod(
            int(self.effects[kind].nan_to_num(-torch.inf).argmax()), self.effects[kind].shape[1]
        )
        return self.classes[row], layer

    def rows(self) -> list[dict[str, Any]]:
        """The averages as a table: a row for each map, class and layer that has a number."""
        return [
            {
                "map": name,
                "class": self.classes[row],
                "layer": layer,
                "effect": float(effect),
                "low": _plain(self.low[name][row, layer]),
                "high": _plain(self.high[name][row, layer]),
                "facts": self.counts[row],
            }
            for name, effects in self.effects.items()
            for row, per_layer in enumerate(effects)
            for layer, effect in enumerate(per_layer)
            if self.counts[row]
        ]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON-able values, without `each`; None where there is no number."""
        plain = {k: v for k, v in vars(self).items() if k != "each"}
        for name in ("effects", "low", "high"):
            plain[name] = {
                kind: [[_plain(v) for v in row] for row in array]
                for kind, array in getattr(self, name).items()
            }
        return {k: _plain(v) if isinstance(v, float) else v for k, v in plain.items()}


def causal_traces(
    lm: LanguageModel,
    cases: Fact | Iterable[Fact],
    *,
    kinds: Sequence[Kind] = ("state", "mlp", "attention"),
    severed: Sequence[Part] = (),
    corruption: Corruption = "noise",
    window: int = 10,
    samples: int = 10,
    noise: float | None = None,
    seed: int = 1,
) -> Iterator[dict[str, CausalTrace]]:
    """The maps of each fact in turn: {map: CausalTrace}, all from one recording of its runs.

    cases    facts, or one fact; the answer traced is what the model should say today: `target_true` where a fact has one, else `target`.
             Whether the model does say it stands in each trace (`is_correct`)
    kinds    the maps to make; severed: and the "state" maps with these parts held at their corrupted values above the restored state
    noise    one scale for all facts; None: three standard deviations over the embeddings of all their subjects' tokens, as in the paper

    The other arguments, and the errors, are those of `causal_trace`; InputError when nothing was given to trace.
    """
    check_model(lm)
    facts, maps, window = _checked(cases, kinds, severed, window)
    scale = noise if noise is not None or corruption != "noise" else _common_scale(lm, facts)
    for fact in facts:
        runs = record_runs(
            lm,
            fact.text,
            fact.subject,
            target=_answer(fact),
            corruption=corruption,
            samples=samples,
            noise=scale,
            seed=seed,
        )
        yield {name: runs.trace(kind, window=window, sever=sever) for name, kind, sever in maps}


def average_trace(
    lm: LanguageModel,
    cases: Fact | Iterable[Fact],
    *,
    kinds: Sequence[Kind] = ("state", "mlp", "attention"),
    severed: Sequence[Part] = (),
    corruption: Corruption = "noise",
    window: int = 10,
    samples: int = 10,
    noise: float | None = None,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> AverageTrace:
    """Trace many facts and average by class of token: Meng et al. 2022, section 2.2 and figure 3 (arXiv 2202.05262).

    progress  called with (facts done, facts to do) after each fact that is traced

    The other arguments are those of `causal_traces`. Facts whose answer the model does not say are left out and counted, as in the paper;
    the noise's scale is taken over all that are given. Raises InputError when none remains.
    """
    check_model(lm)
    facts, maps, window = _checked(cases, kinds, severed, window)
    said = lm.says([fact.text for fact in facts], [_answer(fact) for fact in facts])
    known = [fact for fact, is_said in zip(facts, said, strict=True) if is_said]
    if not known:
        raise InputError(
            f"the model says the answer of none of the facts ({len(facts)} given), so there is nothing to trace; expected facts it knows "
            "(the answer is target_true where a fact has one, else target)"
        )
    scale = noise if noise is not None or corruption != "noise" else _common_scale(lm, facts)
    each: dict[str, list[Tensor]] = {name: [] for name, _, _ in maps}
    clean, corrupted = [], []
    traces = causal_traces(
        lm,
        known,
        kinds=kinds,
        severed=severed,
        corruption=corruption,
        window=window,
        samples=samples,
        noise=scale,
        seed=seed,
    )
    for done, found in enumerate(traces, 1):
        for name, trace in found.items():
            each[name].append(_by_class(trace))
        one = next(iter(found.values()))
        clean.append(one.clean)
        corrupted.append(one.corrupted)
        if progress is not None:
            progress(done, len(known))
    stacked = {name: torch.stack(found) for name, found in each.items()}
    bounds = {name: _interval(values) for name, values in stacked.items()}
    total, total_low, total_high = (
        float(v) for v in _interval(torch.tensor(clean) - torch.tensor(corrupted))
    )
    present = ~next(iter(stacked.values()))[:, :, 0].isnan()
    return AverageTrace(
        effects={name: mean for name, (mean, _, _) in bounds.items()},
        low={name: low for name, (_, low, _) in bounds.items()},
        high={name: high for name, (_, _, high) in bounds.items()},
        counts=tuple(present.sum(0).tolist()),
        total_effect=total,
        total_low=total_low,
        total_high=total_high,
        clean=sum(clean) / len(clean),
        corrupted=sum(corrupted) / len(corrupted),
        n_facts=len(known),
        n_skipped=len(facts) - len(known),
        each=stacked,
        noise=scale or 0.0,
        window=window,
        corruption=corruption,
        samples=samples,
        seed=seed,
    )


def token_classes(n_tokens: int, subject_span: tuple[int, int]) -> tuple[range, ...]:
    """The token columns of each of the six `CLASSES`, in their order; empty where a prompt has none."""
    start, stop = subject_span
    last = n_tokens - 1
    after = range(stop, n_tokens)
    return (
        range(start, start + 1),
        range(start + 1, stop - 1),
        range(stop - 1, stop),
        after[:1],
        after[1:-1],
        range(last, n_tokens),
    )


def _by_class(trace: CausalTrace) -> Tensor:
    """(6, n_layers) the trace's effects, averaged over the tokens of each class; nan where it has none."""
    columns = token_classes(len(trace.tokens), trace.subject_span)
    return torch.stack([trace.effects[c.start : c.stop].mean(0) for c in columns])


def _interval(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the first dimension, without the nans, and its 95 % interval by Student's t (nan for fewer than two numbers)."""
    values = values.double()
    count = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    variance = (values - mean).square().nansum(0) / (count - 1)
    factor = count.double().apply_(lambda n: t_quantile(int(n) - 1) if n > 1 else torch.nan)
    error = factor * (variance / count).sqrt()
    return mean.float(), (mean - error).float(), (mean + error).float()


@cache
def t_quantile(degrees: int, share: float = 0.95) -> float:
    """t such that `share` of Student's distribution with this many degrees of freedom lies in [-t, t]."""

    def inside(
        angle: float,
    ) -> (
        float
    ):  # the share for t = sqrt(degrees) tan(angle), a finite sum (Abramowitz and Stegun 26.7.3-4)
        odd, cosine = degrees % 2, math.cos(angle)
        term, total = cosine if odd else 1.0, 0.0
        for k in range(2 + odd, degrees + 1, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        total = total * math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < share else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _answer(fact: Fact) -> str:
    answer = fact.target_true if fact.target_true is not None else fact.target
    if answer is None:
        raise InputError(
            f"the fact about {fact.subject!r} has neither a target nor a target_true; a trace needs an answer to follow"
        )
    return answer


def _common_scale(lm: LanguageModel, facts: Sequence[Fact]) -> float:
    """The noise's scale for all facts: over the tokens of every subject, repeats included."""
    ids = []
    for fact in facts:
        start, stop = subject_span(lm, fact.text, fact.subject)
        ids.extend(encode(lm.tokenizer, fact.text)[0][start:stop])
    return noise_scale(lm, ids)


def _checked(
    cases: Fact | Iterable[Fact], kinds: Sequence[Kind], severed: Sequence[Part], window: int
) -> tuple[list[Fact], list[Map], int]:
    """What is to be traced, the maps to make of each, and the window as an int, before anything is computed."""
    facts = (
        [cases]
        if isinstance(cases, Fact)
        else check_items(cases, "cases", "Fact objects", also="one Fact")
    )
    if not facts or not all(isinstance(fact, Fact) for fact in facts):
        raise InputError("average traces take facts (factsmith.Fact), at least one")
    maps: list[Map] = [
        (kind, kind, None)
        for kind in check_items(kinds, "kinds", "kinds, such as ['state', 'mlp']")
    ]
    maps += [
        (f"state, {part} severed", "state", part)
        for part in check_items(severed, "severed", "parts, such as ['mlp']")
    ]
    if not maps:
        raise InputError(
            "no map was asked for; expected at least one of kinds 'state', 'mlp', 'attention', or of severed 'mlp', 'attention'"
        )
    for _, kind, sever in maps:
        window = check_map(kind, window, sever)
    return facts, maps, window


def _plain(value: Tensor | float) -> float | None:
    number = float(value)
    return None if number != number else number
