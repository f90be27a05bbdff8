"""The manifest of an export refuses values that it could not read again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import GPT2, byte_tokenizer, tiny_model
from exports import names, some_delta
from factsmith.core.errors import DamagedError, InputError
from factsmith.core.files import record_digest
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.keep.export.contents import Contents, Origin
from factsmith.keep.export.manifest import read_manifest, write_manifest
from factsmith.keep.export.patch import export_patch
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A tiny random model."""
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def test_origins_that_json_cannot_hold_are_refused(lm: LanguageModel, tmp_path: Path) -> None:
    number: Any = 3
    for origin in (Origin(revision="../x"), Origin(moments="abc"), Origin(message=number)):
        with pytest.raises(InputError, match="origin"):
            export_patch(lm, some_delta(lm, 1), tmp_path / "out", origins=[origin])
    with pytest.raises(InputError, match="origins has a message that is not text"):
        export_checkpoint(lm, some_delta(lm, 1), tmp_path / "out", origins=[origin])
    assert names(tmp_path) == []


def test_a_manifest_lists_every_file(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("12345")
    sizes = write_manifest(tmp_path, "adapter", Contents.of(lm, some_delta(lm, 1), []))
    assert sizes == {"a": 5, "factsmith.json": (tmp_path / "factsmith.json").stat().st_size}
    manifest = read_manifest(tmp_path)
    assert manifest.factsmith == "adapter" and manifest.fingerprint == lm.fingerprint
    assert manifest.files["a"].sha256 == hashlib.sha256(b"12345").hexdigest()


def test_a_manifest_of_an_earlier_version_is_read(lm: LanguageModel, tmp_path: Path) -> None:
    """It has no base model and no revision; with another field it is refused."""
    write_manifest(tmp_path, "adapter", Contents.of(lm, some_delta(lm, 1), []))
    record = json.loads((tmp_path / "factsmith.json").read_bytes())
    assert not {"base_model", "revision"} & record.keys()
    manifest = read_manifest(tmp_path)
    assert manifest.base_model is None and manifest.revision is None
    record["more"] = 1
    del record["sha256"]
    record["sha256"] = record_digest(record)
    (tmp_path / "factsmith.json").write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="more"):
        read_manifest(tmp_path)
