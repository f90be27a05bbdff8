"""Edits of single neurons as deltas: erase their values, or rewrite them to another answer.

    neurons = knowledge_neurons(lm, prompts, "French").refined         # or any (layer, i) pairs
    with applied(lm, erase(lm, neurons)): ...                          # these values are zero
    inside delta = rewrite(lm, neurons, "French", "English", prompt=prompts[0])

These are the edits of Dai et al. 2022, "Knowledge Neurons in Pretrained Transformers", sections 5.1
and 5.2, https://arxiv.org/abs/2104.08696. A neuron's value is one column of a down-projection. So
the update is left @ right with one-hot rows on the right, and no system is solved.

Such a delta has no facts. Its config is its recipe: `made_again` makes it for other weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_number, check_text
from ..core.errors import InputError, UnsupportedModelError
from ..model.address import Neuron, find_neurons
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from ..model.turns import asking
from .delta import Delta

_REMOVE, _ADD = 1.0, 8.0
"""The authors' factors, for the about four neurons that they found for a fact."""

_ERASE, _REWRITE = "erase", "rewrite"

_FEW = 4
"""The number of neurons up to which the authors' factors are used as they are."""


@asking(grad=True)
def erase(lm: LanguageModel, neurons: Iterable[Neuron]) -> Delta:
    """Return the delta that sets the values of neurons to zero, so that they write nothing.

    On the weights that the delta was made on, these columns become exactly zero in 32 and 16 bits,
    because W + (−W) is added in float32. In float64 about 1e-8 of each value is left, because a
    delta is float32. On a model that carries other patches, 16-bit weights keep the rounding of the
    sum.

    Args:
        lm: The model.
        neurons: (layer, i) pairs.

    Raises:
        LayerError: The model does not have a neuron.
        InputError: No neuron is given.
        UnsupportedModelError: A layer has experts.
    """
    chosen = _by_layer(lm, neurons)
    lefts = {layer: -_values(lm, layer, indices) for layer, indices in chosen.items()}
    return _delta(lm, chosen, lefts, _ERASE, {})


@asking(grad=True)
def rewrite(
    lm: LanguageModel,
    neurons: Iterable[Neuron],
    old_target: str,
    new_target: str,
    *,
    prompt: str | None = None,
    remove: float | None = None,
    add: float | None = None,
) -> Delta:
    """Return the delta that makes neurons write `new_target` instead of `old_target`.

        v ← v − λ₁ ‖v‖ e_old / ‖e_old‖ + λ₂ ‖v‖ e_new / ‖e_new‖

    e is the target's row of the unembedding, which reads out the hidden state. The paper uses the
    input embeddings. They are the same matrix in BERT, and in every model where the two are tied.
    If a target has several tokens, e is that of the first token in which the two targets differ.
    The answer is decided there, and the later tokens follow from the text before them. If one
    target is the beginning of the other, the shorter one has no such token and no term.

    The authors' factors are for the about four neurons that they found for a fact, and far too
    large for more. Over ten facts of the atlas, each with its 64 strongest neurons, they left 1 %
    of other facts' answers unchanged, and wrote the target in 50 %. With 4/n and 32/n it was 84 and
    90 % (with 8 neurons 32 and 70 %, against 17 and 60 %). Sometimes less is better: four
    neurons with add=2 left 97 % unchanged instead of 30 %, and wrote 50 % instead of 60 %.

    Args:
        lm: The model.
        neurons: (layer, i) pairs.
        old_target: The answer to remove.
        new_target: The answer to add.
        prompt: A prompt that the targets answer (with masks, for a masked language model). Neurons
            with a negative coefficient where the answer begins are updated with the opposite sign.
            In gated memories these are about half of the neurons. None: the paper's formula for all
            neurons.
        remove: λ₁. None: the authors' 1, or 4/n for n neurons, more than four. Together they then
            remove as much as four do.
        add: λ₂. None: the authors' 8, or 32/n for n neurons, more than four. Factors that are given
            are used as they are.

    Raises:
        LayerError: The model does not have a neuron.
        InputError: No neuron or no target is given, the targets are equal, or a factor is not
            finite.
        UnsupportedModelError: A layer has experts, or the model has no unembedding matrix.
    """
    check_model(lm)
    old_target = check_text(old_target, "old_target")
    new_target = check_text(new_target, "new_target")
    chosen = _by_layer(lm, neurons)
    portion = min(1.0, _FEW / sum(map(len, chosen.values())))
    remove = _REMOVE * portion if remove is None else check_number(remove, "remove")
    add = _ADD * portion if add is None else check_number(add, "add")
    old, new, column = _deciding_tokens(lm, old_target, new_target, prompt)
    added, removed = _unit_row(lm, new), _unit_row(lm, old)
    direction = add * added - remove * removed  # (d_model,)
    lefts = {}
    for layer, indices in chosen.items():
        signs = torch.ones(len(indices), dtype=torch.float32)
        if prompt is not None:
            coefficients = lm.coefficients(prompt, [layer])[0, column, indices].float().cpu()
            signs[coefficients < 0] = -1
        norms = _values(lm, layer, indices).norm(dim=0)
        lefts[layer] = direction[:, None] * (norms * signs)
    config = {
        "old_target": old_target,
        "new_target": new_target,
        "prompt": prompt,
        "remove": float(remove),
        "add": float(add),
    }
    return _delta(lm, chosen, lefts, _REWRITE, config)


def edits_neurons(delta: Delta) -> bool:
    """Return whether a delta was made by `erase` or `rewrite`."""
    return not delta.facts and delta.method in (_ERASE, _REWRITE)


def made_again(lm: LanguageModel, delta: Delta) -> Delta:
    """Return an edit of neurons for the weights that the model has now.

    An erased value is the old value subtracted, so on other weights the old delta would leave
    something of it.

    Raises:
        InputError: The delta is not an edit of neurons, or its config cannot be read. Otherwise as
            `erase` and `rewrite`.
    """
    config = delta.config
    try:
        if not edits_neurons(delta):
            raise ValueError(f"its method is {delta.method!r}")
        neurons = [(int(layer), int(i)) for layer, i in config["neurons"]]
        if delta.method == _ERASE:
            return erase(lm, neurons)
        texts = [config[name] for name in ("old_target", "new_target", "prompt")]
        remove, add = float(config["remove"]), float(config["add"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the delta cannot be made again as an edit of neurons ({error}); make it again with "
            "erase or rewrite"
        ) from None
    old_target, new_target, prompt = texts
    return rewrite(lm, neurons, old_target, new_target, prompt=prompt, remove=remove, add=add)


def erased_neurons(deltas: Iterable[Delta]) -> dict[int, list[int]]:
    """Return the neurons that some deltas erase, {layer: indices}."""
    erased: dict[int, set[int]] = {}
    for delta in deltas:
        if edits_neurons(delta) and delta.method == _ERASE:
            for layer, i in delta.config.get("neurons", ()):
                erased.setdefault(layer, set()).add(i)
    return {layer: sorted(indices) for layer, indices in sorted(erased.items())}


def sparing(delta: Delta, beneath: Sequence[Delta]) -> Delta:
    """Return a delta that leaves the neurons erased by others at zero.

    A closed form changes every column of a down-projection, also those of erased neurons. These
    columns are left out of the update.
    """
    erased = erased_neurons(beneath)
    layers = dict(delta.layers)
    for layer in erased.keys() & layers.keys():
        left, right = layers[layer]
        right = right.clone()
        right[:, erased[layer]] = 0
        layers[layer] = (left, right)
    return dataclasses.replace(delta, layers=layers) if erased else delta


def revives(delta: Delta, beneath: Sequence[Delta]) -> list[tuple[int, int]]:
    """Return the erased neurons (layer, i) whose values a delta would change."""
    return [
        (layer, i)
        for layer, indices in erased_neurons(beneath).items()
        if layer in delta.layers
        for i in indices
        if bool(delta.layers[layer][1][:, i].any())
    ]


def _deciding_tokens(
    lm: LanguageModel, old_target: str, new_target: str, prompt: str | None
) -> tuple[list[int], list[int], int]:
    """Return the first tokens in which two targets differ, and the column where the answer begins.

    Each is a list of one token, or an empty list for a target that is the beginning of the other.
    """
    column = 0
    if prompt is None:  # any words: a tokenizer may write a space before a word inside a text
        old = target_ids(lm.tokenizer, "It is", old_target)
        new = target_ids(lm.tokenizer, "It is", new_target)
    else:
        _, (column, *_), old = lm.question(prompt, old_target)
        _, _, new = lm.question(prompt, new_target)
    for i in range(max(len(old), len(new))):
        if old[i : i + 1] != new[i : i + 1]:
            return old[i : i + 1], new[i : i + 1], column
    raise InputError(
        f"old_target and new_target are both {new_target.strip()!r}; expected two different "
        "answers",
        argument="new_target",
    )


def _by_layer(lm: LanguageModel, neurons: Iterable[Neuron]) -> dict[int, list[int]]:
    """Return {layer: neuron indices} after all checks, both in ascending order and each once."""
    check_model(lm)
    by_layer: dict[int, set[int]] = {}
    for layer, bank, i in find_neurons(lm.ffn, neurons):
        if lm.ffn[layer].n_experts:
            raise UnsupportedModelError(
                f"neuron {(layer, bank, i)} belongs to an expert, and weights of experts are not "
                "edited yet. Choose a layer without experts, or use intervene while the model runs."
            )
        if i >= lm.ffn[layer].n_original:
            raise InputError(
                f"neuron {(layer, i)} was appended by a patch; revert that patch to take it out",
                argument="neurons",
            )
        by_layer.setdefault(layer, set()).add(i)
    if not by_layer:
        raise InputError(
            "no neuron was given; expected at least one (layer, i)", argument="neurons"
        )
    return {layer: sorted(indices) for layer, indices in sorted(by_layer.items())}


def _values(lm: LanguageModel, layer: int, indices: list[int]) -> Tensor:
    """Return the neurons' values as columns, (d_model, n) float32 on the CPU."""
    return lm.ffn[layer].weight()[:, indices].float().cpu()


def _unit_row(lm: LanguageModel, token: list[int]) -> Tensor:
    """Return a token's row of the unembedding with length one, (d_model,) float32 on the CPU.

    Args:
        lm: The model.
        token: One token, or an empty list, which gives zeros.
    """
    head = lm.module.get_output_embeddings()
    matrix = getattr(head, "weight", None)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or matrix.shape[1] != lm.d_model:
        raise UnsupportedModelError(
            f"{lm.name} has no unembedding matrix (vocabulary, {lm.d_model}), so a target has no "
            "direction that neurons could write"
        )
    if not token:
        return torch.zeros(lm.d_model, dtype=torch.float32)
    row = matrix.detach()[token[0]].float().cpu()
    return torch.nn.functional.normalize(row, dim=0)


def _delta(
    lm: LanguageModel,
    chosen: Mapping[int, list[int]],
    lefts: Mapping[int, Tensor],
    method: str,
    config: Mapping[str, Any],
) -> Delta:
    """Return the delta that adds lefts {l: (d_model, n)} to the columns of the chosen neurons.

    It has no keys, targets or facts, because no system was solved.
    """
    layers, k_star = {}, {}
    for layer, indices in chosen.items():
        d_ff = lm.ffn[layer].n_original
        one_hot = torch.zeros(len(indices), d_ff, dtype=torch.float32)
        one_hot[torch.arange(len(indices)), indices] = 1
        layers[layer], k_star[layer] = (
            (lefts[layer].contiguous(), one_hot),
            torch.zeros(0, d_ff, dtype=torch.float32),
        )
    return Delta(
        layers=layers,
        k_star=k_star,
        v_star=torch.zeros(0, lm.d_model, dtype=torch.float32),
        facts=(),
        method=method,
        config={
            "neurons": [[layer, i] for layer, indices in chosen.items() for i in indices],
            **config,
        },
        fingerprint=lm.fingerprint,
    )
