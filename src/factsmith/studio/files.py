"""What browsers send and save besides pages: fact files, exports and reports.

    POST /patch/sheet            a dropped file or pasted text; goes to /patch/plan?sheet=DIGEST
    GET  /export/file/NAME       an export: its file, or its folder as a ZIP archive
    GET  /judge/file/NAME        the report of a campaign as one HTML page, to save

A file is found by its name in one folder of the workspace; nothing else is served.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from ..core.errors import FactsmithError, InputError
from ..keep.export.record import size_text
from ..keep.export.single import SUFFIX
from .desk import Desk
from .names import inside
from .sheets import Sheets
from .verbs.export import LARGEST_ARCHIVE, exports_folder
from .verbs.judge import PAGE, judged_folder
from .views import Views


def routes(desk: Desk, pages: Views) -> APIRouter:
    """Return the routes of files.

    Args:
        desk: The workspace.
        pages: Shows the form again where a file cannot be read.
    """
    router = APIRouter()

    async def add_sheet(request: Request) -> Response:
        try:
            name, content = await _sent(request)
            digest = await run_in_threadpool(Sheets(desk.folder).add, name, content)
        except FactsmithError as error:
            return await pages.refused(request, "plan", [], error)
        return RedirectResponse(f"/patch/plan?{urlencode({'sheet': digest})}", status_code=303)

    def export_file(name: str) -> Response:
        path = inside(exports_folder(desk.folder), name, "name")
        if path.suffix == SUFFIX and path.is_file():
            return _saved(path)
        if not path.is_dir():
            raise InputError(f"name is {name!r}: there is no such export", argument="name")
        return _archive(path)

    def report_file(name: str) -> Response:
        path = inside(judged_folder(desk.folder), name, "name") / PAGE
        if path.is_symlink() or not path.is_file():
            raise InputError(f"name is {name!r}: it has no report yet", argument="name")
        return _saved(path, f"{name}.html")

    router.add_api_route("/patch/sheet", add_sheet, methods=["POST"], response_model=None)
    router.add_api_route("/export/file/{name}", export_file, response_model=None)
    router.add_api_route("/judge/file/{name}", report_file, response_model=None)
    return router


async def _sent(request: Request) -> tuple[str, bytes]:
    """Return the name and the bytes of a dropped file, or "" and the text that was pasted."""
    async with request.form() as form:
        file, text = form.get("file"), form.get("text")
        if isinstance(file, UploadFile) and file.filename:
            if text:
                raise InputError(
                    f"the file {file.filename[:80]!r} and a pasted text were given; give one of "
                    "the two",
                    argument="sheet",
                )
            return file.filename, await file.read()
    return "", str(text or "").encode("utf-8", "replace")


def _saved(path: Path, name: str = "", task: BackgroundTask | None = None) -> FileResponse:
    """Return a file that the browser saves and does not show."""
    return FileResponse(
        path,
        filename=name or path.name,
        media_type="application/octet-stream",
        background=task,
    )


def _archive(folder: Path) -> FileResponse:
    """Return a folder as a ZIP archive, without links.

    Raises:
        InputError: when its files are too large.
    """
    files = [each for each in sorted(folder.rglob("*")) if each.is_file() and not each.is_symlink()]
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes > LARGEST_ARCHIVE:
        raise InputError(
            f"{folder.name} has {size_text(n_bytes)}, and an archive may have "
            f"{size_text(LARGEST_ARCHIVE)}; copy the folder {folder}",
            argument="name",
        )
    handle, name = tempfile.mkstemp(suffix=".zip")
    os.close(handle)
    with zipfile.ZipFile(name, "w") as archive:
        for file in files:
            archive.write(file, f"{folder.name}/{file.relative_to(folder).as_posix()}")
    remove = BackgroundTask(Path(name).unlink, missing_ok=True)
    return _saved(Path(name), f"{folder.name}.zip", remove)
