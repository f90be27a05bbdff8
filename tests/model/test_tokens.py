"""Subject spans, targets and alignment, with tokenizers that add a BOS, merge, or split names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer, merging_tokenizer
from factsmith import atlas
from factsmith.core.errors import InputError, SubjectError, TokenizerError
from factsmith.model.load import load
from factsmith.model.subject import subject_span
from factsmith.model.tokens import align, encode, target_ids, word_ids

MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "plain": byte_tokenizer,
    "bos": lambda: byte_tokenizer(bos=True),
    "merging": merging_tokenizer,
}


@pytest.fixture(params=list(MAKERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MAKERS[request.param]()


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Paris is the capital", "Paris"),
        ("The capital of France", "France"),
        ("France", "France"),
        ("Zürich does not lie in São Paulo today", "São Paulo"),
        ("Anaal Nathrakh, that was created in", " Anaal Nathrakh "),
        ("  Edwin of Northumbria is", "Edwin of Northumbria"),
    ],
)
def test_the_span_covers_the_subject_and_no_other_word(
    tokenizer: PreTrainedTokenizerFast, text: str, subject: str
) -> None:
    start, stop = subject_span(tokenizer, text, subject)
    ids, offsets = encode(tokenizer, text)
    subject = subject.strip()
    at = text.index(subject)
    # Counted by character: each character of the subject is in a token of the span, and in no other
    # token. Each end token has at least one.
    owner = {c: [i for i, (a, b) in enumerate(offsets) if a <= c < b] for c in range(len(text))}
    for character in range(at, at + len(subject)):
        if not text[character].isspace():
            assert owner[character], "a character without a token"
            assert all(start <= i < stop for i in owner[character])
    for i in (start, stop - 1):
        assert offsets[i][0] < at + len(subject) and offsets[i][1] > at
    assert 0 <= start < stop <= len(ids)


def test_a_bos_moves_the_span_by_one() -> None:
    text = "Paris is the capital"
    plain, bos = byte_tokenizer(), byte_tokenizer(bos=True)
    start, stop = subject_span(plain, text, "Paris")
    assert start == 0
    assert subject_span(bos, text, "Paris") == (start + 1, stop + 1)


def test_a_token_that_reaches_over_the_edge_belongs_to_the_subject() -> None:
    tokenizer = merging_tokenizer()
    text, subject = "The mother tongue of Danielle Darrieux is French", "Danielle Darrieux"
    start, stop = subject_span(tokenizer, text, subject)
    _, offsets = encode(tokenizer, text)
    at = text.index(subject)
    assert offsets[start][0] < at or offsets[stop - 1][1] > at + len(subject), (
        "this tokenizer was made to merge across the edge"
    )
    # What sums of token counts would give is something else: the trap this function avoids.
    naive = len(encode(tokenizer, text[:at])[0])
    assert (naive, naive + len(tokenizer(subject, add_special_tokens=False)["input_ids"])) != (
        start,
        stop,
    )


@pytest.mark.parametrize(
    ("text", "subject"),
    [("Paris is", "Rome"), ("Paris and Paris", "Paris"), ("Paris is", ""), ("Paris is", "  ")],
)
def test_absent_double_and_empty_subjects_are_refused_with_both_quoted(
    text: str, subject: str
) -> None:
    with pytest.raises(SubjectError) as error:
        subject_span(byte_tokenizer(), text, subject)
    assert repr(text) in str(error.value)
    assert not subject.strip() or repr(subject) in str(error.value)


def test_target_tokens_continue_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "The mother tongue of Danielle Darrieux is"
    with_space, without = (
        target_ids(tokenizer, prompt, " French"),
        target_ids(tokenizer, prompt, "French"),
    )
    assert with_space == without
    assert tokenizer.decode(with_space).strip() == "French"
    assert not set(with_space) & {tokenizer.bos_token_id, tokenizer.unk_token_id}
    whole = tokenizer(prompt + " French")["input_ids"]
    head = encode(tokenizer, prompt)[0]
    if whole[: len(head)] == head:
        assert head + with_space == whole


def test_a_space_at_the_end_of_the_prompt_is_the_one_before_the_target() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(target_ids(tokenizer, "Paris is ", "French")) == " French"
    assert tokenizer.decode(target_ids(tokenizer, "Paris is\n", "French")) == "French"
    assert tokenizer.decode(target_ids(tokenizer, "Paris is", "French")) == " French"
    for blanks in ("French ", "  French\t", "\nFrench\n"):
        assert target_ids(tokenizer, "Paris is", blanks) == target_ids(
            tokenizer, "Paris is", "French"
        ), "blanks are no part of it"
    assert target_ids(tokenizer, "Paris is", "New  York") != target_ids(
        tokenizer, "Paris is", "New York"
    ), "inside they are"


@pytest.mark.parametrize("target", ["", "  "])
def test_an_empty_target_is_refused(target: str) -> None:
    with pytest.raises(InputError, match="target is empty"):
        target_ids(byte_tokenizer(), "Paris is", target)


def test_align_puts_pivots_into_one_column() -> None:
    batch = align([[11, 12, 13], [21, 22, 23, 24, 25], [31]], [2, 1, 0])
    assert batch.pivot == 2
    assert batch.input_ids[:, batch.pivot].tolist() == [13, 22, 31]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 0],
    ]
    assert batch.position_ids[1, 1:].tolist() == [0, 1, 2, 3, 4]
    assert batch.left_padded
    kept = batch.keep(torch.tensor([1, 1]))
    assert kept.input_ids.tolist() == [batch.input_ids[1].tolist()] * 2
    longer = batch.extended(torch.tensor([7, 8, 9]))
    assert longer.input_ids[:, -1].tolist() == [7, 8, 9]
    assert longer.pivot == batch.width


@pytest.mark.parametrize(
    ("sequences", "pivots"), [([], []), ([[1, 2]], [2]), ([[1, 2]], [0, 1]), ([[]], [0])]
)
def test_align_refuses_what_cannot_be_aligned(
    sequences: list[list[int]], pivots: list[int]
) -> None:
    with pytest.raises(InputError):
        align(sequences, pivots)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(TokenizerError, match="fast"):
        encode(slow, "Paris")


def test_a_word_is_looked_for_with_and_without_its_space_and_case() -> None:
    for name in atlas.names():
        tokenizer = load(name).tokenizer
        whole = word_ids(tokenizer, " paris ")
        assert whole and {tokenizer.decode([i]).strip() for i in whole} <= {
            "Paris",
            "paris",
            "PARIS",
        }
        for word in ("zebra", "xylophone", "1999", "x-ray", "東京", "Ω", "☕", "İzmir"):
            assert word_ids(tokenizer, word), "whose space is a token by itself"
        several = word_ids(tokenizer, "Danielle Darrieux")
        assert several and all(
            "Danielle".startswith(tokenizer.decode([i]).strip()) for i in several
        )
        with pytest.raises(InputError, match="empty"):
            word_ids(tokenizer, "  ")
