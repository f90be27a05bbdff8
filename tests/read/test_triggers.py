"""Triggers against brute force: every coefficient of every text, sorted."""

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
from factsmith.core.errors import (
    DamagedError,
    FingerprintError,
    InputError,
    LayerError,
    NumericsError,
    WorkspaceError,
)
from factsmith.corpus import text as corpus
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read import strongest
from factsmith.read import trigger_scan as module
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import Trigger, Triggers

CORPUS = [
    *TEXTS,
    "Paris",
    *[" ".join(text.split()[n:]) for n in range(1, 9) for text in TEXTS],
    TEXTS[1],
    "Paris",
    TEXTS[0],
]
"""With texts that stand in it twice, so that coefficients tie."""


def brute_force(
    lm: LanguageModel, layer: int, texts: list[str], top: int, sign: int
) -> list[list[tuple[int, int]]]:
    """For each neuron (text, position) of its strongest triggers, computed one text at a time."""
    added = [lm.prompt_ids(text)[0] in lm.tokenizer.all_special_ids for text in texts]
    each = [
        sign * lm.coefficients(text, [layer])[0][skip:]
        for text, skip in zip(texts, added, strict=True)
    ]
    best = torch.stack([m.amax(0) for m in each])
    found = []
    for i in range(best.shape[1]):
        order = sorted(
            (t for t in range(len(texts)) if best[t, i] > 0),
            key=lambda t: (-float(best[t, i].float()), t),
        )[:top]
        found.append([(t, int(each[t][:, i].float().argmax()) + added[t]) for t in order])
    return found


def double(family: str) -> LanguageModel:
    """In float64, so that ties are ties however texts share a batch."""
    changes = {"gpt2": GPT2, "llama": LLAMA}[family]
    return wrap(tiny_model(family, **changes).double(), byte_tokenizer(bos=family == "llama"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_triggers_are_those_of_brute_force(family: str, batch_tokens: int) -> None:
    lm = double(family)
    found = find_triggers(lm, CORPUS, [0, 2], top=5, batch_tokens=batch_tokens)
    assert set(found.banks) == {(0,), (2,)} and found.n_texts == len(CORPUS)
    assert found.n_tokens == sum(len(lm.prompt_ids(text)) for text in CORPUS)
    for layer, sign in ((0, "top"), (2, "top"), (2, "bottom")):
        expected = brute_force(lm, layer, CORPUS, 5, 1 if sign == "top" else -1)
        for i, places in enumerate(expected):
            triggers = found.of((layer, i), sign=sign)  # type: ignore[arg-type]
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
        for a, b in itertools.pairwise(found.of((0, i)))
    ), "there are ties"


def test_a_trigger_knows_its_token_and_the_next() -> None:
    lm = double("llama")
    found = find_triggers(lm, CORPUS, [1], top=3)
    ends = 0
    for i in range(48):
        for column, trigger in enumerate(found.of((1, i))):
            ids = lm.prompt_ids(trigger.text)
            assert ids[trigger.position] == trigger.token == int(found.tokens((1,))[i, column])
            assert trigger.position > 0, "BOS is no trigger"
            following = ids[trigger.position + 1] if trigger.position + 1 < len(ids) else None
            assert trigger.next_token == following and int(found.next_tokens((1,))[i, column]) == (
                -1 if following is None else following
            )
            assert trigger.prefix == trigger.text[: trigger.stop] and trigger.start < trigger.stop
            ends += following is None
    assert ends, "some fire at the end of a text"


def test_how_often_neurons_fire_and_how_strongly() -> None:
    lm = double("gpt2")
    found = find_triggers(lm, TEXTS, [1], top=2)
    m = torch.cat([lm.coefficients(text, [1])[0] for text in TEXTS])
    assert torch.allclose(found.banks[1,].fired, (m > 0).double().mean(0))
    assert torch.allclose(found.banks[1,].mean_square, m.square().mean(0), rtol=1e-5)


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
    """For each bank of a layer with experts the positions at which it is used and its coefficients, by the published formula."""
    block = lm.module.model.layers[layer].mlp
    own: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def experts(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _: object) -> None:
        for position, (hidden, chosen) in enumerate(zip(args[0], args[1], strict=True)):
            for expert in chosen.tolist():
                gate, up = (module.gate_up_proj[expert] @ hidden).chunk(2)
                own[expert].append((position, torch.nn.functional.silu(gate) * up))

    def shared(_: torch.nn.Module, args: tuple[torch.Tensor, ...], __: object) -> None:
        own[block.experts.num_experts] += list(enumerate(args[0].flatten(0, -2)))

    hooks = [block.experts.register_forward_hook(experts)]
    if hasattr(block, "shared_expert"):
        hooks.append(block.shared_expert.down_proj.register_forward_hook(shared))
    lm.module(torch.tensor([lm.prompt_ids(text)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return own


@pytest.mark.parametrize(("family", "changes"), [("mixtral", MIXTRAL), ("qwen2_moe", QWEN)])
@pytest.mark.parametrize("batch_tokens", [60, 4096])
def test_experts_have_triggers_where_they_are_routed_to(
    family: str, changes: dict[str, object], batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strongest, "_AT_ONCE", 100 * batch_tokens // 60)
    lm = wrap(tiny_model(family, **changes), byte_tokenizer(bos=True))
    texts = [
        chr(33 + n) + text[n:] for n, text in enumerate(dict.fromkeys(CORPUS[:40])) if len(text) > n
    ]  # no two begin alike, so none tie
    found = find_triggers(lm, texts, [1, 2], top=3, batch_tokens=batch_tokens)
    n_banks = 4 if family == "mixtral" else 7
    assert set(found.banks) == {(layer, bank) for layer in (1, 2) for bank in range(n_banks)}
    each = [by_hooks(lm, 2, text) for text in texts]
    for bank, own in ((bank, found.banks[2, bank]) for bank in range(n_banks)):
        every = torch.stack([m for used in each for _, m in used[bank]])
        assert torch.allclose(own.fired * found.n_tokens, (every > 0).double().sum(0))
        assert torch.allclose(
            own.mean_square * found.n_tokens, every.double().square().sum(0), rtol=1e-4
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
            triggers = found.of((2, bank, i), sign=sign)  # type: ignore[arg-type]
            assert [(t.text, t.position) for t in triggers] == [
                (texts[text], position) for _, text, position in expected
            ]
            for trigger, (strength, _, _) in zip(triggers, expected, strict=True):
                assert abs(trigger.coefficient) == pytest.approx(-strength, rel=1e-4, abs=1e-5)


def test_it_is_kept_and_read_without_the_model(
    tmp_path: Path, tiny_llama: LanguageModel, tiny_gpt2: LanguageModel
) -> None:
    texts = ["Zürich lies in São Paulo? ", *CORPUS]
    found = find_triggers(tiny_llama, texts, top=4, folder=tmp_path)
    read = Triggers.load(tmp_path)
    for neuron in ((0, 3), (2, 47)):
        for sign in ("top", "bottom"):
            assert read.of(neuron, sign=sign) == found.of(neuron, sign=sign) != []  # type: ignore[arg-type]
    assert (read.model, read.corpus, read.n_texts) == (found.model, found.corpus, len(texts))
    assert isinstance(read.of((0, 3))[0], Trigger) and len(read.of((0, 3), k=2)) == 2
    Triggers.load(tmp_path, tiny_llama)
    with pytest.raises(FingerprintError, match="scan the corpus"):
        Triggers.load(tmp_path, tiny_gpt2)
    file = tmp_path / "triggers.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DamagedError):
            Triggers.load(folder)


def test_a_killed_pass_goes_on_where_it_stood(
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
    done: list[int] = []
    again = find_triggers(
        tiny_gpt2,
        CORPUS,
        top=3,
        batch_tokens=100,
        folder=tmp_path,
        progress=lambda _, n, __: done.append(n),
    )
    assert min(done) > straight.n_tokens // 3, "what was done is not done again"
    assert not file.exists() and (again.corpus, again.n_tokens) == (
        straight.corpus,
        straight.n_tokens,
    )
    for layer in range(3):
        for i in range(0, 128, 9):
            assert again.of((layer, i)) == straight.of((layer, i))
        assert torch.equal(again.banks[layer,].fired, straight.banks[layer,].fired)


def test_texts_nobody_refers_to_are_let_go(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    keep = module.TriggerRun.keep
    monkeypatch.setattr(module, "_KEPT", 300)
    monkeypatch.setattr(corpus, "WINDOW", 10)
    monkeypatch.setattr(
        module.TriggerRun,
        "keep",
        lambda run, window: (keep(run, window), held.append(len(run.texts))),
    )
    texts = [f"{text} {n}" for n in range(60) for text in TEXTS]
    found = find_triggers(tiny_gpt2, texts, [0], top=1)
    assert len(found.texts) < 150 and max(held) < 240
    assert len(found.texts) == len(
        {
            t.text
            for i in range(128)
            for sign in ("top", "bottom")
            for t in found.of((0, i), sign=sign)
        }
    )  # type: ignore[arg-type]


def test_white_space_that_the_tokenizer_trims_is_a_trigger() -> None:
    """Its characters lie between its neighbours', and what it fires behind is told without them."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    lm = wrap(tiny_model("gpt2", **GPT2).double(), tokenizer)
    texts = ["Paris   is    in France  ", "if x:\n        return   Paris", *TEXTS]
    found = find_triggers(lm, texts, [1], top=4)
    blank = 0
    for i, places in enumerate(brute_force(lm, 1, texts, 4, 1)):
        triggers = found.of((1, i))
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
    """However long it is, so many tokens are held as for short texts."""
    held: list[int] = []
    keep = module.TriggerRun.keep
    monkeypatch.setattr(module, "_KEPT", 2000)
    monkeypatch.setattr(corpus, "WINDOW", 10)
    monkeypatch.setattr(
        module.TriggerRun,
        "keep",
        lambda run, window: (
            keep(run, window),
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
    found = find_triggers(tiny_llama, " ".join(TEXTS * 200), [0], top=1, max_tokens=24_000)
    assert max(seen) <= 3000 and found.n_tokens == 24_000
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
        with pytest.raises(InputError):
            find_triggers(**{"lm": tiny_gpt2, "texts": TEXTS, "folder": tmp_path, name: value})  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
    found = find_triggers(tiny_gpt2, TEXTS, [0], top=2)
    for neuron in (0, (0,), (0.5, 1.2), "00", (0, -1), (0, 0, 0)):
        with pytest.raises(LayerError):
            found.of(neuron)  # type: ignore[arg-type]
    for arguments in ({"sign": "mid"}, {"k": -1}, {"k": 1.5}):
        with pytest.raises(InputError):
            found.of((0, 0), **arguments)  # type: ignore[arg-type]
    for read in (found.tokens, found.next_tokens):
        with pytest.raises(InputError, match="'mid'"):
            read((0,), "mid")  # type: ignore[arg-type]
    assert found.of((0, 0), k=0) == []
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
