"""A program `factsmith` for shells that starts in a moment, because torch is loaded only once.

    with forked(folder) as path:            # a folder with the program, for PATH
        subprocess.run(["bash", "-c", "factsmith status | head -1"], env={..., "PATH": path})

A server process loads factsmith and forks for each command. The fork gets the command's arguments,
folder, environment and streams, so it cannot be told from a process of its own.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

_CLIENT = """#!{python} -SE
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
about = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
server.sendmsg([len(about).to_bytes(4, "big")], streams)
server.sendall(about)
sys.exit(int(server.recv(8) or b"99"))
"""


@contextlib.contextmanager
def forked(folder: Path) -> Iterator[Path]:
    """Serve the program for the length of a block, and return the folder that it is in."""
    folder.mkdir(parents=True, exist_ok=True)
    address = str(folder / "socket")
    program = folder / "factsmith"
    program.write_text(_CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address])
    try:
        while not Path(address).exists():
            assert server.poll() is None, "the server of commands ended"
            time.sleep(0.05)
        yield folder
    finally:
        server.terminate()
        server.wait()


def _serve(address: str) -> None:
    """Fork for each command that comes to an address."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import factsmith.cli
    import factsmith.keep.workbench  # noqa: F401

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen(64)
    Path(f"{address}.new").rename(address)
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            if os.fork() == 0:
                _run(client)
            _, status = os.wait()
            client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        client.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _run(client: socket.socket) -> None:
    """Run one command, and end the process."""
    size, sent, _, _ = client.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i")
    streams.frombytes(sent[0][2])
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += client.recv(65536)
    client.close()
    words, place, environment = json.loads(content)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["factsmith", *words]
    code: object = 1
    try:
        import torch

        import factsmith.cli

        # torch makes its pool of threads again after a fork. Threads that load weights must not
        # meet it half made, which is an error in torch.
        torch.set_num_threads(1)
        factsmith.cli.main(words)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            output.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve(sys.argv[1])
