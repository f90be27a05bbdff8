"""The rooms of studio: pages that share a subject, and the verbs that each has.

[room.title for room in ROOMS]     # ["Ask", "Trace", ...]
ROOMS[1].address(TRACE, arguments) # "/trace/trace?prompt=..."
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arguments import Arguments
from .verb import Verb
from .verbs import ask, explain, find, index, ledger, lens, memory, moving, neurons, trace
from .verbs.export import EXPORTING
from .verbs.judge import JUDGING
from .verbs.patch import PATCHING
from .verbs.push import PUSHING

RUN = "run"
"""In the address of a view: its form was sent. A form that keeps all defaults has nothing else."""


@dataclass(frozen=True)
class Room:
    """A part of studio.

    Attributes:
        name: The first part of its addresses.
        title: Its name in the menu.
        lead: One sentence: what one does there.
        verbs: What it does; the first one is its front page.
        menu: The names of the verbs that its own menu shows; others are reached from answers.
        template: The template in the folder `rooms` that frames its pages.
    """

    name: str
    title: str
    lead: str
    verbs: tuple[Verb[Any], ...]
    menu: tuple[str, ...] = ()
    template: str = "room.html"

    def address(self, verb: Verb[Any], arguments: Arguments) -> str:
        """Return the address of a view of one of its verbs, from the root of studio."""
        address = arguments.address(f"/{self.name}/{verb.name}")
        is_bare = verb.needs_form and "?" not in address
        return f"{address}?{RUN}=1" if is_bare else address


ROOMS: tuple[Room, ...] = (
    Room(
        "ask",
        "Ask",
        "Ask the model, and compare its answers before and after a patch.",
        (ask.ASK, explain.EXPLAIN),
        ("ask", "explain"),
    ),
    Room(
        "trace",
        "Trace",
        "Find the tokens, layers and neurons that carry a fact.",
        (trace.TRACE, neurons.NEURONS, trace.AT),
        ("trace", "neurons", "at"),
    ),
    Room(
        "lens",
        "Lens",
        "Watch an answer form, layer by layer.",
        (lens.LENS,),
    ),
    Room(
        "memory",
        "Memory",
        "Search the neurons, read their cards, and silence or amplify them.",
        (find.FIND, memory.NEURON, memory.INTERVENE, memory.CENSUS, index.INDEX),
        ("find", "neuron", "intervene", "census", "index"),
    ),
    Room(
        "patch",
        "Patch",
        "Correct a fact: plan it, preview the patch with its proof, and keep it.",
        PATCHING,
        ("plan",),
        template="rooms/patch.html",
    ),
    Room(
        "ledger",
        "Ledger",
        "Read the history of the patches, compare them, and take any of them back.",
        (
            ledger.LOG,
            ledger.SHOW,
            ledger.DIFF,
            moving.CHECKOUT,
            moving.REVERT,
            ledger.VERIFY,
            ledger.CAPACITY,
            ledger.STATUS,
            ledger.WEIGHTS,
        ),
        ("log", "diff", "verify", "capacity", "status", "weights"),
    ),
    Room(
        "judge",
        "Judge",
        "Compare editing methods on a benchmark.",
        JUDGING,
        ("judged", "evaluate"),
    ),
    Room(
        "export",
        "Export and push",
        "Write patches as files for other programs, or load them into a running server.",
        (*EXPORTING, *PUSHING),
        ("exports", "export", "push", "served"),
    ),
)
"""The rooms, in the order of the menu."""
