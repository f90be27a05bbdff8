"""Install the lowest versions that pyproject.toml allows, and run tests with them.

    python tools/bounds.py FOLDER                 # an environment in FOLDER, with this Python
    python tools/bounds.py FOLDER tests/core      # only these tests
    python tools/bounds.py --print                # the versions, and nothing else

Each direct dependency has its lower bound. The dependencies of these are as new as pip finds them,
as for a user who upgrades everything except one package. Run it once when a bound changes: it
downloads several gigabytes, because old releases of torch bring CUDA.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

TESTS = ("tests/test_public.py", "tests/core", "tests/edit", "tests/keep", "tests/cli")
"""Tests that together call each dependency."""

PUBLISHED_SCHEMA = (
    "tests/core/test_factfile.py::test_the_schema_that_is_published_is_that_of_the_code"
)
"""Left out: old releases of pydantic leave a length out of the schema, which does no harm."""


def lowest(requirements: Sequence[str]) -> list[str]:
    """Return each requirement with its lower bound as the only version.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    pinned = []
    for text in requirements:
        requirement = Requirement(text)
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{text!r} has no lower bound; write it as name>=version")
        pinned.append(f"{requirement.name}=={bounds[0]}")
    return pinned


def main() -> int:
    """Read the arguments, install, and run the tests. Return the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where the environment is made")
    parser.add_argument("tests", nargs="*", help=f"default: {' '.join(TESTS)}")
    parser.add_argument("--print", action="store_true", help="only print the versions")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = lowest(project["dependencies"])
    print("\n".join(pinned), flush=True)
    if options.print:
        return 0
    if options.folder is None:
        parser.error("give a folder for the virtual environment, or --print")
    subprocess.run([sys.executable, "-m", "venv", options.folder], check=True)
    python = options.folder / "bin" / "python"
    extra = ["pytest", "hypothesis", "jsonschema"]
    for name in ("adapter", "serve", "studio"):
        extra += _pinned_extra(project, name)
    install = [python, "-m", "pip", "install", "--quiet", *pinned, *extra, "-e", str(ROOT)]
    subprocess.run(install, check=True)
    tests = options.tests or TESTS
    # Old packages use what new ones deprecate, so their warnings are no errors in this run.
    options_of_pytest = ["-W", "default", "-m", "not slow", "--deselect", PUBLISHED_SCHEMA]
    run = [python, "-m", "pytest", *options_of_pytest, *tests]
    return subprocess.run(run, cwd=ROOT).returncode


def _pinned_extra(project: dict[str, dict[str, list[str]]], name: str) -> list[str]:
    return lowest(project["optional-dependencies"][name])


if __name__ == "__main__":
    raise SystemExit(main())
