"""Edits of single neurons as deltas: erase what they write, or rewrite it from one answer to another.

    found = knowledge_neurons(lm, prompts, "French")                       # or any (layer, i) pairs
    with applied(lm, erase(lm, found.refined)): ...                        # these values are exactly zero inside
    delta = rewrite(lm, found.refined, "French", "English", prompt=prompts[0])

Dai et al. 2022, "Knowledge Neurons in Pretrained Transformers", sections 5.1 and 5.2, https://arxiv.org/abs/2104.08696. A neuron's value
is one column of a down-projection, so the update is left @ right with one-hot rows on the right: nothing is solved for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_number, check_text
from ..core.errors import InputError, UnsupportedModelError
from ..model.address import Neuron, find_neurons
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from .delta import Delta

_REMOVE, _ADD = (
    1.0,
    8.0,
)  # the authors' factors, for the neurons of a fact as they found them, about four

_FEW = 4


def erase(lm: LanguageModel, neurons: Iterable[Neuron]) -> Delta:
    """Set the values of neurons (layer, i) to zero, so that they write nothing, whatever their coefficient.

    On the weights it was made on the columns come out as zeros to the last bit in 32 and 16 bits, because W + (−W) is added in float32. In
    float64 a delta's float32 leaves about 1e-8 of each value; on top of other patches 16-bit weights keep the rounding of the sum.

    Raises LayerError for a neuron the model does not have, InputError when none is given, UnsupportedModelError for layers with experts.
    """
    chosen = _by_layer(lm, neurons)
    lefts = {layer: -_values(lm, layer, indices) for layer, indices in chosen.items()}
    return _delta(lm, chosen, lefts, "erase", {})


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
    """Make neurons (layer, i) write `new_target` in place of `old_target`: v ← v − λ₁ ‖v‖ e_old/‖e_old‖ + λ₂ ‖v‖ e_new/‖e_new‖.

    prompt   a prompt that the targets answer (with masks, for a masked language model); neurons whose coefficient is negative where the
             answer begins, in gated memories about half of them, are updated with the opposite sign. None: the paper's formula as it stands
    remove   λ₁; None: the authors' 1, of more than four neurons 4/n: together they then remove as much as four do
    add      λ₂; None: likewise 8, of more than four neurons 32/n

    e is the target's row of the unembedding, by which the hidden state is read out; the paper's input embeddings are the same matrix in
    BERT and wherever the two are tied. Of targets with several tokens the first in which the two differ is taken: that is where the answer
    is decided, and the tokens after it follow from the text so far. Where one target is the beginning of the other, the shorter one has no
    such token and no term.

    The authors' factors are for the about four neurons they found for a fact. For more they are far too much: over ten facts of the atlas,
    each with its 64 strongest neurons, they left 1 % of other facts' answers as they were, and wrote the target in 50 %; 4/n and 32/n left
    84 %, and wrote 90 % (8 neurons: 17 and 60 %, against 32 and 70 %). Fewer sufficed there at times: four neurons with `add=2` left 97 %
    instead of 30 %, and wrote 50 % instead of 60 %. Factors that are given are taken as they are.

    Raises LayerError, InputError (no neuron, no target, equal targets, settings that are not finite), UnsupportedModelError (layers with
    experts, a model without an unembedding matrix).
    """
    check_model(lm)
    old_target, new_target = (
        check_text(old_target, "old_target"),
        check_text(new_target, "new_target"),
    )
    chosen = _by_layer(lm, neurons)
    portion = min(1.0, _FEW / sum(map(len, chosen.values())))
    remove, add = (
        default * portion if given is None else check_number(given, name)
        for given, default, name in ((remove, _REMOVE, "remove"), (add, _ADD, "add"))
    )
    if (
        prompt is None
    ):  # words inside a text all the same: with a space before them where the tokenizer writes one
        old, new = (
            target_ids(lm.tokenizer, "It is", target) for target in (old_target, new_target)
        )
    else:
        (_, (column, *_), old), (_, _, new) = (
            lm.question(prompt, target) for target in (old_target, new_target)
        )
    differ = next(
        (i for i in range(max(len(old), len(new))) if old[i : i + 1] != new[i : i + 1]), None
    )
    if differ is None:
        raise InputError(
            f"old_target and new_target are both {new_target.strip()!r}; expected two different answers"
        )
    direction = add * _unit_row(lm, new[differ : differ + 1]) - remove * _unit_row(
        lm, old[differ : differ + 1]
    )  # (d_model,)
    signs = {layer: torch.ones(len(indices)) for layer, indices in chosen.items()}
    if prompt is not None:
        for layer, indices in chosen.items():
            signs[layer] = torch.where(
                lm.coefficients(prompt, [layer])[0, column, indices].float().cpu() < 0, -1.0, 1.0
            )
    lefts = {
        layer: direction[:, None] * (_values(lm, layer, indices).norm(dim=0) * signs[layer])
        for layer, indices in chosen.items()
    }
    config = {
        "old_target": old_target,
        "new_target": new_target,
        "prompt": prompt,
        "remove": float(remove),
        "add": float(add),
    }
    return _delta(lm, chosen, lefts, "rewrite", config)


def _by_layer(lm: LanguageModel, neurons: Iterable[Neuron]) -> dict[int, list[int]]:
    """{layer: neuron indices}, both ascending and each once; everything is checked here."""
    check_model(lm)
    found: dict[int, set[int]] = {}
    for layer, bank, i in find_neurons(lm.ffn, neurons):
        if lm.ffn[layer].n_experts:
            raise UnsupportedModelError(
                f"neuron {(layer, bank, i)} belongs to an expert, and weights of experts are not edited yet; "
                "choose a layer without experts, or intervene on it while the model runs"
            )
        found.setdefault(layer, set()).add(i)
    if not found:
        raise InputError("no neuron was given; expected at least one (layer, i)")
    return {layer: sorted(indices) for layer, indices in sorted(found.items())}


def _values(lm: LanguageModel, layer: int, indices: list[int]) -> Tensor:
    """The neurons' values as columns: (d_model, n) float32 on the CPU."""
    return lm.ffn[layer].weight()[:, indices].float().cpu()


def _unit_row(lm: LanguageModel, token: list[int]) -> Tensor:
    """One token's row of the unembedding with length one, or zeros when there is no token: (d_model,) float32 on the CPU."""
    head = lm.module.get_output_embeddings()
    matrix = getattr(head, "weight", None)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or matrix.shape[1] != lm.d_model:
        raise UnsupportedModelError(
            f"{lm.name} has no unembedding matrix (vocabulary, {lm.d_model}): a target has no direction to write"
        )
    if not token:
        return torch.zeros(lm.d_model)
    row = matrix.detach()[token[0]].float().cpu()
    return torch.nn.functional.normalize(row, dim=0)


def _delta(
    lm: LanguageModel,
    chosen: Mapping[int, list[int]],
    lefts: Mapping[int, Tensor],
    method: str,
    config: Mapping[str, Any],
) -> Delta:
    """lefts {l: (d_model, n)} added to the columns of the chosen neurons; no key, no stored value, no fact: nothing was solved for."""
    layers, k_star = {}, {}
    for layer, indices in chosen.items():
        d_ff = lm.ffn[layer].d_ff
        one_hot = torch.zeros(len(indices), d_ff)
        one_hot[torch.arange(len(indices)), indices] = 1
        layers[layer], k_star[layer] = (lefts[layer].contiguous(), one_hot), torch.zeros(0, d_ff)
    return Delta(
        layers=layers,
        k_star=k_star,
        v_star=torch.zeros(0, lm.d_model),
        facts=(),
        method=method,
        config={
            "neurons": [[layer, i] for layer, indices in chosen.items() for i in indices],
            **config,
        },
        fingerprint=lm.fingerprint,
    )
