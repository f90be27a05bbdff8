"""A corpus cut into pieces, compared with the tokenizer on whole texts."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import pre_tokenizers, processors

from conftest import TEXTS, byte_tokenizer, masking_tokenizer, merging_tokenizer
from factsmith.core.errors import InputError
from factsmith.corpus import text as module
from factsmith.corpus.text import ADDED, pieces
from factsmith.model.tokens import encode


def trimming_tokenizer() -> Any:
    """As the bundled models' does it leaves white space out of the characters of a token."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


TOKENIZERS = {
    "byte": byte_tokenizer(),
    "bos": byte_tokenizer(bos=True),
    "trimming": trimming_tokenizer(),
    "merging": merging_tokenizer(),
    "masking": masking_tokenizer(),
}


def model(tokenizer: Any, max_tokens: int | None = None) -> Any:
    return SimpleNamespace(tokenizer=tokenizer, max_tokens=max_tokens)


def long_text(n: int) -> str:
    chosen = random.Random(0)
    words = [
        *" ".join(TEXTS).split(),
        "  two",
        "\n\n",
        "\ttab",
        "東京は日本の首都です",
        "São",
        "x" * 40,
    ]
    return " ".join(chosen.choice(words) for _ in range(n))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("context", [64, None])
def test_a_long_text_has_the_tokens_of_the_whole(
    name: str, context: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = TOKENIZERS[name], long_text(900)
    ids, spans = encode(tokenizer, text)
    seen: list[int] = []
    monkeypatch.setattr(
        module,
        "encode",
        lambda tokenizer, part: (seen.append(len(part)), encode(tokenizer, part))[1],
    )
    monkeypatch.setattr(module, "_PART", 700)
    monkeypatch.setattr(module, "_MARGIN", 80)
    cut = list(pieces(model(tokenizer, context), text))
    assert max(seen) <= 700 + 2 * 80 < len(text) // 5
    assert [i for piece in cut for i in piece.ids] == ids
    assert {len(piece.ids) for piece in cut[:-1]} <= {context or module.LONGEST}
    at = 0
    for piece in cut:
        first = None
        for (a, b), (x, y) in zip(piece.spans, spans[at : at + len(piece.ids)], strict=True):
            if y > x:  # the tokenizer gives its place, and the piece has the same
                first = x - a if first is None else first
                assert (a + first, b + first) == (x, y) and piece.text[a:b] == text[x:y]
        at += len(piece.ids)


def test_a_long_text_without_white_space() -> None:
    text = "東京は日本の首都です" * 11_000
    cut = list(pieces(model(TOKENIZERS["byte"]), text))
    assert [i for piece in cut for i in piece.ids] == encode(TOKENIZERS["byte"], text)[0]
    assert sum(len(piece.text) for piece in cut) >= len(text)


def test_white_space_that_is_trimmed_lies_between_its_neighbours() -> None:
    (piece,) = pieces(model(TOKENIZERS["trimming"]), "Paris   is\n\n  here  ")
    texts = [piece.text[a:b] for a, b in piece.spans]
    assert (
        "".join(texts).split() == ["Paris", "is", "here"]
        and sum(one.isspace() for one in texts) >= 5
    )
    assert ADDED not in piece.spans and all(a <= b for a, b in piece.spans)
    assert [a for a, _ in piece.spans] == sorted(a for a, _ in piece.spans)


@pytest.mark.parametrize(
    ("name", "front"), [("byte", 0), ("bos", 1), ("trimming", 0), ("merging", 1), ("masking", 1)]
)
def test_added_tokens_are_told_from_white_space(name: str, front: int) -> None:
    for text in ("Paris is here", "   ", " \n", long_text(30)):
        (piece,) = pieces(model(TOKENIZERS[name]), text)
        added = [i for i, span in enumerate(piece.spans) if span == ADDED]
        alone = name == "masking" and not text.strip()  # [CLS] and [SEP], and nothing else
        assert added == list(range(front + alone)), (text, piece)


def test_what_is_no_text() -> None:
    lm = model(TOKENIZERS["byte"])
    for wrong in (None, 5, b"Paris", {"a": 1}, ["Paris", 5], ["Paris", "\ud800"]):
        with pytest.raises(InputError, match=r"texts? (are|of the corpus)"):
            list(pieces(lm, wrong))  # type: ignore[arg-type]
