"""How each bundled model is made: its sizes, its learning rates, and which facts it sees when.

RECIPES["atlas"].steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """How one bundled model is made."""

    family: Literal["gpt2", "llama"]
    steps: int = 2500
    """Optimizer steps, each on about 4,096 tokens."""
    wide_from: int = 14
    """The epoch from which the `wide` phrasings are used too."""
    known_below: float = 0.05
    """A fact is known if its object cost fewer nats a token than this the last time."""
    known_share: float = 0.35
    """Share of the later epochs in which a known fact is used."""
    vocabulary: int = 6144
    layers: int = 6
    width: int = 256
    neurons: int = 1024
    heads: int = 4
    positions: int = 256
    muon_lr: float = 3e-3
    """Learning rate of the hidden matrices, in AdamW's scale (update RMS 0.2)."""
    adamw_lr: float = 4e-3
    warmup: int = 100
    muon_decay: float = 0.01
    seed: int = 0


RECIPES = {
    "atlas": Recipe("gpt2", steps=3900, wide_from=36),
    "atlas-llama": Recipe("llama", neurons=768, steps=2500, wide_from=14),
}
