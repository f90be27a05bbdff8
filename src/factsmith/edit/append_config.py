"""The settings of append: the layer, and how the targets are searched.

AppendConfig(layer=0)
AppendConfig.recommended(lm)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..core.checks import check_count
from ..core.documented import documented
from ..corpus.scan import Site as Read
from ..model.language_model import LanguageModel
from .configs import OneLayerConfig, RomeConfig, by_depth, shipped
from .contexts import generate_openings


@documented
@dataclass(frozen=True)
class AppendConfig(OneLayerConfig):
    """Settings of append: the layer, and how targets are searched (the fields of TargetConfig)."""

    kind: ClassVar[str] = "append"
    guards_relations: bool = True
    repair: int = 2
    """How often the facts that the model does not assert get their target searched again on the
    model with all new rows. 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "repair", check_count(self.repair, "repair", least=0))

    @property
    def draws_on(self) -> Read:
        """Append draws on statistics of what enters the layer."""
        return "inputs"

    def own_contexts(self, lm: LanguageModel, seed: int) -> list[str]:
        """Return the bare prompt and 5 openings that the model continues, then those in a chat."""
        return generate_openings(lm, seed, chat=self.scale != "paper")

    @classmethod
    def recommended(cls, lm: LanguageModel) -> Self:
        """Return the settings that came with the model, or settings that suit any model.

        The search is that of ROME. The layer is the middle one of those that the MEMIT family would
        edit. A plan measures it instead, if no layer came with the model (`append_layer`).

        Raises:
            InputError: The settings that came with the model cannot be used.
        """
        search: dict[str, Any] = shipped(RomeConfig, lm)
        search = search or {"scale": "auto", "steps": 80, "lr": 0.1}
        layers = by_depth(lm.n_layers, search.pop("layer", None))
        middle = layers[(len(layers) - 1) // 2]
        return cls(**{"layer": middle, **search, **shipped(cls, lm)})
