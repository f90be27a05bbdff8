"""Workbench: a model, its ledger, and the only object that changes both.

    with Workbench(load("gpt2"), "my-workspace") as bench:       # the folder is made if it is not a workspace yet
        outcome = bench.apply([Fact("Danielle Darrieux", "The mother tongue of {} is", "English")])
        outcome.verification.efficacy, outcome.revision.id
        bench.revert(outcome.revision.id)                         # the weights are the base's again, bit for bit

The steps of `apply` can be taken one by one, and without a workspace: `plan` asks what the model says now, `propose` solves for the
change and measures it while it is in the model for a moment, `commit` keeps it.

The model's weights are always base + Σ active deltas in ledger order, built anew from the kept base matrices. Nothing is subtracted:
W + Δ − Δ is not W in floating point.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .edit.contexts import generate_contexts
from .edit.delta import Delta, applied, patched, read_weights, write_weights
from .edit.kept import find_moments, kept_moments, moments_digest, moments_file, own_corpus
from .edit.methods import MemitConfig, RomeConfig, SpreadConfig, editor, rome_each, shipped
from .edit.methods import by_depth as by_depth_several
from .edit.moments import SecondMoment, enough_tokens
from .edit.presets import published as published_settings
from .edit.solve import disturbance
from .edit.target import check_layer
from .errors import DamagedError, FingerprintError, InputError, WorkspaceError
from .fact import Fact, Probe, listed
from .files import write_file
from .judge.drift import Drift, drift
from .ledger import BASE, Ledger, Revision, Status
from .locate.layers import (
    MIN_FACTS,
    LayerChoice,
    LayerScore,
    Trial,
    by_depth,
    candidates,
    choose,
    judge,
    mlp_effects,
    published,
    race,
    trace_window,
    trial_facts,
)
from .model.load import LanguageModel, bundled, check_model
from .model.tokens import subject_span
from .progress import Progress, tell
from .tables import Shown, Table, counted
from .verify import Verification, answer_tokens, as_said, begins_with, first_phrase, probabilities, verify

T = TypeVar("T")

_EARLIER = 100
"""Earlier facts asked again with every new patch: the newest ones; `Workbench.verify` asks all."""

_TRIALS = 24
"""Trial edits at the layers that stay in the race to the end; `benchmarks/layers.py` measures what they are worth."""
_MOMENT_BYTES = 4 * 2**30
"""Second moments of several layers are held together up to so much memory; beyond it they are computed anew for each round of trials."""

_LAYERS_FORMAT = 1

_BROKEN = 0.25
"""Change of a layer's output on ordinary text from which a warning is given. One fact on the atlas model changes it by 4 %, three in three
layers by 12 % at most; forced to 12 % one fact's target spills over to other subjects, at 42 % to other questions."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the model says about one fact today: its greedy `answer` to the prompt, p(target), and whether it says the target already.

    Of a fact to be forgotten: p(target_true), and whether the model does not say it.
    """

    fact: Fact
    answer: str
    probability: float
    known: bool


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Shown):
    """What an edit would have to do; nothing was changed to find out."""

    entries: tuple[Planned, ...]

    @property
    def new(self) -> tuple[Fact, ...]:
        """The facts that the model does not say yet."""
        return tuple(entry.fact for entry in self.entries if not entry.known)

    @property
    def known(self) -> tuple[Fact, ...]:
        """The facts that it says already."""
        return tuple(entry.fact for entry in self.entries if entry.known)

    def tables(self) -> list[Table]:
        """What the model says about each fact now."""
        rows = [
            (e.fact.text, e.answer, e.fact.target or "(forget)", f"{e.probability:.3f}", "known" if e.known else "new")
            for e in self.entries
        ]
        title = f"{counted(len(self.new), 'fact')} to write, {len(self.known)} known"
        return [Table(title, {"prompt": "<", "answer": "<", "target": "<", "p": ">", "": "<"}, rows)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {"entries": [{**vars(entry), "fact": entry.fact.to_dict()} for entry in self.entries]}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Proposal(Shown):
    """A change that was solved for and measured, and is in no model.

    plan          what the model said before
    delta         the change; None when every fact was known already
    verification  its proof; None when there is no delta
    layers        how the layer was chosen; None when the caller named it, or there is no delta
    moments       sha256 of the second moments used, by layer
    seconds       time to solve (second moments not counted) and to verify
    disturbance   for each edited layer, how much its output changes on ordinary text (`solve.disturbance`): 0.05 is 5 %
    """

    plan: Plan
    delta: Delta | None
    verification: Verification | None
    moments: str | None
    seconds: Mapping[str, float]
    layers: LayerChoice | None = None
    disturbance: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def tables(self) -> list[Table]:
        """What was solved for, and its proof; where there was nothing to write, the plan."""
        warnings = [Table(warning, {}) for warning in self.warnings]
        if self.delta is None or self.verification is None:
            return [*self.plan.tables(), *warnings]
        return [Table(repr(self.delta), {}), *self.verification.tables(), *warnings]

    @property
    def failed(self) -> bool:
        """Whether some fact, written now or earlier, would not be answered with its target."""
        return self.verification is not None and any(c.role in ("prompt", "earlier") and not c.held for c in self.verification.checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know, in words."""
        written = () if self.delta is None else self.delta.facts
        known = tuple(
            f"the model does not say {fact.target_true!r} after {fact.text!r}: nothing to forget (force it to write anyway)"
            if fact.target is None
            else f"the model already answers {fact.text!r} with {fact.target.strip()!r}: nothing to write (force it to write anyway)"
            for fact in self.plan.known
            if fact not in written
        )
        measured = (
            (f"no layer was given: layer {', '.join(map(str, sorted(self.delta.layers)))} is {self.layers.reason}",)
            if self.layers is not None and self.delta is not None and self.layers.source in ("trials", "depth")
            else ()
        )
        checks = () if self.verification is None else self.verification.checks
        failed = tuple(
            f"{'the patch did not take' if check.role == 'prompt' else 'an earlier patch no longer holds'}: "
            f"{check.prompt!r} is {'still ' if check.forget else ''}answered {check.after!r}"
            f"{'' if check.forget else f', not {check.wanted!r}'}"
            for check in checks
            if check.role in ("prompt", "earlier") and not check.held
        )
        broken = tuple(
            f"on ordinary text the output of layer {layer} changes by {share:.0%}, so the model may be broken: fewer facts at a time, a "
            "larger ridge (moment_weight, ridge, l2) or a smaller clamp change it less"
            for layer, share in self.disturbance.items()
            if share >= _BROKEN
        )
        return known + measured + self._shared_keys + broken + failed

    @property
    def _shared_keys(self) -> tuple[str, ...]:
        """That facts with different targets have nearly one key, with the closest two as an example."""
        records = () if self.delta is None else self.delta.convergence
        pairs = [(record["cosine"], i, record["shares_key_with"]) for i, record in enumerate(records) if "shares_key_with" in record]
        if not pairs or self.delta is None:
            return ()
        cosine, a, b = max(pairs)
        return (
            f"{len(pairs)} facts have nearly the key of another with another target, so that what is written for one arrives at the other "
            f"too: {self.delta.facts[a].text!r} and {self.delta.facts[b].text!r}, cosine {cosine:.3f}; see whether both took, or begin the "
            "prompts with words of their own",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; the delta's tensors are left out."""
        delta = self.delta
        described = delta and {"method": delta.method, "layers": sorted(delta.layers), "rank": delta.rank, "bytes": delta.n_bytes}
        return {
            "plan": self.plan.to_dict(),
            "delta": described,
            "verification": self.verification and self.verification.to_dict(),
            "moments": self.moments,
            "layers": self.layers and {"rome": self.layers.rome, "source": self.layers.source, "reason": self.layers.reason},
            "disturbance": {str(layer): share for layer, share in self.disturbance.items()},
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Outcome(Shown):
    """What `Workbench.apply` did: the proposal, and the revision that keeps it (None: nothing was to be written, see `warnings`)."""

    proposal: Proposal
    revision: Revision | None

    @property
    def delta(self) -> Delta | None:
        """The change, or None."""
        return self.proposal.delta

    @property
    def verification(self) -> Verification | None:
        """Its proof, or None."""
        return self.proposal.verification

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know, in words."""
        return self.proposal.warnings

    def tables(self) -> list[Table]:
        """The proposal's, under what became of it."""
        kept = "nothing was written" if self.revision is None else f"committed as {self.revision.id[:10]}"
        return [Table(kept, {}), *self.proposal.tables()]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {"proposal": self.proposal.to_dict(), "revision": self.revision and self.revision.to_dict()}


def plan(lm: LanguageModel, facts: Fact | Iterable[Fact]) -> Plan:
    """Ask what the model says about each fact now; the model is untouched.

    Raises SubjectError when a subject cannot be found once in its prompt, InputError when there is no fact.
    """
    facts = listed(facts)
    for fact in facts:
        subject_span(lm.tokenizer, fact.text, fact.subject)
    prompts = [fact.text for fact in facts]
    answers = lm.answer(prompts, max_new_tokens=answer_tokens(lm, prompts, [fact.target or fact.target_true or "" for fact in facts]))
    facts = [_to_forget(fact, answer) if fact.target is None else fact for fact, answer in zip(facts, answers, strict=True)]
    asked = [fact.target or fact.target_true or "" for fact in facts]
    return Plan(
        entries=tuple(
            Planned(fact=fact, answer=answer, probability=probability or 0.0, known=begins_with(answer, said) == (fact.target is not None))
            for fact, answer, said, probability in zip(facts, answers, asked, probabilities(lm, prompts, asked), strict=True)
        )
    )


def _to_forget(fact: Fact, answer: str) -> Fact:
    """A fact without a target, with what the model says now as what is to be forgotten, unless that was given."""
    if fact.target_true is not None:
        return fact
    said = first_phrase(answer)
    if not said:
        raise InputError(f"the model says nothing after {fact.text!r}, so there is nothing to forget; give target_true to name it")
    return Fact.from_dict({**fact.to_dict(), "target_true": said})


def propose(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    method: str = "rome",
    config: Any = None,
    *,
    moments: SecondMoment | Mapping[int, SecondMoment] | None = None,
    texts: Iterable[str] | None = None,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    force: bool = False,
    earlier: Iterable[Fact] = (),
    progress: Progress | None = None,
) -> Proposal:
    """Solve for a change that makes the facts true, and measure it; the model is as before when this returns, exception or not.

    method    "rome", "r-rome", "memit", "emmet" or "alphaedit"
    config    its settings; None: what the model recommends. Without layers: what came with the model, else what was published for it, else
              what `recommend_layers` measures now, which takes a while and is said in `Proposal.warnings`
    moments   second moments of the layers; None: what came with the model, else computed from `texts`, else from the model's own text
    contexts  templates with `{}` for the prompt; None: generated by the model from `seed`
    force     write also what the model says already
    earlier   facts whose prompts are asked again, to see that they hold

    Raises InputError (unknown method, no facts), SubjectError, LayerError, NumericsError.
    """

    def find(layers: Sequence[int]) -> Mapping[int, SecondMoment]:
        return find_moments(lm, layers, texts=texts, seed=seed, progress=progress)

    def layers() -> LayerChoice:
        nonlocal texts
        known = _published(lm)
        if known is not None:
            return known
        texts = None if texts is None else list(texts)  # read twice now
        return recommend_layers(lm, texts=texts, contexts=contexts, seed=seed, progress=progress)

    def changed(delta: Delta) -> AbstractContextManager[None]:
        return applied(lm, delta)

    return _propose(lm, facts, method, config, layers, moments or find, changed, contexts, seed, force, earlier, (), progress)


def settings(
    lm: LanguageModel,
    method: str,
    layers: Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    paper: bool = False,
) -> Any:
    """A method's recommended settings with some layers or values changed; None when nothing is.

    paper: change those published for a model of this shape instead, whose layers they bring. Else layers that are not given stay open, for
    `propose` to choose. Raises InputError for an unknown method or setting, or where nothing was published; LayerError.
    """
    _, kind = editor(method)
    if not layers and not changes and not paper:
        return None
    places = {"layer", "layers"} & {field.name for field in dataclasses.fields(kind)}
    known = {field.name for field in dataclasses.fields(kind)} - places
    if unknown := sorted(set(changes or {}) - known):
        where = "; layers are not set but named: --layer" if {"layer", "layers"} & set(unknown) else ""
        raise InputError(f"{method} has no setting {', '.join(unknown)}; expected some of {', '.join(sorted(known))}{where}")
    values: dict[str, Any] = {**({} if paper else dict.fromkeys(places)), **(changes or {})}
    config = dataclasses.replace(published_settings(lm, method)[0] if paper else kind.recommended(lm), **values)
    return config.at(layers) if layers else config


def recommend_layers(
    lm: LanguageModel,
    facts: Iterable[Fact] | None = None,
    *,
    trials: int | None = None,
    texts: Iterable[str] | None = None,
    contexts: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerChoice:
    """The layers to edit, measured: an average causal trace, then trial edits of real facts at the promising layers, each taken back.

    facts     edits to try, with paraphrases and neighbours to judge them by; None: `trials` facts of the bundled table that the model knows
    trials    edits at the layers that stay in the race to the end, 24 if None; a quarter or half as many (six at least) at those far behind
    texts     what to compute second moments from; None: what came with the model, else text that it writes itself
    contexts  templates with `{}` for the prompt; None: generated by the model
    seed      of the facts, the contexts and the text

    The other settings of the edits are those recommended for the model. A model that knows too few bundled facts gets a fixed share of its
    depth, and `source` and `reason` say so. The model is as before when this returns, exception or not. Raises InputError (fewer than one
    trial, facts that cannot be asked), SubjectError, UnsupportedModelError (no dense layer), NumericsError.
    """
    return _recommend(lm, facts, trials, None if texts is None else list(texts), contexts, seed, None, progress)


def create(lm: LanguageModel, folder: str | os.PathLike[str]) -> Ledger:
    """Make a workspace for a model; its ledger, open. Raises WorkspaceError when the folder is one already, or cannot be written."""
    # A path is kept whole, so that the workspace finds its model from anywhere.
    name = str(Path(lm.name).resolve()) if lm.name not in bundled() and Path(lm.name).is_dir() else lm.name
    return Ledger.create(folder, model=name, fingerprint=lm.fingerprint, dtype=str(lm.dtype).removeprefix("torch."))


class Workbench:
    """A model and the workspace that records its patches; a context manager that leaves the model at its base weights.

    lm      the model; while the workbench is open its weights are base + Σ active deltas
    ledger  the records

    Opening makes the workspace when the folder is none yet, and puts the active deltas into the model. Raises FingerprintError when the
    workspace was made for another model, DamagedError when a delta is not whole.
    """

    def __init__(self, lm: LanguageModel, folder: str | os.PathLike[str]) -> None:
        self.lm = lm
        if (Path(folder) / "ledger.db").is_file():
            self.ledger = Ledger(folder)
        else:
            self.ledger = create(lm, folder)
        self._base: dict[int, Tensor] = {}
        self._deltas: dict[str, Delta] = {}
        self._at = BASE
        self._carried = lm.fingerprint
        try:
            if lm.fingerprint != self.ledger.fingerprint:
                raise FingerprintError(
                    f"{folder} was made for {self.ledger.model!r} in {self.ledger.dtype}, fingerprint {self.ledger.fingerprint[:10]}; "
                    f"got {lm.name!r} in {str(lm.dtype).removeprefix('torch.')} with {lm.fingerprint[:10]}: load that model, unpatched "
                    "(close another workbench that holds it), or make a workspace for this one"
                )
            self.checkout(self.ledger.current)
        except BaseException:
            self.ledger.close()
            raise

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the base weights back, bit for bit, and close the ledger; the records stay as they are."""
        self._put([])
        self._deltas = {}
        self.ledger.close()

    # ---- reading ----------------------------------------------------------------------------------------------------------------------

    def plan(self, facts: Fact | Iterable[Fact]) -> Plan:
        """Ask what the model, with its active patches, says about each fact; nothing changes. Raises as the function `plan`."""
        return plan(self.lm, facts)

    def log(self) -> list[Revision]:
        """Every revision, newest first."""
        return self.ledger.log()

    def show(self, reference: str) -> Revision:
        """The revision with this id, unique prefix, or "latest"; raises RevisionError."""
        return self.ledger.show(reference)

    def status(self) -> Status:
        """Where the workspace stands, after checking every record and every delta's sha256; raises DamagedError."""
        return self.ledger.status()

    def verify(self) -> Verification:
        """Ask every active patch's prompt, paraphrases and neighbours of the base weights and of the weights now.

        Where two patches have the same prompt, only the newer one's is asked.
        """
        facts: dict[str, Fact] = {}
        for delta in self._deltas.values():
            for fact in delta.facts:
                facts.pop(fact.text, None)
                facts[fact.text] = fact
        with self._carrying([]):
            return verify(self.lm, list(facts.values()), lambda: self._carrying(self._deltas.values()))

    def drift(self, **options: Any) -> Drift:
        """What the patches that the model carries change of everything else, against the model without them; options as of `drift`.

        Raises InputError when it carries none.
        """
        deltas = list(self._deltas.values())
        if not deltas:
            raise InputError("the workspace carries no patch, so nothing can have drifted; see `factsmith log`")
        subjects = [fact.subject for delta in deltas for fact in delta.facts]
        with self._carrying(()):
            return drift(self.lm, lambda: applied(self.lm, deltas), without=subjects, **options)

    def propose(
        self,
        facts: Fact | Iterable[Fact],
        method: str = "rome",
        config: Any = None,
        *,
        moments: SecondMoment | Mapping[int, SecondMoment] | None = None,
        texts: Iterable[str] | None = None,
        contexts: Sequence[str] | None = None,
        seed: int = 0,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Proposal:
        """Solve for a change on top of the active ones, and measure it; the arguments are those of the function `propose`.

        Second moments and a recommended layer are those of the base weights, kept in the workspace once computed; a kept layer goes before
        what came with the model. The newest 100 earlier facts are asked again. Raises DamagedError when what is kept cannot be read.
        """
        self._check_weights()

        for layer, moment in moments.items() if isinstance(moments, Mapping) else ((None, moments),):
            if moment is not None:
                moment.check(self.lm, layer, base=self.ledger.fingerprint)

        def find(layers: Sequence[int]) -> Mapping[int, SecondMoment]:
            return self.find_moments(layers, texts=texts, seed=seed, progress=progress)

        def layers() -> LayerChoice:
            nonlocal texts
            known = self._kept_layers() or _published(self.lm)
            if known is not None:
                return known
            texts = None if texts is None else list(texts)  # read twice now
            return self.recommend_layers(texts=texts, contexts=contexts, seed=seed, progress=progress)

        earlier = [fact for delta in self._deltas.values() for fact in delta.facts][-_EARLIER:]

        def changed(delta: Delta) -> AbstractContextManager[None]:
            return self._carrying([*self._deltas.values(), delta])

        state = tuple(self._deltas.values())
        return _propose(self.lm, facts, method, config, layers, moments or find, changed, contexts, seed, force, earlier, state, progress)

    def find_moments(
        self, layers: Sequence[int], *, folder: str | os.PathLike[str] | None = None, **options: Any
    ) -> dict[int, SecondMoment]:
        """Second moments of the base weights, kept in the workspace unless `folder` says where; arguments and errors as of the function."""
        self._check_weights()
        with self._carrying([]):
            return find_moments(self.lm, layers, folder=folder or self.ledger.folder / "moments", **options)

    def recommend_layers(
        self,
        facts: Iterable[Fact] | None = None,
        *,
        trials: int | None = None,
        texts: Iterable[str] | None = None,
        contexts: Sequence[str] | None = None,
        seed: int = 0,
        refresh: bool = False,
        progress: Progress | None = None,
    ) -> LayerChoice:
        """The layers to edit, measured on the base weights and kept in the workspace as layers.json; arguments as of the function.

        What is kept is returned when nothing else is asked for: no `facts`, no other number of `trials`, no `refresh`. Raises DamagedError
        when it cannot be read, WorkspaceError when the new one cannot be written, and what the function raises.
        """
        self._check_weights()
        kept = None if refresh or facts is not None else self._kept_layers()
        if kept is not None and trials in (None, kept.trials):
            return kept
        with self._carrying([]):
            words = None if texts is None else list(texts)
            folder = self.ledger.folder / "moments"
            choice = _recommend(self.lm, facts, trials, words, contexts, seed, folder, progress)
        if choice.source == "trials":  # that a model knows too little is quickly found out again
            text = json.dumps({"format": _LAYERS_FORMAT, **choice.to_dict()}, ensure_ascii=False, indent=1) + "\n"
            try:
                write_file(self._layers_file, text.encode())
            except OSError as error:
                raise WorkspaceError(f"cannot write {self._layers_file}: {error.strerror}; make the workspace writable") from None
        return choice

    # ---- changing ---------------------------------------------------------------------------------------------------------------------

    def apply(
        self,
        facts: Fact | Iterable[Fact],
        method: str = "rome",
        config: Any = None,
        *,
        moments: SecondMoment | Mapping[int, SecondMoment] | None = None,
        texts: Iterable[str] | None = None,
        contexts: Sequence[str] | None = None,
        seed: int = 0,
        force: bool = False,
        message: str = "",
        progress: Progress | None = None,
    ) -> Outcome:
        """Plan, solve, verify and commit: afterwards the model says the facts and the ledger knows why.

        What the model says already is left out, and a patch that did not take, or breaks an earlier one, is not kept (unless `force`); then
        nothing is written and `warnings` says why. The other
        arguments are those of the function `propose`. An exception or Ctrl-C leaves model and ledger as they were. Raises what `propose`
        and `commit` raise.
        """
        self.ledger.expect(self._at)  # before the work, not after it
        proposal = self.propose(
            facts, method, config, moments=moments, texts=texts, contexts=contexts, seed=seed, force=force, progress=progress
        )
        if proposal.delta is None or (proposal.failed and not force):
            return Outcome(proposal=proposal, revision=None)
        revision = self.commit(proposal.delta, proposal.verification, moments=proposal.moments, message=message)
        return Outcome(proposal=proposal, revision=revision)

    def commit(
        self,
        delta: Delta,
        report: Verification | Mapping[str, Any] | None = None,
        *,
        moments: str | None = None,
        message: str = "",
    ) -> Revision:
        """Keep a delta: into the ledger and into the model, or into neither.

        report   its evaluation, kept with the record
        moments  sha256 of the second moments it was made with

        Raises FingerprintError when the delta was made on other weights than the model has now, WorkspaceError when the workspace cannot
        be written, has moved on, or an older revision is checked out.
        """
        self._check_weights()
        if delta.fingerprint != self.lm.fingerprint:
            raise FingerprintError(
                f"the delta was made on weights {delta.fingerprint[:10]}, the model has {self.lm.fingerprint[:10]}: make it again on "
                "this model with the patches it carries now"
            )

        def record() -> Revision:
            return self.ledger.commit(
                delta.save,
                onto=self._at,
                method=delta.method,
                config=delta.config,
                facts=delta.facts,
                layers=sorted(delta.layers),
                moments=moments,
                report=report.to_dict() if isinstance(report, Verification) else report,
                message=message,
            )

        return self._move([*self._deltas.values(), delta], record)

    def revert(self, reference: str, *, message: str = "") -> Revision:
        """Take a patch out: weights = base + Σ of the others, and a revision that says so.

        Raises RevisionError when there is no such patch in effect or later ones were solved on top of it, DamagedError, WorkspaceError.
        """
        self._check_weights()
        target = self.ledger.show(reference)
        remaining = [delta for identity, delta in self._deltas.items() if identity != target.id]
        return self._move(remaining, lambda: self.ledger.revert(target.id, onto=self._at, message=message))

    def checkout(self, reference: str) -> str:
        """Give the model the weights of a revision ("base", "latest", or an id); returns its full id. The same revision, the same bits.

        History does not change; committing goes on from the latest revision only. Raises RevisionError, DamagedError, WorkspaceError.
        """
        identity = self.ledger.resolve(reference)
        deltas = {}
        for revision in self.ledger.active(identity):
            known = self._deltas.get(revision.id)
            deltas[revision.id] = Delta.load(self.ledger.delta_folder(revision)) if known is None else known
        if identity == self.ledger.current:
            self._put(deltas.values())  # opening a workspace writes nothing to it
            self._moved(deltas.values(), self.lm.fingerprint)
        else:
            self._move(deltas.values(), lambda: self.ledger.checkout(identity))
        return identity

    # ---- inside -----------------------------------------------------------------------------------------------------------------------

    @property
    def _layers_file(self) -> Path:
        return self.ledger.folder / "layers.json"

    def _kept_layers(self) -> LayerChoice | None:
        """What the workspace keeps for this model; None when there is nothing, or it is another model's."""
        if not self._layers_file.is_file():
            return None
        try:
            fields = json.loads(self._layers_file.read_text(encoding="utf-8"))
            if fields.pop("format", None) != _LAYERS_FORMAT:
                raise InputError(f"it is not of format {_LAYERS_FORMAT}")
            choice = LayerChoice.from_dict(fields)
            if choice.fingerprint == self.ledger.fingerprint and max(choice.rome, *choice.memit) >= self.lm.n_layers:
                raise InputError(f"it names layers that the model does not have ({self.lm.n_layers})")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(
                f"{self._layers_file} cannot be used: {error}; delete it, and the layers are measured anew when they are needed"
            ) from None
        if choice.fingerprint != self.ledger.fingerprint:
            return None
        return dataclasses.replace(choice, source="workspace", reason=f"kept in the workspace: {choice.reason}")

    def _move(self, deltas: Collection[Delta], record: Callable[[], T]) -> T:
        """Put deltas into the model and note it in the ledger, in the ledger's order; if either fails, the model goes back.

        The weights come first: they are checked for shape and finite numbers before anything is recorded. An interruption that comes
        when the record is made already leaves both moved: history is not taken back.
        """
        started, carried = self.ledger.current, None
        try:
            self._put(deltas)
            carried = self.lm.fingerprint  # takes a while: before the record, so that an interruption then undoes everything
            noted = record()
        except BaseException as error:
            if carried is not None and not isinstance(error, Exception) and self.ledger.current != started:
                self._moved(deltas, carried)
            else:
                self._put(self._deltas.values())
            raise
        self._moved(deltas, carried)
        return noted

    def _moved(self, deltas: Collection[Delta], carried: str) -> None:
        """Take over what was recorded: the model carries `deltas`, those of the checked-out revision, and has the fingerprint `carried`."""
        at = self.ledger.current
        self._deltas = dict(zip((revision.id for revision in self.ledger.active(at)), deltas, strict=True))
        self._at, self._carried = at, carried

    def _put(self, deltas: Collection[Delta]) -> None:
        layers = {layer for delta in deltas for layer in delta.layers}
        # A layer that was never patched still has its base weights: they are copied before its first change.
        self._base.update(read_weights(self.lm, layers - self._base.keys()))
        write_weights(self.lm, patched(self._base, deltas))

    def _check_weights(self) -> None:
        if self.lm.fingerprint != self._carried:
            raise FingerprintError(
                "the model's weights were changed outside the workbench, so what would be recorded is not what was made; "
                "load the model again and open the workspace with it"
            )

    @contextmanager
    def _carrying(self, deltas: Collection[Delta]) -> Iterator[None]:
        """Base + Σ some deltas for the length of a block; the very weights that committing them would give."""
        try:
            self._put(deltas)
            yield
        finally:
            self._put(self._deltas.values())


@torch.enable_grad()  # solvers need it, and a Ctrl-C inside a `no_grad` can leave it off: this sets it back
def _propose(
    lm: LanguageModel,
    facts: Fact | Iterable[Fact],
    method: str,
    config: Any,
    layers: Callable[[], LayerChoice],
    moments: SecondMoment | Mapping[int, SecondMoment] | Callable[[Sequence[int]], Mapping[int, SecondMoment]],
    changed: Callable[[Delta], AbstractContextManager[None]],
    contexts: Sequence[str] | None,
    seed: int,
    force: bool,
    earlier: Iterable[Fact],
    state: Sequence[Delta],
    progress: Progress | None,
) -> Proposal:
    """`propose`; `layers`, and `moments` where it is a function of the layers, are called only when needed; `changed` puts a delta in.

    state: the deltas that the model carries.
    """
    solver, kind = editor(method, config)
    _check_dense(lm)
    found = plan(lm, facts)
    wanted = [entry.fact for entry in found.entries if force or not entry.known]
    if not wanted:
        return Proposal(plan=found, delta=None, verification=None, moments=None, seconds={})
    several = issubclass(kind, SpreadConfig)
    places, choice = None if config is None else config.edited, None
    if places is None and isinstance(moments, Mapping) and (several or len(moments) == 1):
        places = tuple(moments)  # who brings the second moments of some layers means those layers
    if places is None:
        choice = layers()
        places = (choice.memit or by_depth_several(lm.n_layers)) if several else (choice.rome,)
    config = (config or kind.recommended(lm)).at(places)
    for layer in places:
        check_layer(lm, layer)
    if callable(moments):
        moments = moments(places)
    started = time.perf_counter()
    tell(progress, "solving", 0, None)
    delta = solver(
        lm,
        wanted,
        config,
        moments=moments,
        contexts=contexts,
        seed=seed,
        earlier=state,
        progress=progress,
    )
    solved = time.perf_counter()
    held = {places[0]: moments} if isinstance(moments, SecondMoment) else moments
    tell(progress, "verifying", 0, None)
    verification = verify(lm, wanted, lambda: changed(delta), earlier=earlier)
    return Proposal(
        plan=found,
        delta=delta,
        verification=verification,
        moments=moments_digest(moments, places),
        layers=choice,
        seconds={"solve": solved - started, "verify": time.perf_counter() - solved},
        disturbance={
            layer: disturbance(*factors, lm.ffn[layer].weight(), held[layer].matrix) for layer, factors in sorted(delta.layers.items())
        },
    )


def _check_dense(lm: LanguageModel) -> None:
    """Raises UnsupportedModelError when every layer is a mixture of experts: then there is nothing to edit, and no work need be done."""
    check_layer(lm, next((ffn.layer for ffn in lm.ffn if not ffn.n_experts), 0))


def _published(lm: LanguageModel) -> LayerChoice | None:
    """What came with the model, or was published for one of its shape."""
    choice, memit = published(lm, shipped(RomeConfig, lm).get("layer")), shipped(MemitConfig, lm).get("layers")
    return dataclasses.replace(choice, memit=tuple(memit)) if choice is not None and memit else choice


def _recommend(
    lm: LanguageModel,
    facts: Iterable[Fact] | None,
    count: int | None,
    texts: Sequence[str] | None,
    contexts: Sequence[str] | None,
    seed: int,
    folder: Path | None,
    progress: Progress | None,
) -> LayerChoice:
    """`recommend_layers`; second moments are looked for in `folder` too, and those computed for the chosen layer are kept there."""
    check_model(lm)
    count = _TRIALS if count is None else count
    if count < 1:
        raise InputError(f"trials is {count}; expected at least one trial edit")
    _check_dense(lm)
    config = RomeConfig.recommended(lm)
    depth = config.layer or 0
    if facts is None:
        tell(progress, "looking for facts that the model knows", 0, None)
        tried = trial_facts(lm, count, seed=seed)
        if len(tried) < min(MIN_FACTS, count):
            return by_depth(lm, depth, f"{lm.name} knows {len(tried)} of the bundled facts that were asked, too few to try edits on")
    else:
        tried = _settled(lm, listed(facts))
    effects = mlp_effects(lm, tried, progress=lambda done, total: tell(progress, "tracing", done, total))
    layers = candidates(lm, effects)
    contexts = generate_contexts(lm, seed) if contexts is None else contexts
    own_words = texts is None
    held: dict[int, SecondMoment] = {}
    computed: dict[int, SecondMoment] = {}
    at_once = max(1, _MOMENT_BYTES // (3 * 8 * max(lm.ffn[layer].d_ff for layer in layers) ** 2))  # sum, matrix and factor, in float64

    def hold(group: Sequence[int]) -> None:
        """Second moments of the layers of a group, from where they are."""
        nonlocal texts
        for layer in set(held) - set(group) if len(layers) > at_once else ():
            del held[layer]
        if own_words:
            held.update(kept_moments(lm, [layer for layer in group if layer not in held], folder))
        if missing := [layer for layer in group if layer not in held]:
            texts = own_corpus(lm, enough_tokens(lm, missing), seed, progress) if texts is None else texts
            new = find_moments(lm, missing, texts=texts, progress=progress)
            held.update(new)
            computed.update(new if len(layers) <= at_once else {})

    def try_edits(running: Sequence[int], which: range) -> dict[int, list[Trial]]:
        found: dict[int, list[Trial]] = {}
        own = [tried[i] for i in which]
        for at in range(0, len(running), at_once):
            group = running[at : at + at_once]
            hold(group)
            for layer in group:
                tell(progress, f"trial edits at layer {layer}", which.start, which.stop)
                deltas = rome_each(lm, own, dataclasses.replace(config, layer=layer), moments=held, contexts=contexts, seed=seed)
                found[layer] = []
                for fact, delta in zip(own, deltas, strict=True):
                    with applied(lm, delta):
                        found[layer].append(judge(lm, fact))
        return found

    trials = race(layers, len(tried), try_edits)
    scores = tuple(LayerScore.of(layer, some) for layer, some in trials.items())
    measured: dict[str, Any] = {
        "scores": scores,
        "effects": effects,
        "window": trace_window(lm.n_layers),
        "facts": tuple(tried),
        "seed": seed,
    }
    if not any(score.score for score in scores):
        why = f"{lm.name} took none of {len(tried)} trial edits at any of {len(layers)} layers"
        return dataclasses.replace(by_depth(lm, depth, why), **measured)
    rome_layer, memit_layers = choose(trials, effects)
    if folder is not None and rome_layer in computed:
        computed[rome_layer].save(moments_file(folder, rome_layer))
    n_trials, facts_tried = sum(score.trials for score in scores), "one fact" if len(tried) == 1 else f"{len(tried)} facts"
    reason = f"the best of {len(layers)} layers in {n_trials} trial edits of {facts_tried}"
    return LayerChoice(rome=rome_layer, memit=memit_layers, source="trials", reason=reason, fingerprint=lm.fingerprint, **measured)


def _settled(lm: LanguageModel, facts: Sequence[Fact]) -> list[Fact]:
    """Facts that the model does not say yet; neighbours expect what it says today, and a true target that it does not say is left out."""
    asked = sorted({fact.text for fact in facts} | {probe.prompt for fact in facts for probe in fact.neighbours})
    said = dict(zip(asked, lm.answer(asked), strict=True))
    settled = []
    for fact in facts:
        subject_span(lm.tokenizer, fact.text, fact.subject)
        if fact.target is None or begins_with(said[fact.text], fact.target):
            continue
        near = [probe for probe in fact.neighbours if first_phrase(said[probe.prompt])]
        near = [Probe(probe.prompt, as_said(said[probe.prompt], probe.expected)) for probe in near]
        true = fact.target_true if fact.target_true is not None and begins_with(said[fact.text], fact.target_true) else None
        settled.append(Fact.from_dict({**fact.to_dict(), "neighbours": near, "target_true": true}))
    if not settled:
        said_already = "the fact" if len(facts) == 1 else f"all {len(facts)} facts"
        raise InputError(f"the model says {said_already} already, so no edit could be tried; give targets that it does not say")
    return settled
