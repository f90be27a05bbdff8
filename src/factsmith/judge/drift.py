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
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import check_count, check_items, check_number, check_seed
from ..errors import InputError
from ..model import atlas
from ..model.load import LanguageModel, check_model
from ..model.sample import own_text
from ..model.tokens import align
from ..progress import Progress, tell
from ..tables import Shown, Table
from ..verify import begins_with, first_phrase
from .asking import ask
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

    def exceeded(self, **limits: float) -> tuple[str, ...]:
        """Which limits are broken, in words; limits by name: kl_text, kl_text_worst, kl_facts, changed_share, perplexity (after / before).

        Raises InputError for a limit that is none of these.
        """
        found = {
            "kl_text": self.kl_text,
            "kl_text_worst": self.kl_text_worst,
            "kl_facts": self.kl_facts,
            "changed_share": self.changed_share,
            "perplexity": self.perplexity[1] / self.perplexity[0],
        }
        broken = []
        for name, limit in limits.items():
            if name not in found:
                raise InputError(f"no limit {name!r}; expected one of {', '.join(found)}")
            limit, value = check_number(limit, f"the limit of {name}", "a number"), found[name]
            if value is not None and not value <= limit:
                broken.append(f"{name} is {value:.3g}, above {limit:g}")
        return tuple(broken)

    def tables(self) -> list[Table]:
        """The measures, and the facts answered otherwise."""
        before, after = self.perplexity
        rows = [
            ("KL on text", f"{self.kl_text:.4f}", f"mean of {self.n_tokens:,} tokens, nats; 99 % quantile {self.kl_text_worst:.3f}"),
            ("perplexity", f"{after:.2f}", f"before {before:.2f}"),
        ]
        if self.kl_facts is not None:
            rows.append(("KL on facts", f"{self.kl_facts:.4f}", f"{self.n_facts:,} unrelated facts, where the answer is due"))
            rows.append(("facts changed", f"{self.changed_share:.1%}", f"{len(self.changed):,} of them are answered otherwise"))
        found = [Table("drift", {"": "<", "value": ">", " ": "<"}, rows)]
        if self.changed:
            told = [(c.prompt, c.before, c.after) for c in self.changed]
            found.append(Table("answered otherwise", {"prompt": "<", "before": "<", "after": "<"}, told))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {**vars(self), "perplexity": list(self.perplexity), "changed": [dict(vars(c)) for c in self.changed]}


LIMITS = ("kl_text", "kl_text_worst", "kl_facts", "changed_share", "perplexity")
"""What `Drift.exceeded` takes."""
_BATCH = 512  # tokens whose distributions are held at a time, twice
_ANSWER = 8


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
    check_model(lm)
    began = time.perf_counter()
    max_tokens, n_facts = check_count(max_tokens, "max_tokens", "how much text"), check_count(n_facts, "n_facts", "how many facts", least=0)
    seed = check_seed(seed)
    listed = own_text(lm, max_tokens, seed=seed) if texts is None else check_items(texts, "texts", "a list of texts")
    rows = _rows(lm, listed, max_tokens)
    if not rows:
        raise InputError("there is no text of two tokens or more to compare on; give some with texts")
    apart, before, after, done = [], 0.0, 0.0, 0
    total = sum(len(ids) - 1 for ids in rows)
    for group in lm.groups([len(ids) for ids in rows], _BATCH):
        some = [rows[i] for i in group]
        old = _distributions(lm, some)
        with changed():
            new = _distributions(lm, some)
        due = torch.tensor([token for ids in some for token in ids[1:]], device=old.device)[:, None]
        apart.append(divergences(old, new))
        before, after = before - float(old.gather(1, due).sum()), after - float(new.gather(1, due).sum())
        done += len(due)
        tell(progress, "comparing text", done, total)
    each = torch.cat(apart)
    edited = [subject for subject in check_items(without, "without", "subjects") if subject.strip()]
    kl_facts, otherwise, n_known = _unrelated(lm, changed, facts, edited, n_facts, seed)
    return Drift(
        kl_text=float(each.mean()),
        kl_text_worst=float(each.quantile(0.99)),
        perplexity=(math.exp(before / total), math.exp(after / total)),
        kl_facts=kl_facts,
        changed=otherwise,
        n_facts=n_known,
        n_tokens=total,
        seconds=time.perf_counter() - began,
    )


def _rows(lm: LanguageModel, texts: Iterable[str], max_tokens: int) -> list[list[int]]:
    """Token ids of texts, cut to what the model reads at once and so many in all; texts of one token say nothing."""
    rows: list[list[int]] = []
    left, longest = max_tokens, min(_BATCH, lm.max_tokens or _BATCH)
    for text in texts:
        ids = lm.prompt_ids(text) if text.strip() else []
        for start in range(0, len(ids), longest):
            part = ids[start : start + longest][: left + 1]
            if len(part) > 1 and left > 0:
                rows.append(part)
                left -= len(part) - 1
        if left <= 0:
            break
    return rows


def _distributions(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """log p of every next token inside some rows, one row after another: (tokens, vocab) float32."""
    hidden = lm.last_hidden(align(lm, rows, [0] * len(rows)))
    own = torch.cat([states[: len(ids) - 1] for states, ids in zip(hidden, rows, strict=True)])
    return torch.cat([lm.head(part).float().log_softmax(-1) for part in torch.split(own, 256)])


def _unrelated(
    lm: LanguageModel,
    changed: Callable[[], AbstractContextManager[Any]],
    facts: Iterable[tuple[str, str]] | None,
    edited: Sequence[str],
    n_facts: int,
    seed: int,
) -> tuple[float | None, tuple[Changed, ...], int]:
    """Divergence where known facts' answers are due, those answered otherwise, and how many are known."""
    if facts is None:
        drawn = random.Random(seed).sample(atlas.facts(), min(2 * n_facts, len(atlas.facts())))
        pairs = [(atlas.phrasings(f.relation).trained[0].replace("{}", f.subject), f.object) for f in drawn]
    else:
        pairs = check_items(facts, "facts", "pairs of a prompt and its answer")
        if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
            raise InputError("facts are pairs of a prompt and its answer; got something else")
    pairs = [(prompt, answer) for prompt, answer in pairs if not any(subject in prompt for subject in edited)]
    said = lm.says([p for p, _ in pairs], [a for _, a in pairs]) if pairs else []
    known = [pair for pair, right in zip(pairs, said, strict=True) if right][:n_facts]
    if not known:
        return None, (), 0
    prompts = [prompt for prompt, _ in known]
    old, answers = _last(lm, prompts), [reply.answer for reply in ask(lm, prompts, max_new_tokens=_ANSWER)]
    with changed():
        new, now = _last(lm, prompts), [reply.answer for reply in ask(lm, prompts, max_new_tokens=_ANSWER)]
    otherwise = [
        Changed(prompt, first_phrase(was), first_phrase(is_now))
        for (prompt, answer), was, is_now in zip(known, answers, now, strict=True)
        if not begins_with(is_now, answer)
    ]
    return kl_divergence(old, new), tuple(otherwise), len(known)


def _last(lm: LanguageModel, prompts: Sequence[str]) -> torch.Tensor:
    """log p of what follows each prompt: (n, vocab) float32, on the CPU."""
    rows = [lm.prompt_ids(prompt) for prompt in prompts]
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for group in lm.groups([len(ids) for ids in rows]):
        logits = lm.last_logits(align(lm, [rows[i] for i in group], [len(rows[i]) - 1 for i in group]))
        for i, row in zip(group, logits.float().log_softmax(-1).cpu(), strict=True):
            found[i] = row
    return torch.stack(found)
