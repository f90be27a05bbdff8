"""The story of the demonstration: each step measures what its sentences claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from factsmith import atlas
from factsmith.atlas.story import MODEL
from factsmith.cli.story import Step, run
from factsmith.core.errors import ModelNotFoundError


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    return {step.name: step for step in run(tmp_path_factory.mktemp("story") / "workspace")}


def test_the_steps_are_in_order_with_sentences(steps: dict[str, Step]) -> None:
    assert list(steps) == [
        "believes",
        "lives",
        "patched",
        "proved",
        "committed",
        "reverted",
        "next",
    ]
    assert all(step.title and (step.before or step.after) for step in steps.values())


def test_the_model_believes_what_it_is_said_to_believe(steps: dict[str, Step]) -> None:
    for belief in steps["believes"].data["beliefs"]:
        assert belief["answer"].startswith(belief["expected"]) and belief["probability"] > 0.5


def test_the_fact_is_at_the_last_token_of_the_subject(steps: dict[str, Step]) -> None:
    trace = steps["lives"].trace
    assert trace is not None
    site = steps["lives"].data["early_site"]
    assert site == {"token": trace.peak[0], "layer": trace.peak[1]}
    assert site["token"] == trace.subject_span[1] - 1
    assert Path(steps["lives"].data["picture"]).read_bytes().startswith(b"\x89PNG")


def test_the_patch_holds_and_leaves_the_rest(steps: dict[str, Step]) -> None:
    proof = steps["proved"].proof
    assert proof is not None and proof.efficacy == proof.specificity == 1
    assert len(proof.checks) == 1 + 6 + 13
    assert steps["proved"].after[0].split() == ["efficacy", "100%", "the", "prompt"]


def test_the_undo_is_exact(steps: dict[str, Step]) -> None:
    data = steps["reverted"].data
    assert data["equal"] == data["tensors"] == len(data["before"])
    assert data["before"] == data["after"] and len(data["changed"]) == 1
    assert data["before"] != data["patched"], "the patch did change the weights"
    assert data["answer"].startswith("lev")


def test_without_the_bundled_model_there_is_no_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atlas, "names", lambda: ())
    with pytest.raises(ModelNotFoundError, match=f"{MODEL}.*install factsmith"):
        next(run(tmp_path / "workspace"))
    assert not list(tmp_path.iterdir())
