"""Second moments from where they are: a folder, beside the model, or computed now, from texts or from the model's own words.

moments = find_moments(lm, [3, 4, 5], folder="moments")   # what is not there is computed, and kept there
load_moments("moments")                                   # {3: SecondMoment(layer=3, ...), ...}
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..core.checks import check_limit
from ..core.errors import DamagedError, InputError
from ..core.progress import Progress, tell
from ..model.language_model import LanguageModel
from ..model.sample import own_text
from .moments import SecondMoment, enough_tokens, second_moments


def find_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    *,
    folder: str | os.PathLike[str] | None = None,
    texts: Iterable[str] | None = None,
    max_tokens: float | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    packed: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, SecondMoment]:
    """Second moments of some layers: those kept in `folder`, those that came with the model, else computed now.

    folder  where computed ones are kept as layer<l>.safetensors; None: nowhere
    texts   what to compute them from, whatever is kept; None: text that the model writes itself, from `seed`
    packed  keep them as `SecondMoment.save` packs them

    max_tokens (None: 16 a neuron of the widest layer), dtype and checkpoint are those of `second_moments`. A file for another model (by
    fingerprint), or of fewer tokens than max_tokens, is passed over. An edit takes its layers' from one text: what came with the model is
    computed anew where not all layers have it, and stays as it is. Raises LayerError, DamagedError for a file that cannot be read, and what
    `second_moments` raises.
    """
    layers = list(dict.fromkeys(layers))
    least = 0.0 if max_tokens is None else check_limit(max_tokens, "max_tokens")
    found = _kept(lm, layers, folder, least) if texts is None else {}
    came = (
        _kept(lm, [layer for layer in layers if layer not in found], _beside(lm), least)
        if texts is None
        else {}
    )
    every = found | came
    if (
        all(layer in every for layer in layers)
        and len({moment.corpus for moment in every.values()}) == 1
    ):
        return every
    missing = [layer for layer in layers if layer not in found]
    if missing:
        limit = enough_tokens(lm, missing, max_tokens)
        computed = second_moments(
            lm,
            own_corpus(lm, limit, seed, progress) if texts is None else texts,
            missing,
            max_tokens=limit,
            dtype=dtype,
            checkpoint=checkpoint,
            progress=lambda done: tell(
                progress, "second moments", done, None if math.isinf(limit) else round(limit)
            ),
        )
        for layer, moment in computed.items():
            if folder is not None and layer not in came:
                moment.save(moments_file(folder, layer), packed=packed)
            found[layer] = moment
    return found


def load_moments(folder: str | os.PathLike[str]) -> dict[int, SecondMoment]:
    """Every layer's second moment in a folder that `find_moments` filled, by layer; whose they are is checked where they are used.

    Raises DamagedError when there is none, or one cannot be read.
    """
    files = {
        int(file.stem[5:]): file
        for file in Path(folder).glob("layer*.safetensors")
        if file.stem[5:].isdecimal()
    }
    if not files:
        raise DamagedError(
            f"no second moments in {folder}; expected files named layer<number>.safetensors, as `factsmith moments` writes them"
        )
    return {layer: SecondMoment.load(file) for layer, file in sorted(files.items())}


def kept_moments(
    lm: LanguageModel,
    layers: Iterable[int],
    folder: str | os.PathLike[str] | None = None,
    least: float = 0,
) -> dict[int, SecondMoment]:
    """Those second moments of some layers that are in `folder` or came with the model, by layer; another model's are passed over.

    least  how many tokens they are of; those of fewer are passed over too
    """
    layers = list(layers)
    own = _kept(lm, layers, folder, least)
    return own | _kept(lm, [layer for layer in layers if layer not in own], _beside(lm), least)


def _kept(
    lm: LanguageModel, layers: Iterable[int], folder: str | os.PathLike[str] | None, least: float
) -> dict[int, SecondMoment]:
    """`kept_moments` of one folder."""
    files = {} if folder is None else {layer: moments_file(folder, layer) for layer in layers}
    held = {layer: SecondMoment.load(file) for layer, file in files.items() if file.is_file()}
    return {
        layer: m
        for layer, m in held.items()
        if m.fingerprint == lm.fingerprint and m.count > least - 1
    }


def keep_moments(
    moments: Mapping[int, SecondMoment], folder: str | os.PathLike[str], *, packed: bool = False
) -> None:
    """Write into a folder those second moments that it does not hold yet."""
    for layer, moment in moments.items():
        file = moments_file(folder, layer)
        held = SecondMoment.load(file) if file.is_file() else None
        if held is None or (held.fingerprint, held.corpus, held.count) != (
            moment.fingerprint,
            moment.corpus,
            moment.count,
        ):
            moment.save(file, packed=packed)


def moments_file(folder: str | os.PathLike[str], layer: int) -> Path:
    """Where a folder keeps the second moment of a layer."""
    return Path(folder) / f"layer{layer}.safetensors"


def own_corpus(
    lm: LanguageModel, n_tokens: float, seed: int, progress: Progress | None
) -> list[str]:
    """Text of about so many tokens that the model writes itself. Raises InputError for an infinite number, and as `own_text`."""
    if math.isinf(n_tokens):
        raise InputError(
            "max_tokens=inf reads a text to its end, and the model's own has none; give texts, or a number of tokens"
        )
    tell(progress, "sampling text", 0, round(n_tokens))
    return own_text(
        lm,
        round(n_tokens),
        seed=seed,
        progress=lambda done: tell(progress, "sampling text", done, round(n_tokens)),
    )


def moments_digest(
    moments: SecondMoment | Mapping[int, SecondMoment], layers: Sequence[int]
) -> str:
    """sha256 of the second moments of some layers, as it is recorded with a patch."""
    held = [moments] if isinstance(moments, SecondMoment) else [moments[layer] for layer in layers]
    digests = [
        hashlib.sha256(moment.matrix.detach().cpu().contiguous().numpy().data).hexdigest()
        for moment in held
    ]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    )


def _beside(lm: LanguageModel) -> Path | None:
    """The folder of second moments that came with the model: `moments` beside its weights."""
    source = getattr(lm.module.config, "_name_or_path", "")
    return Path(source) / "moments" if source and Path(source).is_dir() else None
