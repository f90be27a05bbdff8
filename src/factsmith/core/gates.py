"""Gates: the thresholds that a patch must pass before it is committed.

    Gates(efficacy=1.0, neighbours=None)
    Gates.from_dict({"paraphrases": 0.8})

A new gate is a field here, and a check in `patch/gates.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import pydantic
from pydantic import BeforeValidator, ConfigDict

from .errors import FactError
from .explain import explain


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}; expected a number, or null to switch it off")
    return value


Share = Annotated[
    float, pydantic.Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_no_truth)
]
Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_truth)]


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False)
)
class Gates:
    """What a patch must pass before it is committed. None switches a gate off.

    Attributes:
        efficacy: Least share of the written prompts that are answered with the target.
        paraphrases: Least share of the paraphrases that are answered with the target.
        neighbours: Least share of the neighbours whose answer stays.
        earlier: Least share of the facts of earlier patches that still hold.
        kl_text: Most nats a token by which the distribution on prose may move, on average.
        kl_text_worst: The same for its 99 % quantile.
        kl_facts: The same as `kl_text` where the answers of unrelated facts are due.
        changed_share: Largest share of unrelated facts that may be answered otherwise.
        perplexity: Largest ratio of the perplexity on that prose, after to before.
    """

    efficacy: Share | None = 1.0
    paraphrases: Share | None = 0.5
    neighbours: Share | None = 0.8
    earlier: Share | None = 1.0
    kl_text: Amount | None = 0.1
    kl_text_worst: Amount | None = None
    kl_facts: Amount | None = None
    changed_share: Share | None = None
    perplexity: Amount | None = None

    @classmethod
    def from_dict(cls, fields: object) -> Gates:
        """Return gates from plain values; those that are not named keep their defaults.

        Raises:
            FactError: when the fields are not thresholds by name.
        """
        if not isinstance(fields, Mapping):
            raise FactError(f"gates are thresholds by name; got {type(fields).__name__}")
        try:
            return cls(**{str(name): value for name, value in fields.items()})
        except pydantic.ValidationError as error:
            raise FactError(explain(error, "gates")) from None
