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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import atlas
from ..core.checks import check_count
from ..core.errors import (
    DamagedError,
    FingerprintError,
    InputError,
    NumericsError,
    RevisionError,
    WorkspaceError,
)
from ..core.fact import Fact, Gates, Probe, listed
from ..core.files import write_file
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import find_moments, kept_moments, moments_digest
from ..edit.configs import SpreadConfig, by_depth
from ..edit.contexts import CONTEXTS, OPENINGS, generate_contexts
from ..edit.delta import Delta, applied, patched, read_weights, write_weights
from ..edit.methods import find_method
from ..edit.resolve import resolve
from ..judge.drift import Drift, drift
from ..model.address import check_dense, check_dense_layer
from ..model.answers import begins_with, first_phrase
from ..model.language_model import LanguageModel
from ..patch.capacity import LIMIT, Capacity, capacity
from ..patch.capacity import warning as capacity_warning
from ..patch.complete import MADE, known_of
from ..patch.conflicts import relations, standing
from ..patch.gates import GateResult, check_gates, measures_drift
from ..patch.layer_choice import LayerChoice
from ..patch.layers import measure_layers, published_choice, quick_layers
from ..patch.plan import Plan, chosen_layers, plan
from ..patch.proof import Check, Verification, verify
from ..patch.proposal import Proposal, solve_and_prove
from .diff import Diff, FactChange, target_text
from .export.contents import Origin
from .export.folder import read_patch
from .export.formats import export
from .export.record import Export
from .ledger import BASE, LATEST, Ledger
from .outcome import Outcome
from .revision import Integrity, Revision, Status

T = TypeVar("T", Revision, str)

_EARLIER = 100
"""Earlier facts asked again with every new patch: the newest ones; `Workbench.verify` asks all."""

_LAYERS_FORMAT = 1


def create(lm: LanguageModel, folder: str | os.PathLike[str]) -> Ledger:
    """Make a workspace for a model; its ledger, open. Raises WorkspaceError when the folder is one already, or cannot be written."""
    # A path is kept whole, so that the workspace finds its model from anywhere.
    name = (
        str(Path(lm.name).resolve())
        if lm.name not in atlas.names() and Path(lm.name).is_dir()
        else lm.name
    )
    return Ledger.create(
        folder, model=name, fingerprint=lm.fingerprint, dtype=str(lm.dtype).removeprefix("torch.")
    )


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
        self._held: dict[str, str | None] = {}  # sha256 of each
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

    def plan(self, facts: Fact | Iterable[Fact], method: str = "rome", config: Any = None) -> Plan:
        """What writing these facts would meet and take: what the model says now, what the ledger has, how crowded their keys are.

        method, config  as of `propose`

        Nothing changes and little is computed: a forward pass or two, and second moments only where they are kept already (without them
        nothing is said of crowding and of shared keys). Raises as the function `plan`, InputError for an unknown method.
        """
        found = self._plan(facts, method, config)
        new = [entry.fact for entry in found.entries if not entry.known]
        return dataclasses.replace(
            found,
            seconds=self._seconds_for(
                new, method, config or find_method(method).config.recommended(self.lm)
            ),
        )

    def _plan(self, facts: Fact | Iterable[Fact], method: str, config: Any) -> Plan:
        """`plan`, but for the time."""
        self._check_weights()
        check_dense(self.lm.ffn)
        found = plan(self.lm, facts)
        kind = find_method(method, config).config
        places = None if config is None else config.edited
        config = config or kind.recommended(self.lm)
        notes = []
        if places is None:
            choice = self._known_layers()
            places = (
                (config.edited or ()) if choice is None else chosen_layers(self.lm, kind, choice)
            )
            if choice is None:
                notes.append(
                    "layers by depth: this model's are not known yet, and the first patch measures them, which takes minutes beside the "
                    "time above; `factsmith layers` does it now, `--layer` and `settings` name some"
                )
        for layer in places:
            check_dense_layer(layer, self.lm.ffn)
        with self._carrying([]):
            moments = kept_moments(self.lm, places, self.ledger.folder / "moments")
            known = [entry.known for entry in found.entries]
            met = standing(
                self.lm,
                [entry.fact for entry in found.entries],
                self._held_facts(),
                places,
                moments,
                known,
            )
        if set(moments) != set(places):
            notes.append(
                "second moments are not kept yet, so of keys only those that are the same were told; the first patch computes them, and "
                "`factsmith moments` does it now"
            )
        entries = tuple(
            dataclasses.replace(
                entry, standing=place.standing, because=place.because, crowding=place.crowding
            )
            for entry, place in zip(found.entries, met, strict=True)
        )
        n_new = sum(not entry.known for entry in entries)
        widths = [
            self.lm.d_model + 2 * self.lm.ffn[layer].d_ff for layer in places
        ]  # two factors, and the keys
        return dataclasses.replace(
            found,
            entries=entries,
            method=method,
            layers=tuple(places),
            n_bytes=4 * n_new * (sum(widths) + self.lm.d_model),
            notes=tuple(notes),
        )

    def _held_facts(self) -> list[tuple[str, Fact]]:
        """The facts in effect, each behind who has it, in words; of those with one prompt the newest."""
        held: dict[str, tuple[str, Fact]] = {}
        for revision in self.ledger.active(self._at):
            for fact in revision.in_effect:
                held.pop(fact.text, None)
                held[fact.text] = (f"{revision.id[:10]} has", fact)
        return list(held.values())

    def _seconds_for(self, facts: Sequence[Fact], method: str, config: Any) -> float:
        """About how long writing takes: a fact takes what it took in the newest patches of the method, else by how long a key took."""
        told = [
            (r.report["seconds"], len(r.facts))
            for r in self.ledger.log()
            if r.method == method and "seconds" in r.report
        ][:5]
        if told and all(isinstance(seconds, (int, float)) for seconds, _ in told):
            return len(facts) * sum(float(seconds) for seconds, _ in told) / sum(n for _, n in told)
        some = facts[:4]
        if not some:
            return 0.0
        # A step is a forward pass and a backward one of twice its work, in every context; most searches end at a third of their steps.
        contexts = (
            len(OPENINGS) + 1
            if isinstance(config, SpreadConfig)
            else 1 + sum(count for _, count in CONTEXTS)
        )
        asked = [
            (fact.text, fact.target or fact.target_true or "?")
            for fact in some
            for _ in range(contexts)
        ]
        self.lm.log_prob(
            [asked[0][0]], [asked[0][1]]
        )  # the first pass of a model takes longer than those after it
        began = time.perf_counter()
        self.lm.log_prob([text for text, _ in asked], [target for _, target in asked])
        return float(len(facts) * (time.perf_counter() - began) / len(some) * config.steps)

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
        with self._carrying([]):
            return verify(
                self.lm,
                _newest(self._deltas.values()),
                lambda: self._carrying(self._deltas.values()),
            )

    def diff(self, before: str, after: str = LATEST) -> Diff:
        """What is different between two revisions ("base", "latest", or ids): facts, the model's answers to their prompts, norms by layer.

        The model is as before when this returns. Raises RevisionError, DamagedError.
        """
        self._check_weights()
        sides = [self.ledger.resolve(reference) for reference in (before, after)]
        facts, deltas = [], []
        for side in sides:
            active = self.ledger.active(side)
            facts.append({fact.text: fact for revision in active for fact in revision.in_effect})
            deltas.append([self._delta_of(revision) for revision in active])
        texts = [
            text
            for text in dict.fromkeys([*facts[0], *facts[1]])
            if facts[0].get(text) != facts[1].get(text)
        ]
        answers, weights = [], []
        touched = sorted(
            {layer for carried in deltas for delta in carried for layer in delta.layers}
        )
        for carried in deltas:
            with self._carrying(carried):
                answers.append(
                    dict(zip(texts, self.lm.answer(texts), strict=True)) if texts else {}
                )
                weights.append(read_weights(self.lm, touched))
        with self._carrying([]):
            base = read_weights(self.lm, touched)
        moved = {
            layer: (weights[1][layer].double() - weights[0][layer].double()).norm()
            for layer in touched
        }
        norms = {layer: float(norm / base[layer].double().norm()) for layer, norm in moved.items()}
        return Diff(
            before=sides[0],
            after=sides[1],
            facts=tuple(
                FactChange(
                    prompt=text,
                    before=target_text(facts[0].get(text)),
                    after=target_text(facts[1].get(text)),
                    answer_before=answers[0][text],
                    answer_after=answers[1][text],
                )
                for text in texts
            ),
            norms={layer: norm for layer, norm in norms.items() if norm},
        )

    def _delta_of(self, revision: Revision) -> Delta:
        """What is carried for a patch, from memory where it is there."""
        if revision.carried is not None and revision.carried == self._held.get(revision.id):
            return self._deltas[revision.id]
        return Delta.load(self.ledger.delta_folder(revision))

    def rebuild(self) -> Integrity:
        """Check every record and file, then build the weights anew from the base and the files, and compare them with the model's.

        Raises DamagedError at the first fault, and when the weights are others than those the model carries; then these stay.
        """
        counted_up = self.ledger.verify()
        self._check_weights()
        fresh = [
            Delta.load(self.ledger.delta_folder(revision)) for revision in self.ledger.active()
        ]
        built = patched(self._base, fresh)
        now = read_weights(self.lm, built)
        if wrong := [
            layer for layer, weight in built.items() if not torch.equal(weight, now[layer])
        ]:
            raise DamagedError(
                f"the weights of layer {', '.join(map(str, wrong))} are not base + patches; open the workspace again"
            )
        return counted_up

    def drift(self, **options: Any) -> Drift:
        """What the patches that the model carries change of everything else, against the model without them; options as of `drift`.

        Raises InputError when it carries none.
        """
        deltas = list(self._deltas.values())
        if not deltas:
            raise InputError(
                "the workspace carries no patch, so nothing can have drifted; see `factsmith log`"
            )
        subjects = [fact.subject for delta in deltas for fact in delta.facts]
        with self._carrying(()):
            return drift(self.lm, lambda: applied(self.lm, deltas), without=subjects, **options)

    def capacity(
        self, next_facts: int = 0, *, limit: float = LIMIT, ask: bool = True, **options: Any
    ) -> Capacity:
        """How full the edited layers are, and what `next_facts` more will cost everything else.

        limit    per cent of unrelated facts answered otherwise that count as broken
        ask      ask the model which of the stored facts it still says
        options  where second moments come from, as of the function `find_moments`; they are kept in the workspace

        Raises InputError for a number out of range, and what `find_moments` raises.
        """
        self._check_weights()
        deltas = list(self._deltas.values())
        layers = sorted({layer for delta in deltas for layer in delta.layers})
        choice = None if layers else self._kept_layers() or published_choice(self.lm)
        free = (choice.memit if choice is not None else ()) or by_depth(self.lm.n_layers)
        checks = (
            [check for check in self.verify().checks if check.role == "prompt"]
            if ask and deltas
            else []
        )
        return capacity(
            deltas,
            self._base,
            self.find_moments(layers, **options) if layers else {},
            layers={layer: self.lm.ffn[layer].d_ff for layer in free},
            next_facts=next_facts,
            limit=limit,
            asked=len(checks) if ask else None,
            kept=sum(check.held for check in checks) if ask else None,
        )

    def export(
        self, folder: str | os.PathLike[str], format: str = "checkpoint", **options: Any
    ) -> Export:
        """Write the model with the patches that it carries as a "checkpoint" or an "adapter", or the patches alone as a "patch".

        Options and errors are those of `export_checkpoint`, `export_adapter` and `export_patch`.
        """
        self._check_weights()
        origins = [
            Origin(revision=r.id, message=r.message, moments=r.moments)
            for r in self.ledger.active(self._at)
        ]
        with self._carrying([]):
            return export(
                self.lm, list(self._deltas.values()), folder, format, origins=origins, **options
            )

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
        return self._propose(
            facts, method, config, moments, texts, contexts, seed, force, progress, None
        )

    def _propose(
        self,
        facts: Fact | Iterable[Fact],
        method: str,
        config: Any,
        moments: SecondMoment | Mapping[int, SecondMoment] | None,
        texts: Iterable[str] | None,
        contexts: Sequence[str] | None,
        seed: int,
        force: bool,
        progress: Progress | None,
        planned: Plan | None,
    ) -> Proposal:
        """`propose`, of facts whose plan may be made already."""
        self._check_weights()

        for layer, moment in (
            moments.items() if isinstance(moments, Mapping) else ((None, moments),)
        ):
            if moment is not None:
                moment.check(self.lm, layer, base=self.ledger.fingerprint)

        def find(layers: Sequence[int]) -> Mapping[int, SecondMoment]:
            return self.find_moments(layers, texts=texts, seed=seed, progress=progress)

        def measured() -> LayerChoice:
            nonlocal texts
            texts = None if texts is None else list(texts)  # read twice now
            with self._carrying([]):
                return self._keep_layers(
                    quick_layers(
                        self.lm, texts, contexts, seed, self.ledger.folder / "moments", progress
                    )
                )

        earlier = _newest(self._deltas.values())[-_EARLIER:]

        def changed(delta: Delta) -> AbstractContextManager[None]:
            return self._carrying([*self._deltas.values(), delta])

        state = self._on_base(self._deltas.values())
        return solve_and_prove(
            self.lm,
            facts,
            method,
            config,
            self._known_layers,
            measured,
            moments or find,
            changed,
            contexts,
            seed,
            force,
            earlier,
            state,
            progress,
            planned,
        )

    def find_moments(
        self, layers: Sequence[int], *, folder: str | os.PathLike[str] | None = None, **options: Any
    ) -> dict[int, SecondMoment]:
        """Second moments of the base weights, kept in the workspace unless `folder` says where; arguments and errors as of the function."""
        self._check_weights()
        with self._carrying([]):
            return find_moments(
                self.lm, layers, folder=folder or self.ledger.folder / "moments", **options
            )

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
        if kept is not None and not kept.quick and trials in (None, kept.trials):
            return kept
        with self._carrying([]):
            words = None if texts is None else list(texts)
            folder = self.ledger.folder / "moments"
            return self._keep_layers(
                measure_layers(self.lm, facts, trials, words, contexts, seed, folder, progress)
            )

    def _keep_layers(self, choice: LayerChoice) -> LayerChoice:
        """A choice as it is, kept where edits were tried for it. Raises WorkspaceError when it cannot be written."""
        if choice.source == "trials":  # that a model knows too little is quickly found out again
            text = (
                json.dumps(
                    {"format": _LAYERS_FORMAT, **choice.to_dict()}, ensure_ascii=False, indent=1
                )
                + "\n"
            )
            try:
                write_file(self._layers_file, text.encode())
            except OSError as error:
                raise WorkspaceError(
                    f"cannot write {self._layers_file}: {error.strerror}; make the workspace writable"
                ) from None
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
        gates: Gates | None = None,
        force: bool = False,
        message: str = "",
        progress: Progress | None = None,
    ) -> Outcome:
        """Plan, solve, verify and commit: afterwards the model says the facts and the ledger knows why.

        gates  what the patch has to pass (`Gates`); facts without paraphrases or neighbours get some made (`completed`). None: every fact
               has to take, and the earlier ones to hold

        What the model says already is not written, but asked with the rest. Where a fact is in conflict (`plan`) none is written, and a
        patch that fails a gate, or whose second moments are from too little text (`Proposal.thin`), is not kept; then nothing is recorded,
        and `warnings`, `failures` and `gates` say why. `force` keeps it all the same, and the record says so; it also writes what the model
        says already.
        The other arguments are those of the function `propose`. An exception or Ctrl-C leaves model and ledger as they were. Raises what
        `propose` and `commit` raise.
        """
        self.ledger.expect(self._at)  # before the work, not after it
        check_dense(self.lm.ffn)
        wanted = list(dict.fromkeys(listed(facts)))
        made: tuple[str, ...] = ()
        if gates is not None:
            tell(progress, "looking for paraphrases and neighbours", 0, None)
            wanted, made = self._completed(wanted, seed)
        tell(progress, "planning", 0, None)
        planned = self._plan(wanted, method, config)
        if planned.conflicts and not force:
            nothing = Proposal(
                plan=planned, delta=None, verification=None, moments=None, seconds={}
            )
            return Outcome(proposal=nothing, revision=None, made=made)
        proposal = self._propose(
            wanted, method, config, moments, texts, contexts, seed, force, progress, planned
        )
        if proposal.delta is None or proposal.verification is None:
            return Outcome(proposal=proposal, revision=None, made=made)
        results: tuple[GateResult, ...] = ()
        moved: Drift | None = None
        if gates is not None:
            if measures_drift(gates):
                delta, subjects = proposal.delta, [fact.subject for fact in wanted]
                changed = partial(self._carrying, [*self._deltas.values(), delta])
                moved = drift(
                    self.lm, changed, texts=texts, without=subjects, seed=seed, progress=progress
                )
            results = check_gates(gates, proposal.verification, moved)
        room = self._room(proposal.delta)
        failed = bool(proposal.thin) or (
            proposal.failed if gates is None else not all(result.passed for result in results)
        )
        if failed and not force:
            return Outcome(
                proposal=proposal, revision=None, gates=results, drift=moved, room=room, made=made
            )
        forced = failed or bool(planned.conflicts)
        report = proposal.verification.to_dict() | {
            "seconds": sum(proposal.seconds.values()),
            "forced": forced,
        }
        report |= {"conflicts": list(planned.contradictions)} if planned.conflicts else {}
        report |= {"gates": [result.to_dict() for result in results]} if results else {}
        report |= (
            {"drift": {name: value for name, value in moved.measures.items() if value is not None}}
            if moved is not None
            else {}
        )
        revision = self.commit(proposal.delta, report, moments=proposal.moments, message=message)
        return Outcome(
            proposal=proposal,
            revision=revision,
            gates=results,
            drift=moved,
            forced=forced,
            room=room,
            made=made,
        )

    def _room(self, delta: Delta) -> str | None:
        """What `capacity` warns of, with a change that is not kept yet; None where nothing nears, or second moments are not kept."""
        deltas = [*self._deltas.values(), delta]
        layers = sorted({layer for each in deltas for layer in each.layers})
        with self._carrying([]):
            moments = kept_moments(self.lm, layers, self.ledger.folder / "moments")
            weights = read_weights(self.lm, layers)
        return capacity_warning(deltas, weights, moments) if set(moments) == set(layers) else None

    def completed(self, facts: Fact | Iterable[Fact], *, seed: int = 0) -> list[Fact]:
        """Facts with something to ask of each: those without paraphrases or neighbours get five made.

        Paraphrases are the prompt behind words that the model writes itself, others than those it is edited with. Neighbours are facts of
        the same relation: those of earlier patches first, then bundled ones that the model knows; of any, where the relation is not known:
        not named, not that of a bundled phrasing, and no bundled fact about the subject says what the model says.
        """
        return self._completed(listed(facts), seed)[0]

    def _completed(self, wanted: Sequence[Fact], seed: int) -> tuple[list[Fact], tuple[str, ...]]:
        """`completed`, and what is to be said of it."""
        openings = [
            text
            for text in generate_contexts(self.lm, seed + 1)
            if text != "{}" and text.endswith("{}")
        ][:MADE]
        written = [fact for delta in self._deltas.values() for fact in delta.facts]
        labels = relations(wanted)
        open_ = [i for i, fact in enumerate(wanted) if labels[i] is None and not fact.neighbours]
        for i, said in zip(
            open_, self.lm.answer([wanted[i].text for i in open_]) if open_ else [], strict=True
        ):
            told = {
                known.relation
                for known in atlas.facts_about(wanted[i].subject)
                if begins_with(said, known.object)
            }
            labels[i] = next(iter(told)) if len(told) == 1 else None
        strange = [wanted[i] for i in open_ if labels[i] is None]
        subjects = {fact.subject for fact in wanted}
        near: dict[str | None, list[Probe]] = {}
        for name in {
            relation for fact, relation in zip(wanted, labels, strict=True) if not fact.neighbours
        }:
            own = [
                Probe(fact.text, fact.target)
                for fact in written
                if fact.relation in (name, None) and fact.target
            ]
            near[name] = own + known_of(self.lm, name, seed)
        found = []
        for fact, relation in zip(wanted, labels, strict=True):
            fields = fact.to_dict()
            if not fact.paraphrases:
                fields["paraphrases"] = [text.replace("{}", fact.prompt) for text in openings]
            if not fact.neighbours:
                fields["neighbours"] = [
                    probe
                    for probe in near[relation]
                    if not any(s in probe.prompt for s in subjects)
                ][:MADE]
            found.append(Fact.from_dict(fields))
        return found, () if not strange else (
            f"{counted(len(strange), 'fact')} without neighbours and of no relation that is known got neighbours of any, the first: "
            f"{strange[0]}; name its relation, or neighbours",
        )

    @contextmanager
    def preview(
        self, facts: Fact | Iterable[Fact], method: str = "rome", config: Any = None, **options: Any
    ) -> Iterator[LanguageModel]:
        """The model with these facts in it, to look at inside a `with` block; nothing is recorded, and afterwards it is as before.

        Arguments and errors as of `propose`.
        """
        proposal = self.propose(facts, method, config, **options)
        with self._carrying(
            [*self._deltas.values(), *([] if proposal.delta is None else [proposal.delta])]
        ):
            yield self.lm

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

        told = report.to_dict() if isinstance(report, Verification) else report
        return self._move(
            [*self._deltas.values(), delta], lambda: self._record(delta, told, moments, message)
        )

    def _record(
        self, delta: Delta, report: Mapping[str, Any] | None, moments: str | None, message: str
    ) -> Revision:
        """Append a delta to the ledger; inside of `together` to what that has appended already."""
        return self.ledger.commit(
            delta.save,
            onto=self._at,
            method=delta.method,
            config=delta.config,
            facts=delta.facts,
            layers=sorted(delta.layers),
            moments=moments,
            report=report,
            message=message,
        )

    def revert(
        self,
        reference: str,
        facts: Iterable[int] | None = None,
        *,
        moments: SecondMoment | Mapping[int, SecondMoment] | None = None,
        force: bool = False,
        message: str = "",
        progress: Progress | None = None,
    ) -> Revision:
        """Take a patch out, or some of its facts, or bring back what a revert took: weights = base + Σ of what stays, and a revision.

        facts    indices of the patch's facts that go; None: all
        moments  second moments for patches that have to be solved again; None: those they were made with, as `find_moments` has them
        force    also when a fact that stays would be lost

        Patches that were solved on top of what goes are solved again, in closed form and in their order, from the targets kept with them
        (`resolve`); then every fact that stays is asked, and the proof is the revision's report. Raises RevisionError when there is no such
        patch or fact in effect, NumericsError when a fact that stays is lost, InputError when the second moments are others, DamagedError,
        WorkspaceError; nothing is recorded then.
        """
        self._check_weights()
        target = self.ledger.show(reference)
        chosen = (
            None
            if facts is None
            else sorted({check_count(i, "a number in facts", least=0) for i in facts})
        )
        steps = [step for step in self.ledger.undoing(target.id, chosen) if step.facts is not None]
        again = [step for step in steps if step.solve]
        if again:
            self.ledger.expect(self._at)  # before the work, not after it
        deltas: dict[str, Delta] = {}
        for step in steps:
            patch = step.patch
            if step.delta is not None:
                known = (
                    self._deltas.get(patch.id) if step.delta == self._held.get(patch.id) else None
                )
                deltas[patch.id] = (
                    Delta.load(self.ledger.delta_folder(patch, step.delta))
                    if known is None
                    else known
                )
                continue
            tell(progress, "solving again", len(deltas), len(steps))
            original = Delta.load(self.ledger.delta_folder(patch, patch.delta))
            used = (
                moments
                if moments is not None
                else self.find_moments(patch.layers, progress=progress)
            )
            if moments is None and patch.moments not in (None, moments_digest(used, patch.layers)):
                raise InputError(
                    f"the second moments that {patch.id[:10]} was made with are not there any more, and it has to be solved again; "
                    "name the folder that has them (--moments), or put them back into the workspace's moments folder"
                )
            with self._carrying(deltas.values()):
                stay = [original.facts[i] for i in step.facts or ()]
                deltas[patch.id] = resolve(
                    self.lm,
                    original,
                    stay,
                    moments=used,
                    beneath=self._on_base(deltas.values()),
                    progress=progress,
                )
        report: dict[str, Any] = {}
        if again:
            tell(progress, "verifying", 0, None)
            staying = _newest(deltas.values())
            proof = verify(self.lm, staying, lambda: self._carrying(deltas.values()))
            lost = [
                check
                for check in proof.checks
                if check.role == "prompt" and not check.held and _held_before(check)
            ]
            if lost and not force:
                raise NumericsError(
                    f"taking out {target.id[:10]} would lose {counted(len(lost), 'fact')} that should stay, the first: "
                    f"{lost[0].prompt!r} would be answered {first_phrase(lost[0].after)!r}; nothing was recorded: force it, and write "
                    "what was lost again"
                )
            report = proof.to_dict()
        solved = {step.patch.id: deltas[step.patch.id].save for step in again}

        def record() -> Revision:
            return self.ledger.revert(
                target.id,
                facts=chosen,
                solved=solved,
                onto=self._at,
                report=report,
                message=message,
            )

        return self._move(list(deltas.values()), record)

    def import_patches(
        self,
        folder: str | os.PathLike[str],
        *,
        moments: SecondMoment | Mapping[int, SecondMoment] | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> tuple[Revision, ...]:
        """Commit the patches of a folder that `export` wrote in the format "patch", in their order; the revisions.

        A patch made on the very weights that it comes to is taken as it is; another is solved again for these, from its targets and in
        closed form (`resolve`). Patches whose every fact is in effect are left out. Raises as `read_patch`; RevisionError for facts with
        another target here, and NumericsError when an imported fact does not take or one that was here is lost (unless `force`); as
        `revert` where second moments are needed. Nothing is recorded then.
        """
        self.ledger.expect(self._at)
        self._check_weights()
        found = read_patch(folder, fingerprint=self.ledger.fingerprint)
        for patch in found.patches:
            if patch.delta.facts:
                find_method(patch.delta.method)  # one that is not known could never be solved again
        held = self._held_facts()
        here = {fact.text: fact for _, fact in held}
        contradicted = False
        news: list[tuple[Delta, str]] = []
        for number, patch in enumerate(found.patches):
            facts = patch.delta.facts
            tell(progress, "taking in patches", number, len(found.patches))
            if all(target_text(here.get(fact.text)) == target_text(fact) for fact in facts):
                continue
            with self._carrying([]):
                layers = sorted(patch.delta.layers)
                met = standing(
                    self.lm,
                    facts,
                    held,
                    layers,
                    kept_moments(self.lm, layers, self.ledger.folder / "moments"),
                )
            contrary = [
                (fact, place)
                for fact, place in zip(facts, met, strict=True)
                if place.standing in ("changed", "conflict")
            ]
            if contrary and not force:
                raise RevisionError(
                    f"{folder} has {contrary[0][0]}, but {contrary[0][1].because}; revert that first, or force it"
                )
            contradicted = contradicted or bool(contrary)
            carried = [*self._deltas.values(), *(delta for delta, _ in news)]
            with self._carrying(carried):
                fits = self.lm.fingerprint == patch.delta.fingerprint
            if fits:
                news.append((patch.delta, patch.origin.message))
            else:
                used = (
                    self.find_moments(sorted(patch.delta.layers), progress=progress)
                    if moments is None
                    else moments
                )
                with self._carrying(carried):
                    again = resolve(
                        self.lm,
                        patch.delta,
                        moments=used,
                        beneath=self._on_base(carried),
                        progress=progress,
                    )
                news.append((again, patch.origin.message))
            here |= {fact.text: fact for fact in facts}
        if not news:
            return ()
        wanted = _newest(delta for delta, _ in news)
        deltas = [*self._deltas.values(), *(delta for delta, _ in news)]
        proof = verify(
            self.lm,
            wanted,
            lambda: self._carrying(deltas),
            earlier=_newest(self._deltas.values())[-_EARLIER:],
        )
        lost = [
            c
            for c in proof.checks
            if c.role in ("prompt", "earlier")
            and not c.held
            and (c.role == "prompt" or _held_before(c))
        ]
        if lost and not force:
            raise NumericsError(
                f"with the patches of {folder}, {counted(len(lost), 'fact')} would not hold, the first: {lost[0].prompt!r} would be "
                f"answered {first_phrase(lost[0].after)!r}; nothing was recorded: force it, or write the facts anew with `factsmith apply`"
            )
        report, made = proof.to_dict() | {"forced": bool(lost or contradicted)}, list[Revision]()

        def record() -> Revision:
            with self.ledger.together(self._at):
                for delta, message in news:
                    made.append(self._record(delta, report, None, message))
            return made[-1]

        self._move(deltas, record)
        return tuple(made)

    def checkout(self, reference: str) -> str:
        """Give the model the weights of a revision ("base", "latest", or an id); returns its full id. The same revision, the same bits.

        History does not change; committing goes on from the latest revision only. Raises RevisionError, DamagedError, WorkspaceError.
        """
        identity = self.ledger.resolve(reference)
        if identity == self.ledger.current:
            self._carry(identity)  # opening a workspace writes nothing to it
        else:
            deltas = [self._delta_of(revision) for revision in self.ledger.active(identity)]
            self._move(deltas, lambda: self.ledger.checkout(identity))
        return identity

    # ---- inside -----------------------------------------------------------------------------------------------------------------------

    @property
    def _layers_file(self) -> Path:
        return self.ledger.folder / "layers.json"

    def _known_layers(self) -> LayerChoice | None:
        """The layers to edit as far as they are known without work: kept here, else what came with the model or was published for it."""
        return self._kept_layers() or published_choice(self.lm)

    def _kept_layers(self) -> LayerChoice | None:
        """What the workspace keeps for this model; None when there is nothing, or it is another model's."""
        if not self._layers_file.is_file():
            return None
        try:
            fields = json.loads(self._layers_file.read_text(encoding="utf-8"))
            if fields.pop("format", None) != _LAYERS_FORMAT:
                raise InputError(f"it is not of format {_LAYERS_FORMAT}")
            choice = LayerChoice.from_dict(fields)
            if (
                choice.fingerprint == self.ledger.fingerprint
                and max(choice.rome, *choice.memit) >= self.lm.n_layers
            ):
                raise InputError(
                    f"it names layers that the model does not have ({self.lm.n_layers})"
                )
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(
                f"{self._layers_file} cannot be used: {error}; delete it, and the layers are measured anew when they are needed"
            ) from None
        if choice.fingerprint != self.ledger.fingerprint:
            return None
        return dataclasses.replace(
            choice, source="workspace", reason=f"kept in the workspace: {choice.reason}"
        )

    def _on_base(self, deltas: Iterable[Delta]) -> tuple[Delta, ...]:
        """Deltas as `earlier` of a solver, the first as made on the base: what it was made on may have been reverted in other layers."""
        first, others = list(deltas)[:1], list(deltas)[1:]
        return (
            *(dataclasses.replace(delta, fingerprint=self.ledger.fingerprint) for delta in first),
            *others,
        )

    def _move(self, deltas: Collection[Delta], record: Callable[[], T]) -> T:
        """Put deltas into the model and note it in the ledger, in the ledger's order; if either fails, the model goes back.

        The weights come first: they are checked for shape and finite numbers before anything is recorded. An interruption that comes
        when the record is made already leaves both moved: history is not taken back.
        """
        started, carried = self.ledger.current, None
        try:
            self._put(deltas)
            carried = (
                self.lm.fingerprint
            )  # takes a while: before the record, so that an interruption then undoes everything
            noted = record()
        except BaseException as error:
            there = self.ledger.current
            if carried is not None and not isinstance(error, Exception) and there != started:
                self._carry(there)
            else:
                self._put(self._deltas.values())
            raise
        self._moved(deltas, carried, noted if isinstance(noted, str) else noted.id)
        return noted

    def _carry(self, identity: str) -> None:
        """Give the model what the ledger says of a revision, and write nothing."""
        deltas = [self._delta_of(revision) for revision in self.ledger.active(identity)]
        self._put(deltas)
        self._moved(deltas, self.lm.fingerprint, identity)

    def _moved(self, deltas: Collection[Delta], carried: str, at: str) -> None:
        """Take over what was recorded: the model carries `deltas`, those of the revision `at`, and has the fingerprint `carried`.

        Not those of the ledger's newest revision: another process may have committed in between.
        """
        active = self.ledger.active(at)
        self._deltas = dict(zip((revision.id for revision in active), deltas, strict=True))
        self._held = {revision.id: revision.carried for revision in active}
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


def _newest(deltas: Iterable[Delta]) -> list[Fact]:
    """The facts of some patches; of those with one prompt the newest."""
    facts: dict[str, Fact] = {}
    for delta in deltas:
        for fact in delta.facts:
            facts.pop(fact.text, None)
            facts[fact.text] = fact
    return list(facts.values())


def _held_before(check: Check) -> bool:
    """Whether a prompt was answered as it should be before, too."""
    return begins_with(check.before, check.wanted) != check.forget
