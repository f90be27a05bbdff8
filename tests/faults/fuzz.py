"""Damage files at random. The only accepted answer is a short error of factsmith."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factsmith.core.errors import FactsmithError

FUZZ = {"JSON": 4000, "YAML": 2200, "deltas": 4000, "ledgers": 200}
TIMES = int(os.environ.get("FACTSMITH_FUZZ", "1"))
SEED = 20240 if TIMES == 1 else TIMES


def _deep(n: int) -> Any:
    value: Any = 0
    for i in range(n):
        value = [value] if i % 2 else {"a": value}
    return value


STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64 - 1, 10**400, -(10**400), 0.5, 1e308,
    float("nan"), float("inf"), -0.0, "", " ", "{}", "{}{}", "..", "../..", "/etc/passwd", "C:\\",
    "~", "a\0b", "\ud800", "\u202e", "\ufeff", "x" * 30_000, "-1", "1", "NaN", "yes",
    "!!python/object/apply:os.system", [], [[]], {}, [{}], {"": {}}, {"self": 1},
    {"__class__": "x"}, [None], ["a"] * 2000, list(range(3000)), _deep(20), _deep(300),
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """Return a JSON value in which one part is replaced, removed, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {name: part for name, part in value.items() if name != key}
        what = rng.random()
        if what < 0.1:
            return rest
        if what < 0.2:
            return {
                **rest,
                rng.choice(
                    [key + "x", key[:-1], "self", "../" + key, "\ud800", "x" * 500, "1"]
                ): value[key],
            }
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        what = rng.random()
        if what < 0.15:
            return value[:at] + value[at + 1 :]
        return (
            value + value[at : at + 1]
            if what < 0.25
            else [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
        )
    return rng.choice(STRANGE)


def corrupted(content: bytes, rng: random.Random, pieces: list[bytes]) -> bytes:
    """Return bytes with parts removed and inserted, random or meaningful in the format."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        cut = rng.choice([0, 0, 1, 1, 3, 40, len(content)])
        new = rng.choice(
            [
                b"",
                rng.randbytes(1),
                rng.randbytes(4),
                rng.choice(pieces),
                rng.choice(pieces),
                content[: rng.randrange(60)],
            ]
        )
        content = content[:at] + new + content[at + cut :]
    return content


def write_new(path: Path, content: bytes) -> None:
    """Write a new file. Some file systems flush an overwritten file, which is slow."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def is_refused(use: Callable[[], Any], seed: object) -> bool:
    """Return whether a call raises a factsmith error with a short message.

    Any other exception fails the test and names the case.
    """
    try:
        use()
    except FactsmithError as error:
        assert 0 < len(str(error)) < 1500, f"case {seed}: a message of {len(str(error))} characters"
        str(error).encode()  # the message can be printed
        return True
    except BaseException as error:
        raise AssertionError(f"case {seed}: {type(error).__name__}: {str(error)[:300]}") from error
    return False


JSON_PIECES = [
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"subject":"x",', b"[" * 2000, b'{"a":' * 2000,
    b"\\ud800", b"\xff", b"\0", b"null",
]  # fmt: skip
