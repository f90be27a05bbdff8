"""The editors by name: from facts to a Delta.

    moments = second_moments(lm, texts, layers=[0, 1, 2])
    delta = edit(lm, facts, "memit", MemitConfig(layers=(0, 1, 2)), moments=moments)
    delta = rome(lm, fact, RomeConfig(layer=1), moments=moments)          # the same as edit(lm, fact, "rome", ...)

The model is untouched when an editor returns; `applied(lm, delta)` puts the edit in. A method is a row of `METHODS`. A new one needs its
settings (`configs.py`), its formula (`solve.py`) and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..core.errors import InputError
from ..core.fact import Fact
from ..core.progress import Progress
from ..model.language_model import LanguageModel
from .configs import AlphaEditConfig, EditConfig, EmmetConfig, MemitConfig, RomeConfig
from .delta import Delta
from .inputs import EditInputs, Moments, edit_inputs
from .rome import one_by_one
from .spread import all_at_once
from .target import Targets


@dataclass(frozen=True)
class Method:
    """An editing method.

    Attributes:
        name: Its name, as in `edit(..., method=name)`.
        config: The class of its settings.
        solve: Makes the Delta from checked inputs.
        paper: Where it was published.
    """

    name: str
    config: type[EditConfig]
    solve: Callable[[EditInputs], Delta]
    paper: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("rome", RomeConfig, one_by_one, "https://arxiv.org/abs/2202.05262"),
        Method(
            "r-rome",
            RomeConfig,
            partial(one_by_one, one_key=True),
            "https://arxiv.org/abs/2403.07175",
        ),
        Method(
            "memit",
            MemitConfig,
            partial(all_at_once, method="memit"),
            "https://arxiv.org/abs/2210.07229",
        ),
        Method(
            "emmet",
            EmmetConfig,
            partial(all_at_once, method="emmet"),
            "https://arxiv.org/abs/2403.14236",
        ),
        Method(
            "alphaedit",
            AlphaEditConfig,
            partial(all_at_once, method="alphaedit"),
            "https://arxiv.org/abs/2410.02355",
        ),
    )
}
"""Every method by its name."""


def find_method(name: str, config: object = None) -> Method:
    """Return a method by its name.

    Raises:
        InputError: There is no such method, or the settings are those of another.
    """
    if name not in METHODS:
        raise InputError(f"no method {name!r}; expected one of {', '.join(METHODS)}")
    method = METHODS[name]
    if config is not None and not isinstance(config, method.config):
        raise InputError(f"{name} takes a {method.config.__name__}; got {type(config).__name__}")
    return method


def edit(  # house: the public signature; every argument but the first two has a default or a name
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    method: str = "rome",
    config: EditConfig | None = None,
    *,
    moments: Moments,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    beneath: Sequence[Delta] = (),
    targets: Targets | None = None,
    progress: Progress | None = None,
) -> Delta:
    """Solve for the change that makes the facts true; the model itself is untouched.

    Args:
        lm: The model.
        facts: One fact or several.
        method: A name from `METHODS`.
        config: The method's settings. None: those recommended for the model.
        moments: The second moment of the edited layer, or {layer: SecondMoment}, of the unedited model.
        contexts: Templates with `{}` for the prompt, the bare "{}" among them. None: the model writes them, from `seed`. In the keys of the
            MEMIT family the bare prompt weighs one half, the others together the other half.
        seed: Seed of the contexts.
        beneath: The deltas that the model carries, in their order; the first was made on the unedited model. The MEMIT family keeps their
            keys (Σ k kᵀ), as in the authors' sequential variant. ROME ignores the keys.
        targets: Targets that `find_targets` returned for these facts on this model; then there is no search. At the edited layer for ROME
            (a single fact), at the last layer with site="stream" for the MEMIT family.
        progress: Called with the step's name, how much is done, and how much there is.

    Returns:
        The change, with k_star, v_star and how each search ended. ROME and r-ROME write the facts one after another into one layer, so the
        result depends on their order. The others write all facts at once into several layers.

    Raises:
        InputError: An unknown method, the settings of another method, no facts, two targets for one prompt, a missing second moment, or
            contexts without "{}".
        LayerError: The model does not have a layer.
        SubjectError: A subject is not in its prompt exactly once.
        UnsupportedModelError: A layer is a mixture of experts.
        NumericsError: A number is not finite, or a system cannot be solved.
    """
    chosen = find_method(method, config)
    inputs = edit_inputs(
        lm,
        facts,
        chosen.config.recommended(lm) if config is None else config,
        moments=moments,
        contexts=contexts,
        seed=seed,
        beneath=beneath,
        targets=targets,
        progress=progress,
    )
    return chosen.solve(inputs)


def rome(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: RomeConfig | None = None,
    **options: Any,
) -> Delta:
    """Rank-one model editing (Meng et al. 2022, https://arxiv.org/abs/2202.05262). The options are those of `edit`."""
    return edit(lm, facts, "rome", config, **_renamed(options))


def r_rome(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: RomeConfig | None = None,
    **options: Any,
) -> Delta:
    """ROME with one key, the mean over contexts, in both places of equation 2 (Gupta et al. 2024, https://arxiv.org/abs/2403.07175).

    It avoids the edits that break a model because two keys hardly overlap. The options are those of `edit`.
    """
    return edit(lm, facts, "r-rome", config, **_renamed(options))


def memit(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: MemitConfig | None = None,
    **options: Any,
) -> Delta:
    """Mass-editing memory (Meng et al. 2022, https://arxiv.org/abs/2210.07229). The options are those of `edit`."""
    return edit(lm, facts, "memit", config, **_renamed(options))


def emmet(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: EmmetConfig | None = None,
    **options: Any,
) -> Delta:
    """ROME's equality for a whole batch (Gupta et al. 2024, https://arxiv.org/abs/2403.14236). The options are those of `edit`."""
    return edit(lm, facts, "emmet", config, **_renamed(options))


def alphaedit(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: AlphaEditConfig | None = None,
    **options: Any,
) -> Delta:
    """Null-space constrained editing (Fang et al. 2024, https://arxiv.org/abs/2410.02355). The options are those of `edit`."""
    return edit(lm, facts, "alphaedit", config, **_renamed(options))


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    """The options of an alias, where `earlier` is still taken: the name of `beneath` before 0.2."""
    if "earlier" in options:
        options["beneath"] = options.pop("earlier")
    return options
