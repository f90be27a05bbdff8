"""Second moments of the bundled corpus in the user's cache, so that they are computed once a model.

    cached_moments(lm, [3, 4])           {3: SecondMoment(layer=3, ...)}: those that are there
    cache_moments(lm, moments)           the moments to use, after they were put into the cache

A file is named by the model's fingerprint, the corpus and the layer. It is written in one step, so
several processes may use the cache at once. What cannot be read or written is passed over with a
note: the cache is never needed.

A file holds the lower triangle in float32: 2 · d_ff · (d_ff + 1) bytes, 4.7 MB for 1,536 neurons
and 411 MB for 14,336. The numbers are exactly those that the first edit used, on any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..core.cache import MODEL_FILE, cache_folders
from ..core.errors import FactsmithError
from ..core.files import make_folder, write_file
from ..core.progress import Progress, note
from ..model.language_model import LanguageModel
from .moments_file import moments_file
from .ordinary import DIGEST, NAME
from .scan import Site
from .second_moment import SecondMoment


def cache_file(lm: LanguageModel, layer: int, site: Site = "coefficients") -> Path:
    """Return the file of the cache that is for a layer of a model."""
    corpus = DIGEST[: len(NAME) + 9]
    return moments_file(_model_folder(lm) / corpus, layer, site)


def _model_folder(lm: LanguageModel) -> Path:
    return cache_folders()[0] / "moments" / lm.fingerprint[:16]


def cached_moments(
    lm: LanguageModel,
    layers: Iterable[int],
    least: float = 0,
    progress: Progress | None = None,
    site: Site = "coefficients",
) -> dict[int, SecondMoment]:
    """Return the second moments of the bundled corpus that the cache has, by layer.

    A file that is damaged, or of another model, layer or corpus, is passed over with a note.

    Args:
        lm: The model.
        layers: The layers to look for.
        least: Files of fewer tokens are passed over.
        progress: Gets the notes.
        site: Of what they are.
    """
    moments = {}
    for layer in layers:
        file = cache_file(lm, layer, site)
        moment, problem = _read(lm, file, layer)
        if problem:
            note(progress, f"{problem}. It is passed over, and computed again.")
        if moment is not None and moment.count > least - 1:
            moments[layer] = moment
    return moments


def _read(lm: LanguageModel, file: Path, layer: int) -> tuple[SecondMoment | None, str]:
    """Return the second moment of a file, and what is wrong with the file."""
    try:
        if not file.is_file():
            return None, ""
        moment = SecondMoment.load(file, lm, layer)
    except OSError as error:
        return None, f"cannot read {file}: {error.strerror or error}"
    except FactsmithError as error:
        return None, f"{file} in the cache cannot be used: {error}"
    if moment.corpus != DIGEST or moment.layer != layer or not moment.fingerprint:
        return None, f"{file} in the cache is of another corpus, model or layer"
    return moment, ""


def cache_moments(
    lm: LanguageModel, moments: Mapping[int, SecondMoment], progress: Progress | None = None
) -> dict[int, SecondMoment]:
    """Put second moments of the bundled corpus into the cache, and return those to use.

    Where another process was faster, its moments are used, so that all edits have the same.

    Args:
        lm: The model.
        moments: {layer: its second moment}.
        progress: Gets a note where the cache cannot be written.
    """
    used = dict(moments)
    for layer, moment in moments.items():
        file = cache_file(lm, layer, moment.site)
        earlier, _ = _read(lm, file, layer)
        if earlier is not None:
            used[layer] = earlier
            continue
        try:
            moment.save(file, triangle=True)
        except FactsmithError as error:
            note(
                progress,
                f"The second moments are not kept in the cache: {error}. They are computed again "
                f"the next time.",
            )
            return used
    _name_folder(lm)
    return used


def _name_folder(lm: LanguageModel) -> None:
    """Write the model's name into its folder of the cache."""
    file = _model_folder(lm) / MODEL_FILE
    try:
        if not file.exists():
            make_folder(file.parent)
            write_file(file, f"{lm.name}\n".encode())
    except OSError:
        pass  # the name only helps people


def rounded(moment: SecondMoment) -> SecondMoment:
    """Return a second moment as a file of the cache holds it, in float32."""
    return dataclasses.replace(moment, matrix=moment.matrix.float())
