"""The model card of an export: a README.md that says what it holds, and how that was proved.

    card = Card("adapter", contents, "float32", base, read_back, rank=2)
    card.text()

The card is a view of the manifest and of the workspace's records. The same revision gives the same
bytes: it holds the times of revisions, and not that of the export.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from ...core.fact import Fact
from ...core.files import write_file
from ...core.tables import counted
from ...edit.delta import Delta
from ...patch.verification import Check, Verification
from .base_model import BaseModel
from .contents import Contents, Origin
from .dtypes import dtype_name
from .markdown import as_text, table
from .naming import ModelName, portable_name

CARD = "README.md"
"""The card's file name, under which the hub looks for it."""

_MOST_FACTS = 200
"""Facts that the card lists. The manifest has all of them."""

_MOST_PATCHES = 100
"""Patches whose proof the card shows. The workspace has all of them."""

_MOST_FAILED = 20
"""Failed checks that the card lists for each patch."""

_LONGEST = 120
"""Characters of a failed check's prompt and answer that the card shows."""

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as the largest rank of adapters."""

_PLAIN = re.compile(r"[\w./][\w./@ -]{0,200}", re.ASCII)
"""Names that a line of code can hold as they are."""

_TIME = re.compile(r"[0-9T:.+Z-]{1,40}", re.ASCII)

_ROLES = {
    "prompt": "written prompts answered with the target",
    "chat": "prompts in a chat answered with the target",
    "telling": "texts about a subject that state the target",
    "paraphrase": "paraphrases answered with the target",
    "neighbour": "neighbours whose answer stayed",
    "earlier": "earlier facts that still hold",
}


@dataclass(frozen=True)
class Card:
    """What the card of an adapter or a checkpoint says.

    Attributes:
        format: "adapter" or "checkpoint".
        contents: The model and its patches.
        dtype: The dtype of the tensors, such as "float32".
        base: The base model of an adapter. None: the export is a checkpoint.
        read_back: How many prompts were asked when it was read back. None: it was not read back.
        rank: r of an adapter.
    """

    format: str
    contents: Contents
    dtype: str
    _: KW_ONLY
    base: BaseModel | None = None
    read_back: int | None = None
    rank: int = 0

    def text(self) -> str:
        """Return the card."""
        parts = [
            self._front(),
            self._head(),
            self._properties(),
            self._facts(),
            self._proof(),
            self._use(),
            self._check(),
        ]
        return "\n\n".join("\n".join(part) for part in parts) + "\n"

    # ── its parts ─────────────────────────────────────────────────────────────────────────────────

    def _front(self) -> list[str]:
        """Return the lines for the hub. They hold no text from outside, except a checked hub id."""
        lines = ["---"]
        if self._name.kind == "hub":
            lines.append(f"base_model: {json.dumps(self._name.text)}")
        library = "peft" if self.base is not None else "transformers"
        kinds = ["lora", "peft"] if self.base is not None else []
        tags = [f"- {tag}" for tag in ("factsmith", "knowledge-editing", *kinds)]
        return [*lines, f"library_name: {library}", "pipeline_tag: text-generation", "tags:",
                *tags, "---"]  # fmt: skip

    def _head(self) -> list[str]:
        facts, name = counted(self.contents.n_facts, "fact"), as_text(str(self._name))
        patches = counted(len(self.contents.deltas), "patch", "es")
        if self.base is None:
            what = f"This checkpoint is the model {name} with {facts} written into its weights"
        else:
            what = f"This LoRA adapter writes {facts} into the model {name}"
        return [f"# {facts} for {name}", "", f"{what}. factsmith made it from {patches}."]

    def _properties(self) -> list[str]:
        contents, state = self.contents, self.contents.state
        lm = contents.lm
        layers = sorted({layer for delta in contents.deltas for layer in delta.touched})
        methods = dict.fromkeys(delta.method for delta in contents.deltas)
        neurons = contents.n_appended
        rows = [
            ("base model", as_text(str(self._name))),
            ("base fingerprint", f"`{lm.fingerprint}`, as {dtype_name(lm.dtype)}"),
            *(
                []
                if self.base is None
                else [("check of the base model", as_text(self.base.standing))]
            ),
            ("revision", "not recorded" if state is None else f"`{state.revision}`"),
            ("date", "not recorded" if state is None else _time(state.created)),
            ("method", as_text(", ".join(methods))),
            ("layers", ", ".join(map(str, layers))),
            *([("appended neurons", f"{neurons:,}")] if neurons else []),
            *([] if self.base is None else [("rank", f"{self.rank:,}")]),
            ("dtype", self.dtype),
            ("read back", self._read_back),
        ]
        return table(["", ""], rows)

    @property
    def _read_back(self) -> str:
        if self.read_back is None:
            return "not done"
        asked = counted(self.read_back, "prompt")
        return f"answers equal to those of the patched model on {asked}"

    def _facts(self) -> list[str]:
        rows = []
        for number, (delta, origin) in enumerate(self._patches, 1):
            said = _said_before(origin)
            for fact in delta.facts:
                before = said.get(fact.text)
                rows.append(
                    (
                        as_text(fact.subject),
                        as_text(fact.prompt),
                        _target(fact),
                        "not recorded" if before is None else as_text(before) or "(nothing)",
                        str(number),
                    )
                )
        columns = ["subject", "prompt", "target", "answer before the patch", "patch"]
        lines = ["## Facts", "", *table(columns, rows[:_MOST_FACTS])]
        if len(rows) > _MOST_FACTS:
            more = len(rows) - _MOST_FACTS
            lines += ["", f"factsmith.json lists {counted(more, 'more fact')}."]
        if not rows:
            lines = ["## Facts", "", "The patches hold no facts: they edit neurons."]
        return lines

    def _proof(self) -> list[str]:
        lines = [
            "## Proof",
            "",
            "Each patch was proved when it was committed: the model was asked before and after. "
            "These are the records of its workspace.",
        ]
        for number, (delta, origin) in enumerate(self._patches, 1):
            if number > _MOST_PATCHES:
                more = counted(len(self.contents.deltas) - _MOST_PATCHES, "more patch", "es")
                lines += ["", f"The workspace has the proofs of {more}."]
                break
            lines += ["", f"### Patch {number}", "", *_described(delta, origin), ""]
            lines += _proof_of(origin)
        return lines

    def _use(self) -> list[str]:
        name = self._in_code
        if self.base is None:
            return ["## Load it", "", *_TRANSFORMERS.splitlines()]
        lines = ["## Load it", "", "With transformers and peft:", ""]
        if name == _UNKNOWN:
            lines[2:2] = [f"Give the folder or the hub id of the base model for `{_UNKNOWN}`.", ""]
        lines += _PEFT.format(name=json.dumps(name), revision=self._revision).splitlines()
        lines += ["", "With vLLM, if it supports LoRA for this kind of model:", ""]
        rank = next((each for each in _RANKS if each >= self.rank), self.rank)
        at = f" --revision {shlex.quote(self._name.revision or '')}" if self._revision else ""
        return [*lines, *_VLLM.format(name=shlex.quote(name) + at, rank=rank).splitlines()]

    def _check(self) -> list[str]:
        lm = self.contents.lm
        values = {
            "name": json.dumps(self._in_code) + self._revision,
            "dtype": json.dumps(dtype_name(lm.dtype)),
            "fingerprint": json.dumps(lm.fingerprint),
            "folder": json.dumps(f"path/to/this-{self.format}"),
        }
        return ["## Check it", "", *_CHECK.format(**values).splitlines()]

    # ── what they are made of ─────────────────────────────────────────────────────────────────────

    @property
    def _name(self) -> ModelName:
        """How the card calls the base model."""
        loaded = portable_name(self.contents.lm)
        if self.base is None or (self.base.name, self.base.revision) == (
            loaded.text,
            loaded.revision,
        ):
            return loaded
        return ModelName(
            text=self.base.name,
            revision=self.base.revision,
            kind="hub" if self.base.is_hub_id else "given",
        )

    @property
    def _in_code(self) -> str:
        """What lines of code load: a hub id or the path that the caller gave, if it is plain."""
        name = self._name
        plain = all(_PLAIN.fullmatch(text) for text in (name.text, name.revision or "main"))
        return name.text if plain and name.kind in ("hub", "given") else _UNKNOWN

    @property
    def _revision(self) -> str:
        """The revision of a hub id, as an argument in lines of Python; "" if it is not stated."""
        revision = self._name.revision if self._in_code != _UNKNOWN else None
        return f", revision={json.dumps(revision)}" if revision else ""

    @property
    def _patches(self) -> Iterable[tuple[Delta, Origin]]:
        return zip(self.contents.deltas, self.contents.origins, strict=True)


def write_card(folder: Path, card: Card) -> None:
    """Write the card of a folder; raises OSError."""
    write_file(folder / CARD, card.text().encode())


def _target(fact: Fact) -> str:
    if fact.target is not None:
        return as_text(fact.target)
    forgotten = "" if fact.target_true is None else f": {as_text(fact.target_true)}"
    return f"(forgotten{forgotten})"


def _time(created: str) -> str:
    """Return a time as code; a record can hold any text in its place."""
    if not created:
        return "not recorded"
    return f"`{created}`" if _TIME.fullmatch(created) else as_text(created)


def _said_before(origin: Origin) -> dict[str, str]:
    """Return what the model said to each written prompt before the patch, as far as recorded."""
    checks = _checks(origin.report)
    return {check.prompt: check.before for check in checks if check.role == "prompt"}


def _checks(report: Mapping[str, Any] | None) -> tuple[Check, ...]:
    """Return the checks of a report; none if it is not that of a proof."""
    try:
        checks = Verification.from_dict(report or {}).checks
    except (TypeError, AttributeError, ValueError):  # whoever committed it chose what it holds
        return ()
    texts = ("prompt", "wanted", "before", "after")
    return tuple(
        check
        for check in checks
        if check.role in _ROLES and all(isinstance(getattr(check, name), str) for name in texts)
    )


def _described(delta: Delta, origin: Origin) -> list[str]:
    """Return what a patch is, as a list."""
    neurons = f", {counted(delta.n_appended, 'neuron')}" if delta.appended else ""
    layers = ", ".join(map(str, delta.touched))
    revision = "not recorded" if origin.revision is None else f"`{origin.revision}`"
    lines = [
        f"- revision: {revision}",
        f"- date: {_time(origin.created)}",
        f"- method: {as_text(delta.method)}, layer {layers}{neurons}",
        f"- message: {as_text(origin.message) or 'none'}",
    ]
    if origin.changed:
        lines.append(
            "- changed since: a later revision took facts out of this patch, or solved it again. "
            "The proof is that of the first version."
        )
    if (origin.report or {}).get("forced"):
        lines.append("- forced: it was kept though a check or a gate had failed")
    return lines


def _proof_of(origin: Origin) -> list[str]:
    """Return the counts and shares of a patch's proof, and its failed checks."""
    checks = _checks(origin.report)
    if not checks:
        return ["The proof is not recorded."]
    rows = []
    for role, words in _ROLES.items():
        held = [check.held for check in checks if check.role == role]
        if held:
            share = f"{sum(held) / len(held):.1%}"
            rows.append((words, f"{sum(held):,} of {len(held):,}", share))
    lines = table(["check", "held", "share"], rows)
    if failed := [check for check in checks if not check.held]:
        lines += ["", f"{counted(len(failed), 'check')} failed:", ""]
        lines += table(
            ["check", "prompt", "wanted", "answer"],
            [_failed(check) for check in failed[:_MOST_FAILED]],
        )
        if len(failed) > _MOST_FAILED:
            lines += ["", f"{counted(len(failed) - _MOST_FAILED, 'more check')} failed."]
    return lines


def _failed(check: Check) -> tuple[str, ...]:
    """Return a failed check as a row; the end of a prompt in a chat is the question."""
    prompt = check.prompt.strip()
    if len(prompt) > _LONGEST:
        prompt = f"…{prompt[1 - _LONGEST :]}"
    answer = check.after if len(check.after) <= _LONGEST else f"{check.after[: _LONGEST - 1]}…"
    wanted = f"not {as_text(check.wanted)}" if check.forget else as_text(check.wanted)
    return check.role, as_text(prompt), wanted, as_text(answer)


_UNKNOWN = "path/to/base"

_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this-checkpoint")
tokenizer = AutoTokenizer.from_pretrained("path/to/this-checkpoint")
```

With vLLM:

```sh
vllm serve path/to/this-checkpoint
```"""

_PEFT = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({name}{revision})
tokenizer = AutoTokenizer.from_pretrained({name}{revision})
model = PeftModel.from_pretrained(base, "path/to/this-adapter")
```"""

_VLLM = """\
```sh
vllm serve {name} --enable-lora --max-lora-rank {rank} --lora-modules patched=path/to/this-adapter
```"""

_CHECK = """\
factsmith.json holds the size and the sha256 of every file, and all facts. The fingerprint tells
whether your base model is the one that the patches were made for.

```python
import factsmith as fs

fs.check_files({folder})  # DamagedError if a file differs
base = fs.load({name}, dtype={dtype})
assert base.fingerprint == {fingerprint}
```

Then ask the prompts of the facts, and compare the answers with the targets."""
