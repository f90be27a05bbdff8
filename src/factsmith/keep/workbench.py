"""Workbench: a model, its ledger, and the only object that changes both.

    with Workbench(load("gpt2"), "my-workspace") as bench:       # the folder is made if it is not a
    workspace yet
        outcome = bench.apply([Fact("Danielle Darrieux", "The mother tongue of {} is", "English")])
        outcome.verification.efficacy, outcome.revision.id
        bench.revert(outcome.revision.id)                         # the weights are the base's
        again, bit for bit

The steps of `apply` can be taken one by one: `plan` asks what the model says now, `propose` solves
for the change and measures it while it is in the model for a moment, `commit` keeps it. A Workbench
is a `patch.Bench`, so the functions of `patch` do the same without a workspace (`patch.Scratch`).
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..core.checks import check_count
from ..core.errors import FingerprintError, InputError
from ..core.fact import Fact, listed
from ..core.gates import Gates
from ..core.identity import same_model
from ..core.progress import Progress
from ..edit.configs import EditConfig, by_depth
from ..edit.delta import Delta, applied
from ..edit.inputs import Moments
from ..judge.drift import Drift, drift
from ..model.language_model import LanguageModel
from ..patch.attempt import Attempt, attempt_patch
from ..patch.capacity import LIMIT, Capacity, capacity
from ..patch.complete import complete
from ..patch.firing import firing_of
from ..patch.plan import Plan, plan
from ..patch.proof import prove
from ..patch.proposal import Proposal, propose
from ..patch.recipe import Recipe, Sources, as_recipe
from ..patch.verification import Verification
from .again import undo
from .bench import LedgerBench
from .carried import check_erased, neurons_in_words, newest_facts
from .diff import Diff, diff
from .exchange import read_arrivals
from .ledger import LATEST
from .outcome import Outcome
from .revision import Integrity, Revision
from .settled import settled


class Workbench(LedgerBench):
    """A model and the workspace that records its patches.

    A context manager that leaves the model at its base weights. Opening makes the workspace if the
    folder is not one yet, and puts the active deltas into the model.

    Attributes:
        lm: The model; while the workbench is open its weights are base + Σ active deltas.
        ledger: The records.

    Raises:
        FingerprintError: The workspace was made for another model.
        DamagedError: A delta is not whole.
        UnsupportedModelError: The model's layers stay on disk.
    """

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    @settled
    def plan(
        self,
        facts: Fact | Iterable[Fact],
        method: str | Recipe | None = None,
        config: EditConfig | None = None,
        *,
        progress: Progress | None = None,
    ) -> Plan:
        """Plan what writing these facts would do and cost; nothing changes.

        Args:
            facts: The facts.
            method: A method's name, or a Recipe. None: "memit" for several facts, "rome" for one.
            config: The method's settings. None: the recommended ones.
            progress: Called with the step's name, how much is done, and how much there is.

        Second moments are used only where they are kept; without them the plan says nothing about
        crowding. Raises what `patch.plan` raises.
        """
        self._carried.check_weights()
        decided = plan(self, facts, as_recipe(method, config), progress=progress)
        return dataclasses.replace(decided, seconds=self.seconds_for(decided))

    @settled
    def verify(self, *, progress: Progress | None = None) -> Verification:
        """Ask every active patch's prompt, paraphrases and neighbours of the base weights and of
        the weights now.

        Where two patches have the same prompt, only the newer one's is asked.
        """
        return self._verify(progress)

    def _verify(self, progress: Progress | None = None) -> Verification:
        facts = newest_facts(self._carried.deltas.values())
        with self.on_base():
            return prove(self.lm, facts, self.carrying, progress=progress)

    @settled
    def diff(self, before: str, after: str = LATEST, *, progress: Progress | None = None) -> Diff:
        """Compare two revisions ("base", "latest", or ids): facts, the model's answers to their
        prompts, norms by layer.

        The model is as before when this returns. Raises RevisionError, DamagedError.
        """
        self._carried.check_weights()
        return diff(self._carried, before, after, progress)

    @settled
    def rebuild(self) -> Integrity:
        """Check every record and file, then build the weights again from the base and the files.

        They are compared with the model's, and the model without patches with the base. Afterwards
        the patched layers have the weights that the ledger says, also when something had changed
        them in memory.

        Raises:
            DamagedError: A record or a file has a fault.
            FingerprintError: The model had other weights.
        """
        integrity = self.ledger.verify()
        self._carried.check_bits()
        return integrity

    @settled
    def drift(self, **options: Any) -> Drift:
        """Measure what the patches that the model carries did to everything else; options as of the
        function `drift`.

        Raises:
            InputError: The model carries no patch.
        """
        deltas = list(self._carried.deltas.values())
        if not deltas:
            raise InputError(
                "the workspace carries no patch, so nothing can have drifted; `factsmith log` "
                "lists its patches"
            )
        subjects = [fact.subject for delta in deltas for fact in delta.facts]
        with self.on_base():
            return drift(self.lm, lambda: applied(self.lm, deltas), without=subjects, **options)

    @settled
    def capacity(
        self, next_facts: int = 0, *, limit: float = LIMIT, ask: bool = True, **options: Any
    ) -> Capacity:
        """Measure how full the edited layers are, and forecast what `next_facts` more will cost
        everything else.

        Args:
            next_facts: How many facts are still to come.
            limit: Per cent of unrelated facts answered otherwise that count as broken.
            ask: Ask the model which of the stored facts it still says.
            options: Where second moments come from, as of the function `find_moments`; they are
                kept in the workspace.
        """
        self._carried.check_weights()
        deltas = list(self._carried.deltas.values())
        layers = sorted({layer for delta in deltas for layer in delta.layers})
        widened = sorted({layer for delta in deltas for layer in delta.appended})
        inputs = self.find_moments(widened, site="inputs", **options) if widened else {}
        choice = None if layers else self.known_layers()
        free = (choice.memit if choice is not None else ()) or by_depth(self.lm.n_layers)
        checks = self._verify(options.get("progress")).checks if ask and deltas else ()
        asked = [check for check in checks if check.role == "prompt"]
        full = capacity(
            deltas,
            self._carried.base,
            self.find_moments(layers, **options) if layers else {},
            layers={layer: self.lm.ffn[layer].n_original for layer in free},
            next_facts=next_facts,
            limit=limit,
            asked=len(asked) if ask else None,
            kept=sum(check.held for check in asked) if ask else None,
        )
        return dataclasses.replace(full, appended=firing_of(self.lm, deltas, inputs))

    # ── proposing ─────────────────────────────────────────────────────────────────────────────────

    @settled
    def propose(  # house: a promised signature, kept for those who call it with keywords
        self,
        facts: Fact | Iterable[Fact],
        method: str | Recipe | None = None,
        config: EditConfig | None = None,
        *,
        moments: Moments | None = None,
        texts: Iterable[str] | None = None,
        contexts: Sequence[str] | None = None,
        seed: int = 0,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Proposal:
        """Solve for a change on top of the active ones, and measure it; nothing is kept.

        Second moments and measured layers are those of the base weights, and are kept in the
        workspace. Arguments as of `apply`. Raises what `patch.plan` and `patch.propose` raise, and
        DamagedError when something kept cannot be read.
        """
        self._carried.check_weights()
        sources = Sources(moments=moments, texts=texts, contexts=contexts, seed=seed)
        decided = plan(
            self,
            facts,
            as_recipe(method, config),
            sources,
            force=force,
            progress=progress,
        )
        return propose(self, decided, sources, force=force, progress=progress)

    def completed(self, facts: Fact | Iterable[Fact], *, seed: int = 0) -> list[Fact]:
        """Return the facts with something to ask about each (`patch.complete`): those without
        paraphrases or neighbours get five.
        """
        written = [fact for delta in self._carried.deltas.values() for fact in delta.facts]
        return complete(self.lm, listed(facts), written, seed)[0]

    @contextmanager
    def preview(
        self,
        facts: Fact | Iterable[Fact],
        method: str | Recipe | None = None,
        config: EditConfig | None = None,
        **options: Any,
    ) -> Iterator[LanguageModel]:
        """A block in which the model carries these facts, to look at; nothing is recorded.
        Arguments and errors as of `propose`.
        """
        proposal = self.propose(facts, method, config, **options)
        with self.carrying(*([] if proposal.delta is None else [proposal.delta])):
            yield self.lm

    # ── changing ──────────────────────────────────────────────────────────────────────────────────

    @settled
    def apply(  # house: a promised signature, kept for those who call it with keywords
        self,  # house: the promised arguments are those of `propose`, and more
        facts: Fact | Iterable[Fact],
        method: str | Recipe | None = None,
        config: EditConfig | None = None,
        *,
        moments: Moments | None = None,
        texts: Iterable[str] | None = None,
        contexts: Sequence[str] | None = None,
        seed: int = 0,
        gates: Gates | None = None,
        force: bool = False,
        message: str = "",
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Outcome:
        """Plan, solve, verify and commit: afterwards the model says the facts, and the ledger knows
        why.

        What the model already says is not written, but it is asked with the rest. Nothing is
        recorded where a fact is in conflict, where the patch fails a gate, or where its second
        moments are from too little text; `warnings`, `failures` and `gates` say why. An exception
        or Ctrl-C leaves model and ledger as they were.

        Args:
            facts: The facts to write.
            method: A method's name, or a Recipe. None: "memit" for several facts, "rome" for one.
            config: The method's settings. None: the recommended ones.
            moments: Second moments of the edited layers. None: the kept ones, or computed from
                `texts`.
            texts: Ordinary text for second moments and drift, as in `Sources`.
            contexts: Templates with `{}` for the prompt. None: the model writes them.
            seed: Seed of everything that the model writes or that is drawn.
            gates: What the patch has to pass; facts without paraphrases or neighbours get some
                made. None: every fact has to take, and the earlier ones to hold.
            force: Keep the patch all the same, and say so in the record; write also what the model
                already says.
            message: One line for the log.
            dry_run: Do all of it, but keep nothing.
            progress: Called with the step's name, how much is done, and how much there is.

        Raises what `propose` and `commit` raise.
        """
        if not dry_run:
            self.ledger.expect(self._carried.at)  # before the work, not after it
        self._carried.check_weights()
        sources = Sources(moments=moments, texts=texts, contexts=contexts, seed=seed)
        attempt = attempt_patch(
            self,
            facts,
            as_recipe(method, config),
            sources,
            gates=gates,
            force=force,
            progress=progress,
        )
        return Outcome.of(attempt) if dry_run else self._keep(attempt, message, force=force)

    @settled
    def keep(self, attempt: Attempt, *, force: bool = False, message: str = "") -> Outcome:
        """Commit an attempt that was only tried, such as the outcome of `apply` with `dry_run`.

        Nothing is solved again. Nothing is recorded where the attempt failed, as in `apply`.

        Args:
            attempt: What was solved and proved on the weights that the model has now.
            force: Keep it all the same, and say so in the record.
            message: One line for the log.

        Raises what `commit` raises: FingerprintError where the weights have changed since then.
        """
        return self._keep(attempt, message, force=force)

    def _keep(self, attempt: Attempt, message: str, *, force: bool) -> Outcome:
        if attempt.delta is None or not (attempt.holds or force):
            return Outcome.of(attempt)
        forced = not attempt.holds or bool(attempt.proposal.plan.conflicts)
        report = attempt.report | {"forced": forced}
        revision = self._commit(attempt.delta, report, attempt.proposal.moments, message)
        return Outcome.of(attempt, revision, forced=forced)

    @settled
    def commit(
        self,
        delta: Delta,
        report: Verification | Mapping[str, Any] | None = None,
        *,
        moments: str | None = None,
        message: str = "",
    ) -> Revision:
        """Keep a delta: into the ledger and into the model, or into neither.

        Args:
            delta: The change, made on the weights that the model has now.
            report: Its evaluation, kept with the record.
            moments: sha256 of the second moments it was made with.
            message: One line for the log.

        Raises:
            FingerprintError: The delta was made on other weights.
            InputError: The delta writes into a neuron that a patch in effect erased.
            WorkspaceError: The workspace cannot be written, has moved on, or an older revision is
                checked out.
        """
        plain = report.to_dict() if isinstance(report, Verification) else report
        return self._commit(delta, plain, moments, message)

    def _commit(
        self, delta: Delta, report: Mapping[str, Any] | None, moments: str | None, message: str
    ) -> Revision:
        self._carried.check_weights()
        if not same_model(delta.fingerprint, self.lm.fingerprint):
            raise FingerprintError(
                f"the delta was made on weights {delta.fingerprint[:10]}, the model has "
                f"{self.lm.fingerprint[:10]}; make it again on "
                "this model with the patches it carries now"
            )
        check_erased(delta, self._carried.deltas)
        deltas = [*self._carried.deltas.values(), delta]
        return self._carried.move(deltas, lambda: self._record(delta, report, moments, message))

    def _record(
        self, delta: Delta, report: Mapping[str, Any] | None, moments: str | None, message: str
    ) -> Revision:
        """Append a delta to the ledger; inside `together`, to what that has already appended."""
        return self.ledger.commit(
            delta.save,
            onto=self._carried.at,
            method=delta.method,
            config=delta.config,
            facts=delta.facts,
            layers=list(delta.touched),
            appended={} if delta.layers else {x: len(r) for x, r in delta.appended.items()},
            moments=moments,
            report=report,
            message=message or neurons_in_words(delta),
        )

    @settled
    def revert(
        self,
        reference: str,
        facts: Iterable[int] | None = None,
        *,
        moments: Moments | None = None,
        force: bool = False,
        message: str = "",
        progress: Progress | None = None,
    ) -> Revision:
        """Take a patch out, or some of its facts, or bring back what a revert took; the revert is a
        revision of its own.

        Patches that were solved on top of what goes are solved again, in their order. Then every
        fact that stays is asked. Patches of other layers whose facts would be lost are solved
        again, too. Of appended neurons only the rows of the facts that go are dropped: nothing is
        solved again. The report says what was asked, what was solved again, and what is lost.

        Args:
            reference: The revision's id, a unique prefix, or "latest".
            facts: Indices of the patch's facts that go. None: all.
            moments: Second moments for patches that must be solved again. None: those they were
                made with.
            force: Go on when a fact that stays would be lost.
            message: One line for the log.
            progress: Called with the step's name, how much is done, and how much there is.

        Raises what `again.undo` raises, DamagedError and WorkspaceError; nothing is recorded then.
        """
        self._carried.check_weights()
        target = self.ledger.show(reference)
        chosen = (
            None
            if facts is None
            else sorted({check_count(i, "a number in facts", least=0) for i in facts})
        )
        undoing = undo(
            self,
            self._carried,
            target,
            chosen,
            Sources(moments=moments),
            force=force,
            progress=progress,
        )
        solved = {patch: undoing.deltas[patch].save for patch in undoing.changed}
        return self._carried.move(
            list(undoing.deltas.values()),
            lambda: self.ledger.revert(
                target.id,
                facts=chosen,
                solved=solved,
                also=undoing.also,
                onto=self._carried.at,
                report=undoing.report,
                message=message,
            ),
        )

    @settled
    def import_patches(
        self,
        folder: str | os.PathLike[str],
        *,
        moments: Moments | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> tuple[Revision, ...]:
        """Commit the patches of a folder that `export` wrote in the format "patch", in their order;
        return the revisions.

        Arguments and errors as of `exchange.read_arrivals`; nothing is recorded when one is raised.
        """
        self.ledger.expect(self._carried.at)
        self._carried.check_weights()
        arrivals = read_arrivals(
            self, self._carried, folder, Sources(moments=moments), force=force, progress=progress
        )
        revisions: list[Revision] = []
        if not arrivals.deltas:
            return ()

        def record() -> Revision:
            with self.ledger.together(self._carried.at):
                for delta, message in arrivals.deltas:
                    revisions.append(self._record(delta, arrivals.report, None, message))
            return revisions[-1]

        new = (delta for delta, _ in arrivals.deltas)
        self._carried.move([*self._carried.deltas.values(), *new], record)
        return tuple(revisions)

    @settled
    def checkout(self, reference: str) -> str:
        """Give the model the weights of a revision ("base", "latest", or an id) and return its full
        id. The same revision, the same bits.

        History does not change; committing goes on from the latest revision only. Every fact in
        effect is asked then: `asked` has the answers, and a warning says which facts that held when
        they were kept do not hold. Raises RevisionError, DamagedError, WorkspaceError.
        """
        identity = self.ledger.resolve(reference)
        if identity == self.ledger.current:
            self._carried.go_to(identity)  # opening a workspace writes nothing to it
        else:
            self._carried.check_weights()
            deltas = [self._carried.delta_of(revision) for revision in self.ledger.active(identity)]
            self._carried.move(deltas, lambda: self.ledger.checkout(identity))
        self.asked = self.ask_facts()
        if self.asked.lost:
            warnings.warn(f"{identity[:10]}: {self.asked.in_words}", stacklevel=2)
        return identity
