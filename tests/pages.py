"""The commands of a document, run in a shell one after another as a reader would.

Page(ROOT / "docs/serve.md").run(folder, environment, leave_out=["docker"])
"""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARK = "\x1e"


@dataclass(frozen=True)
class Ran:
    """What became of the commands of a page.

    Attributes:
        code: The exit code of the shell.
        outputs: The standard output of each block that was begun.
        errors: The standard error of all.
    """

    code: int
    outputs: list[str]
    errors: str


class Page:
    """A document with commands.

    Attributes:
        text: Its text.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def blocks(self, language: str) -> list[str]:
        """Return the blocks of code in a language, in order."""
        return [
            textwrap.dedent(block)
            for _, name, block in _FENCE.findall(self.text)
            if name == language
        ]

    def run(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        leave_out: Sequence[str] = (),
        replace: Mapping[str, str] | None = None,
        seconds: float = 300,
    ) -> Ran:
        """Run the blocks of the shell in a folder, until one fails.

        Args:
            folder: Where they run.
            environment: The environment.
            leave_out: Blocks with one of these words are not run.
            replace: {text of the page: what comes in its place}, such as ports.
            seconds: When to give up.
        """
        lines = ["set -euo pipefail"]
        for block in self.blocks("sh"):
            if any(word in block for word in leave_out):
                continue
            for old, new in (replace or {}).items():
                block = block.replace(old, new)
            lines += [f"printf '{_MARK}'", block]
        done = shell("\n".join(lines), folder, environment, seconds)
        return Ran(done.returncode, done.stdout.split(_MARK)[1:], done.stderr)


def shell(
    script: str, folder: Path, environment: Mapping[str, str], seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script in bash; programs that it leaves running do not keep it waiting."""
    out, err = folder / ".out", folder / ".err"
    with out.open("w") as output, err.open("w") as errors:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            timeout=seconds,
        )
    return subprocess.CompletedProcess(done.args, done.returncode, out.read_text(), err.read_text())
