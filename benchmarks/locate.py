"""Causal tracing and knowledge neurons against plain loops: the same numbers, and the time of both.

    python benchmarks/locate.py                # 13 tokens, and 20 prompts of known_1000
    python benchmarks/locate.py --cells 0      # every cell of those prompts too: hours
    python benchmarks/locate.py --only smollm2 # 10 tokens and 30 layers alone
    python benchmarks/locate.py --json benchmarks/results/locate.json

`plain_trace` is the oracle: one full forward pass with hooks for every (token, layer), with nothing
shared, as one would write it first. `plain_neurons` does the same with twenty full passes a layer.
They use nothing of factsmith; the modules are handed to them. The tests compare `factsmith.locate`
with them on many families.

The model has GPT-2 small's shape and random weights, in float32 on one thread. Each prompt has 10
corrupted runs. The 20 prompts are spread evenly over ../shared/data/counterfact/known_1000.json.
They are tokenized by the atlas's tokenizer, which has 6,144 tokens: the texts are somewhat longer
than with GPT-2's own. A plain pass costs the same for every cell of a prompt. So its time on these
prompts is that of `--cells` random cells, scaled to the cells of the map. Times are processor
seconds.

The last line is a model of SmolLM2-135M's shape, traced at 10 tokens. Its plain passes are scaled
in the same way. `faster products` says whether oneDNN multiplied our matrices: see
`factsmith/core/multiply.py`. The plain loop multiplies as torch does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""Changes a module's output."""
KINDS = ("state", "mlp", "attention")
KNOWN = Path(__file__).resolve().parents[1] / "../shared/data/counterfact/known_1000.json"


class PlainRuns(NamedTuple):
    """The runs of a trace: row 0 is clean, and the others are corrupted."""

    rows: Sequence[Sequence[int]]
    """Token ids of the clean prompt, then of each corrupted run."""
    answer_ids: Sequence[int]
    """The answer's tokens."""
    span: tuple[int, int]
    """Token columns of the subject."""
    corruption: Tensor | None
    """(samples, n_subject_tokens, d_model) noise for the corrupted runs' embeddings."""

    def ids(self) -> Tensor:
        """Return the token ids of the batch, (1 + samples, n_columns)."""
        return torch.tensor([[*row, *self.answer_ids[:-1]] for row in self.rows])

    def corrupt(self, output: Tensor) -> Tensor:
        """Add the noise to the embeddings of the corrupted runs."""
        output = output.clone()
        output[1:, self.span[0] : self.span[1]] += 0 if self.corruption is None else self.corruption
        return output

    @torch.no_grad()
    def probabilities(
        self, module: nn.Module, changes: Sequence[tuple[nn.Module, Change]] = ()
    ) -> Tensor:
        """Return p(answer) of each run, with the outputs of some modules changed."""
        ids, answer = self.ids(), torch.tensor(self.answer_ids)
        with ExitStack() as stack:
            embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
            for site, change in [(embedding, self.corrupt), *changes]:
                handle = site.register_forward_hook(
                    lambda _m, _a, out, change=change: _changed(out, change)
                )
                stack.callback(handle.remove)
            logits = module(input_ids=ids, use_cache=False).logits
        log_p = logits[:, len(self.rows[0]) - 1 :].float().log_softmax(-1)
        return log_p.gather(-1, answer.expand(len(ids), -1)[..., None])[..., 0].sum(-1).exp()


def plain_trace(
    module: nn.Module,
    sites: Sequence[nn.Module],
    runs: PlainRuns,
    *,
    window: int | None = None,
    severed: Sequence[nn.Module] = (),
    shift: int = 0,
    cells: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, float, float]:
    """Return a map by one full pass a cell.

    Args:
        module: The model.
        sites: For each layer, the module whose output is restored.
        runs: The clean run and the corrupted ones.
        window: Number of layers restored together. None: one.
        severed: Modules that keep, at the traced token, their outputs of the corrupted run.
        shift: Restore what is so many columns further. That map is wrong, and shows that the
            comparison notices.
        cells: Compute these (token, layer) only; the others are nan. None: all.

    Returns:
        The scores (n_tokens, n_layers), p(answer) of the clean run, and of the corrupted runs.
    """
    shape = runs.ids().shape
    n_tokens, n_layers = len(runs.rows[0]), len(sites)
    kept: dict[nn.Module, Tensor] = {}

    def restore(token: int) -> Change:
        def change(output: Tensor) -> Tensor:
            shaped = output.reshape(*shape, -1).clone()
            shaped[1:, token] = shaped[0, (token + shift) % n_tokens]
            return shaped.view(output.shape)

        return change

    def keep(site: nn.Module) -> Change:
        def change(output: Tensor) -> Tensor:
            kept[site] = output.clone()
            return output

        return change

    def hold(token: int, site: nn.Module) -> Change:
        def change(output: Tensor) -> Tensor:
            shaped = output.reshape(*shape, -1).clone()
            shaped[1:, token] = kept[site].reshape(shaped.shape)[1:, token]
            return shaped.view(output.shape)

        return change

    base = runs.probabilities(module, [(site, keep(site)) for site in severed])
    scores = torch.full((n_tokens, n_layers), float("nan"))
    every = [(token, layer) for token in range(n_tokens) for layer in range(n_layers)]
    for token, layer in every if cells is None else cells:
        low, high = layer, layer + 1
        if window is not None:
            low, high = layer - window // 2, layer + (window + 1) // 2
        changes = [(site, hold(token, site)) for site in severed]
        changes += [(sites[k], restore(token)) for k in range(max(0, low), min(n_layers, high))]
        scores[token, layer] = runs.probabilities(module, changes)[1:].mean()
    return scores, float(base[0]), float(base[1:].mean())


def plain_neurons(
    module: nn.Module,
    downs: Sequence[nn.Module],
    ids: Sequence[int],
    columns: Sequence[int],
    answer_ids: Sequence[int],
    steps: int = 20,
) -> Tensor:
    """Return integrated gradients of the answer's joint probability: (n_layers, d_ff).

    Each layer takes `steps` full passes, in one batch.

    Args:
        module: The model.
        downs: For each layer, its down-projection, whose input are the coefficients.
        ids: Token ids to run.
        columns: Columns that predict the answer's tokens.
        answer_ids: The answer's tokens.
        steps: Points of the integral.
    """
    sequence, answer, where = (
        torch.tensor([list(ids)]),
        torch.tensor(list(answer_ids)),
        list(columns),
    )
    kept: dict[nn.Module, Tensor] = {}

    def keep(down: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept[down] = args[0].detach().reshape(len(ids), -1)[where].clone()  # (P, d_ff)

    with ExitStack() as stack, torch.no_grad():
        for down in downs:
            stack.callback(down.register_forward_pre_hook(keep).remove)
        module(input_ids=sequence)

    scores = []
    for down in downs:
        alpha = torch.arange(steps, dtype=torch.float64)[:, None, None] / steps
        points = (alpha.to(kept[down]) * kept[down]).requires_grad_()  # (steps, P, d_ff)

        def scale(_: nn.Module, args: tuple[Tensor, ...], points: Tensor = points) -> tuple[Tensor]:
            given = args[0].reshape(steps, len(ids), -1).clone()
            given[:, where] = points
            return (given.view(args[0].shape),)

        handle = down.register_forward_pre_hook(scale)
        logits = module(input_ids=sequence.expand(steps, -1)).logits[:, where]
        handle.remove()
        p = (
            logits.log_softmax(-1)
            .gather(-1, answer.expand(steps, -1)[..., None])[..., 0]
            .sum(-1)
            .exp()
        )
        (gradient,) = torch.autograd.grad(p.sum(), points)
        scores.append((kept[down] * gradient.sum(0) / steps).sum(0))
    return torch.stack(scores)


def _changed(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def random_gpt2_small() -> Any:
    """Return a random model of GPT-2 small's shape (12 layers, d=768, vocabulary 50,257).

    Its weights are three times larger than usual, so that the answer has a probability that can be
    compared.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(bos_token_id=50256, eos_token_id=50256, initializer_range=0.06)
    ).eval()


def random_smollm2() -> Any:
    """Return a random model of SmolLM2-135M's shape: 30 layers, d=576, vocabulary 49,152."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            initializer_range=0.06,
        )
    ).eval()


def word_tokenizer(count: int = 50257) -> Any:
    """Return a tokenizer with one token a word: "w7" is id 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(count)]
    words[:6] = ["The", "name", "of", "the", "place", "is"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w6"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w6", eos_token=words[-1])


def known_prompts(count: int) -> list[tuple[str, str]]:
    """Return (prompt, subject) of entries spread evenly over known_1000.

    The prompt of each holds its subject once.
    """
    entries = [
        e
        for e in json.loads(KNOWN.read_text(encoding="utf-8"))
        if e["prompt"].count(e["subject"]) == 1
    ]
    return [
        (e["prompt"], e["subject"])
        for e in (entries[i * len(entries) // count] for i in range(count))
    ]


def compare(
    lm: Any, prompt: str, subject: str, kind: Any, *, samples: int = 10, cells: int = 0
) -> dict[str, Any]:
    """Trace one prompt both ways: the seconds of each, and the largest difference of the scores.

    Args:
        lm: The model.
        prompt: The prompt.
        subject: Its subject.
        kind: The kind of trace.
        samples: Corrupted runs.
        cells: Cells of the map that the plain loop runs; its time is scaled to all of them. 0:
            every cell, and our time is the median of three.
    """
    from factsmith.locate.causal import causal_trace

    causal_trace(lm, prompt, subject, kind=kind, samples=1)  # both ways are timed warm
    repeats = 1 if cells else 3
    runs = [
        _timed(lambda: causal_trace(lm, prompt, subject, kind=kind, samples=samples))
        for _ in range(repeats)
    ]
    ours, trace = statistics.median(seconds for seconds, _ in runs), runs[0][1]

    n_tokens, (start, stop) = len(trace.tokens), trace.subject_span
    noise = torch.from_numpy(
        _standard_normal(samples, stop - start, lm.d_model) * trace.noise
    ).float()
    sites = {"state": lm.layers, "mlp": [f.module for f in lm.ffn], "attention": lm.attention}[kind]
    every = [(token, layer) for token in range(n_tokens) for layer in range(lm.n_layers)]
    some = random.Random(0).sample(every, min(cells, len(every))) if cells else every
    ids = [lm.prompt_ids(prompt)] * (1 + samples)
    plain, (scores, _, _) = _timed(
        lambda: plain_trace(
            lm.module,
            sites,
            PlainRuns(ids, trace.answer_ids, (start, stop), noise),
            window=None if kind == "state" else trace.window,
            cells=some,
        )
    )
    plain *= (len(every) + 1) / (len(some) + 1)  # one more pass than cells
    return {
        "kind": kind,
        "tokens": n_tokens,
        "subject": [start, stop],
        "layers": lm.n_layers,
        "samples": samples,
        "oracle_cells": len(some),
        "oracle_s": round(plain, 3),
        "ours_s": round(ours, 3),
        "ratio": round(plain / ours, 2),
        "largest_effect": float(trace.effects.abs().max()),
        "max_difference": float((trace.scores - scores).abs().nan_to_num().max()),
    }


def compare_neurons(lm: Any, prompt: str, target: str, repeats: int = 3) -> dict[str, Any]:
    """Attribute one prompt both ways, in turn: median seconds, and the largest difference.

    The difference is a share of the largest score.
    """
    from factsmith.locate.neurons import knowledge_neurons

    ids, columns, wanted = lm.question(prompt, target)
    downs = [ffn.down for ffn in lm.ffn]
    knowledge_neurons(lm, prompt, target, steps=1)  # both ways timed warm
    plain_neurons(lm.module, downs, ids, columns, wanted, steps=1)
    times = []
    for _ in range(repeats):
        ours_s, neurons = _timed(lambda: knowledge_neurons(lm, prompt, target))
        oracle_s, scores = _timed(lambda: plain_neurons(lm.module, downs, ids, columns, wanted))
        times.append((oracle_s, ours_s))
    oracle_s, ours_s = (statistics.median(side) for side in zip(*times, strict=True))
    return {
        "tokens": len(ids),
        "oracle_s": round(oracle_s, 3),
        "ours_s": round(ours_s, 3),
        "ratio": round(statistics.median(oracle / ours for oracle, ours in times), 2),
        "largest_score": float(scores.abs().max()),
        "max_difference": float((neurons.scores[0] - scores).abs().max() / scores.abs().max()),
    }


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds, which other work disturbs least, and the result."""
    begun = time.process_time()
    result = run()
    return time.process_time() - begun, result


def _standard_normal(*shape: int) -> Any:
    import numpy as np

    return np.random.RandomState(1).randn(*shape)


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the table to this file as JSON")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of known_1000; 0: none")
    parser.add_argument(
        "--cells",
        type=int,
        default=6,
        help="cells of each of their maps that the plain loop runs; 0: every one",
    )
    parser.add_argument("--only", choices=["smollm2"], help="run this shape alone")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    subject = f"{row['subject'][0]}-{row['subject'][1] - 1}"
    print(
        f"{row['prompt']:<14} {row['kind']:<10} {row['tokens']:>6} {subject:>8} "
        f"{row['oracle_s']:>9.2f} {row['ours_s']:>7.2f} {row['ratio']:>6.1f} "
        f"{row['max_difference']:>15.1e}",
        flush=True,
    )


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how the times of several prompts compare."""
    return {
        "prompts": len(rows),
        "mean_ratio": round(statistics.mean(row["ratio"] for row in rows), 2),
        "ratio_of_total_time": round(
            sum(row["oracle_s"] for row in rows) / sum(row["ours_s"] for row in rows), 2
        ),
        "lowest_ratio": min(row["ratio"] for row in rows),
        "max_difference": max(row["max_difference"] for row in rows),
    }


def gpt2_rows(args: argparse.Namespace) -> dict[str, Any]:
    """Compare both ways on GPT-2 small's shape, print the table, and return it."""
    from transformers import AutoTokenizer

    from factsmith.atlas import folder
    from factsmith.model.load import wrap

    module = random_gpt2_small()
    words = [f"w{1000 + 37 * i}" for i in range(13)]
    rows: list[dict[str, Any]] = []
    lm = wrap(module, word_tokenizer())
    neurons = compare_neurons(lm, " ".join(words[:9]), words[9])
    print(
        f"knowledge neurons, {neurons['tokens']} tokens, 20 steps: "
        f"oracle {neurons['oracle_s']:.2f} s, ours {neurons['ours_s']:.2f} s, "
        f"ratio {neurons['ratio']:.1f}, "
        f"largest difference {neurons['max_difference']:.1e} of the largest score",
        flush=True,
    )
    for kind in args.kinds:
        row = compare(lm, " ".join(words), " ".join(words[7:12]), kind)
        rows.append({"prompt": "13 tokens", **row})
        print_row(rows[-1])
    summary = {}
    if args.prompts:
        lm = wrap(module, AutoTokenizer.from_pretrained(folder("atlas"), trust_remote_code=False))
        for kind in args.kinds:
            of_kind = []
            for number, (prompt, subject) in enumerate(known_prompts(args.prompts)):
                row = compare(lm, prompt, subject, kind, cells=args.cells)
                of_kind.append({"prompt": f"known {number + 1}", **row})
                print_row(of_kind[-1])
            rows += of_kind
            summary[kind] = summarize(of_kind)
            print(f"known_1000, {kind}: {summary[kind]}", flush=True)
    return {"neurons": neurons, "trace": rows, "known_1000": summary}


def smollm2_row(args: argparse.Namespace) -> dict[str, Any]:
    """Compare both ways on SmolLM2-135M's shape at 10 tokens, and print the line."""
    from factsmith.core.multiply import is_quicker
    from factsmith.model.load import wrap

    lm = wrap(random_smollm2(), word_tokenizer(49152))
    words = [f"w{1000 + 37 * i}" for i in range(10)]
    row = compare(lm, " ".join(words), " ".join(words[1:4]), "state", cells=2 * args.cells)
    row = {"prompt": "30 layers", **row, "faster_products": is_quicker(args.threads)}
    print_row(row)
    return row


def main() -> None:
    """Compare both ways, print the table, and write it as JSON."""
    args = parsed()
    torch.set_num_threads(args.threads)
    print(
        f"{'prompt':<14} {'kind':<10} {'tokens':>6} {'subject':>8} {'oracle s':>9} {'ours s':>7} "
        f"{'ratio':>6} {'max difference':>15}"
    )
    content: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__}
    if args.only is None:
        content |= gpt2_rows(args)
    elif args.json and args.json.exists():
        content = json.loads(args.json.read_text(encoding="utf-8"))
    content["smollm2"] = smollm2_row(args)
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
