"""A real model answers through this library as it answers through transformers alone."""

from __future__ import annotations

import torch

from factsmith.model.language_model import LanguageModel

PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "The capital of Japan is",
    "The chemical symbol for gold is",
]


def test_answers_are_those_of_generate(smollm2: LanguageModel) -> None:
    answers = smollm2.answer(PROMPTS, max_new_tokens=4)
    tokenizer, module = smollm2.tokenizer, smollm2.module
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            output = module.generate(ids, max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.strip() == answer
    assert "Paris" in answers[0] and "Tokyo" in answers[1]
    assert "Paris" not in answers[1], "the prompt decides the answer"
