"""A server on the loopback address that holds a real small model, with the paths of vLLM or of
llama.cpp that factsmith uses.

    with ModelServer(atlas.folder("atlas-llama")) as server:
        server.url, server.names, server.calls

It shares no code with factsmith: transformers runs the model, and adapters are read from their
files and added to the weights. `Faults` are the ways in which real servers go wrong.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Factors = dict[str, tuple[Tensor, Tensor]]
"""{module: (B, A)} of an adapter, the scale included."""


@dataclass
class Faults:
    """The ways in which a server goes wrong.

    Attributes:
        stale: A name that is loaded again serves what was first loaded under it.
        swapped: The layers of an adapter are exchanged when it is loaded.
        dies_at: The server is gone from a POST to this path on. None: it stays.
        busy: How many requests are first answered with 503.
        refuses: {path of a POST: (status, message)}.
        caches: llama.cpp keeps what it computed for a prompt, whatever the scales were.
        fixed: Adapters cannot be loaded while it runs.
        no_log_probs: Completions without log-probabilities.
        key: The key that every request needs. "": none.
        delay: Seconds before an answer.
    """

    stale: bool = False
    swapped: bool = False
    dies_at: str | None = None
    busy: int = 0
    refuses: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    caches: bool = False
    fixed: bool = False
    no_log_probs: bool = False
    key: str = ""
    delay: float = 0.0


class ModelServer:
    """A model that is served on the loopback address, for the length of a block.

    Attributes:
        faults: What goes wrong.
        calls: (method, path, body) of every request.
        loaded: {name: the folder that it was loaded from}, for vLLM.
        scales: The scale of each adapter, for llama.cpp.
    """

    def __init__(
        self,
        folder: Path,
        kind: Literal["vllm", "llama.cpp"] = "vllm",
        *,
        name: str = "base-model",
        adapters: Sequence[Path] = (),
        faults: Faults | None = None,
        dtype: torch.dtype = torch.float32,
        port: int = 0,
    ) -> None:
        self.kind, self.name, self.folder = kind, name, Path(folder)
        self.faults = faults or Faults()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.calls: list[tuple[str, str, Any]] = []
        self.loaded: dict[str, str] = {}
        self.adapters: dict[str, Factors] = {}
        self.files = [str(file) for file in adapters]
        self.given = [gguf_factors(Path(file)) for file in adapters]
        self.scales = [0.0 for _ in adapters]
        self._turn = threading.Lock()
        self._cache: dict[str, list[tuple[float, Factors]]] = {}
        self._web = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._web.daemon_threads = True
        self._thread = threading.Thread(target=self._web.serve_forever, args=(0.02,), daemon=True)
        self.is_down = self.is_dead = False

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self._web.server_address[1]}"

    @property
    def names(self) -> list[str]:
        """The names of the loaded adapters."""
        return list(self.loaded)

    def called(self, path: str) -> list[Any]:
        """Return the bodies of the requests to a path."""
        return [body for _, where, body in self.calls if where == path]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening, so that connections are refused."""
        if not self.is_down:
            self.is_down = True
            self._web.shutdown()
            self._web.server_close()

    # ── what is asked ─────────────────────────────────────────────────────────────────────────────

    def models(self) -> dict[str, Any]:
        """Return the list of models."""
        root = str(self.folder)
        base: dict[str, Any] = {"id": self.name, "object": "model", "owned_by": "x"}
        base |= {"root": root, "parent": None, "max_model_len": 256}
        if self.kind == "llama.cpp":
            return {"object": "list", "data": [{"id": self.name, "owned_by": "llamacpp"}]}
        more = [
            {**base, "id": name, "root": path, "parent": self.name}
            for name, path in self.loaded.items()
        ]
        return {"object": "list", "data": [base, *more]}

    def load(self, body: Any) -> tuple[int, Any]:
        """Load an adapter, as vLLM does."""
        name, path = body["lora_name"], body["lora_path"]
        if name in self.loaded and not body.get("load_inplace"):
            return 400, _error(f"The lora adapter '{name}' has already been loaded.")
        if name == self.name:
            return 400, _error(f"The lora adapter '{name}' conflicts with a served base model.")
        try:
            factors = peft_factors(Path(path))
            for module, (b, a) in factors.items():
                weight = self.model.get_submodule(module).weight
                if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                    raise ValueError(f"the shapes of {module} do not fit")
            if self.faults.swapped:
                factors = exchanged(factors)
        except FileNotFoundError:
            return 404, _error(f"Loading lora {name} failed: No adapter found for {path}")
        except Exception as error:
            return 500, _error(str(error))
        if not (self.faults.stale and name in self.adapters):
            self.adapters[name] = factors
        self.loaded[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: Any) -> tuple[int, Any]:
        """Unload an adapter, as vLLM does."""
        name = body["lora_name"]
        if name not in self.loaded:
            return 404, _error(f"The lora adapter '{name}' cannot be found.")
        del self.loaded[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def set_scales(self, body: Any) -> tuple[int, Any]:
        """Set the scales of all adapters, as llama.cpp does: those not named get 0."""
        named = {each["id"]: float(each["scale"]) for each in body}
        self.scales = [named.get(at, 0.0) for at in range(len(self.scales))]
        return 200, {"success": True}

    def complete(self, body: Any) -> tuple[int, Any]:
        """Answer prompts greedily."""
        name = body.get("model", self.name)
        if self.kind == "vllm" and name != self.name and name not in self.loaded:
            return 404, _error(f"The model `{name}` does not exist.")
        prompts = body["prompt"]
        if isinstance(prompts, str) or all(isinstance(each, int) for each in prompts):
            prompts = [prompts]
        with self._turn:
            known = [
                self.faults.caches and body.get("cache_prompt", True) and str(prompt) in self._cache
                for prompt in prompts
            ]
            scales = self._cache.get(str(prompts[0])) if known[0] else None
            changes = self._factors(name, body) if scales is None else scales
            with self._changed(changes):
                choices = [self._choice(prompt, body, at) for at, prompt in enumerate(prompts)]
            if body.get("cache_prompt", True):
                self._cache |= {str(prompt): changes for prompt in prompts}
        answer = {"id": "x", "object": "text_completion", "model": name, "choices": choices}
        usage = {"prompt_tokens_details": {"cached_tokens": 9 * sum(known)}}
        return 200, answer | ({"usage": usage} if self.kind == "llama.cpp" else {})

    def _factors(self, name: str, body: Any) -> list[tuple[float, Factors]]:
        if self.kind == "vllm":
            return [(1.0, self.adapters[name])] if name != self.name else []
        scales = list(self.scales)
        if "lora" in body:
            named = {each["id"]: float(each["scale"]) for each in body["lora"]}
            scales = [named.get(at, 0.0) for at in range(len(scales))]
        return [(s, f) for s, f in zip(scales, self.given, strict=True) if s]

    @contextlib.contextmanager
    def _changed(self, adapters: list[tuple[float, Factors]]) -> Iterator[None]:
        kept: dict[str, Tensor] = {}
        with torch.no_grad():
            for scale, factors in adapters:
                for module, (b, a) in factors.items():
                    weight = self.model.get_submodule(module).weight
                    kept.setdefault(module, weight.clone())
                    weight += (scale * (b.float() @ a.float())).to(weight.dtype)
            try:
                yield
            finally:
                for module, weight in kept.items():
                    self.model.get_submodule(module).weight.copy_(weight)

    def tokenize(self, body: Any) -> tuple[int, Any]:
        """Return the tokens of a text."""
        text = body["prompt"] if self.kind == "vllm" else body["content"]
        field = "add_special_tokens" if self.kind == "vllm" else "add_special"
        special = body.get(field, self.kind == "vllm")
        return 200, {"tokens": self.tokenizer(text, add_special_tokens=special)["input_ids"]}

    def _choice(self, prompt: str | list[int], body: Any, index: int) -> dict[str, Any]:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        n_new, top, echo = body.get("max_tokens", 16), body.get("logprobs"), body.get("echo")
        stops = body.get("stop") or []
        new: list[int] = []
        rows: list[Tensor] = []
        logits = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        first, text = logits, ""
        while len(new) < n_new:
            token = int(logits[-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            rows.append(logits[-1])
            new.append(token)
            text = self._text(ids, new)
            if cut := [text.index(stop) for stop in stops if stop in text]:
                text = text[: min(cut)]
                break
            logits = self.model(torch.tensor([ids + new])).logits[0].float().log_softmax(-1)
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": "length"}
        if echo:
            choice["text"] = f"{prompt}{text}"
        if top is not None and not self.faults.no_log_probs:
            shown = list(zip(new, rows, strict=True))
            if "logprob_token_ids" in body:
                row, best = first[-1], int(first[-1].argmax())
                listed = {best, *body["logprob_token_ids"]}
                choice["logprobs"] = {
                    "tokens": [f"token_id:{best}"],
                    "token_logprobs": [float(row[best])],
                    "top_logprobs": [{f"token_id:{i}": float(row[i]) for i in listed}],
                }
            elif echo:
                before = [(t, row) for t, row in zip(ids[1:], first[:-1], strict=True)]
                choice["logprobs"] = self._legacy([(ids[0], None), *before, *shown], top)
            elif self.kind == "llama.cpp":
                choice["logprobs"] = {"content": [self._entry(t, row, top) for t, row in shown]}
            else:
                choice["logprobs"] = self._legacy(shown, top)
        return choice

    def _text(self, ids: list[int], new: list[int]) -> str:
        whole, head = self.tokenizer.decode(ids + new), self.tokenizer.decode(ids)
        return whole[len(head) :]

    def _word(self, token: int) -> str:
        """Return the text of a token, with the space before it."""
        if token in self.tokenizer.all_special_ids:
            return str(self.tokenizer.decode([token]))
        a = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode([*a, token])[1:]

    def _legacy(self, shown: Sequence[tuple[int, Tensor | None]], top: int) -> dict[str, Any]:
        offsets, at = [], 0
        words = [self._word(token) for token, _ in shown]
        for (token, row), word in zip(shown, words, strict=True):
            offsets.append(at)
            special = row is None and token in self.tokenizer.all_special_ids
            at += 0 if special else len(word)
        return {
            "tokens": words,
            "text_offset": offsets,
            "token_logprobs": [None if row is None else float(row[t]) for t, row in shown],
            "top_logprobs": [
                None
                if row is None
                else {
                    self._word(int(i)): float(row[int(i)])
                    for i in dict.fromkeys([t, *row.topk(max(top, 1)).indices.tolist()])
                }
                for t, row in shown
            ],
        }

    def _entry(self, token: int, row: Tensor, top: int) -> dict[str, Any]:
        likeliest = row.topk(max(top, 1)).indices.tolist()
        return {
            "token": self._word(token),
            "logprob": float(row[token]),
            "top_logprobs": [{"token": self._word(i), "logprob": float(row[i])} for i in likeliest],
        }


def peft_factors(folder: Path) -> Factors:
    """Read an adapter of peft by its files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    factors: Factors = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            factors[module] = (b * (config["lora_alpha"] / config["r"]), a)
    return factors


def exchanged(factors: Factors) -> Factors:
    """Return an adapter whose layers are one too high."""
    return {
        module.replace(f".{layer}.", f".{layer + 1}."): pair
        for module, pair in factors.items()
        for layer in [int(module.split(".")[2])]
    }


def gguf_factors(file: Path) -> Factors:
    """Read an adapter of llama.cpp for a Llama by its file alone."""
    import gguf

    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}
    factors: Factors = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            layer = name.split(".")[1]
            b = tensors[name.replace("lora_a", "lora_b")]
            module = f"model.layers.{layer}.mlp.down_proj"
            factors[module] = (b * (alpha / a.shape[0]), a)
    return factors


def gguf_task(file: str) -> str:
    """Read the name of the task from an adapter of llama.cpp."""
    import gguf

    field = gguf.GGUFReader(file).fields.get("adapter.lora.task_name")
    return "" if field is None else str(field.contents())


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "code": 400}}


def _handler(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    """Return a class whose objects answer the requests to a server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            self._answer("POST", json.loads(raw) if raw else None)

        def _answer(self, method: str, body: Any) -> None:
            faults = server.faults
            server.calls.append((method, self.path, body))
            if (method == "POST" and faults.dies_at == self.path) or server.is_dead:
                server.is_dead = True
                threading.Thread(target=server.stop).start()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            time.sleep(faults.delay)
            if faults.busy > 0:
                faults.busy -= 1
                self._send(503, _error("busy"))
            elif (
                faults.key
                and self.path != "/health"
                and self.headers.get("Authorization") != f"Bearer {faults.key}"
            ):
                self._send(401, {"error": "Unauthorized"})
            elif method == "POST" and self.path in faults.refuses:
                status, message = faults.refuses[self.path]
                self._send(status, _error(message))
            else:
                self._send(*self._routed(method, body))

        def _routed(self, method: str, body: Any) -> tuple[int, Any]:
            is_vllm = server.kind == "vllm"
            path = (method, self.path)
            if path == ("GET", "/v1/models"):
                return 200, server.models()
            if path == ("POST", "/v1/completions"):
                return server.complete(body)
            if path == ("POST", "/tokenize"):
                return server.tokenize(body)
            if path == ("GET", "/health"):
                return 200, {"status": "ok"}
            if is_vllm and path == ("GET", "/version"):
                return 200, {"version": "0.32.0"}
            if is_vllm and path == ("POST", "/v1/load_lora_adapter"):
                return server.load(body)
            if is_vllm and path == ("POST", "/v1/unload_lora_adapter"):
                return server.unload(body)
            if is_vllm and server.faults.fixed and self.path.endswith("_lora_adapter"):
                return 404, {"detail": "Not Found"}
            if is_vllm and path == ("GET", "/v1/load_lora_adapter"):
                return 405, {"detail": "Method Not Allowed"}
            if not is_vllm and path == ("GET", "/props"):
                return 200, {"model_path": str(server.folder), "build_info": "b11434-x"}
            if not is_vllm and path == ("GET", "/lora-adapters"):
                return 200, [
                    {"id": at, "path": file, "scale": scale, "task_name": gguf_task(file)}
                    for at, (file, scale) in enumerate(
                        zip(server.files, server.scales, strict=True)
                    )
                ]
            if not is_vllm and path == ("POST", "/lora-adapters"):
                return server.set_scales(body)
            return 404, {"detail": "Not Found"}

        def _send(self, status: int, body: Any) -> None:
            content = (body if isinstance(body, str) else json.dumps(body)).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

    return Handler
