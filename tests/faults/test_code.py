"""The library never runs code that it reads from a file."""

from __future__ import annotations

import re
from pathlib import Path

from faults.fuzz import FUZZ


def test_there_are_enough_cases() -> None:
    assert sum(FUZZ.values()) >= 10_000


DANGEROUS = re.compile(
    r"pickle\.(loads?\b|Unpickler)|marshal|shelve|joblib|dill"
    r"|yaml\.(full_|unsafe_)?load|(Full|Unsafe)Loader"
    r"|\b(eval|exec)\(|(?<!safetensors\.)torch\.load|allow_pickle=True"
)
ROOT = Path(__file__).resolve().parents[2]


def dangerous_lines(folder: str) -> list[tuple[str, str, bool]]:
    """Return (file, dangerous call, whether `weights_only` is set) for each such line."""
    lines = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := DANGEROUS.search(line.replace(".eval(", ".")):
                name = path.relative_to(ROOT).as_posix()
                lines.append((name, match[0], "weights_only=True" in line))
    return lines


def test_no_file_is_read_in_a_way_that_runs_code() -> None:
    """No module unpickles a file, or uses YAML tags or eval. Only the training loads a checkpoint.

    The workers of one cluster send pickles to one another. These are never files.
    """
    assert set(dangerous_lines("src/factsmith")) == {
        ("src/factsmith/cluster/reading.py", "pickle.loads", False),
        ("src/factsmith/cluster/shipping.py", "pickle.Unpickler", False),
    }
    assert dangerous_lines("tools") == [("tools/atlas/train.py", "torch.load", True)]
    for line in ("x = torch.load(y)", "pickle.load(file)", "cloudpickle.loads(x)"):  # controls
        assert DANGEROUS.search(line)
    assert not DANGEROUS.search("safetensors.torch.load(y)")
