"""The tables of the study as Markdown, and the figure of halves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import factsmith as fs

from .effects import HALVING, KS


def percent(x: Sequence[float]) -> str:
    """Return a share and its interval in percent."""
    return f"{100 * x[0]:+z.1f} [{100 * x[1]:+z.1f}, {100 * x[2]:+z.1f}]"


def markdown(model: str, population: str, study: Mapping[str, Any]) -> str:
    """Return the tables of one population; percentages with 95 % intervals."""
    title = f"{study['facts']} facts of {study['relations']} relations"
    lines = [
        f"\n### {model}, {population}: {title}",
        "",
        f"Mean p over own prompts, least, quartiles, most: {study['p']}",
        "",
        f"Coarse sets: {study['located']['coarse']:.1f} neurons a prompt. "
        f"Layers of the refined ones: {study['located']['by_layer']}",
        "",
        *_sets(study["located"]["sets"]),
        "",
        "Change of p(target) in %:",
        "",
        *_effects(study["effects"]),
        "",
        "Log-odds, and share of the room up to p = 1 taken (own prompts, last):",
        "",
        *_odds(study["effects"]),
        "",
        "Suppressing the k neurons with the largest mean attribution (held-out prompts):",
        "",
        *_curves(study["curves"]),
        "",
        "Neurons that carry half:",
        "",
        *_halves(study["half"]),
        "",
        "Erased (as a Delta):",
        "",
        *_erased(study["erase"]),
        "",
        _erased_relations(study["erase_relations"]["median_growth"]),
        "",
        "Rewritten:",
        "",
        *_rewritten(study["rewrite"]),
    ]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _sets(sets: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            name,
            f"{numbers['neurons']:.2f}, {numbers['median']:g}",
            f"{numbers['none']:.0%}",
            f"{numbers['shared_within']:.2f}",
            f"{numbers['shared_across']:.3f}",
        )
        for name, numbers in sets.items()
    ]
    columns = ("set", "neurons a fact (mean, median)", "none", "shared within", "shared across")
    return _table(columns, rows)


def _effects(effects: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            name,
            scope,
            *(
                percent(whats[what][part]["change"])
                for what in ("suppress", "amplify")
                for part in ("own", "held_out")
            ),
        )
        for name, scopes in effects.items()
        for scope, whats in scopes.items()
    ]
    changes = ("suppress, own", "suppress, held-out", "amplify, own", "amplify, held-out")
    return _table(("neurons", "scope", *changes), rows)


def _odds(effects: Mapping[str, Any]) -> list[str]:
    rows = []
    for name in ("share 0.7", "relation share"):
        whats = effects[name]["last"]
        odds = [f"{whats[what]['own']['log_odds'][0]:+z.2f}" for what in ("suppress", "amplify")]
        rows.append((name, *odds, percent(whats["amplify"]["own"]["share_of_room"])))
    return _table(("neurons", "suppress", "amplify", "room"), rows)


def _curves(curves: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"{order}, {scope}",
            *(f"{100 * value[0]:+z.0f}" for value in whats["suppress"]["held_out"]),
        )
        for order in ("attribution", "activation", "random")
        for scope, whats in curves[order].items()
    ]
    return _table(("k", *map(str, KS)), rows)


def _halves(halves: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, numbers in halves.items():
        low, middle, high = (
            "-" if n is None else f"{n:g}"
            for n in (numbers["quartiles"][0], numbers["median"], numbers["quartiles"][1])
        )
        below, beyond = f"{numbers['below_12']:.0%}", f"{numbers['beyond']:.0%}"
        rows.append((name, middle, f"{low}, {high}", below, beyond))
    return _table(("", "median", "quartiles", "below 12", "not by 3,072"), rows)


def _elsewhere(numbers: Mapping[str, Any]) -> list[str]:
    """The change of p of other facts: of the relation, and elsewhere."""
    return [f"{100 * numbers[part]['p_change']:+z.1f}" for part in ("relation", "elsewhere")]


def _erased(erase: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            name,
            percent(numbers["own"]["change"]),
            percent(numbers["held_out"]["change"]),
            *_elsewhere(numbers),
        )
        for name, numbers in erase.items()
    ]
    columns = ("neurons", "own", "held-out", "p of others of the relation", "p elsewhere")
    return _table(columns, rows)


def _erased_relations(growth: Mapping[str, float]) -> str:
    return (
        f"The relation's 20 commonest erased: perplexity {growth['relation']:+z.0%} there, "
        f"{growth['elsewhere']:+z.0%} elsewhere (medians)."
    )


def _rewritten(rewrite: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            name,
            *(percent(numbers[part]) for part in ("own", "held_out", "old_own")),
            f"{numbers['no_neurons']:.0%}",
            *_elsewhere(numbers),
        )
        for name, numbers in rewrite.items()
    ]
    said = ("new said, own", "new said, held-out", "old still said", "no neurons")
    return _table(("", *said, "p, relation", "p, elsewhere"), rows)


def draw(populations: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the share of prompts that need no more than so many neurons for half of a prediction.

    populations: {population: its numbers}.
    """
    series = {}
    for name, study in populations.items():
        for way in ("attribution", "activation"):
            counts = [c for c in study["half"][f"prediction: {way}"]["counts"] if c is not None]
            total = len(study["half"][f"prediction: {way}"]["counts"])
            share = [100 * sum(c <= k for c in counts) / total for k in HALVING]
            label = {"attribution": "by attribution", "activation": "most active"}[way]
            series[f"{name}, {label}"] = (HALVING, share, share, share)
    fs.curves(
        series,
        x_label="neurons suppressed",
        y_label="% of prompts whose p has halved",
        title="Neurons that carry half of a prediction (line: a dozen)",
        mark_x=12,
        mark_y=50,
        log_x=True,
        path=path,
    )
