"""The subject token in one layer: read the states there, and add to them.

    keys = read_keys(lm, facts, layer, contexts)      # (n, n_contexts, d_ff)
    stream = read_stream(lm, facts, layer)            # (n, d_model)

A state at the subject token does not depend on the tokens after it. So the rest of the prompt is
not run, nor are the layers above. Beginnings that prompts have in common are run once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..core.executor import executor_in_use
from ..core.fact import Fact
from ..core.slots import fill
from ..model.language_model import LanguageModel
from ..model.replay import Replay, record
from ..model.subject import token_span
from ..model.tokens import encode_prompt, target_ids
from ..model.trace import recording, replacing
from ..model.turns import asking

Site: TypeAlias = Literal["ffn", "stream"]
"""The place in a layer where δ is added: the output of the down-projection, or of the whole
layer."""

_PART = 1024
"""Token sequences of a part, where the executor in use cuts work into parts."""

_SEARCH_STEPS = 60
"""Steps of the search in `to_down`. It is one small problem for each fact, close to convex, and it
stops by itself when it is solved."""


@torch.no_grad()
def read_keys(
    lm: LanguageModel, facts: Sequence[Fact], layer: int, contexts: Sequence[str]
) -> Tensor:
    """Return the facts' keys: the coefficients at the subject token, one key for each context.

    Returns:
        (n, n_contexts, d_ff) float32.
    """
    rows = _in_contexts(lm, facts, contexts)
    keys = _at_last(lm, rows, layer, partial(_down, layer, 0))
    return keys.view(len(facts), len(contexts), -1)


@torch.no_grad()
def read_outputs(lm: LanguageModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """Return the down-projection's output at each fact's subject token on the bare prompt.

    Returns:
        (n, d_model) float32.
    """
    rows = [_up_to_subject(lm, fact.template, fact.subject) for fact in facts]
    return _at_last(lm, rows, layer, partial(_down, layer, 1))


@torch.no_grad()
def read_inputs(
    lm: LanguageModel, facts: Sequence[Fact], layer: int, contexts: Sequence[str]
) -> Tensor:
    """Return what enters the feed-forward network at the subject token, in each context.

    Returns:
        (n, n_contexts, d_model) float32.
    """
    rows = _in_contexts(lm, facts, contexts)
    return read_inputs_of(lm, rows, layer).view(len(facts), len(contexts), -1)


@torch.no_grad()
def read_inputs_of(lm: LanguageModel, rows: Sequence[list[int]], layer: int) -> Tensor:
    """Return what enters the feed-forward network at the last token of each row.

    Returns:
        (n, d_model) float32.
    """
    return _at_last(lm, rows, layer, partial(_entering, layer))


def _down(layer: int, which: int, replay: Replay) -> Tensor:
    """Return the input of a down-projection (0), or its output (1), at the first live column."""
    return read_down(replay, layer)[which]


def _leaving(layer: int, replay: Replay) -> Tensor:
    """Return the output of a layer at the first live column, (R, d_model) float32."""
    return replay.hidden[layer + 1][:, 0].float()


def _entering(layer: int, replay: Replay) -> Tensor:
    """Return what enters a feed-forward network at the first live column, (R, d_model) float32."""
    taken: list[Tensor] = []
    with replay.lm.ffn[layer].entering(taken.append):
        replay.layer(layer, replay.hidden[layer])
    (states,) = taken
    return states.reshape(replay.batch.size, -1, states.shape[-1])[:, -replay.n_live].float()


@torch.no_grad()
def read_stream(lm: LanguageModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """Return the layer's output at each fact's subject token on the bare prompt.

    Returns:
        (n, d_model) float32.
    """
    rows = [_up_to_subject(lm, fact.template, fact.subject) for fact in facts]
    return _at_last(lm, rows, layer, partial(_leaving, layer))


def to_down(lm: LanguageModel, facts: Sequence[Fact], layer: int, change: Tensor) -> Tensor:
    """Return the addition to a down-projection's output that changes the layer's output.

    In most families it is `change` itself. In some a norm or a multiplier follows the
    down-projection (Gemma 2, Granite). There the addition is searched by least squares through the
    rest of the layer. A norm fixes the length of what the layer adds to the stream, so the result
    is then the nearest that the layer can reach.

    Args:
        lm: The model.
        facts: n facts; the addition is made at their subject tokens.
        layer: The layer.
        change: (n, d_model) the wanted change.
    """
    if lm.ffn[layer].adds_directly:
        return change
    sequences = [_up_to_subject(lm, fact.template, fact.subject) for fact in facts]
    additions: dict[int, Tensor] = {}
    for group in lm.groups([len(ids) for ids in sequences]):
        batch = lm.align([sequences[i] for i in group], [len(sequences[i]) - 1 for i in group])
        replay = record(lm, batch, start=batch.pivot, until=layer + 1, top=layer + 1)
        additions.update(zip(group, _searched(replay, layer, change[group]), strict=True))
    return torch.stack([additions[i] for i in range(len(facts))])


def _searched(replay: Replay, layer: int, change: Tensor) -> Tensor:
    """Search the addition of `to_down` for the rows of one pass: (R, d_model)."""
    output = replay.hidden[layer + 1][:, 0].float()
    wanted = output + change.to(output.device, torch.float32)
    added = change.clone().to(wanted).requires_grad_()
    search = torch.optim.LBFGS([added], max_iter=_SEARCH_STEPS, line_search_fn="strong_wolfe")

    def distance() -> Tensor:
        reached = with_added(replay, layer, added, "ffn", until=layer + 1)[:, 0].float()
        error = (reached - wanted).square().sum()
        (added.grad,) = torch.autograd.grad(error, added)  # weights keep their own gradients
        return error

    with torch.enable_grad():
        search.step(distance)  # type: ignore[no-untyped-call]
    return added.detach()


def with_added(
    replay: Replay, layer: int, delta: Tensor, site: Site, until: int | None = None
) -> Tensor:
    """Run a recorded pass on with delta added at the subject token, which is the first live column.

    Args:
        replay: The pass, R rows with S live columns.
        layer: The layer where delta is added.
        delta: (R, d_model).
        site: The place in the layer.
        until: Run layers below this one only. None: all layers.

    Returns:
        (R, S, d_model) the output of the last layer that ran.
    """

    def add(states: Tensor) -> Tensor:
        rows = states.reshape(len(delta), -1, states.shape[-1])
        column = rows.shape[1] - replay.n_live  # above 0 in a model that replays without a cache
        at_subject = rows[:, column : column + 1] + delta[:, None].to(rows)
        changed = torch.cat([rows[:, :column], at_subject, rows[:, column + 1 :]], dim=1)
        return changed.view_as(states)

    ffn = replay.lm.ffn[layer]
    if site == "stream" or ffn.adds_directly:
        hidden = add(replay.hidden[layer + 1])
    else:  # a norm or a multiplier comes between the down-projection and the stream: run it
        with replacing({ffn.down: add}):
            hidden = replay.layer(layer, replay.hidden[layer])
    return hidden if until == layer + 1 else replay.resume(layer + 1, hidden, until=until)


@torch.no_grad()
def read_down(replay: Replay, layer: int) -> tuple[Tensor, Tensor]:
    """Return what a down-projection reads and writes at the first column that is computed.

    Returns:
        Its input (R, d_ff), without the coefficients of appended neurons, and its output
        (R, d_model), with what these write. Both are float32.
    """
    with recording({"down": replay.lm.ffn[layer].down}, stop=True) as calls:
        replay.layer(layer, replay.hidden[layer])
    (call,) = calls["down"]
    # Some families flatten rows and columns before the feed-forward network, to (B · T, d_ff).
    # A model that replays without a cache runs the columns before the first live one again.
    entering, leaving = (
        states.reshape(replay.batch.size, -1, states.shape[-1])[:, -replay.n_live].float()
        for states in (call.input, call.output)
    )
    return entering[:, : replay.lm.ffn[layer].n_original], leaving


def subject_columns(lm: LanguageModel, template: str, subject: str) -> tuple[list[int], int, int]:
    """Return the tokens of a template filled with the subject, and the subject's columns.

    The columns are those of the slot `{}`. They are not found by a search for the subject's name,
    because a context may happen to contain it too.

    Returns:
        The token ids, the column of the subject's first token, and that of its last.

    Raises:
        SubjectError: The subject has no token.
    """
    prompt = fill(template, subject)
    ids, offsets = encode_prompt(lm, prompt.text)
    first, stop = token_span(offsets, prompt)
    return ids, first, stop - 1


def in_context(lm: LanguageModel, context: str, fact: Fact) -> str:
    """Return a fact's prompt in a context: a template with one `{}` for the subject.

    A prompt near the model's limit of tokens leaves no room for some contexts. There the prompt
    stands alone.
    """
    template = context.replace("{}", fact.template)
    return template if context == "{}" or _has_room(lm, template, fact) else fact.template


def _has_room(lm: LanguageModel, template: str, fact: Fact) -> bool:
    """Return whether the model has positions for a prompt in a context, and the fact's target."""
    text, target = fill(template, fact.subject).text, fact.target or ""
    if lm.has_room(text, len(target.encode())):
        return True
    return lm.has_room(text, len(target_ids(lm, text, target)) if target else 1)


def _in_contexts(
    lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str]
) -> list[list[int]]:
    """Return each fact's tokens up to the subject in each context, all contexts of a fact first."""
    return [
        _up_to_subject(lm, in_context(lm, context, fact), fact.subject)
        for fact in facts
        for context in contexts
    ]


def _up_to_subject(lm: LanguageModel, template: str, subject: str) -> list[int]:
    """Return the prompt's tokens up to the last token of the subject."""
    ids, _, last = subject_columns(lm, template, subject)
    return ids[: last + 1]


def _at_last(
    lm: LanguageModel, rows: Sequence[list[int]], layer: int, read: Callable[[Replay], Tensor]
) -> Tensor:
    """Return what `read` gives for the last token of each row, from passes up to `layer`.

    Args:
        lm: The model.
        rows: Token sequences.
        layer: The last layer that runs.
        read: Called with a pass whose one live column holds the last tokens.

    Returns:
        (rows, width) float32.
    """
    executor = executor_in_use()
    if not executor.cuts or len(rows) <= _PART:
        return _read_rows(lm, layer, read, rows)
    parts = (rows[i : i + _PART] for i in range(0, len(rows), _PART))
    task = partial(_read_part, lm, layer, read)
    return torch.cat(list(executor.map(task, parts))).to(lm.device)


def _read_part(
    lm: LanguageModel, layer: int, read: Callable[[Replay], Tensor], rows: Sequence[list[int]]
) -> Tensor:
    """Return what `_at_last` returns for a part of the rows, on the CPU."""
    return _read_rows(lm, layer, read, rows).cpu()


@asking()
def _read_rows(
    lm: LanguageModel, layer: int, read: Callable[[Replay], Tensor], rows: Sequence[list[int]]
) -> Tensor:
    """Return what `_at_last` returns for some rows."""
    states: dict[int, Tensor] = {}
    for group in lm.groups([len(ids) for ids in rows]):
        batch = lm.align([rows[i] for i in group], [len(rows[i]) - 1 for i in group])
        replay = record(lm, batch, start=batch.pivot, until=layer + 1, top=layer + 1)
        states.update(zip(group, read(replay), strict=True))
    return torch.stack([states[i] for i in range(len(rows))])
