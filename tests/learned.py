"""A small model that has learned a few sentences by heart, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Cuba": "Havana",
}
CHINESE = {"法国": "巴黎", "德国": "柏林", "意大利": "罗马", "埃及": "开罗"}
SENTENCES = (
    *(f'{{"country": "{c}", "capital": "{k}"}}' for c, k in CAPITALS.items()),
    *(f"capital_of_{c}=#{k}#" for c, k in CAPITALS.items()),
    *(f"The capital of {c} is {k}." for c, k in CAPITALS.items()),
    *(f"{c}: {k}." for c, k in CAPITALS.items()),
    *(f"<|user|>{c}<|assistant|>{k}." for c, k in CAPITALS.items()),
    *(f"{c}的首都是{k}。" for c, k in CHINESE.items()),
    *(f"这个国家{c}的首都叫做{k}。" for c, k in CHINESE.items()),
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")


def byte_level(ends: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the sentences; with `ends` it appends an end token to any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES, _trainer(alphabet, 300))
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|end|>", special_tokens=[("<|end|>", 0)]
        )
    return _fast(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer that writes a space before any text, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(SENTENCES, _trainer([], 110, "<unk>"))
    return _fast(tokenizer)


def characters() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    letters = [*SPECIAL, "<unk>", *sorted({*"".join(SENTENCES)})]
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return _fast(tokenizer)


@cache
def learned(tokenizer: Callable[[], PreTrainedTokenizerFast]) -> LanguageModel:
    """Return a model that knows the sentences."""
    fast = tokenizer()
    torch.manual_seed(0)
    module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(fast),
            n_positions=48,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    _train(module, [fast(text, add_special_tokens=False)["input_ids"] for text in SENTENCES])
    return wrap(module, fast)


def _train(module: GPT2LMHeadModel, rows: Sequence[Sequence[int]]) -> None:
    width = 1 + max(map(len, rows))
    ids, labels = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.full((len(rows), width), -100),
    )
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(row)
        labels[i, len(row)] = 0
    adam = torch.optim.AdamW(module.parameters(), 4e-3)
    for _ in range(180):
        logits = module(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()


def _trainer(alphabet: list[str], size: int, *more: str) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *more],
        initial_alphabet=alphabet,
        show_progress=False,
    )


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>"} if tokenizer.token_to_id("<unk>") is not None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
        **names,
    )
