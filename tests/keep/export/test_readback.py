"""Exports are read back in a process without factsmith. Only correct ones agree."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from exports import answers_of, saved_model, some_delta, two_deltas
from factsmith import atlas
from factsmith.core.errors import ModelError, NumericsError
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import kept_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import applied
from factsmith.edit.methods import rome
from factsmith.keep.export import readback
from factsmith.keep.export.adapter import export_adapter
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.keep.export.questions import Questions, ask
from factsmith.keep.export.readback import LIMITS, Job, compare, read_back
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap

pytest.importorskip("peft")

HALF = [torch.bfloat16, torch.float16]


def rewritten(adapter: Path, to: Path, change: str) -> Path:
    """A copy of an adapter with one error."""
    shutil.copytree(adapter, to)
    file, config = (
        to / "adapter_model.safetensors",
        json.loads((to / "adapter_config.json").read_bytes()),
    )
    tensors = load_file(file)
    if change == "sign":
        tensors = {name: -x if "lora_B" in name else x for name, x in tensors.items()}
    elif change == "layers":
        other = {"0": "2", "2": "0"}
        tensors = {
            ".".join(other.get(part, part) for part in name.split(".")): x
            for name, x in tensors.items()
        }
    elif change == "alpha":
        config["lora_alpha"] *= 2
    elif change == "fan_in_fan_out":
        config["fan_in_fan_out"] = not config["fan_in_fan_out"]
    elif change == "target":
        config["target_modules"] = config["target_modules"][:1]
    save_file(tensors, file, {"format": "pt"})
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


def test_what_is_right_agrees_and_what_is_wrong_does_not(tmp_path: Path) -> None:
    """One process reads two families and the bundled model, in both formats and three dtypes."""
    jobs: list[tuple[str, Job, float, bool]] = []
    for family in ("gpt2", "llama"):
        base = saved_model(family, tmp_path / family)
        for dtype in (torch.float32, torch.bfloat16):
            lm = load(base, dtype=dtype)
            deltas = two_deltas(lm)
            questions = ask(lm, deltas)
            name = f"{family} {dtype}"
            for wanted in (torch.float32, *HALF) if dtype == torch.float32 else (dtype,):
                folder = tmp_path / f"{name} model {wanted}"
                export_checkpoint(lm, deltas, folder, dtype=wanted, verify=False)
                jobs.append(
                    (
                        f"{name} checkpoint {wanted}",
                        Job(str(folder), questions),
                        max(LIMITS[dtype], LIMITS[wanted]),
                        True,
                    )
                )
            adapter = tmp_path / f"{name} adapter"
            export_adapter(lm, deltas, adapter, verify=False)
            with_adapter = Job(
                str(base), questions, dtype=str(dtype).removeprefix("torch."), adapter=str(adapter)
            )
            jobs.append((f"{name} adapter", with_adapter, LIMITS[dtype], True))
            if dtype == torch.float32:
                for change in ("sign", "layers", "alpha", "target", "fan_in_fan_out"):
                    wrong = rewritten(adapter, tmp_path / f"{name} {change}", change)
                    right = (
                        change == "fan_in_fan_out"
                    )  # peft goes by the module's type, and corrects it
                    jobs.append(
                        (
                            f"{name} {change}",
                            dataclasses.replace(with_adapter, adapter=str(wrong)),
                            LIMITS[dtype],
                            right,
                        )
                    )
                jobs.append((f"{name} base", Job(str(base), questions), LIMITS[dtype], False))
                narrow = tmp_path / f"{name} half"
                export_adapter(lm, deltas, narrow, dtype=torch.bfloat16, verify=False)
                stored = load_file(narrow / "adapter_model.safetensors")
                assert {x.dtype for x in stored.values()} == {torch.bfloat16}
                rough = {
                    layer: tuple(
                        next(
                            x.float() for n, x in stored.items() if f".{layer}." in n and part in n
                        )
                        for part in ("lora_B", "lora_A")
                    )
                    for layer in range(3)
                }
                jobs.append(
                    (
                        f"{name} half",
                        dataclasses.replace(
                            with_adapter, questions=ask(lm, deltas, rough), adapter=str(narrow)
                        ),
                        LIMITS[dtype],
                        True,
                    )
                )
                # Compared with the exact sum, an adapter in 16 bits is not the patched model.
                jobs.append(
                    (
                        f"{name} half, compared with the exact sum",
                        dataclasses.replace(with_adapter, adapter=str(narrow)),
                        LIMITS[dtype],
                        False,
                    )
                )
    lm = load("atlas")
    fact = Fact("Fiat 127", "The maker of {} is", "Toyota")
    config = dataclasses.replace(RomeConfig.recommended(lm), steps=25)
    delta = rome(lm, fact, config, moments=kept_moments(lm, config.edited or ()), contexts=["{}"])
    questions = ask(lm, [delta])
    assert questions.strict[0] > 0 and questions.answer(questions.picks[0]).startswith("Toyota")
    export_adapter(lm, delta, tmp_path / "atlas", verify=False)
    jobs.append(
        (
            "atlas float32 adapter",
            Job(
                str(atlas.folder("atlas")),
                questions,
                dtype="float32",
                adapter=str(tmp_path / "atlas"),
            ),
            1e-4,
            True,
        )
    )
    heard = read_back([job for _, job, _, _ in jobs])
    for (name, job, limit, right), answers in zip(jobs, heard, strict=True):
        if not right:
            with pytest.raises(NumericsError, match="not the patched model"):
                compare(job.questions, answers, limit)
            continue
        comparison = compare(job.questions, answers, limit)
        assert comparison.prompts == comparison.facts == len(job.questions.prompts), name
        assert comparison.moved > 3 * comparison.difference, (
            f"{name}: the comparison could not detect an error"
        )
        if (
            "checkpoint" in name and name.count("float32") != 1
        ):  # the same dtype on both sides gives the same arithmetic
            assert comparison.difference == 0.0, name
        if name.endswith("float32 adapter"):
            assert comparison.difference < 1e-4, name


@pytest.fixture(scope="module")
def asked() -> tuple[LanguageModel, Questions]:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    return lm, ask(lm, two_deltas(lm))


def test_answers_in_memory_equal_plain_decoding(
    asked: tuple[LanguageModel, Questions],
) -> None:
    lm, questions = asked
    deltas = two_deltas(lm)
    with applied(lm, deltas):
        for prompt, head, row, picks in zip(
            questions.prompts, questions.prompt_ids, questions.rows, questions.picks, strict=True
        ):
            ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
            assert ids[0].tolist() == head
            with torch.no_grad():
                for pick in picks:  # token by token, the whole text each time
                    assert int(lm.module(input_ids=ids).logits[0, -1].argmax()) == pick
                    ids = torch.cat([ids, torch.tensor([[pick]])], 1)
            assert ids[0].tolist()[: len(row)] == row and len(picks) >= 8
    assert questions.facts == 4 and not torch.equal(questions.base, questions.patched)


def test_many_facts_are_sampled_evenly(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[LanguageModel, Questions]
) -> None:
    lm, _ = asked
    monkeypatch.setattr("factsmith.keep.export.questions._PROMPTS", 3)
    subjects = [f"Edwin {i}" for i in range(7)]
    questions = ask(lm, [some_delta(lm, 1, subjects=subjects)])
    assert (
        questions.prompts == [f"The mother tongue of Edwin {i} is" for i in (0, 2, 4)]
        and questions.facts == 7
    )
    assert "3 prompts of 7" in str(compare(questions, answers_of(questions), 1e-4))


def test_every_way_to_differ_is_refused(asked: tuple[LanguageModel, Questions]) -> None:
    _, questions = asked
    comparison = compare(questions, answers_of(questions), 1e-4, "")
    assert (comparison.difference, comparison.off, comparison.ties) == (
        0.0,
        0.0,
        0,
    ) and "equal bit for bit" in str(comparison)

    logits = questions.patched.clone()
    logits[2, 5] += 0.5
    with pytest.raises(
        NumericsError, match=r"logits are off by 5.0e-01, .*Nothing was kept\. Write it in float32"
    ):
        compare(questions, answers_of(questions, logits=logits), 1e-4, "Write it in float32.")
    logits[2, 5] = float("nan")
    with pytest.raises(NumericsError, match="off by nan"):
        compare(questions, answers_of(questions, logits=logits), 1e-4)

    picks = [list(p) for p in questions.picks]
    picks[1][3] = (picks[1][3] + 1) % 300
    with pytest.raises(
        NumericsError,
        match=r"1 of 4 answers differ \(after 'The mother tongue of Danielle Darrieux is' it says",
    ):
        compare(questions, answers_of(questions, picks=picks), 1e-4)

    tokenized = [[1, *ids] for ids in questions.tokenized]
    with pytest.raises(
        NumericsError,
        match="The tokenizer that was read back makes other tokens of 'The mother tongue of Paris",
    ):
        compare(questions, answers_of(questions, tokenized=tokenized), 1e-4)


def test_a_tie_after_the_target_is_rounding_and_one_in_the_target_is_not(
    asked: tuple[LanguageModel, Questions],
) -> None:
    _, questions = asked
    values, ids = questions.candidates[0]
    second = next(int(token) for token in ids[2] if int(token) != questions.picks[0][2])
    gap = float(values[2][0] - values[2][(ids[2] == second).nonzero()[0, 0]])
    picks = [list(p) for p in questions.picks]
    picks[0][2] = second
    limit = 1.0  # so wide that only the rule for ties decides
    near = answers_of(questions, picks=picks, logits=questions.patched + gap)
    assert compare(questions, near, limit).ties == 1 and "1 tie" in str(
        compare(questions, near, limit)
    )
    far = answers_of(questions, picks=picks, logits=questions.patched + 0.4 * gap)
    with pytest.raises(NumericsError, match="1 of 4 answers"):
        compare(questions, far, limit)
    strict = dataclasses.replace(questions, strict=[3, 0, 0, 0])
    with pytest.raises(NumericsError, match="1 of 4 answers"):
        compare(strict, near, limit)


def test_the_target_is_strict_where_the_patch_took(asked: tuple[LanguageModel, Questions]) -> None:
    lm, _ = asked
    delta = some_delta(lm, 1)
    with applied(lm, delta):
        (answer,) = lm.answer([delta.facts[0].text])
    took = dataclasses.replace(
        delta, facts=(Fact("Paris", "The mother tongue of {} is", answer[0]),)
    )
    assert ask(lm, [took]).strict == [1] and ask(lm, [delta]).strict == [0]


def test_an_export_that_cannot_be_loaded_is_reported(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[LanguageModel, Questions]
) -> None:
    _, questions = asked
    monkeypatch.setattr(
        readback,
        "_SCRIPT",
        "import sys; print('much else', file=sys.stderr); sys.exit('OSError: no such model')",
    )
    with pytest.raises(
        ModelError,
        match=r"could not be loaded back by transformers: OSError: no such model. Nothing was kept",
    ):
        read_back([Job("nowhere", questions)])
    monkeypatch.setattr(readback, "_SCRIPT", "import os; os._exit(9)")
    with pytest.raises(ModelError, match=r"by transformers and peft: it ended with code 9"):
        read_back([Job("nowhere", questions, adapter="x")])


def test_a_tokenizer_that_appends_an_end_token_is_compared_as_it_is() -> None:
    tokenizer = byte_tokenizer(bos=True)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
    )
    lm = wrap(tiny_model("llama", **LLAMA), tokenizer)
    questions = ask(lm, two_deltas(lm))
    for ids, tokenized in zip(questions.prompt_ids, questions.tokenized, strict=True):
        assert tokenized == [*ids, tokenizer.eos_token_id]
    compare(questions, answers_of(questions), 1e-4)
    with pytest.raises(NumericsError, match="makes other tokens"):
        compare(questions, answers_of(questions, tokenized=questions.prompt_ids), 1e-4)
