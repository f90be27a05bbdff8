"""Files that others made: whatever they say, the answer is a short error of factsmith."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TEXTS
from exports import two_deltas
from factsmith.core.artefact import Checkpoint, read_tensors, write_tensors
from factsmith.core.errors import DamagedError, FingerprintError
from factsmith.core.files import file_digest, record_digest
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import (
    find_moments,
    keep_moments,
    kept_moments,
    load_moments,
    moments_file,
)
from factsmith.keep.export.folder import read_patch
from factsmith.keep.export.patch import export_patch
from factsmith.keep.layers_file import read_layers
from factsmith.model.language_model import LanguageModel
from factsmith.patch.layer_choice import LayerChoice, LayerScore
from factsmith.read.index import Index, build_index
from factsmith.read.triggers import Triggers
from factsmith.read.values import ValueTokens
from faults.fuzz import FUZZ, JSON_PIECES, SEED, TIMES, corrupted, is_refused, mutated, write_new

EDITED = 300 * TIMES
"""Files of each kind whose content is changed and whose checksum is right."""

DAMAGED = 120 * TIMES
"""Files of each kind whose bytes are changed."""

WORDS = [
    "", "-1", "0", "1", "9" * 30, "nan", "inf", "-0.5", "1e400", "none", "True", "[]", "{}",
    "[[0]]", '{"a": 1}', "\u202e", "a\0b", "x" * 3000, "f" * 64, "0" * 63, "[" * 3000,
]  # fmt: skip


def edited(
    tensors: dict[str, Tensor], fields: dict[str, str], rng: random.Random
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the content of a file with one field or one tensor replaced, removed or renamed."""
    if rng.random() < 0.5:
        key = rng.choice(list(fields))
        rest = {name: text for name, text in fields.items() if name != key}
        what = rng.random()
        if what < 0.2:
            return tensors, rest
        if what < 0.4:
            return tensors, {**rest, key + "x": fields[key]}
        return tensors, {**rest, key: rng.choice(WORDS)}
    key = rng.choice(list(tensors))
    rest_of_them = {name: tensor for name, tensor in tensors.items() if name != key}
    change = rng.choice(_CHANGES)
    if change is None:
        return rest_of_them, fields
    new = change(tensors[key])
    name = rng.choice([key, key, key, key, key + "x", "../" + key, "7/" + key])
    return {**rest_of_them, name: new.contiguous()}, fields


def _with_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor.clone()
        flat = tensor.clone().reshape(-1)
        small = torch.iinfo(flat.dtype).max if not flat.is_floating_point() else None
        flat[0] = value if small is None else max(min(value if value == value else 0, small), -1)
        return flat.reshape(tensor.shape)

    return change


_CHANGES: list[Callable[[Tensor], Tensor] | None] = [
    None,
    lambda t: t[:0],
    lambda t: t[:-1],
    lambda t: torch.cat([t, t]),
    lambda t: t.reshape(-1),
    lambda t: t[None],
    lambda t: t.double(),
    lambda t: t.to(torch.int32),
    lambda t: t.bool(),
    lambda t: t.to(torch.bfloat16),
    lambda t: torch.zeros_like(t),
    lambda t: -t if t.is_floating_point() else t + 10**6 if t.dtype == torch.int64 else t,
    _with_first(float("nan")),
    _with_first(float("inf")),
    _with_first(1e30),
    _with_first(-3),
]


class Kind:
    """One kind of file: where it is, and what reads and then uses it."""

    def __init__(self, path: Path, use: Callable[[], Any]) -> None:
        self.path, self.use = path, use
        self.bytes = path.read_bytes()


@pytest.fixture(scope="module")
def index_folder(tiny_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    build_index(tiny_gpt2, TEXTS, folder)
    return folder


def _use_index(folder: Path, lm: LanguageModel) -> Callable[[], Any]:
    def use() -> None:
        (folder / "texts.sqlite").unlink(missing_ok=True)
        index = Index.open(folder, lm)
        str(index), index.promoting("Paris"), index.triggered_by("Paris")
        for bank in index.triggers.banks:
            index.triggers.of((*bank, 0)), index.triggers.next_tokens(bank)
            index.values.of((*bank, 0))

    return use


@pytest.fixture
def kinds(tiny_gpt2: LanguageModel, index_folder: Path, tmp_path: Path) -> dict[str, Kind]:
    lm = tiny_gpt2
    moments = second_moments(lm, TEXTS, [0, 1])
    plain, packed = moments_file(tmp_path / "plain", 1), moments_file(tmp_path / "packed", 1)
    moments[1].save(plain)
    full = moments[1].matrix + torch.eye(128, dtype=torch.float64)
    SecondMoment.from_matrix(full, count=90, layer=1).save(packed, packed=True)
    index = tmp_path / "index"
    shutil.copytree(index_folder, index)

    def use_moments(path: Path) -> Callable[[], Any]:
        def use() -> None:
            for moment in (SecondMoment.load(path), load_moments(path.parent)[1]):
                moment.check(lm, 1)
                moment.describe(), moment.factor, str(moment)
            kept_moments(lm, [1], path.parent)
            keep_moments({1: moments[1]}, path.parent)

        return use

    unfinished = tmp_path / "unfinished.safetensors"
    seen: dict[str, Any] = {}
    import factsmith.core.artefact as artefact

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefact, "_SECONDS", 0.0)
        patch.setattr(Checkpoint, "remove", lambda self: seen.setdefault("kept", True))
        second_moments(lm, TEXTS, [0, 1], batch_tokens=40, checkpoint=unfinished)
    unfinished_bytes = unfinished.read_bytes()

    def go_on() -> None:
        copy = tmp_path / "copy.safetensors"
        shutil.copy(unfinished, copy)
        second_moments(lm, TEXTS, [0, 1], batch_tokens=40, checkpoint=copy)

    assert unfinished_bytes
    return {
        "second moment": Kind(plain, use_moments(plain)),
        "packed second moment": Kind(packed, use_moments(packed)),
        "triggers": Kind(index / "triggers.safetensors", _use_index(index, lm)),
        "values": Kind(index / "values.safetensors", _use_index(index, lm)),
        "unfinished moments": Kind(unfinished, go_on),
    }


NAMES = ["second moment", "packed second moment", "triggers", "values", "unfinished moments"]


@pytest.mark.parametrize("name", NAMES)
def test_edited_tensor_files_are_refused_in_words(name: str, kinds: dict[str, Kind]) -> None:
    kind = kinds[name]
    kind.use()
    tensors, fields = read_tensors(kind.path, "")
    refused = 0
    for seed in range(EDITED):
        changed = edited(tensors, fields, random.Random(seed))
        kind.path.unlink(missing_ok=True)
        write_tensors(kind.path, *changed)
        refused += is_refused(kind.use, (name, seed))
    assert refused > 0.4 * EDITED
    write_new(kind.path, kind.bytes)
    kind.use()


@pytest.mark.parametrize("name", NAMES)
def test_damaged_tensor_files_are_refused_in_words(name: str, kinds: dict[str, Kind]) -> None:
    kind = kinds[name]
    for seed in range(DAMAGED):
        rng = random.Random(seed)
        write_new(kind.path, corrupted(kind.bytes, rng, JSON_PIECES))
        is_refused(kind.use, (name, seed))


def test_a_layers_file_that_says_anything(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    score = LayerScore(layer=1, trials=2, efficacy=1.0, generalization=None, specificity=0.5)
    choice = LayerChoice(
        rome=1,
        memit=(0, 1),
        source="trials",
        reason="measured",
        fingerprint=tiny_gpt2.fingerprint,
        scores=(score,),
        effects=(0.1, 0.2, 0.3),
        window=3,
        seed=0,
    )
    record = {"format": 1, **choice.to_dict()}
    file = tmp_path / "layers.json"
    refused = 0

    def use() -> None:
        kept = read_layers(file, tiny_gpt2, tiny_gpt2.fingerprint)
        if kept is not None:
            str(kept), kept.trials

    for seed in range(EDITED):
        text = json.dumps(mutated(record, random.Random(seed)))
        write_new(file, text.encode())
        refused += is_refused(use, seed)
    assert 0.3 * EDITED < refused < EDITED


def test_the_manifest_of_a_patch_that_says_anything(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    export_patch(tiny_gpt2, two_deltas(tiny_gpt2), tmp_path / "patch")
    file = tmp_path / "patch" / "factsmith.json"
    record = json.loads(file.read_bytes())
    del record["sha256"]
    refused = 0
    for seed in range(EDITED):
        changed = mutated(record, random.Random(seed))
        try:
            signed = {**changed, "sha256": record_digest(changed)}
            content = json.dumps(signed).encode()
        except (TypeError, ValueError, RecursionError):
            continue
        write_new(file, content)
        refused += is_refused(
            lambda: str(read_patch(tmp_path / "patch", fingerprint=tiny_gpt2.fingerprint)), seed
        )
    assert refused > 0.5 * EDITED


# ── the faults that must be named ─────────────────────────────────────────────────────────────────


def save_edited(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    tensors, fields = read_tensors(path, "")
    change(tensors, fields)
    write_tensors(path, tensors, fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, f: f.pop("count"), "it has no 'count'"),
        (lambda t, f: f.update(count="many"), "its count is 'many'"),
        (lambda t, f: f.update(count="0"), "whole number of at least 1"),
        (lambda t, f: f.update(excess="nan"), "its excess is 'nan'"),
        (lambda t, f: f.update(fingerprint="\u202e" * 9), "not a digest"),
        (lambda t, f: t["matrix"][3].fill_(float("nan")), "holds NaN or infinity"),
        (lambda t, f: t.update(matrix=torch.zeros(0, 0)), "expected"),
        (lambda t, f: t.update(matrix=torch.zeros(8, 8)), "zeros alone"),
        (lambda t, f: t["matrix"][0, 1].fill_(1e9), "not symmetric"),
        (lambda t, f: t["matrix"][0, 0].fill_(-1), "negative number"),
    ],
)
def test_a_wrong_second_moment_is_named(
    change: Callable[[dict[str, Tensor], dict[str, str]], object],
    said: str,
    tiny_gpt2: LanguageModel,
    tmp_path: Path,
) -> None:
    path = moments_file(tmp_path, 1)
    find_moments(tiny_gpt2, [1], texts=TEXTS, folder=tmp_path)
    SecondMoment.load(path)
    save_edited(path, change)
    with pytest.raises(DamagedError, match=said) as caught:
        find_moments(tiny_gpt2, [1], folder=tmp_path)
    assert str(path) in str(caught.value) and "again" in str(caught.value)


def test_another_layers_matrix_under_this_layers_name(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    find_moments(tiny_gpt2, [0, 1], texts=TEXTS, folder=tmp_path)
    shutil.copy(moments_file(tmp_path, 0), moments_file(tmp_path, 1))
    for use in (
        lambda: find_moments(tiny_gpt2, [1], folder=tmp_path),
        lambda: load_moments(tmp_path),
        lambda: kept_moments(tiny_gpt2, [1], tmp_path),
    ):
        with pytest.raises(DamagedError, match=r"of layer 0, and its name says layer 1"):
            use()
    assert kept_moments(tiny_gpt2, [0], tmp_path)[0].layer == 0


def test_triggers_and_values_of_another_model_and_size(
    tiny_gpt2: LanguageModel, index_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(index_folder, folder)
    save_edited(folder / "triggers.safetensors", lambda t, f: f.update(fingerprint="f" * 64))
    with pytest.raises(FingerprintError, match="belong to"):
        Triggers.load(folder, tiny_gpt2)
    Triggers.load(folder)
    save_edited(
        folder / "triggers.safetensors",
        lambda t, f: (
            f.update(fingerprint=tiny_gpt2.fingerprint),
            [t.update({name.replace("2/", "9/"): t.pop(name)}) for name in list(t) if "2/" in name],
        ),
    )
    with pytest.raises(DamagedError, match=r"which .* does not have"):
        Triggers.load(folder, tiny_gpt2)
    save_edited(folder / "values.safetensors", lambda t, f: f.update(words="{}"))
    with pytest.raises(DamagedError, match="its words lack some tokens"):
        ValueTokens.load(folder)


def test_a_file_of_a_patch_and_its_digest_are_compared(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    """The control of the manifest's fuzzing: an honest folder is read."""
    export_patch(tiny_gpt2, two_deltas(tiny_gpt2), tmp_path / "patch")
    assert len(read_patch(tmp_path / "patch").patches) == 2
    assert file_digest(tmp_path / "patch" / "0001" / "edit.json")
    assert sum(FUZZ.values()) > SEED / 20
