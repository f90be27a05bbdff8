"""Patches from others are data. A wrong folder is refused with a message."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GPT2, byte_tokenizer, tiny_model
from exports import appending, names, some_delta, two_deltas
from factsmith.core.errors import DamagedError, FingerprintError, InputError
from factsmith.core.files import record_digest
from factsmith.edit.delta import Delta
from factsmith.keep.export.contents import Origin
from factsmith.keep.export.folder import PatchFolder, read_patch
from factsmith.keep.export.patch import equal_deltas, export_patch
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

CORRUPTIONS = int(os.environ.get("FACTSMITH_CORRUPTIONS", "300"))
ORIGINS = [
    Origin(revision="ab" * 32, message="ticket 812", moments="cd" * 32),
    Origin(message="Zürich → 中"),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture(scope="module")
def original(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches") / "two"
    export_patch(lm, two_deltas(lm), folder, origins=ORIGINS)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "patch"))


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with a new checksum, as an attacker would write it."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return {
        **rest,
        "sha256": hashlib.sha256(
            json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()
        ).hexdigest(),
    }


def resign(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Write checksums that fit the files. `change` alters the manifest before its checksum."""
    for place in sorted(folder.glob("[0-9]*")):
        file = place / "edit.json"
        if file.is_file():
            record = json.loads(file.read_bytes())
            record["tensors_sha256"] = hashlib.sha256(
                (place / "delta.safetensors").read_bytes()
            ).hexdigest()
            file.write_text(json.dumps(signed(record)))
    manifest = json.loads((folder / "factsmith.json").read_bytes())
    for name in manifest["files"]:
        path = folder / name
        if path.is_file():
            manifest["files"][name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
    if change is not None:
        change(manifest)
    (folder / "factsmith.json").write_text(json.dumps(signed(manifest)))


def test_patches_come_back_in_order_with_their_origins(lm: LanguageModel, folder: Path) -> None:
    read = read_patch(folder, fingerprint=lm.fingerprint)
    assert (read.model, read.dtype, read.fingerprint) == (lm.name, "float32", lm.fingerprint)
    assert [saved.origin for saved in read.patches] == ORIGINS
    for saved, delta in zip(read.patches, two_deltas(lm), strict=True):
        assert saved.delta.facts == delta.facts and torch.equal(saved.delta.v_star, delta.v_star)
        for layer, (left, right) in delta.layers.items():
            assert torch.equal(saved.delta.dense(layer), left @ right) and torch.equal(
                saved.delta.k_star[layer], delta.k_star[layer]
            )
    assert names(folder) == [
        "0001", "0001/delta.safetensors", "0001/edit.json",
        "0002", "0002/delta.safetensors", "0002/edit.json", "factsmith.json",
    ]  # fmt: skip
    assert "ticket 812" in repr(read) and "2 patches for" in repr(read)
    described = json.loads(json.dumps(read.to_dict()))
    assert (
        described["patches"][1]["layers"] == [1, 2]
        and described["patches"][0]["facts"][0]["subject"] == "Paris"
    )
    resign(folder)
    read_patch(folder)  # control: new checksums alone are accepted


def test_appended_neurons_come_back(lm: LanguageModel, tmp_path: Path) -> None:
    """Bit for bit, and the manifest says how many there are."""
    deltas = [some_delta(lm, 1), appending(lm, 1, {0: 3, 2: 4})]
    made = export_patch(lm, deltas, tmp_path / "out")
    saved = read_patch(tmp_path / "out", fingerprint=lm.fingerprint)
    for delta, patch in zip(deltas, saved.patches, strict=True):
        assert delta.digest == patch.delta.digest
    assert made.neurons == 7 and "7 neurons" in str(saved)
    stated = json.loads((tmp_path / "out/factsmith.json").read_bytes())["patches"]
    assert "neurons" not in stated[0] and stated[1]["neurons"] == 7
    assert stated[1]["layers"] == [0, 2]
    described = [(each["layers"], each["neurons"]) for each in saved.to_dict()["patches"]]
    assert described == [([1], 0), ([0, 2], 7)]


def test_deltas_differ_by_any_appended_number(lm: LanguageModel) -> None:
    delta = appending(lm, 1, {0: 3})
    assert equal_deltas(delta, appending(lm, 1, {0: 3}))
    rows = dataclasses.replace(delta.appended[0], inputs=torch.ones(2, lm.d_model))
    delta = dataclasses.replace(delta, appended={0: rows})
    for name, tensor in [*rows.tensors().items(), ("inputs", torch.ones(2, lm.d_model))]:
        other = tensor.clone()
        other.view(-1)[-1] += 1e-3
        changed = {0: dataclasses.replace(rows, **{name: other})}
        assert not equal_deltas(delta, dataclasses.replace(delta, appended=changed)), name
    changed = {0: dataclasses.replace(rows, facts=(1, 0, 1))}
    assert not equal_deltas(delta, dataclasses.replace(delta, appended=changed))
    assert not equal_deltas(delta, appending(lm, 1, {0: 3, 1: 1}))


def test_a_manifest_that_counts_other_neurons(lm: LanguageModel, tmp_path: Path) -> None:
    export_patch(lm, appending(lm), tmp_path / "out")
    file = tmp_path / "out/factsmith.json"
    record = json.loads(file.read_bytes())
    record["patches"][0]["neurons"] = 6
    del record["sha256"]
    file.write_text(json.dumps({**record, "sha256": record_digest(record)}))
    with pytest.raises(DamagedError, match="is not the patch that its manifest describes"):
        read_patch(tmp_path / "out")


def test_another_models_patches_and_other_folders_are_refused(
    folder: Path, tmp_path: Path, original: Path
) -> None:
    with pytest.raises(FingerprintError, match="Load the model that it was made for"):
        read_patch(folder, fingerprint="0" * 64)
    with pytest.raises(InputError, match="is not a folder"):
        read_patch(tmp_path / "nowhere")
    with pytest.raises(InputError, match="path"):
        read_patch("a\0b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DamagedError, match=r"no factsmith.json in"):
        read_patch(tmp_path / "empty")
    resign(folder, lambda manifest: manifest.update(factsmith="adapter"))
    with pytest.raises(InputError, match=r"holds an adapter\. Give a folder"):
        read_patch(folder)
    with pytest.raises(InputError, match="more than 1,000 bytes"):
        read_patch(original, max_bytes=1000)


def _pickle(folder: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "harm",))

    (folder / "0001/delta.safetensors").write_bytes(pickle.dumps(Harm()))


def _with_tensors(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "0001/delta.safetensors"
        tensors = load_file(file)
        for name, made in changes.items():
            tensors[name.replace("__", ".")] = made(tensors)
        save_file(tensors, file)

    return change


def _edited(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "0001/edit.json"
        file.write_text(json.dumps({**json.loads(file.read_bytes()), **changes}))

    return change


def _linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return change


def _piped(folder: Path) -> None:
    (folder / "0001/edit.json").unlink()
    os.mkfifo(folder / "0001/edit.json")


def _named(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][new] = manifest["files"].pop(old)

    return change


def _header(shape: list[int]) -> Callable[[Path], None]:
    """Write a file of a few bytes with a header that claims many."""

    def change(folder: Path) -> None:
        size = 4 * int(torch.tensor(shape).prod())
        header = json.dumps(
            {"v_star": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
        ).encode()
        (folder / "0001/delta.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    return change


SPOILED: dict[
    str, tuple[Callable[[Path], None] | None, Callable[[dict[str, Any]], None] | None, str]
] = {
    "a file more": (
        lambda f: (f / "notes.txt").write_text("x") and None,
        None,
        "'notes.txt', which its manifest does not name",
    ),
    "a file more next to a delta": (
        lambda f: (f / "0001/x.pkl").write_bytes(b"x") and None,
        None,
        "x.pkl",
    ),
    "a file missing": (
        lambda f: (f / "0002/edit.json").unlink(),
        None,
        "0002/edit.json is missing",
    ),
    "a folder missing": (lambda f: shutil.rmtree(f / "0002"), None, "cannot be read"),
    "a link to a file": (_linked("0001/edit.json"), None, "not a regular file"),
    "a link to a folder": (_linked("0001"), None, "a link or a file, where a folder is expected"),
    "a link to the manifest": (_linked("factsmith.json"), None, "not a regular file"),
    "a pipe": (_piped, None, "not a regular file"),
    "a path above": (None, _named("0001/edit.json", "../edit.json"), "does not name the files"),
    "an absolute path": (None, _named("0001/edit.json", "/etc/passwd"), "does not name the files"),
    "a path within": (
        None,
        _named("0001/edit.json", "0001/./edit.json"),
        "does not name the files",
    ),
    "a pickle": (_pickle, None, "not a delta"),
    "no patch": (None, lambda m: m.update(patches=[], files={}), "0 patches"),
    "patches in another order": (None, lambda m: m["patches"].reverse(), "not the patch"),
    "other facts": (
        None,
        lambda m: m["patches"][0]["facts"][0].update(target="Latin"),
        "not the patch",
    ),
    "no fact at all": (
        None,
        lambda m: m["patches"][0]["facts"][0].pop("subject"),
        "fact that cannot be read",
    ),
    "another method": (None, lambda m: m["patches"][0].update(method="memit"), "not the patch"),
    "a later format": (None, lambda m: m.update(format=2), "upgrade|pip install -U"),
    "a field more": (None, lambda m: m.update(run="rm -rf /"), "run"),
    "a negative layer": (
        None,
        lambda m: m["patches"][0].update(layers=[-1]),
        "greater than or equal to 0",
    ),
    "a negative size": (None, lambda m: m["files"]["0001/edit.json"].update(bytes=-5), "bytes"),
    "tensors in 16 bits": (_with_tensors(v_star=lambda t: t["v_star"].half()), None, "float32"),
    "a tensor more": (_with_tensors(more=lambda t: torch.zeros(3)), None, "other tensors"),
    "a shape that does not fit": (
        _with_tensors(left__0=lambda t: torch.zeros(31, 2)),
        None,
        "shapes",
    ),
    "a vector": (_with_tensors(left__0=lambda t: torch.zeros(64)), None, "shapes"),
    "nothing in it": (_with_tensors(v_star=lambda t: torch.zeros(2, 0)), None, "shapes"),
    "not a number": (_with_tensors(v_star=lambda t: t["v_star"] * float("nan")), None, "NaN"),
    "a header of 4 GB": (_header([2**15, 2**15]), None, "not a delta"),
    "a header of 8 EB": (_header([2**30, 2**31]), None, "not a delta"),
    "settings that are a list": (_edited(config=[1, 2]), None, "not a delta"),
    "convergence that is a list of numbers": (_edited(convergence=[1, 2]), None, "not a delta"),
    "no fingerprint": (_edited(fingerprint=None), None, "not a delta"),
    "edit.json of another delta": (_edited(layers=[0, 2]), None, "not a delta"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_wrong_folders_are_refused_also_with_new_checksums(folder: Path, case: str) -> None:
    spoil, change, words = SPOILED[case]
    if spoil is not None:
        spoil(folder)
    if case != "a link to the manifest" and case != "a pipe":
        resign(folder, change)
    with pytest.raises(DamagedError, match=words) as caught:
        read_patch(folder)
    assert "Have it exported or sent again" in str(caught.value)
    assert not (folder / "harm").exists(), "code from the folder ran"


def test_without_new_checksums_each_changed_byte_is_seen(folder: Path) -> None:
    for name in ("0001/edit.json", "0002/delta.safetensors", "factsmith.json"):
        file = folder / name
        whole = file.read_bytes()
        for at in (len(whole) // 3, len(whole) - 3):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(DamagedError):
                read_patch(folder)
        file.write_bytes(whole)
    read_patch(folder)


def _mutated(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one random part replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        what = rng.random()
        rest = {k: v for k, v in value.items() if k != key}
        return (
            rest
            if what < 0.1
            else {**rest, key + "x": value[key]}
            if what < 0.2
            else {**value, key: _mutated(value[key], rng)}
        )
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return (
            value[:i] + value[i + 1 :]
            if rng.random() < 0.2
            else [*value[:i], _mutated(value[i], rng), *value[i + 1 :]]
        )
    return rng.choice(
        [
            None,
            True,
            0,
            -1,
            2**63,
            10**400,
            1e308,
            "",
            "..",
            "../..",
            "/etc",
            "\ud800",
            "\0",
            "x" * 3000,
            [],
            [[]],
            {},
            {"a": {}},
            0.5,
        ]
    )


def test_random_corruption_never_ends_in_anything_but_words(folder: Path) -> None:
    """Bytes are changed, removed and inserted; values of JSON and tensor headers are replaced."""
    whole = {
        name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()
    }
    refused = passed = 0
    for seed in range(CORRUPTIONS):
        rng = random.Random(seed)
        name = rng.choice(sorted(whole))
        content, kind = whole[name], rng.randrange(4)
        if kind == 0 or (kind == 1 and name.endswith(".json")):
            at, cut = rng.randrange(len(content)), rng.choice([0, 1, 1, 4, 100, len(content)])
            content = content[:at] + rng.randbytes(rng.choice([0, 1, 1, 8])) + content[at + cut :]
        elif name.endswith(".json"):
            content = json.dumps(_mutated(json.loads(content), rng)).encode()
        else:
            length = int.from_bytes(content[:8], "little")
            header = json.dumps(_mutated(json.loads(content[8 : 8 + length]), rng)).encode()
            content = (
                (len(header) if rng.random() < 0.9 else rng.randrange(2**40)).to_bytes(8, "little")
                + header
                + content[8 + length :]
            )
        (folder / name).write_bytes(content)
        if kind >= 2:
            with suppress(
                ValueError, KeyError, TypeError, AttributeError, OverflowError
            ):  # too broken to be signed
                resign(folder)
        try:
            result = read_patch(folder, max_bytes=10**7)
        except (DamagedError, InputError) as error:
            refused += 1
            assert 0 < len(str(error)) < 1000, seed
        else:
            passed += 1  # where a message, a model's name or a setting became another text
            assert isinstance(result, PatchFolder) and len(result.patches) == 2
            assert all(isinstance(saved.delta, Delta) for saved in result.patches)
            json.dumps(result.to_dict(), ensure_ascii=False).encode()
            assert repr(result)
        for other, before in whole.items():
            (folder / other).write_bytes(before)
    assert refused > 0.8 * CORRUPTIONS and passed > 0.01 * CORRUPTIONS, (refused, passed)
