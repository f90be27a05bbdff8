"""Second moments of a model: kept in a folder, shipped with the model, cached, or computed now.

    moments = find_moments(lm, [3, 4, 5], folder="moments")  # computes the missing, keeps them
    load_moments("moments")                                  # {3: SecondMoment(layer=3, ...), ...}

A folder keeps them as layer<number>.safetensors, and those of inputs as inputs<number>.safetensors.
A second moment of the same layer from another text goes to layer<number>-<digest>.safetensors,
since patches may have been made with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..core.artefact import read_metadata
from ..core.checks import check_limit
from ..core.errors import DamagedError, InputError
from ..core.identity import present_fingerprint
from ..core.progress import Progress, note, tell
from ..model.language_model import LanguageModel
from ..model.sample import own_text
from .measuring import ENOUGH_EXCESS, enough_tokens
from .moments import SecondMoment, moments_with_total
from .moments_cache import cache_moments, cached_moments, rounded
from .moments_file import moments_file as moments_file
from .ordinary import DIGEST, ordinary_texts
from .own import is_own
from .scan import Site

_LOOKED_AT, _MOST_UNKNOWN = 20, 0.1
"""Passages whose tokens are looked at, and the share of unknown ones that is too large."""


def find_moments(  # house: a promised public signature
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
    site: Site = "coefficients",
    progress: Progress | None = None,
) -> dict[int, SecondMoment]:
    """Return second moments of some layers: kept ones, shipped ones, or new ones.

    They are looked for in the folder, then with the model, then in the user's cache. What is
    missing is computed from the bundled corpus, and kept in the folder and in the cache. A file of
    another model (by fingerprint), or of fewer tokens than `max_tokens`, is passed over. An edit
    takes the moments of all its layers from one text. So if the kept and the shipped ones lack some
    layers, or are from several texts, those of the bundled corpus are taken for all layers. Files
    of other texts stay.

    Args:
        lm: The model.
        layers: The layers.
        folder: Where kept ones are, and where new ones are written. None: the cache alone.
        texts: The texts to compute from; kept, shipped and cached ones are then not used. "own":
            text that the model writes itself. None: the bundled corpus, `ordinary_texts()`.
        max_tokens: As for `second_moments`.
        dtype: As for `second_moments`. New ones in another dtype stay out of the cache, and so do
            those of a given number of tokens.
        checkpoint: As for `second_moments`.
        packed: Whether new ones are written packed, as `SecondMoment.save` does.
        seed: The seed of the model's own text.
        site: Of what: the "coefficients", or the "inputs", on which appended neurons draw.
        progress: Gets the progress of sampling and of the pass, and notes.

    Raises:
        LayerError: The model has no such layer.
        DamagedError: A file of the folder, or of the model, cannot be read.
        InputError: As `second_moments`; or max_tokens is infinite, and the model is to write.
    """
    layers = list(dict.fromkeys(layers))
    least = 0.0 if max_tokens is None else check_limit(max_tokens, "max_tokens")
    kept: dict[int, SecondMoment] = {}
    shipped: dict[int, SecondMoment] = {}
    if texts is None:
        kept = _read(lm, layers, folder, least, site)
        missing = [layer for layer in layers if layer not in kept]
        shipped = _read(lm, missing, _shipped_folder(lm), least, site)
    known = kept | shipped
    from_one_text = len({moment.corpus for moment in known.values()}) == 1
    if from_one_text and all(layer in known for layer in layers):
        return known
    computing = _Computing(lm, max_tokens, dtype, checkpoint, progress, site)
    if texts is None:
        known = {} if folder is None else _of_bundled_text(lm, layers, folder, least, site)
        new = computing.or_cached([layer for layer in layers if layer not in known])
    else:
        known = {}
        new = computing.of(layers, computing.own_texts(layers, seed) if is_own(texts) else texts)
    for layer, moment in new.items():
        if folder is not None:
            by_digest = layer in kept or layer in shipped
            keep_version(moment, layer, folder, by_digest, packed=packed, triangle=texts is None)
    return known | new


@dataclass(frozen=True)
class _Computing:
    """How second moments are computed where none are kept: the arguments of `find_moments`."""

    lm: LanguageModel
    max_tokens: float | None
    dtype: torch.dtype | None
    checkpoint: str | os.PathLike[str] | None
    progress: Progress | None
    site: Site

    def of(self, layers: Sequence[int], texts: Iterable[str]) -> dict[int, SecondMoment]:
        """Compute them from texts."""
        return moments_with_total(
            self.lm,
            texts,
            layers,
            max_tokens=self.max_tokens,
            dtype=self.dtype,
            checkpoint=self.checkpoint,
            site=self.site,
            progress=partial(tell, self.progress, "second moments"),
        )

    def own_texts(self, layers: Sequence[int], seed: int) -> list[str]:
        """Return texts that the model writes itself, as many as are read."""
        limit = enough_tokens(self.lm, layers, self.max_tokens, self.site)
        return own_corpus(self.lm, limit, seed, self.progress)

    def or_cached(self, layers: Sequence[int]) -> dict[int, SecondMoment]:
        """Return those of the bundled corpus: from the cache, or computed and put there."""
        usual = self.max_tokens is None and self.dtype is None
        least = self.max_tokens or 0
        cached = cached_moments(self.lm, layers, least, self.progress, self.site)
        missing = [layer for layer in layers if layer not in cached]
        if not missing:
            return cached
        _warn_of_language(self.lm, self.progress)
        computed = self.of(missing, ordinary_texts())
        computed = {layer: rounded(moment) for layer, moment in computed.items()}
        if usual:
            _warn_of_excess(computed, self.progress)
            computed = cache_moments(self.lm, computed, self.progress)
        return cached | computed


def _warn_of_language(lm: LanguageModel, progress: Progress | None) -> None:
    """Send a note if the tokenizer does not know much of the bundled corpus."""
    unknown = lm.tokenizer.unk_token_id
    if unknown is None:
        return
    some = itertools.islice(ordinary_texts(), _LOOKED_AT)
    ids = [
        token for text in some for token in lm.tokenizer(text, add_special_tokens=False).input_ids
    ]
    share = ids.count(unknown) / max(len(ids), 1)
    if share > _MOST_UNKNOWN:
        note(
            progress,
            f"The tokenizer of {lm.name} does not know {100 * share:.0f} % of the bundled English "
            "text, so the second moments say little about the model. Give texts in its language.",
            argument="texts",
        )


def _warn_of_excess(moments: Mapping[int, SecondMoment], progress: Progress | None) -> None:
    """Send a note if the bundled corpus was not enough for a layer."""
    thin = {
        layer: moment
        for layer, moment in moments.items()
        if moment.excess is None or moment.excess > ENOUGH_EXCESS
    }
    if thin:
        layer, moment = max(thin.items(), key=lambda pair: pair[1].excess or 2.0)
        note(
            progress,
            f"The bundled text ended before the second moments were as exact as usual (layer "
            f"{layer}: {moment.describe()}). Give more text of your own where it matters.",
            argument="texts",
        )


def load_moments(
    folder: str | os.PathLike[str], site: Site = "coefficients"
) -> dict[int, SecondMoment]:
    """Return every second moment in a folder that `find_moments` filled, by layer.

    Their model is checked where they are used.

    Args:
        folder: The folder.
        site: Of what: the "coefficients", or the "inputs", on which appended neurons draw.

    Raises:
        DamagedError: There is no file, or one cannot be read.
    """
    stem = moments_file("", 0, site).stem.removesuffix("0")
    files = {
        int(number): file
        for file in Path(folder).glob(f"{stem}*.safetensors")
        if (number := file.stem.removeprefix(stem)).isdecimal()
    }
    if not files:
        what, option = (
            ("input statistics", " --inputs") if site == "inputs" else ("second moments", "")
        )
        raise DamagedError(
            f"there are no {what} in {folder}; expected files named "
            f"{stem}<number>.safetensors, as `factsmith moments{option}` writes them"
        )
    return {layer: _read_layer(file, layer) for layer, file in sorted(files.items())}


def kept_moments(
    lm: LanguageModel,
    layers: Iterable[int],
    folder: str | os.PathLike[str] | None = None,
    least: float = 0,
    site: Site = "coefficients",
) -> dict[int, SecondMoment]:
    """Return the second moments that are there without work, by layer.

    They are looked for in a folder, then with the model, then in the user's cache. Files of another
    model are passed over.

    Args:
        lm: The model.
        layers: The layers to look for.
        folder: The folder. None: no folder.
        least: Files of fewer tokens are passed over.
        site: Of what they are.
    """
    layers = list(layers)
    kept = _read(lm, layers, folder, least, site)
    rest = [layer for layer in layers if layer not in kept]
    kept |= _read(lm, rest, _shipped_folder(lm), least, site)
    rest = [layer for layer in layers if layer not in kept]
    return kept | cached_moments(lm, rest, least, site=site)


def _read(
    lm: LanguageModel,
    layers: Iterable[int],
    folder: str | os.PathLike[str] | None,
    least: float,
    site: Site,
) -> dict[int, SecondMoment]:
    """Return the second moments of this model in one folder, by layer."""
    files = {layer: moments_file(folder, layer, site) for layer in layers} if folder else {}
    read = {layer: _read_layer(file, layer) for layer, file in files.items() if file.is_file()}
    return {
        layer: moment
        for layer, moment in read.items()
        if moment.count > least - 1 and lm.has_fingerprint(moment.fingerprint)
    }


def _of_bundled_text(
    lm: LanguageModel,
    layers: Iterable[int],
    folder: str | os.PathLike[str],
    least: float,
    site: Site,
) -> dict[int, SecondMoment]:
    """Return the second moments of this model and the bundled corpus in one folder, by layer."""
    moments = {}
    for layer in layers:
        for file in _versions(folder, layer, site):
            if read_metadata(file).get("corpus") == DIGEST:
                moment = _read_layer(file, layer)
                if moment.count > least - 1 and lm.has_fingerprint(moment.fingerprint):
                    moments[layer] = moment
                    break
    return moments


def _versions(folder: str | os.PathLike[str], layer: int, site: Site) -> list[Path]:
    """Return the files of a layer: the one that counts, and those of other texts."""
    file = moments_file(folder, layer, site)
    others = sorted(Path(folder).glob(f"{file.stem}-*{file.suffix}"))
    return [file, *others] if file.is_file() else others


def recorded_moments(
    folder: str | os.PathLike[str], layers: Sequence[int], digest: str
) -> dict[int, SecondMoment] | None:
    """Return the second moments in a folder that a patch was made with; None if they are gone.

    Args:
        folder: The folder.
        layers: The layers of the patch.
        digest: What `moments_digest` gave for them.
    """
    sites: tuple[Site, ...] = ("coefficients", "inputs")
    by_text: dict[tuple[str, Site], dict[int, list[SecondMoment]]] = {}
    for layer, site in itertools.product(layers, sites):
        for file in _versions(folder, layer, site):
            with contextlib.suppress(DamagedError):
                moment = _read_layer(file, layer)
                by_text.setdefault((moment.corpus, site), {}).setdefault(layer, []).append(moment)
    for versions in by_text.values():
        for chosen in itertools.product(*(versions.get(layer, ()) for layer in layers)):
            moments = dict(zip(layers, chosen, strict=True))
            if moments_digest(moments, list(layers)) == digest:
                return moments
    return None


def keep_version(
    moment: SecondMoment,
    layer: int,
    folder: str | os.PathLike[str],
    by_digest: bool = False,
    **layout: bool,
) -> Path:
    """Write a second moment into a folder, and return its file.

    Args:
        moment: The second moment.
        layer: Its layer.
        folder: The folder.
        by_digest: Name the file by the digest, since another one counts for the layer. Otherwise it
            counts from now on, and an earlier one of the same model is renamed.
        layout: As for `SecondMoment.save`.
    """
    file = moments_file(folder, layer, moment.site)
    if by_digest:
        file = _by_digest(file, moment)
    elif file.is_file():
        with contextlib.suppress(DamagedError):
            earlier = _read_layer(file, layer)
            of_model = present_fingerprint(earlier.fingerprint)
            other = _by_digest(file, earlier)
            same = other == _by_digest(file, moment)
            if of_model == present_fingerprint(moment.fingerprint) and not same:
                file.replace(other)
    moment.save(file, **layout)
    return file


def _by_digest(file: Path, moment: SecondMoment) -> Path:
    return file.with_stem(f"{file.stem}-{moments_digest(moment, ())[:12]}")


def _read_layer(file: Path, layer: int) -> SecondMoment:
    """Return the second moment of a file whose name says which layer it is of."""
    moment = SecondMoment.load(file)
    if moment.layer not in (None, layer):
        raise DamagedError(
            f"{file} holds the second moment of layer {moment.layer}, and its name says layer "
            f"{layer}; give it its own name, or compute the second moment of layer {layer} again"
        )
    return moment


def keep_moments(
    moments: Mapping[int, SecondMoment], folder: str | os.PathLike[str], *, packed: bool = False
) -> None:
    """Write into a folder those second moments that it does not hold yet."""
    for layer, moment in moments.items():
        file = moments_file(folder, layer, moment.site)
        present = _read_layer(file, layer) if file.is_file() else None
        if present is None or _source(present) != _source(moment):
            keep_version(moment, layer, folder, packed=packed)


def _source(moment: SecondMoment) -> tuple[str, str, int]:
    return present_fingerprint(moment.fingerprint), moment.corpus, moment.count


def own_corpus(
    lm: LanguageModel, n_tokens: float, seed: int, progress: Progress | None
) -> list[str]:
    """Return texts of about n_tokens tokens in all that the model writes itself.

    Raises:
        InputError: n_tokens is infinite, or the tokenizer has no start token.
    """
    if math.isinf(n_tokens):
        raise InputError(
            "max_tokens is infinite, which reads texts to their end, and there are no texts; give "
            "texts, or a number of tokens",
            argument="max_tokens",
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
    """Return the sha256 (hex) of some layers' matrices, as a patch records it."""
    if isinstance(moments, SecondMoment):
        chosen = [moments]
    else:
        chosen = [moments[layer] for layer in layers]
    digests = [
        hashlib.sha256(moment.matrix.detach().cpu().contiguous().numpy().data).hexdigest()
        for moment in chosen
    ]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _shipped_folder(lm: LanguageModel) -> Path | None:
    """Return the folder of second moments that came with the model: `moments` in its folder."""
    source = getattr(lm.module.config, "_name_or_path", "")
    return Path(source) / "moments" if source and Path(source).is_dir() else None
