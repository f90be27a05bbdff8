"""Asking a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import PROMPT, Run


def test_a_model_cannot_steer_the_terminal(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factsmith.model.load.LanguageModel.answer", lambda self, prompts, max_new_tokens: ["\x1b[2J[bold]x[/bold]"])
    done = run("ask", model, PROMPT)
    assert "\x1b" not in done.out and "[bold]x[/bold]" in done.out
