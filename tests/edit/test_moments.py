from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import TEXTS, VOCAB, byte_tokenizer, shared_dir, tiny_model
from factsmith.edit.moments import SecondMoment, second_moments
from factsmith.errors import DamagedError, InputError, LayerError, NumericsError, WorkspaceError
from factsmith.model.load import LanguageModel, wrap

MANY = [*TEXTS, "A", "Paris lies there.", *(t[: 10 + 3 * i] for i, t in enumerate(TEXTS * 3))]


def by_hand(lm: LanguageModel, texts: list[str], layer: int, limit: int | None = None) -> tuple[torch.Tensor, int]:
    """One text at a time through the whole model, one token at a time into the sum."""
    seen: list[torch.Tensor] = []
    handle = lm.ffn[layer].down.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().double().flatten(0, -2)))
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
    found = second_moments(tiny_lm, MANY, [2, 0], batch_tokens=100, progress=done.append)
    assert sorted(found) == [0, 2]
    for layer, moment in found.items():
        expected, count = by_hand(tiny_lm, MANY, layer)
        assert moment.count == count == done[-1]
        assert len(done) > 3 and done == sorted(done)
        torch.testing.assert_close(moment.matrix, expected, rtol=1e-5, atol=1e-6)
        assert moment.fingerprint == tiny_lm.fingerprint
    centred = torch.linalg.eigvalsh(found[0].matrix)[0]
    assert centred > -1e-9


def test_a_family_that_flattens_rows_and_columns() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
    lm = wrap(tiny_model("opt", **sizes, max_position_embeddings=64, vocab_size=VOCAB), byte_tokenizer(bos=True))
    expected, count = by_hand(lm, MANY, 1)
    found = second_moments(lm, MANY, [1])[1]
    assert found.count == count
    torch.testing.assert_close(found.matrix, expected, rtol=1e-5, atol=1e-6)


def test_padding_would_show(tiny_gpt2: LanguageModel) -> None:
    """The control: with padded tokens counted in, the matrix is another one."""
    expected, _ = by_hand(tiny_gpt2, MANY, 1)
    width = max(len(tiny_gpt2.tokenizer(t)["input_ids"]) for t in MANY)
    padded = [t + "<|end|>" * (width - len(tiny_gpt2.tokenizer(t)["input_ids"])) for t in MANY]
    assert (second_moments(tiny_gpt2, padded, [1])[1].matrix - expected).norm() > 0.05 * expected.norm()


def test_max_tokens_and_long_texts(tiny_gpt2: LanguageModel) -> None:
    expected, count = by_hand(tiny_gpt2, TEXTS, 0, limit=50)
    found = second_moments(tiny_gpt2, iter(TEXTS), [0], max_tokens=50)[0]
    assert found.count == count == 50
    torch.testing.assert_close(found.matrix, expected, rtol=1e-5, atol=1e-6)
    long = " ".join(TEXTS * 3)  # longer than the model's 64 positions
    assert second_moments(tiny_gpt2, [long], [0])[0].count == len(tiny_gpt2.tokenizer(long)["input_ids"])


def test_layers_above_do_not_run(tiny_gpt2: LanguageModel) -> None:
    ran: list[int] = []
    handles = [layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(tiny_gpt2.layers)]
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
    assert (back.count, back.fingerprint, back.corpus) == (moment.count, moment.fingerprint, moment.corpus)
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
    keys = torch.randn(16, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ moment.factor.T
    exact = torch.linalg.solve(matrix.double(), keys.T).T
    u, expected = (torch.nn.functional.normalize(x, dim=1) for x in (back.solve(keys), exact))
    assert (u - expected).norm(dim=1).max() < 3e-3
    scale = matrix.diagonal().sqrt()
    rounded = (matrix / scale / scale[:, None]).half().double() * scale * scale[:, None]  # the obvious way to pack, as a control
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
    with pytest.raises(InputError, match="count=0"):
        SecondMoment.from_matrix(torch.eye(3), count=0)
    with pytest.raises(NumericsError, match="NaN"):
        SecondMoment.from_matrix(torch.full((3, 3), float("nan")), count=1)
