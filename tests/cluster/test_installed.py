"""What surrounds the import and the start of Ray."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from factsmith.cluster.installed import need_ray, uninterrupted, why
from factsmith.core.errors import ClusterError


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"pip install 'factsmith\[ray\]'"):
        need_ray()


def test_a_ctrl_c_waits_for_the_end_of_the_block() -> None:
    handler = signal.getsignal(signal.SIGINT)
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
    assert reached == [1] and signal.getsignal(signal.SIGINT) is handler
    with uninterrupted():
        reached.append(2)
    assert reached == [1, 2], "nothing is raised where nobody pressed a key"


def test_the_reason_of_an_error_is_one_line_without_colours() -> None:
    assert why(ValueError("\n\x1b[36mray::run()\x1b[39m died.\nand more")) == "ray::run() died"
    assert why(ValueError()) == "ValueError"
