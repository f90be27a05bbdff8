"""Reads that recognise subjects, against brute force over made-up inputs."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from factsmith.core.errors import InputError, NumericsError
from factsmith.edit import recognise as module
from factsmith.edit.recognise import Examples, recognise, scatter, separability

D = 24


def made_up(facts: int = 12, contexts: int = 6, seed: int = 0, noise: float = 0.3) -> Examples:
    """Return subjects with a shared last token: x = ending + beginning + noise of the context."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    beginnings, endings = normal(facts, D), 3 * normal(max(1, facts // 3), D)
    ending = endings[torch.arange(facts) % len(endings)]
    subjects = (ending + beginnings)[:, None] + noise * normal(facts, contexts, D)
    text = 1.5 * normal(400, D)
    false = ending[:, None] + normal(facts, 4, D)
    return Examples(
        subjects=subjects,
        weights=torch.full((contexts,), 1 / contexts),
        groups=torch.arange(facts),
        strangers=torch.cat([text, false.reshape(-1, D)]),
        counterfeits=false,
        known=torch.zeros(0, 2, dtype=torch.int64),
        n_text=len(text),
    )


def statistics(examples: Examples) -> tuple[Tensor, Tensor]:
    text = examples.strangers[: examples.n_text].double()
    return text.mean(0), (text - text.mean(0)).T @ (text - text.mean(0)) / len(text)


def held_out(examples: Examples, seed: int = 9) -> tuple[Tensor, Tensor]:
    """Return new contexts of the subjects, and new subjects with the same endings."""
    draw = torch.Generator().manual_seed(seed)
    states = examples.subjects.mean(1) + 0.3 * torch.randn(
        len(examples.subjects), D, generator=draw
    )
    ending = examples.counterfeits.mean(1)
    return states, ending + torch.randn(len(ending), D, generator=draw)


def test_own_inputs_read_one_and_strangers_little() -> None:
    examples = made_up()
    read = recognise(examples, *statistics(examples))
    states = torch.stack([read.of(x)[:, i] for i, x in enumerate(examples.subjects)])
    torch.testing.assert_close(states.median(1).values, torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(states.min(1).values, read.lowest)
    assert (states > read.floor[:, None]).double().mean() > 0.97
    new, false = held_out(examples)
    assert float((read.of(new).diagonal() > read.floor).double().mean()) > 0.9
    assert float((read.of(false).diagonal() > read.floor).double().mean()) < 0.35


def test_hard_strangers_do_better_than_fishers_discriminant() -> None:
    """The control: w ∝ C⁻¹(x̄ − μ) alone goes by the ending, and lets unseen subjects in."""
    examples = made_up(30)
    mean, covariance = statistics(examples)
    read = recognise(examples, mean, covariance)
    centred = examples.centres - mean
    fisher = torch.linalg.solve(covariance, centred.T).T
    fisher = fisher / (fisher * centred).sum(1, keepdim=True)
    _, false = held_out(examples)
    plain = ((false - mean) * fisher).sum(1)
    assert read.of(false).diagonal().mean() < 0.6 * plain.mean()


def test_the_hardest_are_those_that_read_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks change nothing, and known pairs are left out."""
    examples = dataclasses.replace(made_up(), known=torch.tensor([[5, 1], [410, 2], [411, 2]]))
    solver = module._Solver(examples, *statistics(examples))
    reads = solver.read[0] @ solver.pool.double().T + solver.read[1][:, None]
    base = len(examples.strangers)
    for row, fact in examples.known.tolist():
        reads[fact, row] = -9
    for i in range(12):
        reads[i, [base + i, base + 12 + i]] = -9
    expected = reads.topk(7, 1)
    monkeypatch.setattr(module, "_ROWS", 50)
    values, places = solver.hardest(7, 0, len(solver.pool))
    assert torch.equal(places, expected.indices)
    torch.testing.assert_close(values.double(), expected.values, atol=1e-5, rtol=1e-4)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = made_up()
    whole = recognise(examples, *statistics(examples))
    monkeypatch.setattr(module, "_BLOCK", 5)
    monkeypatch.setattr(module, "_ROWS", 64)
    parts = recognise(examples, *statistics(examples))
    torch.testing.assert_close(parts.weights, whole.weights, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.floor, whole.floor, atol=1e-5, rtol=1e-4)


def test_the_scale_of_the_model_changes_nothing() -> None:
    examples = made_up()
    mean, covariance = statistics(examples)
    parts = {
        name: 50 * getattr(examples, name) for name in ("subjects", "strangers", "counterfeits")
    }
    large = recognise(dataclasses.replace(examples, **parts), 50 * mean, 2500 * covariance)
    plain = recognise(examples, mean, covariance)
    torch.testing.assert_close(50 * large.weights, plain.weights, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(large.offsets, plain.offsets, atol=1e-4, rtol=1e-3)


def test_facts_of_one_subject_are_no_strangers() -> None:
    """The control: in groups of their own they are, and neither can read 1."""
    examples = made_up(noise=0.05)
    states = examples.subjects.clone()
    states[1] = states[0]
    together = dataclasses.replace(
        examples, subjects=states, groups=torch.tensor([0, 0, *range(2, 12)])
    )
    read = recognise(together, *statistics(together))
    assert int(read.closest[0]) != 1 and int(read.closest[1]) != 0
    apart = recognise(dataclasses.replace(together, groups=torch.arange(12)), *statistics(together))
    assert (0, 1) in apart.alike() and (1, 0) in apart.alike()
    assert apart.record(0)["not_told_apart_from"] == 1
    assert "not_told_apart_from" not in read.record(0)


def test_scatter_is_the_covariance_within_rows() -> None:
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1))
    by_hand = sum(torch.cov(rows.T.double(), correction=0) for rows in x) / 7
    torch.testing.assert_close(scatter(x), by_hand)
    assert not scatter(x[:, :0]).any()


def test_a_low_own_read_lowers_the_thresholds() -> None:
    examples = made_up(noise=1.0)
    read = recognise(examples, *statistics(examples))
    assert (read.ceiling < module.CEILING).any()
    assert (read.ceiling >= module.LOWEST_CEILING - 1e-12).all()
    assert (read.ceiling - read.floor > 0.19).all()


def test_firing_counts_tokens() -> None:
    examples = made_up()
    read = recognise(examples, *statistics(examples))
    x = torch.cat([examples.subjects[3, :2], torch.zeros(6, D)])
    shares, any_share = read.firing(x)
    expected = (read.of(x) >= read.floor).double().mean(0)
    torch.testing.assert_close(shares.double(), expected)
    assert any_share >= 0.25
    known = torch.tensor([[row, fact] for row in range(8) for fact in range(12)])
    assert read.firing(x, known)[1] == 0
    assert (read.false_firing >= 0).all() and (read.false_firing < 0.2).all()


def test_separability_falls_with_noise() -> None:
    """The control: with the noise of the contexts as large as the subjects, nothing is left."""
    clear, blurred = made_up(noise=0.1), made_up(noise=2.0)
    kept, missed = separability(clear, *statistics(clear))
    less, more = separability(blurred, *statistics(blurred))
    assert kept > 0.9 and kept - missed > less - more


def test_what_is_refused() -> None:
    examples = made_up()
    with pytest.raises(InputError, match=r"weights has shape \(3,\); expected \(6,\)"):
        dataclasses.replace(examples, weights=torch.ones(3))
    bad = examples.subjects.clone()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="subjects holds NaN"):
        dataclasses.replace(examples, subjects=bad)


def test_the_order_of_the_strangers_changes_nothing() -> None:
    examples = made_up()
    order = list(range(len(examples.strangers)))
    tail = order[examples.n_text :]
    random.Random(1).shuffle(tail)
    shuffled = examples.strangers[order[: examples.n_text] + tail]
    other = recognise(dataclasses.replace(examples, strangers=shuffled), *statistics(examples))
    plain = recognise(examples, *statistics(examples))
    torch.testing.assert_close(other.weights, plain.weights, atol=1e-4, rtol=1e-3)
