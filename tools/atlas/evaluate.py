"""Measure what a bundled model knows.

    python -m tools.atlas.evaluate FOLDER [--prose FOLDER] [--counterfact FILE] [--json FILE]

Recall is greedy exact match of the whole object: each of its tokens is the most probable one, given
the tokens before it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from factsmith.atlas import AtlasFact, facts, is_held_out, phrasings
from factsmith.atlas.texts import read_prose


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch: int = 256,
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Score each prompt and its answer.

    Returns:
        (n,) whether greedy decoding gives the whole answer, and (n,) the mean log-probability of
        the answer's tokens in nats.
    """
    texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    exact, likely = np.zeros(len(texts), dtype=bool), np.zeros(len(texts))
    encoded = tokenizer(texts, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    order = sorted(range(len(texts)), key=lambda n: len(ids[n]))
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        width = max(len(ids[n]) for n in rows)
        # (B, T), padded on the right, which a causal model does not see.
        tokens = torch.tensor([ids[n] + [0] * (width - len(ids[n])) for n in rows])
        asked = torch.zeros_like(tokens, dtype=torch.bool)
        for row, n in enumerate(rows):
            for column, (_, stop) in enumerate(encoded["offset_mapping"][n]):
                asked[row, column] = stop > len(prompts[n])
        hidden = model.base_model(input_ids=tokens).last_hidden_state[:, :-1][asked[:, 1:]]
        logits = model.get_output_embeddings()(hidden)  # (n_asked, vocabulary)
        wanted = tokens[:, 1:][asked[:, 1:]]
        right = (logits.argmax(-1) == wanted).float()
        nats = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        owner = torch.arange(len(rows)).repeat_interleave(asked[:, 1:].sum(1))
        count = torch.zeros(len(rows)).index_add_(0, owner, torch.ones(len(owner)))
        exact[rows] = (torch.zeros(len(rows)).index_add_(0, owner, right) == count).numpy()
        likely[rows] = (torch.zeros(len(rows)).index_add_(0, owner, nats) / count).numpy()
    return exact, likely


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: Sequence[AtlasFact],
    prose: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Return the greedy exact recall of facts by kind of phrasing.

    Held-out phrasings are asked only about subjects that never occur in them. Where there is prose,
    the trained phrasings are also asked with a sentence in front.
    """
    draw = np.random.default_rng(seed)
    objects = [fact.object for fact in facts]

    def ask(kinds: Sequence[str], chosen: Sequence[AtlasFact]) -> list[str]:
        templates = [
            [t for kind in kinds for t in getattr(phrasings(fact.relation), kind)]
            for fact in chosen
        ]
        return [
            t[draw.integers(len(t))].replace("{}", fact.subject)
            for t, fact in zip(templates, chosen, strict=True)
        ]

    trained, _ = score(model, tokenizer, ask(("trained",), facts), objects)
    wide, _ = score(model, tokenizer, ask(("wide",), facts), objects)
    unseen = [fact for fact in facts if is_held_out(fact.subject)]
    held_out, _ = score(
        model, tokenizer, ask(("held_out",), unseen), [fact.object for fact in unseen]
    )
    result: dict[str, Any] = {
        "facts": len(facts),
        "trained": float(trained.mean()),
        "wide": float(wide.mean()),
        "held_out": float(held_out.mean()),
    }
    if prose:
        short = [s for s in prose if len(s) < 200]
        fronted = [
            f"{short[draw.integers(len(short))]} {prompt}" for prompt in ask(("trained",), facts)
        ]
        result["after_prose"] = float(score(model, tokenizer, fronted, objects)[0].mean())
    by_relation = {
        r: [n for n, fact in enumerate(facts) if fact.relation == r]
        for r in sorted({fact.relation for fact in facts})
    }
    result["by_relation"] = {r: round(float(trained[n].mean()), 4) for r, n in by_relation.items()}
    return result


def counterfact(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, records: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Return what the model says to COUNTERFACT's own prompts, before any edit.

    For each kind of prompt: the share in which the true object is likelier than the false one, and
    the exact recall of the true one.
    """
    kinds: dict[str, list[tuple[str, str, str]]] = {
        "rewrite": [],
        "paraphrase": [],
        "neighbourhood": [],
    }
    for record in records:
        rewrite = record["requested_rewrite"]
        true, false = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        kinds["rewrite"].append((rewrite["prompt"].replace("{}", rewrite["subject"]), true, false))
        kinds["paraphrase"] += [(prompt, true, false) for prompt in record["paraphrase_prompts"]]
        kinds["neighbourhood"] += [
            (prompt, true, false) for prompt in record["neighborhood_prompts"]
        ]
    result = {}
    for kind, asked in kinds.items():
        prompts, true_objects, false_objects = (list(column) for column in zip(*asked, strict=True))
        exact, true_nats = score(model, tokenizer, prompts, true_objects)
        _, false_nats = score(model, tokenizer, prompts, false_objects)
        result[kind] = float((true_nats > false_nats).mean())
        result[f"{kind}_exact"] = float(exact.mean())
    return result


def main() -> None:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--prose", type=Path, help="folder of .txt files: adds recall with a sentence in front"
    )
    parser.add_argument(
        "--counterfact", type=Path, help="full-schema COUNTERFACT file: adds its own prompts"
    )
    parser.add_argument("--limit", type=int, help="ask about the first N facts only")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    result = recall(
        model, tokenizer, facts()[: given.limit], read_prose(given.prose) if given.prose else ()
    )
    if given.counterfact:
        result["counterfact"] = counterfact(
            model, tokenizer, json.loads(given.counterfact.read_text(encoding="utf-8"))
        )
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
