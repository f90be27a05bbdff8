"""Damaged and hostile delta files are refused with a short message, in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.fact import Fact, Probe
from faults.fuzz import FUZZ, JSON_PIECES, SEED, TIMES, corrupted, is_refused, mutated, write_new
from faults.spaces import linux_only

pytestmark = linux_only


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return a delta's record, the header of its tensors, and their bytes."""
    import torch

    from factsmith.edit.delta import Delta

    folder = tmp_path_factory.mktemp("delta")
    Delta(
        layers={layer: (torch.ones(4, 2), torch.ones(2, 6)) for layer in (0, 2)},
        k_star={layer: torch.ones(2, 6) for layer in (0, 2)},
        v_star=torch.ones(2, 4),
        facts=(
            Fact("A", "{} is", "x"),
            Fact("B", "{} is", None, paraphrases=["{}"], neighbours=[Probe("C is", "d")]),
        ),
        method="rome",
        config={"layer": 0, "contexts": ["{}"]},
        fingerprint="ab" * 32,
        convergence=({"steps": 3}, {"steps": 4, "loss": 0.5}),
    ).save(folder)
    raw = (folder / "delta.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return (
        json.loads((folder / "edit.json").read_text()),
        json.loads(raw[8 : 8 + length]),
        raw[8 + length :],
    )


def _put(folder: Path, record: Any, tensors: bytes, *, signed: bool = True) -> None:
    """Write a delta's files, with correct checksums if `signed`, as an attacker would."""
    if signed and isinstance(record, dict):
        record = (
            {**record, "tensors_sha256": hashlib.sha256(tensors).hexdigest()}
            if "tensors_sha256" in record
            else record
        )
        record = {key: value for key, value in record.items() if key != "sha256"}
        content = json.dumps(record, sort_keys=True, ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        record["sha256"] = hashlib.sha256(content).hexdigest()
    write_new(folder / "edit.json", json.dumps(record).encode())
    write_new(folder / "delta.safetensors", tensors)


def _tensors(header: Any, body: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file with this header. `length` replaces its stated length."""
    content = json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + body


def _is_a_delta(folder: Path) -> None:
    """Load a delta, and use it as a reader would."""
    from factsmith.edit.delta import Delta

    delta = Delta.load(folder)
    assert all(type(layer) is int and layer >= 0 for layer in delta.layers) and repr(delta)
    assert all(delta.dense(layer).isfinite().all() for layer in delta.layers)


def test_every_damaged_delta_is_refused_with_a_message(
    tmp_path: Path, saved: tuple[dict[str, Any], dict[str, Any], bytes]
) -> None:
    record, header, body = saved
    whole = _tensors(header, body)
    _put(tmp_path, record, whole)
    assert not is_refused(lambda: _is_a_delta(tmp_path), "none"), (
        "control: correct checksums are accepted"
    )
    refused, memory = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(SEED, SEED + FUZZ["deltas"] * TIMES):
        rng = random.Random(seed)
        kind = rng.randrange(5)
        if kind == 0:
            _put(tmp_path, mutated(record, rng), whole, signed=rng.random() < 0.9)
        elif kind == 1:
            _put(tmp_path, record, _tensors(mutated(header, rng), body))
        elif kind == 2:
            length = rng.choice(
                [
                    0,
                    1,
                    7,
                    len(whole),
                    2**20,
                    10**8,
                    10**10,
                    2**40,
                    2**63,
                    2**64 - 1,
                    rng.randrange(len(whole)),
                ]
            )
            _put(tmp_path, record, _tensors(header, body, length))
        elif kind == 3:
            _put(
                tmp_path,
                record,
                corrupted(
                    whole,
                    rng,
                    [
                        b"F64",
                        b"BF16",
                        b"BOOL",
                        b"U64",
                        b"F8_E4M3",
                        b"C64",
                        b"-1",
                        b"1e9",
                        b"[0,",
                        b"9" * 30,
                    ],
                ),
            )
        else:
            write_new(
                tmp_path / "edit.json", corrupted(json.dumps(record).encode(), rng, JSON_PIECES)
            )
            write_new(tmp_path / "delta.safetensors", whole)
        refused += is_refused(lambda: _is_a_delta(tmp_path), seed)
    assert 0.7 * FUZZ["deltas"] < refused / TIMES < FUZZ["deltas"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000, "kilobytes"


CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "10 GB": lambda h: {
        **h,
        "v_star": {"dtype": "F32", "shape": [2, 1_250_000_000], "data_offsets": [0, 10**10]},
    },
    "10 GB from 32 bytes": lambda h: {**h, "v_star": {**h["v_star"], "shape": [2, 1_250_000_000]}},
    "more than there are numbers": lambda h: {
        **h,
        "v_star": {**h["v_star"], "shape": [2**63, 2**63]},
    },
    "no rows of endless length": lambda h: {**h, "v_star": {**h["v_star"], "shape": [0, 2**63]}},
    "a negative size": lambda h: {**h, "v_star": {**h["v_star"], "shape": [-2, -4]}},
    "another dtype": lambda h: {
        **h,
        "v_star": {"dtype": "F64", "shape": [2, 2], "data_offsets": h["v_star"]["data_offsets"]},
    },
    "a negative layer": lambda h: {name.replace(".2", ".-2"): field for name, field in h.items()},
    "a path": lambda h: {
        name.replace(".2", "../../../etc/passwd"): field for name, field in h.items()
    },
    "a list": lambda h: [h],
    "overlapping tensors": lambda h: {
        **h,
        "k_star.0": {**h["k_star.0"], "data_offsets": h["k_star.2"]["data_offsets"]},
    },
    "a header of its own": lambda h: {
        "__metadata__": {"format": "pt", "run": "rm -rf /"},
        **h,
        "more": h["v_star"],
    },
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_false_claims_of_a_header_are_refused(
    tmp_path: Path, saved: tuple[dict[str, Any], dict[str, Any], bytes], claim: str
) -> None:
    record, header, body = saved
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for layers in ([0, 2], [0, -2], [0, "2../../../etc/passwd"]):
        _put(tmp_path, {**record, "layers": layers}, _tensors(CLAIMS[claim](header), body))
        assert is_refused(lambda: _is_a_delta(tmp_path), claim)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000, "kilobytes"


def test_endless_files_and_pipes_are_refused(
    tmp_path: Path, saved: tuple[dict[str, Any], dict[str, Any], bytes]
) -> None:
    record, header, body = saved
    for name in ("edit.json", "delta.safetensors"):
        for target in ("/dev/zero", "pipe"):
            _put(tmp_path, record, _tensors(header, body))
            (tmp_path / name).unlink()
            (tmp_path / name).symlink_to(target) if target != "pipe" else os.mkfifo(tmp_path / name)
            assert is_refused(lambda: _is_a_delta(tmp_path), (name, target))
            (tmp_path / name).unlink()
    _put(tmp_path, record, _tensors(header, body))
    os.truncate(tmp_path / "edit.json", 10 * 2**30)  # a sparse file needs no room on the disk
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert is_refused(lambda: _is_a_delta(tmp_path), "10 GB of nothing")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000, "kilobytes"
    assert is_refused(lambda: _is_a_delta(Path("a\0b")), "an invalid path")
