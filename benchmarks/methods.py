"""How many facts can be written? Every editor at several loads, one batch or round after round, beside plain fine-tuning.

    python benchmarks/methods.py --model atlas --loads 0.003 0.03 0.1 --json benchmarks/results/methods.json
    python benchmarks/methods.py --model atlas --rounds 100 --loads 1 --methods memit alphaedit --json benchmarks/results/methods.json
    python benchmarks/methods.py --json benchmarks/results/methods.json --draw docs/methods.png        # picture and table, nothing measured

What a model can hold depends on its keys, so edits are counted as load = facts / (edited layers x d_ff): 10,000 facts in six layers of
GPT-J are 0.10. Facts are real ones that the model knows in several phrasings, each given another object of its relation. By greedy exact
match of the whole object: efficacy (the edited prompt), generalization (other phrasings of the fact, held-out ones first), specificity
(facts outside the edits that the model said before, in a random phrasing each). The table's score is their harmonic mean.

`memit`, `emmet`, `alphaedit`: the recommended settings, repair included. `memit-plain`: one pass with mean keys as published, at the best
of several weights and step sizes for each load (its best setting is chosen by the score itself, so it is flattered). `ft-l`: Adam on one
down-projection with an L-infinity clamp. `lora`: peft on all down-projections. Targets at one load are found once and given to all editors
that share them; seconds are processor seconds of one thread and count them for each. Memory is the process's peak during the run, model and
second moments included. What explains the shares stands beside them: `norms`, each layer's |delta| / |W|, and `overlap`, the share of
a fact's key that the others' keys explain, in the metric of the second moment (median over facts, first and last edited layer).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit import methods as editors
from factsmith.edit.contexts import generate_contexts, generate_openings
from factsmith.edit.delta import applied, written
from factsmith.edit.finetune import FineTuneConfig, LoraConfig, fine_tune, lora
from factsmith.edit.search import find_targets
from factsmith.edit.target import Targets
from factsmith.model.language_model import LanguageModel

SPREADING = ("memit", "emmet", "alphaedit")
METHODS = (*SPREADING, "memit-plain", "rome", "r-rome", "ft-l", "lora")
PLAIN = [
    (weight, lr) for lr in (0.5, 0.05) for weight in (0.03, 0.1, 0.3, 1.0, 3.0)
]  # weight in units of d_ff, lr in those of the stream
COARSE = [(weight, 0.5) for weight in (0.3, 1.0, 3.0)]  # for loads above 0.11


def chosen(
    lm: LanguageModel, count: int, seed: int, others: int
) -> tuple[list[Fact], list[tuple[str, str]]]:
    """`count` edits, and (prompt, object) of up to `others` known facts outside them."""
    draw = random.Random(seed)
    pool = list(atlas.facts())
    draw.shuffle(pool)
    objects = {
        relation: sorted({fact.object for fact in atlas.facts(relation)})
        for relation in atlas.relations()
    }
    facts: list[Fact] = []
    seen: set[tuple[str, str]] = set()
    for at in range(0, len(pool), 500):
        if len(facts) >= count:
            break
        some = [fact for fact in pool[at : at + 500] if (fact.subject, fact.relation) not in seen]
        asked = [
            (f, t)
            for f in some
            for t in (*atlas.phrasings(f.relation).trained, *atlas.phrasings(f.relation).held_out)
        ]
        right = lm.says(
            [t.replace("{}", f.subject) for f, t in asked], [f.object for f, _ in asked]
        )
        held: dict[atlas.AtlasFact, list[str]] = {}
        for (fact, template), ok in zip(asked, right, strict=True):
            if ok:
                held.setdefault(fact, []).append(template)
        for fact, templates in held.items():
            told = atlas.phrasings(fact.relation)
            near = {other.object for other in atlas.facts_about(fact.subject)}
            wanted = [o for o in objects[fact.relation] if o not in near]
            if (
                templates[0] != told.trained[0]
                or len(templates) < 2
                or not wanted
                or (fact.subject, fact.relation) in seen
            ):
                continue
            seen.add((fact.subject, fact.relation))
            held_out = [t for t in templates if t in told.held_out]
            trained = [t for t in templates[1:] if t not in held_out]
            other = [*held_out, *draw.sample(trained, min(3, len(trained)))][:5]
            facts.append(
                Fact(
                    fact.subject,
                    templates[0],
                    draw.choice(wanted),
                    target_true=fact.object,
                    paraphrases=other,
                    relation=fact.relation,
                )
            )
    facts = facts[:count]
    edited = {(fact.subject, fact.relation) for fact in facts}
    rest = [f for f in pool if (f.subject, f.relation) not in edited]
    rest = rest[: 2 * others] if others else rest
    prompts = [
        draw.choice(atlas.phrasings(f.relation).trained).replace("{}", f.subject) for f in rest
    ]
    said = lm.says(prompts, [f.object for f in rest])
    kept = [(p, f.object) for p, f, ok in zip(prompts, rest, said, strict=True) if ok]
    return facts, kept[:others] if others else kept


def score(
    lm: LanguageModel, facts: Sequence[Fact], others: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Efficacy, generalization, specificity and their harmonic mean, in percent, of the model as it is."""
    asked = [(text, fact.target or "") for fact in facts for text in fact.paraphrase_texts]
    shares = {
        "efficacy": lm.says([fact.text for fact in facts], [fact.target or "" for fact in facts]),
        "generalization": lm.says([text for text, _ in asked], [target for _, target in asked]),
        "specificity": lm.says([prompt for prompt, _ in others], [said for _, said in others]),
    }
    found = {name: round(100 * statistics.fmean(right), 2) for name, right in shares.items()}
    found["score"] = round(3 / sum(1 / max(value, 1e-9) for value in found.values()), 2)
    return found


# ── editing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def overlap(keys: torch.Tensor, moment: fs.SecondMoment) -> float:
    """Of each key's squared length in the metric of C, the share that lies in the span of the others; the median. keys (n, d_ff)."""
    if len(keys) < 2:
        return 0.0
    whitened = torch.linalg.solve_triangular(moment.factor, keys.double().T, upper=False)
    gram = whitened.T @ whitened
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    own = 1 / torch.linalg.inv(gram).diagonal()  # squared distance from the others' span
    return float((1 - own / gram.diagonal()).clamp(0, 1).median())


def peak_mb(reset: bool = False) -> int:
    """The process's largest resident memory since it was reset (Linux), in MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) // 1024


class Bench:
    """A model, its moments and contexts; targets found once for each set of facts and way of searching."""

    def __init__(self, name: str, seed: int, changes: dict[str, Any]) -> None:
        self.name, self.seed, self.changes = name, seed, changes
        self.lm = fs.load(name)
        self.layers = fs.MemitConfig.recommended(self.lm).layers or (0,)
        self.d_ff = self.lm.ffn[self.layers[0]].d_ff
        self.moments = find_moments(
            self.lm, sorted({*self.layers, fs.RomeConfig.recommended(self.lm).layer or 0})
        )
        self.openings, self.contexts = (
            generate_openings(self.lm, seed),
            generate_contexts(self.lm, seed),
        )
        self._targets: dict[tuple[Any, ...], tuple[Targets, float]] = {}

    def targets(self, facts: Sequence[Fact], config: fs.MemitConfig) -> tuple[Targets, float]:
        """Targets in the stream after the last layer, and the seconds they took."""
        key = (
            tuple(f.text for f in facts),
            config.lr,
            config.steps,
            config.clamp,
            config.stop_loss,
            config.scale,
        )
        if key not in self._targets:
            started = time.process_time()
            found = find_targets(
                self.lm, facts, self.layers[-1], config, self.openings, site="stream"
            )
            self._targets = {key: (found, time.process_time() - started)}
        return self._targets[key]

    def settings(self, kind: type[Any]) -> Any:
        """The recommended settings, but for what was asked for."""
        return dataclasses.replace(kind.recommended(self.lm), **self.changes)

    def measured(
        self, facts: Sequence[Fact], others: Sequence[tuple[str, str]], delta: fs.Delta
    ) -> dict[str, Any]:
        """The score with a delta in the model, how large it is, and how much its keys have in common."""
        norms = {
            layer: float(delta.dense(layer).norm() / self.lm.ffn[layer].weight().norm())
            for layer in delta.layers
        }
        ends = sorted({min(delta.layers), max(delta.layers)})
        why = {
            "norms": {layer: round(norm, 3) for layer, norm in norms.items()},
            "overlap": {
                layer: round(overlap(delta.k_star[layer], self.moments[layer]), 3) for layer in ends
            },
        }
        with applied(self.lm, delta):
            return {**score(self.lm, facts, others), **why}

    def run(
        self, method: str, facts: Sequence[Fact], others: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """One batch with one method."""
        started = time.process_time()
        if method in SPREADING:
            solver, kind = editors.METHODS[method]
            config = self.settings(kind)
            found, seconds = self.targets(facts, config)
            begun = time.process_time()
            delta = solver(
                self.lm, facts, config, moments=self.moments, contexts=self.openings, targets=found
            )
            took = {
                "targets_s": round(seconds, 1),
                "solve_s": round(time.process_time() - begun, 1),
            }
            return {**self.measured(facts, others, delta), **took}
        if method == "memit-plain":
            grid = PLAIN if len(facts) < 0.11 * len(self.layers) * self.d_ff else COARSE
            tried = (self._plain(facts, others[:2000], weight, lr) for weight, lr in grid)
            best, delta = max(tried, key=lambda found: found[0]["score"])
            return {**best, **self.measured(facts, others, delta)}
        if method in ("rome", "r-rome"):
            delta = editors.METHODS[method][0](
                self.lm, facts, moments=self.moments, contexts=self.contexts
            )
            return {
                **self.measured(facts, others, delta),
                "solve_s": round(time.process_time() - started, 1),
            }
        tuned: Callable[[], Any] = {
            "ft-l": lambda: fine_tune(self.lm, facts, FineTuneConfig(layers=self.layers[:1])),
            "lora": lambda: lora(self.lm, facts, LoraConfig(layers=self.layers)),
        }[method]
        with written(self.lm, tuned()):
            seconds = time.process_time() - started
            return {**score(self.lm, facts, others), "solve_s": round(seconds, 1)}

    def _plain(
        self, facts: Sequence[Fact], others: Sequence[tuple[str, str]], weight: float, lr: float
    ) -> tuple[dict[str, Any], fs.Delta]:
        config = fs.MemitConfig(
            layers=self.layers,
            scale="auto",
            lr=lr,
            steps=20 if lr == 0.5 else 80,
            clamp=3.0,
            stop_loss=0.05,
            moment_weight=weight * self.d_ff,
        )
        found, seconds = self.targets(facts, config)
        begun = time.process_time()
        delta = fs.memit(
            self.lm, facts, config, moments=self.moments, contexts=self.openings, targets=found
        )
        took = {"targets_s": round(seconds, 1), "solve_s": round(time.process_time() - begun, 1)}
        return {
            **self.measured(facts, others, delta),
            **took,
            "setting": {"weight": weight, "lr": lr},
        }, delta

    def rounds(
        self,
        method: str,
        facts: Sequence[Fact],
        others: Sequence[tuple[str, str]],
        size: int,
        tell: Callable[[str], None],
    ) -> Any:
        """Round after round on the edited model: the score over everything written so far, and of the first round alone."""
        solver, kind = editors.METHODS[method]
        deltas: list[fs.Delta] = []
        found = []
        for at in range(0, len(facts), size):
            started = time.process_time()
            with applied(self.lm, deltas):
                deltas.append(
                    solver(
                        self.lm,
                        facts[at : at + size],
                        self.settings(kind),
                        moments=self.moments,
                        contexts=self.openings,
                        beneath=deltas,
                    )
                )
            seconds = time.process_time() - started
            if len(deltas) % 5 and at + size < len(facts) and len(deltas) > 1:
                continue  # asking takes as long as writing
            with applied(self.lm, deltas):
                row = {
                    "facts": at + size,
                    "changes": self.changes,
                    **score(self.lm, facts[: at + size], others),
                    "solve_s": round(seconds, 1),
                }
                row["first_round"] = score(self.lm, facts[:size], others)["efficacy"]
            norms = {
                x: sum(d.dense(x) for d in deltas).norm() / self.lm.ffn[x].weight().norm()
                for x in self.layers
            }
            row["norms"] = {layer: round(float(norm), 3) for layer, norm in norms.items()}
            found.append(row)
            tell(f"{method}, round {len(deltas)}: {row}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas", choices=atlas.names())
    parser.add_argument("--loads", type=float, nargs="+", default=[0.003, 0.03, 0.1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--rounds", type=int, help="facts a round: one round after another up to the load"
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
    parser.add_argument("--json", type=Path, help="the numbers, added to what is there")
    parser.add_argument("--draw", type=Path, help="draw --json's numbers, and measure nothing")
    given = parser.parse_args()
    if given.draw:
        return draw(json.loads(given.json.read_text()), given.draw)
    torch.set_num_threads(1)
    changes = {name: json.loads(value) for name, value in (pair.split("=") for pair in given.set)}
    bench = Bench(given.model, given.seed, changes)

    def keep(kind: str, method: str, load: float, row: Any) -> None:
        if given.json:
            whole = json.loads(given.json.read_text()) if given.json.is_file() else {}
            whole.setdefault(given.model, {}).setdefault(kind, {}).setdefault(method, {})[
                str(load)
            ] = row
            given.json.write_text(json.dumps(whole, indent=1) + "\n")

    for load in given.loads:
        count = max(1, round(load * len(bench.layers) * bench.d_ff))
        facts, others = chosen(bench.lm, count, given.seed, given.others)
        print(
            f"{given.model}, load {load}: {len(facts)} facts in layers {bench.layers}, {len(others)} others",
            flush=True,
        )
        for method in given.methods:
            if given.rounds:
                keep(
                    "rounds",
                    method,
                    load,
                    bench.rounds(
                        method, facts, others, given.rounds, lambda line: print(line, flush=True)
                    ),
                )
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
            keep("batch", method, load, row)


def draw(found: dict[str, Any], path: Path) -> None:
    """A picture for each model and kind, `path` with their names added; and the numbers as tables, printed."""
    for model, kinds in found.items():
        series = {}
        batch = {
            method: {float(load): row for load, row in rows.items()}
            for method, rows in kinds["batch"].items()
        }
        loads = sorted({load for rows in batch.values() for load in rows})
        print(
            f"\n{model}: score (efficacy / generalization / specificity)\n\n| load | "
            + " | ".join(map(str, loads))
            + " |"
        )
        print("|---" * (1 + len(loads)) + "|")
        for method, rows in batch.items():
            cells = []
            for load in loads:
                row = rows.get(load)
                parts = row and " / ".join(
                    f"{row[name]:.0f}" for name in ("efficacy", "generalization", "specificity")
                )
                cells.append(f"{row['score']:.1f} ({parts})" if row else "")
            print(f"| {method} | " + " | ".join(cells) + " |")
            scores = [rows[load]["score"] for load in sorted(rows)]
            series[method] = (sorted(rows), scores, scores, scores)
        print(
            f"\n{model}: cost, and what explains the shares\n\n| load | facts | method | seconds | MB | norms | overlap |\n"
            + "|---" * 7
            + "|"
        )
        for load, (method, rows) in itertools.product(loads, batch.items()):
            if load in rows:
                row = rows[load]
                seconds = f"{row.get('targets_s', 0) + row.get('solve_s', 0):.0f}"
                why = " | ".join(
                    " ".join(f"{x:.2f}" for x in row.get(name, {}).values())
                    for name in ("norms", "overlap")
                )
                print(
                    f"| {load} | {row['facts']} | {method} | {seconds} | {row['peak_mb']} | {why} |"
                )
        place = path.with_name(f"{path.stem}-{model}{path.suffix}")
        x, y = "load = facts / (layers x d_ff)", "score (harmonic mean, %)"
        fs.curves(
            series,
            x_label=x,
            y_label=y,
            title=f"{model}: facts written in one batch",
            log_x=True,
            path=place,
        )
        lines = {}
        for method, rows in kinds.get("rounds", {}).items():
            told = next(iter(rows.values()))
            print(f"\n{model}, {method}, in rounds of {told[0]['facts']}:\n")
            print(
                "| facts | efficacy | first round still | generalization | specificity | score | seconds a round | norms |\n|"
                + "---|" * 8
            )
            for row in told:
                names = ("efficacy", "first_round", "generalization", "specificity", "score")
                norms = " ".join(f"{x:.2f}" for x in row["norms"].values())
                print(
                    f"| {row['facts']} | {' | '.join(f'{row[name]:.1f}' for name in names)} | {row['solve_s']:.0f} | {norms} |"
                )
            at, scores = [row["facts"] for row in told], [row["score"] for row in told]
            first = [row["first_round"] for row in told]
            lines |= {
                method: (at, scores, scores, scores),
                f"{method}, first round": (at, first, first, first),
            }
        if lines:
            place = path.with_name(f"{path.stem}-{model}-rounds{path.suffix}")
            fs.curves(
                lines,
                x_label="facts written so far",
                y_label="%",
                title=f"{model}: one round after another",
                path=place,
            )


if __name__ == "__main__":
    main()
