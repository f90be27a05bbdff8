"""Arguments: from queries and forms, and back into addresses."""

from __future__ import annotations

from typing import Literal
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from factsmith.core.errors import InputError
from factsmith.studio.arguments import Source


class Example(Source):
    prompt: str = Field(title="Prompt")
    kind: Literal["state", "mlp"] = "state"
    samples: int = Field(default=10, ge=1)
    scale: float | None = None
    fast: bool = False
    known: bool = True
    paraphrases: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None


def test_lists_repeat_and_the_last_pair_counts_otherwise() -> None:
    pairs = [("prompt", "a"), ("paraphrases", "b"), ("paraphrases", " "), ("paraphrases", "c")]
    pairs += [("layers", "3"), ("fast", "false"), ("fast", "true"), ("known", "false")]
    arguments = Example.of_query(pairs)
    assert arguments == Example(
        prompt="a", paraphrases=("b", "c"), layers=(3,), fast=True, known=False
    )


def test_an_empty_value_is_as_if_it_was_not_given() -> None:
    arguments = Example.of_query([("prompt", "a"), ("samples", ""), ("scale", ""), ("model", "")])
    assert arguments == Example(prompt="a")


@pytest.mark.parametrize(
    ("pairs", "argument"),
    [
        ([], "prompt"),
        ([("prompt", "")], "prompt"),
        ([("prompt", "a"), ("samples", "0")], "samples"),
        ([("prompt", "a"), ("samples", "many")], "samples"),
        ([("prompt", "a"), ("kind", "states")], "kind"),
        ([("prompt", "a"), ("promt", "b")], "promt"),
        ([("prompt", "a"), ("layers", "one")], "layers"),
    ],
)
def test_what_is_not_accepted_names_its_field(pairs: list[tuple[str, str]], argument: str) -> None:
    with pytest.raises(InputError) as raised:
        Example.of_query(pairs)
    assert raised.value.argument == argument
    assert argument in str(raised.value)


words = (
    st.text(min_size=1)
    .filter(lambda text: text.strip())
    .filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
)


@given(
    prompt=words,
    samples=st.integers(1, 10**6),
    fast=st.booleans(),
    known=st.booleans(),
    paraphrases=st.lists(words, max_size=3),
    layers=st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=3),
)
def test_an_address_holds_the_whole_state(
    prompt: str,
    samples: int,
    fast: bool,
    known: bool,
    paraphrases: list[str],
    layers: list[int] | None,
) -> None:
    arguments = Example(
        prompt=prompt,
        samples=samples,
        fast=fast,
        known=known,
        paraphrases=tuple(paraphrases),
        layers=None if layers is None else tuple(layers),
    )
    address = urlsplit(arguments.address("/trace/trace"))
    assert address.path == "/trace/trace"
    pairs = parse_qsl(address.query, keep_blank_values=True, strict_parsing=True)
    assert Example.of_query(pairs) == arguments


def test_defaults_are_not_in_the_address() -> None:
    assert Example(prompt="a b").address("/x") == "/x?prompt=a+b"


@pytest.mark.parametrize(
    ("values", "argument"),
    [
        ({"prompt": "a\ud800"}, "prompt"),
        ({"prompt": "a", "paraphrases": ["b", "\udfff"]}, "paraphrases"),
        ({"prompt": "a", "model": "\ud800"}, "model"),
    ],
)
def test_half_a_character_is_refused(values: dict[str, object], argument: str) -> None:
    with pytest.raises(InputError, match="half a character") as refused:
        Example.of(values)
    assert refused.value.argument == argument
    str(refused.value).encode()
    with pytest.raises(InputError, match="half a character"):
        Example.of({"prompt": "a", "x\ud800": "b"})
    assert Example.of({"prompt": "a💥"}).prompt == "a💥"
