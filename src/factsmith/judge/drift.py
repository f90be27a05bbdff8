"""What an edit does to everything else: prose, unrelated facts, the weights; in seconds, before anybody is served with it.

    found = drift(lm, lambda: applied(lm, delta), without=["Bulgaria"])
    found                                    # a table
    found.exceeded(kl_text=0.05)             # which limits it breaks, in words; () when none

KL divergence is that of the edited model from the model as it is, token by token, in nats: 0.01 is hardly to be seen, at 1 it is another
model. Papers report perplexity and n-gram entropy of continuations, which notice a collapse late (ANCHORS of the literature: models "edited
with success" that could not write any more); what changes a distribution shows here first.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import atlas
from ..core.checks import check_count, check_items, check_number, check_seed, check_text
from ..core.errors import InputError
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table
from ..corpus.text import pieces
from ..model.answers import begins_with, first_phrase
from ..model.language_model import LanguageModel, check_model
from ..model.sample import own_text
from .metrics import divergences, kl_divergence


@dataclass(frozen=True)
class Changed:
    """A fact that is answered otherwise: the prompt, what was said, what is said."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Drift(Shown):
    """How far an edited model is from the model as it is.

    kl_text          mean KL divergence over the tokens of a text, in nats
    kl_text_worst    its 99 % quantile
    perplexity       of that text, before and after
    kl_facts         mean KL divergence where unrelated facts' answers are due, in nats; None where none is known
    changed          unrelated facts that are answered otherwise
    n_facts          unrelated facts that were asked and known
    n_tokens         tokens of text
    seconds          time it took
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
        """Share of the unrelated facts that are answered otherwise; 0 where none is known."""
        return len(self.changed) / max(1, self.n_facts)

    @property
    def measures(self) -> dict[str, float | None]:
        """What limits are held against, by their names; None: not measured. perplexity is after divided by before."""
        return {
            "kl_text": self.kl_text,
            "kl_text_worst": self.kl_text_worst,
            "kl_facts": self.kl_facts,
            "changed_share": self.changed_share if self.n_facts else None,
            "perplexity": self.perplexity[1] / self.perplexity[0],
        }

    def exceeded(self, **limits: float) -> tuple[str, ...]:
        """Which limits are broken, in words; limits by name: kl_text, kl_text_worst, kl_facts, changed_share, perplexity (after / before).

        Raises InputError for a limit that is none of these.
        """
        found = self.measures
        broken = []
        for name, limit in limits.items():
            if name not in found:
                raise InputError(f"no limit {name!r}; expected one of {', '.join(found)}")
            limit, value = check_number(limit, f"the limit of {name}"), found[name]
            if value is None:
                broken.append(
                    f"{name} was not measured: no unrelated fact that the model knows was asked"
                )
            elif not value <= limit:
                broken.append(f"{name} is {value:.3g}, above {limit:g}")
        return tuple(broken)

    def tables(self) -> list[Table]:
        """The measures, and the facts answered otherwise."""
        before, after = self.perplexity
        rows = [
            (
                "KL on text",
                f"{self.kl_text:.4f}",
                f"mean of {self.n_tokens:,} tokens, nats; 99 % quantile {self.kl_text_worst:.3f}",
            ),
            ("perplexity", f"{after:.2f}", f"before {before:.2f}"),
        ]
        if self.kl_facts is not None:
            rows.append(
                (
                    "KL on facts",
                    f"{self.kl_facts:.4f}",
                    f"{self.n_facts:,} unrelated facts, where the answer is due",
                )
            )
            rows.append(
                (
                    "facts changed",
                    f"{self.changed_share:.1%}",
                    f"{len(self.changed):,} of them are answered otherwise",
                )
            )
        found = [Table("drift", {"": "<", "value": ">", " ": "<"}, rows)]
        if self.changed:
            told = [(c.prompt, c.before, c.after) for c in self.changed]
            found.append(
                Table("answered otherwise", {"prompt": "<", "before": "<", "after": "<"}, told)
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {
            **vars(self),
            "perplexity": list(self.perplexity),
            "changed": [dict(vars(c)) for c in self.changed],
        }


LIMITS = ("kl_text", "kl_text_worst", "kl_facts", "changed_share", "perplexity")
"""What `Drift.exceeded` takes."""

_BATCH = 512  # tokens whose distributions are held at a time, twice

_ANSWER = 8


class Reference:
    """What a model says before it is edited: to compare with, as often as wanted, once it is.

        reference = Reference(lm, max_tokens=500)
        with applied(lm, delta):
            reference.compare()                 # a Drift

    Holds the distributions of all tokens, (max_tokens, vocab) float32. Arguments and errors as `drift`.
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
        self.lm = lm
        rows = _text(lm, texts, max_tokens, check_seed(seed))
        self._parts = [_Part(lm, [rows[i] for i in group]) for group in _groups(lm, rows)]
        self._facts = _Facts(lm, facts, without, n_facts, seed)

    @torch.no_grad()
    def compare(self) -> Drift:
        """How far the model, as it is now, is from what it was."""
        began = time.perf_counter()
        return _found(
            [part.compare() for part in self._parts],
            self._facts.compare(),
            time.perf_counter() - began,
        )


@torch.no_grad()
def drift(
    lm: LanguageModel,
    changed: Callable[[], AbstractContextManager[Any]],
    *,
    texts: Iterable[str] | None = None,
    facts: Iterable[tuple[str, str]] | None = None,
    without: Iterable[str] = (),
    max_tokens: int = 2000,
    n_facts: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Drift:
    """Measure what is different inside `changed()`.

    texts       what distributions are compared on; None: text that the model writes itself
    facts       (prompt, answer) pairs that should not change, of which those count that the model says; None: bundled ones
    without     subjects that were edited: facts with one of them in the prompt are left out
    max_tokens  of the texts; n_facts: of the facts, drawn by seed

    Raises InputError when there is no text, and what `ask` raises.
    """
    began = time.perf_counter()
    if not callable(changed):
        raise InputError(
            "changed is a function that gives a `with` block inside which the model is edited, such as lambda: applied(lm, delta)"
        )
    rows = _text(lm, texts, max_tokens, check_seed(seed))
    compared: list[_Compared] = []
    for group in _groups(
        lm, rows
    ):  # a part is compared before the next is begun: what it holds is large
        part = _Part(lm, [rows[i] for i in group])
        with changed():
            compared.append(part.compare())
        tell(
            progress,
            "comparing text",
            sum(len(one.apart) for one in compared),
            sum(len(ids) - 1 for ids in rows),
        )
    unrelated = _Facts(lm, facts, without, n_facts, seed)
    with changed():
        told = unrelated.compare()
    return _found(compared, told, time.perf_counter() - began)


def _found(
    compared: Sequence[_Compared],
    told: tuple[float | None, tuple[Changed, ...], int],
    seconds: float,
) -> Drift:
    each = torch.cat([one.apart for one in compared])
    before, after = (
        _exp(sum(getattr(one, name) for one in compared) / len(each))
        for name in ("before", "after")
    )
    return Drift(
        kl_text=float(each.mean()),
        kl_text_worst=float(each.quantile(0.99)),
        perplexity=(before, after),
        kl_facts=told[0],
        changed=told[1],
        n_facts=told[2],
        n_tokens=len(each),
        seconds=seconds,
    )


def _exp(nats: float) -> float:
    """exp, infinite where it is larger than a float."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


class _Compared(NamedTuple):
    apart: torch.Tensor  # (tokens,) nats
    before: float  # Σ -log p
    after: float


class _Part:
    """Some rows of text, and what was said to follow each of their tokens."""

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]]) -> None:
        self.lm, self.rows = lm, rows
        self.old = _distributions(lm, rows)

    def compare(self) -> _Compared:
        new = _distributions(self.lm, self.rows)
        due = torch.tensor([token for ids in self.rows for token in ids[1:]], device=new.device)[
            :, None
        ]
        return _Compared(
            divergences(self.old, new),
            *(-float(logs.gather(1, due).sum()) for logs in (self.old, new)),
        )


class _Facts:
    """Known facts that were not edited, and what was said of them."""

    def __init__(
        self,
        lm: LanguageModel,
        facts: Iterable[tuple[str, str]] | None,
        without: Iterable[str],
        n_facts: int,
        seed: int,
    ) -> None:
        self.lm, self.known = lm, _known(lm, facts, without, n_facts, seed)
        self.prompts = [prompt for prompt, _ in self.known]
        self.old, self.answers = self._say()

    def compare(self) -> tuple[float | None, tuple[Changed, ...], int]:
        """Divergence where answers are due, those answered otherwise, and how many there are."""
        if not self.known:
            return None, (), 0
        new, now = self._say()
        otherwise = [
            Changed(prompt, first_phrase(was), first_phrase(is_now))
            for (prompt, answer), was, is_now in zip(self.known, self.answers, now, strict=True)
            if not begins_with(is_now, answer)
        ]
        return kl_divergence(self.old, new), tuple(otherwise), len(self.known)

    def _say(self) -> tuple[torch.Tensor, list[str]]:
        """log p of what follows each prompt, (n, vocab) float32 on the CPU, and the greedy answers; each prompt is run once."""
        lm, rows = self.lm, [self.lm.prompt_ids(prompt) for prompt in self.prompts]
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        answers = [""] * len(rows)
        for group in lm.groups([len(ids) for ids in rows]) if rows else []:
            batch = lm.align([rows[i] for i in group], [len(rows[i]) - 1 for i in group])
            logits, cache = lm.begin(batch)
            told = lm.continue_from(batch, logits, cache, _ANSWER)
            for i, row, ids in zip(group, logits.float().log_softmax(-1).cpu(), told, strict=True):
                found[i], answers[i] = row, lm.as_answer(ids)
        return (torch.stack(found) if found else torch.empty(0)), answers


def _text(
    lm: LanguageModel, texts: Iterable[str] | None, max_tokens: int, seed: int
) -> list[list[int]]:
    """The rows to compare on; raises InputError when there are none."""
    check_model(lm)
    max_tokens = check_count(max_tokens, "max_tokens", "the number of tokens of text")
    given = (
        None
        if texts is None
        else [check_text(text, "a text") for text in check_items(texts, "texts", "texts")]
    )
    listed = own_text(lm, max_tokens, seed=seed) if given is None else given
    if rows := _rows(lm, listed, max_tokens):
        return rows
    raise InputError("there is no text of two tokens or more to compare on; give some with texts")


def _groups(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return lm.groups([len(ids) for ids in rows], _BATCH)


def _rows(lm: LanguageModel, texts: Iterable[str], max_tokens: int) -> list[list[int]]:
    """Token ids of texts, cut to what the model reads at once and so many in all; texts of one token say nothing."""
    rows: list[list[int]] = []
    left, longest = max_tokens, min(_BATCH, lm.max_tokens or _BATCH)
    for piece in pieces(lm, (text for text in texts if text.strip())):
        for start in range(0, len(piece.ids), longest):
            part = piece.ids[start : start + longest][: left + 1]
            if len(part) > 1 and left > 0:
                rows.append(part)
                left -= len(part) - 1
        if left <= 0:
            break
    return rows


def _distributions(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """log p of every next token inside some rows, one row after another: (tokens, vocab) float32."""
    hidden = lm.last_hidden(lm.align(rows, [0] * len(rows)))
    own = torch.cat([states[: len(ids) - 1] for states, ids in zip(hidden, rows, strict=True)])
    return torch.cat([lm.head(part).float().log_softmax(-1) for part in torch.split(own, 256)])


def _known(
    lm: LanguageModel,
    facts: Iterable[tuple[str, str]] | None,
    without: Iterable[str],
    n_facts: int,
    seed: int,
) -> list[tuple[str, str]]:
    """Facts that the model says and that are about something else."""
    n_facts = check_count(n_facts, "n_facts", "the number of unrelated facts", least=0)
    if facts is None:
        drawn = random.Random(seed).sample(atlas.facts(), min(2 * n_facts, len(atlas.facts())))
        pairs = [
            (atlas.phrasings(f.relation).trained[0].replace("{}", f.subject), f.object)
            for f in drawn
        ]
    else:
        pairs = check_items(facts, "facts", "pairs of a prompt and its answer")
        if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
            raise InputError("facts are pairs of a prompt and its answer; got something else")
    edited = [
        subject
        for subject in check_items(without, "without", "subjects")
        if check_text(subject, "a subject").strip()
    ]
    pairs = [
        (prompt, answer)
        for prompt, answer in pairs
        if not any(subject in prompt for subject in edited)
    ]
    said = lm.says([p for p, _ in pairs], [a for _, a in pairs]) if pairs else []
    return [pair for pair, right in zip(pairs, said, strict=True) if right][:n_facts]
