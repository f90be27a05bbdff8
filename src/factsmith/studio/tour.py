"""The guided tour: the story of the demonstration in five steps, done in the real rooms.

    place = standing(ledger)            # how far the workspace is, read from its records
    strip(3, place, "/patch/plan")      # what the note at the top of a page says
    STEPS[2].address(place)             # the page on which the step is done

Each step is the page of a room with its fields filled in, and the reader does what any user does
there. The browser remembers the step in a cookie, so the note stays on every page, also after a
job, until the reader leaves the tour. What is done is read from the ledger, so leaving and coming
back, a second tab or another program change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlencode

from starlette.requests import HTTPConnection

from .. import atlas
from ..atlas.story import PROMPT, SUBJECT, TARGET, WHY, correction
from ..keep.ledger import Ledger
from ..keep.revision import Revision
from .desk import Desk

ADDRESS = "/tour"

State = Literal["begin", "kept", "undone"]
"""How far the workspace is: the patch is not made, in effect, or taken back."""


@dataclass(frozen=True)
class Standing:
    """How far a workspace is in the story.

    Attributes:
        state: Whether the patch is made, and whether it is taken back.
        revision: The id of the newest patch of the story; "" when there is none.
    """

    state: State
    revision: str = ""


@dataclass(frozen=True)
class Step:
    """One step of the tour.

    Attributes:
        number: Its number, from 1.
        name: Its name for programs.
        title: Its title.
        sentences: What the reader sees on the page, and why.
        action: What the reader does there.
        address: Returns the page of the step.
        needs: The states of the workspace in which the step can be done.
        refusal: Why it cannot be done in other states.
        pages: The paths of the other pages on which it goes on.
    """

    number: int
    name: str
    title: str
    sentences: tuple[str, ...]
    action: str
    address: Callable[[Standing], str]
    needs: tuple[State, ...] = ("begin", "kept", "undone")
    refusal: str = ""
    pages: tuple[str, ...] = ()


def _page(path: str, *pairs: tuple[str, str]) -> str:
    return f"{path}?{urlencode(pairs)}" if pairs else path


def _ask(_: Standing) -> str:
    return _page("/ask/ask", ("prompt", PROMPT.replace("{}", SUBJECT)))


def _trace(_: Standing) -> str:
    return _page("/trace/trace", ("prompt", PROMPT.replace("{}", SUBJECT)), ("subject", SUBJECT))


def _patch(_: Standing) -> str:
    fact = correction()
    return _page(
        "/patch/plan",
        ("subject", fact.subject),
        ("prompt", fact.prompt),
        ("target", TARGET),
        *(("paraphrases", text) for text in fact.paraphrases),
        *(("neighbours", probe.prompt) for probe in fact.neighbours),
    )


def _show(standing: Standing) -> str:
    return _page("/ledger/show", ("revision", standing.revision))


STEPS = (
    Step(
        1,
        "believes",
        "What the model believes",
        (
            "The bundled model learnt real facts. It continues a sentence with the tokens that it "
            "finds most probable.",
            *WHY,
        ),
        "Look at the answer and at the next tokens, then go on.",
        _ask,
    ),
    Step(
        2,
        "lives",
        "Where the model stores that fact",
        (
            "Noise on the subject makes the model lose the answer. Each cell of the map then "
            "restores one clean state.",
            "A strong cell brings the answer back. At the last token of the subject, an early "
            "layer does: the fact is stored there.",
        ),
        "Point at the cells, or click one to see its neurons. Then go on.",
        _trace,
    ),
    Step(
        3,
        "patch",
        "The patch",
        (
            f"The form says what the model should answer: {TARGET}. It also holds other ways to "
            "ask, and neighbours: facts that must stay as they are.",
            "A preview solves for a small change of one matrix and measures it. Nothing is kept "
            "until you apply it.",
        ),
        "Press Preview the patch, read the proof, then press Apply.",
        _patch,
        pages=("/patch/preview", "/patch/apply"),
    ),
    Step(
        4,
        "proof",
        "The proof",
        (
            "Every question was asked before and after the patch. Efficacy counts the prompt, "
            "generalization the other ways to ask, and specificity the neighbours.",
            "The ledger keeps this proof with the patch.",
        ),
        "Scroll down and compare the answers before and after. Then go on.",
        _show,
        ("kept", "undone"),
        "There is no patch yet. Apply it in step 3 first.",
    ),
    Step(
        5,
        "undo",
        "The undo",
        (
            "A revert builds the weights again from the kept base matrices. They are equal to the "
            "base model's, bit for bit.",
        ),
        "Press Revert, then compare the fingerprints of the weights.",
        _show,
        ("kept",),
        "No patch is in effect. Apply it in step 3 first.",
    ),
)


def is_offered(model: str) -> bool:
    """Whether the tour can be taken in a workspace of this model: it needs the bundled facts."""
    return model in atlas.names()


def standing(ledger: Ledger) -> Standing:
    """Return how far a workspace is in the story. It is read from the records."""
    patches = [revision for revision in ledger.log() if _is_of_the_story(revision)]
    kept = [revision for revision in patches if revision.state == "active"]
    if kept:
        return Standing("kept", kept[0].id)
    undone = [revision for revision in patches if revision.state == "reverted"]
    return Standing("undone", undone[0].id) if undone else Standing("begin")


def _is_of_the_story(revision: Revision) -> bool:
    return revision.kind == "patch" and any(
        (fact.subject, fact.prompt, (fact.target or "").strip()) == (SUBJECT, PROMPT, TARGET)
        for fact in revision.facts
    )


@dataclass(frozen=True)
class Strip:
    """The note of the tour at the top of a page.

    Attributes:
        step: The step that the reader is at.
        total: The number of steps.
        at_step: Whether the page is the one on which the step is done.
        back: The address of the step before. "": there is none.
        forward: The address of the next step. "": it cannot be done yet, or there is none.
        refusal: Why the next step cannot be done yet. "": it can.
        next_title: The title of the next step. "": there is none.
        state: How far the workspace is.
        is_done: Whether what the step asks for is done.
        is_over: Whether the tour is at its end.
    """

    step: Step
    total: int
    at_step: bool
    back: str
    forward: str
    refusal: str
    next_title: str
    state: State
    is_done: bool
    is_over: bool


def strip(number: int, standing: Standing, path: str, subject: str = "") -> Strip:
    """Return the note for a page.

    Args:
        number: The step that the reader is at.
        standing: How far the workspace is.
        path: The path of the page, without its query.
        subject: The subject that the page is about; "" where it has none.
    """
    step = STEPS[number - 1]
    following = STEPS[number] if number < len(STEPS) else None
    can_go_on = following is not None and standing.state in following.needs
    return Strip(
        step=step,
        total=len(STEPS),
        at_step=path in (step.address(standing).partition("?")[0], *step.pages)
        and subject in ("", SUBJECT),
        back=address(number - 1) if number > 1 else "",
        forward=address(number + 1) if can_go_on else "",
        refusal=following.refusal if following is not None and not can_go_on else "",
        next_title=following.title if following is not None else "",
        state=standing.state,
        is_done=_is_done(step, standing),
        is_over=step.name == "undo" and standing.state == "undone",
    )


def was_done(step: Step, standing: Standing) -> bool:
    """Whether a step was done at any time; steps that only look are never done."""
    return _is_done(step, standing) or (step.name == "patch" and standing.state != "begin")


def _is_done(step: Step, standing: Standing) -> bool:
    """Whether a step is done now."""
    if step.name == "patch":
        return standing.state == "kept"
    return step.name == "undo" and standing.state == "undone"


def begin_at(standing: Standing) -> int:
    """Return the number of the step with which to begin, or to go on after a pause."""
    return {"begin": 1, "kept": 4, "undone": 1}[standing.state]


def strip_of(request: HTTPConnection, desk: Desk, path: str | None = None) -> Strip | None:
    """Return the note for a page, or None while the reader takes no tour.

    Args:
        request: The request, whose cookie says which step the reader is at.
        desk: The desk, whose ledger says what is done.
        path: The path of the page. None: that of the request.
    """
    step = step_numbered(request.cookies.get(cookie_name(request), ""))
    if step is None or not is_offered(desk.place.model):
        return None
    with desk.ledger() as ledger:
        subject = request.query_params.get("subject", "")
        return strip(step.number, standing(ledger), path or request.url.path, subject)


def cookie_name(request: HTTPConnection) -> str:
    """Return the name of the cookie: browsers send the cookies of one port to all of them."""
    return f"factsmith_tour_{request.url.port or 80}"


def address(number: int) -> str:
    """Return the address that begins a step."""
    return f"{ADDRESS}/{number}"


def step_numbered(text: str) -> Step | None:
    """Return the step with this number, from an address or a cookie; None when there is none."""
    return next((step for step in STEPS if str(step.number) == text), None)
