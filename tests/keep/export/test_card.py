"""The card of an export says which facts it holds and how they were proved."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from exports import answers_of, replace_read_back, some_delta
from factsmith.core.errors import DamagedError
from factsmith.core.fact import Fact
from factsmith.keep.export.adapter import export_adapter
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.keep.export.contents import Origin, State
from factsmith.keep.export.manifest import check_files
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.verification import Check, Verification

HOSTILE = "| <script>x</script> `a`\n# *b* [c](http://d.e)\n---\nlicense: mit"


def check(role: Any, prompt: str, held: bool, before: str = "French.") -> Check:
    """Return a check."""
    return Check(
        role=role,
        prompt=prompt,
        wanted="English",
        before=before,
        after="English." if held else "Dutch.",
        p_before=0.1,
        p_after=0.9,
        held=held,
    )


def report(*checks: Check, **more: Any) -> dict[str, Any]:
    """Return a report as a ledger stores it."""
    return Verification(checks=checks).to_dict() | more


def card_of(lm: LanguageModel, folder: Path, origin: Origin | None, **options: Any) -> str:
    """Export an adapter with one patch and return its card."""
    origins = () if origin is None else (origin,)
    export_adapter(lm, some_delta(lm, 1), folder, origins=origins, verify=False, **options)
    return (folder / "README.md").read_text(encoding="utf-8")


def front(card: str) -> dict[str, Any]:
    """Return the values at the head of a card."""
    _, values, _ = card.split("---\n", 2)
    read: dict[str, Any] = yaml.safe_load(values)
    return read


def test_a_card_has_the_facts_and_the_proof(lm: LanguageModel, tmp_path: Path) -> None:
    prompt = "The mother tongue of Paris is"
    long = f"{'Long ago. ' * 20}{prompt}"
    proof = report(
        check("prompt", prompt, True),
        check("paraphrase", "Paris speaks", True),
        check("paraphrase", "In Paris they speak", False),
        check("neighbour", "The mother tongue of Léon Blum is", False),
        check("chat", long, False),
        forced=True,
    )
    origin = Origin(
        revision="ab" * 32,
        message="ticket 812",
        created="2026-02-03T04:05:06+00:00",
        report=proof,
        state=State(revision="cd" * 32, created="2026-03-04T05:06:07+00:00"),
    )
    card = card_of(lm, tmp_path / "out", origin, base="owner/name")
    assert front(card) == {
        "base_model": "owner/name",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["factsmith", "knowledge-editing", "lora", "peft"],
    }
    for line in (
        "| Paris | The mother tongue of {} is | English | French. | 1 |",
        "| written prompts answered with the target | 1 of 1 | 100.0% |",
        "| paraphrases answered with the target | 1 of 2 | 50.0% |",
        "| neighbours whose answer stayed | 0 of 1 | 0.0% |",
        "3 checks failed:",
        "| paraphrase | In Paris they speak | English | Dutch. |",
        f"| chat | …{long[1 - 120 :]} | English | Dutch. |",
        "| prompts in a chat answered with the target | 0 of 1 | 0.0% |",
        f"| base fingerprint | `{lm.fingerprint}`, as float32 |",
        f"| revision | `{'cd' * 32}` |",
        "| date | `2026-03-04T05:06:07+00:00` |",
        f"- revision: `{'ab' * 32}`",
        "- date: `2026-02-03T04:05:06+00:00`",
        "- message: ticket 812",
        "| rank | 2 |",
        "| dtype | float32 |",
        "- forced: it was kept though a check or a gate had failed",
    ):
        assert line in card.splitlines(), line
    assert '"owner/name"' in card and "vllm serve owner/name --enable-lora" in card
    assert "--max-lora-rank 8" in card
    assert "changed since" not in card
    changed = dataclasses.replace(origin, changed=True)
    assert "changed since" in card_of(lm, tmp_path / "changed", changed)


def test_without_a_ledger_nothing_is_made_up(lm: LanguageModel, tmp_path: Path) -> None:
    card = card_of(lm, tmp_path / "out", None)
    assert "| Paris | The mother tongue of {} is | English | not recorded | 1 |" in card
    assert "The proof is not recorded." in card and "| revision | not recorded |" in card
    assert "base_model" not in front(card), "a folder's name is no hub id"
    for strange in ({"checks": [{"role": "prompt"}]}, {"checks": 3}, {"checks": [7]}, {"a": 1}):
        origin = Origin(revision="ab" * 32, report=strange)
        folder = tmp_path / str(strange["checks" if "checks" in strange else "a"]).strip("[]{}")
        assert "The proof is not recorded." in card_of(lm, folder, origin)


def test_hostile_text_in_a_card_stays_text(lm: LanguageModel, tmp_path: Path) -> None:
    fact = Fact(HOSTILE, "The home of {} is", HOSTILE)
    delta = dataclasses.replace(some_delta(lm, 1), facts=(fact,))
    origin = Origin(
        revision="ab" * 32,
        message=HOSTILE,
        created=HOSTILE,
        report=report(check("prompt", fact.text, False, HOSTILE)),
        state=State(revision="cd" * 32, created=HOSTILE),
    )
    hostile, plain = tmp_path / "hostile", tmp_path / "plain"
    export_adapter(lm, delta, hostile, origins=(origin,), verify=False, base=HOSTILE)
    tame = Fact("X", "The home of {} is", "Y")
    delta = dataclasses.replace(delta, facts=(tame,))
    origin = dataclasses.replace(
        origin,
        message="M",
        created="2026",
        report=report(check("prompt", tame.text, False, "Z")),
        state=State(revision="cd" * 32, created="2026"),
    )
    export_adapter(lm, delta, plain, origins=(origin,), verify=False, base="b/c%d")
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (hostile, plain)]
    assert front(cards[0]) == front(cards[1])
    skeletons = [
        [tag for tag in re.findall(r"<(/?\w+)", rendered(card)) if tag not in ("code", "/code")]
        for card in cards
    ]
    assert skeletons[0] == skeletons[1], "the same headings, tables, rows and lists"
    assert "script" in cards[0] and "<script" not in rendered(cards[0])
    odd = card_of(lm, tmp_path / "odd", origin, base=f"owner/name@{HOSTILE}")
    assert "owner/name" not in odd.split("## Load it")[1] and "path/to/base" in odd
    assert skeletons[0] != re.findall(
        r"<(/?\w+)", rendered(cards[1].replace("| X |", f"{HOSTILE}"))
    )


def rendered(card: str) -> str:
    """Return the HTML of a card without its head."""
    text = card.split("---\n", 2)[2]
    return MarkdownIt("commonmark").enable("table").render(text)


def test_the_same_revision_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    lm = load(folders["gpt2"])
    bench = Workbench(lm, tmp_path / "space")
    first = bench.commit(some_delta(lm, 1), report(check("prompt", "x", True)), message="one")
    options: dict[str, Any] = {"verify": False, "revision": first.id, "base": "owner/name"}
    bench.export(tmp_path / "a", "adapter", **options)
    bench.commit(some_delta(lm, 2), message="two")
    bench.export(tmp_path / "b", "adapter", **options)
    assert [path.read_bytes() for path in sorted((tmp_path / "a").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "b").iterdir())
    ]
    card = (tmp_path / "a/README.md").read_text(encoding="utf-8")
    assert f"`{first.created}`" in card and f"| revision | `{first.id}` |" in card
    bench.export(tmp_path / "c", "adapter", **{**options, "revision": None})
    assert (tmp_path / "c/README.md").read_text(encoding="utf-8") != card


def test_a_checkpoint_has_a_card_too(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_read_back(monkeypatch, lambda jobs: [answers_of(jobs[0].questions)])
    lm = load(folders["gpt2"])
    export_checkpoint(lm, some_delta(lm, 1), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert front(card)["library_name"] == "transformers" and "peft" not in front(card)["tags"]
    assert "answers equal to those of the patched model on 1 prompt" in card
    assert "rank" not in card and "| Paris |" in card


def test_a_changed_card_is_noticed(lm: LanguageModel, tmp_path: Path) -> None:
    card_of(lm, tmp_path / "out", None)
    manifest = check_files(tmp_path / "out")
    assert set(manifest.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card = tmp_path / "out/README.md"
    whole = card.read_bytes()
    card.write_bytes(whole.replace(b"English", b"Englisc"))
    with pytest.raises(DamagedError, match=r"README\.md does not match its checksum"):
        check_files(tmp_path / "out")
    card.unlink()
    with pytest.raises(DamagedError, match=r"README\.md is missing"):
        check_files(tmp_path / "out")
    card.write_bytes(whole)
    check_files(tmp_path / "out")
    (tmp_path / "out/more.py").write_text("")
    with pytest.raises(DamagedError, match=r"'more\.py', which its manifest does not name"):
        check_files(tmp_path / "out")
