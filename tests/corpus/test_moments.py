from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import GPT2, TEXTS, VOCAB, byte_tokenizer, shared_dir, tiny_model
from factsmith import atlas
from factsmith.core.errors import (
    DamagedError,
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    NumericsError,
    WorkspaceError,
)
from factsmith.corpus import text as corpus_text
from factsmith.corpus.measuring import ENOUGH_EXCESS, FIRST_COMPARED, TOKENS_PER_NEURON, how_much
from factsmith.corpus.moments import SecondMoment, moments_with_total, second_moments
from factsmith.corpus.ordinary import DIGEST, ordinary_texts
from factsmith.corpus.text import pieces
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

MANY = [*TEXTS, "A", "Paris lies there.", *(t[: 10 + 3 * i] for i, t in enumerate(TEXTS * 3))]


def by_hand(
    lm: LanguageModel, texts: list[str], layer: int, limit: int | None = None
) -> tuple[torch.Tensor, int]:
    """One text at a time through the whole model, one token at a time into the sum."""
    seen: list[torch.Tensor] = []
    handle = lm.ffn[layer].down.register_forward_hook(
        lambda module, args, output: seen.append(args[0].detach().double().flatten(0, -2))
    )
    try:
        total, count = torch.zeros(lm.ffn[layer].d_ff, lm.ffn[layer].d_ff, dtype=torch.float64), 0
        for text in texts:
            lm.module(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]))
            for m in seen.pop():
                if limit is None or count < limit:
                    total += torch.outer(m, m)
                    count += 1
    finally:
        handle.remove()
    return total / count, count


def test_equals_a_plain_loop_at_every_layer(tiny_lm: LanguageModel) -> None:
    done: list[int] = []
    moments = second_moments(tiny_lm, MANY, [2, 0], batch_tokens=100, progress=done.append)
    assert sorted(moments) == [0, 2]
    for layer, moment in moments.items():
        expected, count = by_hand(tiny_lm, MANY, layer)
        assert moment.count == count == done[-1]
        assert len(done) > 3 and done == sorted(done)
        torch.testing.assert_close(moment.matrix, expected, rtol=1e-5, atol=1e-6)
        assert moment.fingerprint == tiny_lm.fingerprint
    centred = torch.linalg.eigvalsh(moments[0].matrix)[0]
    assert centred > -1e-9


def test_a_family_that_flattens_rows_and_columns() -> None:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
    }
    lm = wrap(
        tiny_model("opt", **sizes, max_position_embeddings=64, vocab_size=VOCAB),
        byte_tokenizer(bos=True),
    )
    expected, count = by_hand(lm, MANY, 1)
    moment = second_moments(lm, MANY, [1])[1]
    assert moment.count == count
    torch.testing.assert_close(moment.matrix, expected, rtol=1e-5, atol=1e-6)


def test_padding_would_show(tiny_gpt2: LanguageModel) -> None:
    """The control: with padded tokens counted in, the matrix is another one."""
    expected, _ = by_hand(tiny_gpt2, MANY, 1)
    width = max(len(tiny_gpt2.tokenizer(t)["input_ids"]) for t in MANY)
    padded = [t + "<|end|>" * (width - len(tiny_gpt2.tokenizer(t)["input_ids"])) for t in MANY]
    assert (
        second_moments(tiny_gpt2, padded, [1])[1].matrix - expected
    ).norm() > 0.05 * expected.norm()


def test_max_tokens_and_long_texts(tiny_gpt2: LanguageModel) -> None:
    expected, count = by_hand(tiny_gpt2, TEXTS, 0, limit=50)
    moment = second_moments(tiny_gpt2, iter(TEXTS), [0], max_tokens=50)[0]
    assert moment.count == count == 50
    torch.testing.assert_close(moment.matrix, expected, rtol=1e-5, atol=1e-6)
    long = " ".join(TEXTS * 3)  # longer than the model's 64 positions
    assert second_moments(tiny_gpt2, [long], [0])[0].count == len(
        tiny_gpt2.tokenizer(long)["input_ids"]
    )


def test_layers_above_do_not_run(tiny_gpt2: LanguageModel) -> None:
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(tiny_gpt2.layers)
    ]
    try:
        second_moments(tiny_gpt2, TEXTS, [1])
    finally:
        for handle in handles:
            handle.remove()
    assert set(ran) == {0, 1}


def test_corpus_digest_tells_texts_apart(tiny_gpt2: LanguageModel) -> None:
    first, again = (second_moments(tiny_gpt2, TEXTS, [0])[0] for _ in range(2))
    other = second_moments(tiny_gpt2, TEXTS[1:], [0])[0]
    assert first.corpus == again.corpus != other.corpus


def test_save_and_load(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    moment = second_moments(tiny_gpt2, MANY, [0])[0]
    path = tmp_path / "deep" / "layer0.safetensors"
    for _ in range(2):
        moment.save(path)
    back = SecondMoment.load(path)
    assert torch.equal(back.matrix, moment.matrix)
    assert (back.count, back.fingerprint, back.corpus) == (
        moment.count,
        moment.fingerprint,
        moment.corpus,
    )
    raw = path.read_bytes()
    count = f'"count":"{moment.count}"'.encode()
    assert count in raw
    for damaged in (
        raw[:-1] + bytes([raw[-1] ^ 1]),
        raw.replace(count, count.replace(b'count":"', b'count":"9')[: len(count)]),
        raw[:200],
        b"{}",
    ):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            SecondMoment.load(path)
    with pytest.raises(DamagedError, match="no second moment"):
        SecondMoment.load(tmp_path / "absent")
    with pytest.raises(WorkspaceError, match="cannot write"):
        moment.save(path / "below-a-file")


def test_packed_is_small_and_solves_alike(tmp_path: Path) -> None:
    matrix = load_file(shared_dir() / "golden" / "second_moment.safetensors")["layer1"]
    moment = SecondMoment.from_matrix(matrix, count=50806)
    moment.save(tmp_path / "packed", packed=True)
    back = SecondMoment.load(tmp_path / "packed")
    size = (tmp_path / "packed").stat().st_size
    assert size < 768 * 769 + 768 * 4 + 1000 and back.count == 50806
    keys = (
        torch.randn(16, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        @ moment.factor.T
    )
    exact = torch.linalg.solve(matrix.double(), keys.T).T
    u, expected = (torch.nn.functional.normalize(x, dim=1) for x in (back.solve(keys), exact))
    assert (u - expected).norm(dim=1).max() < 3e-3
    scale = matrix.diagonal().sqrt()
    rounded = (
        (matrix / scale / scale[:, None]).half().double() * scale * scale[:, None]
    )  # the obvious way to pack, as a control
    plain = torch.nn.functional.normalize(torch.linalg.solve(rounded, keys.T).T, dim=1)
    assert (plain - expected).norm(dim=1).max() > 10 * (u - expected).norm(dim=1).max()


def test_bad_input(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(LayerError, match="layers 0 to 2"):
        second_moments(tiny_gpt2, TEXTS, [3])
    with pytest.raises(InputError, match="at least one layer"):
        second_moments(tiny_gpt2, TEXTS, [])
    with pytest.raises(InputError, match="no text"):
        second_moments(tiny_gpt2, [], [0])
    with pytest.raises(InputError, match="d_ff, d_ff"):
        SecondMoment.from_matrix(torch.zeros(3, 4), count=1)
    with pytest.raises(InputError, match="count is 0"):
        SecondMoment.from_matrix(torch.eye(3), count=0)
    with pytest.raises(NumericsError, match="NaN"):
        SecondMoment.from_matrix(torch.full((3, 3), float("nan")), count=1)


def varied(count: int, seed: int = 0) -> list[str]:
    """Different texts of random letters and words."""
    words = sorted(set(" ".join(TEXTS).split()))
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(words), (count, 8), generator=draw).tolist()
    return [" ".join(words[i] for i in row) for row in picks]


def test_halves_are_compared_as_stated(tiny_lm: LanguageModel) -> None:
    texts = varied(80)
    groups: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        groups[
            hashlib.sha256(repr(tiny_lm.tokenizer(text)["input_ids"]).encode()).digest()[0] % 2
        ].append(text)
    moment = second_moments(tiny_lm, texts, [1], batch_tokens=100, max_tokens=math.inf)[1]
    (a, n_a), (b, n_b) = (by_hand(tiny_lm, group, 1) for group in groups)
    whole = (n_a * a + n_b * b) / (n_a + n_b)
    torch.testing.assert_close(moment.matrix, whole, rtol=1e-5, atol=1e-6)
    apart = float((a - b).norm() / whole.norm())
    assert moment.split_half == pytest.approx(apart, rel=0.02)  # the halves are of nearly one size
    shares = [
        (1 - len(a) / float(torch.linalg.solve(x, y).trace())) * n / (n_a + n_b)
        for x, y, n in ((a, b, n_a), (b, a, n_b))
    ]
    share = sum(shares) / 2
    assert moment.excess == pytest.approx(
        share / (1 - share), rel=0.1
    )  # the trace, where the code draws keys
    assert (
        f"excess={moment.excess:.3g}" in repr(moment)
        and f"differ by {100 * moment.split_half:.1f} %" in moment.describe()
    )


def test_split_half_is_small_or_large_where_it_must_be(tiny_gpt2: LanguageModel) -> None:
    short = [text[:40] for text in varied(9)]
    few, some, many = (
        second_moments(tiny_gpt2, texts, [1], max_tokens=math.inf)[1]
        for texts in (short, varied(150), varied(1500))
    )
    assert few.split_half > 2 * some.split_half > 4 * many.split_half
    assert few.excess > 0.7 and "at least" in few.describe()  # fewer than two tokens a neuron
    assert (
        some.excess > 2 * many.excess and many.excess < 0.05 and "at least" not in many.describe()
    )
    alike = second_moments(tiny_gpt2, [f"{'A' * 40}{c}" for c in "abcdefghij"], [1])[
        1
    ]  # texts that differ in one token
    assert alike.split_half < 0.5 * few.split_half
    # A text and its copies go to one half: repeating it does not make the matrix look sure.
    copies = second_moments(tiny_gpt2, TEXTS[:1] * 40, [1])[1]
    assert (
        copies.split_half is None and copies.excess is None and "not compared" in copies.describe()
    )
    doubled = second_moments(tiny_gpt2, short * 10, [1], max_tokens=math.inf)[1]
    assert doubled.split_half == pytest.approx(few.split_half, rel=1e-6)


def test_default_number_of_tokens(tiny_gpt2: LanguageModel) -> None:
    d_ff = tiny_gpt2.ffn[0].d_ff
    assert (
        second_moments(tiny_gpt2, itertools.cycle(varied(300)), [0])[0].count
        == TOKENS_PER_NEURON * d_ff
    )  # the texts have no end
    long = varied(300) * 2
    assert sum(len(tiny_gpt2.tokenizer(t)["input_ids"]) for t in long) > TOKENS_PER_NEURON * d_ff
    everything = second_moments(tiny_gpt2, long, [0], max_tokens=math.inf)[0]
    assert everything.count == sum(len(tiny_gpt2.tokenizer(t)["input_ids"]) for t in long)
    for wrong in (0, -3, math.nan):
        with pytest.raises(InputError, match="max_tokens"):
            second_moments(tiny_gpt2, TEXTS, [0], max_tokens=wrong)


def test_bfloat16_pass(tiny_lm: LanguageModel) -> None:
    texts = varied(60)
    before = {name: tensor.clone() for name, tensor in tiny_lm.module.state_dict().items()}
    seen: list[torch.dtype] = []
    handle = tiny_lm.ffn[1].down.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    try:
        narrow = second_moments(tiny_lm, texts, [0, 1], dtype=torch.bfloat16)
    finally:
        handle.remove()
    assert set(seen) == {torch.bfloat16}
    for layer, wide in second_moments(tiny_lm, texts, [0, 1]).items():
        off = (narrow[layer].matrix - wide.matrix).norm() / wide.matrix.norm()
        assert 0 < off < 0.01 and off < 0.5 * wide.split_half
        assert narrow[layer].matrix.dtype == torch.float64 and narrow[layer].count == wide.count
        # Sums in bfloat16 as well would be much further off: the control.
        coefficients = [tiny_lm.coefficients(text, [layer])[0].bfloat16() for text in texts]
        total = torch.zeros_like(wide.matrix, dtype=torch.bfloat16)
        for m in coefficients * 5:
            total += m.T @ m
        assert (
            total.double() / (5 * wide.count) - wide.matrix
        ).norm() / wide.matrix.norm() > 2 * off
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in tiny_lm.module.state_dict().items()
    )
    with pytest.raises(InputError, match="float16 overflows"):
        second_moments(tiny_lm, texts, [0], dtype=torch.float16)


class Killed(BaseException):
    """Stands for a signal."""


def killed_after(batches: int) -> Callable[[int], None]:
    left = [batches]

    def progress(done: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    return progress


@pytest.fixture
def eager_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factsmith.core.artefact._SECONDS", 0.0)
    monkeypatch.setattr("factsmith.core.artefact.time.monotonic", lambda: 0.0)


@pytest.mark.usefixtures("eager_checkpoints")
def test_a_killed_run_goes_on_where_it_stood(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_text, "WINDOW", 20)
    texts, file = varied(90), tmp_path / "deep" / "moments.partial"
    straight = second_moments(tiny_gpt2, texts, [0, 2], batch_tokens=100)
    passes: list[int] = []
    handle = tiny_gpt2.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        second_moments(tiny_gpt2, texts, [0, 2], batch_tokens=100)
        total = len(passes)
        done: list[int] = []
        for batches in (3, 9, None):
            resumed: dict[int, SecondMoment] = {}
            passes.clear()
            if batches is None:
                resumed = second_moments(
                    tiny_gpt2,
                    iter(texts),
                    [2, 0],
                    batch_tokens=100,
                    checkpoint=file,
                    progress=done.append,
                )
            else:
                with pytest.raises(Killed):
                    second_moments(
                        tiny_gpt2,
                        texts,
                        [0, 2],
                        batch_tokens=100,
                        checkpoint=file,
                        progress=killed_after(batches),
                    )
                assert [path.name for path in file.parent.iterdir()] == [file.name]
    finally:
        handle.remove()
    # The second run reports the state it began at, and then eight batches of its own.
    assert (
        total > 20
        and len(passes) == total - 3 - 8
        and done[-1] == straight[0].count
        and done[0] > 200
    )
    for layer, moment in straight.items():
        assert torch.equal(resumed[layer].matrix, moment.matrix)
        kept = [
            {k: v for k, v in vars(m).items() if k != "matrix"} for m in (resumed[layer], moment)
        ]
        assert kept[0] == kept[1] and moment.split_half is not None
    assert not file.exists()


@pytest.mark.usefixtures("eager_checkpoints")
def test_a_checkpoint_of_something_else_is_refused(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    texts, file = varied(60), tmp_path / "moments.partial"
    usual: dict[str, Any] = {"layers": [0, 1], "batch_tokens": 100, "checkpoint": file}
    with pytest.raises(Killed):
        second_moments(tiny_gpt2, texts, **usual, progress=killed_after(4))
    raw = file.read_bytes()
    other = wrap(tiny_model("gpt2", seed=5, **GPT2), tiny_gpt2.tokenizer)
    refusals: list[tuple[type[FactsmithError], str, LanguageModel, list[str], dict[str, Any]]] = [
        (FingerprintError, "fingerprint", other, texts, {}),
        (InputError, r"layers \[0, 1\], not \[0\]", tiny_gpt2, texts, {"layers": [0]}),
        (InputError, "batch_tokens 100, not 99", tiny_gpt2, texts, {"batch_tokens": 99}),
        (InputError, "max_tokens", tiny_gpt2, texts, {"max_tokens": 50}),
        (InputError, "dtype None, not torch.bfloat16", tiny_gpt2, texts, {"dtype": torch.bfloat16}),
        (InputError, "other text", tiny_gpt2, varied(60, seed=1), {}),
        (InputError, "other text", tiny_gpt2, texts[:59], {}),
        (InputError, "other text", tiny_gpt2, texts[:1], {}),
    ]
    for error, words, lm, given, changes in refusals:
        with pytest.raises(error, match=words):
            second_moments(lm, given, **{**usual, **changes})
        assert file.read_bytes() == raw
    for damaged in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[:300], b"{}"):
        file.write_bytes(damaged)
        with pytest.raises(DamagedError):
            second_moments(tiny_gpt2, texts, **usual)
    second_moments(tiny_gpt2, texts, [0])[0].save(file)
    with pytest.raises(DamagedError, match="expected 'unfinished second moments 1'"):
        second_moments(tiny_gpt2, texts, **usual)
    with pytest.raises(WorkspaceError, match="cannot write"):
        second_moments(tiny_gpt2, texts, **{**usual, "checkpoint": file / "below-a-file"})
    file.write_bytes(raw)  # the control: what it was made from is taken
    again = second_moments(tiny_gpt2, texts, **usual)
    assert torch.equal(
        again[1].matrix, second_moments(tiny_gpt2, texts, [0, 1], batch_tokens=100)[1].matrix
    )


def test_checkpoints_are_not_written_all_the_time(
    tiny_gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written = itertools.count(0.0, 10.0), []
    monkeypatch.setattr(
        "factsmith.core.artefact.time.monotonic", lambda: next(clock)
    )  # every look at the clock is ten seconds later
    monkeypatch.setattr(
        "factsmith.core.artefact.write_tensors", lambda *given: written.append(given[0])
    )
    done: list[int] = []
    second_moments(
        tiny_gpt2,
        varied(60),
        [0],
        batch_tokens=60,
        checkpoint=tmp_path / "partial",
        progress=done.append,
    )
    assert (
        len(done) > 30 and 1 <= len(written) <= len(done) // 12
    )  # writing took ten seconds: 200 until the next


def test_a_file_of_another_model_or_layer_is_refused(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "layer1"
    moment = second_moments(tiny_gpt2, varied(40), [1])[1]
    moment.save(path)
    back = SecondMoment.load(path, tiny_gpt2, 1)
    assert [back.layer, back.split_half, back.excess] == [
        1,
        moment.split_half,
        moment.excess,
    ] and moment.excess is not None
    with pytest.raises(FingerprintError, match="layer 1; layer 2"):
        SecondMoment.load(path, tiny_gpt2, 2)
    other = wrap(tiny_model("gpt2", seed=5, **GPT2), tiny_gpt2.tokenizer)
    for ask in (lambda: SecondMoment.load(path, other), lambda: moment.check(other, 1)):
        with pytest.raises(FingerprintError, match="fingerprint"):
            ask()
    unknown = SecondMoment.from_matrix(torch.eye(3), count=1)
    unknown.check(other)
    with pytest.raises(FingerprintError, match="3 neurons"):
        unknown.check(other, 0)
    weight = tiny_gpt2.ffn[0].weight()
    before = weight.clone()
    weight[0, 0] += 1  # an edited model is another one
    try:
        with pytest.raises(FingerprintError):
            moment.check(tiny_gpt2)
    finally:
        weight.copy_(before)
    moment.check(tiny_gpt2)


def test_files_of_the_first_version_load() -> None:
    for path in sorted(Path(atlas.__file__).parent.glob("*/moments/*.safetensors")):
        old = SecondMoment.load(path)
        assert old.count > 1000 and old.fingerprint
    plain = SecondMoment.from_matrix(torch.eye(4), count=9)
    assert {f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) is None} == {
        "layer",
        "split_half",
        "excess",
        "sample",
        "tails",
    }
    assert repr(plain) == "SecondMoment(d_ff=4, count=9)"


@pytest.mark.parametrize(
    "count", [44, 44.0, torch.tensor(44), torch.tensor([44.0]), np.float64(44)]
)
def test_a_count_is_whole_however_it_is_kept(count: Any) -> None:
    assert SecondMoment.from_matrix(torch.eye(3), count=count).count == 44
    for wrong in (44.5, float("nan"), "44", torch.ones(2), None):
        with pytest.raises(InputError, match="count"):
            SecondMoment.from_matrix(torch.eye(3), count=wrong)


def sum_by_hand(lm: LanguageModel, rows: list[list[int]], layer: int) -> torch.Tensor:
    """Σ m mᵀ over rows of token ids, one row at a time through the whole model."""
    seen: list[torch.Tensor] = []
    down = lm.ffn[layer].down
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    total = torch.zeros(lm.ffn[layer].d_ff, lm.ffn[layer].d_ff, dtype=torch.float64)
    try:
        for ids in rows:
            with torch.no_grad():
                lm.module(input_ids=torch.tensor([ids]))
            m = seen.pop().double().flatten(0, -2)
            total += torch.einsum("ti,tj->ij", m, m)
    finally:
        handle.remove()
    return total


def test_the_bundled_corpus_is_read_until_its_halves_agree(tiny_lm: LanguageModel) -> None:
    """The numbers are those of an independent sum over as many passages, one by one."""
    texts = ordinary_texts()
    totals: list[tuple[int, int | None]] = []
    moments = moments_with_total(
        tiny_lm, texts, [0, 1], progress=lambda done, total: totals.append((done, total))
    )
    count = moments[0].count
    d_ff = tiny_lm.ffn[0].d_ff
    assert all(m.excess is not None and m.excess <= ENOUGH_EXCESS for m in moments.values())
    assert {m.corpus for m in moments.values()} == {DIGEST}
    assert FIRST_COMPARED * d_ff <= count
    assert totals[-1][0] == count and all(t is not None and n <= t for n, t in totals)
    rows, n_tokens = [], 0
    for piece in pieces(tiny_lm, texts):
        if n_tokens >= count:
            break
        rows.append(piece.ids)
        n_tokens += len(piece.ids)
    window = how_much(tiny_lm, texts, [0, 1])[0].window
    assert n_tokens == count and window is not None and len(rows) % window == 0
    for layer in (0, 1):
        expected = sum_by_hand(tiny_lm, rows, layer) / count
        torch.testing.assert_close(moments[layer].matrix, expected, rtol=1e-5, atol=1e-6)
        wrong = sum_by_hand(tiny_lm, rows[: len(rows) // 2], layer) / (count / 2)
        assert not torch.allclose(moments[layer].matrix, wrong, rtol=1e-3)
    given = second_moments(tiny_lm, list(texts), [0])[0]
    assert given.count == TOKENS_PER_NEURON * d_ff and given.corpus != DIGEST
