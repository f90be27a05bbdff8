"""How many facts can be written? Every method at several loads, next to plain fine-tuning.

    python benchmarks/methods.py --model atlas --loads 0.003 0.03 0.1 --json methods.json
    python benchmarks/methods.py --model atlas --rounds 100 --loads 1 --methods memit alphaedit
    python benchmarks/methods.py --model atlas --facts 3072 10000 --methods append
    python benchmarks/methods.py --json methods.json --draw docs/methods.png

The first line writes all facts in one batch. The second writes them round after round. The third
names numbers of facts, where a load says little. The last draws the pictures and prints the tables,
and measures nothing.

A model's room depends on its keys, so edits are counted as load = facts / (edited layers x d_ff).
10,000 facts in six layers of GPT-J are a load of 0.10. The facts are real. The model knows each of
them in several phrasings, and each gets another object of its relation. Answers are compared by
greedy exact match of the whole object. Efficacy is that of the edited prompt. Generalization is
that of other phrasings of the fact, held-out ones first. Specificity asks about facts outside the
edits that the model said before, in a random phrasing each. The table's score is their harmonic
mean.

`memit`, `emmet`, `alphaedit` and `append` have the recommended settings, with repairs.
`memit-plain` is one pass with mean keys, as published, at the best of several weights and step
sizes for each load. The score itself chooses this setting, so it looks better than it is. `ft-l` is
Adam on one
down-projection with an L-infinity clamp. `lora` is peft on all edited down-projections. The targets
of one load are searched once for all methods that share them. Seconds are processor seconds of one
thread, and include this search for each method. Memory is the largest of the process during the
run, with the model and the second moments.

`same_subject` is the share of known facts about edited subjects that stay, in relations that
nothing was written for. `prose` compares held-out prose with the unedited model: the change of its
perplexity in percent, and for `append` the share of its tokens on which a new neuron fires.

Two numbers explain the shares. `norms` is |delta| / |W| of each layer. `overlap` is the share of a
fact's key that the other keys explain, in the metric of the second moment (median over the facts,
first and last edited layer).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from chosen_facts import chosen, same_subject
from factsmith import atlas
from factsmith.atlas.texts import bundled_prose
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.corpus.scan import scan
from factsmith.edit.contexts import generate_contexts, generate_openings
from factsmith.edit.delta import applied, written
from factsmith.edit.finetune import FineTuneConfig, LoraConfig, fine_tune, lora
from factsmith.edit.methods import edit, find_method
from factsmith.edit.search import find_targets
from factsmith.edit.target import Targets
from factsmith.model.language_model import LanguageModel

SPREADING = ("memit", "emmet", "alphaedit")
METHODS = (*SPREADING, "memit-plain", "rome", "r-rome", "append", "ft-l", "lora")
HELD_OUT = 1_000
"""Sentences of prose at the end of the bundled text, which no statistics have read."""
PLAIN = [(weight, lr) for lr in (0.5, 0.05) for weight in (0.03, 0.1, 0.3, 1.0, 3.0)]
"""Settings of `memit-plain`: weights in units of d_ff, and lr in those of the stream."""

COARSE = [(weight, 0.5) for weight in (0.3, 1.0, 3.0)]
"""Its settings at loads above 0.11."""


def score(
    lm: LanguageModel, facts: Sequence[Fact], others: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Return efficacy, generalization, specificity and their harmonic mean, in percent.

    If there are no others, as when every fact is edited, the mean is that of the first two.
    """
    asked = [(text, fact.target or "") for fact in facts for text in fact.paraphrase_texts]
    answers = {
        "efficacy": lm.says([fact.text for fact in facts], [fact.target or "" for fact in facts]),
        "generalization": lm.says([text for text, _ in asked], [target for _, target in asked]),
    }
    if others:
        prompts, said = ([pair[i] for pair in others] for i in range(2))
        answers["specificity"] = lm.says(prompts, said)
    shares = {name: round(100 * statistics.fmean(right), 2) for name, right in answers.items()}
    mean = statistics.harmonic_mean([max(value, 1e-9) for value in shares.values()])
    return {**shares, "score": round(mean, 2)}


@torch.no_grad()
def perplexity(lm: LanguageModel, texts: Sequence[str]) -> float:
    """Return the perplexity of the tokens of some texts, each after the first of its own."""
    nats, tokens = 0.0, 0
    for first in range(0, len(texts), 16):
        batch = lm.batch(texts[first : first + 16])
        logits = lm.forward(batch).logits[:, :-1].float()
        ids, mask = batch.input_ids[:, 1:], batch.attention_mask
        real = (mask[:, 1:] * mask[:, :-1]).bool()
        nats -= float(logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0][real].sum())
        tokens += int(real.sum())
    return math.exp(nats / tokens)


def fires(lm: LanguageModel, layer: int, least: float, texts: Sequence[str]) -> float:
    """Return the share of a text's tokens on which some appended neuron fires, in percent.

    Args:
        lm: The model, with appended neurons.
        layer: Their layer.
        least: The size of a coefficient from which on it counts.
        texts: The text.
    """
    n_original, fired, tokens = lm.ffn[layer].n_original, 0, 0
    for first in range(0, len(texts), 16):
        rows = [lm.prompt_ids(text) for text in texts[first : first + 16]]
        m = scan(lm, rows, [layer])[layer,].m[:, n_original:]
        fired += int((m.abs() > least).any(1).sum())
        tokens += len(m)
    return 100 * fired / tokens


# ── editing ───────────────────────────────────────────────────────────────────────────────────────


def overlap(keys: torch.Tensor, moment: fs.SecondMoment) -> float:
    """Return the median share of a key that lies in the span of the others, in the metric of C⁻¹.

    Args:
        keys: (n, d_ff).
        moment: The second moment C.
    """
    if len(keys) < 2:
        return 0.0
    whitened = torch.linalg.solve_triangular(moment.factor, keys.double().T, upper=False)
    gram = whitened.T @ whitened
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    apart = 1 / torch.linalg.inv(gram).diagonal()  # squared distance from the span of the others
    return float((1 - apart / gram.diagonal()).clamp(0, 1).median())


def peak_mb(reset: bool = False) -> int:
    """Return the process's largest resident memory since the last reset (Linux), in MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) // 1024


class Bench:
    """A model with its moments and contexts. Targets are searched once for facts and settings.

    Attributes:
        changes: Settings other than the recommended.
    """

    def __init__(self, name: str, seed: int, changes: dict[str, Any]) -> None:
        """Load the model, its moments, and contexts for both kinds of methods."""
        self.name, self.seed, self.changes = name, seed, changes
        self.lm = fs.load(name)
        self.layers = fs.MemitConfig.recommended(self.lm).layers or (0,)
        self.d_ff = self.lm.ffn[self.layers[0]].d_ff
        self.moments = find_moments(
            self.lm, sorted({*self.layers, fs.RomeConfig.recommended(self.lm).layer or 0})
        )
        self.prose = bundled_prose()[-HELD_OUT:]
        self.same: list[tuple[str, str]] = []
        self.openings, self.contexts = (
            generate_openings(self.lm, seed),
            generate_contexts(self.lm, seed),
        )
        self._targets: dict[tuple[Any, ...], tuple[Targets, float]] = {}
        self._inputs: dict[int, fs.SecondMoment] = {}

    def targets(self, facts: Sequence[Fact], config: fs.MemitConfig) -> tuple[Targets, float]:
        """Return targets in the stream after the last layer, and the seconds of the search."""
        key = (
            tuple(f.text for f in facts),
            config.lr,
            config.steps,
            config.clamp,
            config.stop_loss,
            config.scale,
            config.searched_by,
        )
        if key not in self._targets:
            started = time.process_time()
            targets = find_targets(
                self.lm, facts, self.layers[-1], config, self.openings, site="stream"
            )
            self._targets = {key: (targets, time.process_time() - started)}
        return self._targets[key]

    def settings(self, method: str) -> Any:
        """Return the recommended settings with the changes."""
        recommended = find_method(method).config.recommended(self.lm)
        return dataclasses.replace(recommended, **self.changes)

    def measured(
        self, facts: Sequence[Fact], others: Sequence[tuple[str, str]], delta: fs.Delta
    ) -> dict[str, Any]:
        """Return the score with a delta in the model, its norms, and the overlap of its keys."""
        norms = {
            layer: float(delta.dense(layer).norm() / self.lm.ffn[layer].weight().norm())
            for layer in delta.layers
        }
        ends = sorted({min(delta.layers), max(delta.layers)}) if delta.layers else []
        why = {
            "bytes": delta.n_bytes,
            "neurons": delta.n_appended,
            "norms": {layer: round(norm, 3) for layer, norm in norms.items()},
            "overlap": {
                layer: round(overlap(delta.k_star[layer], self.moments[layer]), 3) for layer in ends
            },
        }
        before = perplexity(self.lm, self.prose)
        with applied(self.lm, delta):
            why["prose"] = round(100 * (perplexity(self.lm, self.prose) / before - 1), 3)
            if self.same:
                said = self.lm.says([p for p, _ in self.same], [o for _, o in self.same])
                why["same_subject"] = round(100 * statistics.fmean(said), 2)
                why["same_subjects"] = len(said)
            for layer in delta.appended:
                least = 0.1 * statistics.median(r["coefficient"] for r in delta.convergence)
                why["fires"] = round(fires(self.lm, layer, least, self.prose), 3)
            return {**score(self.lm, facts, others), **why}

    def run(
        self, method: str, facts: Sequence[Fact], others: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """Write all facts in one batch with one method, and return its row."""
        if method in SPREADING:
            delta, took = self._spread(method, facts, self.settings(method))
            return {**self.measured(facts, others, delta), **took}
        if method == "memit-plain":
            grid = PLAIN if len(facts) < 0.11 * len(self.layers) * self.d_ff else COARSE
            tried = (self._plain(facts, others[:2000], weight, lr) for weight, lr in grid)
            best, delta = max(tried, key=lambda pair: pair[0]["score"])
            return {**best, **self.measured(facts, others, delta)}
        started = time.process_time()
        if method in ("rome", "r-rome", "append"):
            delta = self.edit(method, facts, beneath=())
            seconds = time.process_time() - started
            return {**self.measured(facts, others, delta), "solve_s": round(seconds, 1)}
        tuned: Callable[[], Any] = {
            "ft-l": lambda: fine_tune(self.lm, facts, FineTuneConfig(layers=self.layers[:1])),
            "lora": lambda: lora(self.lm, facts, LoraConfig(layers=self.layers)),
        }[method]
        with written(self.lm, tuned()):
            seconds = time.process_time() - started
            return {**score(self.lm, facts, others), "solve_s": round(seconds, 1)}

    def _spread(
        self, method: str, facts: Sequence[Fact], config: Any
    ) -> tuple[fs.Delta, dict[str, float]]:
        """Return the delta of a method of the MEMIT family, and the seconds of its two parts."""
        targets, seconds = self.targets(facts, config)
        started = time.process_time()
        given = {"moments": self.moments, "contexts": self.openings, "targets": targets}
        delta = edit(self.lm, facts, method, config, **given)
        solve = time.process_time() - started
        return delta, {"targets_s": round(seconds, 1), "solve_s": round(solve, 1)}

    def _plain(
        self, facts: Sequence[Fact], others: Sequence[tuple[str, str]], weight: float, lr: float
    ) -> tuple[dict[str, Any], fs.Delta]:
        """Return the row and the delta of one setting of `memit-plain`."""
        config = fs.MemitConfig(
            layers=self.layers,
            scale="auto",
            lr=lr,
            steps=20 if lr == 0.5 else 80,
            clamp=3.0,
            stop_loss=0.05,
            optimizer="adam",
            moment_weight=weight * self.d_ff,
        )
        delta, took = self._spread("memit", facts, config)
        row = {**self.measured(facts, others, delta), **took}
        return {**row, "setting": {"weight": weight, "lr": lr}}, delta

    def edit(self, method: str, facts: Sequence[Fact], beneath: Sequence[fs.Delta]) -> fs.Delta:
        """Return the delta of one edit on the model as it is."""
        config = self.settings(method)
        contexts = self.contexts if method in ("rome", "r-rome") else self.openings
        moments = self.inputs(config) if method == "append" else self.moments
        given = {"moments": moments, "contexts": contexts, "beneath": beneath}
        return edit(self.lm, facts, method, config, **given)

    def inputs(self, config: Any) -> dict[int, fs.SecondMoment]:
        """Return the statistics of what enters the edited layer, of the unedited model."""
        if config.edited[0] not in self._inputs:
            self._inputs = find_moments(self.lm, config.edited, site="inputs")
        return self._inputs

    def rounds(
        self,
        method: str,
        facts: Sequence[Fact],
        others: Sequence[tuple[str, str]],
        size: int,
        tell: Callable[[str], None],
    ) -> list[dict[str, Any]]:
        """Write round after round on the edited model.

        Returns:
            Rows with the score over everything written so far, and that of the first round alone.
        """
        if method == "append":
            self.inputs(self.settings(method))  # of the unedited model
        deltas: list[fs.Delta] = []
        rows = []
        for first in range(0, len(facts), size):
            started = time.process_time()
            some = facts[first : first + size]
            with applied(self.lm, deltas):
                deltas.append(self.edit(method, some, deltas))
            seconds = time.process_time() - started
            step = 5 if first < 3_000 else 20
            if len(deltas) % step and first + size < len(facts) and len(deltas) > 1:
                continue  # asking takes as long as writing
            with applied(self.lm, deltas):
                row = {
                    "facts": first + size,
                    "changes": self.changes,
                    **score(self.lm, facts[: first + size], others),
                    "solve_s": round(seconds, 1),
                }
                row["first_round"] = score(self.lm, facts[:size], others)["efficacy"]
            norms = {
                x: sum(d.dense(x) for d in deltas).norm() / self.lm.ffn[x].weight().norm()
                for x in deltas[0].layers
            }
            row["norms"] = {layer: round(float(norm), 3) for layer, norm in norms.items()}
            rows.append(row)
            tell(f"{method}, round {len(deltas)}: {row}")
        return rows


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas", choices=atlas.names())
    parser.add_argument("--loads", type=float, nargs="+", default=[0.003, 0.03, 0.1])
    parser.add_argument(
        "--facts", type=int, nargs="+", default=[], help="numbers of facts, in place of loads"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--rounds", type=int, help="facts in a round: write one round after another up to the load"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings other than the recommended: repair=0 steps=30",
    )
    parser.add_argument(
        "--others",
        type=int,
        default=2000,
        help="facts outside the edits to ask; 0: all that the model knows",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the numbers, added to those in the file")
    parser.add_argument("--draw", type=Path, help="draw --json's numbers, and measure nothing")
    return parser.parse_args()


def main() -> None:
    """Measure every method at every load, or draw what was measured."""
    given = arguments()
    if given.draw:
        return draw(json.loads(given.json.read_text()), given.draw)
    torch.set_num_threads(1)
    changes = {name: json.loads(value) for name, value in (pair.split("=") for pair in given.set)}
    bench = Bench(given.model, given.seed, changes)

    def keep(kind: str, method: str, load: float, row: Any) -> None:
        if given.json:
            whole = json.loads(given.json.read_text()) if given.json.is_file() else {}
            rows = whole.setdefault(given.model, {}).setdefault(kind, {}).setdefault(method, {})
            rows[str(load)] = row
            given.json.write_text(json.dumps(whole, indent=1) + "\n")

    room = len(bench.layers) * bench.d_ff
    counts = given.facts or [max(1, round(load * room)) for load in given.loads]
    loads = [n / room for n in counts] if given.facts else given.loads
    for count, load in zip(counts, loads, strict=True):
        facts, others = chosen(bench.lm, count, given.seed, given.others)
        size = f"{len(facts)} facts in layers {bench.layers}, {len(others)} others"
        bench.same = same_subject(bench.lm, facts, given.seed)
        print(f"{given.model}, load {load:.4g}: {size}", flush=True)
        for method in given.methods:
            if given.rounds:
                tell = partial(print, flush=True)
                rows = bench.rounds(method, facts, others, given.rounds, tell)
                keep("rounds", method, round(load, 4), rows)
                continue
            peak_mb(reset=True)
            row = {
                "facts": len(facts),
                "others": len(others),
                "changes": changes if method in SPREADING else {},
            }
            row.update(bench.run(method, facts, others))
            row["peak_mb"] = peak_mb()
            print(f"{method:12} {row}", flush=True)
            keep("batch", method, round(load, 4), row)


# ── tables and pictures ───────────────────────────────────────────────────────────────────────────


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draw a picture for each model and kind, and print the numbers as tables.

    Args:
        measured: The numbers, as main writes them.
        path: The file of the pictures. The names of model and kind are added.
    """
    for model, kinds in measured.items():
        batch = {
            method: {float(load): row for load, row in rows.items()}
            for method, rows in kinds["batch"].items()
        }
        print_scores(model, batch)
        print_costs(model, batch)
        series = {}
        for method, rows in batch.items():
            if method == "r-rome" and "append" in batch:
                continue  # there are eight styles, and it is near ROME
            scores = [rows[load]["score"] for load in sorted(rows)]
            series[method] = (sorted(rows), scores, scores, scores)
        fs.curves(
            series,
            x_label="load = facts / (layers x d_ff)",
            y_label="score (harmonic mean, %)",
            title=f"{model}: facts written in one batch",
            log_x=True,
            path=path.with_name(f"{path.stem}-{model}{path.suffix}"),
        )
        lines = {}
        for method, by_load in kinds.get("rounds", {}).items():
            rows = next(iter(by_load.values()))
            print_rounds(f"{model}, {method}", rows)
            facts, scores = [row["facts"] for row in rows], [row["score"] for row in rows]
            first = [row["first_round"] for row in rows]
            lines[method] = (facts, scores, scores, scores)
            lines[f"{method}, first round"] = (facts, first, first, first)
        if lines:
            fs.curves(
                lines,
                x_label="facts written so far",
                y_label="%",
                title=f"{model}: one round after another",
                path=path.with_name(f"{path.stem}-{model}-rounds{path.suffix}"),
            )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def print_scores(model: str, batch: dict[str, dict[float, Any]]) -> None:
    """Print the score of each method at each load, with its three parts."""
    loads = sorted({load for rows in batch.values() for load in rows})
    table = []
    for method, rows in batch.items():
        cells = [method]
        for load in loads:
            row = rows.get(load)
            names = ("efficacy", "generalization", "specificity")
            parts = row and " / ".join(f"{row[name]:.0f}" for name in names)
            cells.append(f"{row['score']:.1f} ({parts})" if row else "")
        table.append(cells)
    title = f"{model}: score (efficacy / generalization / specificity)"
    print_table(title, ["load", *map(str, loads)], table)


def print_costs(model: str, batch: dict[str, dict[float, Any]]) -> None:
    """Print seconds, memory, and the numbers that explain the shares."""
    loads = sorted({load for rows in batch.values() for load in rows})
    table = []
    for load, (method, rows) in itertools.product(loads, batch.items()):
        if load in rows:
            row = rows[load]
            parts = [row[name] for name in ("targets_s", "solve_s") if name in row]
            seconds = f"{sum(parts):.0f}" if parts else "not timed"
            norms, overlaps = (
                " ".join(f"{x:.2f}" for x in row.get(name, {}).values())
                for name in ("norms", "overlap")
            )
            table.append((load, row["facts"], method, seconds, row["peak_mb"], norms, overlaps))
    columns = ["load", "facts", "method", "seconds", "MB", "norms", "overlap"]
    print_table(f"{model}: cost, and the numbers that explain the shares", columns, table)


def print_rounds(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the score after each measured round."""
    names = ("efficacy", "first_round", "generalization", "specificity", "score")
    table = []
    for row in rows:
        norms = " ".join(f"{x:.2f}" for x in row["norms"].values())
        shares = [f"{row[key]:.1f}" for key in names]
        table.append((row["facts"], *shares, f"{row['solve_s']:.0f}", norms))
    columns = ["facts", "efficacy", "first round", *names[2:], "seconds a round", "norms"]
    print_table(f"{name}, in rounds of {rows[0]['facts']}:", columns, table)


if __name__ == "__main__":
    main()
