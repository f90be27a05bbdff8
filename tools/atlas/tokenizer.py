"""BPE tokenizers of the bundled models, trained on their own sentences and on prose.

make_tokenizer(RECIPES["atlas"], read_prose(Path("books")))
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from factsmith.atlas import facts, phrasings

from .recipe import Recipe

_SENTENCES = 12_000
"""Sentences of prose, at least, if there are as many."""


def make_tokenizer(recipe: Recipe, prose: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer on one sentence of every fact and on a part of the prose.

    It always adds a leading space, so a name has one spelling.
    """
    texts = _texts(recipe.seed, prose)
    build = _byte_level if recipe.family == "gpt2" else _sentencepiece_like
    tokenizer, names = build(texts, recipe.vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=recipe.positions,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def _texts(seed: int, prose: Sequence[str]) -> list[str]:
    """Return a sentence of every fact, in a trained phrasing, and every n-th sentence of prose."""
    draw = np.random.default_rng(seed)
    texts = []
    for fact in facts():
        templates = phrasings(fact.relation).trained
        prompt = templates[draw.integers(len(templates))].replace("{}", fact.subject)
        texts.append(f"{prompt} {fact.object}.")
    return texts + list(prose[:: max(1, len(prose) // _SENTENCES)])


def _byte_level(texts: Sequence[str], size: int) -> tuple[Tokenizer, dict[str, str]]:
    """Return a tokenizer as GPT-2 has it, and the names of its special tokens."""
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, _trainer(size, [end], alphabet))
    return tokenizer, {"bos_token": end, "eos_token": end, "pad_token": end}


def _sentencepiece_like(texts: Sequence[str], size: int) -> tuple[Tokenizer, dict[str, str]]:
    """Return a tokenizer as Llama has it, and the names of its special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\n"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    byte_tokens = [
        AddedToken(f"<0x{value:02X}>", special=False, normalized=False) for value in range(256)
    ]
    special: list[str | AddedToken] = ["<unk>", "<s>", "</s>", *byte_tokens]
    tokenizer.train_from_iterator(texts, _trainer(size, special, []))
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return tokenizer, names


def _trainer(
    size: int, special: Sequence[str | AddedToken], alphabet: Sequence[str]
) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=list(alphabet),
        limit_alphabet=400,
        show_progress=False,
    )
