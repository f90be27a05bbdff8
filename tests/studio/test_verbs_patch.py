"""The room Patch: what a form asks for, a preview that `apply` keeps, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from factsmith.core.errors import FactError, InputError, WorkspaceError
from factsmith.keep.ledger import Ledger
from factsmith.studio.desk import Desk
from factsmith.studio.facts import FactArguments, wanted_of
from factsmith.studio.sheets import LARGEST, Sheets
from factsmith.studio.verbs.moving import REVERT
from factsmith.studio.verbs.patch import APPLY, PLAN, PREVIEW
from studio_keeping import (
    FIAT,
    differing,
    opened_desk,
    run,
    run_command,
    run_program,
    snippets,
    without_times,
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk whose workspace carries no patch; each test leaves it so."""
    with opened_desk(tmp_path_factory.mktemp("patch") / "space") as opened:
        yield opened


def test_a_plan_says_what_the_model_says_now(desk: Desk) -> None:
    answer = run(desk, PLAN, **FIAT)
    (entry,) = answer.result["entries"]
    assert entry["answer"] == desk.bench.lm.answer([entry["fact"]["prompt"].format("Fiat 127")])[0]
    assert not entry["known"] and not answer.failed and answer.view["n_new"] == 1
    known = run(desk, PLAN, **{**FIAT, "target": "Fiat"})
    assert known.result["entries"][0]["known"] and known.view["n_new"] == 0
    assert desk.bench.log() == []


def test_apply_keeps_the_preview(desk: Desk) -> None:
    base = desk.bench.lm.fingerprint
    tried = run(desk, PREVIEW, **FIAT)
    assert tried.view["holds"] and tried.result["revision"] is None
    assert desk.bench.log() == [] and desk.bench.lm.fingerprint == base
    (row,) = tried.view["beside"]
    assert row["base"] == row["before"] != row["after"] and "Toyota" in row["after"]
    kept = run(desk, APPLY, **FIAT, message="by mouse")
    (revision,) = desk.bench.log()
    assert kept.view["revision"]["id"] == revision.id and revision.message == "by mouse"
    assert "nothing was solved again" in kept.notes[0] and "preview" not in desk.kept
    assert run(desk, REVERT, revision=revision.id).view["is_base"]
    assert desk.bench.lm.fingerprint == base


@pytest.mark.parametrize("previewed", [True, False])
def test_a_cancel_comes_before_the_commit_or_not_at_all(desk: Desk, previewed: bool) -> None:
    class Cancel:
        """Progress that cancels as soon as a revision was added."""

        def __init__(self) -> None:
            self.steps: list[str] = []

        def __call__(self, step: str, done: int, total: int | None) -> None:
            self.steps.append(step)
            if len(desk.bench.ledger.log()) > n_before:
                raise KeyboardInterrupt

    n_before = len(desk.bench.log())
    if previewed:
        run(desk, PREVIEW, **FIAT)
    cancel = Cancel()
    kept = APPLY.run(desk, APPLY.arguments.of(FIAT), cancel)
    assert kept.view["revision"] is not None and cancel.steps
    with pytest.raises(KeyboardInterrupt):  # control: a progress like this one does cancel
        PREVIEW.run(desk, PREVIEW.arguments.of(FIAT), cancel)
    run(desk, REVERT, revision="latest")


def test_another_patch_than_the_preview_is_solved_again(desk: Desk) -> None:
    run(desk, PREVIEW, **FIAT)
    applied = run(desk, APPLY, **{**FIAT, "target": "Nokia"})
    assert applied.view["revision"] is not None and not applied.notes
    again = run(desk, PREVIEW, **FIAT)  # on other weights than before
    assert again.view["beside"][0]["before"] != again.view["beside"][0]["base"]
    assert again.view["replaced"]
    run(desk, REVERT, revision="latest")
    moved = run(desk, APPLY, **FIAT)  # the preview was made on weights that are gone
    assert moved.view["revision"] is not None and not moved.notes
    run(desk, REVERT, revision="latest")


def test_a_failed_gate_keeps_nothing_unless_forced(desk: Desk) -> None:
    strict = {**FIAT, "gates": ("kl_text=0",)}
    refused = run(desk, APPLY, **strict)
    n_before = len(desk.bench.log())
    assert refused.failed and refused.view["revision"] is None and refused.view["failures"]
    forced = run(desk, APPLY, **strict, force=True)
    assert forced.view["forced"] and not forced.failed and len(desk.bench.log()) == n_before + 1
    run(desk, REVERT, revision="latest")
    off = run(desk, PREVIEW, **{**FIAT, "gates": ("kl_text=none", "efficacy=1")})
    assert "kl_text" not in [gate["name"] for gate in off.view["gates"]]


def test_a_conflict_is_said_in_words(desk: Desk) -> None:
    text = "- {subject: Ann, prompt: '{} lives in', target: Oslo}\n"
    digest = Sheets(desk.folder).add("two.yaml", (text + text.replace("Oslo", "Rome")).encode())
    planned = run(desk, PLAN, sheet=digest)
    assert planned.failed and len(planned.warnings) == 2 and "Ann lives in" in planned.warnings[0]
    applied = run(desk, APPLY, sheet=digest)
    assert applied.failed and applied.view["revision"] is None and not applied.view["nothing"]


@pytest.mark.parametrize(
    ("changes", "argument", "words"),
    [
        ({"target": ""}, "target", "target is empty"),
        ({"subject": " "}, "subject", "subject is empty"),
        ({"prompt": "The maker is"}, "prompt", "0 slots"),
        ({"forget": True}, "target", "one of the two"),
        ({"gates": ("efficacy=2",)}, "gates", "efficacy"),
        ({"gates": ("efficacy",)}, "gates", "NAME=VALUE"),
        ({"settings": ("stepz=4",)}, "settings", "stepz"),
        ({"layers": (0, 1)}, "layers", "layer"),
        ({"layers": (99,)}, "layers", "99"),
        ({"sheet": "../../ledger.db"}, "sheet", "sheet and subject and prompt"),
        ({"document": "- {subject: Ann}"}, "document", "document and subject"),
    ],
)
def test_a_form_that_is_not_whole_names_the_field(
    desk: Desk, changes: dict[str, object], argument: str | None, words: str
) -> None:
    with pytest.raises(InputError, match=words) as error:
        run(desk, PLAN, **{**FIAT, **changes})
    assert argument is None or error.value.argument == argument


def test_programs_send_many_facts_as_text(desk: Desk) -> None:
    text = "subject,prompt,target\nAnn,{} lives in,Oslo\nBen,{} lives in,Rome\n"
    planned = run(desk, PLAN, document=text)
    by_file = run(desk, PLAN, sheet=Sheets(desk.folder).add("two.csv", text.encode()))
    assert len(planned.result["entries"]) == 2
    assert planned.result["entries"] == by_file.result["entries"]
    printed = run_program(snippets(desk, PLAN, document=text)[0])
    assert printed["entries"] == planned.result["entries"]
    for wrong in ("facts: [", "subject,prompt\nAnn,{} lives in"):
        with pytest.raises(FactError) as error:
            run(desk, PLAN, document=wrong)
        assert error.value.argument == "document"


@pytest.mark.parametrize(
    ("prompt", "slotted"),
    [
        ("The maker of Fiat 127 is", "The maker of {} is"),
        ("The maker of {} is", "The maker of {} is"),
        ("Fiat 1274 and Fiat 127, Fiat 127", "Fiat 1274 and Fiat 127, Fiat 127"),
        ("The maker of Fiat 1274 is", "The maker of Fiat 1274 is"),
        ("{{a}} Fiat 127 is", "{{a}} Fiat 127 is"),
    ],
)
def test_a_prompt_may_have_the_subject_itself(prompt: str, slotted: str) -> None:
    arguments = FactArguments.of({**FIAT, "prompt": prompt})
    assert arguments.prompt == slotted
    assert FactArguments.of_query(arguments.query()) == arguments


def test_what_a_form_asks_for_is_read_once(desk: Desk) -> None:
    arguments = FactArguments.of({**FIAT, "message": "once"})
    wanted = wanted_of(arguments, desk.folder)
    assert wanted_of(arguments, desk.folder) is wanted
    wanted.file.unlink()
    assert wanted_of(arguments, desk.folder).file.is_file()


@pytest.mark.parametrize("name", ["../../ledger.db", "0" * 64, "", "0" * 63 + "/"])
def test_a_sheet_is_named_by_its_digest_only(desk: Desk, name: str) -> None:
    with pytest.raises(InputError, match="keeps no such file"):
        Sheets(desk.folder).path(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("facts.yaml", "- {subject: Ann, prompt: '{} lives in', target: Oslo}"),
        ("C:\\\\x\\\\facts.csv", "subject,prompt,target\nAnn,{} lives in,Oslo"),
        ("", "subject,prompt,target\nAnn,{} lives in,Oslo"),
        ("", '{"subject": "Ann", "prompt": "{} lives in", "target": "Oslo"}'),
        ("", '{"facts": [\n{"subject": "Ann", "prompt": "{} lives in", "target": "Oslo"}]\n}'),
        ("", "facts:\n- {subject: Ann, prompt: '{} lives in', target: Oslo}"),
        ("a.txt", '[{"subject": "Ann", "prompt": "{} lives in", "target": "Oslo"}]'),
    ],
)
def test_a_dropped_or_pasted_sheet_is_read_by_its_kind(
    tmp_path: Path, name: str, text: str
) -> None:
    sheets = Sheets(tmp_path)
    digest = sheets.add(name, text.encode())
    assert [str(fact) for fact in sheets.read(digest).facts] == ["Ann lives in → Oslo"]
    assert sheets.add(name, text.encode()) == digest and len(list(sheets.folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", b"- {subject: Ann}", r"a\.yaml, entry 1: fact: no prompt"),
        ("<img src=x>.yaml", b"{", r"<img src=x>\.yaml is not valid YAML"),
        ("a.exe", b"MZ", "ends in .exe"),
        ("a.csv", b"  ", "is empty"),
        ("a.yaml", b"x" * (LARGEST + 1), "bytes"),
        ("a.yaml", b"\xff\xfe\xff", "not valid text"),
    ],
)
def test_a_sheet_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    with pytest.raises(InputError, match=words) as error:
        Sheets(tmp_path).add(name, content)
    assert error.value.argument == "sheet" and str(tmp_path) not in str(error.value)
    assert not (tmp_path / "studio").exists()
    assert isinstance(error.value, FactError) or "entry" not in words


def test_old_sheets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factsmith.studio.sheets._KEPT", 3)
    sheets = Sheets(tmp_path)
    text = "- {{subject: Ann{}, prompt: '{{}} lives in', target: Oslo}}"
    digests = [sheets.add("", text.format(n).encode()) for n in range(5)]
    assert len(list(sheets.folder.iterdir())) == 3 and sheets.path(digests[-1]).is_file()


def test_a_form_and_its_file_say_the_same(desk: Desk) -> None:
    arguments = FactArguments.of(
        {
            **FIAT,
            "method": "memit",
            "layers": [0, 1],
            "settings": ["steps=9"],
            "gates": ["earlier=none"],
        }
    )
    wanted = wanted_of(arguments, desk.folder)
    again = wanted_of(FactArguments(sheet=wanted.file.stem), desk.folder)
    assert again.sheet.facts == wanted.sheet.facts and again.sheet.gates == wanted.sheet.gates
    assert again.sheet.gates.earlier is None and again.recipe.method == "memit"
    assert list(again.recipe.layers) == [0, 1] and again.recipe.changes == {"steps": 9}


@pytest.mark.parametrize("changes", [{}, {"method": "memit", "layers": (0, 1)}])
def test_the_snippets_of_a_patch_do_the_same(
    desk: Desk, tmp_path: Path, changes: dict[str, object]
) -> None:
    values = {**FIAT, **changes}
    place = tmp_path / "space"
    shutil.copytree(desk.folder, place)
    with opened_desk(place) as other:
        planned, tried = run(other, PLAN, **values), run(other, PREVIEW, **values)
        kept = run(other, APPLY, **values, message="it's kept")
        run(other, REVERT, revision="latest")
        codes = {
            verb.name: snippets(other, verb, **values, **more)
            for verb, more in ((PLAN, {}), (PREVIEW, {}), (APPLY, {"message": "it's kept"}))
        }
    for verb, answer in (("plan", planned), ("preview", tried), ("apply", kept)):
        program, command = codes[verb]
        result, code = run_command(command)
        assert code == 0 and not differing(answer, result), verb
        if verb == "apply":
            run_command([f"factsmith revert latest -w '{place}'"])
        printed = run_program(program)
        shown = answer.result["outcome"]["proposal"] if verb == "apply" else answer.result
        proposal = printed["proposal"] if verb == "apply" else printed
        if verb == "plan":
            assert without_times(proposal["entries"]) == without_times(shown["entries"])
        else:
            assert without_times(proposal["verification"]) == without_times(shown["verification"])
    with Ledger(place) as ledger:
        assert ledger.log()[0].message == "it's kept"


def test_apply_refuses_an_older_revision(desk: Desk) -> None:
    run(desk, APPLY, **FIAT)
    desk.bench.checkout("base")
    with pytest.raises(WorkspaceError, match="checkout latest"):
        run(desk, APPLY, **FIAT)
    desk.bench.checkout("latest")
    run(desk, REVERT, revision="latest")
