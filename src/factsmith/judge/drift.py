"""Drift: what an edit does to everything else. It takes seconds, so measure it before the edit is
used.

    measured = drift(lm, lambda: applied(lm, delta), without=["Bulgaria"])
    measured                                    # a table
    measured.exceeded(kl_text=0.05)             # the limits that it breaks, in words; () for none

Drift compares the edited model with the unedited one on prose and on facts that nothing was written
about. Its main measure is the KL divergence of the next token's distribution, in nats a token: 0.01
is hardly visible, 1 is another model. Papers report perplexity and the n-gram entropy of
continuations. Those notice a collapse late; a changed distribution shows here first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..core.checks import check_number, check_seed
from ..core.errors import FingerprintError, InputError
from ..core.identity import same_model
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table
from ..model.answers import answer_tokens, as_said, n_lines, stayed
from ..model.language_model import LanguageModel
from ..model.turns import asking
from .drift_sample import BATCH_TOKENS, DriftSample, known_facts, text_rows
from .editor import Change
from .metrics import divergences, kl_divergence, perplexity

LIMITS = ("kl_text", "kl_text_worst", "kl_facts", "changed_share", "perplexity")
"""The measures that `Drift.exceeded` compares with limits."""

Drifting = Callable[[], AbstractContextManager[Any]]
"""Returns a `with` block inside which the model is edited."""


@dataclass(frozen=True)
class Changed:
    """A fact that the edited model answers differently.

    Attributes:
        prompt: The question.
        before: Answer of the unedited model.
        after: Answer of the edited model.
    """

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Drift(Shown):
    """How far an edited model is from the unedited one.

    Attributes:
        kl_text: Mean KL divergence over the tokens of a text, in nats.
        kl_text_worst: The 99 % quantile of the same.
        perplexity: Perplexity of the text before and after.
        kl_facts: Mean KL divergence over unrelated facts, at the token where the answer begins, in
            nats. None: the model knows none of the facts.
        changed: The unrelated facts that are answered differently.
        n_facts: Number of unrelated facts that were asked and are known.
        n_tokens: Number of tokens of text.
        seconds: Time that the measurement took.
    """

    kl_text: float
    kl_text_worst: float
    perplexity: tuple[float, float]
    kl_facts: float | None
    changed: tuple[Changed, ...]
    n_facts: int
    n_tokens: int
    seconds: float

    @property
    def changed_share(self) -> float:
        """Share of the unrelated facts that are answered differently; 0 if none is known."""
        return len(self.changed) / max(1, self.n_facts)

    @property
    def measures(self) -> dict[str, float | None]:
        """The measures that limits apply to, by name. perplexity is after divided by before.

        None: not measured.
        """
        return {
            "kl_text": self.kl_text,
            "kl_text_worst": self.kl_text_worst,
            "kl_facts": self.kl_facts,
            "changed_share": self.changed_share if self.n_facts else None,
            "perplexity": self.perplexity[1] / self.perplexity[0],
        }

    def exceeded(self, **limits: float) -> tuple[str, ...]:
        """Return the limits that are broken, in words. A measure without a value breaks its limit.

        Args:
            limits: The largest accepted value of a measure, by the name of the measure: kl_text,
                kl_text_worst, kl_facts, changed_share, perplexity (after / before).

        Raises:
            InputError: when a name is no measure, or a limit is not finite.
        """
        measures = self.measures
        broken = []
        for name, limit in check_limits(limits).items():
            value = measures[name]
            if value is None:
                broken.append(
                    f"{name} was not measured: no unrelated fact that the model knows was asked"
                )
            elif not value <= limit:
                broken.append(f"{name} is {value:z.3g}, above {limit:zg}")
        return tuple(broken)

    def tables(self) -> list[Table]:
        """Return a table of the measures, and one of the facts that are answered differently."""
        before, after = self.perplexity
        quantile = f"99 % quantile {self.kl_text_worst:z.3f}"
        rows = [
            (
                "KL on text",
                f"{self.kl_text:z.4f}",
                f"mean of {self.n_tokens:,} tokens, nats; {quantile}",
            ),
            ("perplexity", f"{after:z.2f}", f"before {before:z.2f}"),
        ]
        if self.kl_facts is not None:
            facts = f"{self.n_facts:,} unrelated facts, where the answer begins"
            rows.append(("KL on facts", f"{self.kl_facts:z.4f}", facts))
            changed = f"{len(self.changed):,} of them answered differently"
            rows.append(("facts changed", f"{self.changed_share:z.1%}", changed))
        tables = [Table("drift", {"": "<", "value": ">", " ": "<"}, rows)]
        if self.changed:
            columns = {"prompt": "<", "before": "<", "after": "<"}
            answers = [(c.prompt, c.before, c.after) for c in self.changed]
            tables.append(Table("answered differently", columns, answers))
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Return fields for JSON."""
        return {
            **vars(self),
            "perplexity": list(self.perplexity),
            "changed": [dict(vars(c)) for c in self.changed],
        }


def check_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Return limits of drift as finite numbers.

    Raises:
        InputError: when a name is no measure, or a limit is not finite.
    """
    for name in limits:
        if name not in LIMITS:
            raise InputError(
                f"there is no limit {name!r}; give one of {', '.join(LIMITS)}", argument="limit"
            )
    return {name: check_number(limit, f"the limit of {name}") for name, limit in limits.items()}


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────


@asking(changes=True)
def drift(  # house: the public name and its keywords are promised
    lm: LanguageModel,
    changed: Drifting,
    *,
    texts: Iterable[str] | None = None,
    facts: Iterable[tuple[str, str]] | None = None,
    without: Iterable[str] = (),
    max_tokens: int = 2000,
    n_facts: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Drift:
    """Measure what differs inside the block that `changed()` returns.

    Args:
        lm: The model, unedited.
        changed: Returns a `with` block inside which the model is edited.
        texts: The texts on which distributions are compared. None: the model writes the text.
        facts: (prompt, answer) pairs that should not change. Those count that the model says. None:
            bundled facts.
        without: Subjects that were edited. A fact with one of them in its prompt is left out.
        max_tokens: Number of tokens of the texts.
        n_facts: Number of facts.
        seed: Seed of the text and of the facts that are drawn.
        progress: Gets the number of tokens that are compared.

    Raises:
        InputError: when there is no text, or an argument is wrong.
    """
    began = time.perf_counter()
    if not callable(changed):
        raise InputError(
            f"changed is a {type(changed).__name__}; give a function that returns a `with` block "
            "inside which the model is edited, such as lambda: applied(lm, delta)",
            argument="changed",
        )
    rows = text_rows(lm, texts, max_tokens, check_seed(seed))
    total = sum(len(ids) - 1 for ids in rows)
    compared: list[_Compared] = []
    # A part is compared before the next one begins, because its distributions are large.
    for group in _groups(lm, rows):
        part = _Part(lm, [rows[i] for i in group])
        with changed():
            compared.append(part.compare())
        tell(progress, "comparing text", sum(len(each.apart) for each in compared), total)
    unrelated = _Facts(lm, known_facts(lm, facts, without, n_facts, seed))
    with changed():
        compared_facts = unrelated.compare()
    return _drift_of(compared, compared_facts, time.perf_counter() - began)


def drift_of_change(lm: LanguageModel, change: Change, **options: Any) -> Drift:
    """Measure the drift of a change that is made already, such as a saved Delta.

    Facts about the subjects of the change are left out.

    Args:
        lm: The model that the change was made on.
        change: The change.
        options: The other arguments of `drift`.

    Raises:
        FingerprintError: when the change was made on another model.
    """
    if not same_model(change.fingerprint, lm.fingerprint):
        raise FingerprintError(
            f"the change was made on a model with fingerprint {change.fingerprint[:12]}, and "
            f"{lm.name} has {lm.fingerprint[:12]} now; give the model that it was made on. If the "
            "change belongs on top of other patches, measure the workspace that holds all of them",
            argument="workspace",
        )
    subjects = [fact.subject for fact in change.facts]
    return drift(lm, lambda: change.inside(lm), without=subjects, **options)


class Reference:
    """The distributions and answers of an unedited model, to compare edited ones with.

        reference = Reference(lm, max_tokens=500)
        with applied(lm, delta):
            reference.compare()                 # a Drift

    It holds the distributions of all tokens, (max_tokens, vocab) float32. Arguments and errors are
    those of `drift`.
    """

    @torch.no_grad()
    def __init__(
        self,
        lm: LanguageModel,
        *,
        texts: Iterable[str] | None = None,
        facts: Iterable[tuple[str, str]] | None = None,
        without: Iterable[str] = (),
        max_tokens: int = 500,
        n_facts: int = 100,
        seed: int = 0,
    ) -> None:
        rows = text_rows(lm, texts, max_tokens, check_seed(seed))
        self._ask(lm, DriftSample(rows, known_facts(lm, facts, without, n_facts, seed)))

    @classmethod
    @torch.no_grad()
    def on(cls, lm: LanguageModel, sample: DriftSample) -> Reference:
        """Return a reference to an unedited model, on text and facts that are chosen already."""
        reference = cls.__new__(cls)
        reference._ask(lm, sample)
        return reference

    def _ask(self, lm: LanguageModel, sample: DriftSample) -> None:
        self.lm = lm
        groups = _groups(lm, sample.rows)
        self._parts = [_Part(lm, [sample.rows[i] for i in group]) for group in groups]
        self._facts = _Facts(lm, sample.facts)

    @torch.no_grad()
    def compare(self) -> Drift:
        """Return how far the model, as it is now, is from the unedited one."""
        began = time.perf_counter()
        compared = [part.compare() for part in self._parts]
        compared_facts = self._facts.compare()
        return _drift_of(compared, compared_facts, time.perf_counter() - began)


class _Compared(NamedTuple):
    """A part of the text, compared."""

    apart: torch.Tensor
    """(tokens,) KL divergence in nats."""
    before: float
    """Σ −log p of the tokens by the unedited model."""
    after: float


class _ComparedFacts(NamedTuple):
    """The unrelated facts, compared; see `Drift`."""

    kl: float | None
    changed: tuple[Changed, ...]
    n_facts: int


def _drift_of(compared: Sequence[_Compared], facts: _ComparedFacts, seconds: float) -> Drift:
    """Return the drift of all parts and facts together."""
    apart = torch.cat([each.apart for each in compared])
    n_tokens = len(apart)
    return Drift(
        kl_text=float(apart.mean()),
        kl_text_worst=float(apart.quantile(0.99)),
        perplexity=(
            perplexity(sum(each.before for each in compared), n_tokens),
            perplexity(sum(each.after for each in compared), n_tokens),
        ),
        kl_facts=facts.kl,
        changed=facts.changed,
        n_facts=facts.n_facts,
        n_tokens=n_tokens,
        seconds=seconds,
    )


# ── on text ───────────────────────────────────────────────────────────────────────────────────────


class _Part:
    """Some rows of text, with the unedited model's distribution of each next token."""

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]]) -> None:
        self.lm, self.rows = lm, rows
        self.before = _distributions(lm, rows)

    def compare(self) -> _Compared:
        """Compare the model, as it is now, with the unedited one."""
        after = _distributions(self.lm, self.rows)
        next_tokens = [token for ids in self.rows for token in ids[1:]]
        due = torch.tensor(next_tokens, device=after.device)[:, None]
        before_nats, after_nats = (
            -float(logs.gather(1, due).sum()) for logs in (self.before, after)
        )
        return _Compared(divergences(self.before, after), before_nats, after_nats)


def _distributions(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return log p of every next token, one row after the other: (tokens, vocab) float32."""
    hidden = lm.last_hidden(lm.align(rows, [0] * len(rows)))
    states = torch.cat([row[: len(ids) - 1] for row, ids in zip(hidden, rows, strict=True)])
    return torch.cat([lm.head(some).float().log_softmax(-1) for some in torch.split(states, 256)])


def _groups(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return lm.groups([len(ids) for ids in rows], BATCH_TOKENS)


# ── on facts ──────────────────────────────────────────────────────────────────────────────────────


class _Facts:
    """Known facts that were not edited, with the unedited model's distributions and answers."""

    def __init__(self, lm: LanguageModel, facts: Sequence[tuple[str, str]]) -> None:
        self.lm, self.facts = lm, facts
        self.n_tokens = answer_tokens(lm, *zip(*facts, strict=True)) if facts else 0
        self.before, self.answers = self._ask()

    def compare(self) -> _ComparedFacts:
        """Compare the model, as it is now, with the unedited one."""
        if not self.facts:
            return _ComparedFacts(None, (), 0)
        after, answers = self._ask()
        changed = tuple(
            Changed(prompt, as_said(answer_before, right), as_said(answer_after, right))
            for (prompt, right), answer_before, answer_after in zip(
                self.facts, self.answers, answers, strict=True
            )
            if not stayed(answer_before, answer_after, right)
        )
        return _ComparedFacts(kl_divergence(self.before, after), changed, len(self.facts))

    def _ask(self) -> tuple[torch.Tensor, list[str]]:
        """Run each prompt once.

        Returns:
            log p of the token after each prompt, (n, vocab) float32 on the CPU, and the greedy
            answers.
        """
        lm = self.lm
        if not self.facts:
            return torch.empty(0, dtype=torch.float32), []
        rows = [lm.prompt_ids(prompt) for prompt, _ in self.facts]
        logs: dict[int, torch.Tensor] = {}
        answers: dict[int, str] = {}
        for group in lm.groups([len(ids) for ids in rows]):
            batch = lm.align([rows[i] for i in group], [len(rows[i]) - 1 for i in group])
            logits, cache = lm.begin(batch)
            lines = [n_lines(self.facts[i][1]) for i in group]
            new = lm.continue_from(batch, logits, cache, self.n_tokens, lines)
            of_group = logits.float().log_softmax(-1).cpu()
            for i, n, log, ids in zip(group, lines, of_group, new, strict=True):
                logs[i], answers[i] = log, lm.as_answer(ids, n)
        order = range(len(rows))
        return torch.stack([logs[i] for i in order]), [answers[i] for i in order]
