"""Contexts that the model writes, and the chat template as a context."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import pytest
import torch

from editing import FACTS, full_rank_moments, new_model
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.edit.configs import MemitConfig
from factsmith.edit.contexts import (
    chat_contexts,
    check_contexts,
    context_weights,
    generate_contexts,
    generate_openings,
)
from factsmith.edit.delta import applied
from factsmith.edit.methods import METHODS, edit, memit
from factsmith.model.language_model import LanguageModel


def test_weights_of_contexts() -> None:
    assert context_weights(["{}"]) == [1.0]
    assert context_weights(["a {}", "{}", "b {}"]) == [0.25, 0.5, 0.25]
    assert context_weights(["{}", "{}", "a {}"]) == [0.25, 0.25, 0.5]
    assert context_weights(["{}", "{}"]) == [0.5, 0.5]


def test_contexts_that_cannot_be_used_are_refused() -> None:
    assert check_contexts(("Paris. {}", "{}")) == ["Paris. {}", "{}"]
    for contexts, words in (
        (["Paris. {}"], "lacks the bare prompt"),
        (["{}", "Paris."], "exactly one {}"),
        (["{}", "{} {}"], "exactly one {}"),
        ("{}", "a list of templates"),
        (["{}", 3], "a context is 3"),
    ):
        with pytest.raises(InputError, match=words):
            check_contexts(contexts)  # type: ignore[arg-type]


def test_openings_begin_with_the_authors_words() -> None:
    lm = new_model("gpt2")
    contexts = generate_openings(lm, 3)
    assert contexts == generate_openings(lm, 3) != generate_openings(lm, 4)
    assert contexts[0] == "{}" and len(contexts) == 6
    assert [c.split()[0][:4] for c in contexts[1:4]] == ["The", "Ther", "Beca"] or all(
        c.endswith(". {}") for c in contexts[1:]
    )


def test_generated_contexts(tiny_lm: LanguageModel) -> None:
    state = torch.get_rng_state()
    contexts = generate_contexts(tiny_lm, 0)
    assert torch.equal(torch.get_rng_state(), state), "the global random state stays"
    assert contexts[0] == "{}" and len(contexts) == 21
    assert all(
        c.endswith(". {}") and c.count("{") == c.count("}") == 1 and "\n" not in c and "<|" not in c
        for c in contexts[1:]
    )
    assert len(set(contexts)) > 10
    # The same draws by a plain loop, which runs each whole text alone at every step.
    draw = torch.Generator().manual_seed(0)
    texts = [[tiny_lm.tokenizer.bos_token_id] for _ in range(20)]
    for _ in range(9):
        with torch.no_grad():
            logits = torch.stack(
                [tiny_lm.module(input_ids=torch.tensor([ids])).logits[0, -1] for ids in texts]
            )
        logits[:, tiny_lm.tokenizer.all_special_ids] = -torch.inf
        values, indices = logits.topk(5)
        picked = torch.multinomial(values.softmax(-1), 1, generator=draw)[:, 0]
        texts = [
            [*ids, int(row[column])]
            for ids, row, column in zip(texts, indices, picked, strict=True)
        ]
    decoded = [
        tiny_lm.tokenizer.decode(ids[1 : 5 if i < 10 else 10]) for i, ids in enumerate(texts)
    ]
    for context, text in zip(contexts[1:], decoded, strict=True):
        assert (
            context.removesuffix(". {}").split()
            == unicodedata.normalize("NFKC", re.sub("[{}]", " ", text)).split()
        )


def test_a_chat_template_is_one_more_context() -> None:
    lm = new_model("llama")
    assert chat_contexts(lm) == []
    messages = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    lm.tokenizer.chat_template = "{{ bos_token }}" + messages + "[assistant]\n"
    (context,) = chat_contexts(lm)
    assert context == "[user] {}\n[assistant]", "the tokenizer adds the BOS"
    assert generate_contexts(lm)[-1] == generate_openings(lm)[-1] == context
    assert len(generate_contexts(lm, chat=False)) == 21 and len(generate_contexts(lm)) == 22
    forms = chat_contexts(lm, forms=True)
    assert forms[0] == context and len(forms) == 3
    assert forms[1].startswith("[system] ") and forms[2].startswith("[user] Hello!\n[assistant] ")
    assert generate_openings(lm, chat="forms")[-3:] == forms
    config = MemitConfig((0,), steps=12, lr=0.2, scale="auto", moment_weight=1e-4)
    fact = FACTS[2]
    delta = memit(lm, fact, config, moments=full_rank_moments(lm, (0,)), contexts=["{}", context])
    asked = context.replace("{}", fact.text)
    before = float(lm.log_prob([asked], [str(fact.target)])[0])
    with applied(lm, delta):
        assert float(lm.log_prob([asked], [str(fact.target)])[0]) > before + 0.5


def long_fact(lm: LanguageModel, n_tokens: int) -> Fact:
    """Return a fact whose prompt has so many tokens."""
    start, prompt = "", " It is played by {}"
    while len(lm.prompt_ids(f"{start}{prompt}".replace("{}", "LeBron James"))) < n_tokens:
        start += "q"
    return Fact("LeBron James", start + prompt, "king")


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_contexts_that_do_not_fit_in_front_of_a_long_prompt_are_left_out(method: str) -> None:
    lm = new_model("gpt2")
    assert lm.max_tokens == 64
    moments, contexts = full_rank_moments(lm, (0,)), ["{}", "Yes. {}", "The king is in Paris. {}"]
    # Adam does not depend on how often a context occurs.
    config = replace(METHODS[method].config.recommended(lm).at([0]), optimizer="adam")
    n_target = len(lm.question("It is", "king")[2])
    fact = long_fact(lm, 64 - n_target)
    delta = edit(lm, fact, method, config, moments=moments, contexts=contexts)
    assert delta.convergence[0]["contexts_left_out"] == 2
    alone = edit(lm, fact, method, config, moments=moments, contexts=["{}"])
    torch.testing.assert_close(delta.v_star, alone.v_star)
    torch.testing.assert_close(delta.k_star[0], alone.k_star[0])
    # Controls: a short prompt keeps its contexts, and one that does not fit alone is refused.
    short = edit(lm, FACTS[2], method, config, moments=moments, contexts=contexts)
    assert "contexts_left_out" not in short.convergence[0]
    with pytest.raises(InputError, match="has positions for 64"):
        edit(lm, long_fact(lm, 66), method, config, moments=moments, contexts=contexts)


def test_a_prompt_at_the_limit_is_answered_with_the_tokens_that_fit() -> None:
    lm = new_model("gpt2")
    full, near = long_fact(lm, 64).text, long_fact(lm, 60).text
    assert len(lm.prompt_ids(full)) == 64
    both = lm.answer([full, near, "Paris is"], max_new_tokens=12)
    assert both == [lm.answer([text], max_new_tokens=12)[0] for text in (full, near, "Paris is")]
    with pytest.raises(InputError, match="has positions for 64"):
        lm.answer([long_fact(lm, 65).text])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "no place for it",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content }} {}",
    ],
)
def test_a_chat_template_that_gives_no_context_is_left_out(template: str) -> None:
    lm = new_model("llama")
    lm.tokenizer.chat_template = template
    assert chat_contexts(lm) == [] and len(generate_openings(lm)) == 6


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{% if %}", {"rag": "one of several"}]
)
def test_a_chat_template_that_cannot_be_filled_is_refused(template: object) -> None:
    lm = new_model("llama")
    lm.tokenizer.chat_template = template
    moments, config = full_rank_moments(lm, (0,)), MemitConfig((0,), steps=2, scale="auto")
    with pytest.raises(InputError, match=r"chat template .* cannot be filled .*give contexts"):
        memit(lm, FACTS[0], config, moments=moments)
    # The published settings have no contexts in a chat.
    assert memit(lm, FACTS[0], MemitConfig((0,), steps=2), moments=moments).layers
    delta = memit(lm, FACTS[0], config, moments=moments, contexts=["{}"])
    assert delta.facts == (FACTS[0],)
