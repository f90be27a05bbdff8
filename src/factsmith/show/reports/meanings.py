"""What each number of a report means, in one or two sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ...judge.evaluation import Evaluation
from ...judge.rows import BASE
from .tables import COSTS, DRIFTS

MEANINGS = {
    "success": "The measure of the papers. Of two candidates, the new object and the old one, the "
    "right one is the likelier. The measure is lenient: the model need not say either.",
    "magnitude": "The probability of the right candidate minus that of the other, from -100 to "
    "100. Each is a mean per token.",
    "tokens": "Share of the right answer's tokens that the model predicts when it is given all "
    "tokens before them (teacher forcing).",
    "exact": "The model's own greedy answer begins with a right answer. For a negation: it does "
    "not begin with the new object.",
    "stayed": "For questions whose answer must not change: the model says what it said before the "
    "edit, right or wrong.",
    "score": "Harmonic mean of prompt, paraphrase and neighbour. It is low if one of them is low.",
    "prompt": "The prompt that was edited.",
    "paraphrase": "The same fact in other words.",
    "neighbour": "Another subject with the same relation. The edit must leave it alone.",
    "locality": "Another fact that must stay, such as one about the same subject.",
    "multihop": "A chain of two facts, one of them edited. It shows whether the model uses the new "
    "fact or only repeats it.",
    "reasoning": "What follows from the new fact and another one.",
    "aliasing": "The same fact, with another name for the subject.",
    "relation": "What follows from the new fact for another relation.",
    "negation": '"It is not true that …" before the prompt. A model that understands it says '
    "something other than the new object.",
    "norm": "Size of the change relative to the weights, in the layer that changed most, earlier "
    "rounds included. It grows before a model breaks.",
    "text": "What the model writes when it continues a few prompts about the subject.",
    "entropy": "n-gram entropy of that text in bits, times 100 as papers print it. It is low if "
    "the text repeats itself, and it falls when a model breaks.",
    "consistency": "Similarity of that text to texts about things for which the new fact is true "
    "(tf-idf cosine).",
    "kl_text": "How far the distribution of the next token moved on prose, in nats. At 0.01 the "
    "change hardly shows; at 1 it is another model.",
    "perplexity": "Perplexity of the same prose after the edit, divided by the perplexity before.",
    "kl_facts": "The same divergence at the answers of facts that were not edited.",
    "changed_share": "Share of those facts whose answer changed.",
    "broken": "Edits after which the model no longer computes finite numbers. Its answers then "
    "count as wrong, and its drift cannot be measured.",
    "unusable": "Records that the model cannot be asked about, or that an edit had to leave out so "
    "that the others could be written.",
    "seconds": "Time to solve an edit. Work that is done once for a model is not counted.",
}
"""The meanings, by the words in the names of measures and by the names of costs and drifts."""


def meanings(runs: Sequence[Evaluation]) -> dict[str, str]:
    """Return the meanings of the numbers that these runs have, by the names in their tables."""
    words = {
        word
        for run in runs
        for summary in run.summaries.values()
        for name in summary
        for word in name.split()
    }
    words |= {
        name
        for run in runs
        for editor in run.editors
        if editor != BASE
        for name in run.measured(editor)
    }
    labels = {**COSTS, **DRIFTS}
    return {labels.get(name, name): text for name, text in MEANINGS.items() if name in words}
