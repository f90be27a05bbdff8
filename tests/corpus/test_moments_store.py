"""Where second moments come from, and where they are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from conftest import TEXTS
from factsmith.core.errors import DamagedError, InputError
from factsmith.corpus.moments import SecondMoment
from factsmith.corpus.moments_cache import cache_file
from factsmith.corpus.moments_store import (
    find_moments,
    keep_moments,
    kept_moments,
    load_moments,
    moments_digest,
    moments_file,
    recorded_moments,
)
from factsmith.corpus.ordinary import DIGEST
from factsmith.model.language_model import LanguageModel


def test_second_moments_of_another_model_are_passed_over(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    foreign = SecondMoment.from_matrix(
        torch.eye(tiny_gpt2.ffn[1].d_ff), count=7, fingerprint="00" * 32
    )
    foreign.save(tmp_path / "layer1.safetensors")
    moments = find_moments(tiny_gpt2, [1], folder=tmp_path)
    assert moments[1].count != 7 and moments[1].fingerprint == tiny_gpt2.fingerprint


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), "many"])
def test_a_number_of_tokens_that_cannot_be_is_refused(
    tiny_gpt2: LanguageModel, wrong: object
) -> None:
    with pytest.raises(InputError, match="max_tokens"):
        find_moments(tiny_gpt2, [1], texts=TEXTS, max_tokens=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_tokens"):
        find_moments(tiny_gpt2, [1], max_tokens=wrong)  # type: ignore[arg-type]


def test_moments_are_computed_once_and_kept(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    first = find_moments(tiny_gpt2, [0, 1], folder=tmp_path, max_tokens=300, packed=True)
    files = {layer: moments_file(tmp_path, layer) for layer in (0, 1)}
    written = {layer: file.read_bytes() for layer, file in files.items()}
    again = find_moments(tiny_gpt2, [1, 0], folder=tmp_path, max_tokens=300)
    assert {layer: file.read_bytes() for layer, file in files.items()} == written
    assert again.keys() == first.keys() == kept_moments(tiny_gpt2, [0, 1, 2], tmp_path).keys()
    for layer, moment in load_moments(tmp_path).items():
        assert torch.equal(again[layer].matrix, moment.matrix)
    assert not kept_moments(tiny_gpt2, [0, 1], tmp_path, least=1e6)
    assert not kept_moments(tiny_gpt2, [0, 1])
    # From given texts they are computed whatever is kept.
    other = find_moments(tiny_gpt2, [0], texts=TEXTS)
    assert other[0].corpus != first[0].corpus and files[0].read_bytes() == written[0]


def test_a_folder_without_moments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layerx.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match="no second moments in"):
        load_moments(tmp_path)


def test_only_new_moments_are_written(tmp_path: Path) -> None:
    moment = SecondMoment.from_matrix(torch.eye(4), count=7, fingerprint="00", corpus="11")
    keep_moments({2: moment}, tmp_path)
    file = moments_file(tmp_path, 2)
    before = file.stat().st_mtime_ns, file.stat().st_ino
    keep_moments({2: moment}, tmp_path)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    more = SecondMoment.from_matrix(torch.eye(4), count=9, fingerprint="00", corpus="11")
    keep_moments({2: more}, tmp_path)
    assert load_moments(tmp_path)[2].count == 9


def test_the_digest_of_moments_is_that_of_their_matrices() -> None:
    one, two = (SecondMoment.from_matrix(torch.eye(4) * n, count=7) for n in (1, 2))
    assert moments_digest(one, [3]) == moments_digest({3: one}, [3]) != moments_digest(two, [3])
    both = moments_digest({3: one, 4: two}, [3, 4])
    assert both != moments_digest({3: two, 4: one}, [3, 4]) and len(both) == 64
    assert both == moments_digest({3: one, 4: two, 5: one}, [3, 4])


def test_a_workspace_of_an_earlier_version_gets_one_text_for_all_layers(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    """It has a layer from text that the model wrote, and an edit needs more layers."""
    written = find_moments(tiny_gpt2, [1], folder=tmp_path, texts="own", max_tokens=600)
    before = moments_file(tmp_path, 1).read_bytes()
    both = find_moments(tiny_gpt2, [0, 1], folder=tmp_path)
    assert both[0].corpus == both[1].corpus == DIGEST != written[1].corpus
    assert moments_file(tmp_path, 1).read_bytes() == before
    cache = cache_file(tiny_gpt2, 1).parent
    shutil.rmtree(cache)
    again = find_moments(tiny_gpt2, [0, 1], folder=tmp_path)
    assert moments_digest(again, [0, 1]) == moments_digest(both, [0, 1]) and not cache.exists()
    alone = find_moments(tiny_gpt2, [1], folder=tmp_path)
    assert moments_digest(alone, [1]) == moments_digest(written, [1])


def test_what_a_patch_recorded_stays_when_another_text_is_given(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    first = find_moments(tiny_gpt2, [0, 1], folder=tmp_path)
    second = find_moments(tiny_gpt2, [0, 1], folder=tmp_path, texts=TEXTS * 20)
    assert second[0].corpus != first[0].corpus
    kept = find_moments(tiny_gpt2, [0, 1], folder=tmp_path)
    assert moments_digest(kept, [0, 1]) == moments_digest(second, [0, 1])
    for moments in (first, second):
        for layers in ([0], [1], [1, 0], [0, 1]):
            digest = moments_digest(moments, layers)
            recorded = recorded_moments(tmp_path, layers, digest)
            assert recorded is not None and moments_digest(recorded, layers) == digest
    assert recorded_moments(tmp_path, [0, 1], "0" * 64) is None
    mixed = {0: first[0], 1: second[1]}
    assert recorded_moments(tmp_path, [0, 1], moments_digest(mixed, [0, 1])) is None
    assert len(list(tmp_path.iterdir())) == 4
    find_moments(tiny_gpt2, [0, 1], folder=tmp_path, texts=TEXTS * 20)
    assert len(list(tmp_path.iterdir())) == 4, "the same numbers are one file"
    assert load_moments(tmp_path).keys() == {0, 1}
