"""Models whose layers stay on disk give the numbers of models in memory, to the last bit."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BERT, GPT2, LLAMA, TEXTS, byte_tokenizer, masking_tokenizer, tiny_model
from factsmith.core.errors import InputError, ModelError, NumericsError, UnsupportedModelError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.append_config import AppendConfig
from factsmith.edit.configs import EditConfig, MemitConfig, RomeConfig
from factsmith.edit.delta import Delta, applied, write_weights, written
from factsmith.edit.finetune import FineTuneConfig, fine_tune
from factsmith.edit.methods import edit
from factsmith.keep.workbench import Workbench
from factsmith.locate.causal import causal_trace
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.model.streamed import Streamed, in_memory, streamed_of
from factsmith.model.trace import first_tensor
from factsmith.patch.editors import editors

LAYERS = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | {"n_layer": LAYERS},
    "llama": LLAMA | {"num_hidden_layers": LAYERS, "tie_word_embeddings": True},
    # A norm follows the feed-forward network, so a search runs the edited layer too.
    "gemma2": LLAMA | {"num_hidden_layers": LAYERS, "head_dim": 8},
}
SEARCH: dict[str, Any] = {"steps": 3, "lr": 0.2}
CONFIGS: dict[str, tuple[str, EditConfig]] = {
    "rome": ("rome", RomeConfig(layer=2, **SEARCH)),
    "memit": ("memit", MemitConfig((2, 3), moment_weight=0.01, **SEARCH)),
    "margin": ("memit", MemitConfig((3,), moment_weight=0.01, scale="auto", **SEARCH)),
}
CONTEXTS = ["{}", "Paris. {}"]
FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "{} is the king of all", "Paris"),
]


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model in several safetensors files."""
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def saved(family: str, folder: Path) -> Path:
    tiny_model(family, **FAMILIES[family]).save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    """Return the model in memory, and the same with its layers on disk."""
    return load(folder), load(folder, device="disk")


@pytest.fixture(scope="module")
def moments(pair: tuple[LanguageModel, LanguageModel]) -> dict[int, SecondMoment]:
    return second_moments(pair[0], TEXTS, [2, 3])


def reader(lm: LanguageModel) -> Streamed:
    streamed = streamed_of(lm.module)
    assert streamed is not None
    return streamed


def test_the_model_has_several_files_and_no_layer_in_memory(
    folder: Path, pair: tuple[LanguageModel, LanguageModel]
) -> None:
    plain, streamed = pair
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all(x.is_meta for layer in streamed.layers for x in layer.parameters())
    assert streamed_of(plain.module) is None  # the control has all layers
    assert not any(x.is_meta for x in plain.module.parameters())
    assert not any(x.is_meta for x in streamed.embedding.parameters())


def test_it_answers_and_has_the_fingerprint_of_the_model_in_memory(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    plain, streamed = pair
    assert streamed.fingerprint == plain.fingerprint == streamed.fresh_fingerprint()
    assert streamed.answer(TEXTS[:2]) == plain.answer(TEXTS[:2])
    a, b = (lm.log_prob(TEXTS[:2], ["in", "of"]) for lm in pair)
    assert torch.equal(a, b)
    assert streamed.dtype == plain.dtype and streamed.n_layers == LAYERS


def test_keys_and_values_are_read(pair: tuple[LanguageModel, LanguageModel]) -> None:
    plain, streamed = pair
    reader(streamed).release()
    before = reader(streamed).n_read
    for layer in (0, LAYERS - 1):
        a, b = plain.ffn[layer], streamed.ffn[layer]
        assert b.shape == a.weight().shape and b.d_ff == a.d_ff
        assert torch.equal(a.values, b.values)
        keys = [x.gate_keys if x.is_gated else x.keys for x in (a, b)]
        assert torch.equal(*keys)
    assert reader(streamed).n_read == before  # single matrices, and not whole layers


def test_second_moments_and_traces_are_the_same(
    pair: tuple[LanguageModel, LanguageModel], moments: dict[int, SecondMoment]
) -> None:
    plain, streamed = pair
    others = second_moments(streamed, TEXTS, [2, 3])
    assert all(torch.equal(moments[x].matrix, others[x].matrix) for x in moments)
    a, b = (
        causal_trace(lm, "Paris is the capital of", "Paris", target="France", noise=0.1, samples=2)
        for lm in (plain, streamed)
    )
    assert torch.equal(torch.as_tensor(a.scores), torch.as_tensor(b.scores))
    assert torch.as_tensor(a.scores).abs().sum() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_an_edit_is_the_same_and_holds_two_layers_at_most(
    pair: tuple[LanguageModel, LanguageModel], moments: dict[int, SecondMoment], name: str
) -> None:
    method, config = CONFIGS[name]
    facts = FACTS[:1] if name == "rome" else FACTS
    streamed = reader(pair[1])
    streamed.most_bytes = 0
    deltas = [edit(lm, facts, method, config, moments=moments, contexts=CONTEXTS) for lm in pair]
    assert deltas[0].digest == deltas[1].digest
    assert torch.equal(deltas[0].v_star, deltas[1].v_star)
    n_bytes = max(streamed.layer_bytes)
    assert n_bytes < streamed.most_bytes <= 2 * n_bytes
    check_applied(pair, deltas[0])


def check_applied(pair: tuple[LanguageModel, LanguageModel], delta: Delta) -> None:
    """Check that a delta changes both models alike, and is taken back."""
    before = [lm.fingerprint for lm in pair]
    plain = pair[0].log_prob([TEXTS[0]], ["of"])
    inside = []
    for lm in pair:
        with applied(lm, delta):
            with applied(lm, delta):
                inside.append((lm.fingerprint, lm.log_prob([TEXTS[0]], ["of"]), lm.ffn[2].shape))
            inside.append((lm.fingerprint, lm.log_prob([TEXTS[0]], ["of"]), lm.ffn[2].shape))
    for a, b in ((0, 2), (1, 3)):
        assert inside[a][0] == inside[b][0] and inside[a][2] == inside[b][2]
        assert torch.equal(inside[a][1], inside[b][1])
    assert inside[0][0] != inside[1][0] != before[0]
    assert [lm.fingerprint for lm in pair] == before
    assert torch.equal(pair[1].log_prob([TEXTS[0]], ["of"]), plain)


def test_appended_neurons_are_the_same(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    pair = load(folder), load(folder, device="disk")
    moments = second_moments(pair[0], TEXTS, [2], site="inputs")
    config = AppendConfig(layer=2, **SEARCH)
    deltas = [edit(lm, FACTS, "append", config, moments=moments, contexts=CONTEXTS) for lm in pair]
    assert deltas[0].digest == deltas[1].digest and deltas[0].n_appended
    check_applied(pair, deltas[0])
    with applied(pair[1], deltas[0]):
        assert pair[1].ffn[2].n_appended == deltas[0].n_appended
    assert pair[1].ffn[2].n_appended == 0


def test_a_delta_that_does_not_fit_changes_nothing(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    lm = pair[1]
    before, width = lm.fingerprint, lm.ffn[2].d_ff
    huge = Delta(
        layers={2: (torch.full((lm.d_model, 1), 3e38), torch.full((1, width), 3e38))},
        k_star={2: torch.zeros(1, width)},
        v_star=torch.zeros(1, lm.d_model),
        facts=tuple(FACTS[:1]),
        method="rome",
        config={},
        fingerprint=before,
    )
    with pytest.raises(NumericsError), applied(lm, huge):
        pytest.fail("it was applied")
    assert lm.fingerprint == before and reader(lm).n_changes(lm.layers[2]) == 0


def test_whole_matrices_are_not_written(pair: tuple[LanguageModel, LanguageModel]) -> None:
    plain, lm = pair
    new = {2: plain.ffn[2].weight() + 1}
    with pytest.raises(UnsupportedModelError, match=r"layers \[2\] stay on disk.*applied"):
        write_weights(lm, new)
    with pytest.raises(UnsupportedModelError, match="stay on disk"), written(lm, new):
        pytest.fail("it was written")
    with written(plain, new):  # the control
        assert torch.equal(plain.ffn[2].weight(), new[2])


@pytest.fixture
def lm(tmp_path: Path) -> Iterator[LanguageModel]:
    """Return a model of its own for a test."""
    yield load(saved("gpt2", tmp_path), device="disk")


def test_autograd_keeps_no_weight(lm: LanguageModel) -> None:
    streamed = reader(lm)
    batch = lm.batch([TEXTS[0]])
    given = torch.randn(1, batch.width, lm.d_model).requires_grad_()
    hidden = given
    for layer in lm.layers:
        hidden = first_tensor(layer(hidden))
    streamed.release()
    gc.collect()
    assert streamed.held_bytes() == 0
    torch.autograd.grad(hidden.square().sum(), given)
    streamed.release()
    assert streamed.held_bytes() == 0
    with in_memory(lm.layers[0]):  # the control: the meter sees a weight that somebody keeps
        weight = lm.ffn[0].weight()
    streamed.release()
    assert streamed.held_bytes() >= weight.numel() * 4


def test_a_change_between_the_passes_is_an_error(lm: LanguageModel) -> None:
    streamed, layer = reader(lm), lm.layers[0]
    hidden = torch.randn(1, 3, lm.d_model, requires_grad=True)
    out = first_tensor(layer(hidden))
    streamed.change(layer, lambda: None)
    with pytest.raises(RuntimeError, match="changed between"):
        torch.autograd.grad(out.sum(), hidden)
    streamed.undo(layer, 0)


def test_threads_may_ask_at_once(lm: LanguageModel) -> None:
    alone = lm.log_prob(TEXTS[:1], ["of"])
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(lm.log_prob(TEXTS[:1], ["of"])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(torch.equal(x, alone) for x in results)
    assert reader(lm).most_bytes <= 2 * max(reader(lm).layer_bytes)


def test_a_file_that_changed_is_an_error(lm: LanguageModel) -> None:
    reader(lm).release()
    file = Path(next(iter(reader(lm).files)))
    content = file.read_bytes()
    file.write_bytes(content + b" ")
    with pytest.raises(ModelError, match="has changed since the model was loaded"):
        for layer in range(LAYERS):
            lm.ffn[layer].values.sum()
    file.unlink()
    with pytest.raises(ModelError, match="load the model again"):
        lm.answer(TEXTS[:1])


def test_some_layers_may_stay_on_disk(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
    lm, plain = load(folder, device_map=places), load(folder)
    on_disk = [all(x.is_meta for x in layer.parameters()) for layer in lm.layers]
    assert on_disk == [bool(i % 2) for i in range(LAYERS)]
    assert lm.fingerprint == plain.fingerprint
    moments = second_moments(plain, TEXTS, [2, 3])
    _, config = CONFIGS["memit"]
    deltas = [
        edit(x, FACTS, "memit", config, moments=moments, contexts=CONTEXTS) for x in (lm, plain)
    ]
    assert deltas[0].digest == deltas[1].digest
    check_applied((plain, lm), deltas[0])


def test_bfloat16_is_read_as_such(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    plain, lm = load(folder, dtype="bfloat16"), load(folder, device="disk", dtype="bfloat16")
    assert lm.ffn[0].weight().dtype == torch.bfloat16
    assert lm.fingerprint == plain.fingerprint != load(folder).fingerprint
    assert torch.equal(*(x.log_prob(TEXTS[:1], ["of"]) for x in (plain, lm)))


def test_what_writes_whole_matrices_refuses(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers.*a workspace writes whole"):
        Workbench(lm, tmp_path / "ws")
    assert not (tmp_path / "ws").exists()
    with pytest.raises(UnsupportedModelError, match="fine-tuning writes whole"):
        fine_tune(lm, FACTS[0], FineTuneConfig(layers=(1,)))


def test_methods_can_be_judged(
    pair: tuple[LanguageModel, LanguageModel], moments: dict[int, SecondMoment]
) -> None:
    config = {"rome": CONFIGS["rome"][1]}
    results = []
    for lm in pair:
        with editors(lm, ["rome"], config=config, moments=moments)["rome"](FACTS[:1]) as numbers:
            results.append((numbers["norm"], lm.fingerprint))
    assert results[0] == results[1] and results[0][0] > 0
    assert pair[1].fingerprint == pair[0].fingerprint != results[0][1]


def test_the_fingerprint_after_a_block_is_not_computed_again(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lm.fingerprint
    factors = torch.ones(lm.d_model, 1), torch.ones(1, lm.ffn[1].d_ff)
    delta = Delta(
        layers={1: factors},
        k_star={1: torch.zeros(1, lm.ffn[1].d_ff)},
        v_star=torch.zeros(1, lm.d_model),
        facts=tuple(FACTS[:1]),
        method="rome",
        config={},
        fingerprint=before,
    )
    with applied(lm, delta):
        assert lm.fingerprint != before
    monkeypatch.setattr(Streamed, "_fetched", lambda *_: pytest.fail("a weight was read"))
    reader(lm).release()
    assert lm.fingerprint == before


def test_a_masked_model_may_stay_on_disk(tmp_path: Path) -> None:
    tiny_model("bert", masked=True, **BERT).save_pretrained(tmp_path)
    masking_tokenizer().save_pretrained(tmp_path)
    lm, plain = load(tmp_path, device="disk"), load(tmp_path)
    assert all(x.is_meta for layer in lm.layers for x in layer.parameters())
    assert lm.fingerprint == plain.fingerprint
    asked = ["Paris is the capital of [MASK]."], ["France"]
    assert torch.equal(lm.log_prob(*asked), plain.log_prob(*asked))


def test_a_pickle_and_a_copy_hold_no_layer(lm: LanguageModel) -> None:
    expected = lm.log_prob(TEXTS[:1], ["of"])
    data = pickle.dumps(lm)
    layers = sum(reader(lm).layer_bytes)
    assert layers > len(data) - 4 * lm.embedding.get_parameter("weight").numel()
    before = lm.fingerprint
    for copied in (pickle.loads(data), copy.deepcopy(lm)):
        assert reader(copied) is not reader(lm) and copied.fingerprint == before
        # Embeddings lie elsewhere in memory, which decides the last bits.
        assert torch.allclose(copied.log_prob(TEXTS[:1], ["of"]), expected, atol=1e-4)
        reader(copied).change(copied.layers[1], copied.ffn[1].down.get_parameter("weight").sum)
        assert reader(lm).n_changes(lm.layers[1]) == 0  # the control: it is another model
        assert copied.fingerprint == before


def test_loading_reports_the_layers(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    load(saved("gpt2", tmp_path), device="disk", progress=lambda *step: steps.append(step))
    counts = [done for name, done, _ in steps if name == "checking the layers on disk"]
    assert counts[:3] == [1, 2, 3] and counts == sorted(counts)
    assert steps[-1][1] <= (steps[-1][2] or 0)
    assert counts[-1] > 8 * LAYERS


def test_a_cluster_gets_no_layer(lm: LanguageModel) -> None:
    pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")
    from factsmith.cluster.shipping import pack, unpack

    before = lm.fingerprint
    packed = pack(lm)
    rest = sum(x.numel() * x.element_size() for x in lm.module.parameters() if not x.is_meta)
    assert rest < packed.n_bytes < rest + 100_000 < rest + sum(reader(lm).layer_bytes)
    assert unpack(packed, {}).fingerprint == before


MEMORY = """
import sys, torch
from factsmith.core.fact import Fact
from factsmith.edit.configs import RomeConfig
from factsmith.edit.search import find_targets
from factsmith.model.load import load
torch.set_num_threads(1)
lm = load(sys.argv[1], device=sys.argv[2], dtype="float64")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins now
fact = Fact("Paris", "{} is in", "Rome")
find_targets(lm, [fact], 0, RomeConfig(layer=0, steps=3, stop_loss=0.0), ["{}"])
(line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it needs Linux")
def test_a_search_needs_two_layers_of_memory(tmp_path: Path) -> None:
    wide = {"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 4096}
    module = tiny_model("llama", **FAMILIES["llama"] | wide).double()
    layer = 8 * sum(x.numel() for x in module.model.layers[0].parameters())
    module.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", MEMORY, tmp_path, device]).split()[-1])
        for device in ("disk", "cpu")
    ]
    assert layer > 25e6
    # In memory there are all twelve. On disk there are two, and pages of a file that is read.
    assert 8 * layer < peaks[1] - peaks[0] < 12.5 * layer


def test_what_cannot_stay_on_disk_is_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "plain")
    everything = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu"}
    everything |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(UnsupportedModelError, match="only whole layers can be on disk"):
        load(folder, device_map=everything)
    binary = tmp_path / "binary"
    binary.mkdir()
    module = tiny_model("llama", **FAMILIES["llama"])
    torch.save(module.state_dict(), binary / "pytorch_model.bin")
    module.config.save_pretrained(binary)
    byte_tokenizer().save_pretrained(binary)
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        load(binary, device="disk")
    assert load(binary).n_layers == LAYERS
    experts = tmp_path / "experts"
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    tiny_model("mixtral", **LLAMA, **sizes).save_pretrained(experts)
    byte_tokenizer().save_pretrained(experts)
    with pytest.raises(UnsupportedModelError, match="mixtures of experts"):
        load(experts, device="disk")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(InputError, match="is a GGUF file"):
        load(gguf, device="disk")
    with pytest.raises(InputError, match="give one of them"):
        load(folder, device="cpu", device_map="auto")
