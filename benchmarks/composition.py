"""How predictions are put together, over thousands of them: the figures of docs/read.md, "Over many predictions".

    python benchmarks/composition.py --json benchmarks/results/composition.json --pictures docs
    python benchmarks/composition.py --prose ""                          # facts only

facts   prompts of the atlas' facts, cut before the object, one phrasing each, drawn at random among facts the model answers correctly
prose   random tokens of random sentences of novels (../shared/data/text), of which the models have seen some in training

Each is taken apart at its last token, of the token the model says there (`factsmith.refinement`), with the paper's bare projection.
`memories` puts the layers' own predictions next to Geva et al. 2021, section 5.1, for which at least 68 % are no memory's in any layer.
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
    """Prompts of facts that the model answers, at most n."""
    drawn = random.Random(0).sample(sentences_with_facts(atlas.facts()), 2 * n)
    asked = [(sentence.removesuffix(f" {fact.object}."), fact.object) for sentence, fact in drawn]
    known = lm.says([prompt for prompt, _ in asked], [answer for _, answer in asked])
    return [prompt for (prompt, _), says in zip(asked, known, strict=True) if says][:n]


def prose_prompts(lm: LanguageModel, folder: Path, n: int) -> tuple[list[str], list[int]]:
    """Sentences, and of each a random token but the first few, so that there is something to go by."""
    draw = random.Random(0)
    sentences = [s for s in read_prose(folder) if 60 < len(s) < 400]
    chosen = draw.sample(sentences, n)
    return chosen, [draw.randrange(4, len(lm.prompt_ids(s))) for s in chosen]


def figures(found: fs.Refinement) -> dict[str, Any]:
    """What goes into the table."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    each = {
        name: getattr(found, name) for name in ("composed", "chance", "counted", "says", "first")
    }
    each |= {**found.cases, "probability": found.probabilities.double().mean(0)}
    each |= {
        "half": found.half.double().quantile(quartiles),
        "half_of_layer": found.half_of_layer.double().quantile(quartiles, dim=0),
    }
    each |= {"rank_quartiles": found.quantiles(0.25, 0.5, 0.75)}
    rounded = {name: torch.round(shares, decimals=4).tolist() for name, shares in each.items()}
    return {
        "predictions": len(found.answers),
        "neurons": found.neurons,
        "among": list(found.among),
        **rounded,
    }


def show(name: str, found: fs.Refinement) -> None:
    print(name, found)
    for row in found.rows():
        print("  " + "  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)


def main() -> None:
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
            found = fs.refinement(lm, texts, positions=positions, norm=norm)
            seconds = time.process_time() - started
            show(f"{kind}, {seconds:.1f} s:", found)
            results.setdefault(name, {})[kind] = {**figures(found), "seconds": round(seconds, 1)}
            if given.pictures and kind == "facts":
                fs.refinement_chart(found).savefig(
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
