"""Lost revisions on the command line: no command hides them, and `recover` puts them back."""

from __future__ import annotations

import shutil
from pathlib import Path

from commands import Run
from exports import some_delta
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from ledgers import lose_records


def test_the_command_line_says_what_has_no_record(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("init", model, "space").code == 0
    with Workbench(load(model), tmp_path / "space") as bench:
        deltas = [bench.commit(some_delta(bench.lm, seed)).delta for seed in (1, 2)]
    lose_records(tmp_path / "space", 1)
    for command in ("log", "status", "verify", "gc"):
        done = run(command, "-w", "space")
        assert f"without a record: {deltas[1][:10]} " in done.out, command
        assert "recover -w space --patches` commits" in done.out
        assert run(command, "-w", "space", "--json").code in (0, 4)
    assert run("gc", "-w", "space", "--json").json["kept"][0]["delta"] == deltas[1]
    done = run("recover", "-w", "space", "--patches", "--json").json
    assert [each["delta"] for each in done["committed"]] == [deltas[1]]
    assert "without a record" not in run("log", "-w", "space").out


def test_the_command_line_puts_lost_revisions_back(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("init", model, "space").code == 0
    space, ids = tmp_path / "space", []
    with Workbench(load(model), space) as bench:
        lm = bench.lm
        ids.append(bench.commit(some_delta(lm, 1)).id)
        bench.ledger._database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        ids.append(bench.commit(some_delta(lm, 2)).id)
        skip = shutil.ignore_patterns("*-wal", "*-shm")
        for name in ("one", "two"):
            shutil.copytree(space, tmp_path / name, ignore=skip)
    for words in (
        ["log"],
        ["status"],
        ["verify"],
        ["gc"],
        ["show", "latest"],
        ["checkout", "base"],
    ):
        done = run(*words, "-w", "one")
        assert done.code == 5 and "factsmith recover -w one`" in done.err, words
    done = run("recover", "-w", "one", "--dry-run", "--json").json
    assert [each["id"] for each in done["recovered"]] == ids[1:] and done["dry_run"]
    assert "put back" in run("recover", "-w", "one").out
    assert [each["id"] for each in run("log", "-w", "one", "--json").json["revisions"]] == ids[::-1]
    assert "no revision is missing" in run("recover", "-w", "one").out
    shutil.rmtree(tmp_path / "two" / "deltas")
    (tmp_path / "two" / "deltas").mkdir()
    done = run("recover", "-w", "two")
    assert done.code == 5 and "cannot be put back" in done.out and "--give-up`" in done.out
    assert "given up" in run("recover", "-w", "two", "--give-up").out
    assert run("log", "-w", "two").code == 0


def test_a_refused_init_leaves_nothing_and_the_advice_works(
    run: Run, model: Path, tmp_path: Path
) -> None:
    assert run("init", model, "space").code == 0
    with Workbench(load(model), tmp_path / "space") as bench:
        identity = bench.commit(some_delta(bench.lm, 1)).id
    (tmp_path / "space" / "ledger.db").unlink()
    for words in (["init", model, "space"], ["recover", "-w", "space"], ["log", "-w", "space"]):
        done = run(*words)
        assert done.code == 5 and "recover -w NEW`" in done.err, words
        assert not (tmp_path / "space" / "ledger.db").exists()
    assert run("init", model, "new").code == 0
    for name in ("deltas", "records"):
        shutil.copytree(tmp_path / "space" / name, tmp_path / "new" / name, dirs_exist_ok=True)
    assert run("recover", "-w", "new").code == 0
    revisions = run("log", "-w", "new", "--json").json["revisions"]
    assert [each["id"] for each in revisions] == [identity]
