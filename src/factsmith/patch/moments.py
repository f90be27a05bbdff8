"""Second moments for editing: of the layers that edits go into, kept where they are looked for.

result = gather_moments(lm, folder="moments", texts=lines)
result.moments[3], result.folder
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.files import check_writable
from ..core.tables import Shown, Table
from ..corpus.moments import SecondMoment
from ..corpus.moments_cache import cache_file
from ..corpus.moments_store import find_moments, keep_moments, kept_moments, moments_file
from ..corpus.ordinary import DIGEST
from ..corpus.scan import Site
from ..edit.append_config import AppendConfig
from ..edit.configs import MemitConfig
from ..model.language_model import LanguageModel


@dataclass(frozen=True, repr=False)
class GatheredMoments(Shown):
    """Second moments by layer, and the folder that keeps them.

    Attributes:
        moments: {layer: SecondMoment}.
        folder: Where they are kept. None: with the model, or in the user's cache.
        computed: The layers whose files this run computed and wrote.
        copied: The layers whose files this run copied from kept ones.
        cached: The layers that are taken from the user's cache, or were put there, where no folder
            keeps them.
        site: Of what they are.
    """

    moments: Mapping[int, SecondMoment]
    folder: Path | None
    computed: tuple[int, ...] = ()
    copied: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    site: Site = "coefficients"

    def tables(self) -> list[Table]:
        """A line for each layer, and one for each file that was written."""
        lines = [
            f"layer {layer}: {moment.describe()}" for layer, moment in sorted(self.moments.items())
        ]
        if self.folder is not None:
            files = {x: moments_file(self.folder, x, self.site) for x in self.moments}
            lines += [f"wrote {files[layer]}" for layer in self.computed]
            lines += [f"wrote {files[layer]}, a copy of the kept one" for layer in self.copied]
        if self.cached:
            lines.append("kept in the cache; `factsmith cache` shows it")
        return [Table(line, {}) for line in lines]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the matrices are left out."""
        rows = [
            {
                "layer": layer,
                "d_ff": moment.d_ff,
                "tokens": moment.count,
                "site": moment.site,
                "split_half": moment.split_half,
                "excess": moment.excess,
                "corpus": moment.corpus,
            }
            for layer, moment in sorted(self.moments.items())
        ]
        return {
            "moments": rows,
            "folder": self.folder and str(self.folder),
            "computed": list(self.computed),
            "copied": list(self.copied),
            "cached": list(self.cached),
        }


def gather_moments(  # house: one argument more than `find_moments`, whose arguments these are
    lm: LanguageModel,
    layers: Iterable[int] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    find: Callable[..., dict[int, SecondMoment]] | None = None,
    max_tokens: float | None = None,
    texts: Iterable[str] | None = None,
    packed: bool = False,
    copy: bool = False,
    site: Site = "coefficients",
    **options: Any,
) -> GatheredMoments:
    """Find the second moments of some layers, or compute and keep them.

    A run that is killed and started again goes on where it stopped.

    Args:
        lm: The model.
        layers: The layers. None: those that the MEMIT family edits; of inputs also the layer where
            neurons are appended.
        folder: Where they are kept. None: in the user's cache.
        find: What finds them: `find_moments` of the model, or of a workbench.
        max_tokens: How many tokens of text to read, at least.
        texts: The text. None: the kept ones count; otherwise it is the bundled corpus.
        copy: Keep copies of those that came with the model, too.
        site: Of what: the "coefficients", or the "inputs", on which appended neurons draw.
        packed: Keep float16 Cholesky factors: a quarter of the bytes.
        options: As `find_moments`.

    Raises:
        InputError: Something would have to be computed that the cache does not keep, and there is
            no folder.
        WorkspaceError: The folder cannot be written. Otherwise as `find_moments`.
    """
    usual_layers = {*(MemitConfig.recommended(lm).edited or ())}
    if site == "inputs":
        usual_layers |= {*(AppendConfig.recommended(lm).edited or ())}
    chosen = sorted(set(layers) if layers else usual_layers)
    options["site"] = site
    if folder is None:
        usual = texts is None and max_tokens is None and options.get("dtype") is None
        kept = {} if texts else kept_moments(lm, chosen, least=max_tokens or 0, site=site)
        if len(kept) < len(chosen) and not usual:
            raise InputError(
                "there is no folder to keep the second moments in; name one, or a workspace",
                argument="out",
            )
        moments = find_moments(lm, chosen, **options) if usual else kept
        cached = [layer for layer in chosen if moments[layer].corpus == DIGEST]
        in_cache = [layer for layer in cached if cache_file(lm, layer, site).is_file()]
        return GatheredMoments(moments, None, cached=tuple(in_cache), site=site)
    place = Path(folder)
    check_writable(place)
    before = _times(place)
    moments = (find or partial(find_moments, lm))(
        chosen,
        folder=place,
        texts=texts,
        max_tokens=max_tokens,
        checkpoint=place / "unfinished.safetensors",
        packed=packed,
        **options,
    )
    after = _times(place)
    if copy:
        keep_moments(moments, place, packed=packed)
    return GatheredMoments(
        moments,
        place,
        _written(moments, before, after, site),
        _written(moments, after, _times(place), site),
        site=site,
    )


def _times(folder: Path) -> dict[str, int]:
    """Return when each file of a folder was last written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


def _written(
    layers: Iterable[int], before: Mapping[str, int], after: Mapping[str, int], site: Site
) -> tuple[int, ...]:
    """Return the layers of which a file is new or was written again."""
    changed = [name for name in after if after[name] != before.get(name)]
    stems = [name.removesuffix(".safetensors").partition("-")[0] for name in changed]
    return tuple(layer for layer in sorted(layers) if moments_file("", layer, site).stem in stems)
