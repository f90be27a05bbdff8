"""The editors as the runner takes them: each a function of facts that returns a block inside which
the model carries them.

    found = evaluate(lm, records, editors(lm, ["rome", "memit", "ft-l"]), size=1)
    with editors(lm, ["memit"])["memit"](facts) as notes:
        lm.answer([facts[0].text]), notes["seconds"], notes["norm"]

Second moments and contexts are found once, on the model as it is, and shared. Blocks may be nested,
as a sequence of edits does: an editor knows what the blocks around it wrote, and MEMIT's family
keeps its keys.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, overload

import torch

from ..core.checks import check_items, check_seed
from ..core.errors import InputError
from ..core.fact import Fact
from ..core.progress import Progress
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import find_moments
from ..edit.configs import EditConfig, RomeConfig, SpreadConfig, shipped
from ..edit.contexts import generate_contexts, generate_openings
from ..edit.delta import Delta, applied, read_weights, written
from ..edit.finetune import FineTuneConfig, LoraConfig, TuneConfig, fine_tune, lora
from ..edit.keys import Site
from ..edit.methods import METHODS, edit, find_method
from ..edit.search import find_targets
from ..edit.settings import changed_settings
from ..edit.target import TargetConfig, Targets
from ..judge.editor import Editor
from ..judge.metrics import relative_norm
from ..model.language_model import LanguageModel, check_model
from .layer_choice import published

_TUNED: dict[str, tuple[Callable[..., dict[int, torch.Tensor]], type[TuneConfig]]] = {
    "ft-l": (fine_tune, FineTuneConfig),
    "lora": (lora, LoraConfig),
}

_OTHER_NAMES = {"ft": "ft-l"}

NAMES = (*METHODS, *_TUNED)
"""Every method that `editors` knows."""


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
    """Editors by name, for `evaluate`.

    methods  some of rome, r-rome, memit, emmet, alphaedit, ft-l (or ft), lora
    config   {method: its settings}: RomeConfig, MemitConfig ..., FineTuneConfig, LoraConfig; what
    is not there: those recommended, at the
             layers that came with the model or were published for it, else at a share of its depth;
             FT-L takes the lowest of MEMIT's, LoRA all
    moments  {layer: SecondMoment} of the edited layers; None: those kept with the model, else
    computed from `texts` (None: the model's own) folder   where computed ones are kept, and looked
    for seed     of contexts, of computed text, and of what training shuffles

    Methods that search the same targets share them: those of facts that are written into the model
    as it is are found once, and kept for the methods that come after (the time it took is counted
    for each).

    A block gives {"seconds": what solving took, "norm": the largest ‖ΔW‖/‖W‖ of a layer, with the
    blocks around it}. It changes the model by down-projections only and puts the very bits of
    before back, also when it is left by an exception. Raises InputError for a method or settings
    that are none, and what the methods raise.
    """
    check_model(lm)
    seed = check_seed(seed)
    named = [
        _OTHER_NAMES.get(name, name)
        for name in check_items(methods, "methods", f"some of {', '.join(NAMES)}")
    ]
    if not named or len(set(named)) < len(named):
        raise InputError(f"methods are {named}; expected at least one, each once")
    if unknown := [name for name in named if name not in NAMES]:
        raise InputError(f"no method {unknown[0]!r}; expected some of {', '.join(NAMES)}")
    given = {_OTHER_NAMES.get(name, name): value for name, value in (config or {}).items()}
    if stray := sorted(set(given) - set(named)):
        raise InputError(
            f"config has settings for {', '.join(stray)}; the methods are {', '.join(named)}"
        )
    settings = {name: _settings(lm, name, given.get(name)) for name in named}
    layers = sorted(
        {
            layer
            for own in settings.values()
            if isinstance(own, EditConfig)
            for layer in own.edited or ()
        }
    )
    if layers and moments is None:
        moments = find_moments(lm, layers, folder=folder, texts=texts, seed=seed, progress=progress)
    contexts = {
        kind: generate(lm, seed)
        if any(isinstance(own, kind) for own in settings.values())
        else None
        for kind, generate in ((RomeConfig, generate_contexts), (SpreadConfig, generate_openings))
    }
    writer = _Writer(lm)

    def of(name: str) -> Editor:
        own = settings[name]
        if isinstance(own, TuneConfig):
            train = _TUNED[name][0]
            return _MethodEditor(
                writer, lambda facts: train(lm, facts, own, seed=seed), _told(own, seed)
            )
        find_method(name, own)
        texts_around = contexts[SpreadConfig if isinstance(own, SpreadConfig) else RomeConfig]
        assert texts_around is not None

        def solved(facts: Sequence[Fact]) -> Delta:
            targets = writer.targets(facts, own, texts_around)
            return edit(
                lm,
                facts,
                name,
                own,
                moments=moments,
                contexts=texts_around,
                seed=seed,
                beneath=tuple(writer.deltas),
                targets=targets,
            )

        return _MethodEditor(writer, solved, _told(own, seed))

    return {name: of(name) for name in named}


_KEPT = 1000
"""Facts whose targets are kept for other methods: in a model of 14,000 neurons a layer, some 100 KB
each.
"""


def configured(
    lm: LanguageModel,
    methods: Iterable[str],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    paper: bool = False,
) -> dict[str, Any]:
    """`config` for `editors`: recommended settings with some values changed, {method: {name:
    value}}; layers among them, as "layers".

    paper: those published for a model of this shape instead, of the methods that edit in closed
    form. Methods of which nothing is changed are left out. Raises InputError for a method, a
    setting or a value that is none, or where nothing was published; LayerError.
    """
    named = [_OTHER_NAMES.get(name, name) for name in methods]
    changed = {
        _OTHER_NAMES.get(name, name): dict(values) for name, values in (changes or {}).items()
    }
    if stray := sorted(set(changed) - set(named)):
        raise InputError(f"settings for {', '.join(stray)}; the methods are {', '.join(named)}")
    if paper and all(name in _TUNED for name in named):
        raise InputError(f"no settings were published for {', '.join(named)}; leave paper out")
    found: dict[str, Any] = {}
    for name in named:
        own = changed.get(name, {})
        if name not in _TUNED:
            layers = own.pop("layers", own.pop("layer", None))
            if own or layers is not None or paper:
                found[name] = changed_settings(lm, name, layers, own, paper=paper)
        elif own:
            kind = _TUNED[name][1]
            known = sorted(field.name for field in dataclasses.fields(kind))
            if unknown := sorted(set(own) - set(known)):
                raise InputError(
                    f"{name} has no setting {', '.join(unknown)}; expected some of "
                    f"{', '.join(known)}"
                )
            if isinstance(own.get("layers"), int):
                own["layers"] = (own["layers"],)
            found[name] = kind(**own)
    return found


@dataclasses.dataclass(frozen=True)
class _MethodEditor:
    """An editor that says what its settings are."""

    writer: _Writer
    solve: Callable[[Sequence[Fact]], Delta | dict[int, torch.Tensor]]
    description: str

    def __call__(self, facts: Sequence[Fact]) -> AbstractContextManager[dict[str, float]]:
        return self.writer.block(lambda: self.solve(facts))


class _Writer:
    """What has been written into a model by the blocks that are open."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.deltas: list[Delta] = []
        self._base: dict[
            int, torch.Tensor
        ] = {}  # of each layer that an open block changed, as it was before the first
        self._open = 0
        self._found: dict[
            Any, tuple[Targets, float]
        ] = {}  # targets, and the seconds that they took
        self._reused = 0.0

    def targets(
        self, facts: Sequence[Fact], config: EditConfig, contexts: Sequence[str]
    ) -> Targets | None:
        """What was found before for these facts on the model as it is, or is found now; None inside
        of a block, and for ROME's many.
        """
        single = not isinstance(config, SpreadConfig)
        if (
            self._open
            or not config.edited
            or (single and len(facts) != 1)
            or len({fact.text for fact in facts}) < len(facts)
        ):
            return None
        site: Site = "ffn" if single else "stream"
        layer = config.edited[-1]
        search = tuple(getattr(config, field.name) for field in dataclasses.fields(TargetConfig))
        key = (
            tuple((fact.text, fact.subject, fact.target) for fact in facts),
            layer,
            site,
            search,
            tuple(contexts),
        )
        if key in self._found:
            self._reused = self._found[key][1]
        else:
            while sum(len(held.facts) for held, _ in self._found.values()) >= _KEPT:
                del self._found[next(iter(self._found))]
            began = time.perf_counter()
            found = find_targets(self.lm, facts, layer, config, contexts, site=site)
            self._found[key] = (found, time.perf_counter() - began)
        return self._found[key][0]

    @contextmanager
    def block(
        self, solve: Callable[[], Delta | dict[int, torch.Tensor]]
    ) -> Iterator[dict[str, float]]:
        """Solve on the model as it is, and put the result in."""
        began, self._reused = time.perf_counter(), 0.0
        found = solve()
        seconds = time.perf_counter() - began + self._reused
        layers = list(found.layers if isinstance(found, Delta) else found)
        with ExitStack() as stack:
            for layer, weight in read_weights(
                self.lm, [layer for layer in layers if layer not in self._base]
            ).items():
                self._base[layer] = weight
            self._open += 1
            stack.callback(self._close)
            stack.enter_context(
                applied(self.lm, found) if isinstance(found, Delta) else written(self.lm, found)
            )
            if isinstance(found, Delta):
                self.deltas.append(found)
                stack.callback(self.deltas.remove, found)
            now = read_weights(self.lm, self._base)
            yield {
                "seconds": seconds,
                "norm": max(
                    relative_norm(now[x].float() - w.float(), w) for x, w in self._base.items()
                ),
            }

    def _close(self) -> None:
        self._open -= 1
        if not self._open:
            self._base.clear()


def _told(config: EditConfig | TuneConfig, seed: int) -> str:
    """Settings in words, as `--set` takes them: "steps=40; layers=3,4,5; seed=0"."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {
        "seed": seed
    }
    return "; ".join(
        f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
    )


@overload
def _settings(lm: LanguageModel, name: Literal["memit"], given: None) -> EditConfig: ...


@overload
def _settings(lm: LanguageModel, name: str, given: Any) -> EditConfig | TuneConfig: ...


def _settings(lm: LanguageModel, name: str, given: Any) -> EditConfig | TuneConfig:
    """A method's settings, with the layers filled in."""
    if name in _TUNED:
        kind = _TUNED[name][1]
        if given is not None and not isinstance(given, kind):
            raise InputError(f"{name} takes a {kind.__name__}; got {type(given).__name__}")
        own: TuneConfig = given or kind()
        spread = _settings(lm, "memit", None).edited if own.layers is None else None
        return (
            own
            if spread is None
            else dataclasses.replace(own, layers=spread[:1] if kind is FineTuneConfig else spread)
        )
    wanted = find_method(name, given).config
    settings: EditConfig = given or wanted.recommended(lm)
    if given is not None and given.edited:
        return settings
    choice = published(lm, shipped(RomeConfig, lm).get("layer"))
    if choice is not None and choice.source == "preset":
        return settings.at(choice.memit if isinstance(settings, SpreadConfig) else (choice.rome,))
    return settings.at(wanted.recommended(lm).edited or ())
