"""Do knowledge neurons carry facts? Dai et al. 2022 (arXiv 2104.08696) on the bundled models.

    python benchmarks/knowledge_neurons.py --facts 24 --relations 4        # a minute
    python benchmarks/knowledge_neurons.py --model atlas --room 0.05 0.75 \
        --json benchmarks/results/knowledge_neurons.json                   # 26 minutes
    python benchmarks/knowledge_neurons.py --model atlas-llama \
        --json benchmarks/results/knowledge_neurons.json                   # adds its part

The script repeats the paper's tables, and counts how many neurons carry a prediction.

Prompts. A fact's neurons are located with the first ten trained phrasings of its relation. Effects
are measured on these ("own") and on four paraphrases that locating never used ("held-out"): the
relation's two held-out sentences, and two of its wide ones.

Populations:

    known   facts that the model answers right on most of its own phrasings. p is about 0.98, so
            nothing is left to amplify.
    unsure  facts whose mean p over their own phrasings lies in --room. BERT, in the paper, is as
            unsure of its facts.

Numbers. A change of probability is the authors' aggregate: for each relation the mean of p after
over the mean of p before, less one; then the mean over relations. Intervals are 95 % of a bootstrap
over the facts of each relation.

Scopes. "last" scales the neurons where the target is predicted, as the paper does at the mask.
"every" scales them at every token, as `factsmith.intervene` and an erased value do.

Controls, with as many neurons: random ones of the whole model; random ones of the same layers; the
most active ones.

Check. Interventions run in batches in which every row has neurons of its own. `check` in the JSON
is the largest difference from `factsmith.intervene`, from a plain hook on whole passes, and from
erased weights.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import factsmith as fs
from factsmith import atlas
from factsmith.model.address import Neuron
from factsmith.model.language_model import LanguageModel
from factsmith.model.tokens import target_ids
from neuron_study.edits import ask, erased, erased_relations, rewritten
from neuron_study.effects import effects
from neuron_study.facts import OWN, StudiedFact, known, unsure
from neuron_study.interventions import Subject
from neuron_study.located import locate
from neuron_study.numbers import rounded
from neuron_study.report import draw, markdown

PAPER = {
    "neurons a fact": "4.13",
    "suppress": "-29.0 %",
    "amplify": "+31.2 %",
    "baseline": "-1.5 % / -1.3 %",
    "shared within / across relations": "1.23 / 0.09",
    "update success": "34.4 %",
}


def check(lm: LanguageModel, asked: Sequence[StudiedFact]) -> float:
    """Return the largest difference in log p between these batches and the public way."""
    some = [a for a in asked if a.neurons["share 0.7"]][:: max(1, len(asked) // 4)]
    return max((difference for a in some for difference in _differences(lm, a)), default=0.0)


def _differences(lm: LanguageModel, a: StudiedFact) -> Iterator[float]:
    """The differences of one fact, for each way to scale its neurons."""
    neurons, subject = a.neurons["share 0.7"], Subject(lm, a.prompts, a.fact.object)
    pairs = [(p, a.fact.object) for p in a.prompts]

    def difference(log_p: Tensor, scale: float, scope: str) -> float:
        return float((log_p - subject.log_p([neurons], scale, scope)[0]).abs().max())

    for scale in (0.0, 2.0):
        with fs.intervene(lm, neurons, scale):
            public = ask(lm, pairs)
        yield difference(public, scale, "every")
        yield difference(_by_hook(lm, a, neurons, scale), scale, "last")
    with fs.applied(lm, fs.erase(lm, neurons)):
        yield difference(ask(lm, pairs), 0.0, "every")


@torch.no_grad()
def _by_hook(lm: LanguageModel, a: StudiedFact, neurons: Sequence[Neuron], scale: float) -> Tensor:
    """log p with neurons scaled at the last prompt token and at the target's.

    Each prompt takes one whole pass of the bare model.
    """
    logs = []
    for prompt in a.prompts:
        head, tail = lm.prompt_ids(prompt), target_ids(lm.tokenizer, prompt, a.fact.object)
        handles = []
        for neuron in neurons:

            def hook(module: Any, args: Any, i: int = neuron[-1], at: int = len(head) - 1) -> Any:
                changed = args[0].clone()
                changed[:, at:, i] *= scale
                return (changed,)

            handles.append(lm.ffn[neuron[0]].down.register_forward_pre_hook(hook))
        logits = lm.module(input_ids=torch.tensor([head + tail[:-1]])).logits[0, len(head) - 1 :]
        for handle in handles:
            handle.remove()
        log_p = logits.double().log_softmax(-1)
        logs.append(log_p.gather(1, torch.tensor(tail)[:, None]).sum())
    return torch.stack(logs)


def study(
    lm: LanguageModel,
    asked: list[StudiedFact],
    given: argparse.Namespace,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return all numbers of one population."""
    result: dict[str, Any] = {
        "facts": len(asked),
        "relations": len({a.fact.relation for a in asked}),
    }
    p = torch.stack([lm.log_prob(a.own_prompts, [a.fact.object] * OWN).exp() for a in asked]).mean(
        1
    )
    result["p"] = [rounded(float(x)) for x in p.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))]
    result["located"] = locate(lm, asked, given)
    tell("located")
    result["check"] = rounded(check(lm, asked))
    result["effects"], result["curves"], result["half"] = effects(lm, asked)
    tell("effects, curves, halves")
    result["erase"] = erased(lm, asked, given)
    result["erase_relations"] = erased_relations(lm, asked)
    tell("erased")
    result["rewrite"] = rewritten(lm, asked, given)
    tell("rewritten")
    return result


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas", choices=atlas.names())
    parser.add_argument("--facts", type=int, default=200, help="facts in each population")
    parser.add_argument("--relations", type=int, default=20, help="relations of the known facts")
    parser.add_argument(
        "--populations", nargs="+", default=["known", "unsure"], choices=["known", "unsure"]
    )
    parser.add_argument(
        "--room", type=float, nargs=2, default=(0.05, 0.7), help="mean p of the unsure facts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the scan of all facts is kept",
    )
    parser.add_argument(
        "--json", type=Path, help="write the numbers to this file, with those of the other model"
    )
    parser.add_argument(
        "--draw", type=Path, help="draw the halves of --json's numbers, and measure nothing"
    )
    return parser.parse_args()


def main() -> None:
    """Study every population, print its tables, and write the numbers as JSON."""
    given = parsed()
    if given.draw:
        return draw(json.loads(given.json.read_text())[given.model]["populations"], given.draw)
    torch.set_num_threads(1)
    started = time.process_time()

    def tell(what: str) -> None:
        print(f"{time.process_time() - started:7.0f} s  {what}", flush=True)

    lm = fs.load(given.model)
    result: dict[str, Any] = {
        "seed": given.seed,
        "paper": PAPER,
        "room": list(given.room),
        "populations": {},
    }
    for name in given.populations:
        asked = {"known": known, "unsure": unsure}[name](lm, given)
        tell(f"{name}: {len(asked)} facts chosen")
        result["populations"][name] = study(lm, asked, given, tell)
        print(markdown(given.model, name, result["populations"][name]), flush=True)
    result["seconds"] = round(time.process_time() - started)
    if given.json:
        whole = json.loads(given.json.read_text()) if given.json.is_file() else {}
        text = json.dumps({**whole, given.model: result}, indent=1)
        # Each list of numbers on one line.
        given.json.write_text(
            re.sub(r"\[([^\[\]{}]*)\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"
        )


if __name__ == "__main__":
    main()
