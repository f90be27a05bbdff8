"""Open what a command works on: a model, or the workspace that holds one.

Torch and transformers take seconds to import. What needs a model imports them where it is called,
so that `--help` does not wait.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import atlas
from ..core.dtypes import SAVED_DTYPE
from ..core.errors import FactsmithError, InputError, WorkspaceError
from ..core.progress import Progress, stage
from ..keep.ledger import Ledger
from ..keep.model_place import model_place
from .loading import loading
from .printing import running

if TYPE_CHECKING:
    from ..corpus.moments import SecondMoment
    from ..corpus.scan import Site
    from ..keep.workbench import Workbench
    from ..model.language_model import LanguageModel


def need_model(
    model: str | None,
    workspace: Path | None,
    *,
    text: str = "",
    error: type[FactsmithError] = InputError,
) -> None:
    """Raise an error when there is neither a model nor a workspace.

    Args:
        model: The model. None: the user named none.
        workspace: The workspace. None: the current folder, if it is one.
        text: The text that the model should read. It may be the name of a bundled model, where the
            user forgot the text.
        error: The error to raise.
    """
    if model is not None or workspace is not None or _is_workspace(Path()):
        return
    command = getattr(running.get(), "name", None) or "ask"
    if text in atlas.names():
        raise InputError(
            f"the text is missing: {text!r} is a bundled model. Give a text after it: "
            f'`factsmith {command} {text} "..."`'
        )
    rest = ' "..."' if text else " ..."
    raise error(
        "no model was given, and this folder is not a workspace; name a model "
        f"(`factsmith {command} atlas{rest}`) or a workspace (-w DIR), or make a workspace with "
        "`factsmith init MODEL`"
    )


def load_model(name: str, device: str | None, dtype: str | None, tell: Progress) -> LanguageModel:
    """Load a model by its name, as the options say.

    Args:
        name: The model.
        device: Where to put it.
        dtype: The dtype that a workspace has recorded, such as "float32". None: no workspace.
        tell: Gets what is being done.
    """
    chosen = loading.get()
    stage(tell, "loading")
    tell(f"loading {Path(name).name}", 0, None)
    with _uncollected():
        from ..model.load import load

        return load(
            name,
            device=device,
            dtype=dtype or chosen.dtype,
            revision=chosen.revision,
            attn_implementation=chosen.attn_implementation,
            trust_remote_code=chosen.trust_remote_code,
            progress=tell,
        )


_frozen = False
"""Whether what this process had after its first load is left out of collections."""


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Run a block without the garbage collector.

    Loading makes a million objects that all stay. The collector would look through them again and
    again, which takes a quarter of the time. What is there afterwards is not looked through again.
    """
    global _frozen
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if not _frozen:
            gc.freeze()
            _frozen = True
    finally:
        if was_enabled:
            gc.enable()


def workspace_of(model: str | None, workspace: Path | None) -> Path | None:
    """Return the workspace that `opened` would open; None where it would open a model alone."""
    if workspace is not None:
        return workspace
    if model is None or _holds(Path(), model):
        return Path()
    return Path(model) if _is_workspace(Path(model)) else None


def read_moments(
    folder: Path | None, tell: Progress, site: Site = "coefficients"
) -> dict[int, SecondMoment] | None:
    """Return the second moments of a folder, before a model is loaded; None without a folder."""
    if folder is None:
        return None
    tell("reading second moments", 0, None)
    from ..corpus.moments_store import load_moments

    return load_moments(folder, site)


@contextlib.contextmanager
def opened(
    model: str | None, workspace: Path | None, device: str | None, tell: Progress
) -> Iterator[tuple[LanguageModel, Workbench | None]]:
    """Open a model, and the workbench that holds it, if there is a workspace.

    The workspace is the one given, or the current folder if it was made for this model. A model
    may also be the folder of a workspace.
    """
    need_model(model, workspace, error=WorkspaceError)
    if workspace is None and model is not None and _holds(Path(), model):
        workspace = Path()
    if workspace is None and model is not None and not _is_workspace(Path(model)):
        yield load_model(model, device, None, tell), None
        return
    if workspace is None:
        workspace, model = Path(model or ""), None
    with opened_workspace(workspace, device, tell, model) as bench:
        yield bench.lm, bench


@contextlib.contextmanager
def opened_workspace(
    workspace: Path | None, device: str | None, tell: Progress, model: str | None = None
) -> Iterator[Workbench]:
    """Open a workspace (default: the current folder) with its model, or another name of it."""
    folder = workspace or Path()
    with Ledger(folder) as ledger:
        recorded, dtype = ledger.model, ledger.dtype
    chosen = loading.get()
    if chosen.dtype not in (None, SAVED_DTYPE, dtype):
        raise InputError(
            f"{folder} was made for {recorded!r} in {dtype}, and dtype is {chosen.dtype}. The "
            "patches of a workspace are made for the weights of one dtype: leave the option out, "
            f"or make another workspace with `factsmith init {recorded} --dtype {chosen.dtype}`",
            argument="dtype",
        )
    recorded_revision = recorded.partition("@")[2]
    if chosen.revision is not None and model is None and recorded_revision != chosen.revision:
        raise InputError(
            f"{folder} was made for {recorded!r}, and revision is {chosen.revision!r}; leave it "
            "out, or make another workspace",
            argument="revision",
        )
    name = model or model_place(recorded)
    with _recorded_revision(model):
        lm = load_model(name, device, dtype, tell)
    tell("checking the weights", 0, None)
    from ..keep.workbench import Workbench

    with Workbench(lm, folder) as bench:
        yield bench


@contextlib.contextmanager
def _recorded_revision(model: str | None) -> Iterator[None]:
    """A block in which the revision is the one in the workspace's name of the model."""
    token = loading.set(replace(loading.get(), revision=None) if model is None else loading.get())
    try:
        yield
    finally:
        loading.reset(token)


def _is_workspace(folder: Path) -> bool:
    return (folder / "ledger.db").is_file()


def _holds(folder: Path, model: str) -> bool:
    """Whether a folder is a workspace that was made for this model."""
    if not _is_workspace(folder):
        return False
    with Ledger(folder) as ledger:
        revision = loading.get().revision
        name = model if revision is None else f"{model}@{revision}"
        return ledger.model in (name, str(Path(model).resolve()))
