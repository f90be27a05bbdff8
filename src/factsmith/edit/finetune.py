"""Plain fine-tuning, which editing methods are compared with: FT-L and LoRA on down-projections.

    weights = fine_tune(lm, facts, FineTuneConfig(layers=(1,)))      # {1: (d_model, d_ff)}
    weights = lora(lm, facts, LoraConfig(layers=(0, 1, 2)))          # needs factsmith[adapter]
    with written(lm, weights):
        lm.answer([facts[0].text])

The model is untouched when they return. Both train the prompts to be followed by their targets,
with gradient descent. Nothing protects other facts, except a bound on the change (FT-L: Zhu et al.
2020, https://arxiv.org/abs/2012.00363) or on its rank (LoRA: Hu et al. 2021,
https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..core.checks import check_count, check_number
from ..core.documented import documented
from ..core.errors import InputError, LayerError, NumericsError
from ..core.fact import Fact, listed
from ..core.progress import Progress, tell
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from ..model.neurons import linear_matrix
from ..model.tokens import pad_id, target_ids
from ..model.turns import asking
from .configs import MemitConfig
from .delta import read_weights, write_weights
from .lending import check_in_memory
from .questions import with_gaps


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The settings that FT-L and LoRA have in common."""

    layers: tuple[int, ...] | None = None
    """The layers whose down-projections are trained. None: those that MEMIT edits, of which FT-L
    takes the lowest."""
    lr: float = 5e-4
    """Learning rate of Adam."""
    stop_loss: float = 0.05
    """Training ends when an epoch's mean loss is below this value, in nats for each token."""
    steps: int = 600
    """Training also ends after this number of steps and `epochs` over the facts, whichever is
    later."""
    epochs: int = 8
    """See `steps`."""
    batch: int = 32
    """Number of facts in a step."""

    def __post_init__(self) -> None:
        for name in ("lr", "stop_loss"):
            check_number(getattr(self, name), name, above=0, most=1000)
        for name in ("steps", "epochs", "batch"):
            check_count(getattr(self, name), name)
        if self.layers is not None and (
            not self.layers or len(set(self.layers)) < len(self.layers)
        ):
            raise LayerError(
                f"layers is {self.layers!r}: it must be a list of layer numbers with each layer "
                "once, or None",
                argument="layer",
            )


@documented
@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TuneConfig):
    """Settings of FT-L."""

    lr: float = 2e-3
    clamp: float = 0.03
    """Largest change of any entry of a weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.clamp, "clamp", above=0, most=1_000_000)


@documented
@dataclass(frozen=True, kw_only=True)
class LoraConfig(TuneConfig):
    """Settings of LoRA."""

    rank: int = 8
    """Rank of each layer's change. The change is scaled by 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.rank, "rank")


@asking(grad=True, changes=True)
def fine_tune(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    config: FineTuneConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Train down-projections with FT-L: Adam, with each entry kept within ±clamp of what it was.

    Args:
        lm: The model. It is the same afterwards.
        facts: One fact or several, each with a target.
        config: The settings. By default one layer is trained.
        seed: Seed of the order of the facts.
        progress: Called with the step's name, how much is done, and how much there is.

    Returns:
        The new weights {layer: (d_model, d_ff)}, in the model's dtype and on its device.

    Raises:
        InputError: There are no facts, or one has no target.
        LayerError: The model does not have a layer.
        UnsupportedModelError: A layer is a mixture of experts.
        NumericsError: The weights did not stay finite.
    """
    config = config or FineTuneConfig()
    examples = _examples(lm, facts)
    layers = _layers(lm, config)[: None if config.layers else 1]
    check_in_memory(lm, layers, "fine-tuning")
    base = read_weights(lm, layers)
    weights = [lm.ffn[layer].down.get_parameter("weight") for layer in layers]
    starts = [weight.detach().clone() for weight in weights]

    def clamp() -> None:
        with torch.no_grad():
            for weight, start in zip(weights, starts, strict=True):
                weight.copy_(start + (weight - start).clamp(-config.clamp, config.clamp))

    with _gradients_put_aside(lm.module):
        try:
            for weight in weights:
                weight.requires_grad_(True)
            adam = torch.optim.Adam(weights, lr=config.lr)
            _train(lm.module, lm, examples, adam, config, seed, clamp, progress)
            tuned = read_weights(lm, layers)
        finally:
            write_weights(lm, base)
    return _finite(tuned)


@asking(grad=True, changes=True)
def lora(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    config: LoraConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Train down-projections with LoRA, by peft, and add its product to their weights.

    Arguments, result and errors are those of `fine_tune`.

    Raises:
        InputError: peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(
            "LoRA needs peft, which is not installed. Install it with: "
            'pip install "factsmith[adapter]"'
        ) from None
    config = config or LoraConfig()
    examples, layers = _examples(lm, facts), _layers(lm, config)
    check_in_memory(lm, range(lm.n_layers), "LoRA")
    base = read_weights(lm, layers)
    downs = {layer: lm.ffn[layer].down for layer in layers}
    names = {module: name for name, module in lm.module.named_modules()}
    devices = [lm.device] if lm.device.type == "cuda" else []
    with _gradients_put_aside(lm.module), _without_adapter(lm.module, names, downs.values()):
        with (
            torch.random.fork_rng(devices=devices),
            _default_dtype(torch.float32),
            warnings.catch_warnings(),
        ):
            # peft uses names of transformers that will change, which warns on each use.
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            settings = peft.LoraConfig(
                r=config.rank,
                lora_alpha=2 * config.rank,
                lora_dropout=0.0,
                target_modules=[names[down] for down in downs.values()],
                fan_in_fan_out=any(linear_matrix(down).transposed for down in downs.values()),
            )
            model = peft.get_peft_model(lm.module, settings)
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
        _train(model, lm, examples, adam, config, seed, lambda: None, progress)
        tuned = {}
        with torch.no_grad():
            for layer, down in downs.items():
                change = lm.module.get_submodule(names[down]).get_delta_weight("default")
                change = change.T if linear_matrix(down).transposed else change
                weight = base[layer]
                tuned[layer] = (weight.float() + change.to(weight.device).float()).to(weight.dtype)
    return _finite(tuned)


@contextmanager
def _gradients_put_aside(module: nn.Module) -> Iterator[None]:
    """Let nothing be trained at first. Afterwards each weight has its own gradient and flag."""
    kept = [(weight, weight.requires_grad, weight.grad) for weight in module.parameters()]
    try:
        for weight, _, _ in kept:
            weight.requires_grad_(False)
            weight.grad = None
        yield
    finally:
        for weight, is_trained, gradient in kept:
            weight.requires_grad_(is_trained)
            weight.grad = gradient


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype, for code that names none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_adapter(
    module: Any, names: Mapping[nn.Module, str], adapted: Iterable[nn.Module]
) -> Iterator[None]:
    """Put modules back in their places in the end. By hand, because peft may fail in the middle."""
    try:
        yield
    finally:
        for part in adapted:
            parent, _, child = names[part].rpartition(".")
            setattr(module.get_submodule(parent), child, part)
        if hasattr(module, "peft_config"):
            del module.peft_config  # otherwise the next call looks like a second adapter


_Example: TypeAlias = tuple[list[int], list[int]]
"""The tokens of a prompt, and those of its target."""


def _examples(lm: LanguageModel, facts: Fact | Sequence[Fact]) -> list[_Example]:
    """Return the tokens of each fact, before the first step changes what the model says."""
    given = listed(facts)
    if aimless := next((fact for fact in given if fact.target is None), None):
        raise InputError(
            f"{aimless.text!r} has no target to train on. Give one, or use rome or memit to forget."
        )
    examples = [
        (lm.prompt_ids(fact.text), target_ids(lm, fact.text, str(fact.target), gap=fact.gap))
        for fact in with_gaps(lm, given)
    ]
    longest = max(len(prompt) + len(target) for prompt, target in examples)
    if lm.max_tokens is not None and longest > lm.max_tokens:
        raise InputError(
            f"a prompt and its target have {longest} tokens; {lm.name} has positions for "
            f"{lm.max_tokens}: shorten the prompt"
        )
    return examples


def _layers(lm: LanguageModel, config: TuneConfig) -> list[int]:
    """Return the layers to train, in ascending order."""
    chosen = config.layers or MemitConfig.recommended(lm).layers
    assert chosen is not None
    return sorted(check_dense_layer(layer, lm.ffn) for layer in chosen)


def _finite(weights: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the weights, after a check that they are finite."""
    for layer, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise NumericsError(
                f"training left NaN or infinity in layer {layer} ({weight.dtype}). Use a smaller "
                "lr, or float32.",
                argument="lr",
            )
    return weights


def _batches(
    lm: LanguageModel, examples: Sequence[_Example], size: int, seed: str
) -> Iterator[dict[str, Tensor]]:
    """Yield shuffled batches of prompts and targets, with labels at the targets."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    fill = pad_id(lm.tokenizer)
    for first in range(0, len(order), size):
        rows = [
            (prompt + target, [-100] * len(prompt) + target)
            for prompt, target in order[first : first + size]
        ]
        width = max(len(ids) for ids, _ in rows)
        padding = [width - len(ids) for ids, _ in rows]
        batch = {
            "input_ids": [ids + [fill] * n for (ids, _), n in zip(rows, padding, strict=True)],
            "labels": [labels + [-100] * n for (_, labels), n in zip(rows, padding, strict=True)],
            "attention_mask": [[1] * (width - n) + [0] * n for n in padding],
        }
        yield {name: torch.tensor(values, device=lm.device) for name, values in batch.items()}


def _train(
    module: nn.Module,
    lm: LanguageModel,
    examples: Sequence[_Example],
    adam: torch.optim.Optimizer,
    config: TuneConfig,
    seed: int,
    after: Callable[[], object],
    progress: Progress | None,
) -> None:
    """Take steps until an epoch's mean loss is low enough, or there were enough steps.

    Args:
        module: The model to train.
        lm: Its tokenizer is used.
        examples: The tokens of the facts.
        adam: The optimizer of what is trained.
        config: The settings.
        seed: Seed of the order of the facts.
        after: Called after each step.
        progress: Called with the step's name, how much is done, and how much there is.
    """
    steps, epoch = 0, 0
    total = max(config.steps, config.epochs * -(-len(examples) // config.batch))
    with torch.enable_grad():
        while steps < config.steps or epoch < config.epochs:
            losses = []
            for batch in _batches(lm, examples, config.batch, f"{seed} {epoch}"):
                labels = batch.pop("labels")[:, 1:]
                adam.zero_grad()
                logits = module(**batch).logits[:, :-1]
                loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
                torch.autograd.backward(loss)
                adam.step()
                after()
                losses.append(float(loss.detach()))
                tell(progress, "training", steps + len(losses), total)
            steps, epoch = steps + len(losses), epoch + 1
            if statistics.fmean(losses) < config.stop_loss:
                return
