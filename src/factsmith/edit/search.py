"""The search for v_star, the output at the subject token that makes the model assert a fact.

    targets = find_targets(lm, facts, layer, config, contexts)                   # ROME
    targets = find_targets(lm, facts, layer, config, contexts, site="stream")    # the MEMIT family
    targets.v_star, targets.k_star, targets.convergence

The site "ffn" is the output of the down-projection, and "stream" is the output of the whole layer.

There are two searches. `edit/adam.py` is that of the papers. `edit/margin.py` needs far fewer steps
and is the default with scale="auto". `edit/rows.py` is what they have in common. Facts do not
influence each other in either.

Where the executor in use cuts work into parts (`core.executor`), each batch is a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from ..core.errors import InputError
from ..core.executor import Executor, Local, executor_in_use, report_done
from ..core.fact import Fact
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from ..model.turns import asking
from .adam import AdamSearch
from .batches import fitting_batches, search_memory
from .contexts import check_contexts
from .keys import Site, read_keys, read_outputs, read_stream
from .margin import MarginSearch
from .questions import Question, tokenize_facts
from .target import TargetConfig, Targets

Search: TypeAlias = type[AdamSearch] | type[MarginSearch]
"""One of the two searches."""

_MOST = 32
"""Facts of one part, at most. Larger batches are hardly faster for each fact."""


@asking(grad=True)
def find_targets(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
    *,
    site: Site = "ffn",
    memory: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Targets:
    """Search v_star for each fact: the output plus δ, the change that makes the model assert it.

    The settings say how δ is searched. Adam minimises the loss of ROME, equation 4, and MEMIT,
    equation 16:

        L(δ) = meanᵪ −log p(target | context + prompt) / |target|
             + kl_factor · KL(p_δ ‖ p₀ | "{} is a") + weight_decay · ‖δ‖ / ‖v₀‖²

    For a fact without a target the first term is KL(p without the subject ‖ p_δ), so that the
    subject makes no difference any more. The model is untouched.

    Args:
        lm: The model.
        facts: The facts.
        layer: The layer where δ is added.
        config: How the search runs.
        contexts: Templates with one `{}` for the prompt. The bare "{}", which gives v₀, is one.
        site: "ffn": δ is added to the output of the down-projection. "stream": to the layer's
            output, where the edits of this layer and of those below it arrive together.
        memory: Bytes that the activations of one batch may take. Facts that do not fit go into
            further batches. None: half of a GPU's free memory, or 1 GiB on a CPU.
        progress: Called with the number of facts done, after each step. Workers tell it now and
            then.

    Raises:
        SubjectError: A prompt does not contain its subject exactly once.
        LayerError: The model does not have the layer.
        InputError: The bare "{}" is not among the contexts.
        UnsupportedModelError: The layer is a mixture of experts.
        NumericsError: The loss is not finite.
    """
    layer, contexts = check_dense_layer(layer, lm.ffn), check_contexts(contexts)
    questions, bare = tokenize_facts(lm, facts, contexts), contexts.index("{}")
    memory = search_memory(lm) if memory is None else memory
    executor = executor_in_use()
    batches = _batches(lm, layer, config, questions, memory, _MOST if executor.cuts else None)
    task = _Task(lm, layer, config, site, bare)
    parts = [(search, [questions[i] for i in numbers]) for search, numbers in batches]
    # A single part is done at once: to send it, and the model, takes longer.
    on: Executor = Local() if len(parts) == 1 else executor
    results = on.map(task, parts, progress=progress)
    rows: dict[int, tuple[Targets, int]] = {}
    for (_, numbers), batch in zip(batches, results, strict=True):
        rows.update((i, (batch, row)) for row, i in enumerate(numbers))
    return Targets.gathered([rows[i] for i in range(len(facts))]).to(lm.device)


@dataclass(frozen=True)
class _Task:
    """Searches the targets of one batch of questions.

    Attributes:
        lm: The model.
        layer: The layer.
        config: How the search runs.
        site: The place in the layer.
        bare: The number of the bare context.
    """

    lm: LanguageModel
    layer: int
    config: TargetConfig
    site: Site
    bare: int

    def __call__(self, part: tuple[Search, Sequence[Question]]) -> Targets:
        """Search, and return the targets on the CPU."""
        search, questions = part
        return _searched(self.lm, search, questions, self)


@asking(grad=True)
def _searched(
    lm: LanguageModel, search: Search, questions: Sequence[Question], task: _Task
) -> Targets:
    """Search the targets of one batch on the model, and return them on the CPU."""
    batch = search(lm, questions, task.layer, task.config, task.site, task.bare)
    return batch.run(report_done).to("cpu")


@asking()
def known_targets(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    v_star: Tensor,
    *,
    site: Site = "ffn",
) -> Targets:
    """Return what `find_targets` returns, for targets that are known already. Nothing is searched.

    The model may differ from the one that the targets were searched on. Keys and v_initial are read
    from the present model.

    Args:
        lm: The model.
        facts: The facts.
        layer: The layer of the targets.
        contexts: As for `find_targets`.
        v_star: (n, d_model) the targets.
        site: The place in the layer.

    Raises:
        InputError: v_star has another shape. Otherwise as `find_targets`.
    """
    check_dense_layer(layer, lm.ffn)
    if v_star.shape != (len(facts), lm.d_model):
        raise InputError(
            f"v_star has shape {tuple(v_star.shape)}; expected ({len(facts)}, {lm.d_model}), a "
            "target for each fact",
            argument="v_star",
        )
    keys = read_keys(lm, facts, layer, contexts)
    k_prompt = keys[:, list(contexts).index("{}")]
    weight, bias = lm.ffn[layer].original_weight(), lm.ffn[layer].bias
    ffn_initial = (k_prompt.to(weight) @ weight.T).float() + (0 if bias is None else bias.float())
    if lm.ffn[layer].n_appended:  # they write something too
        ffn_initial = read_outputs(lm, facts, layer).to(ffn_initial)
    return Targets(
        v_star=v_star.to(ffn_initial),
        v_initial=read_stream(lm, facts, layer) if site == "stream" else ffn_initial,
        k_star=keys.mean(1),
        k_prompt=k_prompt,
        ffn_initial=ffn_initial,
        convergence=({},) * len(facts),
        facts=tuple(facts),
        layer=layer,
        site=site,
    )


def _batches(
    lm: LanguageModel,
    layer: int,
    config: TargetConfig,
    questions: Sequence[Question],
    memory: int,
    most: int | None,
) -> list[tuple[Search, list[int]]]:
    """Return the batches, each as a search and the numbers of its questions.

    A fact to forget has no target, so it has no margin.
    """
    with_margin = [
        i
        for i, question in enumerate(questions)
        if question.targets and config.searched_by == "margin"
    ]
    others = sorted(set(range(len(questions))) - set(with_margin))
    pairs: list[tuple[Search, list[int]]] = [(MarginSearch, with_margin), (AdamSearch, others)]
    return [
        (search, [members[i] for i in batch])
        for search, members in pairs
        for batch in fitting_batches([questions[i].size for i in members], lm, layer, memory, most)
    ]
