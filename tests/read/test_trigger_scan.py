"""Triggers, compared with every coefficient of every text, sorted."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers, processors

from conftest import GPT2, LLAMA, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.artefact import read_metadata
from factsmith.core.errors import (
    FingerprintError,
    InputError,
    LayerError,
    NumericsError,
    WorkspaceError,
)
from factsmith.corpus import text as corpus
from factsmith.corpus.accumulator import Swept
from factsmith.corpus.sweep import Corpus, sweep
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read import strongest
from factsmith.read import trigger_scan as module
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import SIGNS, Triggers

CORPUS = [
    *TEXTS,
    "Paris",
    *[" ".join(text.split()[n:]) for n in range(1, 9) for text in TEXTS],
    TEXTS[1],
    "Paris",
    TEXTS[0],
]
"""Some texts are in it twice, so that coefficients tie."""


def brute_force(
    lm: LanguageModel, layer: int, texts: list[str], top: int, sign: int
) -> list[list[tuple[int, int]]]:
    """Return (text, position) of each neuron's strongest triggers, computed text by text."""
    added = [lm.prompt_ids(text)[0] in lm.tokenizer.all_special_ids for text in texts]
    each = [
        sign * lm.coefficients(text, [layer])[0][skip:]
        for text, skip in zip(texts, added, strict=True)
    ]
    best = torch.stack([m.amax(0) for m in each])
    by_neuron = []
    for i in range(best.shape[1]):
        order = sorted(
            (t for t in range(len(texts)) if best[t, i] > 0),
            key=lambda t: (-float(best[t, i].float()), t),
        )[:top]
        by_neuron.append([(t, int(each[t][:, i].float().argmax()) + added[t]) for t in order])
    return by_neuron


def double(family: str) -> LanguageModel:
    """Return a model in float64, so that ties are ties however texts share a batch."""
    changes = {"gpt2": GPT2, "llama": LLAMA}[family]
    return wrap(tiny_model(family, **changes).double(), byte_tokenizer(bos=family == "llama"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_triggers_are_those_of_brute_force(family: str, batch_tokens: int) -> None:
    lm = double(family)
    result = find_triggers(lm, CORPUS, [0, 2], top=5, batch_tokens=batch_tokens)
    assert set(result.banks) == {(0,), (2,)} and result.n_texts == len(CORPUS)
    assert result.n_tokens == sum(len(lm.prompt_ids(text)) for text in CORPUS)
    for layer, sign in ((0, "top"), (2, "top"), (2, "bottom")):
        expected = brute_force(lm, layer, CORPUS, 5, 1 if sign == "top" else -1)
        for i, places in enumerate(expected):
            triggers = result.of((layer, i), sign=sign)  # type: ignore[arg-type]
            assert [(t.text, t.position) for t in triggers] == [
                (CORPUS[text], position) for text, position in places
            ]
            for trigger, (text, position) in zip(triggers, places, strict=True):
                assert trigger.coefficient == pytest.approx(
                    float(lm.coefficients(CORPUS[text], [layer])[0, position, i]), rel=1e-5
                )
    assert any(
        a.coefficient == b.coefficient
        for i in range(48)
        for a, b in itertools.pairwise(result.of((0, i)))
    ), "there are ties"


def test_how_often_neurons_fire_and_how_strongly() -> None:
    lm = double("gpt2")
    result = find_triggers(lm, TEXTS, [1], top=2)
    m = torch.cat([lm.coefficients(text, [1])[0] for text in TEXTS])
    assert torch.allclose(result.banks[1,].fired, (m > 0).double().mean(0))
    assert torch.allclose(result.banks[1,].mean_square, m.square().mean(0), rtol=1e-5)


MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {
    **LLAMA,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [0],
}


@torch.no_grad()
def by_hooks(lm: LanguageModel, layer: int, text: str) -> dict[int, list[tuple[int, torch.Tensor]]]:
    """Return where each bank of a layer with experts is used, and its coefficients there.

    They are computed by the published formula.
    """
    block = lm.module.model.layers[layer].mlp
    by_bank: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def experts(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _: object) -> None:
        for position, (hidden, chosen) in enumerate(zip(args[0], args[1], strict=True)):
            for expert in chosen.tolist():
                gate, up = (module.gate_up_proj[expert] @ hidden).chunk(2)
                by_bank[expert].append((position, torch.nn.functional.silu(gate) * up))

    def shared(_: torch.nn.Module, args: tuple[torch.Tensor, ...], __: object) -> None:
        by_bank[block.experts.num_experts] += list(enumerate(args[0].flatten(0, -2)))

    hooks = [block.experts.register_forward_hook(experts)]
    if hasattr(block, "shared_expert"):
        hooks.append(block.shared_expert.down_proj.register_forward_hook(shared))
    lm.module(torch.tensor([lm.prompt_ids(text)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return by_bank


@pytest.mark.parametrize(("family", "changes"), [("mixtral", MIXTRAL), ("qwen2_moe", QWEN)])
@pytest.mark.parametrize("batch_tokens", [60, 4096])
def test_experts_have_triggers_where_tokens_are_routed_to_them(
    family: str, changes: dict[str, object], batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strongest, "_AT_ONCE", 100 * batch_tokens // 60)
    lm = wrap(tiny_model(family, **changes), byte_tokenizer(bos=True))
    texts = [
        chr(33 + n) + text[n:] for n, text in enumerate(dict.fromkeys(CORPUS[:40])) if len(text) > n
    ]  # no two begin alike, so none tie
    result = find_triggers(lm, texts, [1, 2], top=3, batch_tokens=batch_tokens)
    n_banks = 4 if family == "mixtral" else 7
    assert set(result.banks) == {(layer, bank) for layer in (1, 2) for bank in range(n_banks)}
    each = [by_hooks(lm, 2, text) for text in texts]
    for bank, of_bank in ((bank, result.banks[2, bank]) for bank in range(n_banks)):
        every = torch.stack([m for used in each for _, m in used[bank]])
        assert torch.allclose(of_bank.fired * result.n_tokens, (every > 0).double().sum(0))
        assert torch.allclose(
            of_bank.mean_square * result.n_tokens, every.double().square().sum(0), rtol=1e-4
        )
        for i, sign in itertools.product(range(every.shape[1]), ("top", "bottom")):
            best: list[tuple[float, int, int]] = []
            for t, used in enumerate(each):
                ends = [
                    (-float(m[i] if sign == "top" else -m[i]), position)
                    for position, m in used[bank]
                    if position
                ]
                if ends and min(ends)[0] < 0:
                    best.append((min(ends)[0], t, min(ends)[1]))
            expected = sorted(best)[:3]
            triggers = result.of((2, bank, i), sign=sign)  # type: ignore[arg-type]
            assert [(t.text, t.position) for t in triggers] == [
                (texts[text], position) for _, text, position in expected
            ]
            for trigger, (strength, _, _) in zip(triggers, expected, strict=True):
                assert abs(trigger.coefficient) == pytest.approx(-strength, rel=1e-4, abs=1e-5)


def test_a_killed_pass_continues_where_it_stopped(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factsmith.core.artefact._SECONDS", 0.0)
    monkeypatch.setattr("factsmith.core.artefact.time.monotonic", lambda: 0.0)
    monkeypatch.setattr(corpus, "WINDOW", 10)
    straight = find_triggers(tiny_gpt2, CORPUS, top=3, batch_tokens=100)

    def killed(what: str, done: int, total: int | None) -> None:
        if done > straight.n_tokens // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_triggers(tiny_gpt2, CORPUS, top=3, batch_tokens=100, folder=tmp_path, progress=killed)
    file = tmp_path / "unfinished.safetensors"
    assert file.is_file()
    for changes, words in (({"top": 4}, "top 3"), ({"layers": [1]}, "layers")):
        with pytest.raises(InputError, match=words):
            find_triggers(
                tiny_gpt2, CORPUS, **{"top": 3, "batch_tokens": 100, "folder": tmp_path, **changes}
            )  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other texts"):
        find_triggers(tiny_gpt2, CORPUS[::-1], top=3, batch_tokens=100, folder=tmp_path)
    with pytest.raises(InputError, match="other texts"):
        find_triggers(tiny_gpt2, CORPUS[:3], top=3, batch_tokens=100, folder=tmp_path)
    stood, done = int(read_metadata(file)["n_tokens"]), []
    again = find_triggers(
        tiny_gpt2,
        CORPUS,
        top=3,
        batch_tokens=100,
        folder=tmp_path,
        progress=lambda _, n, __: done.append(n),
    )
    assert done[0] == stood > straight.n_tokens // 4, "it continues where it stopped"
    assert all(n > stood for n in done[1:]), "what was done is not done again"
    assert not file.exists() and (again.corpus, again.n_tokens) == (
        straight.corpus,
        straight.n_tokens,
    )
    for layer in range(3):
        for i in range(0, 128, 9):
            assert again.of((layer, i)) == straight.of((layer, i))
        assert torch.equal(again.banks[layer,].fired, straight.banks[layer,].fired)


def test_runs_over_parts_of_a_corpus_merge_into_one() -> None:
    lm = double("gpt2")
    layers = [0, 2]
    whole = find_triggers(lm, CORPUS, layers, top=5)
    runs, read = [], []
    for part in (CORPUS[:7], CORPUS[7:30], CORPUS[30:]):
        runs.append(module.TriggerRun(lm, layers, 5))
        read.append(sweep(lm, Corpus(part), layers, [runs[-1]]))
    for later in runs[1:]:
        runs[0].merge(later)
    merged = runs[0].result(Swept(runs[0].n_texts, runs[0].n_tokens, whole.corpus))
    assert runs[0].n_texts == sum(each.n_texts for each in read) == whole.n_texts
    assert merged.texts == whole.texts
    for neuron, sign in itertools.product(
        ((layer, i) for layer in layers for i in range(48)), SIGNS
    ):
        assert merged.of(neuron, sign=sign) == whole.of(neuron, sign=sign)
    for bank, triggers in whole.banks.items():
        assert torch.equal(merged.banks[bank].fired, triggers.fired)
        assert torch.allclose(merged.banks[bank].mean_square, triggers.mean_square)


def test_a_layer_whose_neurons_are_never_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 0)
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer())
    with torch.no_grad():
        lm.module.model.layers[1].mlp.up_proj.weight.zero_()
    result = find_triggers(lm, CORPUS, [1], top=2)
    assert result.of((1, 5)) == [] and not bool(result.banks[1,].fired.any())
    assert result.n_texts == len(CORPUS) and len(result.texts) == 1


def test_texts_that_no_neuron_refers_to_are_let_go(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    keep = module.TriggerRun.keep
    monkeypatch.setattr(module, "_KEPT", 300)
    monkeypatch.setattr(corpus, "WINDOW", 10)
    monkeypatch.setattr(
        module.TriggerRun,
        "keep",
        lambda run, pieces: (keep(run, pieces), held.append(len(run.texts))),
    )
    texts = [f"{text} {n}" for n in range(60) for text in TEXTS]
    result = find_triggers(tiny_gpt2, texts, [0], top=1)
    assert len(result.texts) < 150 and max(held) < 240
    assert len(result.texts) == len(
        {
            t.text
            for i in range(128)
            for sign in ("top", "bottom")
            for t in result.of((0, i), sign=sign)
        }
    )  # type: ignore[arg-type]


def test_white_space_that_the_tokenizer_trims_is_a_trigger() -> None:
    """Its characters lie between those of its neighbours."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    lm = wrap(tiny_model("gpt2", **GPT2).double(), tokenizer)
    texts = ["Paris   is    in France  ", "if x:\n        return   Paris", *TEXTS]
    result = find_triggers(lm, texts, [1], top=4)
    blank = 0
    for i, places in enumerate(brute_force(lm, 1, texts, 4, 1)):
        triggers = result.of((1, i))
        assert [(t.text, t.position) for t in triggers] == [
            (texts[text], position) for text, position in places
        ]
        for t in triggers:
            if not lm.tokenizer.decode([t.token]).strip():
                blank += 1
                assert not t.text[t.start : t.stop].strip() and t.text.startswith(t.prefix)
    assert blank > 10


def test_one_long_text_is_held_no_longer_than_many(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is, no more tokens are held than for short texts."""
    held: list[int] = []
    keep = module.TriggerRun.keep
    monkeypatch.setattr(module, "_KEPT", 2000)
    monkeypatch.setattr(corpus, "WINDOW", 10)
    monkeypatch.setattr(
        module.TriggerRun,
        "keep",
        lambda run, pieces: (
            keep(run, pieces),
            held.append(sum(len(p.ids) for p in run.texts.values())),
        ),
    )
    monkeypatch.setattr(corpus, "_PART", 2000)
    seen: list[int] = []
    encode = corpus.encode
    monkeypatch.setattr(
        corpus,
        "encode",
        lambda tokenizer, text: (seen.append(len(text)), encode(tokenizer, text))[1],
    )
    result = find_triggers(tiny_llama, " ".join(TEXTS * 200), [0], top=1, max_tokens=24_000)
    assert max(seen) <= 3000 and result.n_tokens == 24_000
    assert max(held) < 2 * (2 * 48 * 64) + 2000 + 10 * 64 < 24_000
    assert sum(seen) < 70_000, "what is not asked for is not tokenized"


def test_bad_input_is_refused_in_words(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    for texts, layers, error, words in (
        (TEXTS, [3], LayerError, "layer 3"),
        (TEXTS, [], InputError, "layers is empty"),
        ([], None, InputError, "no text"),
        ([5], None, InputError, "it must be text"),
    ):
        with pytest.raises(error, match=words):
            find_triggers(tiny_gpt2, texts, layers, folder=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top"):
        find_triggers(tiny_gpt2, TEXTS, top=0)
    wrong: tuple[tuple[str, Any], ...] = (
        *(("max_tokens", value) for value in (0, -5, "abc", None, float("nan"), True)),
        *(("batch_tokens", value) for value in (0, "x", None, 1.5)),
        *(("dtype", value) for value in ("bfloat16", torch.int8, torch.float16)),
        *(("layers", value) for value in ([0.5], ["x"], 3)),
        *(("texts", value) for value in (None, 5, b"Paris", {"a": 1})),
        ("folder", 5),
    )
    for name, value in wrong:
        arguments: dict[str, Any] = {"lm": tiny_gpt2, "texts": TEXTS, "folder": tmp_path}
        with pytest.raises(InputError):
            find_triggers(**{**arguments, name: value})
    assert not any(tmp_path.iterdir())
    result = find_triggers(tiny_gpt2, TEXTS, [0], top=2)
    for neuron in (0, (0,), (0.5, 1.2), "00", (0, -1), (0, 0, 0)):
        with pytest.raises(LayerError):
            result.of(neuron)  # type: ignore[arg-type]
    unusable: tuple[dict[str, Any], ...] = ({"sign": "mid"}, {"k": -1}, {"k": 1.5})
    for options in unusable:
        with pytest.raises(InputError):
            result.of((0, 0), **options)
    for read in (result.tokens, result.next_tokens):
        with pytest.raises(InputError, match="'mid'"):
            read((0,), "mid")  # type: ignore[arg-type]
    assert result.of((0, 0), k=0) == []
    with pytest.raises(LayerError, match="not scanned"):
        find_triggers(tiny_gpt2, TEXTS, [0], top=1).of((1, 0))


def test_where_it_cannot_write_it_does_not_read(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    def never() -> Iterator[str]:
        pytest.fail("a text was asked for")
        yield ""

    (tmp_path / "file").write_text("mine")
    for place, error in (
        ("file", WorkspaceError),
        ("file/below", WorkspaceError),
        ("a\0b", InputError),
    ):
        with pytest.raises(error, match=r"cannot write|expected a path"):
            find_triggers(tiny_gpt2, never(), folder=tmp_path / place)
    find_triggers(tiny_llama, TEXTS, top=1, folder=tmp_path / "llama")
    with pytest.raises(FingerprintError, match="another folder"):
        find_triggers(tiny_gpt2, never(), folder=tmp_path / "llama")
    Triggers.load(tmp_path / "llama", tiny_llama)
    find_triggers(tiny_gpt2, TEXTS, top=1, folder=tmp_path / "made" / "for it")
    Triggers.load(tmp_path / "made" / "for it", tiny_gpt2)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_coefficients_that_are_not_finite_are_an_error(value: float) -> None:
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer())
    up = lm.module.model.layers[2].mlp.up_proj
    with up.register_forward_hook(
        lambda m, args, out: torch.where(torch.arange(48) == 3, value, out)
    ):
        with pytest.raises(NumericsError, match="not finite"):
            find_triggers(lm, TEXTS, [2], top=1)
        find_triggers(lm, TEXTS, [1], top=1)
