"""The editing methods by name: from facts to a Delta.

    moments = second_moments(lm, texts, layers=[0, 1, 2])
    delta = edit(lm, facts, "memit", MemitConfig(layers=(0, 1, 2)), moments=moments)
    delta = memit(lm, facts, MemitConfig(layers=(0, 1, 2)), moments=moments)        # the same

The model is untouched when a method returns. `applied(lm, delta)` puts the edit in.

A method is a row of `METHODS`. A new one needs its settings (`configs.py`), its formula
(`solve.py`) and its row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, TypeVar, Unpack

from ..core.errors import InputError
from ..core.fact import Fact
from ..core.progress import Progress
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .append import append_facts
from .append_config import AppendConfig
from .configs import AlphaEditConfig, EditConfig, EmmetConfig, MemitConfig, RomeConfig
from .delta import Delta
from .inputs import EditInputs, Moments, distinct_facts, edit_inputs, with_targets
from .neurons import sparing
from .questions import with_gaps
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


_ARXIV = "https://arxiv.org/abs/"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("rome", RomeConfig, one_by_one, _ARXIV + "2202.05262"),
        Method("r-rome", RomeConfig, partial(one_by_one, one_key=True), _ARXIV + "2403.07175"),
        Method("memit", MemitConfig, partial(all_at_once, method="memit"), _ARXIV + "2210.07229"),
        Method("emmet", EmmetConfig, partial(all_at_once, method="emmet"), _ARXIV + "2403.14236"),
        Method(
            "alphaedit",
            AlphaEditConfig,
            partial(all_at_once, method="alphaedit"),
            _ARXIV + "2410.02355",
        ),
        # The nearest published method trains its neurons.
        Method("append", AppendConfig, append_facts, _ARXIV + "2301.09785"),
    )
}
"""Every editing method by its name."""


def find_method(name: str, config: object = None) -> Method:
    """Return a method by its name.

    Raises:
        InputError: There is no such method, or the settings are those of another.
    """
    if name not in METHODS:
        raise InputError(
            f"no method {name!r}; expected one of {', '.join(METHODS)}", argument="method"
        )
    method = METHODS[name]
    if config is not None and not isinstance(config, method.config):
        raise InputError(
            f"{name} takes a {method.config.__name__}; got a {type(config).__name__}",
            argument="config",
        )
    return method


def method_for(facts: Sequence[Fact], config: EditConfig | None = None) -> str:
    """Return the name of the method for facts that come without one; this is the one rule.

    Settings decide if there are any. Otherwise ROME writes one fact, and MEMIT several.
    """
    if config is not None:
        for name, method in METHODS.items():
            if type(config) is method.config:
                return name
        raise InputError(
            f"config is a {type(config).__name__}; expected the settings of a method: "
            f"{', '.join(method.config.__name__ for method in METHODS.values())}",
            argument="config",
        )
    return "memit" if len(facts) > 1 else "rome"


@asking(grad=True, changes=True)
def edit(  # house: the public signature, promised in DESIGN
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    method: str | None = None,
    config: EditConfig | None = None,
    *,
    moments: Moments | None = None,
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
        method: A name from `METHODS`. None: the method of `config`, or else ROME for one fact and
            MEMIT for several.
        config: The method's settings. None: those recommended for the model.
        moments: The second moment of the edited layer, or {layer: SecondMoment}. They are those of
            the unedited model. None: those of `find_moments`, if the model carries nothing.
        contexts: Templates with `{}` for the prompt, the bare "{}" among them. None: the model
            writes them, from `seed`. In the keys of the MEMIT family the bare prompt has one half
            of the weight, and the others together have the other half.
        seed: Seed of the contexts.
        beneath: The deltas that the model carries, in their order. The first was made on the
            unedited model. The MEMIT family keeps what they wrote, by their keys (Σ k kᵀ), as in
            the authors' sequential variant. ROME ignores the keys. Neurons that they erase stay
            erased.
        targets: Targets that `find_targets` returned for these facts on this model, so that there
            is no search. For ROME they are those of a single fact at the edited layer. For the
            MEMIT family they are at the last layer, with site="stream".
        progress: Called with the step's name, how much is done, and how much there is.

    Returns:
        The change, with k_star, v_star and how each search ended. ROME and r-ROME write the facts
        one after another into one layer, so the result depends on their order. The other methods
        write all facts at once into several layers.

    Raises:
        InputError: The method is unknown, the settings are those of another method, there are no
            facts, one prompt has two targets, a second moment is missing, or the bare "{}" is not
            among the contexts.
        LayerError: The model does not have a layer.
        SubjectError: A subject is not in its prompt exactly once.
        UnsupportedModelError: A layer is a mixture of experts.
        NumericsError: A number is not finite, or a system cannot be solved.
    """
    check_model(lm)
    distinct = with_gaps(lm, distinct_facts(facts))
    chosen = find_method(method_for(distinct, config) if method is None else method, config)
    inputs = edit_inputs(
        lm,
        distinct,
        chosen.config.recommended(lm) if config is None else config,
        moments=moments,
        contexts=contexts,
        seed=seed,
        beneath=beneath,
        progress=progress,
    )
    solved = chosen.solve(inputs if targets is None else with_targets(inputs, targets))
    return sparing(solved, inputs.beneath)


class EditOptions(TypedDict, total=False):
    """The options of `edit`, which the functions below take too.

    `earlier` is an older name of `beneath`, which is still accepted.
    """

    moments: Moments | None
    contexts: Sequence[str] | None
    seed: int
    beneath: Sequence[Delta]
    earlier: Sequence[Delta]
    targets: Targets | None
    progress: Progress | None


_Alias = TypeVar("_Alias", bound=Callable[..., Delta])


def _with_options_of_edit(function: _Alias) -> _Alias:
    """Show the options of `edit` in a function's signature, for help and completion."""
    signature = inspect.signature(function)
    first = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [p for p in inspect.signature(edit).parameters.values() if p.kind is p.KEYWORD_ONLY]
    vars(function)["__signature__"] = signature.replace(parameters=[*first, *options])
    return function


@_with_options_of_edit
def rome(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: RomeConfig | None = None,
    **options: Unpack[EditOptions],
) -> Delta:
    """Write facts with ROME, rank-one model editing (Meng et al. 2022).

    The paper is https://arxiv.org/abs/2202.05262. Arguments, result and errors are those of `edit`.
    """
    return edit(lm, facts, "rome", config, **_renamed(options))


@_with_options_of_edit
def r_rome(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: RomeConfig | None = None,
    **options: Unpack[EditOptions],
) -> Delta:
    """Write facts with r-ROME, which is ROME with one key (Gupta et al. 2024).

    The paper is https://arxiv.org/abs/2403.07175. The mean key over the contexts is in both places
    of ROME's equation 2. This avoids the edits that break a model because two keys hardly overlap.
    Arguments, result and errors are those of `edit`.
    """
    return edit(lm, facts, "r-rome", config, **_renamed(options))


@_with_options_of_edit
def memit(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: MemitConfig | None = None,
    **options: Unpack[EditOptions],
) -> Delta:
    """Write facts with MEMIT, mass-editing memory (Meng et al. 2022).

    The paper is https://arxiv.org/abs/2210.07229. Arguments, result and errors are those of `edit`.
    """
    return edit(lm, facts, "memit", config, **_renamed(options))


@_with_options_of_edit
def emmet(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: EmmetConfig | None = None,
    **options: Unpack[EditOptions],
) -> Delta:
    """Write facts with EMMET: exact outputs, as in ROME, for many facts (Gupta et al. 2024).

    The paper is https://arxiv.org/abs/2403.14236. Arguments, result and errors are those of `edit`.
    """
    return edit(lm, facts, "emmet", config, **_renamed(options))


@_with_options_of_edit
def alphaedit(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: AlphaEditConfig | None = None,
    **options: Unpack[EditOptions],
) -> Delta:
    """Write facts with AlphaEdit, null-space constrained editing (Fang et al. 2024).

    The paper is https://arxiv.org/abs/2410.02355. Arguments, result and errors are those of `edit`.
    """
    return edit(lm, facts, "alphaedit", config, **_renamed(options))


@_with_options_of_edit
def append(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    config: AppendConfig | None = None,
    **options: Unpack[EditOptions],
) -> Delta:
    """Write facts as new neurons: one fact, one appended row of a feed-forward layer.

    The key of a row matches what enters the layer at the fact's subject, in closed form. The value
    is the change that ROME searches for. Huang et al. 2023 append neurons too, trained by gradient
    in the last layer: https://arxiv.org/abs/2301.09785. `moments` are those of inputs,
    second_moments(..., site="inputs"). Otherwise arguments, result and errors are those of `edit`.
    """
    return edit(lm, facts, "append", config, **_renamed(options))


def _renamed(options: EditOptions) -> dict[str, Any]:
    """Return the options by their present names."""
    named: dict[str, Any] = {**options}
    if "earlier" in named:
        named["beneath"] = named.pop("earlier")
    return named
