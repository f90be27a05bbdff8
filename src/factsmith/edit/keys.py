"""edit.keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core.checks import check_items, check_text
from ..core.errors import InputError
from ..core.fact import Fact
from ..model.language_model import LanguageModel
from ..model.replay import Replay, record
from ..model.tokens import encode
from ..model.trace import recording, replacing

Site = Literal["ffn", "stream"]
"""Where δ is added: to the output of the down-projection, or to that of the layer."""

_PRE_NORM_STEPS = 60
"""Steps of the search behind a norm: it is one small convex-looking problem a fact, and stops by itself when it is solved."""

GUARD = "{} is a"
"""The prompt whose next-token distribution at the subject token must stay: what the subject is (ROME, equation 4, second term)."""


@torch.no_grad()
def read_keys(
    lm: LanguageModel, facts: Sequence[Fact], layer: int, contexts: Sequence[str]
) -> Tensor:
    """The down-projection's input at each fact's subject token in each context: (n, n_contexts, d_ff) float32.

    A key does not see what follows the subject, so the rest of the prompt is not run, nor are the layers above; beginnings that prompts
    have in common are run once.
    """
    rows = [
        _at_subject(lm, context.replace("{}", fact.prompt), fact.subject)
        for fact in facts
        for context in contexts
    ]
    keys = _at_last(lm, rows, layer, lambda replay: down(replay, layer)[0])
    return keys.view(len(facts), len(contexts), -1)


@torch.no_grad()
def read_stream(lm: LanguageModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """The layer's output at each fact's subject token, on the bare prompt: (n, d_model) float32."""
    rows = [_at_subject(lm, fact.prompt, fact.subject) for fact in facts]
    return _at_last(lm, rows, layer, lambda replay: replay.hidden[layer + 1][:, 0].float())


def to_down(lm: LanguageModel, facts: Sequence[Fact], layer: int, change: Tensor) -> Tensor:
    """What to add to a down-projection's output at the subject token so that the layer's output changes by `change` (n, d_model).

    The same, in most families. Where a norm or a multiplier stands between (Gemma 2, Granite), it is searched by least squares through the
    rest of the layer; a norm fixes the length of what the FFN adds to the stream, so there the result is the nearest that can be had.
    """
    if lm.ffn[layer].adds_directly:
        return change
    sequences = [_at_subject(lm, fact.prompt, fact.subject) for fact in facts]
    found: dict[int, Tensor] = {}
    for group in lm.groups([len(ids) for ids in sequences]):
        batch = lm.align([sequences[i] for i in group], [len(sequences[i]) - 1 for i in group])
        replay = record(lm, batch, start=batch.pivot, until=layer + 1, top=layer + 1)
        wanted = replay.hidden[layer + 1][:, 0].float() + change[group].to(
            replay.hidden[layer + 1].device, torch.float32
        )
        added = change[group].clone().to(wanted).requires_grad_()
        search = torch.optim.LBFGS([added], max_iter=_PRE_NORM_STEPS, line_search_fn="strong_wolfe")

        def distance(
            replay: Replay = replay,
            added: Tensor = added,
            wanted: Tensor = wanted,
            search: torch.optim.Optimizer = search,
        ) -> Tensor:
            search.zero_grad()
            error = (
                (above(replay, layer, added, "ffn", until=layer + 1)[:, 0].float() - wanted)
                .square()
                .sum()
            )
            error.backward()  # type: ignore[no-untyped-call]
            return error

        with torch.enable_grad():
            search.step(distance)  # type: ignore[no-untyped-call]
        for i, row in zip(group, added.detach(), strict=True):
            found[i] = row
    return torch.stack([found[i] for i in range(len(facts))])


def _at_subject(lm: LanguageModel, template: str, subject: str) -> list[int]:
    """The prompt's tokens up to the subject's last."""
    ids, _, pivot = pivot_column(lm, template, subject)
    return ids[: pivot + 1]


def _at_last(
    lm: LanguageModel, rows: Sequence[list[int]], layer: int, read: Callable[[Replay], Tensor]
) -> Tensor:
    """What `read` finds in a pass up to `layer` whose one live column is the last token of each row: (rows, width) float32."""
    found: dict[int, Tensor] = {}
    for group in lm.groups([len(ids) for ids in rows]):
        batch = lm.align([rows[i] for i in group], [len(rows[i]) - 1 for i in group])
        states = read(record(lm, batch, start=batch.pivot, until=layer + 1, top=layer + 1))
        found.update(zip(group, states, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


@torch.no_grad()
def down(replay: Replay, layer: int) -> tuple[Tensor, Tensor]:
    """Input (R, d_ff) and output (R, d_model) of a down-projection at the first live column, float32."""
    with recording({"down": replay.lm.ffn[layer].down}, stop=True) as calls:
        replay.layer(layer, replay.hidden[layer])
    (call,) = calls["down"]
    # Some families flatten rows and columns before their FFN, (B · T, d_ff); a model without a cache runs all columns again.
    put_in, put_out = (
        x.reshape(replay.batch.size, -1, x.shape[-1])[:, -replay.n_live].float()
        for x in (call.input, call.output)
    )
    return put_in, put_out


def check_contexts(contexts: Sequence[str]) -> list[str]:
    """The templates as a list; raises InputError unless each is a text with one `{}`, and the bare "{}" is among them."""
    found = check_items(
        contexts, "contexts", 'templates with {} for the prompt, "{}" itself included'
    )
    for context in found:
        if check_text(context, "a context").count("{}") != 1:
            raise InputError(
                f"a context is a template with exactly one {{}}, where the prompt goes; got {context!r}"
            )
    if "{}" not in found:
        raise InputError('the contexts must include the bare prompt, "{}"; add it')
    return found


def pivot_column(lm: LanguageModel, template: str, subject: str) -> tuple[list[int], int, int]:
    """Token ids of the filled-in template, and the columns of the subject's first and last token.

    By the place of the slot, not by a search: a context may happen to name the subject too.
    """
    text = template.replace("{}", subject)
    start = template.index("{}") + len(subject) - len(subject.lstrip())
    stop = start + len(subject.strip())
    ids, offsets = encode(lm.tokenizer, text)
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and text[a:b].strip()]
    return ids, inside[0], inside[-1]


def above(
    replay: Replay, layer: int, delta: Tensor, site: Site, until: int | None = None
) -> Tensor:
    """The output (R, S, d_model) of layer `until` - 1 (None: the last) when delta (R, d_model) is added at the subject token (column 0)."""

    def add(states: Tensor) -> Tensor:
        rows = states.reshape(len(delta), -1, states.shape[-1])
        column = (
            rows.shape[1] - replay.n_live
        )  # a model without a usable cache runs all columns again
        at_subject = rows[:, column : column + 1] + delta[:, None].to(rows)
        return torch.cat([rows[:, :column], at_subject, rows[:, column + 1 :]], dim=1).view_as(
            states
        )

    ffn = replay.lm.ffn[layer]
    if site == "stream" or ffn.adds_directly:
        hidden = add(replay.hidden[layer + 1])
    else:  # something (a norm, a multiplier) stands between the FFN and the stream: run it
        with replacing({ffn.down: add}):
            hidden = replay.layer(layer, replay.hidden[layer])
    return hidden if until == layer + 1 else replay.resume(layer + 1, hidden, until=until)
