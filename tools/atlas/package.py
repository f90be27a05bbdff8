"""Put a trained atlas model into the package: weights, card, settings of ROME, second moments.

    python -m tools.atlas.package atlas --trained runs/atlas --settings settings.json \\
        --layers 0 1 2

`python -m tools.atlas.evaluate` wrote `measured.json` in the trained folder (see `make atlas`).
`benchmarks/rome_settings.py` chose the settings: {"layer": 0, "lr": ..., ...}. The second moments
are those of the named layers, packed. Run it again after any change to the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import factsmith as fs
from factsmith import atlas
from factsmith.atlas.texts import sentences

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


ROWS = (
    ("parameters", "parameters", "{:,}"),
    ("model.safetensors, float16, bytes", "bytes", "{:,}"),
    ("second moments shipped, bytes", "moments_bytes", "{:,}"),
    ("training, seconds of wall time (one to two cores, shared)", "seconds", "{:,}"),
    ("facts asked", "measured.facts", "{:,}"),
    ("recall, trained phrasings", "measured.trained", "{:.1%}"),
    ("recall, wide phrasings", "measured.wide", "{:.1%}"),
    ("recall, held-out phrasings, subjects that never had them", "measured.held_out", "{:.1%}"),
    ("recall, a prose sentence in front", "measured.after_prose", "{:.1%}"),
    ("COUNTERFACT rewrite prompts: true above false", "measured.counterfact.rewrite", "{:.1%}"),
    ("COUNTERFACT rewrite prompts: exact", "measured.counterfact.rewrite_exact", "{:.1%}"),
    ("COUNTERFACT paraphrases: true above false", "measured.counterfact.paraphrase", "{:.1%}"),
    ("COUNTERFACT paraphrases: exact", "measured.counterfact.paraphrase_exact", "{:.1%}"),
    ("COUNTERFACT neighbours: true above false", "measured.counterfact.neighbourhood", "{:.1%}"),
    ("COUNTERFACT neighbours: exact", "measured.counterfact.neighbourhood_exact", "{:.1%}"),
)


def write_table(path: Path) -> None:
    """Put the measured table of all packaged models into the model card, between its marks."""
    cards = [atlas.card(name) for name in atlas.names()]

    def cell(card: dict[str, Any], key: str, form: str) -> str:
        value: Any = card
        for part in key.split("."):
            value = value.get(part)
        return "not measured apart" if value is None else form.format(value)

    lines = [
        "| | " + " | ".join(card["name"] for card in cards) + " |",
        "|---" * (1 + len(cards)) + "|",
    ]
    lines += [
        f"| {title} | " + " | ".join(cell(card, key, form) for card in cards) + " |"
        for title, key, form in ROWS
    ]
    text = path.read_text(encoding="utf-8")
    start, end = (text.index(mark) for mark in ("<!-- measured -->", "<!-- /measured -->"))
    path.write_text(
        text[:start] + "<!-- measured -->\n" + "\n".join(lines) + "\n" + text[end:],
        encoding="utf-8",
    )


def main() -> None:
    """Run the packing from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["atlas", "atlas-llama"])
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        required=True,
        help="layers whose second moments are shipped",
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    folder = atlas.folder(given.name)
    folder.mkdir(exist_ok=True)
    for file in FILES:
        shutil.copyfile(given.trained / file, folder / file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["factsmith"] = {"rome": json.loads(given.settings.read_text(encoding="utf-8"))}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    lm = fs.load(given.name)
    for layer, moment in fs.second_moments(
        lm, sentences(atlas.facts(), given.seed), given.layers, max_tokens=math.inf
    ).items():
        moment.save(folder / "moments" / f"layer{layer}.safetensors", packed=True)

    training = json.loads((given.trained / "training.json").read_text(encoding="utf-8"))
    card = {
        "name": given.name,
        "parameters": sum(p.numel() for p in lm.module.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "moments_bytes": sum(file.stat().st_size for file in (folder / "moments").iterdir()),
        "measured": json.loads((given.trained / "measured.json").read_text(encoding="utf-8")),
        **training,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    write_table(folder.parent / "MODEL_CARD.md")
    print(json.dumps({**card, "curve": "..."}, indent=1))


if __name__ == "__main__":
    main()
