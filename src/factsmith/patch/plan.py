"""What an edit would have to do: what the model says now, what the facts meet, and which layers
would be edited.

    decided = plan(bench, facts, Recipe("memit"))
    decided.new, decided.conflicts, decided.layers

The plan decides the method, its settings and the layers, once. Whatever follows, `propose` above
all, is bound to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import InputError
from ..core.fact import Fact, listed
from ..core.gap import gap_notes
from ..core.gates import Gates
from ..core.progress import Progress, Tally, stage, tell
from ..core.tables import Shown, Table, counted
from ..corpus.moments import SecondMoment
from ..corpus.scan import Site
from ..edit.configs import EditConfig, SpreadConfig, by_depth
from ..edit.questions import with_gaps
from ..model.address import check_dense, check_dense_layer
from ..model.answers import first_phrase, is_answered, probabilities, say
from ..model.language_model import LanguageModel, joined_notes
from ..model.subject import fact_span
from ..model.turns import asking
from .appending_layer import appending_layer
from .bench import Bench
from .complete import complete
from .conflicts import Standing, compare_facts
from .layer_choice import LayerChoice
from .outlook import Outlook, appended_bytes, outlook, update_bytes
from .recipe import Recipe, Sources


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the model says about one fact today.

    Attributes:
        fact: The fact. One to be forgotten has what the model says now as its target_true, unless
            that was given.
        answer: The model's greedy answer to the prompt.
        probability: p(target); p(target_true) for a fact to be forgotten.
        known: Whether nothing needs to be written: the model says the target, or does not say what
            is to be forgotten.
        standing: How the fact relates to the others, as in `conflicts.Place`.
        because: For a change or a conflict, the other fact.
        crowding: Share of its key that the keys of earlier patches explain. Near 1, what is written
            for this fact can hardly avoid the others. None: not measured.
    """

    fact: Fact
    answer: str
    probability: float
    known: bool
    standing: Standing = "new"
    because: str = ""
    crowding: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Shown):
    """What an edit would have to do; nothing was changed to find out.

    Attributes:
        entries: The facts.
        method: The method that would write them.
        layers: The layers it would edit.
        n_bytes: The size of the patch. None: nobody asked.
        seconds: About how long it would take. None: nobody asked.
        notes: What could not be told beforehand, in words.
        advice: What the caller should know about the prompts and the layers, in words.
        made: Remarks on paraphrases and neighbours that were made.
        config: The method's settings, with the layers filled in.
        choice: How the layers were chosen. None: the caller named them, or gave second moments of
            them.
        outlook: What each method would do with the new facts, and which one is recommended.
    """

    entries: tuple[Planned, ...]
    method: str = ""
    layers: tuple[int, ...] = ()
    n_bytes: int | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    config: EditConfig | None = field(default=None, compare=False)
    choice: LayerChoice | None = field(default=None, compare=False)
    outlook: Outlook = field(default_factory=Outlook, compare=False)

    @property
    def recommended(self) -> str:
        """The method that suits these facts best; "" where there is nothing to write."""
        return self.outlook.recommended

    @property
    def draws_on(self) -> Site:
        """Of what the method needs second moments."""
        return "coefficients" if self.config is None else self.config.draws_on

    @property
    def facts(self) -> list[Fact]:
        """All facts of the plan."""
        return [entry.fact for entry in self.entries]

    @property
    def conflicts(self) -> tuple[Planned, ...]:
        """The facts that contradict others; they are not written unless forced."""
        return tuple(entry for entry in self.entries if entry.standing == "conflict")

    @property
    def contradictions(self) -> tuple[str, ...]:
        """The same facts in words, each with what it contradicts."""
        return tuple(f"{entry.fact}: {entry.because}" for entry in self.conflicts)

    @property
    def new(self) -> tuple[Fact, ...]:
        """The facts that the model does not say yet."""
        return tuple(entry.fact for entry in self.entries if not entry.known)

    @property
    def known(self) -> tuple[Fact, ...]:
        """The facts that the model already says."""
        return tuple(entry.fact for entry in self.entries if entry.known)

    def to_write(self, *, force: bool = False) -> tuple[Fact, ...]:
        """The facts to write: the new ones, or with `force` all of them."""
        return tuple(entry.fact for entry in self.entries) if force else self.new

    def tables(self) -> list[Table]:
        """What the model says about each fact now, and what the facts contradict."""
        columns = {"": "<", "prompt": "<", "answer": "<", "target": "<", "p": ">", "crowding": ">"}
        rows = [
            (
                entry.standing,
                entry.fact.text,
                entry.answer,
                entry.fact.target or "(to be forgotten)",
                f"{entry.probability:.3f}",
                "" if entry.crowding is None else f"{entry.crowding:.0%}",
            )
            for entry in self.entries
        ]
        crowded = any(entry.crowding is not None for entry in self.entries)
        legend = (
            ["crowding: share of a fact's key that the keys of earlier patches explain"]
            if crowded
            else []
        )
        tables = [
            Table(self._title, columns, rows, "; ".join([*legend, *self.notes, *self.advice]))
        ]
        if reasons := [(e.standing, str(e.fact), e.because) for e in self.entries if e.because]:
            tables.append(Table("what they meet", {"": "<", "fact": "<", "why": "<"}, reasons))
        return [*tables, *([self.outlook.table()] if self.recommended else [])]

    @property
    def _title(self) -> str:
        title = f"{counted(len(self.new), 'fact')} to write, {len(self.known)} known"
        if n_forgotten := sum(fact.forget for fact in self.new):
            title = (
                f"{counted(len(self.new) - n_forgotten, 'fact')} to write, "
                f"{n_forgotten} to be forgotten, {len(self.known)} known"
            )
        if self.method and self.layers:
            size = f", about {self.n_bytes:,} bytes" if self.n_bytes is not None else ""
            duration = f" and {max(self.seconds, 1):.0f} s" if self.seconds is not None else ""
            title += f"; {self.method}, layer {', '.join(map(str, self.layers))}{size}{duration}"
        return title

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "entries": [{**vars(entry), "fact": entry.fact.to_dict()} for entry in self.entries],
            "method": self.method,
            "layers": list(self.layers),
            "n_bytes": self.n_bytes,
            "seconds": self.seconds,
            "notes": [*self.notes, *self.advice],
            "recommended": self.recommended,
            "outlook": self.outlook.to_dict(),
        }


@asking(grad=True, changes=True)
def plan(
    bench: Bench,
    facts: Fact | Iterable[Fact],
    recipe: Recipe | None = None,
    sources: Sources | None = None,
    *,
    gates: Gates | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Ask what the model says about each fact, compare the facts, and decide the method, its
    settings and the layers.

    Args:
        bench: The model and what it carries; it is as before when this returns.
        facts: The facts to write.
        recipe: The method and its settings. None: the recommended ones.
        sources: What the edit may draw on. Second moments that are given decide the layers where
            the recipe does not.
        gates: What the patch will have to pass. Facts without paraphrases or neighbours then get
            some (`complete`), so that the gates have something to ask.
        force: Plan also for facts that the model already says, or that contradict others.
        progress: Called with the step's name, how much is done, and how much there is.

    Raises:
        InputError: No facts, an unknown method or setting, or a fact to forget of which the model
            says nothing.
        SubjectError: A subject has no token.
        LayerError: The model does not have a layer.
        UnsupportedModelError: Every layer, or a named one, is a mixture of experts.
        FingerprintError: The second moments are another model's.
    """
    recipe, sources = recipe or Recipe(), sources or Sources()
    lm = bench.lm
    check_dense(lm.ffn)
    _check_moments(bench, sources.moments)
    facts, made = list(dict.fromkeys(listed(facts))), tuple[str, ...]()
    stage(progress, "planning")
    if gates is not None:
        tell(progress, "looking for paraphrases and neighbours", 0, None)
        written = [fact for delta in bench.beneath for fact in delta.facts]
        facts, made = complete(lm, facts, written, sources.seed)
    config = recipe.config_for(lm, facts)
    for layer in config.edited or ():
        check_dense_layer(layer, lm.ffn)
    entries = _compared(bench, _ask(lm, facts, progress), (), {})
    chosen = choose_layers(bench, config, sources, measure=True, progress=progress)
    with bench.on_base():
        moments = bench.kept_moments(chosen.layers, config.draws_on)
        # How near keys are to one another is measured in the space of coefficients.
        crowding = moments if config.draws_on == "coefficients" else {}
        entries = _compared(bench, entries, chosen.layers, crowding)
    notes = [] if set(moments) == set(chosen.layers) else [_NO_MOMENTS[config.draws_on]]
    n_new = sum(not entry.known for entry in entries)
    patch_bytes = appended_bytes if config.draws_on == "inputs" else update_bytes
    return Plan(
        entries=tuple(entries),
        method=recipe.method_for(facts),
        layers=chosen.layers,
        n_bytes=patch_bytes(lm, chosen.layers, n_new),
        notes=(*_first_choice(chosen), *notes),
        advice=(
            *gap_notes(_asked(facts)),
            *_unclear_gaps(lm, entries),
            *_joined(lm, entries),
            *chosen.advice,
        ),
        made=made,
        config=config.at(chosen.layers),
        choice=chosen.choice,
        outlook=outlook(lm, bench.beneath, n_new, _layers_by_method(bench, config, chosen)),
    )


def _layers_by_method(
    bench: Bench, config: EditConfig, chosen: Chosen
) -> dict[str, tuple[int, ...]]:
    """Return the layers that each of the methods of an outlook would edit."""
    layers = {}
    for method in ("rome", "memit", "append"):
        other = Recipe(method).config_for(bench.lm, ())
        if type(other) is type(config):
            layers[method] = chosen.layers
        elif chosen.choice is None:  # the layer was named: the kept choice is not read
            layers[method] = type(other).recommended(bench.lm).edited or ()
        else:
            layers[method] = choose_layers(bench, other, Sources()).layers
    return layers


_NO_MOMENTS = {
    "coefficients": "the second moments are not kept yet, so only equal keys were noticed. The "
    "first patch computes them; `factsmith moments` does it now",
    "inputs": "the statistics of what enters the layer are not kept yet. The first patch computes "
    "them; `factsmith moments --inputs` does it now",
}


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Layers to edit, and how they were chosen.

    Attributes:
        layers: The layers.
        choice: Where they come from. None: they were named, or are those of given second moments.
        advice: What the caller should know about them, in words.
    """

    layers: tuple[int, ...]
    choice: LayerChoice | None = None
    advice: tuple[str, ...] = ()


def choose_layers(
    bench: Bench,
    config: EditConfig,
    sources: Sources,
    *,
    measure: bool = False,
    progress: Progress | None = None,
) -> Chosen:
    """Choose the layers to edit; this is the one rule.

    Named layers go first. Then come the layers that are known for the model, and those of the given
    second moments. A first choice without trial edits comes last. The layer of appended neurons is
    one of MEMIT's (`appending_layer`).

    Args:
        bench: The model, and what is known of it.
        config: The method's settings.
        sources: What the edit may draw on.
        measure: Whether the layer of appended neurons may be measured, if none is known.
        progress: Called with the step's name, how much is done, and how much there is.
    """
    if config.edited is not None:
        return Chosen(layers=config.edited)
    if config.draws_on == "inputs":
        if isinstance(sources.moments, Mapping) and len(sources.moments) == 1:
            return Chosen(layers=tuple(sources.moments))
        known = bench.known_layers() or bench.first_layers()
        layer = appending_layer(bench, known, sources, progress, measure=measure)
        return Chosen(layers=(layer,), choice=known)
    choice = bench.known_layers()
    layers = None if choice is None else layers_for(bench.lm, config, choice)
    if isinstance(sources.moments, Mapping) and not (
        layers and set(layers) <= set(sources.moments)
    ):
        given = _layers_of_moments(bench.lm, config, sources.moments, layers)
        if given is not None:
            return given
    if choice is not None and layers is not None:
        return Chosen(layers=layers, choice=choice)
    choice = bench.first_layers()
    return Chosen(layers=layers_for(bench.lm, config, choice), choice=choice)


def _first_choice(chosen: Chosen) -> list[str]:
    """Return a note if the layers are a first choice."""
    if chosen.choice is None or chosen.choice.source != "depth":
        return []
    return [f"no layer was given, and none is known: the layers are {chosen.choice.reason}"]


def layers_for(lm: LanguageModel, config: EditConfig, choice: LayerChoice) -> tuple[int, ...]:
    """Return the layers of a choice that a method with these settings edits."""
    if isinstance(config, SpreadConfig):
        return choice.memit or by_depth(lm.n_layers)
    return (choice.rome,)


def _layers_of_moments(
    lm: LanguageModel,
    config: EditConfig,
    moments: Mapping[int, SecondMoment],
    known: Sequence[int] | None,
) -> Chosen | None:
    """The layers to edit where second moments are given that lack some of the known layers; None:
    they do not decide.

    Those by depth where nothing better is known and all of them have moments. Otherwise all that
    have moments, if the method can edit so many.
    """
    better = known or type(config).recommended(lm).edited or ()
    if known is None and set(better) <= set(moments):
        return Chosen(layers=tuple(better))
    if len(moments) > 1 and not isinstance(config, SpreadConfig):
        return None
    with_moments = tuple(sorted(moments))
    edited, recommended = (", ".join(map(str, layers)) for layers in (with_moments, better))
    return Chosen(
        layers=with_moments,
        advice=(
            "no layer was named, and the given second moments lack the recommended layer "
            f"{recommended}: layer {edited} is edited, "
            "because its second moment is at hand. Name layers, or compute the second moments of "
            "the recommended ones",
        ),
    )


def _ask(lm: LanguageModel, facts: Sequence[Fact], progress: Progress | None) -> list[Planned]:
    """What the model says about each fact now."""
    for fact in facts:
        fact_span(lm, fact)
    prompts = [fact.text for fact in facts]
    targets = [fact.target or fact.target_true or "" for fact in facts]
    to_name = [fact.target is None and fact.target_true is None for fact in facts]
    report = Tally(progress, "planning", len(facts)).part(len(facts))
    said = say(lm, prompts, targets, whole=to_name, progress=report)
    answers = [answer.text for answer in said]
    facts = [_to_forget(fact, answer) for fact, answer in zip(facts, answers, strict=True)]
    facts = with_gaps(lm, facts)
    targets = [fact.target or fact.target_true or "" for fact in facts]
    entries = []
    for fact, target, answer, p in zip(
        facts,
        targets,
        answers,
        probabilities(lm, prompts, targets, [fact.gap for fact in facts]),
        strict=True,
    ):
        known = is_answered(lm, fact.text, answer, target) == (fact.target is not None)
        entries.append(Planned(fact=fact, answer=answer, probability=p or 0.0, known=known))
    return entries


def _asked(facts: Sequence[Fact]) -> Iterator[str]:
    """Yield all prompts of some facts, as they were written."""
    for fact in facts:
        yield from (fact.prompt, *fact.paraphrases, *(probe.prompt for probe in fact.neighbours))


def _unclear_gaps(lm: LanguageModel, entries: Sequence[Planned]) -> list[str]:
    """Return a warning if the model does not show how a target follows its prompt."""
    unclear = [
        entry.fact
        for entry in entries
        if (entry.fact.text, (entry.fact.target or "").strip()) in lm.gap_choices.unclear
    ]
    if not unclear:
        return []
    first = unclear[0]
    how = "with a space" if first.gap == "space" else "without a space"
    more = f" So it is for {counted(len(unclear), 'fact')}." if len(unclear) > 1 else ""
    return [
        f"the model does not show whether an answer follows {first.text!r} with a space or without "
        f"one. {str(first.target).strip()!r} is written {how}; the fact's field gap changes "
        f"that.{more}"
    ]


def _joined(lm: LanguageModel, entries: Sequence[Planned]) -> tuple[str, ...]:
    """Return a warning if the model expects a target in one token with its prompt's end."""
    facts = [entry.fact for entry in entries if (entry.fact.target or "").strip()]
    prompts, targets = [fact.text for fact in facts], [str(fact.target) for fact in facts]
    return joined_notes(lm, prompts, targets, [fact.gap for fact in facts])


def _compared(
    bench: Bench,
    entries: Sequence[Planned],
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
) -> list[Planned]:
    """The entries with their places among the others."""
    facts, known = [entry.fact for entry in entries], [entry.known for entry in entries]
    places = compare_facts(bench.lm, facts, bench.facts_in_effect, layers, moments, known)
    return [
        dataclasses.replace(entry, **vars(place))
        for entry, place in zip(entries, places, strict=True)
    ]


def _to_forget(fact: Fact, answer: str) -> Fact:
    """The fact itself; one without a target gets what the model says now as target_true, unless
    that was given.
    """
    if fact.target is not None or fact.target_true is not None:
        return fact
    said = first_phrase(answer)
    if not said:
        raise InputError(
            f"the model says nothing after {fact.text!r}, so there is nothing to forget; give "
            "target_true to name it"
        )
    return Fact.from_dict({**fact.to_dict(), "target_true": said})


def _check_moments(bench: Bench, moments: SecondMoment | Mapping[int, SecondMoment] | None) -> None:
    """Raise FingerprintError unless given second moments are of the base weights: before any work
    is done.
    """
    by_layer = moments.items() if isinstance(moments, Mapping) else ((None, moments),)
    for layer, moment in by_layer:
        if isinstance(moment, SecondMoment):
            moment.check(bench.lm, layer, base=bench.base_fingerprint)
