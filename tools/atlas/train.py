"""Train the bundled models from scratch.

    python -m tools.atlas.train atlas --prose FOLDER --out FOLDER

First a BPE tokenizer is trained on our own sentences and the prose, then a small GPT-2 or Llama on
`corpus.Corpus`. Muon trains the hidden matrices, AdamW the rest: rare facts are then learned in
about half the exposures. A checkpoint is written every few minutes, and the same command continues
an interrupted run. `evaluate.py` measures the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from factsmith.atlas import AtlasFact, facts
from factsmith.atlas.texts import read_prose

from .corpus import Corpus, Row
from .recipe import RECIPES, Recipe
from .tokenizer import make_tokenizer


def make_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Return the architecture as transformers knows it, with the sizes of the recipe."""
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if recipe.family == "gpt2":
        return GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.positions,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            n_inner=recipe.neurons,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ends,
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.neurons,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads // 2,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        **ends,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return a fresh model with weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(
        make_config(recipe, tokenizer), attn_implementation="eager"
    )


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices, and AdamW for embeddings, norms and biases."""
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
    """Return the factor on every learning rate: linear warm-up, then linear decay to zero."""
    return min((step + 1) / warmup, max(0.0, (total - step) / total))


def learn(
    rows: Sequence[Row],
    trunk: Callable[..., Any],
    head: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    cost: Tensor,
) -> float:
    """Do one step on a group of rows, and return the mean cost of an object token in nats.

    Args:
        rows: Rows of one length.
        trunk: The model without its head.
        head: The unembedding.
        optimizers: What changes the weights.
        cost: (n_facts,) cost of each fact's dearest object token; those of the rows are updated.
    """
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


@dataclass
class Progress:
    """How far a training is; a checkpoint holds it."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    """Time of all runs together."""
    curve: list[list[Any]] = field(default_factory=list)
    """[epoch, step, facts used, nats an object token, seconds] of every epoch."""
    cost: Tensor = field(default_factory=lambda: torch.empty(0))
    """(n_facts,) nats of each fact's dearest object token, the last time that it was used."""


class Training:
    """One model in training: it runs epoch by epoch, and saves and restores its whole state."""

    def __init__(self, recipe: Recipe, corpus: Corpus, *, fused: bool = False) -> None:
        """Make a fresh model; `fused` runs elementwise work through torch.compile."""
        self.recipe, self.corpus = recipe, corpus
        self.model = make_model(recipe, corpus.tokenizer)
        self.optimizers = make_optimizers(self.model, recipe)
        base = self.model.base_model
        self.trunk = torch.compile(base, dynamic=False) if fused else base
        self.progress = Progress(cost=torch.full((len(corpus.facts),), torch.inf))

    def epoch(self) -> None:
        """Train on the facts of one epoch, or on as many as the remaining steps take."""
        recipe, progress = self.recipe, self.progress
        chosen = self._chosen()
        groups = self.corpus.epoch(progress.epoch, chosen, wide=progress.epoch >= recipe.wide_from)
        costs = []
        for rows in itertools.islice(groups, recipe.steps - progress.step):
            factor = learning_rate(progress.step, recipe.steps, recipe.warmup)
            rates = (recipe.muon_lr, recipe.adamw_lr)
            for optimizer, rate in zip(self.optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            head = self.model.get_output_embeddings()
            costs.append(learn(rows, self.trunk, head, self.optimizers, progress.cost))
            progress.step += 1
        progress.epoch += 1
        nats = round(float(np.mean(costs)), 4)
        progress.curve.append([progress.epoch, progress.step, len(chosen), nats])

    def _chosen(self) -> NDArray[np.int64]:
        """Return the facts of this epoch: those not yet known, and a random share of the others."""
        draw = np.random.default_rng((self.recipe.seed, self.progress.epoch, 1))
        unknown = self.progress.cost.numpy() > self.recipe.known_below
        return np.flatnonzero(
            unknown | (draw.random(len(self.corpus.facts)) < self.recipe.known_share)
        )

    def save(self, checkpoint: Path) -> None:
        """Write the whole state in one step."""
        progress = {part.name: getattr(self.progress, part.name) for part in fields(Progress)}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {**progress, "model": self.model.state_dict(), "optimizers": optimizers}
        temporary = checkpoint.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(checkpoint)

    def restore(self, checkpoint: Path) -> None:
        """Continue from a state that `save` wrote."""
        state = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state)


def train(
    name: str,
    recipe: Recipe,
    facts: Sequence[AtlasFact],
    prose: Sequence[str],
    out: Path,
    *,
    save_every: float = 240.0,
    fused: bool = False,
) -> None:
    """Train one model into a Hugging Face folder in float16.

    `training.json` in the folder holds the recipe, the loss curve and the time.

    Args:
        name: Name of the model, for the lines that are printed.
        recipe: How the model is made.
        facts: The facts to learn.
        prose: Sentences between the facts.
        out: The folder. A checkpoint in it is continued.
        save_every: Seconds between two checkpoints.
        fused: Run elementwise work through torch.compile. It is about a third faster, needs a C++
            compiler, and rounds differently.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(recipe, prose)
    training = Training(recipe, Corpus(tokenizer, facts, prose, seed=recipe.seed), fused=fused)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        training.restore(checkpoint)
    progress = training.progress
    started = saved_at = time.monotonic()
    before = progress.seconds
    while progress.step < recipe.steps:
        training.epoch()
        progress.seconds = before + time.monotonic() - started
        progress.curve[-1].append(round(progress.seconds))
        print(_line(name, progress.curve[-1]), flush=True)
        if time.monotonic() - saved_at > save_every:
            saved_at = time.monotonic()
            training.save(checkpoint)
    training.model.config._attn_implementation = "sdpa"
    training.model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    summary = {
        "recipe": asdict(recipe),
        "facts": len(facts),
        "seconds": round(progress.seconds),
        "curve": progress.curve,
    }
    (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _line(name: str, point: Sequence[Any]) -> str:
    form = "{}: epoch {}, step {}, {} facts used, {} nats an object token, {} s"
    return form.format(name, *point)


def changed(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    """Return a recipe with some fields from texts such as {"width": "128"}."""
    settings = asdict(recipe)
    if unknown := sorted(set(changes) - set(settings)):
        raise SystemExit(f"no field {unknown[0]!r}; expected some of {', '.join(settings)}")
    return Recipe(**{key: type(old)(changes.get(key, old)) for key, old in settings.items()})


def main() -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--prose", type=Path, required=True, help="folder of public-domain .txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, help="other number of steps")
    parser.add_argument("--limit", type=int, help="train on the first N facts, to try a recipe")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of the recipe"
    )
    parser.add_argument("--fused", action="store_true", help="torch.compile; needs C++")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changes = dict(item.split("=", 1) for item in options.set)
    if options.steps:
        changes["steps"] = str(options.steps)
    prose = read_prose(options.prose)
    if not prose:
        raise SystemExit(f"no .txt files in {options.prose}; expected public-domain English prose")
    train(
        options.name,
        changed(RECIPES[options.name], changes),
        facts()[: options.limit],
        prose,
        options.out,
        fused=options.fused,
    )


if __name__ == "__main__":
    main()
