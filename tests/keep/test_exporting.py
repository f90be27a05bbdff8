"""A revision is exported without moving the ledger's checkout or the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exports import appending, saved_model
from factsmith.core.errors import InputError, RevisionError
from factsmith.keep.export.formats import export
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from workbenches import hashes, some_delta


def exported_after_checkout(bench: Workbench, folder: Path, reference: str) -> dict[str, bytes]:
    """Return the files of an export that is made with the revision checked out."""
    before = bench.ledger.current
    bench.checkout(reference)
    files = exported(bench, folder)
    bench.checkout(before)
    return files


def exported(
    bench: Workbench, folder: Path, revision: str | None = None, format: str = "checkpoint"
) -> dict[str, bytes]:
    """Return the files of an export by their names."""
    bench.export(folder, format, revision=revision, verify=False)
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_of_a_revision_is_the_export_after_its_checkout(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    one = bench.commit(some_delta(lm, 1, (0,)))
    two = bench.commit(some_delta(lm, 2, (1, 2)))
    undone = bench.revert(one.id, force=True)
    state = hashes(lm)
    files = {
        each.id: exported_after_checkout(bench, tmp_path / f"checkout {each.number}", each.id)
        for each in (one, two, undone)
    }
    assert len({parts["model.safetensors"] for parts in files.values()}) == 3
    assert hashes(lm) == state
    for reference in (one.id, two.id[:8], "latest"):
        identity = bench.ledger.resolve(reference)
        assert exported(bench, tmp_path / reference, reference) == files[identity]
        assert (bench.ledger.current, hashes(lm)) == (undone.id, state)
    assert exported(bench, tmp_path / "now") == files[undone.id]
    bench.rebuild()


def test_a_revision_is_exported_from_a_checkout_of_the_base(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    one = bench.commit(some_delta(lm, 1, (1,)))
    bench.commit(some_delta(lm, 2, (2,)))
    expected = exported_after_checkout(bench, tmp_path / "expected", one.id)
    bench.checkout("base")
    base = hashes(lm)
    assert exported(bench, tmp_path / "out", one.id) == expected
    assert (bench.ledger.current, hashes(lm)) == ("base", base)


def three(bench: Workbench, lm: LanguageModel) -> list[str]:
    """Commit three patches, and return their ids."""
    return [bench.commit(some_delta(lm, seed, (seed % 3,))).id for seed in (1, 2, 3)]


@pytest.mark.parametrize("format", ["adapter", "checkpoint", "patch"])
def test_several_revisions_are_the_exports_of_each(
    lm: LanguageModel, bench: Workbench, tmp_path: Path, format: str
) -> None:
    ids = three(bench, lm)
    state = hashes(lm)
    options: dict[str, Any] = {"verify": False}
    if format == "adapter":
        options["base"] = "owner/name"
    made = bench.export_several(tmp_path / "all", [ids[2], ids[0][:6]], format, **options)
    assert [each.folder for each in made] == [
        tmp_path / "all" / ids[2][:12],
        tmp_path / "all" / ids[0][:12],
    ]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(
        [ids[0][:12], ids[2][:12]]
    )
    for number, each in ((2, made[0]), (0, made[1])):
        bench.export(tmp_path / str(number), format, revision=ids[number], **options)
        assert each.revision == ids[number] and contents_of(each.folder) == contents_of(
            tmp_path / str(number)
        )
    assert contents_of(tmp_path / "0") != contents_of(tmp_path / "2")
    assert (bench.ledger.current, hashes(lm)) == (ids[2], state)


def contents_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_of_several_revisions_all_are_written_or_none(
    lm: LanguageModel, bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = three(bench, lm)
    rows = bench.commit(appending(lm))
    cases: list[tuple[type[Exception], str, list[str]]] = [
        (InputError, "appends? 5 neurons", [ids[0], rows.id]),
        (RevisionError, "ffff", [ids[0], "ffff"]),
        (InputError, "no patch is in effect", [ids[0], "base"]),
        (InputError, "twice", [ids[0], ids[1], ids[0][:8]]),
        (InputError, "revisions is empty", []),
    ]
    (tmp_path / "here").mkdir()
    out = tmp_path / "here" / "all"
    for error, words, references in cases:
        with pytest.raises(error, match=words):
            bench.export_several(out, references, verify=False, base="owner/name")
        assert list((tmp_path / "here").iterdir()) == [], words
    text: Any = ids[0]
    with pytest.raises(InputError, match="must be a list"):
        bench.export_several(out, text, verify=False, base="owner/name")

    state = hashes(lm)
    written = []

    def failing(*arguments: Any, **options: Any) -> Any:
        written.append(arguments)
        if len(written) == 2:
            raise KeyboardInterrupt
        return export(*arguments, **options)

    monkeypatch.setattr("factsmith.keep.exporting.export", failing)
    with pytest.raises(KeyboardInterrupt):
        bench.export_several(out, ids, verify=False, base="owner/name")
    assert list((tmp_path / "here").iterdir()) == [] and len(written) == 2
    assert hashes(lm) == state
    bench.rebuild()


def test_only_exports_are_replaced_by_several(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    ids = three(bench, lm)
    out = tmp_path / "all"
    options: dict[str, Any] = {"format": "patch"}
    bench.export_several(out, ids[:2], **options)
    with pytest.raises(InputError, match="holds earlier exports"):
        bench.export_several(out, ids[1:], **options)
    bench.export_several(out, ids[1:], overwrite=True, **options)
    assert {path.name for path in out.iterdir()} == {each[:12] for each in ids[1:]}
    before = contents_of(out)
    for strange in (out / "notes.txt", out / ids[1][:12] / "notes.txt", out / "x.gguf"):
        strange.write_text("mine")
        with pytest.raises(InputError, match="is not an export by factsmith"):
            bench.export_several(out, ids, overwrite=True, **options)
        strange.unlink()
    (out / "empty").mkdir()
    with pytest.raises(InputError, match="'empty', which is not an export"):
        bench.export_several(out, ids, overwrite=True, **options)
    (out / "empty").rmdir()
    assert contents_of(out) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a link or a file"):
        bench.export_several(tmp_path / "file", ids, overwrite=True, **options)


def test_the_base_model_is_not_replaced(tmp_path: Path) -> None:
    saved_model("gpt2", tmp_path / "plain")
    with Workbench(load(tmp_path / "plain"), tmp_path / "one") as bench:
        first = bench.commit(some_delta(bench.lm, 1)).id
        (made,) = bench.export_several(tmp_path / "all", [first], "checkpoint", verify=False)
    with Workbench(load(made.folder), tmp_path / "two") as bench:
        second = bench.commit(some_delta(bench.lm, 2)).id
        before = contents_of(tmp_path / "all")
        with pytest.raises(InputError, match="holds the base model"):
            bench.export_several(tmp_path / "all", [second], "patch", overwrite=True)
        assert contents_of(tmp_path / "all") == before


def test_what_cannot_be_exported_is_refused(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    bench.commit(some_delta(lm, 1, (1,)))
    state = hashes(lm)
    with pytest.raises(InputError, match=r"revision is 'base': no patch is in effect there"):
        bench.export(tmp_path / "out", "checkpoint", revision="base")
    with pytest.raises(RevisionError):
        bench.export(tmp_path / "out", "checkpoint", revision="0123456789")
    number: Any = 5
    with pytest.raises(InputError, match="revision is 5"):
        bench.export(tmp_path / "out", "checkpoint", revision=number)
    with pytest.raises(InputError, match="a revision is 5"):
        bench.export_several(tmp_path / "out", [number], "checkpoint")
    assert hashes(lm) == state and not (tmp_path / "out").exists()


def test_the_card_says_that_facts_were_taken_out(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    patch = bench.commit(appending(lm)).id
    bench.revert(patch, [0], force=True)
    bench.export(tmp_path / "before", revision=patch, verify=False)
    bench.export(tmp_path / "after", verify=False)
    before, after = (
        (tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("before", "after")
    )
    assert "| Paris |" in before and "changed since" not in before
    assert "| Paris |" not in after and "| Edwin |" in after and "changed since" in after
