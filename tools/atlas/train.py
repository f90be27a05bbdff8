"""Train the bundled models from scratch: `python -m tools.atlas.train atlas --prose FOLDER --out FOLDER`.

Byte-level or SentencePiece-like BPE over our own sentences and the prose, then a small GPT-2 or Llama on `corpus.Corpus`.
Hidden matrices are trained with Muon, the rest with AdamW: rare facts are learned in about half the exposures.
A checkpoint is written every few minutes; the same command continues an interrupted run. `evaluate.py` measures the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from factsmith.atlas import AtlasFact, facts, phrasings
from factsmith.atlas.texts import read_prose

from .corpus import Corpus, Row


@dataclass(frozen=True)
class Recipe:
    """How one bundled model is made."""

    family: Literal["gpt2", "llama"]
    steps: int = 2500  # of about 4,096 tokens
    wide_from: int = 14  # the epoch from which facts are also told in the `wide` phrasings
    known_below: float = (
        0.05  # a fact whose object cost fewer nats a token when last told counts as known ...
    )
    known_share: float = 0.35  # ... and is told again in this share of the later epochs only
    vocabulary: int = 6144
    layers: int = 6
    width: int = 256
    neurons: int = 1024
    heads: int = 4
    positions: int = 256
    muon_lr: float = 3e-3  # in AdamW's scale (update RMS 0.2)
    adamw_lr: float = 4e-3
    warmup: int = 100
    muon_decay: float = 0.01
    seed: int = 0


RECIPES = {
    "atlas": Recipe("gpt2", steps=3900, wide_from=36),
    "atlas-llama": Recipe("llama", neurons=768, steps=2500, wide_from=14),
}


def make_tokenizer(recipe: Recipe, prose: Sequence[str]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer from one telling of every fact and the prose; it always adds a leading space, so a name has one spelling."""
    draw = np.random.default_rng(recipe.seed)
    texts = []
    for fact in facts():
        told = phrasings(fact.relation).trained
        texts.append(
            told[draw.integers(len(told))].replace("{}", fact.subject) + f" {fact.object}."
        )
    texts += list(prose[:: max(1, len(prose) // 12000)])
    if recipe.family == "gpt2":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        special = ["<|endoftext|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        names = {"bos_token": special[0], "eos_token": special[0], "pad_token": special[0]}
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(Regex(r"\n"), " ")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="first"),
                pre_tokenizers.Punctuation("isolated"),
                pre_tokenizers.Digits(individual_digits=True),
            ]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
        )
        special = ["<unk>", "<s>", "</s>"]
        alphabet = []
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    bytes_ = [f"<0x{b:02X}>" for b in range(256)] if recipe.family == "llama" else []
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[
            *special,
            *(AddedToken(b, special=False, normalized=False) for b in bytes_),
        ],
        initial_alphabet=alphabet,
        limit_alphabet=400,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if recipe.family == "llama":
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=recipe.positions,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
    return fast


def make_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The architecture as transformers knows it; sizes come from the recipe."""
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if recipe.family == "gpt2":
        return GPT2Config(
            vocab_size=len(tokenizer), n_positions=recipe.positions, n_embd=recipe.width, n_layer=recipe.layers, n_head=recipe.heads,
            n_inner=recipe.neurons, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ends,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=recipe.neurons, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads // 2, max_position_embeddings=recipe.positions,
        tie_word_embeddings=True, **ends,
    )  # fmt: skip


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A fresh model, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(
        make_config(recipe, tokenizer), attn_implementation="eager"
    )


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms and biases."""
    table = model.get_input_embeddings().weight
    hidden = [
        p for n, p in model.named_parameters() if p.ndim == 2 and p is not table and "wpe" not in n
    ]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            hidden,
            lr=recipe.muon_lr,
            weight_decay=recipe.muon_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            rest, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def learning_rate(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to zero: the factor on every optimizer's own rate."""
    return min((step + 1) / warmup, max(0.0, (total - step) / total))


def learn(
    rows: Sequence[Row],
    trunk: Callable[..., Any],
    head: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    cost: Tensor,
) -> float:
    """One step on a group of rows; notes in `cost` (n_facts,) what each told fact's dearest object token cost, and returns their mean."""
    ids, predict, owner = (
        torch.from_numpy(np.stack([getattr(row, f) for row in rows]))
        for f in ("ids", "predict", "owner")
    )  # (B, T)
    wanted = predict[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d_model)
        logits = head(hidden[:, :-1][wanted])  # (n_predicted, vocabulary)
    nats = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
    torch.autograd.backward(nats.mean())
    torch.nn.utils.clip_grad_norm_(
        [p for o in optimizers for group in o.param_groups for p in group["params"]], 1.0
    )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    whose = owner[:, 1:][wanted]
    objects = whose >= 0
    cost[whose[objects]] = 0.0
    cost.scatter_reduce_(0, whose[objects], nats.detach()[objects], "amax")
    return float(nats.detach()[objects].mean())


def train(
    name: str,
    recipe: Recipe,
    told: Sequence[AtlasFact],
    prose: Sequence[str],
    out: Path,
    *,
    save_every: float = 240.0,
    fused: bool = False,
) -> None:
    """Train one model into `out`: a Hugging Face folder in float16 and `training.json` with the recipe, loss curve and time.

    save_every  seconds between checkpoints
    fused       run elementwise work through torch.compile: about a third faster, needs a C++ compiler, rounds differently
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(recipe, prose)
    corpus = Corpus(tokenizer, told, prose, seed=recipe.seed)
    model = make_model(recipe, tokenizer)
    optimizers = make_optimizers(model, recipe)
    state: dict[str, Any] = {
        "epoch": 0,
        "step": 0,
        "seconds": 0.0,
        "curve": [],
        "cost": torch.full((len(told),), torch.inf),
    }
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    trunk = torch.compile(model.base_model, dynamic=False) if fused else model.base_model
    started = saved_at = time.monotonic()
    before = state["seconds"]
    while state["step"] < recipe.steps:
        draw = np.random.default_rng((recipe.seed, state["epoch"], 1))
        chosen = np.flatnonzero(
            (state["cost"].numpy() > recipe.known_below)
            | (draw.random(len(told)) < recipe.known_share)
        )
        costs = []
        for rows in itertools.islice(
            corpus.epoch(state["epoch"], chosen, wide=state["epoch"] >= recipe.wide_from),
            recipe.steps - state["step"],
        ):
            factor = learning_rate(state["step"], recipe.steps, recipe.warmup)
            for optimizer, rate in zip(optimizers, (recipe.muon_lr, recipe.adamw_lr), strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            costs.append(
                learn(rows, trunk, model.get_output_embeddings(), optimizers, state["cost"])
            )
            state["step"] += 1
        state["epoch"] += 1
        state["seconds"] = before + time.monotonic() - started
        state["curve"].append(
            [
                state["epoch"],
                state["step"],
                len(chosen),
                round(float(np.mean(costs)), 4),
                round(state["seconds"]),
            ]
        )
        print(
            "{}: epoch {}, step {}, {} facts told, {} nats an object token, {} s".format(
                name, *state["curve"][-1]
            ),
            flush=True,
        )
        if time.monotonic() - saved_at > save_every:
            saved_at = time.monotonic()
            torch.save(
                {
                    **state,
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                },
                checkpoint.with_suffix(".new"),
            )
            checkpoint.with_suffix(".new").replace(checkpoint)
    model.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    summary = {
        "recipe": asdict(recipe),
        "facts": len(told),
        "seconds": round(state["seconds"]),
        "curve": state["curve"],
    }
    (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument(
        "--prose", type=Path, required=True, help="folder of public-domain .txt files"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--limit", type=int, help="train on the first N facts only, to try a recipe"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other recipe fields"
    )
    parser.add_argument(
        "--fused", action="store_true", help="use torch.compile; needs a C++ compiler"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    changes = dict(item.split("=", 1) for item in given.set) | (
        {"steps": given.steps} if given.steps else {}
    )
    settings = asdict(RECIPES[given.name])
    recipe = Recipe(
        **(settings | {key: type(settings[key])(value) for key, value in changes.items()})
    )
    prose = read_prose(given.prose)
    if not prose:
        raise SystemExit(f"no .txt files in {given.prose}; expected public-domain English prose")
    train(
        given.name,
        recipe,
        tuple(itertools.islice(facts(), given.limit)),
        prose,
        given.out,
        fused=given.fused,
    )


if __name__ == "__main__":
    main()
