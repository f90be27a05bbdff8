"""v_star: what has to stand at the subject token for the model to assert a fact.

    targets = find_targets(lm, facts, layer, config, contexts)                     # output of the down-projection (ROME)
    targets = find_targets(lm, facts, layer, config, contexts, site="stream")      # output of the whole layer (MEMIT, AlphaEdit)
    targets.v_star, targets.k_star, targets.convergence

All facts × contexts, and one row a fact that guards what the subject is, stand in one batch with the subject's last token in one
column. Left of it nothing changes, so those columns live in the key/value cache; below the edited layer nothing changes either. A
gradient step therefore runs the layers above, on the columns from the subject on, and reads logits where a target token is due.
Facts do not see one another: each has its own loss, clamp and early stop, and leaves the batch when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_count, check_items, check_number, check_text, whole_number
from ..errors import InputError, LayerError, NumericsError, UnsupportedModelError
from ..fact import Fact
from ..model.load import LanguageModel
from ..model.replay import Replay, record
from ..model.tokens import align, encode, subject_span, target_ids
from ..model.trace import recording, replacing

Site = Literal["ffn", "stream"]
"""Where δ is added: to the output of the down-projection, or to that of the layer."""

_PRE_NORM_STEPS = 60
"""Steps of the search behind a norm: it is one small convex-looking problem a fact, and stops by itself when it is solved."""

_GUARD = "{} is a"
"""The prompt whose next-token distribution at the subject token must stay: what the subject is (ROME, equation 4, second term)."""


@dataclass(frozen=True)
class TargetConfig:
    """How v_star is searched; every editor's configuration builds on it."""

    _: KW_ONLY
    steps: int = 20
    """Evaluations of the loss, so at most steps − 1 updates: as in the authors' code, which made the tables."""
    lr: float = 0.5
    """Adam's learning rate, about the change of each coordinate in an update; with "auto" in units of the stream's root mean square."""
    kl_factor: float = 0.0625
    """Weight of the KL term that keeps the subject's essence; the authors' value for every model."""
    weight_decay: float = 0.5
    """Among targets that work, prefer the near one. "paper": weighs ‖δ‖ / ‖v₀‖², the authors' value for GPT-2 and GPT-J; "auto": ‖δ‖ at
    the clamp costs a tenth of it, as the paper's term does on GPT-2 XL, too little to keep a target from being reached."""
    clamp: float = 4.0
    """Largest ‖δ‖, in units of ‖v₀‖ ("paper"; the authors' value, 3 for GPT-2 medium) or of half the stream's norm ("auto": a layer may
    write little of its own today, but a target must be able to outweigh the stream)."""
    stop_loss: float = 0.05
    """Stop before the update once the loss ("auto": its first term) is below: the target then has 95 % or more, and δ is long enough."""
    scale: Literal["paper", "auto"] = "paper"
    """"paper": the reference formulas to the letter. "auto": step, decay and clamp relative to the model's own norms."""

    def __post_init__(self) -> None:
        steps = check_count(self.steps, "steps", "the number of loss evaluations, a whole number of at least 1")
        object.__setattr__(self, "steps", steps)
        for name in ("lr", "kl_factor", "weight_decay", "clamp", "stop_loss"):
            positive = name in ("lr", "clamp")
            expected = f"a finite number {'above' if positive else 'of at least'} 0"
            value = check_number(getattr(self, name), name, expected)
            if value < 0 or (positive and value == 0):
                raise InputError(f"{name} is {value!r}; expected {expected}")
            object.__setattr__(self, name, value)
        if self.scale not in ("paper", "auto"):
            raise InputError(f'scale is "paper" or "auto"; got {self.scale!r}')


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Targets:
    """What was found for n facts at one layer; float32, on the model's device.

    v_star       (n, d_model) wanted output at the subject token: of the down-projection, bias included, or of the layer ("stream")
    v_initial    (n, d_model) what is put out there today, on the bare prompt
    k_star       (n, d_ff) the down-projection's input, averaged over the contexts
    k_prompt     (n, d_ff) its input on the bare prompt
    ffn_initial  (n, d_model) what the down-projection puts out on the bare prompt: v_initial, unless that is the layer's
    convergence  for each fact {steps, loss, nll, kl, norm (‖δ‖), limit (the clamp), stopped: "loss" or "steps"}
    facts        the facts, in their order
    layer, site  where: at a layer's "ffn", or in the "stream" after it
    """

    v_star: Tensor
    v_initial: Tensor
    k_star: Tensor
    k_prompt: Tensor
    ffn_initial: Tensor
    convergence: tuple[dict[str, Any], ...]
    facts: tuple[Fact, ...]
    layer: int
    site: Site

    def __repr__(self) -> str:
        steps = [int(found["steps"]) for found in self.convergence]
        return f"Targets({len(self.facts)} at layer {self.layer} ({self.site}), {min(steps, default=0)} to {max(steps, default=0)} steps)"


_TENSORS = ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial")


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
    """Search v_star for every fact by gradient descent on what one layer puts out. ROME, equation 4; MEMIT, equation 16.

        L(δ) = meanᵪ −log p(target | context + prompt) / |target| + kl_factor · KL(p_δ ‖ p₀ | "{} is a") + weight_decay · ‖δ‖ / ‖v₀‖²

    contexts  templates with one `{}` for the prompt; "{}" itself must be among them (it gives v₀)
    site      "ffn": δ is added to the down-projection's output (ROME). "stream": to the layer's output, where the edits of this layer and
              those below it arrive together (MEMIT)
    memory    bytes that the activations of one batch may take; more facts than fit are done one batch after another. None: half of what is
              free on a GPU, else 1 GiB
    progress  called with the number of facts done, after every batch

    The model is untouched. Raises SubjectError when a prompt names its subject twice, LayerError, InputError for contexts without "{}",
    UnsupportedModelError for a mixture-of-experts layer, NumericsError when the loss is not finite.
    """
    layer, contexts = check_layer(lm, layer), check_contexts(contexts)
    questions = [_tokenize(lm, fact, contexts) for fact in facts]
    found: dict[int, tuple[Targets, int]] = {}
    for group in _batches([question.size for question in questions], lm, layer, _memory(lm) if memory is None else memory):
        part = _search([questions[i] for i in group], lm, layer, config, contexts.index("{}"), site)
        found.update((i, (part, row)) for row, i in enumerate(group))
        if progress is not None:
            progress(len(found))
    each = [found[i] for i in range(len(facts))]
    return Targets(
        **{name: torch.stack([getattr(part, name)[row] for part, row in each]) for name in _TENSORS},
        convergence=tuple(part.convergence[row] for part, row in each),
        facts=tuple(facts),
        layer=layer,
        site=site,
    )


@torch.no_grad()
def known_targets(
    lm: LanguageModel, facts: Sequence[Fact], layer: int, contexts: Sequence[str], v_star: Tensor, *, site: Site = "ffn"
) -> Targets:
    """What `find_targets` gives for targets v_star (n, d_model) that were found before: keys and outputs are read, nothing is searched.

    The model need not be the one that they were found on: keys and v_initial are those of the model as it is. Errors as `find_targets`,
    InputError too for another shape.
    """
    check_layer(lm, layer)
    if v_star.shape != (len(facts), lm.d_model):
        raise InputError(f"v_star has shape {tuple(v_star.shape)}; expected ({len(facts)}, {lm.d_model}): a target for each fact")
    keys = read_keys(lm, facts, layer, contexts)
    k_prompt = keys[:, list(contexts).index("{}")]
    weight, bias = lm.ffn[layer].weight(), lm.ffn[layer].bias
    ffn_initial = (k_prompt.to(weight) @ weight.T).float() + (0 if bias is None else bias.float())
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


@torch.no_grad()
def read_keys(lm: LanguageModel, facts: Sequence[Fact], layer: int, contexts: Sequence[str]) -> Tensor:
    """The down-projection's input at each fact's subject token in each context: (n, n_contexts, d_ff) float32.

    A key does not see what follows the subject, so the rest of the prompt is not run, nor are the layers above; beginnings that prompts
    have in common are run once.
    """
    rows = [_at_subject(lm, context.replace("{}", fact.prompt), fact.subject) for fact in facts for context in contexts]
    keys = _at_last(lm, rows, layer, lambda replay: _down(replay, layer)[0])
    return keys.view(len(facts), len(contexts), -1)


@torch.no_grad()
def read_stream(lm: LanguageModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """The layer's output at each fact's subject token, on the bare prompt: (n, d_model) float32."""
    rows = [_at_subject(lm, fact.prompt, fact.subject) for fact in facts]
    return _at_last(lm, rows, layer, lambda replay: replay.hidden[layer + 1][:, 0].float())


def to_down(lm: LanguageModel, facts: Sequence[Fact], layer: int, change: Tensor) -> Tensor:
    """What to add to a down-projection's output at the subject token so that the layer's output changes by `change` (n, d_model).

    The same, in most families. Where a norm or a multiplier stands between (Gemma 2, Granite), it is searched by least squares through the
    rest of the layer; a norm fixes the length of what the FFN adds to the stream, so there the result is the nearest that can be had.
    """
    if lm.ffn[layer].adds_directly:
        return change
    sequences = [_at_subject(lm, fact.prompt, fact.subject) for fact in facts]
    found: dict[int, Tensor] = {}
    for group in lm.groups([len(ids) for ids in sequences]):
        batch = align(lm, [sequences[i] for i in group], [len(sequences[i]) - 1 for i in group])
        replay = record(lm, batch, start=batch.pivot, until=layer + 1, top=layer + 1)
        wanted = replay.hidden[layer + 1][:, 0].float() + change[group].to(replay.hidden[layer + 1].device, torch.float32)
        added = change[group].clone().to(wanted).requires_grad_()
        search = torch.optim.LBFGS([added], max_iter=_PRE_NORM_STEPS, line_search_fn="strong_wolfe")

        def distance(
            replay: Replay = replay, added: Tensor = added, wanted: Tensor = wanted, search: torch.optim.Optimizer = search
        ) -> Tensor:
            search.zero_grad()
            error = (_above(replay, layer, added, "ffn", until=layer + 1)[:, 0].float() - wanted).square().sum()
            error.backward()  # type: ignore[no-untyped-call]
            return error

        with torch.enable_grad():
            search.step(distance)  # type: ignore[no-untyped-call]
        for i, row in zip(group, added.detach(), strict=True):
            found[i] = row
    return torch.stack([found[i] for i in range(len(facts))])


def _at_subject(lm: LanguageModel, template: str, subject: str) -> list[int]:
    """The prompt's tokens up to the subject's last."""
    ids, _, pivot = _pivot(lm, template, subject)
    return ids[: pivot + 1]


def _at_last(lm: LanguageModel, rows: Sequence[list[int]], layer: int, read: Callable[[Replay], Tensor]) -> Tensor:
    """What `read` finds in a pass up to `layer` whose one live column is the last token of each row: (rows, width) float32."""
    found: dict[int, Tensor] = {}
    for group in lm.groups([len(ids) for ids in rows]):
        batch = align(lm, [rows[i] for i in group], [len(rows[i]) - 1 for i in group])
        states = read(record(lm, batch, start=batch.pivot, until=layer + 1, top=layer + 1))
        found.update(zip(group, states, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


@torch.no_grad()
def _down(replay: Replay, layer: int) -> tuple[Tensor, Tensor]:
    """Input (R, d_ff) and output (R, d_model) of a down-projection at the first live column, float32."""
    with recording({"down": replay.lm.ffn[layer].down}, stop=True) as calls:
        replay.layer(layer, replay.hidden[layer])
    (call,) = calls["down"]
    # Some families flatten rows and columns before their FFN, (B · T, d_ff); a model without a cache runs all columns again.
    put_in, put_out = (x.reshape(replay.batch.size, -1, x.shape[-1])[:, -replay.n_live].float() for x in (call.input, call.output))
    return put_in, put_out


def check_contexts(contexts: Sequence[str]) -> list[str]:
    """The templates as a list; raises InputError unless each is a text with one `{}`, and the bare "{}" is among them."""
    found = check_items(contexts, "contexts", 'templates with {} for the prompt, the bare "{}" among them')
    for context in found:
        if check_text(context, "a context").count("{}") != 1:
            raise InputError(f"a context is a template with exactly one {{}}, where the prompt goes; got {context!r}")
    if "{}" not in found:
        raise InputError('the contexts must include the bare prompt, "{}"; add it')
    return found


def check_layer(lm: LanguageModel, layer: int | None) -> int:
    """The layer itself; raises LayerError when the model does not have it, UnsupportedModelError when it is not a single dense FFN."""
    number = whole_number(layer)
    if number is None or not 0 <= number < lm.n_layers:
        raise LayerError(f"layer {layer!r} does not exist; the model has layers 0 to {lm.n_layers - 1}")
    layer = number
    if lm.ffn[layer].n_experts:
        dense = [ffn.layer for ffn in lm.ffn if not ffn.n_experts]
        raise UnsupportedModelError(
            f"layer {layer} is a mixture of {lm.ffn[layer].n_experts} experts, and a fact is written into one down-projection that every "
            f"token uses: {f'choose among layers {dense}' if dense else f'no layer of {lm.name} has one; take a model without experts'}"
        )
    return layer


@dataclass(frozen=True)
class _Question:
    """One fact as token sequences: one for each context (prompt + target without its last token), and the guard when it is none of them."""

    fact: Fact
    sequences: list[list[int]]
    pivots: list[int]
    guard: int  # the sequence that guards what the subject is; a context's own, when that begins with the subject as the guard does
    reads: list[list[int]]  # for each context, the columns right of the pivot whose next token is a target token
    targets: list[list[int]]  # for each context, the target's tokens; none for a fact that is to be forgotten
    without: list[list[int]]  # for each context of such a fact, the prompt without the subject's tokens; else nothing

    @property
    def size(self) -> _Size:
        """Of a batch of it alone."""
        width = max(len(ids) - pivot for ids, pivot in zip(self.sequences, self.pivots, strict=True))
        return _Size(len(self.sequences), width, max(self.pivots) + width, 1 + sum(map(len, self.reads)))


@dataclass(frozen=True)
class _Asked:
    """Where the questions of a batch are answered: flat over facts, contexts and target tokens."""

    owners: Tensor  # (R,) which fact each row of the batch belongs to
    contexts: Tensor  # (n, contexts) the row of each fact in each context
    guards: Tensor  # (n,) each fact's guard row
    rows: Tensor  # (N,) row of the batch
    columns: Tensor  # (N,) live column
    targets: Tensor  # (N,) token id due there; meaningless where a distribution is due
    shares: Tensor  # (N,) its weight in its fact's mean
    blank: Tensor  # (M,) which of the N are due a distribution
    without: Tensor  # (M, vocab) its log-probabilities

    @classmethod
    def of(cls, questions: Sequence[_Question], without: Sequence[Tensor | None], device: torch.device) -> _Asked:
        """`without`: for each fact to be forgotten what the model says without the subject, (contexts, vocab) log-probabilities."""
        firsts = [0, *accumulate(len(q.sequences) for q in questions)]
        flat = [
            (first + c, column, token, 1 / (len(q.reads) * len(columns)), q.without != [])
            for first, q in zip(firsts, questions, strict=False)
            for c, columns in enumerate(q.reads)
            for column, token in zip(columns, q.targets[c] if q.targets else [0], strict=True)
        ]
        rows, columns, targets, shares, blank = (torch.tensor(x, device=device) for x in zip(*flat, strict=True))
        first = torch.tensor(firsts[:-1], device=device)
        held = [log_p for log_p in without if log_p is not None]
        return cls(
            owners=torch.repeat_interleave(torch.tensor([len(q.sequences) for q in questions], device=device)),
            contexts=first[:, None] + torch.arange(len(questions[0].reads), device=device),
            guards=first + torch.tensor([q.guard for q in questions], device=device),
            rows=rows,
            columns=columns,
            targets=targets,
            shares=shares,
            blank=blank.nonzero()[:, 0],
            without=torch.cat(held) if held else torch.empty(0, 0, device=device),
        )


def _tokenize(lm: LanguageModel, fact: Fact, contexts: Sequence[str]) -> _Question:
    subject_span(lm, fact.text, fact.subject)  # refuses a prompt that names its subject twice
    bare = None if fact.target is None else target_ids(lm.tokenizer, fact.text, fact.target)
    sequences: list[list[int]] = []
    pivots: list[int] = []
    reads: list[list[int]] = []
    targets: list[list[int]] = []
    without: list[list[int]] = []
    for context in contexts:
        ids, first, pivot = _pivot(lm, context.replace("{}", fact.prompt), fact.subject)
        target = bare
        if target is not None and not context.endswith("{}"):  # a chat template: the answer begins a line of its own
            target = target_ids(lm.tokenizer, context.replace("{}", fact.text), str(fact.target))
        sequences.append(ids + (target or [0])[:-1])
        pivots.append(pivot)
        reads.append([len(ids) - 1 - pivot + i for i in range(len(target or [0]))])
        if target is not None:
            targets.append(target)
        else:
            without.append(ids[:first] + ids[pivot + 1 :])
            if pivot == len(ids) - 1 or not without[-1]:
                raise InputError(
                    f"{fact.text!r} ends with its subject, so nothing can be said without it; to forget a fact, give a prompt that goes on"
                )
    ids, _, pivot = _pivot(lm, _GUARD, fact.subject)
    ids = ids[: pivot + 1]  # read at the subject itself: what follows does not matter
    guard = next((i for i, sequence in enumerate(sequences) if sequence[: pivots[i] + 1] == ids), len(sequences))
    if guard == len(sequences):
        sequences.append(ids)
        pivots.append(pivot)
    return _Question(fact, sequences, pivots, guard, reads, targets, without)


@torch.no_grad()
def _said_without(lm: LanguageModel, question: _Question) -> Tensor | None:
    """What the model goes on with when the subject's tokens are left out: (contexts, vocab) log-probabilities; None without such a wish."""
    if not question.without:
        return None
    hidden = [lm.last_hidden(align(lm, [ids], [len(ids) - 1]))[0, -1] for ids in question.without]
    return lm.head(torch.stack(hidden)).float().log_softmax(-1)


def _pivot(lm: LanguageModel, template: str, subject: str) -> tuple[list[int], int, int]:
    """Token ids of the filled-in template, and the columns of the subject's first and last token.

    By the place of the slot, not by a search: a context may happen to name the subject too.
    """
    text = template.replace("{}", subject)
    start = template.index("{}") + len(subject) - len(subject.lstrip())
    stop = start + len(subject.strip())
    ids, offsets = encode(lm.tokenizer, text)
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and text[a:b].strip()]
    return ids, inside[0], inside[-1]


class _Size(NamedTuple):
    """What a batch would hold."""

    rows: int = 0
    width: int = 0  # columns from the pivot on
    length: int = 0  # columns in all
    answers: int = 0  # places where logits are read

    def __or__(self, other: _Size) -> _Size:
        """Of both in one batch."""
        width, length = max(self.width, other.width), max(self.length, other.length)
        return _Size(self.rows + other.rows, width, length, self.answers + other.answers)


def _batches(sizes: Sequence[_Size], lm: LanguageModel, layer: int, memory: int) -> list[list[int]]:
    """The questions in batches that fit into `memory` bytes (one always does), so that padding and passes together cost least.

    Neighbours in order of width share a batch; which of them is found by dynamic programming over the sorted list.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i].width)
    cost = [0.0]  # of the first questions in batches
    first = [0]  # where the last of these batches begins
    for stop in range(1, len(order) + 1):
        best, size = (float("inf"), 0), _Size()
        for start in range(stop - 1, -1, -1):
            size = size | sizes[order[start]]
            if _bytes(size, lm, layer) > memory and start < stop - 1:
                break
            best = min(best, (cost[start] + size.rows * size.width + _PASS[lm.device.type == "cpu"], start))
        cost.append(best[0])
        first.append(best[1])
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[first[stop] : stop])
        stop = first[stop]
    return batches[::-1]


_PASS = (512, 20)
"""What another batch costs on a GPU, or a processor's core, in live tokens: weights are read again and kernels started again. (On a core,
products of 14 rows reach 45 % of the rate of large ones, of 44 rows 70 %.)"""


def _bytes(size: _Size, lm: LanguageModel, layer: int) -> int:
    """What the search for a batch takes at its peak, model apart; an estimate that errs on the large side."""
    token = _STREAMS * lm.d_model + _COEFFICIENTS * lm.ffn[layer].d_ff
    # Keys and values of the prefix, joined to the live ones, are kept by autograd in every layer.
    graph = (lm.n_layers - layer) * (size.width * token + 2 * size.length * lm.d_model)
    kept = (2 * lm.n_layers * size.length + (layer + 2) * size.width) * lm.d_model
    vocabulary = next(lm.embedding.parameters()).shape[0]  # often more than the tokenizer's
    return size.rows * (graph + kept) * lm.dtype.itemsize + size.answers * vocabulary * _LOGITS


_STREAMS = 14
"""Vectors of the stream's size that autograd keeps for a token in a layer: norms, queries, keys, values, sums."""
_COEFFICIENTS = 8
"""Vectors of the FFN's width: an activation function written out (GPT-2's) keeps every step of its own."""
_LOGITS = 16
"""Bytes for a token of the vocabulary where an answer is read: the logits, their logarithmic softmax, and the gradients of both."""


def _memory(lm: LanguageModel) -> int:
    """Half of what is free on a GPU; 1 GiB elsewhere."""
    if lm.device.type == "cuda":
        return int(torch.cuda.mem_get_info(lm.device)[0]) // 2
    return 2**30


class _Adam:
    """Adam with a row for each fact: its own learning rate, and it may leave. Kingma and Ba, algorithm 1, with torch's defaults."""

    def __init__(self, rate: Tensor, like: Tensor) -> None:
        self.rate, self.mean, self.square, self.steps = rate, torch.zeros_like(like), torch.zeros_like(like), 0

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.rate, self.mean, self.square = self.rate[rows], self.mean[rows], self.square[rows]

    def update(self, gradient: Tensor) -> Tensor:
        """What to add to the parameters (n, d)."""
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        spread = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        return self.mean / spread * (-self.rate / (1 - 0.9**self.steps))[:, None]


def _search(questions: Sequence[_Question], lm: LanguageModel, layer: int, config: TargetConfig, bare: int, site: Site) -> Targets:
    """`find_targets` for one batch; `bare` is the index of the context "{}"."""
    batch = align(lm, [s for q in questions for s in q.sequences], [p for q in questions for p in q.pivots])
    replay = record(lm, batch, start=batch.pivot, until=layer + 1)
    without = [_said_without(lm, question) for question in questions]
    asked = _Asked.of(questions, without, batch.input_ids.device)
    keys, outputs = _down(replay, layer)
    keys, ffn_initial = keys[asked.contexts.to(keys.device)], outputs[asked.contexts[:, bare].to(outputs.device)]
    stream = replay.hidden[layer + 1][:, 0]
    stream = stream[asked.contexts[:, bare].to(stream.device)].float()  # (n, d_model)
    v_initial = stream if site == "stream" else ffn_initial
    lr, decay, limit = _scales(config, v_initial, stream)
    v_star = v_initial.clone()
    convergence: list[dict[str, Any]] = [{} for _ in questions]

    delta = torch.zeros_like(v_initial)  # float32, whatever the model computes in
    adam = _Adam(lr, delta)
    active = torch.arange(len(questions), device=delta.device)
    guarded: Tensor | None = None  # (n, vocab) log-probabilities under δ = 0
    for step in range(1, config.steps + 1):
        delta.requires_grad_()
        with torch.set_grad_enabled(step < config.steps):  # nothing follows the last evaluation
            terms, log_p = _loss(replay, layer, delta, site, asked, guarded, config, decay[active])
        loss, nll, kl, norm = terms
        if guarded is None:
            guarded = log_p.detach().clone()
        del log_p  # it holds on to the logits of the whole batch
        if not torch.isfinite(loss).all():
            names = [questions[i].fact.subject for i, x in zip(active.tolist(), loss, strict=True) if not torch.isfinite(x)]
            raise NumericsError(f"the loss of {names} is not finite at step {step}; lower lr, or check the model's weights for NaN")
        watched = loss if config.scale == "paper" else nll
        reached = watched < config.stop_loss
        done = reached | (step == config.steps)
        if done.any():
            v_star[active[done]] += delta[done].detach()
            rows = torch.stack([loss, nll, kl, norm, limit[active]], dim=1)[done].tolist()
            for i, good, row in zip(active[done].tolist(), reached[done].tolist(), rows, strict=True):
                numbers = dict(zip(("loss", "nll", "kl", "norm", "limit"), row, strict=True))
                convergence[i] = {"steps": step, **numbers, "stopped": "loss" if good else "steps"}
        if done.all():
            break
        (gradient,) = torch.autograd.grad(loss[~done].sum(), delta)
        del terms, loss, nll, kl, norm, watched
        delta = delta.detach()
        if done.any():
            stay = (~done).nonzero()[:, 0]
            replay = replay.keep(torch.isin(asked.owners, stay.to(asked.owners.device)).nonzero()[:, 0])
            adam.keep(stay)
            active, delta, gradient, guarded = active[stay], delta[stay], gradient[stay], guarded[stay.to(guarded.device)]
            asked = _Asked.of([questions[i] for i in active.tolist()], [without[i] for i in active.tolist()], batch.input_ids.device)
        delta = delta + adam.update(gradient)
        delta = delta * (limit[active] / delta.norm(dim=-1)).clamp(max=1)[:, None]
    return Targets(
        v_star=v_star,
        v_initial=v_initial,
        k_star=keys.mean(1),
        k_prompt=keys[:, bare],
        ffn_initial=ffn_initial,
        convergence=tuple(convergence),
        facts=tuple(question.fact for question in questions),
        layer=layer,
        site=site,
    )


def _loss(
    replay: Replay,
    layer: int,
    delta: Tensor,
    site: Site,
    asked: _Asked,
    guarded: Tensor | None,
    config: TargetConfig,
    decay: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Each fact's loss and its terms, NLL, KL and ‖δ‖, each (n,), and the guards' log-probabilities (n, vocab).

    guarded: those under δ = 0; None when δ is.
    """
    hidden = _above(replay, layer, delta[asked.owners.to(delta.device)], site)  # (R, S, d_model)
    nll, log_p = _read(replay, hidden, asked)
    kl = F.kl_div(log_p.detach() if guarded is None else guarded, log_p, log_target=True, reduction="none").sum(-1)  # KL(p_δ ‖ p₀)
    nll, kl, norm = nll.to(delta.device), kl.to(delta.device), delta.norm(dim=-1)
    return (nll + config.kl_factor * kl + decay * norm, nll, kl, norm), log_p


def _above(replay: Replay, layer: int, delta: Tensor, site: Site, until: int | None = None) -> Tensor:
    """The output (R, S, d_model) of layer `until` - 1 (None: the last) when delta (R, d_model) is added at the subject token (column 0)."""

    def add(states: Tensor) -> Tensor:
        rows = states.reshape(len(delta), -1, states.shape[-1])
        column = rows.shape[1] - replay.n_live  # a model without a usable cache runs all columns again
        at_subject = rows[:, column : column + 1] + delta[:, None].to(rows)
        return torch.cat([rows[:, :column], at_subject, rows[:, column + 1 :]], dim=1).view_as(states)

    ffn = replay.lm.ffn[layer]
    if site == "stream" or ffn.adds_directly:
        hidden = add(replay.hidden[layer + 1])
    else:  # something (a norm, a multiplier) stands between the FFN and the stream: run it
        with replacing({ffn.down: add}):
            hidden = replay.layer(layer, replay.hidden[layer])
    return hidden if until == layer + 1 else replay.resume(layer + 1, hidden, until=until)


def _read(replay: Replay, hidden: Tensor, asked: _Asked) -> tuple[Tensor, Tensor]:
    """Mean NLL of the target tokens (n,) (KL, of a fact to be forgotten) and log-probabilities at the guard (n, vocab).

    hidden: last-layer states (R, S, d_model).
    """
    rows, columns, guards = (x.to(hidden.device) for x in (asked.rows, asked.columns, asked.guards))
    states = torch.cat([hidden[rows, columns], hidden[guards, 0]])  # the head runs on these and nothing else
    log_p = replay.logits(states).float().log_softmax(-1)
    tokens = len(rows)
    targets, blank, shares = (x.to(log_p.device) for x in (asked.targets, asked.blank, asked.shares))
    nll = -log_p[:tokens].gather(1, targets[:, None])[:, 0]
    if len(blank):  # KL(without the subject ‖ now): zero when the subject makes no difference any more
        kl = F.kl_div(log_p[blank], asked.without.to(log_p), log_target=True, reduction="none").sum(-1)
        nll = nll.index_copy(0, blank, kl)
    nll = nll * shares
    facts = asked.owners[asked.rows].to(nll.device)
    return torch.zeros(len(asked.guards), device=nll.device).index_add(0, facts, nll), log_p[tokens:]


def _scales(config: TargetConfig, v_initial: Tensor, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Learning rate, factor of ‖δ‖ in the loss, and largest ‖δ‖, each (n,), from v₀ and the layer's output (n, d_model)."""
    if config.scale == "paper":
        norm = v_initial.norm(dim=-1)
        return torch.full_like(norm, config.lr), config.weight_decay / norm**2, config.clamp * norm
    norm = stream.norm(dim=-1)  # of the layer's output at the subject: what δ has to turn round
    limit = config.clamp * norm / 2
    return config.lr * norm / stream.shape[-1] ** 0.5, config.weight_decay / (10 * limit), limit
