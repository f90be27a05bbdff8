"""All formats write a manifest and refuse the same wrong inputs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import BERT, LLAMA, VOCAB, byte_tokenizer, masking_tokenizer, tiny_model
from exports import (
    answers_of,
    appending,
    dense_sum,
    names,
    off,
    product,
    replace_read_back,
    some_delta,
    two_deltas,
)
from factsmith.core.errors import (
    DamagedError,
    InputError,
    LayerError,
    ModelError,
    NumericsError,
    UnsupportedModelError,
)
from factsmith.keep.export.adapter import export_adapter
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.keep.export.folder import read_patch
from factsmith.keep.export.formats import check_saved, export
from factsmith.keep.export.patch import export_patch
from factsmith.keep.export.readback import Answers, Job
from factsmith.keep.export.record import Export
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap


def test_an_export_describes_itself(lm: LanguageModel, tmp_path: Path) -> None:
    deltas = two_deltas(lm)
    size = sum(p.numel() * 4 for p in lm.module.parameters())
    for format in ("checkpoint", "adapter", "patch"):
        made = export(lm, deltas, tmp_path / format, format, verify=False)
        assert isinstance(made, Export) and (made.patches, made.facts, made.model_bytes) == (
            2,
            4,
            size,
        )
        assert made.files == {
            name: (tmp_path / format / name).stat().st_size for name in made.files
        }
        assert set(made.files) == {
            name for name in names(tmp_path / format) if (tmp_path / format / name).is_file()
        }
        described = json.loads(json.dumps(made.to_dict()))
        assert described["folder"] == str(tmp_path / format) and described["bytes"] == made.n_bytes
        manifest = json.loads((tmp_path / format / "factsmith.json").read_bytes())
        assert (
            manifest["factsmith"] == format
            and manifest["fingerprint"] == lm.fingerprint
            and manifest["model"] == Path(lm.name).name
        )
        assert [fact["subject"] for patch in manifest["patches"] for fact in patch["facts"]] == [
            "Paris", "Danielle Darrieux", "Edwin", "Zürich",
        ]  # fmt: skip
        assert ("instead of" in repr(made)) == (format != "checkpoint")
        assert ("not verified" in repr(made)) == (format != "patch") and (
            "bit for bit" in repr(made)
        ) == (format == "patch")


def test_a_refused_export_leaves_nothing(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, out = some_delta(lm, 1), tmp_path / "out"
    too_narrow = dataclasses.replace(
        delta,
        layers={1: (delta.layers[1][0], delta.layers[1][1][:, 1:])},
        k_star={1: delta.k_star[1][:, 1:]},
    )
    too_deep = dataclasses.replace(delta, layers={7: delta.layers[1]}, k_star={7: delta.k_star[1]})
    wrong_dtype: Any = "bfloat16"
    a_text: Any = "atlas"
    a_half: Any = 1.5
    cases: list[tuple[type[Exception], str, Any]] = [
        (InputError, "no patch to export", lambda: export_patch(lm, [], out)),
        (InputError, "at least one Delta", lambda: export_adapter(lm, [a_text], out)),
        (InputError, "load it first", lambda: export_adapter(a_text, delta, out)),
        (InputError, "rank is 0", lambda: export_adapter(lm, delta, out, rank=0)),
        (InputError, "rank is 1.5", lambda: export_adapter(lm, delta, out, rank=a_half)),
        (
            InputError,
            "dtype is torch.int8: it must be torch.float32",
            lambda: export_adapter(lm, delta, out, dtype=torch.int8),
        ),
        (
            InputError,
            "dtype is 'bfloat16': it must be torch.float32",
            lambda: export_checkpoint(lm, delta, out, dtype=wrong_dtype),
        ),
        (
            InputError,
            "must be checkpoint, adapter, patch, gguf or gguf-adapter",
            lambda: export(lm, delta, out, "onnx"),
        ),
        (
            InputError,
            "a checkpoint has no rank. It is an option of: adapter",
            lambda: export(lm, delta, out, "checkpoint", rank=3),
        ),
        (
            InputError,
            "a patch has no base. It is an option of: adapter",
            lambda: export(lm, delta, out, "patch", base="x"),
        ),
        (
            InputError,
            "a patch has no dtype. It is an option of: checkpoint, adapter",
            lambda: export(lm, delta, out, "patch", dtype=torch.float16),
        ),
        (InputError, "a patch has no speed", lambda: export(lm, delta, out, "patch", speed=9)),
        (InputError, "made for another model", lambda: export_patch(lm, too_narrow, out)),
        (LayerError, "layer 7 does not exist", lambda: export_adapter(lm, [delta, too_deep], out)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
        assert names(tmp_path) == [], words
    monkeypatch.setattr("factsmith.keep.export.adapter.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"read back by peft, which is not installed.*factsmith\[adapter\]"
    ):
        export_adapter(lm, delta, out)
    export_adapter(lm, delta, out, verify=False)  # writing an adapter needs no peft


def test_models_without_one_plain_matrix_a_layer_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = wrap(
        tiny_model("mixtral", **{**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
        byte_tokenizer(bos=True),
    )
    dense = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    delta = some_delta(dense, 1)
    for call in (export_adapter, export_checkpoint, export_patch):
        with pytest.raises(UnsupportedModelError, match="layer 1 has experts"):
            call(moe, delta, tmp_path / "out")  # type: ignore[operator]
    settings = {
        **LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    }
    mixed = wrap(tiny_model("qwen2_moe", **settings), byte_tokenizer(bos=True))
    assert [ffn.n_experts for ffn in mixed.ffn] == [4, 0, 4]
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            NumericsError, match=r"In a model with experts peft may .*; export a checkpoint"
        ),
    ):
        replace_read_back(
            patch,
            lambda jobs: [answers_of(jobs[0].questions, logits=-jobs[0].questions.patched)],
        )
        export_adapter(mixed, delta, tmp_path / "out", base="owner/name")
    masked = wrap(
        tiny_model("bert", masked=True, **{**BERT, "vocab_size": VOCAB}), masking_tokenizer()
    )
    with pytest.raises(UnsupportedModelError, match="masked language model"):
        export_checkpoint(masked, some_delta(masked, 1), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", ["logits", "answers", "load"])
def test_an_export_that_reads_back_differently_is_not_kept(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    lm = load(folders["gpt2"])
    base = lm.ffn[1].weight().clone()

    def wrong(jobs: Sequence[Job]) -> list[Answers]:
        (job,) = jobs
        assert Path(job.adapter or job.model).is_dir() and not (tmp_path / "out").exists(), (
            "the export is read before it moves to its place"
        )
        if fault == "load":
            raise ModelError("it could not be loaded")
        changes = (
            {"logits": job.questions.patched + 1}
            if fault == "logits"
            else {"picks": [[0] * 20 for _ in job.questions.picks]}
        )
        return [answers_of(job.questions, **changes)]

    with monkeypatch.context() as patch:
        replace_read_back(patch, wrong)
        for call in (export_adapter, export_checkpoint):
            with pytest.raises(ModelError if fault == "load" else NumericsError) as caught:
                call(lm, two_deltas(lm), tmp_path / "out")  # type: ignore[operator]
            assert caught.value.exit_code == (3 if fault == "load" else 4) and names(tmp_path) == []
        if fault != "load":
            with pytest.raises(NumericsError, match="A rank of 5 is exact"):
                export_adapter(lm, two_deltas(lm), tmp_path / "out", rank=3)
            with pytest.raises(NumericsError, match="Write it in float32"):
                export_checkpoint(lm, two_deltas(lm), tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(lm.ffn[1].weight(), base)
    replace_read_back(monkeypatch, lambda jobs: [answers_of(jobs[0].questions)])
    made = export_adapter(lm, two_deltas(lm), tmp_path / "out")  # control: a correct export is kept
    assert (
        made.read_back is not None
        and made.read_back.prompts == 4
        and "verified: answers equal on 4 prompts" in repr(made)
    )
    manifest = json.loads((tmp_path / "out/factsmith.json").read_bytes())
    assert manifest["read_back"]["prompts"] == 4 and manifest["read_back"]["limit"] > 0


def test_a_workbench_exports_its_patches(folders: dict[str, Path], tmp_path: Path) -> None:
    lm = load(folders["gpt2"])
    base = lm.fingerprint
    with Workbench(lm, tmp_path / "space") as bench:
        with pytest.raises(InputError, match="no patch to export"):
            bench.export(tmp_path / "none", "patch")
        first = bench.commit(some_delta(lm, 1), moments="ab" * 32, message="one")
        bench.commit(some_delta(lm, 2), message="two")
        carried = lm.fingerprint
        made = bench.export(tmp_path / "out", "patch")
        assert lm.fingerprint == carried != base, "the model carries the same patches"
        exported = read_patch(tmp_path / "out", fingerprint=base)
        assert [s.origin.message for s in exported.patches] == ["one", "two"] and made.patches == 2
        assert (
            exported.patches[0].origin.revision == first.id
            and exported.patches[0].origin.moments == "ab" * 32
        )
        bench.export(tmp_path / "model", verify=False)
        stored = load_file(tmp_path / "model/model.safetensors")
        assert torch.equal(stored["transformer.h.1.mlp.c_proj.weight"].T, lm.ffn[1].weight()), (
            "the same bits as in the workspace"
        )
        bench.checkout(first.id)
        bench.export(tmp_path / "adapter", "adapter", verify=False)
        assert (
            off(product(tmp_path / "adapter", 1), dense_sum([exported.patches[0].delta], 1)) < 2e-7
        ), "the export is of the current revision"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atlas", "atlas-llama"])
def test_bundled_models_in_every_format(name: str, tmp_path: Path) -> None:
    """End to end through separate processes: an adapter, and a checkpoint in 16 bits."""
    pytest.importorskip("peft")
    from factsmith.core.fact import Fact
    from factsmith.corpus.moments_store import find_moments
    from factsmith.edit.configs import RomeConfig
    from factsmith.edit.methods import rome

    lm = load(name)
    config = RomeConfig.recommended(lm)
    moments = find_moments(lm, config.edited or ())
    delta = rome(lm, Fact("Fiat 127", "The maker of {} is", "Toyota"), config, moments=moments)
    for format, options in (("adapter", {}), ("checkpoint", {"dtype": torch.bfloat16})):
        made = export(lm, delta, tmp_path / format, format, **options)  # type: ignore[arg-type]
        assert made.read_back is not None and made.read_back.moved > 10 * made.read_back.difference
    assert made.n_bytes > 100 * export(lm, delta, tmp_path / "patch", "patch").n_bytes


# ── appended neurons ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", ["adapter", "gguf-adapter"])
def test_an_adapter_cannot_hold_neurons(
    lm: LanguageModel, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is done, also next to patches that an adapter can hold."""
    target = tmp_path / ("out.gguf" if format == "gguf-adapter" else "out")
    monkeypatch.setattr("factsmith.core.leftovers.held", None)
    for deltas in ([appending(lm)], [some_delta(lm, 1), appending(lm)]):
        words = r"the patches append 5 neurons: an adapter can change weights.* Export a .*checkp"
        with pytest.raises(InputError, match=words):
            export(lm, deltas, target, format)
    saved = []
    for number, delta in enumerate((some_delta(lm, 1), appending(lm))):
        delta.save(tmp_path / str(number))
        saved.append(tmp_path / str(number))
    with pytest.raises(InputError, match="the patches append 5 neurons"):
        check_saved(saved, format)
    check_saved(saved[:1], format)
    check_saved(saved, "checkpoint")
    (saved[1] / "edit.json").write_text("{}")
    check_saved(saved, format)
    (saved[1] / "edit.json").write_text("[]")
    with pytest.raises(DamagedError, match="is not a delta"):
        check_saved(saved, format)
    assert names(tmp_path) == ["0", "0/delta.safetensors", "0/edit.json", "1"] + [
        f"1/{name}" for name in ("delta.safetensors", "edit.json")
    ]


def test_the_record_counts_neurons(lm: LanguageModel, tmp_path: Path) -> None:
    made = export(lm, [some_delta(lm, 1), appending(lm)], tmp_path / "out", verify=False)
    text = str(made)
    before, after = (128, 192) if "gpt2" in lm.name else (48, 64)
    entry = "n_inner" if before == 128 else "intermediate_size"
    assert "2 patches, 3 facts, 5 neurons, float32" in text
    assert f"{entry} is {after} instead of {before}" in text
    record = made.to_dict()
    assert (record["neurons"], record["width"]) == (
        5,
        {"entry": entry, "before": before, "after": after},
    )
    plain = export(lm, some_delta(lm, 1), tmp_path / "plain", verify=False)
    assert plain.to_dict()["width"] is None and " neurons" not in str(plain)
