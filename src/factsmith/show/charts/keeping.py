"""Patches, their proof, and what they change, as charts.

proof_chart(verification)      p(wanted) of every question, before and after
norm_bars(diff.norms)          how far the weights of each layer moved
use_bars(capacity)             how full the edited layers are
"""

from __future__ import annotations

from collections.abc import Mapping

from ...patch.capacity import Capacity
from ...patch.verification import Verification
from .axes import bars, distinct, from_to, tail, tooltip
from .chart import Chart


def proof_chart(proof: Verification, most: int = 60) -> Chart:
    """Chart p(wanted) of the questions of a proof, before and after the patch.

    A ✓ or ✗ before the question says whether it held. Failed questions come first. Questions
    without a probability are left out.

    Args:
        proof: The proof.
        most: The most questions to draw.
    """
    checks = sorted(
        (check for check in proof.checks if check.p_before is not None), key=lambda c: c.held
    )[:most]
    labels = distinct([f"{'✓' if c.held else '✗'} {tail(c.prompt)}" for c in checks])
    rows = [
        {
            "label": label,
            "question": check.prompt,
            "role": check.role,
            "wanted": ("not " if check.forget else "") + check.wanted,
            "when": when,
            "answer": answer,
            "p": p,
            "held": "yes" if check.held else "no",
        }
        for label, check in zip(labels, checks, strict=True)
        for when, answer, p in (
            ("before", check.before, check.p_before),
            ("after", check.after, check.p_after),
        )
    ]
    held = sum(check.held for check in checks)
    return Chart(
        name="proof",
        title="p(wanted) before and after the patch",
        description=f"Two points for each question. {held} of {len(checks)} questions held.",
        spec=from_to(
            "p",
            "p(wanted)",
            tooltip("question", "role", "wanted", "when", "answer", ("p", ".4f"), "held"),
        ),
        rows=rows,
    )


def norm_bars(norms: Mapping[int, float]) -> Chart:
    """Chart how far the weights of each layer moved: ‖ΔW‖ / ‖W‖.

    Args:
        norms: {layer: its norm}.
    """
    rows = [{"label": f"layer {layer}", "norm": norm} for layer, norm in sorted(norms.items())]
    return Chart(
        name="norms",
        title="How far the weights of each layer moved",
        description="Bars of the relative norm of the change by layer.",
        spec=bars(rows, "norm", "‖ΔW‖ / ‖W‖", tooltip("label", ("norm", ".5f"))),
        rows=rows,
    )


def use_bars(capacity: Capacity) -> Chart:
    """Chart the share of each edited layer's directions that stored keys take up."""
    rows = [
        {
            "label": f"layer {use.layer}",
            "layer": use.layer,
            "full": use.full,
            "facts": use.facts,
            "directions": use.directions,
            "disturbance": use.disturbance,
            "norm": use.norm,
        }
        for use in capacity.layers
    ]
    return Chart(
        name="capacity",
        title="How full the edited layers are",
        description=f"Bars by layer. Together they are {capacity.full:z.1%} full."
        if capacity.layers
        else "No layer is edited.",
        spec=bars(
            rows,
            "full",
            "share of directions",
            tooltip(
                "layer",
                ("full", ".2%"),
                ("facts", ","),
                ("directions", ".1f"),
                ("disturbance", ".2%"),
                ("norm", ".4f"),
            ),
            shares=True,
            form=".2~%",
        ),
        rows=rows,
    )
