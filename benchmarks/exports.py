"""Does the export of every model type read back as the patched model? One line a type, and JSON.

    python benchmarks/exports.py [--json FILE] [TYPE ...]

The types are all causal language models that transformers can build. Each is a tiny random model as
in `families.py`, saved with a tokenizer and loaded. A random update of rank 2 goes into its first
two layers without experts. It is exported as a checkpoint and as an adapter. Then random neurons
are appended to the first of these layers as well, which gives a wider checkpoint ("neurons"). A
process without factsmith loads all of them through plain transformers and peft, and their answers
are compared with those of the patched model in memory. Types that are refused, or have no such
layer, are listed as such.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from factsmith.core.errors import FactsmithError, ModelError, NumericsError
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta
from factsmith.keep.export.adapter import export_adapter
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.keep.export.questions import ask
from factsmith.keep.export.readback import LIMITS, Job, compare, read_back
from factsmith.model.appended import AppendedRows
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from tiny_types import letters, tiny_model

TOGETHER = 24
"""How many exports one process reads back: importing peft takes seconds."""


def update(lm: LanguageModel) -> Delta | None:
    """Return a random change of the first two layers without experts; None if it has none."""
    layers = [ffn.layer for ffn in lm.ffn if not ffn.n_experts][:2]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    shapes = {layer: lm.ffn[layer].weight().shape for layer in layers}
    if not shapes or not lm.is_causal:
        return None
    return Delta(
        layers={layer: (draw(d, 2), draw(2, d_ff)) for layer, (d, d_ff) in shapes.items()},
        k_star={layer: draw(1, d_ff) for layer, (_, d_ff) in shapes.items()},
        v_star=draw(1, shapes[layers[0]][0]),
        facts=(Fact("Paris", "The mother tongue of {} is", "x"),),
        method="random",
        config={},
        fingerprint=lm.fingerprint,
    )


def appended(lm: LanguageModel, layer: int) -> Delta:
    """Return random neurons for a layer."""
    generator, ffn = torch.Generator().manual_seed(2), lm.ffn[layer]
    n, d = 5, ffn.weight().shape[0]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    keys = ["gate_keys", "up_keys"] if ffn.is_gated else ["keys"]
    fact = Fact("Edwin", "The mother tongue of {} is", "x")
    return Delta(
        layers={},
        k_star={},
        v_star=draw(1, d),
        facts=(fact,),
        method="random",
        config={},
        fingerprint=lm.fingerprint,
        appended={
            layer: AppendedRows(
                values=draw(n, d), facts=(0,) * n, **{name: draw(n, d) for name in keys}
            )
        },
    )


def widened(lm: LanguageModel, family: str, delta: Delta, place: Path) -> dict[str, Any]:
    """Write a checkpoint with appended neurons; or return why there is none."""
    row: dict[str, Any] = {"family": family, "format": "neurons"}
    deltas = [delta, appended(lm, min(delta.layers))]
    try:
        export_checkpoint(lm, deltas, place / "neurons", verify=False)
    except FactsmithError as error:
        why = str(error).replace(str(place / "base"), family)
        return {**row, "outcome": "refused", "why": why}
    return {**row, "job": Job(str(place / "neurons"), ask(lm, deltas))}


def written(family: str, place: Path) -> list[dict[str, Any]]:
    """Write the exports of a type, without reading them back; or return why there are none."""
    try:
        tiny_model(family).save_pretrained(place / "base")
        letters().save_pretrained(place / "base")
        lm = load(place / "base", dtype=torch.float32)
        delta = update(lm)
    except FactsmithError as error:
        return [
            {
                "family": family,
                "outcome": "refused",
                "why": str(error).replace(str(place / "base"), family),
            }
        ]
    except Exception as error:
        return [
            {
                "family": family,
                "outcome": "not built",
                "why": f"{type(error).__name__}: {error}"[:200],
            }
        ]
    if delta is None:
        return [{"family": family, "outcome": "no dense layer"}]
    questions = ask(lm, [delta])
    export_checkpoint(lm, delta, place / "checkpoint", verify=False)
    export_adapter(lm, delta, place / "adapter", verify=False)
    return [
        {
            "family": family,
            "format": "checkpoint",
            "job": Job(str(place / "checkpoint"), questions),
        },
        {
            "family": family,
            "format": "adapter",
            "job": Job(
                str(place / "base"), questions, dtype="float32", adapter=str(place / "adapter")
            ),
        },
        widened(lm, family, delta, place),
    ]


def settle(rows: list[dict[str, Any]]) -> None:
    """Read the waiting exports back.

    One that cannot be loaded ends the process, and then each is read by a process of its own.
    """
    waiting = [row for row in rows if "job" in row]
    try:
        several = read_back([row["job"] for row in waiting]) if waiting else []
    except ModelError as error:
        if len(waiting) > 1:
            for row in waiting:
                settle([row])
            return
        del waiting[0]["job"]
        waiting[0].update(outcome="not loaded", why=str(error))
        return
    for row, answers in zip(waiting, several, strict=True):
        job = row.pop("job")
        try:
            comparison = compare(job.questions, answers, LIMITS[torch.float32])
            row.update(outcome="equal", difference=comparison.difference, moved=comparison.moved)
        except NumericsError as error:
            row.update(outcome="other", why=str(error))


def main() -> None:
    """Run the types, print a line for each export, and write the numbers if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the results to this file")
    types = "model types (default: all of transformers' causal language models)"
    parser.add_argument("families", nargs="*", help=types)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for family in options.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            rows += written(family, Path(place) / family)
            if sum("job" in row for row in rows) >= TOGETHER:
                settle(rows)
        settle(rows)
    for row in rows:
        said = (
            f"{row['difference']:.0e} of {row['moved']:.0e}"
            if row["outcome"] == "equal"
            else row.get("why", "")
        )
        print(f"{row['family']:24} {row.get('format', ''):10} {row['outcome']:14} {said[:160]}")
    counts = {
        form: dict(Counter(row["outcome"] for row in rows if row.get("format") == form))
        for form in ("checkpoint", "adapter", "neurons")
    }
    worst = max((row["difference"] for row in rows if row["outcome"] == "equal"), default=0.0)
    print(f"\n{counts}; the logits of equal ones differ by {worst:.0e} at most")
    if options.json:
        result = {"counts": counts, "worst": worst, "results": rows}
        Path(options.json).write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
