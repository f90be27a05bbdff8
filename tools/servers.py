"""Start real servers, vLLM and llama.cpp's llama-server, on the loopback address, and ask them.

    tools/serving.sh .serving                                # once: makes what this file starts
    python -m tools.servers my-model "The Eiffel Tower is in"
    python -m tools.servers model.gguf "The Eiffel Tower is in" --lora patch.gguf

A folder is served by vLLM, and a GGUF file by llama-server. Prints JSON: the answers, greedily
decoded, and the tokens that the server made of the prompts. In Python:

    with vllm(serving_folder(), folder, adapters=8) as server:
        server.post("/v1/load_lora_adapter", {"lora_name": "rome", "lora_path": str(adapter)})
        server.ask(["The Eiffel Tower is in"], model="rome").answers

The servers run in a process group that is ended with the block. Nothing here uses factsmith.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "FACTSMITH_SERVING"
"""The variable of the environment that names the folder which `serving.sh` makes."""

BASE = "base"
"""The name under which vLLM serves the base model."""

BLOCK = 32
"""Tokens in a block of vLLM's cache. Only whole blocks are kept."""

START_SECONDS = 240.0
_HEALTHY_EVERY = 0.2


@dataclass(frozen=True)
class Replies:
    """What a server says.

    Attributes:
        answers: The greedy continuation of each prompt.
        tokens: The tokens of each prompt.
        log_probs: Log-probability of the first token of each answer, in nats.
    """

    answers: list[str]
    tokens: list[list[int]]
    log_probs: list[float]


@dataclass(frozen=True)
class RealServer:
    """A server that runs.

    Attributes:
        kind: "vllm" or "llama.cpp".
        url: Its address, without /v1.
        process: The first process of its group.
        log: The file with its output.
        seconds: How long it took until it answered.
        key: The API key that it asks for. None: it asks for none.
    """

    kind: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    seconds: float
    key: str | None = None

    def get(self, path: str) -> Any:
        """Return the JSON at a path; RuntimeError holds the status and the text of an error."""
        return self._send(urllib.request.Request(self.url + path))

    def post(self, path: str, body: object) -> Any:
        """Send JSON to a path, and return the answer: JSON, or the text if it is not JSON."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return self._send(request)

    def _send(self, request: urllib.request.Request) -> Any:
        if self.key is not None:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code}: {error.read().decode()[:2000]}") from error
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def models(self) -> list[str]:
        """Return the names of the models and adapters, the base first."""
        return [str(model["id"]) for model in self.get("/v1/models")["data"]]

    def ask(
        self,
        prompts: Sequence[str],
        *,
        model: str | None = None,
        max_tokens: int = 12,
        scales: Mapping[int, float] | None = None,
    ) -> Replies:
        """Ask prompts. Special tokens in them are read as such.

        Args:
            prompts: The prompts.
            model: The name of the model or adapter. None: the base.
            max_tokens: The most tokens of an answer.
            scales: {id of an adapter: its scale}, for llama.cpp. None: what the server has set.

        Raises:
            RuntimeError: when the server refuses.
        """
        name = model or self.models()[0]
        body: dict[str, Any] = {
            "model": name,
            "prompt": list(prompts),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": 1,
        }
        if scales is not None:
            body["lora"] = [{"id": number, "scale": scale} for number, scale in scales.items()]
        choices = self.post("/v1/completions", body)["choices"]
        choices.sort(key=lambda choice: choice["index"])
        return Replies(
            answers=[str(choice["text"]) for choice in choices],
            tokens=[self.tokens(prompt, name) for prompt in prompts],
            log_probs=[_first_log_prob(choice["logprobs"]) for choice in choices],
        )

    def tokens(self, text: str, model: str | None = None) -> list[int]:
        """Return the tokens that the server makes of a text."""
        if self.kind == "vllm":
            made = self.post("/tokenize", {"model": model or self.models()[0], "prompt": text})
        else:
            made = self.post("/tokenize", {"content": text, "add_special": True})
        return [int(token) for token in made["tokens"]]

    def kill(self) -> None:
        """End every process of the server at once, as a crash does."""
        _signal(self.process, signal.SIGKILL)
        self.process.wait()


def _first_log_prob(reported: Any) -> float:
    """Return the number for the first token; the two servers write it in different ways."""
    if "content" in reported:
        return float(reported["content"][0]["logprob"])
    return float(reported["token_logprobs"][0])


def serving_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that `serving.sh` made: an argument, FACTSMITH_SERVING, or ".serving"."""
    return Path(folder or os.environ.get(VARIABLE) or ".serving").absolute()


def missing(folder: Path, name: str) -> str | None:
    """Return why a server cannot be started from a folder: "vllm" or "llama-server". None: it can.

    The reason says what to run.
    """
    program = _program(folder, name)
    if program.is_file() and os.access(program, os.X_OK):
        return None
    return f"{program} does not exist; make it with tools/serving.sh {folder}"


def _program(folder: Path, name: str) -> Path:
    return folder / "vllm/bin/python" if name == "vllm" else folder / name


@contextmanager
def vllm(
    folder: Path,
    model: Path,
    *,
    adapters: int = 0,
    rank: int = 8,
    dtype: str = "bfloat16",
    length: int = 256,
    key: str | None = None,
    threads: int = 1,
) -> Iterator[RealServer]:
    """Start vLLM with a base model named "base", and end it with the block.

    Args:
        folder: What `serving.sh` made.
        model: The folder of the model.
        adapters: How many adapters it can use in one batch. They are loaded and unloaded while it
            runs. 0: it takes no adapters.
        rank: The largest rank of an adapter, one of those that vLLM accepts.
        dtype: The dtype that it computes in.
        length: The most tokens of a prompt with its answer.
        key: The API key that it asks for. None: it asks for none.
        threads: How many threads it computes with.

    Raises:
        RuntimeError: when it does not start; the message ends with the end of its log.
    """
    port = free_port()
    arguments: list[object] = [
        *(_program(folder, "vllm"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", Path(model).resolve(), "--served-model-name", BASE),
        *("--host", "127.0.0.1", "--port", port, "--dtype", dtype),
        *("--max-model-len", length, "--max-num-seqs", 8, "--block-size", BLOCK),
        "--enforce-eager",
    ]
    if adapters:
        arguments += ["--enable-lora", "--max-loras", adapters, "--max-lora-rank", rank]
    if key is not None:
        arguments += ["--api-key", key]
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with _started("vllm", arguments, settings, port, key) as server:
        yield server


@contextmanager
def llama_server(
    folder: Path,
    model: Path,
    *,
    adapters: Sequence[Path] = (),
    applied: bool = True,
    cached: bool = False,
    length: int = 256,
    key: str | None = None,
    threads: int = 1,
) -> Iterator[RealServer]:
    """Start llama-server, and end it with the block.

    Args:
        folder: What `serving.sh` made.
        model: The GGUF file of the model.
        adapters: GGUF files of adapters. Their ids are 0, 1, ... in this order.
        applied: Whether the adapters are switched on when the server starts.
        cached: Whether it reuses what it computed for an earlier prompt. Its cache takes no notice
            of adapters that are switched on or off.
        length: The most tokens of a prompt with its answer.
        key: The API key that it asks for. None: it asks for none.
        threads: How many threads it computes with.

    Raises:
        RuntimeError: when it does not start; the message ends with the end of its log.
    """
    port = free_port()
    slots = 8
    arguments: list[object] = [
        *(_program(folder, "llama-server"), "--model", Path(model).resolve()),
        *("--host", "127.0.0.1", "--port", port, "--threads", threads, "--threads-batch", threads),
        *("--parallel", slots, "--ctx-size", length * slots, "--no-kv-unified"),
        *("--fit", "off", "--offline", "--no-webui"),
        "--cache-prompt" if cached else "--no-cache-prompt",
    ]
    if adapters:
        # --lora-init-without-apply would leave the scale of every adapter at 1.
        scaled = [f"{Path(file).resolve()}:{float(applied)}" for file in adapters]
        arguments += ["--lora-scaled", ",".join(scaled)]
    if key is not None:
        arguments += ["--api-key", key]
    with _started("llama.cpp", arguments, {}, port, key) as server:
        yield server


def free_port() -> int:
    """Return a port of the loopback address on which nothing listens."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@contextmanager
def _started(
    kind: str,
    arguments: Sequence[object],
    settings: Mapping[str, str],
    port: int,
    key: str | None,
) -> Iterator[RealServer]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="factsmith-server-") as place:
        log = Path(place) / "log.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(argument) for argument in arguments],
                env={**kept, "HF_HUB_OFFLINE": "1", **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=place,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, log, begun)
            yield RealServer(kind, url, process, log, time.monotonic() - begun, key)
        finally:
            _end(process)


def _end_with_parent() -> None:
    """Let the kernel end this process when its parent is killed. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def _wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log: Path, begun: float
) -> None:
    while time.monotonic() - begun < START_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except OSError:  # not yet: refused, or 503 while it loads the model
            time.sleep(_HEALTHY_EVERY)
    raise RuntimeError(f"no answer within {START_SECONDS:.0f} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process group: politely, and after ten seconds by force."""
    _signal(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    _signal(process, signal.SIGKILL)  # also children that outlived their parent
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> None:
    """Start a server, ask it, and print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a model, or GGUF file")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--lora", type=Path, help="adapter: a folder, or a GGUF file")
    parser.add_argument("--rank", type=int, default=8, help="largest rank of an adapter in vLLM")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serving", help=f"folder that serving.sh made; default: ${VARIABLE}")
    options = parser.parse_args()
    folder, threads = serving_folder(options.serving), options.threads
    if options.model.is_dir():
        with vllm(
            folder,
            options.model,
            adapters=int(options.lora is not None),
            rank=options.rank,
            threads=threads,
        ) as server:
            name = None
            if options.lora is not None:
                name = "adapter"
                place = str(options.lora.resolve())
                server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": place})
            replies = server.ask(options.prompts, model=name, max_tokens=options.max_tokens)
    else:
        adapters = [options.lora] if options.lora is not None else []
        with llama_server(folder, options.model, adapters=adapters, threads=threads) as server:
            replies = server.ask(options.prompts, max_tokens=options.max_tokens)
    print(json.dumps(asdict(replies), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
