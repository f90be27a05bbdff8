"""The proof of a revision in a server: the same prompts as in the workspace, asked over HTTP.

    base = ask(voice_of_base, expected)              # what the server's model says without patches
    check = compare_base(expected, base, tolerance)  # is it the workspace's model?
    patched = ask(voice, expected)
    proof = compare(expected, base, patched, tolerance)
    proof.passed, proof.failures

Facts must be said. A paraphrase or a neighbour may fail where two tokens are near ties in the
server's dtype (`tolerance`). What did not hold in the workspace either is not asked for.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.progress import Progress
from ...core.tables import Shown, Table, counted
from ...model.matching import begins_with, first_phrase, normal, stayed
from ...patch.verification import Role, wrongly_answered
from ...remote.replies import Completion
from ...remote.server import Server
from .expected import Expected, Probe
from .tolerance import Tolerance

Verdict = Literal["ok", "tie", "failed", "not held"]
"""ok: as wanted. tie: otherwise, within the tolerance. failed: otherwise. not held: it did not hold
in the workspace either."""

_TOP = 5
"""How many of the likeliest tokens are asked for in each place."""

_SAME_BASE = 0.8
"""The share of answers that a base model must have in common with the workspace's."""

NOTHING = "no fact holds in the workspace, so nothing could be proved in the server"
"""Why a revision fails whose facts did not take."""

_WORDS = {"ok": "ok", "tie": "near tie", "failed": "no", "not held": "not held before"}
_PLURALS = {"prompt": "facts", "paraphrase": "paraphrases", "neighbour": "neighbours"}
_MANY = 20
_LONGEST = 80


@dataclass(frozen=True)
class Voice:
    """What is asked: a model of a server, or its adapters at certain scales.

    Attributes:
        server: The server.
        model: The name of the model.
        scales: {adapter: scale}, for llama.cpp. None: 1 for the adapter that `model` names.
    """

    server: Server
    model: str
    scales: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Answer:
    """What a server answers to one prompt.

    Attributes:
        completion: The greedy answer.
        log: ln p of the probe's tail. None: the server gives none.
    """

    completion: Completion
    log: float | None

    @property
    def text(self) -> str:
        """The answer."""
        return self.completion.text


def ask(voice: Voice, expected: Expected, progress: Progress | None = None) -> list[Answer]:
    """Ask a server every prompt of a proof.

    Args:
        voice: What is asked.
        expected: The proof.
        progress: Called with the step's name and how many answers there are.

    Raises:
        ServerError: when the server does not answer.
    """
    probes = expected.probes
    prompts = [probe.prompt for probe in probes]
    completions = voice.server.complete(
        voice.model,
        prompts,
        n_tokens=expected.n_tokens,
        lines=[probe.lines for probe in probes],
        top=_TOP,
        scales=voice.scales,
        progress=progress,
    )
    asked = [i for i, probe in enumerate(probes) if probe.tail]
    scored = voice.server.log_prob(
        voice.model,
        [prompts[i] for i in asked],
        [probes[i].tail for i in asked],
        gaps=["space" if probes[i].tail.startswith(" ") else "none" for i in asked],
        scales=voice.scales,
        progress=progress,
    )
    logs = dict(zip(asked, scored, strict=True))
    return [
        Answer(each, _log_said(each, probe.tail) if logs.get(i) is None else logs[i])
        for i, (each, probe) in enumerate(zip(completions, probes, strict=True))
    ]


def _log_said(completion: Completion, tail: str) -> float | None:
    """Return ln p of a text from the tokens that were said; None where they do not spell it."""
    said, total = "", 0.0
    for token, log in zip(completion.tokens, completion.log_probs, strict=False):
        said, total = said + token, total + log
        if tail and said.strip() == tail.strip():
            return total
    return None


@dataclass(frozen=True, kw_only=True)
class ServedCheck:
    """One prompt: what the workspace's model answers, and what the server does.

    Attributes:
        role: "prompt", "paraphrase" or "neighbour".
        prompt: The whole text.
        wanted: What the answer must begin with. For a neighbour: what the server says without the
            patch.
        workspace: The answer in the workspace.
        answer: The server's answer.
        log_workspace: ln p of what is wanted, in the workspace. None: not known.
        log_server: The same in the server. None: the server gives none.
        margin: How much likelier the server's token is than the wanted one, in nats, in the first
            place where they differ; at least that much, if the wanted one is not among the
            likeliest. None: they do not differ, or the server does not say.
        verdict: "ok", "tie", "failed" or "not held".
        forget: Whether the fact was to be forgotten.
    """

    role: Role
    prompt: str
    wanted: str
    workspace: str
    answer: str
    log_workspace: float | None
    log_server: float | None
    margin: float | None
    verdict: Verdict
    forget: bool = False

    @property
    def in_words(self) -> str:
        """What was answered, and what was wanted."""
        words = wrongly_answered(self.prompt, self.answer, self.wanted, self.forget)
        return f"{self.role} {words}"


@dataclass(frozen=True, kw_only=True, repr=False)
class ServedProof(Shown):
    """The proof of a revision in a server.

    Attributes:
        checks: The checks.
        tolerance: What counted as the same.
        difference: How far the log-probabilities of facts and paraphrases are from the workspace's,
            in the median (nats). None: the server gives none.
        failures: Why the proof failed, in words. (): it passed.
        same_base: The share of the base model's answers that are the workspace's.
    """

    checks: tuple[ServedCheck, ...]
    tolerance: Tolerance
    difference: float | None = None
    failures: tuple[str, ...] = ()
    same_base: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the server says what the workspace says."""
        return not self.failures

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{role: {verdict: how many}}."""
        counts: dict[str, dict[str, int]] = {}
        for check in self.checks:
            of_role = counts.setdefault(check.role, {})
            of_role[check.verdict] = of_role.get(check.verdict, 0) + 1
        return counts

    @property
    def in_words(self) -> str:
        """How many facts, paraphrases and neighbours are as in the workspace, in one line."""
        parts = []
        for role, verdicts in self.counts.items():
            asked = sum(n for verdict, n in verdicts.items() if verdict != "not held")
            if not asked:
                continue
            words = f"{verdicts.get('ok', 0):,} of {asked:,} {_PLURALS[role]}"
            if ties := verdicts.get("tie"):
                words += f" ({counted(ties, 'near tie')})"
            parts.append(words)
        text = f"{', '.join(parts) or 'nothing'} as in the workspace"
        if not_held := sum(verdicts.get("not held", 0) for verdicts in self.counts.values()):
            text += f"; {counted(not_held, 'check')} did not hold there either"
        if self.difference is not None:
            text += f"; ln p of the targets differs by {self.difference:.3f} in the median"
        return text

    def tables(self) -> list[Table]:
        """Return how many checks are as in the workspace, and those that are not."""
        order = ("failed", "tie", "not held")
        others = [check for check in self.checks if check.verdict != "ok"]
        shown = sorted(others, key=lambda check: order.index(check.verdict))
        if not shown:
            return [Table(self.in_words, {})]
        note = f"tolerance of {self.tolerance.dtype}: near ties within {self.tolerance.tie:g} nats"
        if len(shown) > _MANY:
            rest = Counter(check.verdict for check in shown[_MANY:])
            shown = shown[:_MANY]
            words = ", ".join(f"{n:,} {_WORDS[verdict]}" for verdict, n in rest.items())
            note += f"; not shown: {words}"
        columns = {
            "": "<",
            "prompt": "<",
            "workspace": "<",
            "p": ">",
            "server": "<",
            "p ": ">",
            "same": "ok",
        }
        return [Table(self.in_words, columns, [_row(check) for check in shown], note)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "counts": self.counts,
            "difference": self.difference,
            "same_base": self.same_base,
            "tolerance": vars(self.tolerance),
            "checks": [dict(vars(check)) for check in self.checks],
        }


def compare_base(
    expected: Expected, base: Sequence[Answer], tolerance: Tolerance
) -> tuple[float, str | None]:
    """Compare a server's model without patches with the workspace's.

    Args:
        expected: The proof, with the answers of the workspace's base model.
        base: What the server answers without the patches.
        tolerance: What counts as the same.

    Returns:
        The share of answers that are the same, and what is wrong in words; None: nothing is.
    """
    pairs = list(zip(expected.probes, base, strict=True))
    same = [
        stayed(probe.before, answer.text)
        or _is_tie(_margin(answer.completion, _tail(probe, probe.before), tolerance), tolerance)
        for probe, answer in pairs
    ]
    share = sum(same) / len(same)
    difference = _median(
        (probe.log_before, answer.log) for probe, answer in pairs if probe.role != "neighbour"
    )
    what = "the server's model is not the workspace's: without the patches"
    advice = (
        f"Start the server with the model of fingerprint {expected.fingerprint[:10]}, without "
        "patches in its weights"
    )
    if share >= _SAME_BASE:
        if difference is None or difference <= tolerance.difference:
            return share, None
        return share, (
            f"{what} the log-probabilities of the targets differ from the workspace's by "
            f"{difference:.2g} nats in the median; {tolerance.difference:g} is the tolerance of "
            f"{tolerance.dtype}. {advice}, or say in which dtype it computes"
        )
    probe, answer = next(pair for pair, is_same in zip(pairs, same, strict=True) if not is_same)
    return share, (
        f"{what} {sum(same):,} of {len(same):,} answers are the same. "
        f"{probe.prompt!r} is answered {answer.text!r}, and in the workspace {probe.before!r}. "
        f"{advice}"
    )


def compare(
    expected: Expected,
    base: Sequence[Answer],
    patched: Sequence[Answer],
    tolerance: Tolerance,
    same_base: float | None = None,
) -> ServedProof:
    """Compare a server's answers with the workspace's, check by check.

    Args:
        expected: The proof.
        base: What the server answers without the patches.
        patched: What it answers with them.
        tolerance: What counts as the same.
        same_base: From `compare_base`.
    """
    checks = tuple(
        _check(probe, before, after, tolerance)
        for probe, before, after in zip(expected.probes, base, patched, strict=True)
    )
    difference = _difference(checks)
    return ServedProof(
        checks=checks,
        tolerance=tolerance,
        difference=difference,
        failures=tuple(_failures(checks, difference, tolerance)),
        same_base=same_base,
    )


def _check(probe: Probe, before: Answer, after: Answer, tolerance: Tolerance) -> ServedCheck:
    if probe.role == "neighbour":
        wanted = probe.wanted if begins_with(before.text, probe.wanted) else None
        held = stayed(before.text, after.text, wanted)
        wanted = wanted or first_phrase(before.text)
    else:
        wanted = probe.wanted
        held = begins_with(after.text, wanted) != probe.forget
    margin = None
    if not held and not probe.forget:
        margin = _margin(after.completion, _tail(probe, wanted), tolerance)
    verdict: Verdict = "ok"
    if not probe.held:
        verdict = "not held"
    elif not held:
        is_tie = probe.role != "prompt" and _is_tie(margin, tolerance)
        verdict = "tie" if is_tie else "failed"
    return ServedCheck(
        role=probe.role,
        prompt=probe.prompt,
        wanted=wanted,
        workspace=probe.after,
        answer=after.text,
        log_workspace=probe.log_after,
        log_server=after.log,
        margin=margin,
        verdict=verdict,
        forget=probe.forget,
    )


def _tail(probe: Probe, text: str) -> str:
    """Return a text as it continues a probe's prompt."""
    return f" {text}" if probe.tail.startswith(" ") else text


def _is_tie(margin: float | None, tolerance: Tolerance) -> bool:
    return margin is not None and margin <= tolerance.tie


def _margin(completion: Completion, tail: str, tolerance: Tolerance) -> float | None:
    """Return how much likelier the server's token is than a token of `tail`, where they part.

    None: they do not part, or the server does not say. A wanted token that is not among the
    likeliest is at most as likely as the last of those. If that is no near tie, it is the margin.
    """
    if not completion.top or not completion.tokens or not normal(tail):
        return None
    said = ""
    for token, alternatives in zip(completion.tokens, completion.top, strict=False):
        if not _continues(said + token, tail):
            if not alternatives:
                return None
            wanted = [log for text, log in alternatives if _continues(said + text, tail)]
            logs = [log for _, log in alternatives]
            if wanted:
                return max(logs) - max(wanted)
            least = max(logs) - min(logs)
            return least if least > tolerance.tie else None
        said += token
    return None


def _continues(said: str, tail: str) -> bool:
    """Return whether one of two texts is the beginning of the other."""
    said, tail = said.lstrip(), tail.strip()
    return said.startswith(tail) or (tail.startswith(said.rstrip()) and bool(said.strip()))


def _difference(checks: Sequence[ServedCheck]) -> float | None:
    """Return the median of |ln p(server) - ln p(workspace)| over facts and paraphrases."""
    return _median(
        (check.log_workspace, check.log_server)
        for check in checks
        if check.role != "neighbour" and check.verdict != "not held" and not check.forget
    )


def _median(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the median difference of pairs of numbers. None: no pair has both."""
    both = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return statistics.median(both) if both else None


def _failures(
    checks: Sequence[ServedCheck], difference: float | None, tolerance: Tolerance
) -> list[str]:
    if not any(check.role == "prompt" and check.verdict != "not held" for check in checks):
        return [NOTHING]
    failed = [check for check in checks if check.verdict == "failed"]
    facts = [check for check in failed if check.role == "prompt"]
    others = [check for check in failed if check.role != "prompt"]
    n_others = sum(check.role != "prompt" and check.verdict != "not held" for check in checks)
    unknown = [check for check in others if check.margin is None]
    if len(unknown) == len(others) and len(others) <= tolerance.share * n_others:
        others = []
    failures = [check.in_words for check in (*facts, *others)]
    if difference is not None and difference > tolerance.difference:
        failures.append(
            f"the log-probabilities of the targets differ from the workspace's by "
            f"{difference:.2g} nats in the median; {tolerance.difference:g} is the tolerance of "
            f"{tolerance.dtype}"
        )
    return failures


def _row(check: ServedCheck) -> tuple[str, ...]:
    p = (check.log_workspace, check.log_server)
    shown = ["" if log is None else f"{math.exp(log):.3f}" for log in p]
    said, says = (_shortened(text) for text in (check.workspace, check.answer))
    return (check.role, check.prompt, said, shown[0], says, shown[1], _WORDS[check.verdict])


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1].rstrip()}…"
