"""How full is too full: facts are written until others are lost, and the library predicts it.

    python benchmarks/capacity.py --model atlas --folder runs/capacity
    python benchmarks/capacity.py --model atlas-llama --folder runs/capacity
    python benchmarks/capacity.py --folder runs/capacity \
        --json benchmarks/results/capacity.json --draw docs/capacity.png

The first two commands write facts and ask questions. Each takes 15 minutes of one core. A killed
run continues where it stopped, since --folder keeps each delta and its answers. The third command
fits the formula of `factsmith capacity` in seconds, and compares predicted with measured losses.

Real facts that the model knows are given another object (see chosen_facts.py). They are written in
batches of growing load, and in rounds on top of one another. After each, 800 facts outside of them
are asked again. The loss is the share of these facts that the model answered before and no longer
answers.

Columns of the first table: what the loss is predicted from (a row), and what the fit is tested on
(a column), as R² and root mean square error in points. Columns of the last table: the number of
facts at which a series reaches the limit, as measured and as predicted, and the number at which the
library warns, each from the patches and from the number of facts alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import factsmith as fs
from capacity_fit import TOOK, Points, analysed, column, held_out, series
from chosen_facts import chosen
from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.contexts import generate_contexts, generate_openings
from factsmith.edit.delta import Delta, applied
from factsmith.edit.methods import METHODS
from factsmith.edit.search import find_targets
from factsmith.edit.target import Targets
from factsmith.patch.capacity import LIMIT, capacity
from factsmith.patch.forecast import Fit

OTHERS = 800
"""Facts outside the edits that are asked again."""
POOL = 1000
"""Facts to write."""
QUICK = {"steps": 30, "repair": 0}
"""Settings of most jobs. They take less time than the recommended ones."""


class Job(NamedTuple):
    """Facts written with one method."""

    method: str
    how: str
    """"batch": each size is a batch of its own. "rounds": each size is reached by a round on top of
    the earlier ones."""
    sizes: tuple[int, ...]
    changes: dict[str, Any]
    """Settings other than the recommended ones."""

    @property
    def name(self) -> str:
        """The name of the job's folder."""
        recommended = not self.changes and self.method != "rome"
        return f"{self.method}-{self.how}{'-recommended' if recommended else ''}"


JOBS = (
    Job("memit", "batch", (5, 10, 20, 40, 70, 110, 160, 230, 320, 450, 650, 1000), QUICK),
    Job("alphaedit", "batch", (5, 15, 30, 55, 90, 135, 195, 280, 400), QUICK),
    Job("emmet", "batch", (15, 55, 135, 280), QUICK),
    Job("memit", "rounds", (10, 25, 50, 100, 175, 250, 350, 500), QUICK),
    Job("rome", "rounds", (1, 3, 8, 15, 30, 50, 75), {}),
    Job("alphaedit", "rounds", (25, 75, 150, 250), QUICK),
    Job("memit", "batch", (10, 30, 60, 120), {}),
)


class Bench:
    """A model with its second moments and contexts, the facts to write, and the facts to ask.

    Args:
        name: The model's name.
        seed: Seed of the facts and the contexts.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.lm = fs.load(name)
        self.layers = fs.MemitConfig.recommended(self.lm).layers or (0,)
        self.moments = find_moments(
            self.lm, sorted({*self.layers, fs.RomeConfig.recommended(self.lm).layer or 0})
        )
        self.facts, self.others = chosen(self.lm, POOL, seed, OTHERS)
        self.openings = generate_openings(self.lm, seed)
        self.contexts = generate_contexts(self.lm, seed)
        self._targets: Targets | None = None

    def settings(self, job: Job) -> Any:
        """Return the recommended settings of a job's method, with the job's changes."""
        return dataclasses.replace(METHODS[job.method].config.recommended(self.lm), **job.changes)

    def batch(self, job: Job, size: int) -> Delta:
        """Write one batch.

        Quick jobs share their targets, which are searched once for all facts. A fact's target does
        not depend on the other facts.
        """
        config, count = self.settings(job), len(self.facts)
        # Other methods start from the other end, so that not all points are of the same facts.
        which = slice(0, size) if job.method == "memit" else slice(count - size, count)
        return fs.edit(
            self.lm,
            self.facts[which],
            job.method,
            config,
            moments=self.moments,
            contexts=self.openings,
            targets=self._targets_of(which, config) if job.changes else None,
        )

    def _targets_of(self, which: slice, config: fs.MemitConfig) -> Targets:
        """Return the targets of some of the facts."""
        if self._targets is None:
            last = self.layers[-1]
            self._targets = find_targets(
                self.lm, self.facts, last, config, self.openings, site="stream"
            )
        targets = self._targets
        names = {field.name for field in dataclasses.fields(targets)} - {"layer", "site"}
        parts = {name: getattr(targets, name)[which] for name in names}
        return dataclasses.replace(targets, **parts)

    def round(self, job: Job, before: Sequence[Delta], size: int) -> Delta:
        """Write the facts that are missing, up to `size`, on top of earlier rounds."""
        at = sum(len(delta.facts) for delta in before)
        with applied(self.lm, before):
            return fs.edit(
                self.lm,
                self.facts[at:size],
                job.method,
                self.settings(job),
                moments=self.moments,
                contexts=self.contexts if job.method == "rome" else self.openings,
                beneath=before,
            )

    def asked(self, deltas: Sequence[Delta]) -> dict[str, float]:
        """Return how the model with the deltas answers, in per cent.

        Returns:
            "efficacy", the share of the written facts that are answered with the target, and
            "loss", the share of the other facts that are answered otherwise.
        """
        facts: list[Fact] = [fact for delta in deltas for fact in delta.facts]
        with applied(self.lm, deltas):
            efficacy = self.lm.says(
                [fact.text for fact in facts], [fact.target or "" for fact in facts]
            )
            stayed = self.lm.says(
                [prompt for prompt, _ in self.others], [answer for _, answer in self.others]
            )
        return {
            "efficacy": 100 * sum(efficacy) / len(efficacy),
            "loss": 100 - 100 * sum(stayed) / len(stayed),
        }


def measure(name: str, folder: Path, seed: int) -> None:
    """Run all jobs on one model. A point that the folder already has is not measured again."""
    bench = Bench(name, seed)
    for job in JOBS:
        before: list[Delta] = []
        for size in job.sizes:
            place = folder / name / job.name / f"{size:04}"
            started = time.process_time()
            if (place / "point.json").is_file():
                if job.how == "rounds":
                    before.append(Delta.load(place))
                continue
            delta = bench.batch(job, size) if job.how == "batch" else bench.round(job, before, size)
            before = [*before, delta] if job.how == "rounds" else [delta]
            solved = time.process_time() - started
            numbers = {
                "facts": sum(len(delta.facts) for delta in before),
                "others": len(bench.others),
                **bench.asked(before),
            }
            delta.save(place)
            point = {
                "model": name,
                "method": job.method,
                "how": job.how,
                "changes": job.changes,
                **numbers,
            }
            (place / "point.json").write_text(json.dumps(point) + "\n")
            asked = time.process_time() - started - solved
            print(f"{job.name} {numbers} {solved:.0f} + {asked:.0f} s", flush=True)


# ── what describes a point ────────────────────────────────────────────────────────────────────────


def describe(folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Return every point in the folder, with what `capacity` says about its deltas.

    Args:
        folder: What `measure` wrote.
        known: Points that are described already. They are returned unchanged.
    """
    points = dict(known)
    for name in atlas.names():
        places = sorted(path.parent for path in (folder / name).glob("*/*/point.json"))
        if all(_key(place) in points for place in places):
            continue
        lm = fs.load(name)
        layers = range(1 + max(fs.MemitConfig.recommended(lm).layers or (0,)))
        moments = find_moments(lm, layers)
        weights = {layer: lm.ffn[layer].weight().detach() for layer in layers}
        for place in places:
            if _key(place) in points:
                continue
            rounds = sorted(place.parent.iterdir()) if "-rounds" in place.parent.name else [place]
            deltas = [Delta.load(at) for at in rounds if at <= place]
            full = capacity(deltas, weights, moments)
            points[_key(place)] = {
                "job": place.parent.name,
                **json.loads((place / "point.json").read_text()),
                "load": full.load,
                "disturbance": full.disturbance,
                "full": full.full,
                "layers": [{**vars(use), "full": use.full} for use in full.layers],
            }
    return dict(sorted(points.items()))


def _key(place: Path) -> str:
    return "/".join(place.parts[-3:])


# ── showing ───────────────────────────────────────────────────────────────────────────────────────

STYLES = {
    "memit": ("#0072B2", "o"),
    "alphaedit": ("#D55E00", "s"),
    "emmet": ("#009E73", "^"),
    "rome": ("#CC79A7", "D"),
}


def draw(points: Points, results: dict[str, Any], path: Path) -> None:
    """Draw predicted and measured losses.

    Left: each model's points, predicted by the fit of the other model. Right: the rounds, measured
    as marks and predicted as lines.
    """
    took = [point for point in points if point["efficacy"] >= TOOK]
    figure = Figure(figsize=(6.8, 2.9), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    r2 = results["tests"]["disturbance and load"]["tested on another model"]["r2"]
    draw_agreement(left, took, r2)
    draw_rounds(right, took, Fit(**results["fit"]))
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=6,
        frameon=False,
    )
    for axes in (left, right):
        axes.tick_params(labelsize=7, length=2)
        axes.title.set_fontsize(7.5)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(7.5)
    figure.savefig(path)


def draw_agreement(axes: Axes, points: Points, r2: float) -> None:
    """Draw each point's predicted loss over its measured loss."""
    predicted = held_out(points, "disturbance and load", lambda point: point["model"])
    for method, (colour, mark) in STYLES.items():
        for model, face in zip(atlas.names(), (colour, "white"), strict=True):
            pairs = [
                (point["loss"], y)
                for point, y in zip(points, predicted.tolist(), strict=True)
                if (point["method"], point["model"]) == (method, model)
            ]
            axes.plot(
                *zip(*pairs, strict=True),
                mark,
                color=colour,
                markerfacecolor=face,
                markersize=3.5,
                linestyle="",
                label=f"{method}, {model}",
            )
    axes.plot([0, 28], [0, 28], color="black", linewidth=0.5, linestyle=":")
    axes.set(
        xlabel="measured loss, points",
        ylabel="predicted, fitted on the other model",
        title=f"R² {r2:.2f} on a model not fitted on",
    )


def draw_rounds(axes: Axes, points: Points, fitted: Fit) -> None:
    """Draw the losses of each series of rounds over the number of facts."""
    for (model, job), rounds in series(points).items():
        if not job.endswith("-rounds"):
            continue
        colour, mark = STYLES[rounds[0]["method"]]
        solid = model == atlas.names()[0]
        facts = [point["facts"] for point in rounds]
        axes.plot(
            facts,
            column(rounds, "loss").tolist(),
            mark,
            color=colour,
            markerfacecolor=colour if solid else "white",
            markersize=3.5,
        )
        axes.plot(
            facts,
            [fitted.loss(point["disturbance"], point["load"]) for point in rounds],
            color=colour,
            linewidth=0.9,
            linestyle="-" if solid else "--",
        )
    axes.axhline(LIMIT, color="black", linewidth=0.5, linestyle=":")
    axes.set(
        xscale="log",
        xlabel="facts written, in rounds",
        ylabel="loss, points",
        title="marks measured, lines predicted (- - atlas-llama)",
    )


def as_json(results: dict[str, Any], points: dict[str, Any]) -> str:
    """Return the results and the points as JSON, with a line for each point."""
    lines = ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(_rounded(point))}" for key, point in points.items()
    )
    return json.dumps(results, indent=1)[:-2] + f',\n "points": {{\n{lines}\n }}\n}}\n'


def _rounded(value: Any) -> Any:
    """Round all numbers in a value to six digits."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def show(results: dict[str, Any]) -> None:
    """Print the constants, the tests of the fit, and the breaking points."""
    print("constants", results["fit"])
    names = list(next(iter(results["tests"].values())))
    print("\n| predicted from | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    for predictor, row in results["tests"].items():
        cells = (f"R² {row[name]['r2']:.2f}, {row[name]['rmse']:.1f} points" for name in names)
        print(f"| {predictor} | {' | '.join(cells)} |")
    for name in ("models", "forecast on another model", "with points that did not take"):
        for what, row in results[name].items():
            print(f"{name}, {what}: {row}")
    names = list(results["breaking on another model"][0])
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in results["breaking on another model"]:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")


def main() -> None:
    """Measure one model, or fit the points of all models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=atlas.names(), help="write facts into it and ask")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/capacity"),
        help="the deltas and answers of all runs",
    )
    parser.add_argument("--json", type=Path, help="write the points and the fits to this file")
    parser.add_argument("--draw", type=Path, help="draw predicted and measured losses")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model:
        measure(args.model, args.folder, args.seed)
        return
    known = {}
    if args.json and args.json.is_file():
        known = json.loads(args.json.read_text())["points"]
    points = describe(args.folder, known)
    results = analysed(list(points.values()))
    show(results)
    if args.json:
        args.json.write_text(as_json(results, points))
    if args.draw:
        draw(list(points.values()), results, args.draw)


if __name__ == "__main__":
    main()
