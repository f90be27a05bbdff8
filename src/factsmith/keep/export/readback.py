"""Reading an export back: load it with plain transformers and peft, and compare its answers.

    questions = ask(lm, deltas)                             # what the patched model answers
    (answers,) = read_back([Job("my-model", questions)])    # what the folder answers
    compare(questions, answers, LIMITS[lm.dtype])           # NumericsError where the two differ

The export is loaded in a separate process that never imports factsmith, and gets the same rows as
the models in memory (`questions`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ...core.errors import ModelError, NumericsError
from ...core.tables import counted
from .questions import Candidates, Questions

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest accepted difference of logits in a dtype, relative to their range.

A patched matrix is rounded once, as a sum; a matrix with an adapter twice. In bfloat16 that alone
moves the logits of small models by 1 to 2 % of their range (tests/keep/export/test_readback.py)."""


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """How an export that was read back compares with the patched model in memory.

    Attributes:
        prompts: How many prompts were asked. Every greedy answer is that of the patched model,
            token by token.
        facts: How many facts there are.
        ties: At how many places after the targets another token is the likeliest, because the two
            are closer than the logits differ.
        difference: The largest |logit − logit of the patched model| after the prompts.
        off: The largest |logit − logit that the files should give|. It is smaller than `difference`
            if an adapter was truncated or rounded, and equal to it otherwise.
        limit: The largest accepted value of `off`.
        moved: The largest |logit of the patched model − logit of the base model|, to compare
            `difference` with.
    """

    prompts: int
    facts: int
    ties: int
    difference: float
    off: float
    limit: float
    moved: float

    def __str__(self) -> str:
        """Return the comparison in one line."""
        asked = counted(self.prompts, "prompt")
        asked += "" if self.prompts == self.facts else f" of {self.facts:,}"
        ties = f" (except for {counted(self.ties, 'tie')})" if self.ties else ""
        near = f"within {self.difference:.1e}" if self.difference else "equal bit for bit"
        return (
            f"answers equal on {asked}{ties}, logits {near}; the patches move them by "
            f"{self.moved:.1e}"
        )


@dataclass(frozen=True)
class Job:
    """An export to load and ask in a separate process.

    Attributes:
        model: The folder or hub id of the model.
        questions: What to ask it.
        dtype: The dtype to load it in. None: its own.
        adapter: The folder of an adapter to load onto the model. None: no adapter.
        revision: The revision of a hub id. None: the main one.
        trust_remote_code: Whether code that comes with the model may run.
    """

    model: str
    questions: Questions
    _: KW_ONLY
    dtype: str | None = None
    adapter: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an export answers.

    Attributes:
        tokenized: What the tokenizer of the export makes of each prompt.
        picks: The likeliest token at each place of each answer, and one more.
        logits: (n, vocab) float32, the logits after the prompts.
    """

    tokenized: list[list[int]]
    picks: list[list[int]]
    logits: Tensor


# ── in a separate process ─────────────────────────────────────────────────────────────────────────


_SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
torch.set_num_threads(task["threads"])
for number, job in enumerate(task["jobs"]):
    options = {} if job["dtype"] is None else {"dtype": getattr(torch, job["dtype"])}
    source = {"revision": job["revision"] or "main", "trust_remote_code": job["trust_remote_code"]}
    model = AutoModelForCausalLM.from_pretrained(job["model"], **options, **source)
    if job["adapter"] is not None:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, job["adapter"])
    model = model.to(job["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], **source)
    tokenized, picks, last = [], [], []
    for prompt, row, length in zip(job["prompts"], job["rows"], job["lengths"]):
        tokenized.append(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([row], device=job["device"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, length - 1 :]
        picks.append(logits.argmax(-1).tolist())
        last.append(logits[0].float().cpu())
    save_file({"logits": torch.stack(last)}, sys.argv[2] + f"/{number}.safetensors")
    with open(sys.argv[2] + f"/{number}.json", "w", encoding="utf-8") as file:
        json.dump({"tokenized": tokenized, "picks": picks}, file)
assert "factsmith" not in sys.modules
"""


def read_back(jobs: Sequence[Job]) -> list[Answers]:
    """Load exports in a separate process without factsmith, and ask them.

    Raises:
        ModelError: when one cannot be loaded, or the process ends in another error.
    """
    described = [
        {
            "model": job.model,
            "dtype": job.dtype,
            "adapter": job.adapter,
            "revision": job.revision,
            "trust_remote_code": job.trust_remote_code,
            "device": job.questions.device,
            "prompts": job.questions.prompts,
            "rows": job.questions.rows,
            "lengths": [len(ids) for ids in job.questions.prompt_ids],
        }
        for job in jobs
    ]
    with tempfile.TemporaryDirectory(prefix="factsmith-") as name:
        place = Path(name)
        task = {"jobs": described, "threads": torch.get_num_threads()}
        (place / "task.json").write_text(json.dumps(task), encoding="utf-8")
        done = _run_script(place)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1][:300] if lines else f"it ended with code {done.returncode}"
            peft = " and peft" if any(job.adapter for job in jobs) else ""
            raise ModelError(
                f"The export could not be loaded back by transformers{peft}: {reason}. Nothing was "
                "kept; to keep an export that cannot be loaded here, write it without verifying.",
                argument="verify",
            )
        return [_read_answers(place, number) for number in range(len(jobs))]


def _run_script(place: Path) -> subprocess.CompletedProcess[str]:
    quiet = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(place / "task.json"), str(place)],
        cwd=place,  # a folder from which nothing can be imported by mistake
        env={**os.environ, **quiet},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def _read_answers(place: Path, number: int) -> Answers:
    record = json.loads((place / f"{number}.json").read_bytes())
    tensors = safetensors.torch.load((place / f"{number}.safetensors").read_bytes())
    return Answers(tokenized=record["tokenized"], picks=record["picks"], logits=tensors["logits"])


# ── the comparison ────────────────────────────────────────────────────────────────────────────────


def check_job(job: Job, limit: float, advice: str = "") -> ReadBack:
    """Read one export back and compare it; arguments and errors as of `compare`."""
    (answers,) = read_back([job])
    return compare(job.questions, answers, limit, advice)


def compare(questions: Questions, answers: Answers, limit: float, advice: str = "") -> ReadBack:
    """Compare what an export answers with what the patched model does.

    Args:
        questions: What was asked, with the answers of the patched model.
        answers: What the export answers.
        limit: The largest accepted difference of logits, relative to their range (`LIMITS`).
        advice: What to do if they differ, as a sentence. "": report it.

    Raises:
        NumericsError: when tokens, answers or logits differ.
    """
    _check_tokens(questions, answers)
    spread = questions.expected.amax(-1) - questions.expected.amin(-1)
    off = float((answers.logits - questions.expected).abs().max())
    allowed = limit * float(spread.max())
    wrong, ties = _differences(questions, answers, off, allowed)
    if wrong or not off <= allowed:  # NaN is off too
        say = _wrong_answers(questions, answers, wrong) if wrong else ""
        raise NumericsError(
            f"The export that was read back is not the patched model: {say}logits are off by "
            f"{off:.1e}, and {allowed:.1e} is allowed. Nothing was kept. "
            f"{advice or 'Please report this.'}"
        )
    return ReadBack(
        prompts=len(questions.prompts),
        facts=questions.facts,
        ties=ties,
        difference=float((answers.logits - questions.patched).abs().max()),
        off=off,
        limit=allowed,
        moved=float((questions.patched - questions.base).abs().max()),
    )


def _check_tokens(questions: Questions, answers: Answers) -> None:
    pairs = zip(questions.prompts, questions.tokenized, answers.tokenized, strict=True)
    for prompt, expected, ids in pairs:
        if ids != expected:
            raise NumericsError(
                f"The tokenizer that was read back makes other tokens of {prompt!r}: {ids} instead "
                f"of {expected}. Nothing was kept. Load the model with the tokenizer that it was "
                "saved with."
            )


def _differences(
    questions: Questions, answers: Answers, off: float, allowed: float
) -> tuple[list[tuple[int, int]], int]:
    """Return the first wrong place of each wrong answer, (question, place), and how many ties."""
    wrong, ties = [], 0
    for i, (expected, picks) in enumerate(zip(questions.picks, answers.picks, strict=True)):
        # The export's picks have one more token, after the answer.
        for place, (pick, other) in enumerate(zip(expected, picks, strict=False)):
            if pick == other:
                continue
            # Logits that are off by d can swap two tokens that are no further than 2d apart. After
            # the target that is a matter of rounding; in the target it is an error.
            gap = _gap(questions.candidates[i], place, other)
            if place >= questions.strict[i] and gap <= 2 * off <= 2 * allowed:
                ties += 1
            else:
                wrong.append((i, place))
                break
    return wrong, ties


def _wrong_answers(questions: Questions, answers: Answers, wrong: Sequence[tuple[int, int]]) -> str:
    """Say how many answers differ, with the first of them."""
    i, place = wrong[0]
    before = questions.picks[i][:place]
    answer = questions.answer([*before, answers.picks[i][place]])
    expected = questions.answer([*before, questions.picks[i][place]])
    return (
        f"{len(wrong)} of {counted(len(questions.prompts), 'answer')} differ (after "
        f"{questions.prompts[i]!r} it says {answer!r} instead of {expected!r}), "
    )


def _gap(candidates: Candidates, place: int, token: int) -> float:
    """Return how far a token is below the likeliest; infinite if it is not a candidate."""
    values, ids = candidates.values[place], candidates.ids[place]
    at = (ids == token).nonzero()
    return float(values[0] - values[int(at[0, 0])]) if len(at) else float("inf")
