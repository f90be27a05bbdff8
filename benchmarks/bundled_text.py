"""Second moments of the bundled text: what they cost, and whether edits notice the difference.

    python benchmarks/bundled_text.py --models atlas atlas-llama path/to/model \\
        --json benchmarks/results/bundled_text.json

cost   Processor seconds and tokens of `find_moments`, for one layer and for five (three, if there
       are no five below the middle): the first time and the second time, with an empty cache before
       each set.
edits  Facts that the model knows, each given another object: one by one by ROME, and in one batch
       by MEMIT. The targets are searched once. Then each second moment solves for the same targets:
       the bundled text's at the usual number of tokens, at other numbers, the shipped one where
       there is one, and the reference. The reference is 100 tokens a neuron of other text: other
       sentences of the same books, and other facts. `excess` is what the halves say, and
       `measured` is how much more than the reference's own solution C⁻¹ k disturbs the reference
       text, for the keys of the facts.

Everything runs in one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from factsmith import atlas
from factsmith.atlas.texts import bundled_prose, read_prose, sentences
from factsmith.core.fact import Fact
from factsmith.corpus.measuring import ENOUGH_EXCESS
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import find_moments, kept_moments
from factsmith.corpus.ordinary import ordinary_texts
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.contexts import generate_contexts
from factsmith.edit.delta import applied
from factsmith.edit.methods import memit, rome
from factsmith.edit.search import find_targets
from factsmith.edit.target import Targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.layer_choice import LayerScore
from factsmith.patch.trial_facts import judge, trial_facts

SHARED = Path(__file__).resolve().parents[1] / "../shared"
REFERENCE = 100
"""Tokens a neuron of the reference."""


def other_texts() -> Iterator[str]:
    """Yield passages of other sentences and other facts, mixed as in the bundled text."""
    taken = set(bundled_prose())
    prose = [s for s in read_prose(SHARED / "data" / "text") if s not in taken]
    random.Random(1).shuffle(prose)
    facts = iter(sentences(atlas.facts(), seed=1))  # other phrasings, mostly of other facts
    passage = ""
    for sentence in prose:
        passage = f"{passage} {next(facts)} {sentence} {next(facts)}".lstrip()
        if len(passage) > 400:
            yield passage
            passage = ""


def timed(lm: LanguageModel, layers: Sequence[int]) -> tuple[float, dict[int, SecondMoment]]:
    """Return the processor seconds of `find_moments`, and the moments."""
    began = time.process_time()
    moments = find_moments(lm, layers)
    return time.process_time() - began, moments


def measure_cost(lm: LanguageModel, layers: Sequence[int]) -> dict[str, Any]:
    """Return a row: what the moments of these layers cost the first time and the second time."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FACTSMITH_CACHE"] = folder
        first, moments = timed(lm, layers)
        second, again = timed(lm, layers)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    assert all(torch.equal(moments[x].matrix, again[x].matrix) for x in layers)
    return {
        "layers": list(layers),
        "tokens": moments[layers[0]].count,
        "seconds_first": first,
        "seconds_second": second,
        "cache_bytes": size,
        "excess": {x: moments[x].excess for x in layers},
    }


@dataclasses.dataclass(frozen=True)
class Searched:
    """Facts with their targets, so that only the second moments differ."""

    facts: list[Fact]
    contexts: list[str]
    one: RomeConfig
    several: MemitConfig
    targets: Targets
    stream: Targets

    def single(self, i: int) -> Targets:
        """Return the target of one fact."""
        names = ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial", "convergence", "facts")
        rows = {name: getattr(self.targets, name)[i : i + 1] for name in names}
        return dataclasses.replace(self.targets, **rows)


def searched(lm: LanguageModel, count: int, layers: Sequence[int], n_contexts: int) -> Searched:
    """Return facts that the model knows, with targets at the middle layer and at the last one."""
    facts = trial_facts(lm, count, seed=3)
    contexts = ["{}", *(c for c in generate_contexts(lm, 0) if c != "{}")][:n_contexts]
    one = dataclasses.replace(RomeConfig.recommended(lm), layer=layers[len(layers) // 2])
    several = dataclasses.replace(MemitConfig.recommended(lm), layers=tuple(layers), repair=0)
    assert one.layer is not None
    return Searched(
        facts,
        contexts,
        one,
        several,
        find_targets(lm, facts, one.layer, one, contexts),
        find_targets(lm, facts, layers[-1], several, contexts, site="stream"),
    )


def measure_edits(
    lm: LanguageModel,
    name: str,
    moments: Mapping[int, SecondMoment],
    reference: Mapping[int, SecondMoment],
    work: Searched,
) -> dict[str, Any]:
    """Return a row: what edits do that are weighed by these moments."""
    layer = work.one.layer
    assert layer is not None
    keys, truth = work.targets.k_prompt.double(), reference[layer]

    def disturbed(u: torch.Tensor) -> torch.Tensor:
        return ((u @ truth.matrix.double()) * u).sum(1) / (u * keys).sum(1) ** 2

    u, best = moments[layer].solve(keys), truth.solve(keys)
    trials = []
    options: dict[str, Any] = {"moments": moments, "contexts": work.contexts}
    for i, fact in enumerate(work.facts):
        with applied(lm, rome(lm, fact, work.one, targets=work.single(i), **options)):
            trials.append(judge(lm, fact))
    with applied(lm, memit(lm, work.facts, work.several, targets=work.stream, **options)):
        together = [judge(lm, fact) for fact in work.facts]
    row: dict[str, Any] = {
        "moments": name,
        "tokens": moments[layer].count,
        "excess": moments[layer].excess,
        "measured": float((disturbed(u) / disturbed(best) - 1).mean()),
        "cosine": float(torch.cosine_similarity(u, best).mean()),
    }
    for method, some in (("rome", trials), ("memit", together)):
        score = LayerScore.of(0, some)
        fields = ("efficacy", "generalization", "specificity", "score")
        row[method] = {field: getattr(score, field) for field in fields}
    print(json.dumps(row), flush=True)
    return row


def measure(name: str, lm: LanguageModel, args: argparse.Namespace) -> dict[str, Any]:
    """Return the record of one model."""
    five = [3, 4, 5, 6, 7] if lm.n_layers > 14 else [0, 1, 2]
    one = [five[len(five) // 2]]
    record: dict[str, Any] = {"d_ff": lm.ffn[one[0]].d_ff, "cost": []}
    for layers in (one, five):
        record["cost"].append(measure_cost(lm, layers))
        print(name, json.dumps(record["cost"][-1]), flush=True)
    if not args.facts:
        return record
    d_ff = record["d_ff"]
    usual = second_moments(lm, ordinary_texts(), five)
    reference = second_moments(lm, other_texts(), five, max_tokens=REFERENCE * d_ff)
    work = searched(lm, args.facts, five, args.contexts)
    sets: dict[str, Mapping[int, SecondMoment]] = {"bundled text": usual}
    sets |= {
        f"bundled text, {per} a neuron": second_moments(
            lm, ordinary_texts(), five, max_tokens=per * d_ff
        )
        for per in args.per_neuron
    }
    shipped = kept_moments(lm, five) if name in atlas.names() else {}
    sets |= {"shipped": shipped} if set(shipped) == set(five) else {}
    sets["reference"] = reference
    record["facts"] = len(work.facts)
    record["edits"] = [measure_edits(lm, x, sets[x], reference, work) for x in sets]
    scores = {row["moments"]: row["memit"]["score"] for row in record["edits"]}
    least = min(statistics.fmean(scores.values()), scores["reference"]) - 0.1
    assert scores["bundled text"] >= least, scores
    worst = max(moment.excess or 1.0 for moment in usual.values())
    assert worst <= ENOUGH_EXCESS, worst
    return record


def main() -> None:
    """Measure the models that were asked for, and keep the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(atlas.names()))
    parser.add_argument("--facts", type=int, default=20, help="0: the cost alone")
    parser.add_argument("--contexts", type=int, default=6, help="contexts of the searches")
    parser.add_argument("--per-neuron", type=int, nargs="*", default=[4, 8, 32])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text(encoding="utf-8"))
    for name in args.models:
        lm = load(name)
        results[Path(name).name] = measure(name, lm, args)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
