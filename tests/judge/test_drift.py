"""Drift against full distributions computed in plain passes, and limits in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import FingerprintError, InputError
from factsmith.core.fact import Fact
from factsmith.judge.drift import check_limits, drift, drift_of_change
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.trace import hook_count
from reciting import SENTENCES, change, reciter

TEXTS = [
    "The harbour was quiet in the morning.",
    "Nobody had seen the old captain since then, or so they said.",
    "x",
]
FACTS = [("The home of Ann is", "?"), ("The home of Bob is", "?"), ("Where Zoe lives is", "?")]


def other(lm: LanguageModel, strength: float = 0.5) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def changed() -> Iterator[None]:
        weight = lm.ffn[1].down.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight += strength * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(1)
            )
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)

    return changed


def distributions(lm: LanguageModel, text: str) -> torch.Tensor:
    with torch.no_grad():
        return (
            lm.module(input_ids=torch.tensor([lm.prompt_ids(text)]))
            .logits[0]
            .double()
            .log_softmax(-1)
        )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_what_full_distributions_say(family: str) -> None:
    lm = wrap(
        tiny_model(family, **(GPT2 if family == "gpt2" else LLAMA)),
        byte_tokenizer(bos=family == "llama"),
    )
    facts = [(prompt, lm.answer([prompt])[0].split(" ")[0]) for prompt, _ in FACTS]
    facts = [(prompt, said) for prompt, said in facts if said and lm.says([prompt], [said])[0]] or [
        (FACTS[0][0], "no")
    ]
    changed = other(lm)
    measured = drift(lm, changed, texts=TEXTS, facts=facts)
    divergence, before, after = [], [], []
    for text in TEXTS:
        old, ids = distributions(lm, text), lm.prompt_ids(text)
        with changed():
            new = distributions(lm, text)
        divergence += (old.exp() * (old - new)).sum(-1)[:-1].tolist()
        before += [-float(old[at, token]) for at, token in enumerate(ids[1:])]
        after += [-float(new[at, token]) for at, token in enumerate(ids[1:])]
    assert measured.n_tokens == len(divergence)
    assert measured.kl_text == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert measured.kl_text_worst == pytest.approx(
        float(torch.tensor(divergence).quantile(0.99)), rel=1e-3
    )
    for logs, perplexity in ((before, measured.perplexity[0]), (after, measured.perplexity[1])):
        assert perplexity == pytest.approx(float(torch.tensor(logs).mean().exp()), rel=1e-4)
    if measured.n_facts:
        with changed():
            answers = lm.answer([prompt for prompt, _ in facts])
        assert len(measured.changed) == sum(
            not now.startswith(said) for (_, said), now in zip(facts, answers, strict=True)
        )
        old_last = [distributions(lm, prompt)[-1] for prompt, _ in facts]
        with changed():
            new_last = [distributions(lm, prompt)[-1] for prompt, _ in facts]
        each = [float((o.exp() * (o - n)).sum()) for o, n in zip(old_last, new_last, strict=True)]
        assert measured.kl_facts == pytest.approx(sum(each) / len(each), rel=1e-3)
    assert hook_count([lm.module]) == 0 and "KL on text" in repr(measured)


def test_long_answers_are_compared_whole_and_never_inside_a_character() -> None:
    lm = reciter()
    asked = ["The city of Keiko:", "Address in France:", "Mount Belo measures", "Money of Romania:"]
    facts = [(prompt, SENTENCES[prompt]) for prompt in asked]
    unchanged = drift(lm, nullcontext, texts=TEXTS, facts=facts)
    assert unchanged.n_facts == len(facts) and unchanged.changed == ()
    facts[3] = ("Money of Romania:", "leu")
    (lost,) = drift(lm, change(), texts=TEXTS, facts=facts).changed
    assert (lost.before, lost.after) == (SENTENCES["Mount Belo measures"], "2,900 metres")


def test_nothing_changed_is_nothing_found(tiny_gpt2: LanguageModel) -> None:
    measured = drift(tiny_gpt2, nullcontext, max_tokens=100, n_facts=5)
    assert measured.kl_text == pytest.approx(0, abs=1e-6) and measured.perplexity[
        0
    ] == pytest.approx(measured.perplexity[1])
    assert measured.changed == () and measured.exceeded(kl_text=1e-3, perplexity=1.001) == ()
    unmeasured = measured.exceeded(kl_facts=1e-3, changed_share=0)
    assert measured.n_facts or [text.partition(" was not measured")[0] for text in unmeasured] == [
        "kl_facts",
        "changed_share",
    ]


def test_limits_that_are_broken_are_named(tiny_gpt2: LanguageModel) -> None:
    measured = drift(tiny_gpt2, other(tiny_gpt2, 2.0), texts=TEXTS, facts=[])
    assert measured.kl_facts is None and measured.changed_share == 0
    broken = measured.exceeded(
        kl_text=measured.kl_text / 2, kl_text_worst=1e9, kl_facts=0.0, perplexity=1e9
    )
    assert (
        len(broken) == 2
        and broken[0].startswith("kl_text is ")
        and broken[1].startswith("kl_facts was not measured")
    )
    with pytest.raises(InputError, match="no limit 'kl'"):
        measured.exceeded(kl=1)


def test_facts_about_what_was_edited_are_left_out(tiny_gpt2: LanguageModel) -> None:
    said = tiny_gpt2.answer(["The home of Ann is"])[0]
    facts = (
        [("The home of Ann is", said)]
        if said and tiny_gpt2.says(["The home of Ann is"], [said])[0]
        else []
    )
    known = drift(tiny_gpt2, nullcontext, texts=TEXTS, facts=facts)
    assert known.n_facts == len(facts)
    assert drift(tiny_gpt2, nullcontext, texts=TEXTS, facts=facts, without=["Ann"]).n_facts == 0


def test_bad_input_is_refused_in_words(tiny_gpt2: LanguageModel) -> None:
    for arguments, words in (
        ({"texts": []}, "no text"),
        ({"texts": [" ", "a"][:1]}, "no text"),
        ({"texts": TEXTS, "facts": ["a"]}, "pairs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"texts": "a string"}, "texts"),
    ):
        with pytest.raises(InputError, match=words):
            drift(tiny_gpt2, nullcontext, **arguments)  # type: ignore[arg-type]


def test_limits_are_checked_by_name_and_number() -> None:
    assert check_limits({"kl_text": 1, "perplexity": 2.5}) == {"kl_text": 1, "perplexity": 2.5}
    for limits, words in (({"kl": 1.0}, "give one of kl_text"), ({"kl_text": math.nan}, "finite")):
        with pytest.raises(InputError, match=words):
            check_limits(limits)


def test_the_drift_of_a_change_leaves_out_its_subjects(tiny_gpt2: LanguageModel) -> None:
    changed = other(tiny_gpt2)

    class Made:
        facts = (Fact("Ann", "The home of {} is", "Oslo"),)
        digest = "d"
        fingerprint = tiny_gpt2.fingerprint

        def inside(self, lm: LanguageModel) -> AbstractContextManager[None]:
            return changed()

    said = tiny_gpt2.answer(["The home of Ann is"])[0]
    facts = [("The home of Ann is", said)] if said else []
    measured = drift_of_change(tiny_gpt2, Made(), texts=TEXTS, facts=facts)
    plain = drift(tiny_gpt2, changed, texts=TEXTS, facts=[])
    assert measured.n_facts == 0 and measured.kl_text == plain.kl_text > 0
    elsewhere = Made()
    elsewhere.fingerprint = "f" * 64
    with pytest.raises(FingerprintError, match="f" * 12):
        drift_of_change(tiny_gpt2, elsewhere, texts=TEXTS)
