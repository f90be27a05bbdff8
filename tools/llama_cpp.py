"""Ask a GGUF file some prompts in llama.cpp, with or without an adapter.

    npm i --ignore-scripts --prefix llama node-llama-cpp@3       # once; needs Node 20
    python tools/llama_cpp.py llama model.gguf "The Eiffel Tower is in" --lora patch.gguf

Prints JSON: the answers, greedily decoded, and the tokens that llama.cpp made of the prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_suffix(".mjs")


@dataclass(frozen=True)
class Replies:
    """What llama.cpp says.

    Attributes:
        answers: The greedy continuation of each prompt.
        tokens: The tokens of each prompt.
    """

    answers: list[str]
    tokens: list[list[int]]


def ask(
    library: Path,
    model: Path,
    prompts: Sequence[str],
    *,
    adapter: Path | None = None,
    max_tokens: int = 12,
    threads: int = 2,
) -> Replies:
    """Ask a model in llama.cpp.

    Args:
        library: The folder in which `npm i --ignore-scripts node-llama-cpp@3` was run.
        model: The GGUF file.
        prompts: The prompts. Special tokens in them are read as such.
        adapter: A LoRA for the model. None: none.
        max_tokens: The most tokens of an answer.
        threads: How many threads to use.

    Raises:
        RuntimeError: when llama.cpp cannot load the files.
    """
    task = {
        "model": str(model.resolve()),
        "adapter": None if adapter is None else str(adapter.resolve()),
        "prompts": list(prompts),
        "max_tokens": max_tokens,
        "threads": threads,
    }
    done = subprocess.run(
        ["node", str(_SCRIPT), str(library)],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(done.stderr.strip()[-2000:] or "llama.cpp printed nothing")
    return Replies(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Ask, and print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path, help="folder with node_modules/node-llama-cpp")
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--lora", type=Path, help="GGUF file of an adapter")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    replies = ask(
        options.library,
        options.model,
        options.prompts,
        adapter=options.lora,
        max_tokens=options.max_tokens,
        threads=options.threads,
    )
    print(json.dumps(vars(replies), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
