"""Fit what facts cost the rest of a model, and test the fit where it was not fitted.

    results = analysed(points)         # the constants of the library, and how far they carry

A point is one state of a model: some facts are written, with the load, the disturbance and the loss
that came of them. `capacity.py` measures the points. The forms are those of
`factsmith.patch.forecast`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import torch

from factsmith import atlas
from factsmith.patch.capacity import LIMIT, WARNED_FROM
from factsmith.patch.forecast import Fit

TOOK = 70.0
"""Per cent of its facts that a point has to say to be fitted on. A patch that takes less would not
be kept."""

Points = Sequence[dict[str, Any]]
"""Points, as `capacity.describe` returns them."""
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def least_squares(
    predicted: Callable[[torch.Tensor], torch.Tensor],
    start: Sequence[float],
    measured: torch.Tensor,
) -> list[float]:
    """Return the positive parameters with the least mean square error.

    Args:
        predicted: Predicts all measured values from the parameters.
        start: Where the search starts.
        measured: The measured values.
    """
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
    """Return one number of each point."""
    return torch.tensor([point[name] for point in points], dtype=torch.float64)


def both(x: torch.Tensor, load: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Predict the loss of many points as the library does (`Fit.loss`)."""
    return -100 * torch.expm1(-((x / p[0]) ** p[1]) * load ** p[2])


def one(x: torch.Tensor, _: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Predict the loss from a single predictor."""
    return -100 * torch.expm1(-((x / p[0]) ** p[1]))


USUAL = ("memit-rounds", "memit-batch-recommended")
"""The jobs that say how much n facts disturb a model that has no patch yet. They write with
repairs, or round after round, as a workspace grows."""

PREDICTORS: dict[str, tuple[str, Loss, tuple[float, ...]]] = {
    "disturbance and load": ("disturbance", both, (0.5, 2.0, 0.5)),
    "disturbance": ("disturbance", one, (0.8, 2.0)),
    "load": ("load", one, (1.0, 1.0)),
    "full": ("full", one, (1.0, 1.0)),
    "norm": ("norm", one, (5.0, 2.0)),
}


def fit(points: Points, predictor: str = "disturbance and load") -> torch.Tensor:
    """Return the parameters of a predictor, fitted on some points."""
    name, form, start = PREDICTORS[predictor]
    x, load = column(points, name), column(points, "load")
    return torch.tensor(
        least_squares(lambda p: form(x, load, p), start, column(points, "loss")),
        dtype=torch.float64,
    )


def predict(
    points: Points, parameters: torch.Tensor, predictor: str = "disturbance and load"
) -> torch.Tensor:
    """Return the predicted loss of each point."""
    name, form, _ = PREDICTORS[predictor]
    return form(column(points, name), column(points, "load"), parameters)


def held_out(
    points: Points, predictor: str, group: Callable[[dict[str, Any]], Any]
) -> torch.Tensor:
    """Predict the loss of every point by a fit on the points of the other groups."""
    losses = torch.zeros(len(points), dtype=torch.float64)
    for value in sorted({group(point) for point in points}):
        inside = torch.tensor([group(point) == value for point in points])
        others = [point for point in points if group(point) != value]
        members = [point for point in points if group(point) == value]
        losses[inside] = predict(members, fit(others, predictor), predictor)
    return losses


def agreement(measured: torch.Tensor, predicted: torch.Tensor) -> dict[str, float]:
    """Return R² and the root mean square error of some predictions."""
    error = (measured - predicted).square()
    return {
        "points": len(measured),
        "r2": round(float(1 - error.sum() / (measured - measured.mean()).square().sum()), 3),
        "rmse": round(float(error.mean().sqrt()), 2),
    }


def growth_of(points: Points) -> tuple[float, float]:
    """Return `Fit.usual` and `Fit.growth`.

    All series have one slope on logarithmic scales. The height is that of MEMIT's rounds and of its
    recommended batches.
    """
    pairs: list[tuple[float, float]] = []
    for line in series(points).values():
        xs, ys = (column(line, name).log().tolist() for name in ("load", "disturbance"))
        pairs += [(x - mean(xs), y - mean(ys)) for x, y in zip(xs, ys, strict=True)]
    slope = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    heights = [
        math.log(point["disturbance"]) - slope * math.log(point["load"])
        for point in points
        if point["job"] in USUAL
    ]
    return math.exp(mean(heights)), slope


def series(points: Points) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the points by model and job, in order of the number of facts."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in sorted(points, key=lambda point: point["facts"]):
        lines.setdefault((point["model"], point["job"]), []).append(point)
    return lines


def constants(points: Points, error: float) -> Fit:
    """Return the constants that the library predicts by, fitted on some points."""
    scale, power, crowding = fit(points).tolist()
    usual, growth = growth_of(points)
    most = {name: float(column(points, name).max()) for name in ("disturbance", "load")}
    return Fit(
        scale=scale, power=power, crowding=crowding, usual=usual, growth=growth, error=error, **most
    )


def forecasts(points: Points, fitted: Fit) -> list[tuple[int, float, float]]:
    """Predict every point of a series from every earlier one.

    Returns:
        (facts at the earlier point, measured loss, predicted loss) of each pair.
    """
    results = []
    for line in series(points).values():
        for before, after in itertools.combinations(line, 2):
            now = (before["load"], before["disturbance"])
            x = fitted.disturbance_at(after["load"], now, min(1.0, before["facts"] / 10))
            results.append((before["facts"], after["loss"], fitted.loss(x, after["load"])))
    return results


def crossing(facts: Sequence[float], losses: Sequence[float], limit: float) -> float | None:
    """Return the number of facts at which a rising loss reaches the limit. None: it does not."""
    line = zip([0.0, *facts], [0.0, *losses], strict=True)
    for (a, below), (b, above) in itertools.pairwise(line):
        if below < limit <= above:
            return a + (b - a) * (limit - below) / (above - below)
    return None


def breaking(points: Points, fitted: Fit) -> list[dict[str, Any]]:
    """Return where each series reaches the limit, and where that is predicted and warned of.

    The predictions use the patches, or the number of facts alone. A series that does not reach the
    limit is left out.
    """
    rows = []
    for (model, job), line in series(points).items():
        facts = [point["facts"] for point in line]
        measured = crossing(facts, [point["loss"] for point in line], LIMIT)
        if measured is None:
            continue
        losses = [fitted.loss(point["disturbance"], point["load"]) for point in line]
        neurons = line[0]["facts"] / line[0]["load"]
        alone = [
            fitted.loss(fitted.disturbance_at(n / neurons), n / neurons) for n in range(1, 1001)
        ]
        row: dict[str, Any] = {"model": model, "job": job, "measured": round(measured)}
        for name, limit in (("predicted", LIMIT), ("warned", WARNED_FROM * LIMIT)):
            at = crossing(facts, losses, limit)
            ahead = crossing(range(1, 1001), alone, limit)
            row |= {name: at and round(at), f"{name}_from_n_alone": ahead and round(ahead)}
        rows.append(row)
    return rows


GROUPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another model": lambda point: point["model"],
    "another series": lambda point: (point["model"], point["job"]),
    "another method": lambda point: point["method"],
}
"""What a fit is tested on: points whose group was left out of the fit."""


def tests_of(points: Points, predictor: str) -> dict[str, dict[str, float]]:
    """Return how well a predictor fits all points, and points that were left out of the fit."""
    losses = column(points, "loss")
    on_all = agreement(losses, predict(points, fit(points, predictor), predictor))
    tests = {
        f"tested on {name}": agreement(losses, held_out(points, predictor, group))
        for name, group in GROUPS.items()
    }
    return {"fitted on all": on_all, **tests}


def split(points: Points, model: str) -> tuple[Points, Points]:
    """Return the points of one model, and those of the other."""
    one = [point for point in points if point["model"] == model]
    return one, [point for point in points if point["model"] != model]


def analysed(points: Points) -> dict[str, Any]:
    """Return the fits, and how far they carry.

    They are tested on another model, another series and another method, and with the points whose
    patch did not take. Each point also gets "norm", the mean over its layers.
    """
    for point in points:
        point["norm"] = mean(layer["norm"] for layer in point["layers"])
    took = [point for point in points if point["efficacy"] >= TOOK]
    tests = {predictor: tests_of(took, predictor) for predictor in PREDICTORS}
    error = tests["disturbance and load"]["tested on another model"]["rmse"]
    fitted = constants(took, error)
    each: dict[str, dict[str, float]] = {}
    ahead: list[tuple[int, float, float]] = []
    alone: list[tuple[float, float]] = []
    broken = []
    for name in atlas.names():
        tested, rest = split(took, name)
        each[f"fitted on the other, tested on {name}"] = agreement(
            column(tested, "loss"), predict(tested, fit(rest))
        )
        unseen = constants(rest, error)
        ahead += forecasts(tested, unseen)
        alone += [
            (point["loss"], unseen.loss(unseen.disturbance_at(point["load"]), point["load"]))
            for point in tested
            if point["job"] in USUAL
        ]
        broken += breaking(tested, unseen)
    losses = column(points, "loss")
    crossed = held_out(points, "disturbance and load", GROUPS["another model"])
    return {
        "fit": {name: float(f"{value:.4g}") for name, value in vars(fitted).items()},
        "tests": tests,
        "models": each,
        "with points that did not take": {
            "by the same fit": agreement(losses, predict(points, fit(took))),
            "fitted on all": agreement(losses, predict(points, fit(points))),
            "tested on another model": agreement(losses, crossed),
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
    """Return the first and the second numbers of some pairs."""
    first, second = zip(*pairs, strict=True)
    return torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
