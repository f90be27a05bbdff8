"""Put a trained atlas model into the package: weights, card, ROME's settings and packed second moments of its edit layers.

    python scripts/package_atlas.py atlas --trained runs/atlas --settings settings.json --layers 0 1 2 --prose FOLDER --counterfact FILE

The settings file is what `benchmarks/rome_settings.py` chose: {"layer": 1, "lr": ..., ...}. Run it again after any change to the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import factsmith as fs
from factsmith.model import atlas
from factsmith.model.atlas.corpus import Corpus, read_prose
from factsmith.model.atlas.evaluate import counterfact, recall

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def measure(folder: Path, prose: Path, records: Path) -> dict[str, Any]:
    """The table of the model card, from the shipped float16 weights computed in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = recall(model, tokenizer, atlas.facts(), read_prose(prose))
    return {**result, "counterfact": counterfact(model, tokenizer, json.loads(records.read_text(encoding="utf-8")))}


def own_sentences(lm: fs.LanguageModel, prose: Path, seed: int) -> list[str]:
    """One telling of every fact between pieces of prose: the rows the model was trained on, as text."""
    corpus = Corpus(lm.tokenizer, atlas.facts(), read_prose(prose), seed=seed)
    numbers = torch.arange(len(atlas.facts())).numpy()
    ends = set(lm.tokenizer.all_special_ids)
    rows = (row for group in corpus.epoch(0, numbers) for row in group)
    return [lm.tokenizer.decode([i for i in row.ids.tolist() if i not in ends]).strip() for row in rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["atlas", "atlas-llama"])
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="layers whose second moments are shipped")
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--counterfact", type=Path, required=True)
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
    for layer, moment in fs.second_moments(lm, own_sentences(lm, given.prose, given.seed), given.layers).items():
        moment.save(folder / "moments" / f"layer{layer}.safetensors", packed=True)

    training = json.loads((given.trained / "training.json").read_text(encoding="utf-8"))
    card = {
        "name": given.name,
        "parameters": sum(p.numel() for p in lm.module.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "moments_bytes": sum(file.stat().st_size for file in (folder / "moments").iterdir()),
        "measured": measure(folder, given.prose, given.counterfact),
        **training,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({**card, "curve": "..."}, indent=1))


if __name__ == "__main__":
    main()
