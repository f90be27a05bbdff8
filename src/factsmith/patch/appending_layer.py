"""The layer to append neurons to: the one that came with the model, or measured once a model.

    appending_layer(bench, choice, sources, measure=True)        # 6

MEMIT's layers are the candidates: there the layers above can still use what is written. Among them
`edit.append_layer` measures where subjects can be told apart. That takes input statistics of the
candidates and a minute at most, so the answer is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..core.cache import cache_folders
from ..core.files import make_folder, write_file
from ..core.progress import Progress, note
from ..edit.append_config import AppendConfig
from ..edit.append_layer import choose_layer
from ..edit.configs import by_depth, shipped
from ..edit.contexts import generate_openings
from ..model.language_model import LanguageModel
from .bench import Bench
from .layer_choice import LayerChoice
from .recipe import Sources


def appending_layer(
    bench: Bench,
    choice: LayerChoice,
    sources: Sources,
    progress: Progress | None = None,
    *,
    measure: bool,
) -> int:
    """Return the layer to append to: shipped, measured earlier or now, or the middle candidate.

    Args:
        bench: The model. It is measured without what it carries.
        choice: The layers that other methods edit.
        sources: Where input statistics come from.
        progress: Called with the step's name, how much is done, and how much there is.
        measure: Whether the layer is measured, if nothing is known.
    """
    lm = bench.lm
    shipped_layer = shipped(AppendConfig, lm).get("layer")
    candidates = _candidates(lm, choice)
    if shipped_layer is not None or len(candidates) == 1:
        return candidates[0] if shipped_layer is None else int(shipped_layer)
    with bench.on_base():
        layer = _kept(lm, candidates)
        if layer is not None:
            return layer
        if not measure:
            return candidates[(len(candidates) - 1) // 2]
        statistics = bench.moments(candidates, sources, progress, "inputs")
        openings = generate_openings(lm, sources.seed)
        layer, measured = choose_layer(lm, [], candidates, openings, statistics, progress)
        _keep(lm, candidates, layer, measured, progress)
    return layer


def _candidates(lm: LanguageModel, choice: LayerChoice) -> list[int]:
    layers = choice.memit or by_depth(lm.n_layers, choice.rome)
    return [layer for layer in layers if not lm.ffn[layer].n_experts] or [choice.rome]


def _file(lm: LanguageModel) -> Path:
    return cache_folders()[0] / "moments" / lm.fingerprint[:16] / "append.json"


def _kept(lm: LanguageModel, candidates: Sequence[int]) -> int | None:
    """Return the layer that was measured earlier among the same candidates; None: none was."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(_file(lm).read_text())
        if record["candidates"] == list(candidates) and record["layer"] in candidates:
            return int(record["layer"])
    return None


def _keep(
    lm: LanguageModel,
    candidates: Sequence[int],
    layer: int,
    measured: dict[int, tuple[float, float]],
    progress: Progress | None,
) -> None:
    """Keep what was measured, for the next time."""
    record = {
        "candidates": list(candidates),
        "layer": layer,
        "measured": {str(each): list(shares) for each, shares in measured.items()},
    }
    try:
        make_folder(_file(lm).parent)
        write_file(_file(lm), f"{json.dumps(record)}\n".encode())
    except OSError as error:
        note(progress, f"The layer for appended neurons is not kept in the cache: {error}.")
