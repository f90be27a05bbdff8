"""The benchmark for GPUs runs on a CPU at a tiny shape, and leaves out what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "../shared/golden/facts-gpt2"


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the shared tokenizer is not there")
@pytest.mark.parametrize(("budget", "batches"), [(600, [4, 8]), (0, [])])
def test_it_runs_at_a_tiny_shape(tmp_path: Path, budget: int, batches: list[int]) -> None:
    path = tmp_path / "gpu.json"
    run = [sys.executable, "benchmarks/gpu.py", "--shape", "tiny", "--budget", str(budget)]
    done = subprocess.run([*run, "--json", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [row["facts"] for row in record["batches"]] == batches
    assert len(record["left_out"]) == 2 - len(batches)
    assert record["dtype"] == "torch.bfloat16" and record["moments"]["tokens"] == 1000
    assert all(row["times_faster_than_loop"] > 0 for row in record["batches"])
