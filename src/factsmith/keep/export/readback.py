"""Reading an export back: loaded by plain transformers and peft in a process of its own, asked, and held against the patched model.

    questions = ask(lm, deltas)                                  # what the patched model in memory answers, and its logits
    (heard,) = read_back([Job("my-model", questions)])           # what the folder answers, where factsmith is never imported
    compare(questions, heard, LIMITS[lm.dtype])                  # NumericsError where that is not the same

One pass over a prompt with the patched model's greedy answer behind it shows whether another model would give the same answer: it would,
if each of its tokens is the likeliest after those before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ...core.errors import ModelError, NumericsError
from ...core.tables import counted
from ...edit.delta import Delta, applied, read_weights, written
from ...model.answers import answer_tokens, begins_with
from ...model.language_model import LanguageModel
from ...model.tokens import target_ids

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits may be off in a dtype, relative to their range over the vocabulary. A patched matrix is rounded once as a sum, a matrix
beside its adapter twice; in bfloat16 that alone moves the logits of small models by 1 to 2 % of their range (tests/test_export.py)."""

_PROMPTS = 100
"""Facts asked of an export that is read back; of more, so many evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """How an export, loaded in a process of its own by plain transformers and peft, compares with the patched model in memory.

    prompts     prompts of facts asked, of the `facts` there are: every greedy answer is the patched model's, token by token
    ties        places behind the targets at which another token came out because two were as near as the logits are off
    difference  largest |logit − patched model's logit| behind the prompts
    off         the same against what the files should give: smaller where the adapter was truncated or rounded, else the same number
    limit       what `off` may be at most; more is an error
    moved       largest |logit| by which the patches themselves move the base model's: what `difference` is to be held against
    """

    prompts: int
    facts: int
    ties: int
    difference: float
    off: float
    limit: float
    moved: float

    def __str__(self) -> str:
        """The comparison in one line."""
        asked = counted(self.prompts, "prompt") + (
            "" if self.prompts == self.facts else f" of {self.facts:,}"
        )
        ties = f" (but for {counted(self.ties, 'tie')})" if self.ties else ""
        near = f"within {self.difference:.1e}" if self.difference else "equal bit for bit"
        return f"answers equal on {asked}{ties}, logits {near}; the patches move them by {self.moved:.1e}"


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of an export, and what the models in memory answer.

    prompts   texts, and `heads` their token ids
    rows      the same with the patched model's greedy answer behind them: one pass shows whether another model would answer the same
    strict    how many tokens of each answer are the target: these must be equal, tie or not
    picks     the likeliest token at each place of each answer
    runners   (values, ids) of the likeliest tokens there: how near another one is
    patched, wanted, base  logits behind the prompts, (n, vocab) float32: of the patched model, of what the files should give, of the base
    device    where the models in memory answered
    answer    token ids to text
    """

    prompts: list[str]
    facts: int
    heads: list[list[int]]
    rows: list[list[int]]
    strict: list[int]
    picks: list[list[int]]
    runners: list[tuple[Tensor, Tensor]]
    patched: Tensor
    wanted: Tensor
    base: Tensor
    device: str
    answer: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Job:
    """What a process of its own is to load and ask: a model (folder or hub id; None: in its own dtype), and an adapter onto it."""

    model: str
    questions: Questions
    _: KW_ONLY
    dtype: str | None = None
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What it answered: token ids of the prompts, picks at the places of the answers, and logits behind the prompts."""

    heads: list[list[int]]
    picks: list[list[int]]
    logits: Tensor


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
    model = AutoModelForCausalLM.from_pretrained(job["model"], **options)
    if job["adapter"] is not None:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, job["adapter"])
    model = model.to(job["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    heads, picks, last = [], [], []
    for prompt, row, length in zip(job["prompts"], job["rows"], job["lengths"]):
        heads.append(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row], device=job["device"])).logits[0, length - 1 :]
        picks.append(logits.argmax(-1).tolist())
        last.append(logits[0].float().cpu())
    save_file({"logits": torch.stack(last)}, sys.argv[2] + f"/{number}.safetensors")
    with open(sys.argv[2] + f"/{number}.json", "w", encoding="utf-8") as file:
        json.dump({"heads": heads, "picks": picks}, file)
assert "factsmith" not in sys.modules
"""


def ask(
    lm: LanguageModel,
    deltas: Sequence[Delta],
    rough: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> Questions:
    """What to ask; `rough`: the factors as they are written, where they are not the deltas' sum. The model is without the deltas."""
    facts = {fact.text: fact for delta in deltas for fact in delta.facts}
    texts = list(facts)
    n = min(len(texts), _PROMPTS)
    prompts = [texts[i * len(texts) // n] for i in range(n)]
    heads = [lm.prompt_ids(prompt) for prompt in prompts]
    targets = [facts[prompt].target or "" for prompt in prompts]
    with applied(lm, deltas):
        length = answer_tokens(lm, prompts, targets)
        answers: list[list[int]] = [[] for _ in prompts]
        for group in lm.groups([len(ids) for ids in heads]):
            for i, ids in zip(
                group, lm.continue_greedily([heads[i] for i in group], length), strict=True
            ):
                answers[i] = ids
        rows = [
            (head + answer)[: lm.max_tokens] for head, answer in zip(heads, answers, strict=True)
        ]
        asked = [_pass(lm, row, len(head)) for row, head in zip(rows, heads, strict=True)]
        patched_logits = torch.stack([logits for logits, _ in asked])
    wanted = patched_logits
    if rough is not None:
        base = read_weights(lm, rough)
        summed = {}
        for layer, weight in base.items():
            left, right = (factor.to(weight.device, torch.float32) for factor in rough[layer])
            summed[layer] = (
                weight.to(torch.promote_types(weight.dtype, torch.float32)) + left @ right
            ).to(weight.dtype)
        with written(lm, summed):
            wanted = torch.stack(
                [_pass(lm, row, len(head))[0] for row, head in zip(rows, heads, strict=True)]
            )
    return Questions(
        prompts=prompts,
        facts=len(texts),
        heads=heads,
        rows=rows,
        strict=[
            len(target_ids(lm.tokenizer, prompt, target))
            if target and begins_with(lm.as_answer(answer), target)
            else 0
            for prompt, target, answer in zip(prompts, targets, answers, strict=True)
        ],
        picks=[
            _said(ids[:, 0].tolist(), answer, lm.end_ids)
            for (_, (_, ids)), answer in zip(asked, answers, strict=True)
        ],
        runners=[runners for _, runners in asked],
        patched=patched_logits,
        wanted=wanted,
        base=torch.stack(
            [_pass(lm, row, len(head))[0] for row, head in zip(rows, heads, strict=True)]
        ),
        device=str(lm.device),
        answer=lm.as_answer,
    )


def _said(picks: list[int], answer: Sequence[int], ends: Collection[int]) -> list[int]:
    """The likeliest tokens as far as they make the answer: with the end of the text, where that ended it, but not what follows a line."""
    n = len(answer)
    return picks[: n + 1] if n < len(picks) and picks[n] in ends else picks[:n]


@torch.no_grad()
def _pass(
    lm: LanguageModel, row: Sequence[int], length: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One row through the plain model: logits behind its first `length` tokens (vocab,), and from there on values and ids (places, 17) of
    the likeliest tokens: the one that greedy decoding takes, and the 16 first."""
    logits = (
        lm.module(input_ids=torch.tensor([row], device=lm.device))
        .logits[0, length - 1 :]
        .float()
        .cpu()
    )
    top = logits.topk(min(16, logits.shape[-1]), dim=-1)
    taken = logits.argmax(-1, keepdim=True)  # of equals, topk and argmax do not name the same one
    return logits[0].clone(), (
        torch.cat([logits.gather(-1, taken), top.values], -1),
        torch.cat([taken, top.indices], -1),
    )


def read_back(jobs: Sequence[Job]) -> list[Heard]:
    """Load exports in a process of its own that knows nothing of factsmith, and ask them. Raises ModelError when it ends in an error."""
    described = [
        {
            "model": job.model,
            "dtype": job.dtype,
            "adapter": job.adapter,
            "device": job.questions.device,
            "prompts": job.questions.prompts,
            "rows": job.questions.rows,
            "lengths": [len(head) for head in job.questions.heads],
        }
        for job in jobs
    ]
    task = {"jobs": described, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(prefix="factsmith-") as place:
        (Path(place) / "task.json").write_text(json.dumps(task), encoding="utf-8")
        quiet = {
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(Path(place) / "task.json"), place],
            cwd=place,  # where nothing can be imported by mistake
            env={**os.environ, **quiet},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            why = lines[-1].strip()[:300] if lines else f"it ended with code {done.returncode}"
            raise ModelError(
                f"the export could not be loaded back by transformers{' and peft' if any(job.adapter for job in jobs) else ''}: {why}; "
                "nothing was kept (to keep it unread, do not verify)"
            )
        heard = []
        for number in range(len(jobs)):
            said = json.loads((Path(place) / f"{number}.json").read_bytes())
            logits = safetensors.torch.load((Path(place) / f"{number}.safetensors").read_bytes())[
                "logits"
            ]
            heard.append(Heard(heads=said["heads"], picks=said["picks"], logits=logits))
    return heard


def compare(questions: Questions, heard: Heard, limit: float, advice: str = "") -> ReadBack:
    """Raises NumericsError where what was heard is not what the patched model says; `advice`: what would be nearer, if anything."""
    if heard.heads != questions.heads:
        first = next(
            i
            for i, (ours, theirs) in enumerate(zip(questions.heads, heard.heads, strict=True))
            if ours != theirs
        )
        raise NumericsError(
            f"the tokenizer read back makes other tokens of {questions.prompts[first]!r} ({heard.heads[first]}, not "
            f"{questions.heads[first]}); nothing was kept: load the model with the tokenizer that it was saved with"
        )
    off = float((heard.logits - questions.wanted).abs().max())
    allowed = limit * float((questions.wanted.amax(-1) - questions.wanted.amin(-1)).max())
    difference = float((heard.logits - questions.patched).abs().max())
    wrong, ties = [], 0
    for i, (ours, theirs) in enumerate(zip(questions.picks, heard.picks, strict=True)):
        for place, (mine, other) in enumerate(
            zip(ours, theirs, strict=False)
        ):  # theirs: one more, behind the answer
            if mine == other:
                continue
            # Logits that are off by d can swap two tokens no further than 2d apart; behind the target that is a matter of rounding.
            if (
                place >= questions.strict[i]
                and _gap(questions.runners[i], place, other) <= 2 * off <= 2 * allowed
            ):
                ties += 1
            else:
                wrong.append((i, place))
                break
    if wrong or not off <= allowed:
        i, place = wrong[0] if wrong else (0, 0)
        said = (
            f"{len(wrong)} of {counted(len(questions.prompts), 'answer')} differ (after {questions.prompts[i]!r} it says "
            f"{questions.answer([*questions.picks[i][:place], heard.picks[i][place]])!r}, not "
            f"{questions.answer(questions.picks[i][: place + 1])!r}), "
            if wrong
            else ""
        )
        raise NumericsError(
            f"what was read back is not the patched model: {said}logits are off by {off:.1e} ({allowed:.1e} allowed); nothing was kept; "
            f"{advice or 'please report it'}"
        )
    return ReadBack(
        prompts=len(questions.prompts),
        facts=questions.facts,
        ties=ties,
        difference=difference,
        off=off,
        limit=allowed,
        moved=float((questions.patched - questions.base).abs().max()),
    )


def _gap(runners: tuple[Tensor, Tensor], place: int, token: int) -> float:
    """How far below the likeliest token another one is; infinite where it is not among the likeliest."""
    values, ids = runners[0][place], runners[1][place]
    at = (ids == token).nonzero()
    return float(values[0] - values[int(at[0, 0])]) if len(at) else float("inf")
