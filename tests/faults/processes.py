"""Entry point of the killed processes: `python -m faults.processes ledger FOLDER SEED ...`.

They fork from a small process, because pytest's process has loaded torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from faults.benches import Tiny, kill_workbenches
from faults.crowds import crowd_of_ledgers, crowd_of_workbenches, crowd_on_network_disk
from faults.ledger_kills import kill_ledgers


def _workbenches(folder: Path, seed: int, kills: int, n: int, steps: int) -> dict[str, Any]:
    """Kill workbenches, and let several work at once."""
    tiny = Tiny()
    return {
        "killed": kill_workbenches(tiny, folder / "killed", seed, kills),
        "crowd": crowd_of_workbenches(tiny, folder / "crowd", n, steps),
    }


KILLS = {"ledger": 200, "lines": 40, "workbench": 200}


def run_apart(*arguments: str) -> dict[str, Any]:
    """Run the entry point in a new process, and return its counts."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-m", "faults.processes", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


if __name__ == "__main__":
    which, place, *numbers = sys.argv[1:]
    runs = {
        "ledger": kill_ledgers,
        "ledgers": crowd_of_ledgers,
        "network": crowd_on_network_disk,
        "workbenches": _workbenches,
    }
    run = runs[which]
    print(json.dumps(run(Path(place), *map(int, numbers))))
