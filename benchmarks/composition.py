"""Measure how predictions are made, over thousands of them.

    python benchmarks/composition.py --json benchmarks/results/composition.json --pictures docs
    python benchmarks/composition.py --prose ""                          # facts only

These are the figures of docs/read.md, "Over many predictions".

facts   Prompts of the bundled facts, cut before the object, in one phrasing each. They are drawn at
        random among the facts that the model answers correctly.
prose   Random tokens of random sentences of novels (../shared/data/text). The models have seen some
        of them in training.

`factsmith.refinement` breaks each prediction down, of the token that the model says, with the
paper's bare projection. For comparison: in each layer of Geva et al. 2021, section 5.1, at least
68 % of the layer's predictions are no neuron's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith import atlas
from factsmith.atlas.texts import read_prose, sentences_with_facts
from factsmith.model.language_model import LanguageModel

TEXT = Path(__file__).resolve().parents[1] / "../shared/data/text"


def fact_prompts(lm: LanguageModel, n: int) -> list[str]:
    """Return prompts of facts that the model answers correctly, at most n."""
    drawn = random.Random(0).sample(sentences_with_facts(atlas.facts()), 2 * n)
    asked = [(sentence.removesuffix(f" {fact.object}."), fact.object) for sentence, fact in drawn]
    known = lm.says([prompt for prompt, _ in asked], [answer for _, answer in asked])
    return [prompt for (prompt, _), says in zip(asked, known, strict=True) if says][:n]


def prose_prompts(lm: LanguageModel, folder: Path, n: int) -> tuple[list[str], list[int]]:
    """Return sentences, and the number of a random token of each, except the first few."""
    draw = random.Random(0)
    sentences = [s for s in read_prose(folder) if 60 < len(s) < 400]
    chosen = draw.sample(sentences, n)
    return chosen, [draw.randrange(4, len(lm.prompt_ids(s))) for s in chosen]


def figures(average: fs.Refinement) -> dict[str, Any]:
    """Return the numbers of the tables."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    each = {
        name: getattr(average, name) for name in ("composed", "chance", "counted", "says", "first")
    }
    each |= {**average.cases, "probability": average.probabilities.double().mean(0)}
    each |= {
        "half": average.half.double().quantile(quartiles),
        "half_of_layer": average.half_of_layer.double().quantile(quartiles, dim=0),
    }
    each |= {"rank_quartiles": average.quantiles(0.25, 0.5, 0.75)}
    rounded = {name: torch.round(shares, decimals=4).tolist() for name, shares in each.items()}
    return {
        "predictions": len(average.answers),
        "neurons": average.neurons,
        "among": list(average.among),
        **rounded,
    }


def show(name: str, average: fs.Refinement) -> None:
    """Print the averages of a model, and a line for each layer."""
    print(name, average)
    for row in average.rows():
        print("  " + "  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)


def main() -> None:
    """Measure the bundled models, and write the numbers and pictures that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=2000, help="predictions of either kind")
    parser.add_argument("--prose", default=str(TEXT), help="a folder of .txt files; empty: none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="a folder for PNGs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in atlas.names():
        lm = fs.load(name)
        prompts = fact_prompts(lm, given.n)
        runs: dict[str, tuple[list[str], list[int] | None, bool]] = {
            "facts": (prompts, None, False),
            "facts, norm": (prompts, None, True),
        }
        if given.prose:
            runs["prose"] = (*prose_prompts(lm, Path(given.prose), given.n), False)
        for kind, (texts, positions, norm) in runs.items():
            started = time.process_time()
            average = fs.refinement(lm, texts, positions=positions, norm=norm)
            seconds = time.process_time() - started
            show(f"{kind}, {seconds:.1f} s:", average)
            results.setdefault(name, {})[kind] = {**figures(average), "seconds": round(seconds, 1)}
            if given.pictures and kind == "facts":
                fs.refinement_chart(average).savefig(
                    given.pictures / f"refinement-{name}.png", dpi=220
                )
    if given.pictures:
        fs.prediction_chart(
            fs.compose(fs.load("atlas"), "The currency of Bulgaria is the"),
            path=given.pictures / "explained.png",
        )
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
