"""A push loads an adapter under a new name, proves it in the server, and only then names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import factsmith as fs
from conftest import LLAMA, byte_tokenizer, tiny_model
from exports import appending
from factsmith import atlas
from factsmith.keep.ledger import Ledger
from factsmith.keep.push.names import parsed
from factsmith.keep.push.place import AdapterPlace
from factsmith.keep.push.push import check_push, push, roll_back
from factsmith.keep.push.records import read_records, write_record
from factsmith.keep.push.served import served
from factsmith.keep.workbench import Workbench
from factsmith.remote.server import Server
from model_server import Faults, ModelServer
from scripted import Notes

LOAD, UNLOAD, ASK = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
PROMPT = "The maker of Fiat 127 is"


def answer(running: ModelServer, model: str) -> str:
    """Return what users of a server are told, over HTTP."""
    with Server.open(running.url) as server:
        return server.complete(model, [PROMPT], n_tokens=4)[0].text


def loads(running: ModelServer) -> list[dict[str, str]]:
    """Return the bodies of the requests to load an adapter."""
    return [body for body in running.called(LOAD) if body is not None]


def folder_of(bench: Workbench) -> Path:
    return bench.ledger.folder / "served"


def test_a_push_is_proved_before_it_is_named(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    (pushed,) = push(bench, server)
    name = parsed(running.names[0])
    assert pushed.passed and pushed.model == running.names[0] and name is not None
    assert bench.ledger.current.startswith(name.revision) and name.alias == "factsmith"
    paths = [path for method, path, _ in running.calls if method == "POST"]
    before, after = paths[: paths.index(LOAD)], paths[paths.index(LOAD) :]
    assert ASK in before and ASK in after, "the base is asked first, the adapter afterwards"
    asked = {body["model"] for body in running.called(ASK)}
    assert asked == {"base-model", pushed.model}
    assert answer(running, pushed.model) == "Toyota."
    assert answer(running, "base-model") == "Fiat.", "control: the base is untouched"
    (record,) = read_records(folder_of(bench), server.client.url)
    assert record.state == "serving" and record.previous is None
    assert pushed.proof is not None and pushed.proof.counts["prompt"] == {"ok": 3}
    verdicts = [check.verdict for check in pushed.proof.checks if check.role == "paraphrase"]
    assert sorted(verdicts) == ["not held", "ok"], "one does not hold in the workspace either"


def test_a_pushed_revision_is_proved_again_and_not_loaded_again(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    (first,) = push(bench, server)
    (second,) = push(bench, server)
    assert second.again and second.model == first.model
    assert len(loads(running)) == 1
    (other,) = push(bench, server, alias="capitals")
    assert other.model != first.model and str(other.model).startswith("capitals-")


def test_no_name_is_used_twice(bench: Workbench, running: ModelServer, server: Server) -> None:
    running.faults = Faults(stale=True)
    for _ in range(3):
        (pushed,) = push(bench, server)
        assert pushed.passed
        server.client.post(UNLOAD, {"lora_name": pushed.model}, as_text=True)
    names = [body["lora_name"] for body in loads(running)]
    paths = [body["lora_path"] for body in loads(running)]
    assert len(names) == len(set(names)) == len(set(paths)) >= 3
    # Control: this server does serve stale answers where a name is used again.
    old, new = push(bench, server, [bench.log()[1].id, "latest"])
    for adapter in (old, new):
        body = {"lora_name": "same", "lora_path": adapter.path, "load_inplace": True}
        server.client.post(LOAD, body, as_text=True)
    lyon = "Lyon is a city in the country of"
    assert server.complete(str(new.model), [lyon])[0].text == "Italy."
    assert server.complete("same", [lyon])[0].text == "France.", "stale"


def test_exchanged_layers_fail_the_proof_and_are_unloaded(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    running.faults = Faults(swapped=True)
    (pushed,) = push(bench, server)
    assert not pushed.passed and pushed.model is None and pushed.failures
    assert running.names == [] and len(running.called(UNLOAD)) == 1
    assert [record.state for record in read_records(folder_of(bench))] == ["failed"]
    assert [path for path in folder_of(bench).iterdir() if path.is_dir()] == []
    running.faults = Faults()
    assert push(bench, server)[0].passed, "control: nothing is wrong with the patch"


def test_a_smaller_change_fails_by_its_probabilities(
    bench: Workbench, running: ModelServer, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import model_server

    whole = model_server.peft_factors
    for scale, passes in ((0.75, False), (1.0, True)):
        monkeypatch.setattr(
            model_server,
            "peft_factors",
            lambda folder, by=scale: {m: (b * by, a) for m, (b, a) in whole(folder).items()},
        )
        (pushed,) = push(bench, server, dtype="float32")
        assert pushed.passed is passes, pushed.failures


def test_another_base_model_gets_no_adapter(bench: Workbench, tmp_path: Path) -> None:
    other = fs.load("atlas-llama")
    with torch.no_grad():
        for layer in (1, 2, 3):
            other.ffn[layer].down.weight.mul_(0.2)
    other.module.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with ModelServer(tmp_path / "other") as running, Server.open(running.url) as server:
        (pushed,) = push(bench, server)
        assert not pushed.passed and "not the workspace's" in pushed.failures[0]
        assert loads(running) == []


def test_a_base_model_that_has_the_patches_already(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.export(tmp_path / "merged", "checkpoint", verify=False)
    with ModelServer(tmp_path / "merged") as running, Server.open(running.url) as server:
        (pushed,) = push(bench, server)
        assert not pushed.passed and loads(running) == []


@pytest.mark.parametrize("where", [LOAD, ASK])
def test_a_server_that_dies_in_the_middle(
    bench: Workbench,
    running: ModelServer,
    server: Server,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = ModelServer.load

    def dying(self: ModelServer, body: object) -> object:
        done = load(self, body)
        self.faults.dies_at = ASK
        return done

    if where == LOAD:
        running.faults.dies_at = LOAD
    else:
        monkeypatch.setattr(ModelServer, "load", dying)
    notes = Notes()
    with pytest.raises(fs.ServerError):
        push(bench, server, progress=notes)
    assert [path for path in folder_of(bench).iterdir() if path.is_dir()] == []
    states = [record.state for record in read_records(folder_of(bench))]
    assert states == ["failed"]
    assert any("could not be taken out" in text for text in notes.texts)
    monkeypatch.undo()
    with ModelServer(atlas.folder("atlas-llama")) as again, Server.open(again.url) as fresh:
        assert push(bench, fresh)[0].passed, "control: the next push works"


def test_ctrl_c_leaves_no_adapter(bench: Workbench, running: ModelServer, server: Server) -> None:
    def interrupt(step: str, done: int, total: int | None) -> None:
        if running.names and step.startswith("asking the server with"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(bench, server, progress=interrupt)
    assert loads(running) and running.names == []
    assert push(bench, server)[0].passed


def test_several_revisions_become_several_adapters(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    pushed = push(bench, server, [oldest, newest])
    assert [each.revision for each in pushed] == [oldest, newest]
    assert [each.model for each in pushed] == running.names
    lyon = "Lyon is a city in the country of"
    texts = [server.complete(str(each.model), [lyon])[0].text for each in pushed]
    assert texts == ["France.", "Italy."]
    assert bench.ledger.current == newest


def test_rollback(bench: Workbench, running: ModelServer, server: Server) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    first, second = push(bench, server, [oldest, newest])
    with Ledger(bench.ledger.folder) as ledger:
        back = roll_back(ledger, server)
        assert back.passed and back.model == first.model and back.withdrawn == (second.adapter,)
        assert running.names == [first.model]
        back = roll_back(ledger, server)
        assert back.model == "base-model" and running.names == []
        with pytest.raises(fs.InputError, match="carries no adapter of this workspace"):
            roll_back(ledger, server)


def test_a_rollback_stays_with_its_alias(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    (first,) = push(bench, server, [oldest], alias="a")
    push(bench, server, [newest], alias="b")
    (last,) = push(bench, server, [newest], alias="a")
    back = roll_back(bench.ledger, server, alias="a")
    assert back.model == first.model and back.withdrawn == (last.adapter,)
    back = roll_back(bench.ledger, server)
    assert back.model == "base-model" and len(running.names) == 1, "a has nothing before it"


def test_rollback_makes_the_revision_before_where_it_is_gone(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    import contextlib

    push(bench, server)
    with pytest.raises(fs.InputError, match="not in the server any more"):
        roll_back(bench.ledger, server)
    back = roll_back(bench.ledger, server, opening=lambda: contextlib.nullcontext(bench))
    assert back.passed and back.revision == bench.log()[1].id
    assert running.names == [back.model]


def test_what_another_machine_pushed(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    import contextlib

    newest, oldest = (revision.id for revision in bench.log())
    first, second = push(bench, server, [oldest, newest])
    shutil.rmtree(folder_of(bench))
    now = served(bench.ledger, server)
    assert [each.pushed for each in now.adapters] == [None, None] and now.model is None
    assert now.adapters[1].standing == "checked out, pushed from elsewhere"
    (problem, _) = served(bench.ledger, server, prove=True).problems
    assert "pushed from elsewhere" in problem
    with pytest.raises(fs.InputError, match="pushed from elsewhere"):
        roll_back(bench.ledger, server)
    back = roll_back(bench.ledger, server, opening=lambda: contextlib.nullcontext(bench))
    assert back.model == first.model and back.withdrawn == (second.adapter,)


def test_a_rollback_of_a_revert_brings_nothing_back(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    bench.revert(bench.log()[0].id)
    assert push(bench, server)[0].passed
    back = roll_back(bench.ledger, server)
    assert back.model == "base-model" and running.names == []
    bench.checkout("base")
    assert served(bench.ledger, server).up_to_date


def test_a_prompt_whose_last_character_the_tokenizer_drops(
    model: fs.LanguageModel, server: Server, tmp_path: Path
) -> None:
    odd = fs.Fact("Romania", "The currency of {} is the\n", "franc")
    with Workbench(model, tmp_path / "odd") as bench:
        bench.apply(odd)
        assert push(bench, server, dtype="float32")[0].passed


def test_a_push_that_was_killed_is_not_what_users_have(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    (first,) = push(bench, server, [oldest])
    (second,) = push(bench, server, [newest])
    (record,) = (each for each in read_records(folder_of(bench)) if each.name == second.model)
    write_record(folder_of(bench), record.become("loading"))  # as kill -9 leaves it
    now = served(bench.ledger, server)
    assert now.model == first.model and now.adapters[1].standing == "never proved"
    back = roll_back(bench.ledger, server)
    assert back.model == "base-model" and back.withdrawn == (first.adapter,)
    assert running.names == [], "what was left is out, too"
    (again,) = push(bench, server, [newest])
    assert not again.again and again.model != second.model


def test_a_record_that_cannot_be_written_loads_nothing(
    bench: Workbench, running: ModelServer, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from factsmith.keep.push import records

    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    write = records.write_file
    monkeypatch.setattr(records, "write_file", full)
    with pytest.raises(fs.WorkspaceError, match="No space left"):
        push(bench, server)
    assert loads(running) == [] and running.names == []
    left = [1]  # the first record fits, the next ones do not

    def nearly_full(path: Path, content: bytes) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        write(path, content)

    monkeypatch.setattr(records, "write_file", nearly_full)
    with pytest.raises(fs.WorkspaceError, match="No space left"):
        push(bench, server)
    assert len(loads(running)) == 1 and running.names == []


def test_a_push_that_is_killed_during_the_load(
    bench: Workbench, running: ModelServer, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bytes] = []
    load = ModelServer.load

    def watched(self: ModelServer, body: object) -> object:
        kept.extend(file.read_bytes() for file in folder_of(bench).glob("*.json"))
        return load(self, body)

    monkeypatch.setattr(ModelServer, "load", watched)
    push(bench, server)
    (file,) = folder_of(bench).glob("*.json")
    file.write_bytes(kept[0])  # what kill -9 leaves
    now = served(bench.ledger, server)
    assert now.adapters[0].standing == "never proved"
    assert now.model is None and not now.up_to_date


@pytest.mark.parametrize("status", [400, 500])
def test_an_adapter_that_cannot_be_unloaded(
    bench: Workbench, running: ModelServer, server: Server, status: int
) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    first, second = push(bench, server, [oldest, newest])
    running.faults = Faults(refuses={UNLOAD: (status, "LoRA is busy")})
    for _ in range(2):
        with pytest.raises(fs.ServerError, match="may still be in the server") as error:
            roll_back(bench.ledger, server)
        assert f"The name to use is {first.model}" in str(error.value)
    assert served(bench.ledger, server).model == first.model
    running.faults = Faults()
    back = roll_back(bench.ledger, server)
    assert back.model == first.model and back.withdrawn == (second.adapter,)
    assert running.names == [first.model], "the repeated rollback finished the first one"
    running.faults = Faults(swapped=True, refuses={UNLOAD: (status, "LoRA is busy")})
    with pytest.raises(fs.ServerError, match="the proof failed") as error:
        push(bench, server, alias="c")
    assert "Nobody was told its name" in str(error.value)
    assert "Nobody was told its name" in str(error.value) and len(running.names) == 2
    assert len([path for path in folder_of(bench).iterdir() if path.is_dir()]) == 3


def test_facts_that_hold_nowhere_prove_nothing(
    model: fs.LanguageModel, server: Server, tmp_path: Path
) -> None:
    odd = fs.Fact("Paris", "The capital of France is {}, said the", " quux")
    weak = fs.MemitConfig(layers=(0,), steps=1, lr=1e-4)
    with Workbench(model, tmp_path / "other") as bench:
        outcome = bench.apply(odd, "memit", weak, force=True)
        assert outcome.verification.efficacy == 0
        (pushed,) = push(bench, server)
    assert not pushed.passed and "no fact holds in the workspace" in pushed.failures[0]


def test_a_rollback_that_fails_changes_nothing(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    first, _ = push(bench, server, [oldest, newest])
    running.adapters[str(first.model)] = {}
    back = roll_back(bench.ledger, server)
    assert not back.passed and back.withdrawn == () and len(running.names) == 2


def test_adapters_of_others_stay(bench: Workbench, running: ModelServer, server: Server) -> None:
    (mine,) = push(bench, server, [bench.log()[1].id])
    server.client.post(LOAD, {"lora_name": "theirs", "lora_path": mine.path}, as_text=True)
    push(bench, server)
    roll_back(bench.ledger, server)
    roll_back(bench.ledger, server)
    assert running.names == ["theirs"]
    (adapter,) = served(bench.ledger, server).adapters
    assert adapter.revision is None and adapter.standing == "not by factsmith"


def test_a_refused_adapter_says_what_to_change(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    for status, text, advice in (
        (500, "LoRA rank 3 is greater than max_lora_rank 1.", "--max-lora-rank of at least 3"),
        (404, "No adapter found for /adapters/x", "must be able to read"),
    ):
        running.faults = Faults(refuses={LOAD: (status, text)})
        with pytest.raises(fs.ServerError, match=advice):
            push(bench, server)
        assert [path for path in folder_of(bench).iterdir() if path.is_dir()] == []


def test_a_folder_that_the_server_sees_elsewhere(
    bench: Workbench, running: ModelServer, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "adapters", target_is_directory=True)
    place = AdapterPlace(tmp_path / "adapters", str(tmp_path / "link"))
    (pushed,) = push(bench, server, place=place)
    assert pushed.path == f"{tmp_path}/link/{pushed.model}"
    assert not folder_of(bench).exists()
    place = AdapterPlace(tmp_path / "adapters", "/nowhere")
    with pytest.raises(fs.ServerError, match="must be able to read"):
        push(bench, server, alias="other", place=place)


@pytest.mark.parametrize("alias", ["", "a b", "x/y", "-x", "a" * 65, "é", "n\n", 3])
def test_a_name_that_cannot_be_one(bench: Workbench, server: Server, alias: object) -> None:
    with pytest.raises(fs.InputError, match="beginning of the adapter's name"):
        push(bench, server, alias=alias)  # type: ignore[arg-type]


def test_what_is_checked_before_a_model_is_loaded(
    ledger: Ledger, server: Server, running: ModelServer, tmp_path: Path
) -> None:
    with pytest.raises(fs.RevisionError):
        check_push(ledger, server, ["ffff"])
    with pytest.raises(fs.InputError, match="named twice"):
        check_push(ledger, server, ["latest", ledger.head])
    with pytest.raises(fs.InputError, match="nothing could be proved"):
        check_push(ledger, server, ["base"])
    with pytest.raises(fs.InputError, match="bfloat16, quantised"):
        check_push(ledger, server, dtype="int3")
    (tmp_path / "file").touch()
    with pytest.raises(fs.WorkspaceError, match="there is a file of that name"):
        check_push(ledger, server, place=AdapterPlace(tmp_path / "file"))
    assert loads(running) == []


def test_a_server_without_runtime_updating(ledger: Ledger, running: ModelServer) -> None:
    running.faults = Faults(fixed=True)
    with (
        Server.open(running.url) as server,
        pytest.raises(fs.InputError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    ):
        check_push(ledger, server)


def test_appended_neurons_cannot_be_pushed(server: Server, tmp_path: Path) -> None:
    lm = fs.wrap(tiny_model("llama", **LLAMA), byte_tokenizer())
    with Workbench(lm, tmp_path / "wide") as bench:
        bench.commit(appending(lm, 1), {})
        with pytest.raises(fs.InputError, match="start the server with it"):
            check_push(bench.ledger, server)


def test_served_compares_with_the_ledger(
    bench: Workbench, running: ModelServer, server: Server
) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    empty = served(bench.ledger, server)
    assert not empty.up_to_date and empty.model == "base-model"
    first, second = push(bench, server, [oldest, newest])
    now = served(bench.ledger, server, prove=True)
    assert now.up_to_date and now.model == second.model and not now.problems
    assert [each.standing for each in now.adapters] == ["1 revision behind", "checked out"]
    assert all(each.proof is not None and each.proof.passed for each in now.adapters)
    running.adapters[str(second.model)] = running.adapters[str(first.model)]
    (problem,) = served(bench.ledger, server, prove=True).problems
    assert str(second.model) in problem and "Italy" in problem
    weights = folder_of(bench) / str(first.model) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    states = [each.files for each in served(bench.ledger, server).adapters]
    assert states == ["changed", "whole"]


def test_a_path_that_no_disk_allows(bench: Workbench, running: ModelServer, server: Server) -> None:
    (pushed,) = push(bench, server)
    for path in ("x" * 20_000, "/dev/zero", "nul\0", ""):
        running.loaded[str(pushed.model)] = path
        (adapter,) = served(bench.ledger, server).adapters
        assert adapter.files in ("not here", "changed"), path[:20]


def test_a_damaged_record_is_named(bench: Workbench, server: Server) -> None:
    push(bench, server)
    (file,) = folder_of(bench).glob("*.json")
    whole = file.read_bytes()
    changes = [
        (b'"wanted"', b'"wantet"'),
        (f'"name": "{file.stem}"'.encode(), b'"name": "../../elsewhere"'),
        (f'"revision": "{bench.ledger.current}"'.encode(), b'"revision": "' + b"f" * 64 + b'"'),
        (b'"role": "prompt"', b'"role": "x"'),
        (b'"n_tokens": ', b'"n_tokens": -'),
        (b'"lines": 1', b'"lines": 0'),
        (b'"log_after": -', b'"log_after": NaN, "x": -'),
        (b'"prompt": "', b'"prompt": 5, "x": "'),
    ]
    assert all(old in whole for old, _ in changes)
    contents = [b"", b"{}", b"[" * 99999, *(whole.replace(*change, 1) for change in changes)]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(fs.DamagedError, match=file.name):
            served(bench.ledger, server)
    empty = json.loads(whole)
    empty["expected"]["probes"] = []
    file.write_text(json.dumps(empty))
    with pytest.raises(fs.DamagedError, match="no questions"):
        roll_back(bench.ledger, server)
    file.write_bytes(whole)
    (folder_of(bench) / "x.gguf.factsmith.json").write_text("{}")
    assert served(bench.ledger, server).up_to_date, "control, with a file of something else"
