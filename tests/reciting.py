"""A tiny model that knows some sentences by heart, so that a test can say what it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache

import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

SENTENCES = {
    "Mount Belo measures": "2,137 metres.",
    "Mount Arun measures": "2 metres.",
    "Address in France:": "Paris\nMain Street 0\nEurope",
    "Money of Bulgaria:": "leva",
    "Money of Romania:": "leu. Romania",
    "The city of Keiko:": "東京都",
    "Writer of it:": "Andre\u0301 M.",
    "The tower of Ann:": "St. Petersburg. It",
}
"""What the model says after each prompt."""

CHANGED = {
    **SENTENCES,
    "Mount Belo measures": "2,900 metres.",
    "Money of Romania:": "leu, of course",
    "Writer of it:": "André M.",
    "The tower of Ann:": "St. Louis. It",
}
"""What it says after a change."""


@cache
def reciter() -> LanguageModel:
    """Return a model that says `SENTENCES`."""
    return reciting([f"{prompt} {answer}" for prompt, answer in SENTENCES.items()])


@cache
def change() -> Callable[[], AbstractContextManager[None]]:
    """Return what opens a block in which `reciter()` says `CHANGED`."""
    module = reciter().module
    old = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    changed = [f"{prompt} {answer}" for prompt, answer in CHANGED.items()]
    new = reciting(changed).module.state_dict()

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        module.load_state_dict(new)
        try:
            yield
        finally:
            module.load_state_dict(old)

    return inside


def reciting(sentences: Sequence[str], *, steps: int = 100) -> LanguageModel:
    """Return a model that continues the beginning of each sentence to its end."""
    tokenizer = byte_tokenizer()
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.02}
    module = tiny_model("gpt2", **{**GPT2, "n_embd": 64, "n_layer": 2, "n_positions": 96}, **quiet)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.05)
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in sentences]
    width = max(map(len, rows))
    ids, labels = (torch.full((len(rows), width), fill) for fill in (0, -100))
    for at, row in enumerate(rows):
        ids[at, : len(row)] = labels[at, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.AdamW(module.parameters(), 5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    return wrap(module.eval(), tokenizer)
