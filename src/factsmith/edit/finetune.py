"""Plain fine-tuning, which editors are compared with: FT-L and LoRA on a model's down-projections.

    weights = fine_tune(lm, facts, FineTuneConfig(layers=(1,)))      # {1: (d_model, d_ff)}; the model is untouched
    weights = lora(lm, facts, LoraConfig(layers=(0, 1, 2)))          # needs peft: pip install "factsmith[adapter]"
    with written(lm, weights):                                       # inside the new weights, outside the very same bits as before
        lm.answer([facts[0].text])

Both follow the prompt's own tokens to the target by gradient descent, and nothing asks them to leave the rest alone but a bound on the
change (FT-L: Zhu et al. 2020, https://arxiv.org/abs/2012.00363) or its rank (LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.checks import check_count, check_number
from ..core.errors import InputError, LayerError, NumericsError
from ..core.fact import Fact, listed
from ..core.progress import Progress, tell
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from ..model.neurons import linear_matrix
from ..model.tokens import pad_id, target_ids
from .configs import MemitConfig
from .delta import read_weights, write_weights


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What both ways have in common. Raises InputError or LayerError for what is out of range."""

    layers: tuple[int, ...] | None = None
    """Whose down-projections are trained. None: those that MEMIT edits, of which FT-L takes the lowest."""
    lr: float = 5e-4
    """Step size of Adam."""
    stop_loss: float = 0.05
    """An epoch's mean loss, in nats a token, at which training ends."""
    steps: int = 600
    """At most so many steps, or `epochs` over the facts, whichever is more."""
    epochs: int = 8
    batch: int = 32
    """Facts a step."""

    def __post_init__(self) -> None:
        for name in ("lr", "stop_loss"):
            check_number(getattr(self, name), name, above=0, most=1000)
        for name in ("steps", "epochs", "batch"):
            check_count(getattr(self, name), name)
        if self.layers is not None and (
            not self.layers or len(set(self.layers)) < len(self.layers)
        ):
            raise LayerError(
                f"layers are numbers of layers, each once, or None; got {self.layers!r}"
            )


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TuneConfig):
    """Settings of FT-L."""

    lr: float = 2e-3
    clamp: float = 0.03
    """No entry of a weight changes by more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.clamp, "clamp", above=0, most=1_000_000)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TuneConfig):
    """Settings of LoRA."""

    rank: int = 8
    """Of each layer's change, which is scaled by 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.rank, "rank")


def fine_tune(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    config: FineTuneConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """FT-L: Adam on some down-projections (by default one), each entry kept within ±clamp of what it was.

    Returns the new weights {layer: (d_model, d_ff)}, in the model's dtype and on its device; the model is as before. Raises InputError for
    no facts or one without a target, LayerError, UnsupportedModelError (experts), NumericsError where training did not stay finite.
    """
    config = config or FineTuneConfig()
    told, layers = _checked(facts), _layers(lm, config)[: None if config.layers else 1]
    base = read_weights(lm, layers)
    weights = [lm.ffn[layer].down.get_parameter("weight") for layer in layers]
    starts = [weight.detach().clone() for weight in weights]

    def bound() -> None:
        with torch.no_grad():
            for weight, start in zip(weights, starts, strict=True):
                weight.copy_(start + (weight - start).clamp(-config.clamp, config.clamp))

    try:
        for weight in weights:
            weight.requires_grad_(True)
        _train(
            lm.module,
            lm,
            told,
            torch.optim.Adam(weights, lr=config.lr),
            config,
            seed,
            bound,
            progress,
        )
        found = {
            layer: weight.detach().clone() for layer, weight in read_weights(lm, layers).items()
        }
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
        write_weights(lm, base)
    return _finite(found, base)


def lora(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    config: LoraConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """LoRA, by peft, on the down-projections of some layers, and its product added to their weights.

    Arguments, result and errors as `fine_tune`; InputError too where peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(
            'LoRA needs peft, which is not installed; install it with: pip install "factsmith[adapter]"'
        ) from None
    config = config or LoraConfig()
    told, layers = _checked(facts), _layers(lm, config)
    base = read_weights(lm, layers)
    downs = {layer: lm.ffn[layer].down for layer in layers}
    names = {module: name for name, module in lm.module.named_modules()}
    try:
        with (
            torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter(
                "ignore"
            )  # of what peft asks of transformers that is to be renamed there
            torch.manual_seed(seed)
            model = peft.get_peft_model(
                lm.module,
                peft.LoraConfig(
                    r=config.rank,
                    lora_alpha=2 * config.rank,
                    lora_dropout=0.0,
                    target_modules=[names[down] for down in downs.values()],
                    fan_in_fan_out=any(linear_matrix(down).transposed for down in downs.values()),
                ),
            )
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
        _train(model, lm, told, adam, config, seed, lambda: None, progress)
        found = {}
        with torch.no_grad():
            for layer, down in downs.items():
                change = lm.module.get_submodule(names[down]).get_delta_weight("default")
                change = change.T if linear_matrix(down).transposed else change
                found[layer] = (base[layer].float() + change.to(base[layer].device).float()).to(
                    base[layer].dtype
                )
    finally:
        for down in downs.values():  # by hand, since it is right wherever the work was left
            parent, _, child = names[down].rpartition(".")
            setattr(lm.module.get_submodule(parent), child, down)
        lm.module.requires_grad_(False)
        if hasattr(lm.module, "peft_config"):
            del (
                lm.module.peft_config
            )  # or the next time would look like a second adapter on the first
    return _finite(found, base)


def _checked(facts: Fact | Sequence[Fact]) -> list[Fact]:
    told = listed(facts)
    if aimless := next((fact for fact in told if fact.target is None), None):
        raise InputError(
            f"{aimless.text!r} has no target to train on; give one, or use rome or memit to forget"
        )
    return told


def _layers(lm: LanguageModel, config: TuneConfig) -> list[int]:
    chosen = config.layers or MemitConfig.recommended(lm).layers
    assert chosen is not None
    return sorted(check_dense_layer(layer, lm.ffn) for layer in chosen)


def _finite(found: dict[int, Tensor], base: Mapping[int, Tensor]) -> dict[int, Tensor]:
    for layer, weight in found.items():
        if not torch.isfinite(weight).all():
            raise NumericsError(
                f"training left NaN or infinity in layer {layer} ({base[layer].dtype}); use a smaller lr, or float32"
            )
    return found


def _batches(
    lm: LanguageModel, facts: Sequence[Fact], size: int, seed: str
) -> Iterator[dict[str, Tensor]]:
    """Shuffled batches of prompt + target, labelled at the target."""
    order = list(facts)
    random.Random(seed).shuffle(order)
    fill, device = pad_id(lm.tokenizer), lm.device
    for at in range(0, len(order), size):
        rows = []
        for fact in order[at : at + size]:
            head, tail = (
                lm.prompt_ids(fact.text),
                target_ids(lm.tokenizer, fact.text, fact.target or ""),
            )
            rows.append((head + tail, [-100] * len(head) + tail))
        width = max(len(ids) for ids, _ in rows)
        yield {
            "input_ids": torch.tensor(
                [ids + [fill] * (width - len(ids)) for ids, _ in rows], device=device
            ),
            "labels": torch.tensor(
                [labels + [-100] * (width - len(labels)) for _, labels in rows], device=device
            ),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device
            ),
        }


def _train(
    module: torch.nn.Module,
    lm: LanguageModel,
    facts: Sequence[Fact],
    adam: torch.optim.Optimizer,
    config: TuneConfig,
    seed: int,
    after: Callable[[], object],
    progress: Progress | None,
) -> None:
    """Steps on shuffled batches until an epoch's mean loss is low enough, or there were enough of them."""
    steps, epoch = 0, 0
    with torch.enable_grad():
        while steps < config.steps or epoch < config.epochs:
            losses = []
            for batch in _batches(lm, facts, config.batch, f"{seed} {epoch}"):
                adam.zero_grad()
                logits = module(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits[:, :-1]
                loss = cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
                torch.autograd.backward(loss)
                adam.step()
                after()
                losses.append(float(loss.detach()))
                tell(
                    progress,
                    "training",
                    steps + len(losses),
                    max(config.steps, config.epochs * -(-len(facts) // config.batch)),
                )
            steps, epoch = steps + len(losses), epoch + 1
            if statistics.fmean(losses) < config.stop_loss:
                return
