"""Fetch the scripts that the studio serves, and compare them with the digests that are recorded.

    python tools/vendor.py            # fetch the pinned versions and compare; change nothing
    python tools/vendor.py --write    # fetch them, write the files and record the digests

The packages come from the npm registry through `npm pack`. `PACKAGES` pins them. Next to the files,
`vendored.json` records for each one its package, version, address and SHA-256. To move to a newer
version, change `PACKAGES` and run with `--write`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "src/factsmith/studio/static/vendor"
RECORD = "vendored.json"


class Package(NamedTuple):
    """A package of the npm registry, and the file of it that the studio serves."""

    name: str
    version: str
    licence: str
    member: str
    """The path of the file in the package."""
    file: str
    """Its name in the folder of vendored files."""

    @property
    def address(self) -> str:
        """The address of the package's archive in the registry."""
        return f"https://registry.npmjs.org/{self.name}/-/{self.name}-{self.version}.tgz"


PACKAGES = (
    Package("htmx.org", "2.0.11", "0BSD", "dist/htmx.min.js", "htmx.min.js"),
    Package("vega", "6.4.0", "BSD-3-Clause", "build/vega.min.js", "vega.min.js"),
    Package("vega-lite", "6.4.3", "BSD-3-Clause", "build/vega-lite.min.js", "vega-lite.min.js"),
    Package(
        "vega-interpreter",
        "2.3.2",
        "BSD-3-Clause",
        "build/vega-interpreter.js",
        "vega-interpreter.js",
    ),
)

_IMPORT = "import { ascending, isString, DisallowedObjectProperties } from 'vega-util';\n"
_EXPORT = "export { expression as expressionInterpreter };\n"


def as_script(text: str) -> str:
    """Return the interpreter's module as a script that sets `vegaInterpreter`.

    A page may load a module that imports another one by name only with an inline import map, which
    the content security policy forbids. `vega.min.js` has the three imported names.
    """
    body, comment, _ = text.partition("//# sourceMappingURL=")
    if not body.startswith(_IMPORT) or not body.endswith(_EXPORT) or not comment:
        raise SystemExit("vega-interpreter has another import or export; adapt as_script to it")
    names = "const { ascending, isString, DisallowedObjectProperties } = vega;\n"
    inner = body.removeprefix(_IMPORT).removesuffix(_EXPORT)
    return f"var vegaInterpreter = (function () {{\n{names}{inner}return expression;\n}})();\n"


def fetch(package: Package, folder: Path) -> dict[str, bytes]:
    """Return {name: content} of a package's served file and of its licence."""
    subprocess.run(
        ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with tarfile.open(folder / f"{package.name}-{package.version}.tgz") as archive:
        script = _member(archive, package.member)
        licence = _member(archive, "LICENSE")
    if package.name == "vega-interpreter":
        script = as_script(script.decode()).encode()
    return {package.file: script, f"LICENSE.{package.name}.txt": licence}


def _member(archive: tarfile.TarFile, path: str) -> bytes:
    file = archive.extractfile(f"package/{path}")
    assert file is not None
    return file.read()


def record(package: Package, files: dict[str, bytes]) -> dict[str, object]:
    """Return what `vendored.json` says about one package."""
    return {
        "name": package.name,
        "version": package.version,
        "licence": package.licence,
        "address": package.address,
        "member": package.member,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }


def offences(folder: Path = FOLDER) -> list[str]:
    """Return what is wrong with the files in the folder, compared with the record next to them."""
    entries = json.loads((folder / RECORD).read_text(encoding="utf-8"))["packages"]
    digests = {name: digest for entry in entries for name, digest in entry["sha256"].items()}
    present = {path.name for path in folder.iterdir()} - {RECORD}
    wrong = [f"{name} is missing" for name in sorted(digests.keys() - present)]
    wrong += [f"{name} is not recorded" for name in sorted(present - digests.keys())]
    for name in sorted(present & digests.keys()):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digests[name]:
            wrong.append(f"{name} has another digest than {RECORD} records")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Fetch, compare or write, and return the exit status."""
    parser = argparse.ArgumentParser(description="Fetch the scripts that the studio serves.")
    parser.add_argument("--write", action="store_true", help="write the files and the record")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        fetched = [(package, fetch(package, Path(folder))) for package in PACKAGES]
    document = {"packages": [record(package, files) for package, files in fetched]}
    if options.write:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for _, files in fetched:
            for name, content in files.items():
                (FOLDER / name).write_bytes(content)
        (FOLDER / RECORD).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    wrong = offences()
    if json.loads((FOLDER / RECORD).read_text(encoding="utf-8")) != document:
        wrong.append(f"the registry's packages differ from {RECORD}")
    print("\n".join(wrong) or f"{len(PACKAGES)} packages agree with {RECORD}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
