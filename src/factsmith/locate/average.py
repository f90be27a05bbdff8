"""Causal traces of many facts, and their average: where facts are kept, by token class and layer.

    average = average_trace(lm, facts)
    average.effects["mlp"]                     # (6, n_layers) average indirect effect
    average.classes                            # the names of the six rows
    average.low["mlp"], average.high["mlp"]    # the 95 % interval of each effect
    average.total_effect, average.n_facts, average.n_skipped

    for traces in causal_traces(lm, facts):    # {"state": CausalTrace, ...} of each fact in turn
        ...

The averages are those of Meng et al. 2022, section 2.2 and figure 3 (arXiv 2202.05262). All maps of
a fact share one recording of its runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_items
from ..core.errors import InputError
from ..core.fact import Fact
from ..core.tables import Shown, Table, counted
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .corruption import Corruption, TracedPrompt, noise_scale
from .interval import margin, mean_interval
from .kinds import CorruptionKind, Part, Restoration, TraceKind
from .records import CausalTrace, corruption_warnings
from .runs import record_prompt
from .sweep import trace_runs

CLASSES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AverageTrace(Shown):
    """Average indirect effects of many facts, by class of token and layer.

    The paper calls them AIE, and the average total effect ATE. A map is named "state", "mlp",
    "attention", "state, mlp severed" or "state, attention severed".

    Attributes:
        classes: The six classes of token: the rows of all arrays. As in the paper's figures, a
            token belongs to every class whose words fit it. The only token of a subject is its
            first and its last token. A single token after the subject is the first subsequent
            token and the last token.
        effects: {map: (6, n_layers) float32} mean of (score - corrupted); nan where no fact has
            such a token.
        low: {map: (6, n_layers) float32} lower end of the 95 % interval of the mean over facts, by
            Student's t; nan for fewer than two facts.
        high: {map: (6, n_layers) float32} upper end of the same interval.
        counts: (6,) number of facts that have such a token. A fact counts once in a class, with
            the mean over its tokens in that class.
        total_effect: Mean of (clean - corrupted).
        total_low: Lower end of its 95 % interval.
        total_high: Upper end of its 95 % interval.
        clean: Mean p(answer) of the clean runs.
        corrupted: Mean p(answer) with the subject corrupted.
        n_facts: Number of facts averaged.
        n_skipped: Number of facts left out, because the model does not say their answer.
        each: {map: (n_facts, 6, n_layers)} the averaged effects of each fact; nan where the fact
            has no such token.
        noise: Standard deviation of the noise, one for all facts; 0 with corruption "replace".
        window: Number of neighbouring layers restored together.
        corruption: "noise" on the subject's embeddings, or "replace" for other subjects.
        samples: Number of corrupted runs of each fact.
        seed: Seed of the noise or of the choice of replacements.
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
    corruption: CorruptionKind
    samples: int
    seed: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to trust the maps, as sentences; usually empty."""
        return corruption_warnings("answer", self.clean, self.corrupted)

    def tables(self) -> list[Table]:
        """Return the largest average effect of each class of token, for each map.

        `class_map(average)` draws all effects.
        """
        skipped = (
            f"; {self.n_skipped} left out, which the model answers otherwise"
            if self.n_skipped
            else ""
        )
        summary = (
            f"{counted(self.n_facts, 'fact')}{skipped}: "
            f"p(answer) {self.clean:z.3f}, corrupted {self.corrupted:z.3f}"
        )
        total = f"{self.total_effect:z.3f}{margin(self.total_low, self.total_high)}"
        rows = [
            (name, str(count), *(self._best(kind, row) if count else "" for kind in self.effects))
            for row, (name, count) in enumerate(zip(self.classes, self.counts, strict=True))
        ]
        return [
            Table(summary, {}),
            Table(
                f"average total effect {total}",
                {"": "<", "facts": ">", **dict.fromkeys(self.effects, ">")},
                rows,
                "largest average effect of a layer, ± half of its 95 % interval, @ the layer",
            ),
        ]

    def _best(self, kind: str, row: int) -> str:
        """The largest effect of a class in a map, half of its interval, and its layer."""
        layer = int(self.effects[kind][row].nan_to_num(-torch.inf).argmax())
        low, high = float(self.low[kind][row, layer]), float(self.high[kind][row, layer])
        return f"{float(self.effects[kind][row, layer]):z.3f}{margin(low, high)} @{layer}"

    def peak(self, kind: str) -> tuple[str, int]:
        """Return (class, layer) with the largest average effect of a map."""
        row, layer = divmod(
            int(self.effects[kind].nan_to_num(-torch.inf).argmax()), self.effects[kind].shape[1]
        )
        return self.classes[row], layer

    def rows(self) -> list[dict[str, Any]]:
        """Return the averages as a table: one row for each map, class and layer with a number."""
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
        """Return the record as plain values for JSON, without `each`. A nan becomes None."""
        plain = {k: v for k, v in vars(self).items() if k != "each"}
        for name in ("effects", "low", "high"):
            plain[name] = {
                kind: [[_plain(v) for v in row] for row in array]
                for kind, array in getattr(self, name).items()
            }
        return {k: _plain(v) if isinstance(v, float) else v for k, v in plain.items()}


def causal_traces(  # house: the promised public signature; the settings go into a Corruption
    lm: LanguageModel,
    cases: Fact | Iterable[Fact],
    *,
    kinds: Sequence[TraceKind] = ("state", "mlp", "attention"),
    severed: Sequence[Part] = (),
    corruption: CorruptionKind = "noise",
    window: int = 10,
    samples: int = 10,
    noise: float | None = None,
    seed: int = 1,
) -> Iterator[dict[str, CausalTrace]]:
    """Yield the maps of each fact in turn, all from one recording of its runs.

    The arguments `corruption`, `window`, `samples` and `seed` are those of `causal_trace`.

    Args:
        lm: The model.
        cases: Facts, or one fact. The answer traced is the one that the model should give today:
            `target_true` where a fact has one, and otherwise `target`. Each trace says in
            `is_correct` whether the model gives it.
        kinds: The maps to make.
        severed: Parts to hold at their corrupted values above a restored state, one more map each.
        noise: Standard deviation of the noise, one for all facts. None: three standard deviations
            over the embeddings of all their subjects' tokens, as in the paper.

    Yields:
        {map: CausalTrace} of one fact.

    Raises:
        InputError: when there is no fact, or no map; and what `causal_trace` raises.
    """
    check_model(lm)
    settings = Corruption(corruption, samples, noise, seed=seed)
    facts = _check_facts(cases)
    restorations = _check_maps(kinds, severed, window)
    yield from _traces(lm, facts, restorations, _scaled(settings, lm, facts))


@asking(grad=True)
def average_trace(  # house: the promised public signature; the settings go into a Corruption
    lm: LanguageModel,  # house: the public signature repeats that of causal_traces
    cases: Fact | Iterable[Fact],
    *,
    kinds: Sequence[TraceKind] = ("state", "mlp", "attention"),
    severed: Sequence[Part] = (),
    corruption: CorruptionKind = "noise",
    window: int = 10,
    samples: int = 10,
    noise: float | None = None,
    seed: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> AverageTrace:
    """Trace many facts, and average their effects by class of token.

    Meng et al. 2022, section 2.2 and figure 3 (arXiv 2202.05262). As in the paper, facts whose
    answer the model does not say are left out and counted. The scale of the noise is taken over
    all facts. The other arguments are those of `causal_traces`.

    Args:
        progress: Called with (facts done, facts to do) after each fact that is traced.

    Raises:
        InputError: when the model says no fact's answer; and what `causal_traces` raises.
    """
    check_model(lm)
    settings = Corruption(corruption, samples, noise, seed=seed)
    facts = _check_facts(cases)
    restorations = _check_maps(kinds, severed, window)
    targets = [_answer(fact) for fact in facts]
    says = lm.says([fact.text for fact in facts], targets, by_tokens=True)
    said = [fact for fact, is_said in zip(facts, says, strict=True) if is_said]
    if not said:
        raise InputError(
            f"the model says no answer of the {counted(len(facts), 'fact')} given, so no trace "
            "can be made. Give facts that it knows. The answer is target_true where a fact has "
            "one, and otherwise target.",
            argument="cases",
        )
    settings = _scaled(settings, lm, facts)
    each: dict[str, list[Tensor]] = {restoration.name: [] for restoration in restorations}
    clean, corrupted = [], []
    for done, traces in enumerate(_traces(lm, said, restorations, settings), 1):
        for name, trace in traces.items():
            each[name].append(_by_class(trace))
        one = next(iter(traces.values()))
        clean.append(one.clean)
        corrupted.append(one.corrupted)
        if progress is not None:
            progress(done, len(said))
    stacked = {name: torch.stack(effects) for name, effects in each.items()}
    bounds = {name: mean_interval(values) for name, values in stacked.items()}
    total, total_low, total_high = (
        float(value)
        for value in mean_interval(
            torch.tensor(clean, dtype=torch.float32) - torch.tensor(corrupted, dtype=torch.float32)
        )
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
        n_facts=len(said),
        n_skipped=len(facts) - len(said),
        each=stacked,
        noise=settings.scale or 0.0,
        window=restorations[0].window,
        corruption=settings.kind,
        samples=settings.samples,
        seed=settings.seed,
    )


def token_classes(n_tokens: int, subject_span: tuple[int, int]) -> tuple[range, ...]:
    """Return the token columns of each of the six `CLASSES`; empty where a prompt has none."""
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


def _traces(
    lm: LanguageModel,
    facts: Sequence[Fact],
    restorations: Sequence[Restoration],
    corruption: Corruption,
) -> Iterator[dict[str, CausalTrace]]:
    """The maps of each fact, from one recording of its runs."""
    for fact in facts:
        runs = record_prompt(lm, TracedPrompt.of_fact(lm, fact), corruption, target=_answer(fact))
        yield {restoration.name: trace_runs(runs, restoration) for restoration in restorations}


def _by_class(trace: CausalTrace) -> Tensor:
    """(6, n_layers) the effects averaged over the tokens of each class; nan where it has none."""
    columns = token_classes(len(trace.tokens), trace.subject_span)
    return torch.stack([trace.effects[c.start : c.stop].mean(0) for c in columns])


def _answer(fact: Fact) -> str:
    """The answer that the model should give today."""
    answer = fact.target_true if fact.target_true is not None else fact.target
    if answer is None:
        raise InputError(
            f"the fact about {fact.subject!r} has no target and no target_true. "
            "A trace follows an answer: give one of the two.",
            argument="cases",
        )
    return answer


def _scaled(corruption: Corruption, lm: LanguageModel, facts: Sequence[Fact]) -> Corruption:
    """The corruption with one noise scale: over the tokens of every subject, repeats included."""
    if corruption.scale is not None or corruption.kind != "noise":
        return corruption
    ids = [token for fact in facts for token in TracedPrompt.of_fact(lm, fact).subject_ids]
    return dataclasses.replace(corruption, scale=noise_scale(lm, ids))


def _check_facts(cases: Fact | Iterable[Fact]) -> list[Fact]:
    """The facts to trace, as a list."""
    facts = (
        [cases]
        if isinstance(cases, Fact)
        else check_items(cases, "cases", "Fact objects", also="one Fact")
    )
    if not facts or not all(isinstance(fact, Fact) for fact in facts):
        raise InputError(
            "cases must be facts (factsmith.Fact), at least one. Read them from a file with "
            "FactFile.read, or make them with Fact(...).",
            argument="cases",
        )
    return facts


def _check_maps(
    kinds: Sequence[TraceKind], severed: Sequence[Part], window: int
) -> list[Restoration]:
    """What each map restores."""
    restorations = [
        Restoration(kind, window)
        for kind in check_items(kinds, "kinds", "kinds, such as ['state', 'mlp']")
    ]
    restorations += [
        Restoration("state", window, part)
        for part in check_items(severed, "severed", "parts, such as ['mlp']")
    ]
    if not restorations:
        raise InputError(
            "kinds and severed are both empty, so no map would be made. Give at least one of the "
            "kinds 'state', 'mlp' and 'attention', or of the severed parts 'mlp' and 'attention'.",
            argument="kinds",
        )
    return restorations


def _plain(value: Tensor | float) -> float | None:
    """A number for JSON: None for nan."""
    number = float(value)
    return None if number != number else number
