"""How full is too full? Facts written until the rest suffers, and what `factsmith capacity` predicts beside what was measured.

    python benchmarks/capacity.py --model atlas --folder runs/capacity            # writes facts and asks: 15 minutes of one core a model
    python benchmarks/capacity.py --model atlas-llama --folder runs/capacity
    python benchmarks/capacity.py --folder runs/capacity --json benchmarks/results/capacity.json --draw docs/capacity.png    # fits, seconds

Real facts that the model knows are given another object (`methods.chosen`), and 800 facts outside of them are asked again: the loss is the
share of those that the model said before and no longer says. Batches of growing load, and rounds on top of one another. Killed, it goes on
where it stood: a delta and its answers are kept in --folder as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

import factsmith as fs
from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit import methods as editors
from factsmith.edit.contexts import generate_contexts, generate_openings
from factsmith.edit.delta import Delta, applied
from factsmith.edit.search import find_targets
from factsmith.edit.target import Targets
from factsmith.patch.capacity import LIMIT, WARNED_FROM, capacity
from factsmith.patch.forecast import Fit
from methods import chosen

OTHERS = 800
POOL = 1000
QUICK = {"steps": 30, "repair": 0}
TOOK = 70.0
"""Per cent of its facts that a point has to say to be fitted on: a patch that does not take is not kept either."""


class Job(NamedTuple):
    """Facts written with one method: each size a batch of its own, or in rounds on top of one another, up to each size."""

    method: str
    how: str  # batch, rounds
    sizes: tuple[int, ...]
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method}-{self.how}{'' if self.changes or self.method == 'rome' else '-recommended'}"


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
    """A model with its second moments and contexts, the facts to write, and those to ask."""

    def __init__(self, name: str, seed: int) -> None:
        self.lm = fs.load(name)
        self.layers = fs.MemitConfig.recommended(self.lm).layers or (0,)
        self.moments = find_moments(
            self.lm, sorted({*self.layers, fs.RomeConfig.recommended(self.lm).layer or 0})
        )
        self.facts, self.others = chosen(self.lm, POOL, seed, OTHERS)
        self.openings, self.contexts = (
            generate_openings(self.lm, seed),
            generate_contexts(self.lm, seed),
        )
        self._targets: Targets | None = None

    def settings(self, job: Job) -> Any:
        return dataclasses.replace(
            editors.METHODS[job.method][1].recommended(self.lm), **job.changes
        )

    def batch(self, job: Job, size: int) -> Delta:
        """One batch. Quick ones share their targets, found once for all facts: what is found for a fact does not depend on the others."""
        config, solver = self.settings(job), editors.METHODS[job.method][0]
        # From the other end for other methods, so that not all points are of the same facts.
        which = (
            slice(0, size)
            if job.method == "memit"
            else slice(len(self.facts) - size, len(self.facts))
        )
        given: dict[str, Any] = {}
        if job.changes:
            if self._targets is None:
                self._targets = find_targets(
                    self.lm, self.facts, self.layers[-1], config, self.openings, site="stream"
                )
            found = self._targets
            parts = {
                f.name: getattr(found, f.name)[which]
                for f in dataclasses.fields(found)
                if f.name not in ("layer", "site")
            }
            given["targets"] = dataclasses.replace(found, **parts)
        return solver(
            self.lm,
            self.facts[which],
            config,
            moments=self.moments,
            contexts=self.openings,
            **given,
        )

    def round(self, job: Job, before: Sequence[Delta], size: int) -> Delta:
        """The facts from what is written up to `size`."""
        at = sum(len(delta.facts) for delta in before)
        contexts = self.contexts if job.method == "rome" else self.openings
        with applied(self.lm, before):
            solver = editors.METHODS[job.method][0]
            return solver(
                self.lm,
                self.facts[at:size],
                self.settings(job),
                moments=self.moments,
                contexts=contexts,
                beneath=before,
            )

    def asked(self, deltas: Sequence[Delta]) -> dict[str, float]:
        """What is said with deltas in the model, in percent: the facts they hold, and of the others what is lost."""
        facts: list[Fact] = [fact for delta in deltas for fact in delta.facts]
        with applied(self.lm, deltas):
            efficacy = self.lm.says(
                [fact.text for fact in facts], [fact.target or "" for fact in facts]
            )
            stayed = self.lm.says(
                [prompt for prompt, _ in self.others], [said for _, said in self.others]
            )
        return {
            "efficacy": 100 * sum(efficacy) / len(efficacy),
            "loss": 100 - 100 * sum(stayed) / len(stayed),
        }


def measure(name: str, folder: Path, seed: int) -> None:
    """All jobs on one model; what is in the folder already is not done again."""
    bench = Bench(name, seed)
    for job in JOBS:
        before: list[Delta] = []
        for size in job.sizes:
            place = folder / name / job.name / f"{size:04}"
            started = time.process_time()
            if (place / "point.json").is_file():
                before.append(Delta.load(place)) if job.how == "rounds" else None
                continue
            delta = bench.batch(job, size) if job.how == "batch" else bench.round(job, before, size)
            before = [*before, delta] if job.how == "rounds" else [delta]
            solved = time.process_time() - started
            found = {
                "facts": sum(len(d.facts) for d in before),
                "others": len(bench.others),
                **bench.asked(before),
            }
            delta.save(place)
            point = {
                "model": name,
                "method": job.method,
                "how": job.how,
                "changes": job.changes,
                **found,
            }
            (place / "point.json").write_text(json.dumps(point) + "\n")
            print(
                f"{job.name} {found} {solved:.0f} + {time.process_time() - started - solved:.0f} s",
                flush=True,
            )


# ── what describes a point ──────────────────────────────────────────────────────────────────────────────────────────────────


def describe(folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Every point in the folder with what `capacity` says about its deltas; those that are known already are not described again."""
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
            found = capacity([Delta.load(at) for at in rounds if at <= place], weights, moments)
            of_layers = [{**vars(use), "full": use.full} for use in found.layers]
            described = {
                "load": found.load,
                "disturbance": found.disturbance,
                "full": found.full,
                "layers": of_layers,
            }
            points[_key(place)] = {
                "job": place.parent.name,
                **json.loads((place / "point.json").read_text()),
                **described,
            }
    return dict(sorted(points.items()))


def _key(place: Path) -> str:
    return "/".join(place.parts[-3:])


# ── fitting ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

Points = Sequence[dict[str, Any]]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def least_squares(
    predicted: Callable[[torch.Tensor], torch.Tensor],
    start: Sequence[float],
    measured: torch.Tensor,
) -> list[float]:
    """Positive parameters with the least mean square error."""
    logs = torch.tensor(start, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logs],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        error = (predicted(logs.exp()) - measured).square().mean()
        error.backward()
        return error

    optimizer.step(closure)
    return logs.detach().exp().tolist()


def column(points: Points, name: str) -> torch.Tensor:
    return torch.tensor([point[name] for point in points], dtype=torch.float64)


def both(x: torch.Tensor, load: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What the library computes (`Fit.loss`), for many points."""
    return -100 * torch.expm1(-((x / p[0]) ** p[1]) * load ** p[2])


def one(x: torch.Tensor, _: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The same with a single predictor."""
    return -100 * torch.expm1(-((x / p[0]) ** p[1]))


USUAL = ("memit-rounds", "memit-batch-recommended")
"""What says how much n facts disturb where nothing is known: with repairs, or round after round, as a workspace grows."""

PREDICTORS: dict[str, tuple[str, Loss, tuple[float, ...]]] = {
    "disturbance and load": ("disturbance", both, (0.5, 2.0, 0.5)),
    "disturbance": ("disturbance", one, (0.8, 2.0)),
    "load": ("load", one, (1.0, 1.0)),
    "full": ("full", one, (1.0, 1.0)),
    "norm": ("norm", one, (5.0, 2.0)),
}


def fit(points: Points, predictor: str = "disturbance and load") -> torch.Tensor:
    """The parameters of a predictor, from some points."""
    name, form, start = PREDICTORS[predictor]
    x, load = column(points, name), column(points, "load")
    return torch.tensor(
        least_squares(lambda p: form(x, load, p), start, column(points, "loss")),
        dtype=torch.float64,
    )


def predict(
    points: Points, parameters: torch.Tensor, predictor: str = "disturbance and load"
) -> torch.Tensor:
    name, form, _ = PREDICTORS[predictor]
    return form(column(points, name), column(points, "load"), parameters)


def held_out(
    points: Points, predictor: str, apart: Callable[[dict[str, Any]], Any]
) -> torch.Tensor:
    """Predictions for every point from the points that differ from it in something."""
    found = torch.zeros(len(points), dtype=torch.float64)
    for value in sorted({apart(point) for point in points}):
        inside = torch.tensor([apart(point) == value for point in points])
        others = [point for point, own in zip(points, inside, strict=True) if not own]
        found[inside] = predict(
            [point for point, own in zip(points, inside, strict=True) if own],
            fit(others, predictor),
            predictor,
        )
    return found


def agreement(measured: torch.Tensor, predicted: torch.Tensor) -> dict[str, float]:
    error = (measured - predicted).square()
    return {
        "points": len(measured),
        "r2": round(float(1 - error.sum() / (measured - measured.mean()).square().sum()), 3),
        "rmse": round(float(error.mean().sqrt()), 2),
    }


def growth_of(points: Points) -> tuple[float, float]:
    """`Fit.usual` and `Fit.growth`: one slope for all series on log scales; the height from MEMIT's rounds and its recommended batches."""
    rows = [
        [(x - mean(xs), y - mean(ys)) for x, y in zip(xs, ys, strict=True)]
        for xs, ys in (
            (column(own, "load").log().tolist(), column(own, "disturbance").log().tolist())
            for own in series(points).values()
        )
    ]
    pairs = [pair for row in rows for pair in row]
    slope = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    heights = [
        math.log(p["disturbance"]) - slope * math.log(p["load"])
        for p in points
        if p["job"] in USUAL
    ]
    return math.exp(mean(heights)), slope


def series(points: Points) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Points by model and job, by number of facts."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in sorted(points, key=lambda point: point["facts"]):
        found.setdefault((point["model"], point["job"]), []).append(point)
    return found


def constants(points: Points, error: float) -> Fit:
    """What the library is to predict by."""
    scale, power, crowding = fit(points).tolist()
    usual, growth = growth_of(points)
    most = {name: float(column(points, name).max()) for name in ("disturbance", "load")}
    return Fit(
        scale=scale, power=power, crowding=crowding, usual=usual, growth=growth, error=error, **most
    )


def forecasts(points: Points, fitted: Fit) -> list[tuple[int, float, float]]:
    """(facts there were, measured, predicted from then) for every point of a series from every earlier one."""
    found = []
    for own in series(points).values():
        for before, after in itertools.combinations(own, 2):
            now = (before["load"], before["disturbance"])
            x = fitted.disturbance_at(after["load"], now, min(1.0, before["facts"] / 10))
            found.append((before["facts"], after["loss"], fitted.loss(x, after["load"])))
    return found


def crossing(facts: Sequence[float], losses: Sequence[float], limit: float) -> float | None:
    """The number of facts at which a rising line of losses reaches the limit, None when it does not."""
    for (a, below), (b, above) in itertools.pairwise(
        zip([0.0, *facts], [0.0, *losses], strict=True)
    ):
        if below < limit <= above:
            return a + (b - a) * (limit - below) / (above - below)
    return None


def breaking(points: Points, fitted: Fit) -> list[dict[str, Any]]:
    """For every series that reaches the limit: where; where that is predicted and warned of, from its patches and from N alone."""
    found = []
    for (model, job), own in series(points).items():
        measured = crossing([p["facts"] for p in own], [p["loss"] for p in own], LIMIT)
        if measured is None:
            continue
        losses = [fitted.loss(p["disturbance"], p["load"]) for p in own]
        neurons = own[0]["facts"] / own[0]["load"]
        alone = [
            fitted.loss(fitted.disturbance_at(n / neurons), n / neurons) for n in range(1, 1001)
        ]
        row: dict[str, Any] = {"model": model, "job": job, "measured": round(measured)}
        for name, limit in (("predicted", LIMIT), ("warned", WARNED_FROM * LIMIT)):
            at = crossing([p["facts"] for p in own], losses, limit)
            ahead = crossing(range(1, 1001), alone, limit)
            row |= {name: at and round(at), f"{name}_from_n_alone": ahead and round(ahead)}
        found.append(row)
    return found


def analysed(points: Points) -> dict[str, Any]:
    """The fits, and how far they carry: on another model, another series, another method; with and without points that did not take."""
    for point in points:
        point["norm"] = mean(layer["norm"] for layer in point["layers"])
    took = [point for point in points if point["efficacy"] >= TOOK]
    by: dict[str, Callable[[dict[str, Any]], Any]] = {
        "another model": lambda p: p["model"],
        "another series": lambda p: (p["model"], p["job"]),
        "another method": lambda p: p["method"],
    }
    tests: dict[str, Any] = {}
    for predictor in PREDICTORS:
        tests[predictor] = {
            "fitted on all": agreement(
                column(took, "loss"), predict(took, fit(took, predictor), predictor)
            )
        }
        tests[predictor] |= {
            f"tested on {name}": agreement(column(took, "loss"), held_out(took, predictor, key))
            for name, key in by.items()
        }
    each = {}
    for name in atlas.names():
        own, other = ([p for p in took if (p["model"] == name) is same] for same in (True, False))
        each[f"fitted on the other, tested on {name}"] = agreement(
            column(own, "loss"), predict(own, fit(other))
        )
    error = tests["disturbance and load"]["tested on another model"]["rmse"]
    fitted = constants(took, error)
    ahead: list[tuple[int, float, float]] = []
    alone: list[tuple[float, float]] = []
    broken = []
    for name in atlas.names():
        own, other = ([p for p in took if (p["model"] == name) is same] for same in (True, False))
        unseen = constants(other, error)
        ahead += forecasts(own, unseen)
        usual = [p for p in own if p["job"] in USUAL]
        alone += [
            (p["loss"], unseen.loss(unseen.disturbance_at(p["load"]), p["load"])) for p in usual
        ]
        broken += breaking(own, unseen)
    return {
        "fit": {name: float(f"{value:.4g}") for name, value in vars(fitted).items()},
        "tests": tests,
        "models": each,
        "with points that did not take": {
            "by the same fit": agreement(column(points, "loss"), predict(points, fit(took))),
            "fitted on all": agreement(column(points, "loss"), predict(points, fit(points))),
            "tested on another model": agreement(
                column(points, "loss"),
                held_out(points, "disturbance and load", by["another model"]),
            ),
        },
        "forecast on another model": {
            "from fewer than 10 facts": agreement(*_two((m, p) for n, m, p in ahead if n < 10)),
            "from 10 facts or more": agreement(*_two((m, p) for n, m, p in ahead if n >= 10)),
            "memit, from the number of facts alone": agreement(*_two(alone)),
        },
        "breaking on another model": broken,
        "breaking": breaking(took, fitted),
    }


def _two(pairs: Iterable[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = zip(*pairs, strict=True)
    return torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)


# ── showing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

STYLES = {
    "memit": ("#0072B2", "o"),
    "alphaedit": ("#D55E00", "s"),
    "emmet": ("#009E73", "^"),
    "rome": ("#CC79A7", "D"),
}


def draw(points: Points, found: dict[str, Any], path: Path) -> None:
    """Left: predicted beside measured, each model by the fit of the other. Right: rounds, measured (marks) and predicted (lines)."""
    took = [point for point in points if point["efficacy"] >= TOOK]
    predicted = held_out(took, "disturbance and load", lambda p: p["model"])
    figure = Figure(figsize=(6.8, 2.9), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, (colour, mark) in STYLES.items():
        for model, face in zip(atlas.names(), (colour, "white"), strict=True):
            own = [
                (p["loss"], y)
                for p, y in zip(took, predicted.tolist(), strict=True)
                if (p["method"], p["model"]) == (method, model)
            ]
            left.plot(
                *zip(*own, strict=True),
                mark,
                color=colour,
                markerfacecolor=face,
                markersize=3.5,
                linestyle="",
                label=f"{method}, {model}",
            )
    left.plot([0, 28], [0, 28], color="black", linewidth=0.5, linestyle=":")
    r2 = found["tests"]["disturbance and load"]["tested on another model"]["r2"]
    left.set(
        xlabel="measured loss, points",
        ylabel="predicted, fitted on the other model",
        title=f"R² {r2:.2f} on a model not fitted on",
    )
    fitted = Fit(**found["fit"])
    for (model, job), own in series(took).items():
        if not job.endswith("-rounds"):
            continue
        colour, mark = STYLES[own[0]["method"]]
        solid = model == atlas.names()[0]
        x = [p["facts"] for p in own]
        right.plot(
            x,
            column(own, "loss").tolist(),
            mark,
            color=colour,
            markerfacecolor=colour if solid else "white",
            markersize=3.5,
        )
        right.plot(
            x,
            [fitted.loss(p["disturbance"], p["load"]) for p in own],
            color=colour,
            linewidth=0.9,
            linestyle="-" if solid else "--",
        )
    right.axhline(LIMIT, color="black", linewidth=0.5, linestyle=":")
    right.set(
        xscale="log",
        xlabel="facts written, in rounds",
        ylabel="loss, points",
        title="marks measured, lines predicted (- - atlas-llama)",
    )
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


def _written(found: dict[str, Any], points: dict[str, Any]) -> str:
    """JSON with a line for each point."""
    lines = ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(_rounded(point))}" for key, point in points.items()
    )
    return json.dumps(found, indent=1)[:-2] + f',\n "points": {{\n{lines}\n }}\n}}\n'


def _rounded(value: Any) -> Any:
    """Numbers to six digits, wherever they stand."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def show(found: dict[str, Any]) -> None:
    print("constants", found["fit"])
    names = list(next(iter(found["tests"].values())))
    print("\n| predicted from | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    for predictor, row in found["tests"].items():
        print(
            f"| {predictor} | "
            + " | ".join(
                f"R² {row[name]['r2']:.2f}, {row[name]['rmse']:.1f} points" for name in names
            )
            + " |"
        )
    for name in ("models", "forecast on another model", "with points that did not take"):
        for what, row in found[name].items():
            print(f"{name}, {what}: {row}")
    names = list(found["breaking on another model"][0])
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in found["breaking on another model"]:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=atlas.names(), help="write facts into it and ask")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/capacity"),
        help="deltas and answers, kept as they come",
    )
    parser.add_argument("--json", type=Path, help="the points, the fits and how far they carry")
    parser.add_argument("--draw", type=Path, help="predicted beside measured")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.model:
        measure(given.model, given.folder, given.seed)
        return
    known = (
        json.loads(given.json.read_text())["points"] if given.json and given.json.is_file() else {}
    )
    points = describe(given.folder, known)
    found = analysed(list(points.values()))
    show(found)
    if given.json:
        given.json.write_text(_written(found, points))
    if given.draw:
        draw(list(points.values()), found, given.draw)


if __name__ == "__main__":
    main()
