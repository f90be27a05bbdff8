"""How real servers are started, asked and ended, with a program in their place."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from tools.servers import VARIABLE, llama_server, missing, serving_folder, vllm

PROGRAM = f"""#!{sys.executable}
import http.server, json, os, subprocess, sys

child = subprocess.Popen(["sleep", "600"])
asked = {{"arguments": sys.argv[1:], "loras": os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")}}

class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        listed = [{{"id": "base"}}, {{"id": "patched"}}]
        self.reply({{"data": listed, "child": child.pid, **asked}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization")
        if self.path == "/tokenize":
            self.reply({{"tokens": [1, 2]}})
        elif body.get("lora") == []:
            self.reply({{"error": "no scale"}}, 400)
        else:
            text = [f"{{body['model']}} {{prompt}} {{key}}" for prompt in body["prompt"]]
            choices = [
                {{"index": n, "text": text[n], "logprobs": {{"token_logprobs": [-0.5]}}}}
                for n in reversed(range(len(text)))
            ]
            self.reply({{"choices": choices}})

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with programs that answer as the servers do."""
    (tmp_path / "vllm/bin").mkdir(parents=True)
    for program in (tmp_path / "vllm/bin/python", tmp_path / "llama-server"):
        program.write_text(PROGRAM)
        program.chmod(0o755)
    return tmp_path


def runs(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_a_server_is_asked_and_ends_with_its_children(folder: Path) -> None:
    with vllm(folder, Path("model"), adapters=8, rank=16, key="secret") as server:
        about = server.get("/v1/models")
        child = about["child"]
        assert runs(server.process.pid) and runs(child), "the control"
        assert server.models() == ["base", "patched"]
        replies = server.ask(["a", "b"], model="patched")
        assert replies.answers == ["patched a Bearer secret", "patched b Bearer secret"]
        assert replies.tokens == [[1, 2], [1, 2]] and replies.log_probs == [-0.5, -0.5]
        text = " ".join(about["arguments"])
        assert "--max-loras 8 --max-lora-rank 16" in text and about["loras"] == "True"
        assert server.seconds > 0 and server.log.is_file()
    deadline = time.monotonic() + 5
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(server.process.pid) and not runs(child)


def test_adapters_and_scales_of_llama_server(folder: Path) -> None:
    adapters = [Path("/a.gguf"), Path("/b.gguf")]
    with llama_server(folder, Path("m.gguf"), adapters=adapters, applied=False) as server:
        text = " ".join(server.get("/")["arguments"])
        assert "--lora-scaled /a.gguf:0.0,/b.gguf:0.0" in text
        with pytest.raises(RuntimeError, match=r"400: .*no scale"):
            server.ask(["a"], scales={})
        server.kill()
        with pytest.raises(OSError):
            server.get("/")


def test_a_server_that_does_not_start_says_why(folder: Path) -> None:
    program = folder / "llama-server"
    program.write_text("#!/bin/sh\necho cannot read the model\nexit 3\n")
    with pytest.raises(RuntimeError, match="ended with 3:\ncannot read the model"):  # noqa: SIM117
        with llama_server(folder, Path("m.gguf")):
            pytest.fail("it does not run")


def test_a_folder_without_servers_says_what_to_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing(folder, "vllm") is None and missing(folder, "llama-server") is None
    empty = tmp_path / "empty"
    assert "tools/serving.sh" in str(missing(empty, "vllm"))
    monkeypatch.setenv(VARIABLE, str(empty))
    assert serving_folder() == empty and serving_folder(folder) == folder
    monkeypatch.delenv(VARIABLE)
    assert serving_folder().name == ".serving"
