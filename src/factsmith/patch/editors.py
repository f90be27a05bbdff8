"""The methods as `judge` takes them: functions of facts that open a block with the facts written.

    run = evaluate(lm, records, editors(lm, ["rome", "memit", "ft-l"]), size=1)
    with editors(lm, ["memit"])["memit"](facts) as notes:
        lm.answer([facts[0].text]), notes["seconds"], notes["norm"]

Second moments and contexts are made once, on the model as it is, and shared. Blocks may be nested,
as a sequence of edits is: an editor knows what the blocks around it wrote, and the MEMIT family
keeps its keys. `apart` of an editor gives one that makes each edit as if it were the first, so that
edits can be made in any order and in any process.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

from torch import Tensor

from ..core.checks import check_items, check_seed
from ..core.errors import InputError
from ..core.fact import Fact
from ..core.progress import Progress
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import find_moments
from ..corpus.scan import Site
from ..edit.configs import EditConfig
from ..edit.delta import Delta, applied, read_weights, written
from ..edit.finetune import FineTuneConfig, LoraConfig, TuneConfig, fine_tune, lora
from ..edit.inputs import Moments
from ..edit.methods import METHODS, edit
from ..edit.search import find_targets
from ..edit.settings import check_settings
from ..edit.target import TargetConfig, Targets
from ..judge.editor import Editor, NotAnEditorError, description_of
from ..judge.metrics import relative_norm
from ..judge.rows import finite_numbers
from ..model.language_model import LanguageModel, check_model
from .bench import Scratch
from .own_method import OwnMethod, function_of, is_own
from .plan import choose_layers
from .recipe import Recipe, Sources

_TUNED: dict[str, tuple[Callable[..., dict[int, Tensor]], type[TuneConfig]]] = {
    "ft-l": (fine_tune, FineTuneConfig),
    "lora": (lora, LoraConfig),
}
_OTHER_NAMES = {"ft": "ft-l"}

NAMES = (*METHODS, *_TUNED)
"""Every method that `editors` knows."""

_Change: TypeAlias = "Delta | dict[int, Tensor]"
_T = TypeVar("_T")


def editors(
    lm: LanguageModel,
    methods: Iterable[str],
    *,
    config: Mapping[str, Any] | None = None,
    moments: Mapping[int, SecondMoment] | None = None,
    texts: Iterable[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Editor]:
    """Return editors by name, for `evaluate`.

    A block gives {"seconds": what solving took, "norm": the largest ‖ΔW‖/‖W‖ of a layer, the blocks
    around it included}. It changes the model by down-projections only, and puts the very bits of
    before back, also after an exception. Methods that search the same targets share them, if the
    facts are written into the model as it is; each method's seconds count the search.

    Args:
        lm: The model.
        methods: Some of rome, r-rome, memit, emmet, alphaedit, append, ft-l (or ft), lora. A method
            of your own is named by its function, as "module:function" or "file.py:function"; see
            `own_method.py`.
        config: {method: its settings}. A method that is left out takes the recommended ones, at the
            layers known for the model, or else at a share of its depth. FT-L takes the lowest of
            MEMIT's layers, LoRA all of them.
        moments: {layer: SecondMoment} of the edited layers. None: the kept ones, or computed from
            `texts`.
        texts: Ordinary text. None: the bundled corpus. "own": the model writes it.
        folder: Where computed second moments are kept, and looked for.
        seed: Seed of the contexts, of text that the model writes, and of what training shuffles.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises:
        InputError: There is no such method, or its settings are not valid.
    """
    check_model(lm)
    seed = check_seed(seed)
    names = _checked_names(methods)
    given = _by_name(config or {}, names, "config has settings for")
    settings = {name: _settings(lm, name, given.get(name)) for name in names if not is_own(name)}
    edits = [one for one in settings.values() if isinstance(one, EditConfig)]
    by_site: dict[Site, Mapping[int, SecondMoment]] = {}
    for site in dict.fromkeys(one.draws_on for one in edits):
        layers = sorted({x for one in edits if one.draws_on == site for x in one.edited or ()})
        usable = {x: m for x, m in (moments or {}).items() if m.site == site}
        by_site[site] = usable or find_moments(
            lm, layers, folder=folder, texts=texts, seed=seed, site=site, progress=progress
        )
    contexts = {kind: each.own_contexts(lm, seed) for kind, each in _kinds(edits).items()}
    writer = _Writer(lm)

    def editor(name: str) -> Editor:
        if is_own(name):
            return _OwnEditor(writer, name, function_of(name))
        setting = settings[name]
        if isinstance(setting, TuneConfig):
            return _TuningEditor(writer, name, setting, seed)
        return _EditingEditor(
            writer, name, setting, by_site[setting.draws_on], contexts[_kind(setting)], seed
        )

    return {name: editor(name) for name in names}


def _kind(config: EditConfig) -> object:
    """Return what decides which contexts the model writes: the function that asks for them."""
    return type(config).own_contexts


def _kinds(edits: Iterable[EditConfig]) -> dict[object, EditConfig]:
    """Return one of the settings for each kind of contexts."""
    return {_kind(one): one for one in edits}


def configured(
    lm: LanguageModel,
    methods: Iterable[str],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    paper: bool = False,
) -> dict[str, Any]:
    """Return `config` for `editors`: recommended settings with some values changed.

    Methods of which nothing is changed are left out.

    Args:
        lm: The model.
        methods: The methods.
        changes: {method: {setting: value}}, the layers among them, as "layers".
        paper: Start from the settings published for a model of this shape; only methods that edit
            in closed form have some.

    Raises:
        InputError: There is no such method, setting or value, or nothing was published.
        LayerError: What names the layers is not layer numbers.
    """
    names = [_OTHER_NAMES.get(name, name) for name in methods]
    by_name = _by_name(changes or {}, names, "settings for")
    if paper and all(name in _TUNED or is_own(name) for name in names):
        raise InputError(
            f"no settings were published for {', '.join(names)}; leave paper out", argument="paper"
        )
    configs: dict[str, Any] = {}
    for name in names:
        values = dict(by_name.get(name, {}))
        if is_own(name):
            _check_no_settings(name, values)
            continue
        if name in _TUNED:
            if values:
                configs[name] = _tuned_config(name, values)
            continue
        layers = values.pop("layers", values.pop("layer", None))
        if values or layers is not None or paper:
            recipe = Recipe(name, layers=layers, paper=paper, changes=values)
            configs[name] = recipe.config_for(lm, ())
    return configs


def check_methods(
    methods: Iterable[str], changes: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Check the methods and the settings of `configured`, before there is a model.

    Raises:
        InputError: There is no such method, setting or value.
        LayerError: What names the layers is not layer numbers.
    """
    names = _checked_names(methods)
    for name, changed in _by_name(changes or {}, names, "settings for").items():
        values = dict(changed)
        if is_own(name):
            _check_no_settings(name, values)
        elif name in _TUNED:
            _tuned_config(name, values)
        else:
            layers = values.pop("layers", values.pop("layer", None))
            check_settings(name, layers, values)


def _checked_names(methods: Iterable[str]) -> list[str]:
    """The methods' names; raises InputError unless there is at least one, each known and once."""
    expected = f"some of {', '.join(NAMES)}, or your own as module:function"
    names = [_OTHER_NAMES.get(name, name) for name in check_items(methods, "methods", expected)]
    if not names or len(set(names)) < len(names):
        raise InputError(f"methods are {names}; name at least one, each once", argument="methods")
    if unknown := [name for name in names if name not in NAMES and not is_own(name)]:
        raise InputError(f"no method {unknown[0]!r}; expected {expected}", argument="methods")
    for name in filter(is_own, names):
        function_of(name)
    return names


def _check_no_settings(name: str, values: Mapping[str, Any]) -> None:
    """Raise an InputError if there are settings for a method of one's own."""
    if values:
        raise InputError(
            f"{name} is a function of your own, so it has no setting {', '.join(values)}; "
            "leave them out"
        )


def _by_name(given: Mapping[str, _T], names: Sequence[str], what: str) -> dict[str, _T]:
    """What was given for each method; raises InputError for a method that is not among them."""
    by_name = {_OTHER_NAMES.get(name, name): value for name, value in given.items()}
    if stray := sorted(set(by_name) - set(names)):
        raise InputError(f"{what} {', '.join(stray)}; the methods are {', '.join(names)}")
    return by_name


def _tuned_config(name: str, values: Mapping[str, Any]) -> TuneConfig:
    """The settings of FT-L or LoRA with some values changed."""
    kind = _TUNED[name][1]
    known = sorted(field.name for field in dataclasses.fields(kind))
    if unknown := sorted(set(values) - set(known)):
        raise InputError(
            f"{name} has no setting {', '.join(unknown)}; expected some of {', '.join(known)}"
        )
    layers = values.get("layers")
    return kind(**{**values, **({"layers": (layers,)} if isinstance(layers, int) else {})})


def _settings(lm: LanguageModel, name: str, given: Any) -> EditConfig | TuneConfig:
    """A method's settings, with the layers filled in."""
    if name not in _TUNED:
        return _edit_config(lm, name, given)
    kind = _TUNED[name][1]
    if given is not None and not isinstance(given, kind):
        raise InputError(f"{name} takes a {kind.__name__}; got {type(given).__name__}")
    tuned: TuneConfig = given or kind()
    if tuned.layers is not None:
        return tuned
    spread = _edit_config(lm, "memit", None).edited or ()
    return dataclasses.replace(tuned, layers=spread[:1] if kind is FineTuneConfig else spread)


def _edit_config(lm: LanguageModel, name: str, given: Any) -> EditConfig:
    config = Recipe(name, given).config_for(lm, ())
    return config.at(choose_layers(Scratch(lm), config, Sources()).layers)


def _described(config: EditConfig | TuneConfig, seed: int) -> str:
    """Settings in words: "steps=40; layers=3,4,5; seed=0"."""
    names = [field.name for field in dataclasses.fields(config)]
    values = {name: getattr(config, name) for name in names} | {"seed": seed}
    return "; ".join(
        f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
    )


@dataclass(frozen=True)
class _Named:
    """What the editors have in common."""

    writer: _Writer
    name: str

    def apart(self) -> Self:
        """Return an editor that makes each edit as if it were the first."""
        return dataclasses.replace(self, writer=self.writer.apart)


@dataclass(frozen=True)
class _EditingEditor(_Named):
    """A method that edits in closed form."""

    config: EditConfig
    moments: Moments
    contexts: list[str]
    seed: int

    @property
    def description(self) -> str:
        """Its settings: a run is only continued by an editor with the same ones."""
        return _described(self.config, self.seed)

    def __call__(self, facts: Sequence[Fact]) -> AbstractContextManager[dict[str, float]]:
        return self.writer.block(lambda: self._solve(facts))

    def _solve(self, facts: Sequence[Fact]) -> Delta:
        return edit(
            self.writer.lm,
            facts,
            self.name,
            self.config,
            moments=self.moments,
            contexts=self.contexts,
            seed=self.seed,
            beneath=tuple(self.writer.deltas),
            targets=self.writer.targets(facts, self.config, self.contexts),
        )


@dataclass(frozen=True)
class _TuningEditor(_Named):
    """A method that trains: what editing is compared with."""

    config: TuneConfig
    seed: int

    @property
    def description(self) -> str:
        """Its settings: a run is only continued by an editor with the same ones."""
        return _described(self.config, self.seed)

    def __call__(self, facts: Sequence[Fact]) -> AbstractContextManager[dict[str, float]]:
        train, lm = _TUNED[self.name][0], self.writer.lm
        return self.writer.block(lambda: train(lm, facts, self.config, seed=self.seed))


@dataclass(frozen=True)
class _OwnEditor(_Named):
    """A method of one's own."""

    function: OwnMethod

    @property
    def description(self) -> str:
        """Its settings in words, if the function says them."""
        return description_of(self.function)

    @contextmanager
    def __call__(self, facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        began = time.perf_counter()
        result = self.function(self.writer.lm, list(facts))
        if isinstance(result, AbstractContextManager):
            with result as notes:
                seconds = {"seconds": time.perf_counter() - began}
                yield seconds | finite_numbers(notes)
            return
        if not isinstance(result, (Delta, Mapping)):
            raise NotAnEditorError(
                f"{self.name} returned a {type(result).__name__}; it must return a Delta, "
                "{layer: new down-projection}, or a `with` block"
            )
        change = result if isinstance(result, Delta) else dict(result)
        seconds = {"seconds": time.perf_counter() - began}
        with self.writer.block(lambda: change) as notes:
            yield notes | seconds


_KEPT = 1000
"""Facts whose targets are kept for other methods: in a model of 14,000 neurons a layer, some 100 KB
each.
"""


class _KeptTarget(NamedTuple):
    """The target of one fact: its row in the targets of a search, and its part of the seconds."""

    targets: Targets
    row: int
    seconds: float


def _is_one_search(kept: Sequence[_KeptTarget | None]) -> bool:
    """Return whether targets are all those of one search, in its order."""
    first = kept[0]
    if first is None or len(kept) != len(first.targets.facts):
        return False
    return all(
        one is not None and one.targets is first.targets and one.row == row
        for row, one in enumerate(kept)
    )


class _Writer:
    """What the open blocks have written into a model, and the targets that methods share.

    Attributes:
        lm: The model.
        whole: Whether targets are shared only by edits of the same facts. Then the numbers of an
            edit do not depend on the edits before it: targets that are searched together with
            others differ in their last bits.
        deltas: Those of the open blocks, outermost first.
    """

    def __init__(self, lm: LanguageModel, whole: bool = False) -> None:
        self.lm, self.whole = lm, whole
        self.deltas: list[Delta] = []
        self._base: dict[int, Tensor] = {}  # of each layer that an open block changed
        self._open = 0
        self._targets: dict[Any, _KeptTarget] = {}
        self._reused = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the targets out: another process searches its own."""
        return _Writer, (self.lm, self.whole)

    @cached_property
    def apart(self) -> _Writer:
        """A writer for edits in any order."""
        return _Writer(self.lm, whole=True)

    def targets(
        self, facts: Sequence[Fact], config: EditConfig, contexts: Sequence[str]
    ) -> Targets | None:
        """Targets of these facts on the model as it is: each searched once, and kept.

        A batch finds those that other batches and methods have searched. A `whole` writer finds
        those of the very same batch. None where they cannot be shared: inside a block, and for
        several facts of ROME.
        """
        single = not config.together
        repeated = len({fact.text for fact in facts}) < len(facts)
        if self._open or not config.edited or repeated or (single and len(facts) != 1):
            return None
        layer = config.edited[-1]
        search = tuple(getattr(config, field.name) for field in dataclasses.fields(TargetConfig))
        place = (layer, config.site, search, tuple(contexts))
        keys = [(fact.text, fact.subject, fact.target, *place) for fact in facts]
        kept = {key: self._targets[key] for key in keys if key in self._targets}
        if self.whole and not _is_one_search([kept.get(key) for key in keys]):
            kept = {}
        missing = [i for i, key in enumerate(keys) if key not in kept]
        self._reused = sum(one.seconds for one in kept.values())
        if missing:
            began = time.perf_counter()
            searched = find_targets(
                self.lm, [facts[i] for i in missing], layer, config, contexts, site=config.site
            )
            seconds = (time.perf_counter() - began) / len(missing)
            for row, i in enumerate(missing):
                kept[keys[i]] = _KeptTarget(searched, row, seconds)
            self._keep(kept)
        return Targets.gathered([(kept[key].targets, kept[key].row) for key in keys])

    def _keep(self, targets: Mapping[Any, _KeptTarget]) -> None:
        """Keep targets for later edits; the oldest go where there are too many."""
        self._targets.update(targets)
        while len(self._targets) > max(_KEPT, len(targets)):
            del self._targets[next(iter(self._targets))]

    @contextmanager
    def block(self, solve: Callable[[], _Change]) -> Iterator[dict[str, float]]:
        """Solve on the model as it is, and put the result in."""
        began, self._reused = time.perf_counter(), 0.0
        change = solve()
        seconds = time.perf_counter() - began + self._reused
        layers = list(change.touched if isinstance(change, Delta) else change)
        with ExitStack() as stack:
            unseen = [layer for layer in layers if layer not in self._base]
            self._base.update(read_weights(self.lm, unseen))
            self._open += 1
            stack.callback(self._close)
            if isinstance(change, Delta):
                stack.enter_context(applied(self.lm, change))
                self.deltas.append(change)
                stack.callback(self.deltas.remove, change)
            else:
                stack.enter_context(written(self.lm, change))
            yield {"seconds": seconds, "norm": self._largest_norm()}

    def _largest_norm(self) -> float:
        """The largest ‖ΔW‖/‖W‖ of a layer that the open blocks changed. Rows are not counted."""
        now = read_weights(self.lm, self._base)
        return max(
            relative_norm(now[layer].float() - base.float(), base)
            for layer, base in self._base.items()
        )

    def _close(self) -> None:
        self._open -= 1
        if not self._open:
            self._base.clear()
