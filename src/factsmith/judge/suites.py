"""Suites of records, from the benchmarks' own files or from the bundled facts.

    suite = load_suite("atlas", limit=100)                       # bundled
    suite = load_suite("counterfact.json")                       # a file, recognised by its fields
    suite = load_suite("zsre-rome:zsre_mend_eval.json")          # a file with a named layout
    suite = load_suite("my.json", fields={"prompt": "question", "target": "answer"})
    suite.records[0].facts, suite.records[0].questions, suite.skipped

The layouts, by the name that `kind` takes:

counterfact       ROME's full schema (Meng et al. 2022, arXiv 2202.05262): paraphrases, neighbours,
                  generation prompts. `attribute_prompts` are not read. If EasyEdit added a
                  portability question or an alternative subject, they are asked too.
counterfact-slim  EasyEdit's schema: one rephrase and one neighbour a record. Most of its rephrase
                  prompts are generation prompts, which need not end where the object follows.
                  Scores on them are not comparable with published paraphrase scores.
zsre              MEND's file (Mitchell et al. 2022, arXiv 2110.11309). The counterfactual `alt` is
                  written, as MEND and EasyEdit do. The portability question follows from it.
zsre-rome         The same file as ROME, MEMIT and AlphaEdit use it: the true answer is written.
                  This layout is never recognised; name it.
mquake            MQuAKE-CF (Zhong et al. 2023, arXiv 2305.14795): several facts a record, three
                  questions a multi-hop case. The hops that no edit touches are asked as locality.
knowedit          RippleEdits (Cohen et al. 2023, arXiv 2307.12976) in KnowEdit's layout: reasoning,
                  aliasing, and logical generalisation as "relation". Relation specificity and
                  forgetfulness count as locality.
known             ROME's known_1000: facts that a model may know, with nothing to write. Each fact
                  has a target_true and no target, and its question asks for the target_true. Use it
                  to find out what a model knows.
wikibigedit       Thede et al. 2025 (arXiv 2503.05683), JSON or CSV. A persona's question counts as
                  a paraphrase.
qaedit            Yang et al. 2025 (arXiv 2502.11177).
facts             Records of your own: subject, prompt and target, and whatever else `fields.NAMES`
                  names. Records with other names for these are read by a mapping, `fields`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..core.checks import check_count, check_seed, check_text
from ..core.errors import InputError
from ..core.filetext import decoded, fault_in_line, json_lines, table
from .atlas_suite import atlas_suite
from .entry import Entry, FieldError
from .fields import (
    REQUIRED,
    check_fields,
    check_names,
    check_present,
    read_mapped,
    seen_fields,
    value_at,
    with_value,
)
from .layouts import LAYOUTS, Layout
from .records import Malformed, Record, Suite

_FIRST = 200
"""Records that show the layout."""

_FORMATS = ".json, .jsonl, .csv or .tsv"


def load_suite(
    what: str | Path,
    *,
    kind: str | None = None,
    fields: Mapping[str, str] | None = None,
    malformed: Literal["skip", "fatal"] = "skip",
    limit: int | None = None,
    seed: int = 0,
) -> Suite:
    """Return the records of a benchmark.

    Args:
        what: "atlas"; a .json, .jsonl, .csv or .tsv file; or a hub dataset, owner/name or
            owner/name/file. A file or dataset may have the name of its layout in front
            ("zsre-rome:FILE").
        kind: Name of the layout. None: recognised by the fields of the records.
        fields: {part of a record: name of its field}, for records of another layout. The parts are
            subject, prompt and target, and those in `fields.NAMES`; a dot in the name of a field
            goes into the field. With `kind`, the parts are the fields of that layout.
        malformed: "skip": leave malformed records out and list them in `skipped`. "fatal": raise an
            error for a malformed record anywhere in the file.
        limit: Number of usable records to draw. Only drawn records are checked, unless malformed
            ones are fatal. None: all records.
        seed: Seed of the sample, and of what "atlas" draws.

    Raises:
        InputError: when `what` is no suite, the file cannot be read or is not of the layout, no
            record is usable, or a malformed record is fatal.
    """
    if malformed not in ("skip", "fatal"):
        raise InputError(
            f"malformed is {malformed!r}; it must be 'skip' or 'fatal'", argument="malformed"
        )
    if limit is not None:
        limit = check_count(limit, "limit", "the number of records to draw")
    seed = check_seed(seed)
    what = check_text(str(what) if isinstance(what, Path) else what, "the suite")
    if kind is not None and kind not in LAYOUTS:
        raise InputError(
            f"kind is {kind!r}; it must be one of {', '.join(LAYOUTS)}, or None", argument="kind"
        )
    prefix, _, rest = what.partition(":")
    if prefix in LAYOUTS and rest:
        if kind not in (None, prefix):
            raise InputError(
                f"{what!r} names the layout {prefix}, and kind is {kind!r}; give one of them",
                argument="kind",
            )
        what, kind = rest, prefix
    if what == "atlas":
        if kind is not None:
            raise InputError(
                f"atlas is bundled, so it has no layout, and kind is {kind!r}; leave kind out",
                argument="kind",
            )
        return atlas_suite(limit, seed)
    mapping = None if fields is None else check_fields(fields)
    if mapping is not None and kind is None:
        check_names(mapping)
    return _load_file(what, kind, mapping, _Sample(limit, seed, malformed == "fatal"))


@dataclass(frozen=True)
class _Sample:
    """Which records of a file to use.

    Attributes:
        limit: Number of records. None: all.
        seed: Seed of the draw.
        is_strict: Whether a malformed record anywhere in the file is an error.
    """

    limit: int | None
    seed: int
    is_strict: bool


def _load_file(
    what: str, kind: str | None, fields: Mapping[str, str] | None, sample: _Sample
) -> Suite:
    """Return the suite in a file or a hub dataset."""
    path = _local_file(what)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{what} cannot be read: {error.strerror}; give a file of records that can be read"
        ) from None
    rows = _parse_rows(what, path.suffix.lower(), content)
    if fields is None:
        layout = _recognise_layout(what, rows, kind)
    else:
        check_present(what, rows[:_FIRST], fields)
        if kind is None:
            reading = partial(read_mapped, fields=fields)
            layout = Layout("facts", frozenset(REQUIRED), reading)
        else:
            rows = [_renamed(row, fields) for row in rows]
            layout = _recognise_layout(what, rows, kind)
    records, skipped = _read_records(what, rows, layout, sample)
    return Suite(
        name=layout.name,
        records=records,
        skipped=skipped,
        source=what,
        digest=hashlib.sha256(content).hexdigest(),
    )


# ── the file ──────────────────────────────────────────────────────────────────────────────────────


def _local_file(what: str) -> Path:
    """Return the path of the file that a name stands for, downloaded if it is a hub dataset."""
    try:
        path = Path(what).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the home of an unknown user
        raise InputError(
            f"{what[:80]!r} cannot be the name of a file; give atlas, a file or a hub dataset"
        ) from None
    if is_file:
        return path
    if is_folder:
        raise InputError(f"{what!r} is a folder; name one {_FORMATS} file in it")
    if what in LAYOUTS:
        raise InputError(
            f"{what!r} is a layout, and its data is not bundled; "
            f"download its file and give it as {what}:FILE"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[^:]+)?", what) and not what.startswith((".", "~")):
        return _download(what)
    raise InputError(
        f"there is no suite {what!r}, and no file of this name; "
        f"give atlas, a {_FORMATS} file, or a hub dataset owner/name"
    )


def _download(what: str) -> Path:
    """Return a file of a hub dataset, from the cache if it is there."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, *inside = what.split("/", 2)
    try:
        if not inside:
            files = HfApi().list_repo_files(f"{owner}/{name}", repo_type="dataset")
            inside = [file for file in files if file.lower().endswith((".json", ".jsonl", ".csv"))]
            if len(inside) != 1:
                names = f": {', '.join(inside[:12])}" if inside else ""
                raise InputError(
                    f"the dataset {what!r} has {len(inside)} .json, .jsonl and .csv files{names}; "
                    f"name one as {what}/FILE, or download one and give its path"
                )
        return Path(hf_hub_download(f"{owner}/{name}", inside[0], repo_type="dataset"))
    except InputError:
        raise
    except Exception as error:  # errors of the hub, the network, and the name
        first_line = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"there is no file {what!r}, and a hub dataset of this name cannot be downloaded "
            f"({type(error).__name__}: {first_line}); "
            "download the file where there is a network and give its path"
        ) from error


def _parse_rows(what: str, suffix: str, content: bytes) -> list[Any]:
    """Return the records of a file, unchecked. A line that is not JSON is returned as its error."""
    try:
        text = decoded(content)
        if suffix in (".csv", ".tsv"):
            header, cells = table(text)
            rows: Any = [dict(zip(header, row.value, strict=False)) for row in cells]
        elif suffix in (".jsonl", ".ndjson"):
            rows = _parse_lines(text)
        else:
            try:
                rows = json.loads(text)
            except ValueError:  # KnowEdit ships lines of JSON in a .json file
                rows = _parse_lines(text)
                if not rows or isinstance(rows[0], Exception):
                    raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{what} cannot be read as {suffix.lstrip('.') or 'JSON'}: {error}; "
            "give a JSON list of records, lines of JSON (.jsonl), or a table (.csv)"
        ) from None
    if not isinstance(rows, list) or not rows:
        shape = "empty" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise InputError(f"{what} is {shape}; give a list of at least one record")
    return rows


def _parse_lines(text: str) -> list[Any]:
    """Return the values of lines of JSON, and the error of each line that is not JSON."""
    return [line.value for line in json_lines(text)]


# ── the layout ────────────────────────────────────────────────────────────────────────────────────


def _recognise_layout(what: str, rows: Sequence[Any], kind: str | None) -> Layout:
    """Return the named layout, or the layout of most of the first records."""
    names_of = [set(row) for row in rows[:_FIRST] if isinstance(row, Mapping)]
    fitting = {
        name: sum(layout.fields <= names for names in names_of)
        for name, layout in LAYOUTS.items()
        if name != "zsre-rome"
    }
    best = max(fitting, key=lambda name: (fitting[name], len(LAYOUTS[name].fields)))
    # A record that lacks a field fits a layout with fewer fields. The other records decide.
    finer = [
        name
        for name in fitting
        if LAYOUTS[name].fields > LAYOUTS[best].fields and 2 * fitting[name] > fitting[best]
    ]
    best = max(finer, key=lambda name: fitting[name], default=best)
    if kind is not None and any(LAYOUTS[kind].fields <= names for names in names_of):
        return LAYOUTS[kind]
    if kind is None and fitting[best]:
        return LAYOUTS[best]
    got = seen_fields(rows)
    if kind is not None:
        hint = f"; it looks like {best}" if fitting[best] else ""
        raise InputError(
            f"{what} is not of the layout {kind}: its records need the fields "
            f"{', '.join(sorted(LAYOUTS[kind].fields))}; the first has {got}{hint}"
        )
    accepted = "; ".join(f"{name}: {', '.join(sorted(LAYOUTS[name].fields))}" for name in fitting)
    raise InputError(
        f"{what} has no known layout: its records have {got}; give records with the fields of one "
        f"of these layouts. {accepted}. Or say which fields hold the subject, the prompt and the "
        "target, such as subject=entity",
        argument="fields",
    )


def _renamed(row: Any, fields: Mapping[str, str]) -> Any:
    """Return a record with the names of its layout."""
    if not isinstance(row, Mapping):
        return row
    for name, path in fields.items():
        row = with_value(row, name, value_at(row, path))
    return row


# ── the records ───────────────────────────────────────────────────────────────────────────────────


def _read_records(
    what: str, rows: Sequence[Any], layout: Layout, sample: _Sample
) -> tuple[tuple[Record, ...], tuple[Malformed, ...]]:
    """Return the usable records of a sample in the file's order, and the malformed parts."""
    order = list(range(len(rows)))
    if sample.limit is not None:
        random.Random(sample.seed).shuffle(order)
    records: dict[int, Record] = {}
    skipped: list[Malformed] = []
    for index in order:
        is_full = len(records) == sample.limit
        if is_full and not sample.is_strict:
            break
        record, dropped = _read_record(rows[index], index, layout)
        if record is not None and not is_full:
            records[index] = record
        skipped += [
            Malformed(what, index, each.field, each.message, whole=record is None)
            for each in dropped
        ]
    skipped.sort(key=lambda each: each.index)
    if sample.is_strict and skipped:
        raise InputError(
            f"{skipped[0]}; correct it, or leave such records out with malformed='skip'",
            argument="malformed",
        )
    if not records:
        is_mapped = layout.name == "facts"
        seen = f"; the records have {seen_fields(rows)}" if is_mapped else ""
        raise InputError(
            f"{what} has no usable record of the layout {layout.name}; "
            f"the first of {len(skipped)} errors: {skipped[0]}{seen}",
            argument="fields" if is_mapped else None,
        )
    return _with_unique_ids(dict(sorted(records.items()))), tuple(skipped)


def _read_record(row: Any, index: int, layout: Layout) -> tuple[Record | None, list[FieldError]]:
    """Return a record, or None if it cannot be used, and the fields that cannot be used."""
    dropped: list[FieldError] = []
    try:
        if isinstance(row, Exception):
            raise FieldError("", f"is no JSON: {fault_in_line(row)}")
        return layout.read(Entry(row, dropped=dropped), index), dropped
    except FieldError as error:
        return None, [error]


def _with_unique_ids(records: Mapping[int, Record]) -> tuple[Record, ...]:
    """Return the records, with the place in the file added to an id that several of them have."""
    uses = Counter(record.id for record in records.values())
    return tuple(
        record if uses[record.id] == 1 else replace(record, id=f"{record.id}#{at}")
        for at, record in records.items()
    )
