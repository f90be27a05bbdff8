"""Does the model core work on every causal language model that transformers can build?

    python benchmarks/families.py [--json FILE] [TYPE ...]

It prints one line for each type. The type's default config is shrunk (3 layers, 32 dimensions) and
the model gets random weights. Then everything the library promises is compared with the plain
model, one unpadded row at a time: what a layer's memory writes, replay from every layer with a
changed hidden state, suffix replay on an aligned batch, gradients, batched answers. There are five
outcomes:

    pass       everything agrees
    refused    factsmith refuses the model on load (UnsupportedModelError)
    silent     accepted, but a number differs or something breaks: this must not happen
    not built  transformers makes no tiny text model of this type from the shrunken config
    timed out  there was no result in time
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from factsmith.core.errors import FactsmithError, UnsupportedModelError
from factsmith.model.ffn import FeedForward
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.replay import record
from tiny_types import letters, tiny_model

ROWS = [[55, 90, 133, 61, 217, 200, 144], [70, 121, 150, 99], [88, 120, 77, 131, 66]]
PIVOTS = [4, 1, 3]


# ── the plain model with its own hooks: the reference of every comparison ─────────────────────────


def plain_logits(
    lm: LanguageModel,
    ids: list[int],
    layer: int | None = None,
    change: Tensor | None = None,
    column: int = 0,
) -> Tensor:
    """Return the logits (T, vocab) of one unpadded sequence.

    `change` (n, d_model) is added to a layer's input from a column on.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(lm.slot, int):
            hidden = args[lm.slot].clone()
            hidden[0, column:] += change
            return (*args[: lm.slot], hidden, *args[lm.slot + 1 :]), kwargs
        hidden = kwargs[lm.slot].clone()
        hidden[0, column:] += change
        return args, {**kwargs, lm.slot: hidden}

    handle = (
        lm.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
        if layer is not None
        else None
    )
    try:
        return lm.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        if handle is not None:
            handle.remove()


def difference(a: Tensor, b: Tensor) -> float:
    """Return the greatest difference, relative to the greatest entry if that is above one."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))


def memory_error(lm: LanguageModel) -> float:
    """Return how far the sums of coefficient times value are from the memories' outputs."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        ffn.down.register_forward_hook(
            lambda m, args, out, layer=ffn.layer: seen.__setitem__(layer, (args[0], out.clone()))
        )
        for ffn in lm.ffn
        if not ffn.n_experts
    ]
    lm.module(input_ids=torch.tensor(ROWS[:1]), use_cache=False)
    for handle in handles:
        handle.remove()
    worst = max([0.0, *(expert_error(lm, ffn) for ffn in lm.ffn if ffn.n_experts)])
    for layer, (coefficients, out) in seen.items():
        ffn = lm.ffn[layer]
        written = torch.einsum("...i,id->...d", coefficients, ffn.values) + (
            0 if ffn.bias is None else ffn.bias
        )
        worst = max(worst, difference(written, out))
    return worst


def expert_error(lm: LanguageModel, ffn: FeedForward) -> float:
    """Return how far the sums of the routed and shared experts are from the block's output."""
    seen: list[Tensor] = []
    handle = ffn.module.register_forward_hook(
        lambda m, args, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    lm.module(input_ids=torch.tensor(ROWS[:1]), use_cache=False)
    handle.remove()
    routing = ffn.routing(lambda: lm.module(input_ids=torch.tensor(ROWS[:1]), use_cache=False))
    worst = 0.0
    for token, out in enumerate(seen[0].reshape(-1, lm.d_model)):
        total = torch.zeros(lm.d_model)
        for place, expert in enumerate(routing.experts[token].tolist()):
            if expert < ffn.n_experts:
                bank = ffn.experts[expert]
                written = sum(
                    m * v
                    for m, v in zip(routing.coefficients[token, place], bank.values, strict=True)
                )
                total += routing.weights[token, place] * (
                    written + (0 if bank.bias is None else bank.bias)
                )
        if (
            ffn.shared is not None
            and routing.shared is not None
            and routing.shared_weight is not None
        ):
            total += routing.shared_weight[token] * (routing.shared[token] @ ffn.shared.values)
        worst = max(worst, difference(total, out))
    return worst


def replay_error(lm: LanguageModel, start: int, rows: list[list[int]], pivots: list[int]) -> float:
    """Return how far replay from changed states is from each row alone in the plain model."""
    batch = lm.align(rows, pivots)
    replay = record(lm, batch, start=start)
    worst = 0.0
    generator = torch.Generator().manual_seed(start)
    for layer in range(lm.n_layers):
        change = torch.randn(len(rows), replay.n_live, lm.d_model, generator=generator) * 0.3
        logits = replay.logits(replay.resume(layer, replay.hidden[layer] + change))
        for row, ids in enumerate(rows):
            columns = batch.attention_mask[row].nonzero()[:, 0]
            live = columns[columns >= start]
            first = int(live[0] - columns[0])
            expected = plain_logits(lm, ids, layer, change[row, live - start], first)[first:]
            worst = max(worst, difference(logits[row, live - start], expected))
    return worst


def gradient_error(lm: LanguageModel) -> float:
    """Return how far the gradient at a layer's input by replay is from the plain model's."""
    ids, layer, column = ROWS[0], 1, 4
    replay = record(lm, lm.align([ids], [column]), start=column)
    with torch.enable_grad():
        ours, plain = torch.zeros(2, lm.d_model).requires_grad_().unbind()
        hidden = torch.cat([replay.hidden[layer][:, :1] + ours, replay.hidden[layer][:, 1:]], dim=1)
        a = torch.autograd.grad(
            replay.logits(replay.resume(layer, hidden)[0, -1]).log_softmax(-1)[7], ours
        )[0]
        change = torch.cat([plain[None], torch.zeros(len(ids) - column - 1, lm.d_model)])
        b = torch.autograd.grad(
            plain_logits(lm, ids, layer, change, column)[-1].log_softmax(-1)[7], plain
        )[0]
    return difference(a, b)


def answer_error(lm: LanguageModel) -> float:
    """Return how many of a batch's greedy answers differ from the plain loop over prompts."""
    expected = []
    for ids in ROWS:
        new: list[int] = []
        for _ in range(4):
            new.append(int(plain_logits(lm, ids + new)[-1].argmax()))
            if new[-1] in lm.end_ids:
                new.pop()
                break
        expected.append(new)
    groups = lm.groups([len(r) for r in ROWS])
    got = {
        i: ids
        for group in groups
        for i, ids in zip(group, lm.continue_greedily([ROWS[i] for i in group], 4), strict=True)
    }
    # A line break may end our answer early.
    return float(sum(got[i] != expected[i][: len(got[i])] for i in range(len(ROWS))))


def hooks(module: nn.Module) -> int:
    """Return how many hooks and forwards on the instance the modules carry."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in module.modules()
    )


def outcome(family: str, kind: str, why: object) -> dict[str, Any]:
    """Return the row of a family that was not compared."""
    text = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    return {"family": family, "outcome": kind, "why": text}


def check(family: str) -> dict[str, Any]:
    """Return one family's row: {"family", "outcome", "why", and the measured differences}."""
    try:
        module = tiny_model(family)
        before = hooks(module)
        with torch.no_grad():
            logits = module(input_ids=torch.tensor(ROWS[:1])).logits
    except Exception as error:
        row = outcome(family, "not built", error)
        return {**row, "why": row["why"].split("\n")[0][:160]}
    if not bool(logits.isfinite().all()):
        return outcome(family, "not built", "its own output is not finite with random weights")
    started = time.perf_counter()
    try:
        lm = wrap(module, letters())
    except UnsupportedModelError as error:
        if hooks(module) == before:
            return outcome(family, "refused", str(error))
        return outcome(family, "silent", "left hooks behind")
    except Exception as error:
        return outcome(family, "silent", f"load: {type(error).__name__}: {error}")
    result: dict[str, Any] = {
        "family": family,
        "seconds": round(time.perf_counter() - started, 2),
        "cached": lm.caches_prefix,
    }
    try:
        with torch.no_grad():
            for name, compare in comparisons(lm).items():
                result[name] = compare()
        result["hooks"] = float(hooks(module) != before)
    except FactsmithError as error:
        row = outcome(family, "silent", f"accepted, then {type(error).__name__}: {error}")
        return {**result, **row}
    except Exception as error:
        return {**result, **outcome(family, "silent", error)}
    numbers = {k: v for k, v in result.items() if isinstance(v, float) and k != "seconds"}
    wrong = ", ".join(name for name, value in numbers.items() if not value <= 1e-5)
    row = outcome(family, "silent", f"differs: {wrong}") if wrong else outcome(family, "pass", "")
    return {**result, **row}


def comparisons(lm: LanguageModel) -> dict[str, Callable[[], float]]:
    """Return the comparisons that apply to a model, by name."""
    aligned = {"aligned": lambda: max(replay_error(lm, at, ROWS, PIVOTS) for at in (0, 4))}
    return {
        "memory": lambda: memory_error(lm),
        "full": lambda: replay_error(lm, 0, ROWS[:1], PIVOTS[:1]),
        "suffix": lambda: replay_error(lm, 4, ROWS[:1], PIVOTS[:1]),
        **(aligned if lm.hides_padding else {}),
        "answers": lambda: answer_error(lm),
        "gradient": lambda: gradient_error(lm),
    }


def guarded(family: str, seconds: float) -> dict[str, Any]:
    """Run `check` in its own process, so that a crash or a hang is one line of the table."""

    def work(pipe: Connection) -> None:
        torch.set_num_threads(1)
        pipe.send(check(family))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender,))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return dict(receiver.recv())
        return outcome(family, "timed out", f"no result within {seconds:.0f} s")
    except EOFError:
        return outcome(family, "silent", "the process died")
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Check the families and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families",
        nargs="*",
        help="model types (default: all of transformers' causal language models)",
    )
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--seconds", type=float, default=60, help="time limit for each type")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = []
    for family in options.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results.append(guarded(family, options.seconds))
        numbers = {
            k: f"{v:.0e}" for k, v in results[-1].items() if isinstance(v, float) and k != "seconds"
        }
        print(
            f"{family:24} {results[-1]['outcome']:9} {results[-1].get('why') or numbers}",
            flush=True,
        )
    counts = Counter(r["outcome"] for r in results)
    print(
        f"\n{len(results)} types: "
        + ", ".join(
            f"{counts[o]} {o}" for o in ("pass", "refused", "silent", "not built", "timed out")
        )
    )
    passed = [r for r in results if r["outcome"] == "pass"]
    print(
        f"of those that pass, {sum(r['cached'] for r in passed)} reuse the prefix's keys and "
        f"values (the others run it again), and {sum('aligned' in r for r in passed)} take prompts "
        "of different lengths in one batch (the others refuse them)"
    )
    if options.json:
        Path(options.json).write_text(
            json.dumps({"counts": counts, "results": results}, indent=1) + "\n", encoding="utf-8"
        )
    sys.exit(1 if counts["silent"] else 0)


if __name__ == "__main__":
    main()
