"""Whatever the switches of torch and the modes of a model are, the numbers are the same."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import GPT2, LLAMA, TEXTS, byte_tokenizer, tiny_model
from editing import CONTEXTS, FACTS, SEARCH
from factsmith.core.errors import FactsmithError
from factsmith.core.settled import settled
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.configs import AlphaEditConfig, EmmetConfig, MemitConfig, RomeConfig
from factsmith.edit.delta import Delta, applied
from factsmith.edit.finetune import FineTuneConfig, fine_tune
from factsmith.edit.methods import alphaedit, emmet, memit, rome
from factsmith.edit.neurons import erase, rewrite
from factsmith.judge.drift import drift
from factsmith.keep.workbench import Workbench
from factsmith.locate.attribution import attribution_trace
from factsmith.locate.average import causal_traces
from factsmith.locate.causal import causal_trace
from factsmith.locate.effects import effect
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model import turns
from factsmith.model.intervene import intervene
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.read.composition import compose
from factsmith.read.fact_adds import fact_adds
from factsmith.read.promoters import promoters
from factsmith.read.refinement import refinement
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.values import value_tokens

PROMPTS = [fact.text for fact in FACTS]
TARGETS = [fact.target or "" for fact in FACTS]
DROPOUT = {"gpt2": {"resid_pdrop": 0.5}, "llama": {"attention_dropout": 0.5}}


@functools.cache
def module(family: str) -> nn.Module:
    changes = {"gpt2": GPT2, "llama": LLAMA}[family]
    made: nn.Module = tiny_model(family, **changes, **DROPOUT[family])
    return made


def new_model(family: str) -> LanguageModel:
    return wrap(copy.deepcopy(module(family)), byte_tokenizer(bos=family != "gpt2"))


def reading(lm: LanguageModel) -> dict[str, Any]:
    """Numbers of one short use of everything that reads a model."""
    prompt, subject = PROMPTS[0], FACTS[0].subject
    numbers: dict[str, Any] = {
        "answer": lm.answer(PROMPTS, 3),
        "log_prob": lm.log_prob(PROMPTS, TARGETS),
        "per token": lm.log_prob(PROMPTS, TARGETS, per_token=True),
        "says": lm.says(PROMPTS, TARGETS),
        "next": lm.next_tokens(prompt, 3),
        "coefficients": lm.coefficients(prompt),
        "logits": lm.last_logits(lm.batch(PROMPTS)),
        "promoters": promoters(lm, "Paris", 3),
    }
    with intervene(lm, [(1, 3), (2, 5)], 3):
        numbers["intervened"] = lm.log_prob(PROMPTS, TARGETS)
    trace = causal_trace(lm, prompt, subject, samples=2)
    fast = attribution_trace(lm, prompt, subject, samples=2, passes=2, check=1)
    several = [each["state"].scores for each in causal_traces(lm, FACTS[:1], samples=2)]
    located = knowledge_neurons(lm, [prompt], "French", steps=4)
    triggers = find_triggers(lm, TEXTS, top=3)
    refined = refinement(lm, PROMPTS)
    numbers |= {
        "trace": trace.scores,
        "fast trace": fast.scores,
        "traces": several[0],
        "neurons": located.scores,
        "effect": dataclasses.astuple(effect(lm, [(1, 3)], [prompt], "French")),
        "triggers": [str(t) for t in triggers.of((1, 3))],
        "values": [value_tokens(lm, top=3).of((1, i)) for i in range(3)],
        "composition": [part.logit for part in compose(lm, prompt).parts],
        "refinement": refined.probabilities,
        "adds": str(fact_adds(lm, [1], [(PROMPTS[0], "French"), (PROMPTS[1], "French")])),
    }
    return numbers


def editing(lm: LanguageModel) -> dict[str, Any]:
    """Numbers of one short use of everything that edits a model."""
    moments = second_moments(lm, TEXTS, [0, 1])
    numbers: dict[str, Any] = {f"moments {at}": moments[at].matrix for at in moments}
    with settled():
        moments = {
            layer: SecondMoment.from_matrix(
                moment.matrix + 1e-3 * torch.eye(moment.d_ff, dtype=torch.float32),
                count=moment.count,
            )
            for layer, moment in moments.items()
        }
    options: dict[str, Any] = {"moments": moments, "contexts": CONTEXTS}
    deltas = {
        "rome": rome(lm, FACTS[:2], RomeConfig(layer=1, **SEARCH), **options),
        "memit": memit(lm, FACTS, MemitConfig(layers=(0, 1), **SEARCH), **options),
        "emmet": emmet(lm, FACTS[:1], EmmetConfig(layers=(1,), **SEARCH), **options),
        "alphaedit": alphaedit(
            lm, FACTS, AlphaEditConfig(layers=(0,), energy=0.9, **SEARCH), **options
        ),
        "erase": erase(lm, [(1, 3)]),
        "rewrite": rewrite(lm, [(1, 3)], "French", "English", prompt=PROMPTS[0]),
    }
    for name, delta in deltas.items():
        numbers |= {f"{name} {layer}": delta.dense(layer) for layer in delta.layers}
        before = lm.fingerprint
        with applied(lm, delta):
            numbers[f"{name} applied"] = lm.log_prob(PROMPTS, TARGETS)
            assert lm.fingerprint != before
        assert lm.fingerprint == before, "the undo is not exact"
    tuned = fine_tune(lm, FACTS, FineTuneConfig(layers=(1,), steps=3, epochs=1))
    numbers["fine_tune"] = tuned[1]
    apart = drift(
        lm,
        lambda: applied(lm, deltas["rome"]),
        texts=TEXTS,
        facts=list(zip(PROMPTS, TARGETS, strict=True)),
        max_tokens=40,
    )
    numbers["drift"] = {name: v for name, v in apart.to_dict().items() if name != "seconds"}
    return numbers


def everything(lm: LanguageModel) -> dict[str, Any]:
    return reading(lm) | editing(lm)


@functools.cache
def reference(family: str) -> dict[str, Any]:
    return everything(new_model(family))


def differing(numbers: dict[str, Any], expected: dict[str, Any], rtol: float = 0.0) -> list[str]:
    """Return the names of the numbers that differ, by more than `rtol` of the largest."""
    assert numbers.keys() == expected.keys()

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            if a.dtype != b.dtype or a.is_inference() or a.requires_grad or a.shape != b.shape:
                return False
            if not rtol or not a.is_floating_point():
                return torch.equal(a.nan_to_num(), b.nan_to_num())
            return float((a - b).abs().max()) <= rtol * float(b.abs().max())
        return bool(rtol) or a == b

    return [name for name in expected if not same(numbers[name], expected[name])]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def gradients_off() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients off": gradients_off,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast and inference": lambda: _both(
        torch.autocast("cpu", torch.float16), torch.inference_mode()
    ),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "inside a device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}
CLOSE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "two threads": two_threads,
    "matmul precision": lambda: matmul_precision("high"),
}


@contextmanager
def _both(*blocks: AbstractContextManager[Any]) -> Iterator[None]:
    with blocks[0], blocks[1]:
        yield


def switches() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("state", [*STATES, *CLOSE])
def test_numbers_do_not_depend_on_switches_of_torch(family: str, state: str) -> None:
    expected = reference(family)
    original = copy.deepcopy(module(family))
    generator = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with {**STATES, **CLOSE}[state]():
        before = switches()
        numbers = everything(wrap(original, byte_tokenizer(bos=family != "gpt2")))
        assert switches() == before
    assert differing(numbers, expected, 1e-3 if state in CLOSE else 0.0) == []
    assert torch.equal(torch.get_rng_state(), generator[0]), "the global generator was used"
    assert (random.getstate(), str(np.random.get_state())) == generator[1:]


@pytest.mark.parametrize("state", ["autocast", "bfloat16", "inference_mode", "inside a device"])
def test_the_control(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """Without the known switches the same use fails, or gives other numbers."""
    lm, expected = new_model("llama"), reference("llama")
    if state == "bfloat16":  # tensors name their dtype: one that does not differs
        with STATES[state]():
            assert torch.zeros(1).dtype != torch.zeros(1, dtype=torch.float32).dtype
        return
    monkeypatch.setattr(turns, "settled", lambda grad=False: nullcontext())
    with STATES[state]():
        try:
            assert differing(everything(lm), expected)
        except (RuntimeError, FactsmithError) as error:
            assert str(error)


@pytest.mark.parametrize("state", STATES)
def test_a_bundled_model_loads_in_any_state(state: str) -> None:
    asked = ["The currency of Bulgaria is the"]
    expected = load("atlas").log_prob(asked, ["lev"])
    with STATES[state]():
        lm = load("atlas")
        assert lm.dtype == torch.float32 and not any(
            p.is_inference() for p in lm.module.parameters()
        )
        assert torch.equal(lm.log_prob(asked, ["lev"]), expected)


def test_settled_sets_and_puts_back() -> None:
    """The switches inside are known, and an exception puts the caller's back."""
    x = torch.ones(2, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert (x @ x).dtype == torch.bfloat16 and torch.zeros(1).is_meta, "the control"
        before = switches()
        with pytest.raises(ZeroDivisionError), settled(grad=True):
            made = x @ x
            assert made.dtype == torch.float32 and not made.is_inference()
            assert torch.zeros(1).device.type == "cpu" and torch.is_grad_enabled()
            raise ZeroDivisionError
        assert switches() == before


# ── the modes of the model ────────────────────────────────────────────────────────────────────────


def flags(model: nn.Module) -> list[tuple[object, ...]]:
    """Return what a user can have set on the parts of a model, and on its config."""
    return [
        *((part.training, vars(part).get("forward")) for part in model.modules()),
        *(
            (p.requires_grad, None if p.grad is None else float(p.grad.sum()))
            for p in model.parameters()
        ),
        *((name, getattr(model.config, name)) for name in MODES_OF_CONFIG),
    ]


MODES_OF_CONFIG = ("return_dict", "output_attentions", "output_hidden_states", "use_cache")


def _train_part(model: Any) -> None:
    next(part for part in model.modules() if isinstance(part, nn.ModuleList))[1].train()


def _eager(model: Any, name: str) -> None:
    model.set_attn_implementation("eager")
    setattr(model.config, name, True)


def _gradients(model: Any) -> None:
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)


def _checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.train()


MODES: dict[str, Callable[[Any], object]] = {
    "train": lambda model: model.train(),
    "a part in train": _train_part,
    "return_dict": lambda model: setattr(model.config, "return_dict", False),
    "output_attentions": lambda model: _eager(model, "output_attentions"),
    "output_hidden_states": lambda model: _eager(model, "output_hidden_states"),
    "use_cache": lambda model: setattr(model.config, "use_cache", False),
    "gradient checkpointing": _checkpointing,
    "gradients": _gradients,
    "compiled forward": lambda model: setattr(
        model, "forward", torch.compile(model.forward, backend="eager")
    ),
    "compiled in place": lambda model: model.compile(backend="eager"),
    "compiled layers": lambda model: [
        layer.compile(backend="eager")
        for part in model.modules()
        if isinstance(part, nn.ModuleList)
        for layer in part
    ],
}


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("when", ["before wrap", "after wrap"])
@pytest.mark.parametrize("mode", MODES)
def test_numbers_do_not_depend_on_modes_of_the_model(family: str, when: str, mode: str) -> None:
    expected = reference(family)
    model: Any = copy.deepcopy(module(family))
    if when == "before wrap":
        MODES[mode](model)
    lm = wrap(model, byte_tokenizer(bos=family != "gpt2"))
    if when == "after wrap":
        MODES[mode](model)
    before = flags(model)
    rtol = 1e-4 if mode.startswith("output") else 0.0  # another way to compute attention
    assert differing(everything(lm), expected, rtol) == []
    assert flags(model) == before
    if mode == "train" and when == "after wrap":
        asked = [model(input_ids=torch.tensor([[5, 6, 7]])).logits for _ in range(2)]
        assert not torch.equal(*asked), "the control: dropout is on"


def test_modes_come_back_after_an_exception() -> None:
    lm = new_model("gpt2")
    lm.module.train()
    lm.module.config.return_dict = False
    before = flags(lm.module)
    handle = lm.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.answer(PROMPTS)
    handle.remove()
    assert flags(lm.module) == before


def test_hooks_of_the_user_stay_and_run() -> None:
    lm, calls = new_model("gpt2"), []
    handle = lm.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert differing(reading(lm), {k: reference("gpt2")[k] for k in reading(lm)}) == []
    assert calls and len(lm.layers[0]._forward_hooks) == 1
    handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_made_in_inference_mode(family: str) -> None:
    with torch.inference_mode():
        model: Any = copy.deepcopy(module(family))
    assert next(model.parameters()).is_inference(), "the control"
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    lm = wrap(model, byte_tokenizer(bos=family != "gpt2"))
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert differing(everything(lm), reference(family)) == []


def test_a_workbench_in_inference_mode(tmp_path: Path) -> None:
    """Patches are recorded and taken back to the bit, and are the same as outside."""
    prints = []
    for folder, block in (("plain", nullcontext()), ("mode", torch.inference_mode())):
        lm = new_model("gpt2")
        base = lm.fingerprint
        with block, Workbench(lm, tmp_path / folder) as bench:
            outcome = bench.apply(
                FACTS[0], config=RomeConfig(layer=1, **SEARCH), force=True, contexts=CONTEXTS
            )
            assert outcome.revision is not None
            prints.append(lm.fingerprint)
            bench.revert(outcome.revision.id)
            assert lm.fingerprint == base
    assert prints[0] == prints[1] != base


def test_a_delta_made_in_inference_mode_is_plain() -> None:
    lm = new_model("gpt2")
    with torch.inference_mode():
        delta: Delta = erase(lm, [(1, 3)])
    assert not any(t.is_inference() for pair in delta.layers.values() for t in pair)
