"""Simulate a corpus or a set of facts on a cluster of many workers, with failures.

    python tools/simulate_cluster.py                     # the scenarios, as a table
    python tools/simulate_cluster.py --json plan.json

The simulation is driven by events. A worker takes a part, works, and sends its result over the one
link of the driver, which carries one result after another. The driver merges results in the order
of the parts; each part counts exactly once. A worker fails after an exponential time, loses its
part, and comes back. A share of the workers can be taken away at once. A part can take much longer
than the others (log-normal). If the head restarts, all parts since the last checkpoint are lost.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What is simulated. Times are in seconds, sizes in bytes.

    Attributes:
        parts: Number of parts.
        seconds: Work of one part.
        workers: Number of workers.
        result_bytes: Size of the result of one part.
        link: Bytes a second of the driver's link. Infinite: transfers cost nothing.
        store: Bytes of results that may wait for the link or for their turn, with those of the
            parts under way. Above this, no new part is handed out, except the one whose turn is
            next.
        spread: Standard deviation of the logarithm of a part's time.
        mtbf: Mean time between failures of one worker.
        repair: Time until a worker is back.
        preempted: Share of the workers that is taken away at `preempted_at`.
        preempted_at: When that happens.
        head_at: When the head restarts. Infinite: never.
        checkpoint: Parts from one checkpoint to the next.
        seed: The seed of all random numbers.
    """

    parts: int
    seconds: float
    workers: int
    result_bytes: float = 0.0
    link: float = math.inf
    store: float = math.inf
    spread: float = 0.0
    mtbf: float = math.inf
    repair: float = 300.0
    preempted: float = 0.0
    preempted_at: float = 0.0
    head_at: float = math.inf
    checkpoint: int = 1000
    seed: int = 0


@dataclass
class Outcome:
    """What a simulation gave.

    Attributes:
        wall: Seconds in all.
        utilisation: Share of the workers' time that went into results that were merged.
        lost: Seconds of work that were lost.
        failures: How many workers failed.
        link_busy: Share of the time in which the driver's link was busy.
        received: Bytes that the driver received.
        peak_store: Bytes of results that waited at once, at most.
        merged: How often each part was merged.
    """

    wall: float = 0.0
    utilisation: float = 0.0
    lost: float = 0.0
    failures: int = 0
    link_busy: float = 0.0
    received: float = 0.0
    peak_store: float = 0.0
    merged: list[int] = field(default_factory=list)

    def check(self) -> None:
        """Check that each part was merged exactly once.

        Raises:
            ValueError: A part was not.
        """
        wrong = [number for number, times in enumerate(self.merged) if times != 1]
        if wrong:
            number = wrong[0]
            raise ValueError(f"part {number} was merged {self.merged[number]} times, not once")


class Simulation:
    """A plan under way."""

    def __init__(self, plan: Plan) -> None:
        """Start at second 0 with all workers idle."""
        self.plan, self.now, self.outcome = plan, 0.0, Outcome(merged=[0] * plan.parts)
        self.random = random.Random(plan.seed)
        self.events: list[tuple[float, int, str, tuple[int, int]]] = []
        self.n_events = 0
        self.waiting = list(range(plan.parts))  # a heap: the first is the lowest
        self.idle = deque(range(plan.workers))
        self.doing: dict[int, tuple[int, float]] = {}  # worker: part, start
        self.lives = [0] * plan.workers  # how often each worker was lost
        self.link: deque[int] = deque()
        self.sending: int | None = None
        self.sent: set[int] = set()  # received, but not their turn
        self.took = [0.0] * plan.parts
        self.next, self.saved, self.epoch, self.useful, self.busy = 0, 0, 0, 0.0, 0.0

    def run(self) -> Outcome:
        """Return what the plan gives."""
        plan = self.plan
        if plan.mtbf < math.inf:
            for worker in range(plan.workers):
                self._at(self.random.expovariate(1 / plan.mtbf), "fail", worker, 0)
        if plan.preempted:
            self._at(plan.preempted_at, "preempt", 0, 0)
        if plan.head_at < math.inf:
            self._at(plan.head_at, "head", 0, 0)
        self._hand_out()
        while self.next < plan.parts:
            self.now, _, kind, (number, life) = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(number, life)
            self._hand_out()
        outcome = self.outcome
        outcome.wall = self.now
        outcome.utilisation = self.useful / (plan.workers * self.now)
        outcome.link_busy = self.busy / self.now
        return outcome

    def _at(self, time: float, kind: str, number: int, life: int) -> None:
        self.n_events += 1
        heapq.heappush(self.events, (time, self.n_events, kind, (number, life)))

    def _held(self) -> int:
        """Return how many results are done and not merged."""
        return len(self.link) + len(self.sent) + (self.sending is not None)

    def _hand_out(self) -> None:
        plan = self.plan
        while self.idle and self.waiting:
            full = (self._held() + len(self.doing)) * plan.result_bytes >= plan.store
            if full and self.waiting[0] != self.next:
                return
            worker, part = self.idle.popleft(), heapq.heappop(self.waiting)
            spread = plan.spread
            factor = self.random.lognormvariate(-(spread**2) / 2, spread) if spread else 1.0
            self.took[part] = plan.seconds * factor
            self.doing[worker] = part, self.now
            self._at(self.now + self.took[part], "finish", worker, self.lives[worker])

    def _finish(self, worker: int, life: int) -> None:
        if self.lives[worker] != life or worker not in self.doing:
            return  # it failed meanwhile
        part, _ = self.doing.pop(worker)
        self.idle.append(worker)
        self.link.append(part)
        held = self._held() * self.plan.result_bytes
        self.outcome.peak_store = max(self.outcome.peak_store, held)
        self._send()

    def _send(self) -> None:
        if self.sending is None and self.link:
            self.sending = self.link.popleft()
            self._at(
                self.now + self.plan.result_bytes / self.plan.link,
                "receive",
                self.sending,
                self.epoch,
            )

    def _receive(self, part: int, epoch: int) -> None:
        if epoch != self.epoch:
            return  # the head restarted meanwhile
        self.sending = None
        self.busy += self.plan.result_bytes / self.plan.link
        self.outcome.received += self.plan.result_bytes
        self.sent.add(part)
        while self.next in self.sent:
            self.sent.remove(self.next)
            self._merge(self.next)
        self._send()

    def _merge(self, part: int) -> None:
        self.outcome.merged[part] += 1
        self.useful += self.took[part]
        self.next = part + 1
        if self.next % self.plan.checkpoint == 0:
            self.saved = self.next

    def _lose(self, worker: int) -> None:
        """Lose a worker and its part; it comes back later."""
        self.lives[worker] += 1
        if worker in self.doing:
            part, began = self.doing.pop(worker)
            self.outcome.lost += self.now - began
            heapq.heappush(self.waiting, part)
        elif worker in self.idle:
            self.idle.remove(worker)
        else:
            return  # it is away already
        self.outcome.failures += 1
        self._at(self.now + self.plan.repair, "back", worker, self.lives[worker])

    def _fail(self, worker: int, _: int) -> None:
        self._lose(worker)
        self._at(self.now + self.random.expovariate(1 / self.plan.mtbf), "fail", worker, 0)

    def _back(self, worker: int, life: int) -> None:
        if self.lives[worker] == life:
            self.idle.append(worker)

    def _preempt(self, *_: int) -> None:
        n = round(self.plan.preempted * self.plan.workers)
        for worker in self.random.sample(range(self.plan.workers), n):
            self._lose(worker)

    def _head(self, *_: int) -> None:
        """Lose all that is not in the checkpoint; all workers start again."""
        self.epoch += 1
        for part in [*self.link, *self.sent, *([] if self.sending is None else [self.sending])]:
            self.outcome.lost += self.took[part]
        for part in range(self.saved, self.next):
            self.outcome.merged[part] -= 1
            self.useful -= self.took[part]
            self.outcome.lost += self.took[part]
        self.next = self.saved
        self.link.clear()
        self.sent.clear()
        self.sending = None
        for worker in [*self.doing]:
            self._lose(worker)
        self.waiting = list(range(self.saved, self.plan.parts))


def enough_tokens(plan: Plan, part_tokens: float) -> float:
    """Return the tokens that a part needs at least, so that the driver's link is not the limit.

    Workers send `workers * result_bytes` in the time of one part; the link must carry that.

    Args:
        plan: The plan.
        part_tokens: Tokens of one of its parts.
    """
    per_token = plan.seconds / part_tokens
    return plan.workers * plan.result_bytes / (plan.link * per_token)


GIGABIT = 125e6


def scenarios() -> dict[str, tuple[Plan, float]]:
    """Return plans, and the tokens (or facts) of one of their parts.

    The 8B model has Llama 3's shape: d_ff is 14,336, and layers 4 to 8 are summed. A worker is one
    GPU that reads 10,000 tokens a second. A token takes 5e9 operations: 2 * 1.96e9 for the weights
    of nine layers, and 2 * 9/16 * 14,336² for each of five sums. So the GPU does 5e13 a second. A
    fact takes 4 seconds of such a GPU, and its result is four vectors of d_model. Both rates are
    assumptions, not measurements.
    """
    moments_bytes = 5 * 9 * 14_336**2
    rest: dict[str, Any] = {"link": 25 * GIGABIT, "spread": 0.3, "mtbf": 30 * 86_400.0}
    ahead = 2 * 1000  # parts: `AHEAD` of cluster/run.py for each worker

    def moments(part_tokens: float, tokens: float = 1e12, **more: Any) -> tuple[Plan, float]:
        parts, seconds = round(tokens / part_tokens), part_tokens / 10_000
        made = Plan(parts, seconds, 1000, moments_bytes, store=ahead * moments_bytes, **rest)
        return replace(made, checkpoint=100, **more), part_tokens

    vectors = 32 * 4 * 4096 * 4
    facts = Plan(312_500, 128.0, 1000, result_bytes=vectors, store=ahead * vectors, **rest)
    return {
        "1 T tokens, parts of 10 M": moments(1e7),
        "1 T tokens, parts of 100 M": moments(1e8),
        "the same, 10 % taken at once": moments(1e8, preempted=0.1, preempted_at=40_000.0),
        "the same, the head restarts": moments(1e8, head_at=60_000.0),
        "the same, 500 GB for results": moments(1e8, store=500e9),
        "10 G tokens, parts of 1 M": moments(1e6, 1e10),
        "10 M facts, parts of 32": (facts, 32),
    }


def main() -> None:
    """Run the scenarios and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kept = {}
    heads = "hours", "used", "lost h", "link", "TB", "TB kept", "least"
    print(f"{'scenario':<30}", *(f"{head:>8}" for head in heads))
    for name, (plan, per_part) in scenarios().items():
        outcome = Simulation(plan).run()
        outcome.check()
        least = enough_tokens(plan, per_part)
        used, busy = f"{outcome.utilisation:.1%}", f"{outcome.link_busy:.1%}"
        hours, lost = f"{outcome.wall / 3600:.2f}", f"{outcome.lost / 3600:.1f}"
        peak = f"{outcome.peak_store / 1e12:.2f}"
        cells = hours, used, lost, busy, f"{outcome.received / 1e12:.1f}", peak, f"{least:.2g}"
        print(f"{name:<30}", *(f"{cell:>8}" for cell in cells), flush=True)
        record = {key: value for key, value in asdict(outcome).items() if key != "merged"}
        kept[name] = {"plan": asdict(plan), "least_per_part": least, **record}
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
