"""What edits are judged by: records of facts to write and questions to ask, from the benchmarks' own files or made from the bundled facts.

suite = load_suite("atlas", limit=100)                       # bundled
suite = load_suite("counterfact.json")                       # a file; its layout is recognised by its fields
suite = load_suite("zsre-rome:zsre_mend_eval.json")          # or named
suite.records[0].facts, suite.records[0].questions, suite.skipped

The layouts, by the name that `kind` takes:

counterfact       ROME's full schema (Meng et al. 2022, arXiv 2202.05262): paraphrases, neighbours, generation prompts; `attribute_prompts`
                  are not read. Where EasyEdit added a portability question or an alternative subject they are asked too
counterfact-slim  EasyEdit's: one rephrase and one neighbour a record. Most of its rephrase prompts are generation prompts, which need not
                  end where the object is due, so scores on them are not comparable with published paraphrase scores
zsre              MEND's (Mitchell et al. 2022, arXiv 2110.11309): the counterfactual `alt` is written, as MEND and EasyEdit do; the
                  portability question follows from it
zsre-rome         the same file as ROME, MEMIT and AlphaEdit use it: the true answer is written; never recognised, always named
mquake            MQuAKE-CF (Zhong et al. 2023, arXiv 2305.14795): several facts a record, three questions a multi-hop case. The hops
                  that no edit touches are asked as locality
knowedit          RippleEdits (Cohen et al. 2023, arXiv 2307.12976) in KnowEdit's layout: reasoning, aliasing, and logical generalisation as
                  "relation"; relation specificity and forgetfulness as locality
known             ROME's known_1000: what a model may know, nothing to write. Each fact has a target_true and no target, and its question
                  asks for the former: to find out what a model knows (edited, it would be made to forget)
wikibigedit       Thede et al. 2025 (arXiv 2503.05683), JSON or CSV; a persona's question counts as a paraphrase
qaedit            Yang et al. 2025 (arXiv 2502.11177)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..core.checks import check_count, check_seed, check_text
from ..core.errors import InputError
from .atlas_suite import atlas_suite
from .layouts import LAYOUTS, Entry, Layout, Refused
from .records import Malformed, Record, Suite


def load_suite(
    what: str | Path,
    *,
    kind: str | None = None,
    malformed: Literal["skip", "fatal"] = "skip",
    limit: int | None = None,
    seed: int = 0,
) -> Suite:
    """The records of a benchmark.

    what       "atlas"; a .json, .jsonl or .csv file; a hub dataset, owner/name or owner/name/file; or one of these with the layout's name
               in front ("zsre-rome:FILE")
    kind       the layout's name; None: recognised by its fields
    malformed  "skip": leave out and list in `skipped`; "fatal": an error, wherever in the file
    limit      a sample of so many usable records, drawn by seed; unless malformed ones are fatal, only those drawn are looked at. None: all
    seed       of the sample, and of what "atlas" draws

    Raises InputError for what is no suite, a file that cannot be read or is not of the layout, no usable record, and, if that is fatal, a
    malformed one.
    """
    if malformed not in ("skip", "fatal"):
        raise InputError(f"malformed is {malformed!r}; expected 'skip' or 'fatal'")
    limit = (
        None
        if limit is None
        else check_count(limit, "limit", "the number of records to draw", also="None for all")
    )
    seed = check_seed(seed)
    what = check_text(str(what) if isinstance(what, Path) else what, "the suite")
    if kind is not None and kind not in LAYOUTS:
        raise InputError(f"kind is {kind!r}; expected one of {', '.join(LAYOUTS)}, or None")
    named, _, rest = what.partition(":")
    if named in LAYOUTS and rest:
        if kind not in (None, named):
            raise InputError(
                f"{what!r} names the layout {named}, kind is {kind!r}; give one of them"
            )
        what, kind = rest, named
    if what == "atlas":
        if kind is not None:
            raise InputError(f"atlas is bundled and has no layout of a file; got kind {kind!r}")
        return atlas_suite(limit, seed)
    path = _find(what)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {what}: {error.strerror}; expected a file of records"
        ) from None
    rows = _rows(what, path.suffix.lower(), content)
    layout = _layout(what, rows, kind)
    records, skipped = _read(what, rows, layout, malformed == "fatal", limit, seed)
    return Suite(
        name=layout.name,
        records=records,
        skipped=skipped,
        source=what,
        digest=hashlib.sha256(content).hexdigest(),
    )


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _find(what: str) -> Path:
    """The file that is meant; raises InputError."""
    try:
        path = Path(what).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError):  # the last for a user's home that is none
        raise InputError(
            f"{what[:80]!r} cannot be the name of a file; expected atlas, a file or a hub dataset"
        ) from None
    if is_file:
        return path
    if is_folder:
        raise InputError(f"{what!r} is a folder; expected one .json, .jsonl or .csv file in it")
    if what in LAYOUTS:
        raise InputError(
            f"{what!r} is a layout, and its data is not bundled; download its file and give it as {what}:FILE"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[^:]+)?", what) and not what.startswith((".", "~")):
        return _download(what)
    raise InputError(
        f"no suite {what!r}: no file of this name; expected atlas, a .json, .jsonl or .csv file, or a hub dataset owner/name"
    )


def _download(what: str) -> Path:
    """A file of a hub dataset, from the cache where it is there; raises InputError."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, *inside = what.split("/", 2)
    try:
        if not inside:
            every = HfApi().list_repo_files(f"{owner}/{name}", repo_type="dataset")
            inside = [file for file in every if file.lower().endswith((".json", ".jsonl", ".csv"))]
            if len(inside) != 1:
                raise InputError(
                    f"dataset {what!r} has {len(inside)} .json, .jsonl and .csv files{': ' if inside else ''}{', '.join(inside[:12])}; "
                    f"name one as {what}/FILE, or download one and give its path"
                )
        return Path(hf_hub_download(f"{owner}/{name}", inside[0], repo_type="dataset"))
    except InputError:
        raise
    except Exception as error:  # hub, network and validation errors alike
        lines = str(error).splitlines() or [""]
        raise InputError(
            f"no file {what!r}, and no such hub dataset can be had ({type(error).__name__}: {lines[0]}); download the file where there is "
            "a network and give its path"
        ) from error


def _rows(what: str, suffix: str, content: bytes) -> list[Any]:
    """The records of a file as they stand; a line of JSON that is none comes as the error it makes. Raises InputError."""
    try:
        text = content.decode("utf-8-sig")
        if suffix == ".csv":
            rows: Any = list(csv.DictReader(io.StringIO(text), strict=True))
        elif suffix == ".jsonl":
            rows = _lines(text)
        else:
            try:
                rows = json.loads(text)
            except ValueError:
                rows = _lines(text)
                if not rows or isinstance(
                    rows[0], Exception
                ):  # no file of lines either: say what is wrong with the whole
                    raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(
            f"{what} cannot be read as {suffix.lstrip('.') or 'JSON'}: {error}; expected a list of records"
        ) from None
    if not isinstance(rows, list) or not rows:
        shape = f"a {type(rows).__name__}" if not isinstance(rows, list) else "empty"
        raise InputError(
            f"{what} is no suite: it is {shape}; expected a list of at least one record"
        )
    return rows


def _lines(text: str) -> list[Any]:
    rows: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                rows.append(error)
    return rows


def _layout(what: str, rows: Sequence[Any], kind: str | None) -> Layout:
    """The layout named, or the one that most of the first records are of; raises InputError."""
    first = [set(row) for row in rows[:200] if isinstance(row, Mapping)]
    fitting = {
        name: sum(layout.fields <= keys for keys in first)
        for name, layout in LAYOUTS.items()
        if name != "zsre-rome"
    }
    best = max(fitting, key=lambda name: (fitting[name], len(LAYOUTS[name].fields)))
    # Records that lack a field may be of a layout with fewer: what the others are of is meant.
    finer = [
        name
        for name in fitting
        if LAYOUTS[name].fields > LAYOUTS[best].fields and 2 * fitting[name] > fitting[best]
    ]
    best = max(finer, key=lambda name: fitting[name], default=best)
    if kind is not None and any(LAYOUTS[kind].fields <= keys for keys in first):
        return LAYOUTS[kind]
    if kind is None and fitting[best]:
        return LAYOUTS[best]
    found = ", ".join(sorted(map(str, first[0]))[:12]) if first else "no record of named fields"
    if kind is not None:
        like = f"; it looks like {best}" if fitting[best] else ""
        raise InputError(
            f"{what} is not of the layout {kind}: expected the fields {', '.join(sorted(LAYOUTS[kind].fields))}; got {found}{like}"
        )
    wanted = "; ".join(
        f"{name}: {', '.join(sorted(layout.fields))}"
        for name, layout in LAYOUTS.items()
        if name in fitting
    )
    raise InputError(
        f"{what} is of no layout that is known: its records have {found}; looked for {wanted}"
    )


def _read(
    what: str, rows: Sequence[Any], layout: Layout, fatal: bool, limit: int | None, seed: int
) -> tuple[tuple[Record, ...], tuple[Malformed, ...]]:
    """Usable records, all or a sample, in the file's order, and what was not usable."""
    order = list(range(len(rows)))
    if limit is not None:
        random.Random(seed).shuffle(order)
    found: dict[int, Record] = {}
    skipped: list[Malformed] = []
    for index in order:
        if len(found) == limit and not fatal:
            break
        dropped: list[Refused] = []
        record: Record | None = None
        try:
            if isinstance(rows[index], Exception):
                raise Refused("", f"is no JSON: {rows[index]}")
            record = layout.read(Entry(rows[index], dropped=dropped), index)
        except Refused as refused:
            dropped = [refused]
        if record is not None and len(found) != limit:
            found[index] = record
        skipped += [
            Malformed(what, index, each.field, each.message, whole=record is None)
            for each in dropped
        ]
    skipped.sort(key=lambda each: each.index)
    if fatal and skipped:
        raise InputError(
            f"{skipped[0]}; correct it, or let such records be left out (malformed='skip'; no --strict)"
        )
    if not found:
        raise InputError(
            f"{what} has no usable record of the layout {layout.name}; the first of {len(skipped)} errors: {skipped[0]}"
        )
    ids = Counter(record.id for record in found.values())
    unique = {
        at: record if ids[record.id] == 1 else replace(record, id=f"{record.id}#{at}")
        for at, record in sorted(found.items())
    }
    return tuple(unique.values()), tuple(skipped)
