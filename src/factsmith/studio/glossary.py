"""Terms of the field, each explained in one line, as the pages show them on hover and on focus.

explain("indirect effect")      # "How much p(answer) rises when ..."
"""

from __future__ import annotations

TERMS = {
    "answer": "The text that the model continues the prompt with.",
    "appended neuron": (
        "A neuron that a patch adds to a layer for one fact. The weights that were there stay."
    ),
    "base": "The model as it was loaded, with no patch.",
    "campaign": "A run that judges editing methods on a benchmark, with its results.",
    "capacity": "How many facts a layer holds, and how close their keys are to each other.",
    "causal trace": (
        "Corrupt the subject, restore one state at a time, and see which state brings the answer "
        "back."
    ),
    "checkout": "Give the model the weights of one revision of the ledger.",
    "clean": "The run on the prompt without any change.",
    "coefficient": "The activation of a neuron on a token: how strongly its key matched.",
    "conflict": "A fact of this patch gives another answer to a question that a kept fact answers.",
    "corrupted": "The run with the subject disturbed, so that the model loses the fact.",
    "crowding": "How close the key of a fact is to the keys of earlier patches.",
    "delta": "The change that a patch makes to one layer's matrix, or the neurons that it appends.",
    "edit": "A change of weights that gives the model another answer for one fact.",
    "efficacy": "Whether the patched model gives the new answer to the fact's own prompt.",
    "false firing": "How often an appended neuron fires on text that is not about its fact.",
    "feed-forward layer": (
        "The part of a transformer layer that works on each token alone: the model's memory."
    ),
    "fingerprint": "A SHA-256 of the weights, the configuration and the tokenizer.",
    "gate": "A share that a patch must reach before it is kept.",
    "generalization": "Whether the new answer also comes for paraphrases of the prompt.",
    "indirect effect": "How much p(answer) rises when one state of the clean run is put back.",
    "key": "The row of a feed-forward layer's first matrix that decides when a neuron fires.",
    "knowledge neuron": "A neuron whose coefficient carries much of the answer's probability.",
    "layer": "One step of the transformer: attention, then a feed-forward layer.",
    "ledger": "The record of every patch, with what it changed and how to take it back.",
    "lens": "What the model would say if it ended after a layer.",
    "load": "The number of facts, divided by the number of neurons in the edited layers.",
    "logit": "The score of a token before the softmax turns scores into probabilities.",
    "neighbour": "A prompt about another subject whose answer must stay.",
    "neuron": "One row of a feed-forward layer: a key and a value, named by layer and number.",
    "paraphrase": "The same question in other words.",
    "patch": "A set of facts written into the weights, kept in the ledger as one revision.",
    "portability": "Whether the model also draws conclusions from the new fact.",
    "promoted": "The tokens whose logits a neuron's value raises most.",
    "proof": "The questions that were asked before and after a patch, with their answers.",
    "revision": "One entry of the ledger: a patch or a revert, with an id.",
    "second moment": "The average of the products of a layer's coefficients over a corpus.",
    "sever": "Hold one part at the corrupted run's values, to see what the effect goes through.",
    "specificity": "Whether the answers to neighbouring prompts stay as they were.",
    "subject": "The thing that a fact is about.",
    "target": "The answer that the patched model gives.",
    "token": "A piece of text that the model reads as one unit.",
    "trigger": "A text on which a neuron's coefficient is among the largest in a corpus.",
    "value": "The row of a feed-forward layer's output matrix that a neuron adds when it fires.",
    "workspace": "The folder that holds a model's ledger and its deltas.",
}
"""{term: its explanation in one line}."""


def explain(term: str) -> str:
    """Return the explanation of a term, in any case and also of its plural; "" if there is none."""
    key = term.lower()
    return TERMS.get(key) or TERMS.get(key.removesuffix("s"), "")
