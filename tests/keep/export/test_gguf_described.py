"""GGUF exports say which revision they hold, and hold no path of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from exports import some_delta
from factsmith.core.errors import DamagedError
from factsmith.keep.export.gguf_adapter import export_gguf_adapter
from factsmith.keep.export.manifest import check_files, read_manifest
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from gguf_files import gguf, write_gguf


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    """A workbench with a tiny model from a GGUF file."""
    write_gguf(tmp_path / "somewhere.gguf", "llama", kind="Q8_0")
    with Workbench(load(tmp_path / "somewhere.gguf"), tmp_path / "space") as opened:
        yield opened


def texts(file: Path) -> dict[str, str]:
    """Return the fields of a file that hold text."""
    fields = gguf.GGUFReader(file).fields
    read = {key: field.contents() for key, field in fields.items()}
    return {key: value for key, value in read.items() if isinstance(value, str)}


def test_an_adapter_names_the_revision_that_it_holds(bench: Workbench, tmp_path: Path) -> None:
    first = bench.commit(some_delta(bench.lm, 1)).id
    second = bench.commit(some_delta(bench.lm, 2)).id
    undone = bench.revert(second, force=True).id
    made = bench.export_several(tmp_path / "all", [first, second, undone], "gguf-adapter")
    assert [each.folder.name for each in made] == [
        f"{each[:12]}.gguf" for each in (first, second, undone)
    ]
    for identity, each, patches in zip(
        (first, second, undone), made, ([first], [first, second], [first]), strict=True
    ):
        fields = texts(each.folder)
        assert fields["general.name"] == f"factsmith {identity[:12]}"
        assert fields["adapter.lora.task_name"] == f"factsmith:{identity}"
        assert fields["factsmith.revision"] == identity
        assert fields["factsmith.patches"] == ",".join(patches)
        assert fields["factsmith.base_fingerprint"] == bench.base_fingerprint
        manifest = read_manifest(each.folder.parent, f"{each.folder.name}.factsmith.json")
        assert manifest.revision == identity
    assert len(list((tmp_path / "all").iterdir())) == 6, "each file and its manifest"


def test_a_changed_file_is_noticed(bench: Workbench, tmp_path: Path) -> None:
    bench.commit(some_delta(bench.lm, 1))
    file = tmp_path / "patch.gguf"
    bench.export(file, "gguf-adapter", verify=False)
    assert check_files(file).factsmith == "gguf-adapter"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"patch\.gguf does not match its checksum"):
        check_files(file)
    (tmp_path / "patch.gguf.factsmith.json").unlink()
    with pytest.raises(DamagedError, match=r"no patch\.gguf\.factsmith\.json"):
        check_files(file)


def test_without_a_workspace_no_revision_is_named(bench: Workbench, tmp_path: Path) -> None:
    with bench.on_base():
        export_gguf_adapter(bench.lm, some_delta(bench.lm, 1), tmp_path / "a.gguf", verify=False)
    fields = texts(tmp_path / "a.gguf")
    assert fields["general.name"] == "factsmith" and "adapter.lora.task_name" not in fields
    assert "revision" not in json.loads((tmp_path / "a.gguf.factsmith.json").read_bytes())


@pytest.mark.parametrize("format", ["gguf", "gguf-adapter", "adapter", "checkpoint", "patch"])
def test_no_file_of_an_export_holds_a_path_of_this_machine(
    bench: Workbench, tmp_path: Path, format: str
) -> None:
    """The cache, where the file was dequantised, is one as well."""
    bench.commit(some_delta(bench.lm, 1))
    cache = str(bench.lm.config._name_or_path)
    assert str(tmp_path) in bench.lm.name and Path(cache).is_absolute()
    (tmp_path / "out").mkdir()
    made = bench.export(tmp_path / "out" / "made.gguf", format, verify=False)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 1
    for file in written:
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content, file
        assert str(Path(cache).parent).encode() not in content, file
    manifest = json.loads(next(p for p in written if p.name.endswith("factsmith.json")).read_text())
    assert manifest["model"] == "somewhere.gguf"
    if format == "adapter":
        assert "only 'somewhere.gguf', because it was loaded from a GGUF file" in made.warnings[0]
