"""The core on tiny random models of many families, compared as benchmarks/families.py does.

The reference is always the plain model, run one unpadded row at a time, with its own hooks.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from factsmith.core.errors import LayerError, UnsupportedModelError
from factsmith.corpus.scan import scan
from factsmith.model.trace import hook_count, recording

DENSE = [
    *(
        "gpt2",
        "gptj",
        "gpt_neo",
        "gpt_neox",
        "opt",
        "bloom",
        "mpt",
        "codegen",
        "falcon",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    ),
    *(
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo2",
        "starcoder2",
        "stablelm",
        "cohere",
        "granite",
        "smollm3",
        "glm4",
    ),
]
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe"]


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "families.py"
    sys.path.append(str(path.parent))  # where it finds the modules that it imports
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families = _load()


@pytest.mark.parametrize("family", DENSE + EXPERTS)
@pytest.mark.filterwarnings("ignore")
def test_everything_agrees_with_the_plain_model(family: str) -> None:
    result = families.check(family)
    assert result["outcome"] == "pass", result
    assert result["cached"], "the prefix's keys and values should be reused for this family"
    assert {"memory", "full", "suffix", "aligned", "answers", "gradient", "hooks"} <= set(result)
    assert max(result[name] for name in ("full", "answers", "hooks")) == 0 or result["full"] <= 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_experts_are_banks_with_keys_and_values(family: str) -> None:
    module = families.tiny_model(family)
    lm = families.wrap(module, families.letters())
    ffn = lm.ffn[1]
    assert ffn.n_experts == 4
    assert (ffn.shared is not None) == (family == "qwen2_moe")
    bank = ffn.experts[2]
    assert (
        bank.values.shape == bank.gate_keys.shape == bank.up_keys.shape == (bank.d_ff, lm.d_model)
    )
    holder = next(
        m for m in ffn.module.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))
    )
    stored = dict(holder.named_parameters(recurse=False))
    down = next(p for n, p in stored.items() if n.startswith("down") and p.dim() == 3)
    assert bank.values.untyped_storage().data_ptr() == down.untyped_storage().data_ptr()
    # The published formula, written out. mixtral and qwen2 keep (out, in) and two halves, gpt_oss
    # keeps (in, out) and alternating columns.
    x = torch.randn(3, lm.d_model)
    gate, up = x @ bank.gate_keys.T, x @ bank.up_keys.T
    fused = next(p for n, p in stored.items() if n.startswith("gate_up") and p.dim() == 3)[2]
    if family == "gpt_oss":
        torch.testing.assert_close((gate, up), ((x @ fused)[:, ::2], (x @ fused)[:, 1::2]))
        torch.testing.assert_close(bank.bias, stored["down_proj_bias"][2])
        torch.testing.assert_close(bank.values, down[2])
    else:
        torch.testing.assert_close((gate, up), (x @ fused.T).chunk(2, dim=-1))
        torch.testing.assert_close(
            torch.nn.functional.silu(gate) * up @ bank.values,
            torch.nn.functional.silu(gate) * up @ down[2].T,
        )
        assert bank.bias is None
    for name in ("values", "keys", "down"):
        with pytest.raises(UnsupportedModelError, match="experts"):
            getattr(ffn, name)
    with pytest.raises(UnsupportedModelError, match="routing"):
        lm.coefficients("Paris is")


@pytest.mark.parametrize("family", ["llama", *EXPERTS])
@pytest.mark.filterwarnings("ignore")
def test_a_scan_of_a_batch_takes_what_each_bank_does(family: str) -> None:
    """The reference is the routing of each row alone, computed again expert by expert."""
    lm = families.wrap(families.tiny_model(family), families.letters())
    rows = [[5, 6, 7, 8, 9, 10, 11], [3, 12], [7, 7, 4, 7]]
    layers = [0, 1]
    scanned = scan(lm, rows, layers)
    half = scan(lm, rows, layers, torch.bfloat16)
    seen = 0
    for layer in layers:
        ffn = lm.ffn[layer]
        for r, ids in enumerate(rows):
            batch = lm.align([ids], [0])
            alone: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            if not ffn.n_experts:
                with recording({"down": ffn.down}) as calls:
                    lm.forward(batch)
                alone[0] = (calls["down"][0].input.reshape(len(ids), -1), torch.arange(len(ids)))
            else:
                routing = ffn.routing(lambda batch=batch: lm.forward(batch))
                for expert in range(ffn.n_experts):
                    token, slot = (routing.experts == expert).nonzero(as_tuple=True)
                    alone[expert] = (routing.coefficients[token, slot], token)
                if routing.shared is not None:
                    alone[ffn.n_experts] = (routing.shared, torch.arange(len(ids)))
            for place, (m, column) in alone.items():
                read = scanned.get((layer, place) if ffn.n_experts else (layer,))
                seen += len(column)
                if read is None:
                    assert not len(column)
                    continue
                in_row = read.row == r
                assert torch.equal(read.column[in_row], column)
                torch.testing.assert_close(read.m[in_row], m, rtol=1e-4, atol=1e-5)
    assert (
        seen >= 2 * sum(map(len, rows)) and sum(len(read.row) for read in scanned.values()) == seen
    )
    assert not hook_count(lm.module.modules())
    first = min(half)
    assert half[first].m.dtype == torch.float32
    error = (half[first].m - scanned[first].m).abs().max() / scanned[first].m.abs().max()
    assert 1e-5 < error < 0.05, "bfloat16 in the pass itself"


def test_routing_is_for_experts_only() -> None:
    lm = families.wrap(families.tiny_model("llama"), families.letters())
    with pytest.raises(LayerError, match="no experts"):
        lm.ffn[0].routing(lambda: None)


def test_the_comparison_notices_a_wrong_memory() -> None:
    module = families.tiny_model("llama")
    lm = families.wrap(module, families.letters())
    wrong = module.model.layers[0].mlp.down_proj.weight
    handle = module.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda m, args, out: out + 0.01
    )
    assert families.memory_error(lm) > 1e-3
    handle.remove()
    assert families.memory_error(lm) <= 1e-5
    assert wrong.data_ptr() == lm.ffn[0].weight().data_ptr()
