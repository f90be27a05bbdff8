"""An adapter names its base model without this machine's paths, and refuses another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from exports import answers_of, names, replace_read_back, some_delta
from factsmith import atlas
from factsmith.core.errors import FingerprintError, InputError, ModelNotFoundError
from factsmith.keep.export.adapter import export_adapter
from factsmith.keep.export.formats import export
from factsmith.keep.export.readback import Job
from factsmith.keep.export.record import Export
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def adapter(
    lm: LanguageModel, folder: Path, **options: Any
) -> tuple[Export, tuple[str, str | None]]:
    """Export an adapter; return it, and the name and revision of its base in adapter_config."""
    made = export_adapter(lm, some_delta(lm, 1), folder, **options)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    return made, (config["base_model_name_or_path"], config["revision"])


def in_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder into a cache of the hub as "owner/some-name", and return its place."""
    model = cache / "models--owner--some-name"
    shutil.copytree(folder, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    return model / "snapshots" / COMMIT


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that are read back; each is answered as the patched model answers."""
    seen: list[Job] = []

    def faithful(given: Any) -> Any:
        seen.extend(given)
        return [answers_of(job.questions) for job in given]

    replace_read_back(monkeypatch, faithful)
    return seen


def test_a_folder_is_named_without_its_parents_and_a_warning(
    folders: dict[str, Path], tmp_path: Path, jobs: list[Job]
) -> None:
    lm = load(folders["gpt2"])
    made, named = adapter(lm, tmp_path / "out")
    assert named == ("gpt2", None)
    assert made.base is not None and made.base.checked
    (warning,) = made.warnings
    assert "only 'gpt2', because it was loaded from a folder" in warning and "hub id" in warning
    assert warning in repr(made) and made.to_dict()["warnings"] == [warning]
    assert [Path(job.model) for job in jobs] == [folders["gpt2"].resolve()], "read from its folder"


def test_a_bundled_model_keeps_its_name(tmp_path: Path, jobs: list[Job]) -> None:
    made, named = adapter(load("atlas"), tmp_path / "name")
    assert named == ("atlas", None) and "comes with factsmith" in made.warnings[0]
    by_path, named = adapter(load(atlas.folder("atlas")), tmp_path / "path")
    assert named == ("atlas", None) and by_path.warnings == made.warnings
    assert [job.model for job in jobs] == [str(atlas.folder("atlas"))] * 2


def test_a_folder_in_the_cache_of_the_hub_has_its_hub_id(
    folders: dict[str, Path], tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = in_cache(folders["gpt2"], tmp_path / "cache", monkeypatch)
    made, named = adapter(load(place), tmp_path / "out")
    assert named == ("owner/some-name", COMMIT) and not made.warnings
    (tmp_path / "link").symlink_to(place)
    assert adapter(load(tmp_path / "link"), tmp_path / "linked")[1] == named
    assert {Path(job.model) for job in jobs} == {place.resolve()}
    manifest = json.loads((tmp_path / "out/factsmith.json").read_bytes())
    assert manifest["model"] == f"owner/some-name@{COMMIT}"
    assert manifest["base_model"] == {
        "name": "owner/some-name", "revision": COMMIT, "checked": True,
    }  # fmt: skip
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert card.count(f'"owner/some-name", revision="{COMMIT}"') == 3
    assert f'fs.load("owner/some-name", revision="{COMMIT}", dtype="float32")' in card
    assert f"vllm serve owner/some-name --revision {COMMIT} --enable-lora" in card
    # A folder of another layout is not in a cache.
    other = shutil.copytree(place, tmp_path / "models--owner--some-name" / "copies" / COMMIT)
    assert adapter(load(other), tmp_path / "other")[1] == (COMMIT, None)


def test_a_given_base_is_written_as_it_is_given(
    folders: dict[str, Path], tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(folders["gpt2"])
    absolute = str(folders["gpt2"])
    monkeypatch.chdir(folders["gpt2"].parent)
    made, named = adapter(lm, tmp_path / "a", base="gpt2")
    assert named == ("gpt2", None) and not made.warnings and made.base is not None
    assert made.base.checked and "has the fingerprint" in repr(made)
    made, named = adapter(lm, tmp_path / "b", base=absolute)
    assert named == (absolute, None) and made.base is not None and made.base.checked
    (warning,) = made.warnings
    assert "full path" in warning and absolute in warning
    made, named = adapter(lm, tmp_path / "c", base="../elsewhere/base")
    assert named == ("../elsewhere/base", None)
    assert "not on this machine" in made.warnings[0]
    made, named = adapter(lm, tmp_path / "d", base="owner/other@v2")
    assert named == ("owner/other", "v2") and made.base is not None
    assert not made.base.checked and made.base.why in repr(made)
    card = (tmp_path / "d/README.md").read_text()
    assert "not checked, because the model of this name is not on this machine" in card
    assert {Path(job.model) for job in jobs} == {folders["gpt2"].resolve()}


def test_a_base_with_another_fingerprint_is_refused(
    folders: dict[str, Path], tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(folders["gpt2"])
    tiny_model("gpt2", seed=5, **GPT2).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    other = load(tmp_path / "other")
    both = rf"{other.fingerprint[:10]}.*{lm.fingerprint[:10]}"
    with pytest.raises(FingerprintError, match=both):
        adapter(lm, tmp_path / "out", base=str(tmp_path / "other"))
    in_cache(tmp_path / "other", tmp_path / "cache", monkeypatch)
    with pytest.raises(FingerprintError, match=both):
        adapter(lm, tmp_path / "out", base="owner/some-name")
    with pytest.raises(FingerprintError, match="fits one model only"):
        adapter(load(folders["gpt2"], dtype=torch.bfloat16), tmp_path / "out", base="atlas")
    assert not jobs and not (tmp_path / "out").exists()
    right = shutil.copytree(folders["gpt2"], tmp_path / "copy")
    made, named = adapter(lm, tmp_path / "out", base=str(right))
    assert named[0] == str(right) and made.base is not None and made.base.checked
    assert [Path(job.model) for job in jobs] == [right.resolve()]


def test_the_right_model_in_the_cache_of_the_hub_is_checked(
    folders: dict[str, Path], tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(folders["gpt2"])
    place = in_cache(folders["gpt2"], tmp_path / "cache", monkeypatch)
    made, named = adapter(lm, tmp_path / "out", base="owner/some-name")
    assert named == ("owner/some-name", None) and not made.warnings
    assert made.base is not None and made.base.checked
    assert [Path(job.model) for job in jobs] == [place]
    made, _ = adapter(lm, tmp_path / "quick", base="owner/some-name", verify=False)
    assert made.base is not None and made.base.why == "the export was not verified"
    (place / "model.safetensors").unlink()
    made, _ = adapter(lm, tmp_path / "partly", base="owner/some-name")
    assert made.base is not None and "cannot be loaded" in made.base.why


def test_a_base_that_cannot_be_one_is_refused(
    folders: dict[str, Path], tmp_path: Path, jobs: list[Job]
) -> None:
    lm = load(folders["gpt2"])
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[type[Exception], str, str]] = [
        (InputError, str(file), "that is a file"),
        (InputError, " ", "base is empty"),
        (ModelNotFoundError, str(empty), "no config.json"),
    ]
    for error, base, words in cases:
        with pytest.raises(error, match=words):
            adapter(lm, tmp_path / "out", base=base)
    in_memory = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with pytest.raises(InputError, match=r"not loaded from a folder or the hub.*as base"):
        adapter(in_memory, tmp_path / "out")
    assert "out" not in names(tmp_path) and not jobs
    made, named = adapter(in_memory, tmp_path / "out", base=str(folders["gpt2"]))
    assert named[0] == str(folders["gpt2"]) and made.base is not None and made.base.checked


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_loaded_by_peft_from_another_place(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm = load(folders["llama"])
    delta = some_delta(lm, 1)
    (tmp_path / "here").mkdir()
    made = export_adapter(lm, delta, tmp_path / "here" / "out")
    assert made.read_back is not None
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "here" / "out", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    plain = base.model.layers[1].mlp.down_proj.weight.detach().clone()
    merged = PeftModel.from_pretrained(base, "moved").merge_and_unload()
    weight = merged.model.layers[1].mlp.down_proj.weight
    assert torch.allclose(weight, plain + delta.dense(1), atol=1e-6)
    assert not torch.allclose(weight, plain, atol=1e-3)


def test_no_file_of_an_export_holds_a_path_of_this_machine(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    lm = load(folders["llama"])
    secret = str(folders["llama"].parent)
    assert secret in lm.name
    for format in ("adapter", "checkpoint", "patch"):
        out = tmp_path / format
        export(lm, some_delta(lm, 1), out, format, verify=False)
        files = [path for path in out.rglob("*") if path.is_file()]
        assert len(files) > 1
        for file in files:
            assert secret.encode() not in file.read_bytes(), file
    adapter(lm, tmp_path / "wanted", base=secret + "/llama", verify=False)
    assert secret.encode() in (tmp_path / "wanted/adapter_config.json").read_bytes()
