"""Programs with the names `vllm` and `llama-server` that start a `ModelServer`.

    PATH=$(programs(folder)):$PATH          # `vllm serve model --port 8000` then works in a shell

They take the arguments that our documents use, and refuse others, as the real programs do. They
read the folder of the model where llama.cpp reads a GGUF file: `model` for `model.gguf`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from model_server import Faults, ModelServer

TESTS = Path(__file__).parent


def programs(folder: Path) -> Path:
    """Write the programs into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vllm", "llama-server"):
        program = folder / name
        program.write_text(
            f'#!/bin/sh\nexport PYTHONPATH="{TESTS}:$PYTHONPATH"\n'
            f'exec "{sys.executable}" "{__file__}" {name} "$@"\n'
        )
        program.chmod(0o755)
    return folder


def vllm_parser() -> argparse.ArgumentParser:
    """Return a parser of the options of vLLM that the documents use."""
    parser = argparse.ArgumentParser("vllm", allow_abbrev=False)
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--served-model-name", default=None)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--lora-modules", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    return parser


def llama_parser() -> argparse.ArgumentParser:
    """Return a parser of the options of llama-server that the documents use."""
    parser = argparse.ArgumentParser("llama-server", allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--no-cache-prompt", action="store_true")
    parser.add_argument("--lora-scaled", default="", metavar="FILE:SCALE,...")
    return parser


def main(arguments: list[str]) -> None:
    """Serve until a signal comes."""
    name, *words = arguments
    if name == "vllm":
        options = vllm_parser().parse_args(words)
        allowed = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true")
        takes = allowed and options.enable_lora
        server = ModelServer(
            Path(options.model),
            name=options.served_model_name or options.model,
            faults=Faults(key=os.environ.get("VLLM_API_KEY", ""), fixed=not takes),
            port=options.port,
        )
        for module in options.lora_modules:
            adapter, _, folder = module.partition("=")
            status, said = server.load({"lora_name": adapter, "lora_path": folder})
            assert status == 200, said
    else:
        options = llama_parser().parse_args(words)
        scaled = [each.rpartition(":") for each in options.lora_scaled.split(",") if each]
        server = ModelServer(
            Path(options.model).with_suffix(""),
            "llama.cpp",
            name=Path(options.model).name,
            adapters=[Path(file) for file, _, _ in scaled],
            faults=Faults(key=os.environ.get("LLAMA_API_KEY", "")),
            port=options.port,
        )
        server.scales = [float(scale) for _, _, scale in scaled]
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with server:
        print(f"{name} serves {options.model} at {server.url}", flush=True)
        ended.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
