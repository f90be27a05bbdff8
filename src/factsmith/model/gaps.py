"""What the model itself puts between a prompt and a target: a space, or nothing.

    lm.gaps(['{"capital": "', "The capital of France is"], ["Paris", "Paris"])   # ["none", "space"]

Where the two texts show it (`core.gap.plain_gap`), no model runs. In doubt the model goes over the
prompt once, and the form that it finds likelier counts. The choice is remembered until the weights
change. While a patch is tried, it stays (`Gaps.held`), so that a search, a proof and a benchmark
ask for the same tokens before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..core.checks import check_text
from ..core.gap import Gap, Rule, Settled, before_gap, plain_gap
from .absent import place_of
from .tokens import encode_prompt, target_forms

_TELLING = 0.1
"""Probability of a target's first token from which on it decides. Below it the model says something
else, and the beginning of what it says decides."""

_LIKELIEST = 64
"""Tokens among which the beginnings are counted."""

_CLEARLY = 2
"""How much likelier than the usual form a beginning must be to decide."""

_HALF = "\ufffd"
"""How a token decodes that holds the first bytes of a letter."""

_REMEMBERED = 100_000
"""Choices that are kept at most."""

_Pair = tuple[str, str]


class Gaps:
    """The choices of one model.

    Attributes:
        chosen: {(prompt, target): gap}, for pairs that the texts alone leave open.
        unclear: Those of these pairs for which the model does not clearly prefer a form.
    """

    def __init__(self) -> None:
        self.chosen: dict[_Pair, Settled] = {}
        self.unclear: set[_Pair] = set()
        self.joined = False  # whether a warning has told that prompt and target share a token
        self._state: object = None
        self._holds = 0

    def of(
        self,
        lm: Any,
        prompts: Sequence[str],
        targets: Sequence[str],
        wanted: Sequence[Gap] | None = None,
    ) -> list[Settled]:
        """Return the gap of each pair. All pairs in doubt are asked in batches.

        Args:
            lm: The model.
            prompts: The prompts.
            targets: As many targets.
            wanted: A gap for each pair that the caller knows; "auto" where the model decides.
        """
        pairs = [
            (before_gap(check_text(p, "the prompt")), check_text(t, "the target").strip())
            for p, t in zip(prompts, targets, strict=True)
        ]
        rules = _rules(lm.tokenizer, dict.fromkeys(pairs))
        doubtful = [pair for pair, rule in rules.items() if not rule.sure]
        if wanted is not None:
            open_pairs = {pair for pair, gap in zip(pairs, wanted, strict=True) if gap == "auto"}
            doubtful = [pair for pair in doubtful if pair in open_pairs]
        choices = self._choices(lm, doubtful, rules) if doubtful and lm.is_causal else {}
        settled = [choices.get(pair, rules[pair].gap) for pair in pairs]
        if wanted is None:
            return settled
        return [s if gap == "auto" else gap for s, gap in zip(settled, wanted, strict=True)]

    @contextmanager
    def held(self, lm: Any) -> Iterator[None]:
        """Keep the choices while other weights are in the model.

        Afterwards the model has its weights again. What was chosen in between is forgotten.
        """
        if not self._holds:
            self._forget_if_changed(lm)
        before = dict(self.chosen)
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if not self._holds:
                self.chosen, self._state = before, _state(lm)

    def _choices(
        self, lm: Any, pairs: Sequence[_Pair], rules: Mapping[_Pair, Rule]
    ) -> dict[_Pair, Settled]:
        """Return the gaps of pairs in doubt: remembered, or asked now."""
        if not self._holds:
            self._forget_if_changed(lm)
        remembered = self.chosen  # another thread may begin an empty one
        choices = {pair: remembered[pair] for pair in pairs if pair in remembered}
        heads: dict[str, list[int]] = {}
        waiting: dict[str, list[_Pair]] = {}
        for prompt, target in pairs:
            if (prompt, target) in choices:
                continue
            ids = heads.setdefault(prompt, encode_prompt(lm.tokenizer, prompt)[0])
            if ids and (lm.max_tokens is None or len(ids) <= lm.max_tokens):
                waiting.setdefault(prompt, []).append((prompt, target))
        distinct = list(waiting)
        for group in lm.groups([len(heads[prompt]) for prompt in distinct]):
            ids_of_group = [heads[distinct[i]] for i in group]
            logits = lm.last_logits(lm.align(ids_of_group, [len(ids) - 1 for ids in ids_of_group]))
            for i, row in zip(group, logits, strict=True):
                probabilities = row.float().softmax(-1)
                for pair in waiting[distinct[i]]:
                    choices[pair], is_clear = _likelier(
                        lm, heads[distinct[i]], pair, probabilities, rules[pair].gap
                    )
                    if not is_clear:
                        self.unclear.add(pair)
        if len(self.chosen) + len(choices) > _REMEMBERED:
            self.chosen, self.unclear = {}, set()
        self.chosen |= choices
        return choices

    def _forget_if_changed(self, lm: Any) -> None:
        state = _state(lm)
        if state != self._state:
            self.chosen, self.unclear, self._state = {}, set(), state


def _state(lm: Any) -> object:
    """Return something that differs after a weight has changed; cheaper than a fingerprint."""
    return tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version)
        if (place := place_of(p)) is None
        else place.state
        for p in lm.module.parameters()
    )


def _rules(tokenizer: Any, pairs: Iterable[_Pair]) -> dict[_Pair, Rule]:
    """Return what the texts alone say, and that no space is usual after a special token."""
    rules = {pair: plain_gap(*pair) if pair[1] else Rule("none", True) for pair in pairs}
    if all(rule.sure for rule in rules.values()):
        return rules
    special = _special(tokenizer)
    for (prompt, target), rule in rules.items():
        if not rule.sure and rule.gap == "space":
            ids, _ = encode_prompt(tokenizer, prompt)
            if ids and ids[-1] in special:
                rules[prompt, target] = Rule("none", False)
    return rules


def _special(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, also those that only the vocabulary file names."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _likelier(
    lm: Any, head: list[int], pair: _Pair, probabilities: Tensor, usual: Settled
) -> tuple[Settled, bool]:
    """Return the form of a target that the model finds likelier, and whether that is clear.

    The first tokens of the two forms decide if the model may say one of them. Otherwise it decides
    whether what the model says begins with a space.

    Args:
        lm: The model.
        head: The prompt's token ids.
        pair: The prompt and the target.
        probabilities: (vocab,) of the next token.
        usual: The form that counts where the two are equally likely.
    """
    prompt, target = pair
    forms = target_forms(lm.tokenizer, prompt, target, head)
    for ids in forms.values():
        lm.check_known(ids)
    firsts = {gap: next(iter(ids), None) for gap, ids in forms.items()}
    if None in firsts.values() or firsts["space"] == firsts["none"]:
        return usual, True
    shares = {gap: float(probabilities[first]) for gap, first in firsts.items()}
    if not max(shares.values()) >= _TELLING:
        shares = _beginnings(lm.tokenizer, head, target[0], probabilities)
        shares[usual] *= _CLEARLY
    other: Settled = "none" if usual == "space" else "space"
    if shares[other] > shares[usual]:
        return other, True
    return usual, shares[usual] > _CLEARLY**2 * shares[other]


def _beginnings(
    tokenizer: Any, head: list[int], first: str, probabilities: Tensor
) -> dict[Settled, float]:
    """Return the probability that the model goes on with a space, and with a character of the
    target's kind."""
    top = probabilities.topk(min(_LIKELIEST, len(probabilities)))
    stem = head[-8:]
    rows = [stem, *([*stem, i] for i in top.indices.tolist())]
    before, *texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    shares: dict[Settled, float] = {"space": 0.0, "none": 0.0}
    for text, p in zip(texts, top.values.tolist(), strict=True):
        new = text[len(before) :] if text.startswith(before) else ""
        if new[:1] == " " and (first.isalnum() or new[1:2] in ("", first)):
            shares["space"] += p
        elif new and (new[0].isalnum() or new[0] == _HALF if first.isalnum() else new[0] == first):
            shares["none"] += p
    return shares
