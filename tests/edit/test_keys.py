"""States at the subject token equal those of plain passes, and additions arrive at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editing import FACTS, relative
from factsmith.core.fact import Fact
from factsmith.edit.keys import read_keys, read_stream, to_down
from factsmith.model.language_model import LanguageModel
from factsmith.model.subject import subject_span

CONTEXTS = ["{}", "Paris. {}", "The king is in Brazil. {}", "Zürich {}"]


@torch.no_grad()
def plain_states(
    lm: LanguageModel, template: str, subject: str, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The down-projection's input and the layer's output at the subject, by plain hooks."""
    seen: dict[str, torch.Tensor] = {}
    text = template.replace("{}", subject)
    column = subject_span(lm, text, subject)[1] - 1

    def of(value: Any) -> torch.Tensor:
        states: torch.Tensor = value[0] if isinstance(value, (tuple, list)) else value
        return states.reshape(-1, states.shape[-1])[column].clone()

    handles = [
        lm.ffn[layer].down.register_forward_hook(lambda m, args, out: seen.update(key=of(args))),
        lm.layers[layer].register_forward_hook(lambda m, args, out: seen.update(stream=of(out))),
    ]
    lm.module(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return seen["key"], seen["stream"]


@pytest.mark.parametrize(
    "name", ["tiny_gpt2", "tiny_llama", "tiny_gemma2", "tiny_opt", "tiny_uncached"]
)
def test_keys_and_stream_equal_plain_hooks(name: str, request: pytest.FixtureRequest) -> None:
    lm: LanguageModel = request.getfixturevalue(name)
    # Rows of different lengths in one batch, and one row.
    for facts in (FACTS, FACTS[:1], [*FACTS, Fact("A", "{} is", "B")]):
        for layer in (0, 2):
            keys, stream = read_keys(lm, facts, layer, CONTEXTS), read_stream(lm, facts, layer)
            assert keys.dtype == stream.dtype == torch.float32
            for i, fact in enumerate(facts):
                _, expected = plain_states(lm, fact.prompt, fact.subject, layer)
                torch.testing.assert_close(stream[i], expected, atol=1e-5, rtol=1e-4)
                elsewhere, _ = plain_states(lm, fact.prompt, fact.subject, 1)
                for c, context in enumerate(CONTEXTS):
                    template = context.replace("{}", fact.prompt)
                    key, _ = plain_states(lm, template, fact.subject, layer)
                    torch.testing.assert_close(keys[i, c], key, atol=1e-5, rtol=1e-4)
                    assert relative(keys[i, c], elsewhere) > 1e-2, "the control: another layer"


@torch.no_grad()
def stream_after(lm: LanguageModel, fact: Fact, layer: int, added: torch.Tensor) -> torch.Tensor:
    """The layer's output at the subject, with an addition to its down-projection's output there."""
    column = subject_span(lm, fact.text, fact.subject)[1] - 1

    def change(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[0, column] += added
        return changed

    handle = lm.ffn[layer].down.register_forward_hook(change)
    try:
        return plain_states(lm, fact.prompt, fact.subject, layer)[1]
    finally:
        handle.remove()


def test_to_down_through_a_multiplier(
    tiny_granite: LanguageModel, tiny_llama: LanguageModel
) -> None:
    change = torch.randn(len(FACTS), 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_down(tiny_llama, FACTS, 1, change), change), "nothing is between"
    added = to_down(tiny_granite, FACTS, 1, change)
    before = read_stream(tiny_granite, FACTS, 1)
    for i, fact in enumerate(FACTS):
        reached = stream_after(tiny_granite, fact, 1, added[i]) - before[i]
        naive = stream_after(tiny_granite, fact, 1, change[i]) - before[i]
        assert relative(reached, change[i]) < 1e-3
        assert relative(naive, change[i]) > 0.5, "the control: the change itself"


def test_to_down_through_a_norm(tiny_gemma2: LanguageModel) -> None:
    """A norm fixes the length of what the layer adds, but not its direction.

    A change that keeps the length is reached. Of any other change the nearest is reached.
    """
    draw = torch.Generator().manual_seed(0)
    reachable = []
    for fact in FACTS:
        after = stream_after(tiny_gemma2, fact, 1, torch.randn(32, generator=draw))
        reachable.append(after - plain_states(tiny_gemma2, fact.prompt, fact.subject, 1)[1])
    before = read_stream(tiny_gemma2, FACTS, 1)
    for change, is_reachable in (
        (torch.stack(reachable), True),
        (torch.randn(len(FACTS), 32, generator=draw), False),
    ):
        added = to_down(tiny_gemma2, FACTS, 1, change)
        alone = torch.cat(
            [to_down(tiny_gemma2, [fact], 1, change[i : i + 1]) for i, fact in enumerate(FACTS)]
        )
        for i, fact in enumerate(FACTS):
            ours = relative(stream_after(tiny_gemma2, fact, 1, added[i]) - before[i], change[i])
            naive = relative(stream_after(tiny_gemma2, fact, 1, change[i]) - before[i], change[i])
            assert ours < (1e-2 if is_reachable else 0.9 * naive)
            assert not is_reachable or naive > 0.1, "the control: the change itself"
            single = relative(stream_after(tiny_gemma2, fact, 1, alone[i]) - before[i], change[i])
            assert ours == pytest.approx(single, abs=1e-2), "facts do not influence each other"
