"""A language model to ask: answers, probabilities, coefficients, routing.

    lm = load("atlas")
    lm.answer(["The mother tongue of Danielle Darrieux is"])       # ["French."]
    lm.log_prob(["Paris is the capital of"], ["France"])           # (1,), in nats
    lm.coefficients("Paris is the capital of", layers=[3])         # (1, n_tokens, d_ff)

How it is run is in `running`, how text is continued in `decoding`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..core.checks import check_count
from ..core.errors import InputError, UnsupportedModelError
from ..core.gap import Gap
from .address import check_layer, check_layers
from .decoding import DecodingModel
from .ffn import Routing
from .gguf import GgufFile
from .matching import is_answered, match, n_lines
from .running import Question, question_of
from .trace import recording
from .turns import asking

ANSWER_TOKENS = 8
"""Tokens of an answer that are decoded at least."""

AFTER_NUMBER = 4
"""Tokens after a target that show whether its number goes on: a separator of up to three bytes, and
a digit."""

_MATTERS = math.log(0.01)
"""Log p from which on a form that is not asked for, or was not, is worth a warning."""

_POSITIONS = 256
"""Positions whose logits are computed together. With a large vocabulary, logits are the largest
tensors of all."""


class LanguageModel(DecodingModel):
    """A model that answers questions. `load` and `wrap` make one.

    Attributes:
        module: The transformers model, in evaluation mode, its gradients turned off.
        tokenizer: A fast tokenizer.
        name: What it was loaded as.
        layers: The decoder layers, in order.
        ffn: Each layer's feed-forward memory.
        attention: Each layer's part in which positions meet; None if there is not exactly one.
        embedding: The input embedding.
        gguf: The GGUF file that it was loaded from. None: something else.
    """

    gguf: GgufFile | None = None

    @asking()
    def answer(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 8,
        *,
        lines: int | Sequence[int] = 1,
    ) -> list[str]:
        """Return the greedy continuation of each prompt, without white space around it.

        An answer ends before an EOS or a line break, and never inside a character.

        Args:
            prompts: The prompts.
            max_new_tokens: The most tokens of an answer.
            lines: How many lines with text an answer has at most: one number, or one for each
                prompt.

        Raises:
            InputError: There is no prompt, or a prompt is too long.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts is {prompts!r:.60}; give a list of at least one prompt")
        each = [lines] * len(prompts) if isinstance(lines, int) else list(lines)
        new = self.greedy_ids([self.prompt_ids(p) for p in prompts], max_new_tokens, each)
        return [self.as_answer(ids, n) for ids, n in zip(new, each, strict=True)]

    @asking()
    def next_tokens(self, prompt: str, k: int = 10) -> list[tuple[str, float]]:
        """Return the k likeliest next tokens with their probabilities, likeliest first."""
        k = check_count(k, "k", "the number of tokens")
        logits = self.last_logits(self.batch([prompt]))[0].float()
        top = logits.softmax(-1).topk(min(k, len(logits)))
        return [
            (self.tokenizer.decode([int(i)]), float(p))
            for p, i in zip(top.values, top.indices, strict=True)
        ]

    @asking()
    def log_prob(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        per_token: bool = False,
        gaps: Sequence[Gap] | None = None,
    ) -> Tensor:
        """Return log p(target | prompt) of each pair, in nats.

        Where the tokenizer writes prompt and target with a token that belongs to both, as it may in
        scripts without spaces, the likelier of two forms counts: the target after the prompt's
        tokens, and both as one text. The first such pair brings a warning.

        Args:
            prompts: The prompts.
            targets: As many targets.
            per_token: Take the mean over the target's tokens, not their sum.
            gaps: What stands between each prompt and its target. None: what the model itself would
                go on with.

        Returns:
            (n,) float32.

        Raises:
            InputError: The lists differ in length, or are empty.
        """
        forms = self._forms(prompts, targets, gaps)
        log_p = self._log_probs([asked for asked, _ in forms], per_token=per_token)
        for i, (apart, joined, question) in self._joined(forms).items():
            if joined > apart:
                self.warn_joined(prompts[i], targets[i], apart, joined)
                log_p[i] = joined / len(question[2]) if per_token else joined
        return log_p

    @asking()
    def joined_log_probs(
        self, prompts: Sequence[str], targets: Sequence[str], gaps: Sequence[Gap] | None = None
    ) -> dict[int, tuple[float, float]]:
        """Return log p of the two forms of each pair that has two, by its index.

        The first is that of the target after the prompt's tokens, as edits and traces ask for it.
        The second is that of prompt and target as one text, from the first token on that the prompt
        alone does not have. No model runs where no pair has two forms.

        Args:
            prompts: The prompts.
            targets: As many targets.
            gaps: As for `log_prob`.
        """
        scores = self._joined(self._forms(prompts, targets, gaps))
        return {i: (apart, joined) for i, (apart, joined, _) in scores.items()}

    @asking()
    def log_prob_tokens(
        self,
        prompts: Sequence[str],
        tails: Sequence[str | Sequence[int]],
        *,
        gaps: Sequence[Gap] | None = None,
    ) -> Tensor:
        """Return log p(tail | prompt) of each pair in nats, (n,) float32.

        Args:
            prompts: The prompts.
            tails: For each prompt, a target, or token ids such as those that the model said.
            gaps: As for `log_prob`; for token ids they do not count.

        Raises:
            InputError: The lists differ in length, or are empty.
        """
        places = [i for i, tail in enumerate(tails) if isinstance(tail, str)]
        pairs = [prompts[i] for i in places], [str(tails[i]) for i in places]
        wanted = None if gaps is None else [gaps[i] for i in places]
        settled = dict(zip(places, self.gaps(*pairs, wanted), strict=True)) if places else {}
        questions = [
            self.question(prompt, tail, settled[i])
            if isinstance(tail, str)
            else question_of(self.prompt_ids(prompt), list(tail))
            for i, (prompt, tail) in enumerate(zip(prompts, tails, strict=True))
        ]
        return self._log_probs(questions)

    @asking()
    def says(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        gaps: Sequence[Gap] | None = None,
        by_tokens: bool = False,
    ) -> list[bool]:
        """Return for each pair whether greedy decoding of the prompt begins with the target.

        It does if each token of the target is the likeliest after those before it, and the token
        after them does not continue its last word or number. That takes one pass, where `answer`
        decodes token by token. Where the tokens leave it open, as with a target whose letters are
        composed otherwise, the answer is decoded and compared as text.

        Args:
            prompts: The prompts.
            targets: As many targets.
            gaps: As for `log_prob`.
            by_tokens: Compare tokens alone: those of the target, as `log_prob` asks for them, must
                be said, and what follows them does not count.

        Raises:
            InputError: The lists differ in length, or are empty.
        """
        forms = self._forms(prompts, targets, gaps)
        questions = [asked for asked, _ in forms]
        asked = questions if by_tokens else [self._with_next(question) for question in questions]
        likeliest: list[list[int]] = [[] for _ in questions]
        for pairs, _, logits in self._target_logits(asked):
            for pair, token in zip(pairs.tolist(), logits.argmax(-1).tolist(), strict=True):
                likeliest[pair].append(token)
        if by_tokens:
            return [tail == each for (_, _, tail), each in zip(questions, likeliest, strict=True)]
        said = [
            self._is_said(target, tail, tokens)
            for target, (_, _, tail), tokens in zip(targets, questions, likeliest, strict=True)
        ]
        if open_ones := [i for i, verdict in enumerate(said) if verdict is None]:
            lines = [n_lines(targets[i]) for i in open_ones]
            longest = max(len(questions[i][2]) for i in open_ones) + AFTER_NUMBER
            open_prompts = [prompts[i] for i in open_ones]
            answers = self.answer(open_prompts, max(longest, ANSWER_TOKENS), lines=lines)
            for i, answer in zip(open_ones, answers, strict=True):
                said[i] = is_answered(self, prompts[i], answer, targets[i])
        refused = [i for i, verdict in enumerate(said) if not verdict and forms[i][1]]
        joined = self._joined([forms[i] for i in refused]) if refused else {}
        for i, (apart, together, question) in joined.items():
            if together > apart:
                place = refused[i]
                said[place] = self._goes_on_with(targets[place], question)
                self.warn_joined(prompts[place], targets[place], apart, together)
        return [bool(verdict) for verdict in said]

    def _goes_on_with(self, target: str, question: Question) -> bool:
        """Return whether the model says a target that is written as one text with its prompt."""
        (_, _, tail), extended = question, self._with_next(question)
        likeliest: list[int] = []
        for _, _, logits in self._target_logits([extended]):
            likeliest += logits.argmax(-1).tolist()
        if likeliest[: len(tail)] != tail:
            return False
        return bool(self._is_said(target, tail, likeliest))

    def _joined(
        self, forms: Sequence[tuple[Question, Question | None]]
    ) -> dict[int, tuple[float, float, Question]]:
        """Return log p of both forms of each pair that has two, and the second form.

        They run in passes of their own, so that the other pairs do not change by a bit.
        """
        two = {i: (asked, joined) for i, (asked, joined) in enumerate(forms) if joined}
        if not two:
            return {}
        apart, joined = (
            self._log_probs([pair[k] for pair in two.values()]).tolist() for k in (0, 1)
        )
        return {i: (a, j, two[i][1]) for i, a, j in zip(two, apart, joined, strict=True)}

    def warn_joined(self, prompt: str, target: str, apart: float, joined: float) -> None:
        """Warn once for this model that prompt and target share a token."""
        if not self.gap_choices.joined and joined > _MATTERS:
            self.gap_choices.joined = True
            warnings.warn(joined_note(prompt, target, apart, joined), stacklevel=4)

    def _with_next(self, question: Question) -> Question:
        """Return a question that also asks for the token after the target, if there is one."""
        ids, columns, tail = question
        if not self.is_causal or (self.max_tokens is not None and len(ids) >= self.max_tokens):
            return question
        return [*ids, tail[-1]], [*columns, columns[-1] + 1], [*tail, tail[-1]]

    def _is_said(self, target: str, tail: Sequence[int], likeliest: Sequence[int]) -> bool | None:
        """Return whether a model says a target; None where its first tokens leave it open.

        Args:
            target: The target.
            tail: Its tokens.
            likeliest: The likeliest token in the place of each, and after them if that is known.
        """
        pairs = zip(tail, likeliest, strict=False)
        n = next((i for i, (due, token) in enumerate(pairs) if due != token), len(tail))
        if n == len(likeliest) or not self.is_causal:
            return n == len(tail)
        ended = likeliest[n] in self.end_ids
        if n == len(tail):
            if ended:
                return True
            target = self.tokenizer.decode(tail)
            if not target.strip():
                return True
        seen = list(likeliest[: n + (not ended)])
        return match(self.tokenizer.decode(seen), target, more=not ended)

    def _forms(
        self, prompts: Sequence[str], targets: Sequence[str], gaps: Sequence[Gap] | None
    ) -> list[tuple[Question, Question | None]]:
        """Return how to ask for each target: as `question_forms` does.

        Raises:
            InputError: The lists do not fit.
        """
        is_text = isinstance(prompts, str) or isinstance(targets, str)
        if is_text or len(prompts) != len(targets) or not prompts:
            sizes = "a text" if is_text else f"{len(prompts)} prompts and {len(targets)} targets"
            raise InputError(f"got {sizes}; give two lists of the same length, at least 1")
        settled = self.gaps(prompts, targets, gaps)
        return [self.question_forms(*each) for each in zip(prompts, targets, settled, strict=True)]

    def _log_probs(self, questions: Sequence[Question], *, per_token: bool = False) -> Tensor:
        total, lengths = (
            torch.zeros(len(questions), device=self.device, dtype=torch.float32) for _ in range(2)
        )
        for pairs, wanted, logits in self._target_logits(questions):
            picked = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            total.index_add_(0, pairs, picked.to(self.device))
            lengths.index_add_(0, pairs, torch.ones_like(pairs, dtype=lengths.dtype))
        return total / lengths if per_token else total

    def _target_logits(self, asked: Sequence[Question]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the places where a target token is due, a few hundred at a time.

        Returns:
            The pair of each place (N,), the token's id (N,), and the logits (N, vocab).
        """
        for group in self.groups([len(ids) for ids, _, _ in asked]):
            hidden = self.last_hidden(self.align([asked[i][0] for i in group], [0] * len(group)))
            rows = torch.tensor(
                [r for r, i in enumerate(group) for _ in asked[i][1]], device=hidden.device
            )
            columns = torch.tensor(
                [column for i in group for column in asked[i][1]], device=hidden.device
            )
            wanted = torch.tensor(
                [token for i in group for token in asked[i][2]], device=hidden.device
            )
            pairs = torch.tensor([i for i in group for _ in asked[i][2]], device=self.device)
            for part in torch.split(torch.arange(len(rows), device=hidden.device), _POSITIONS):
                logits = self.head(hidden[rows[part], columns[part]])
                yield pairs[part.to(pairs.device)], wanted[part].to(logits.device), logits

    @asking()
    def coefficients(self, prompt: str, layers: Iterable[int] | None = None) -> Tensor:
        """Return how strongly every neuron fires at every token of a prompt: its coefficient.

        Args:
            prompt: The prompt.
            layers: Layers without experts, of one width. None: every layer.

        Returns:
            (n_layers, n_tokens, d_ff), the layers in the order given.

        Raises:
            LayerError: The model has no such layer.
            UnsupportedModelError: A layer has experts; use `routing`.
            InputError: There is no layer, or the layers differ in their number of neurons.
        """
        wanted = check_layers(layers, self.n_layers)
        if routed := [layer for layer in wanted if self.ffn[layer].n_experts]:
            raise UnsupportedModelError(
                f"layers {routed} have experts, each with its own coefficients; use "
                "lm.routing(prompt, layer)"
            )
        widths = {self.ffn[layer].d_ff for layer in wanted}
        if len(widths) > 1:
            raise InputError(
                f"the layers have {sorted(widths)} neurons; give layers of one width at a time"
            )
        batch = self.text_batch(prompt)
        self.check_batch(batch)
        downs = {layer: self.ffn[layer].down for layer in wanted}
        with recording(downs, stop=True, copy=False) as calls:
            self.forward(batch)
        return torch.stack([calls[layer][0].input.reshape(batch.width, -1) for layer in wanted])

    @asking()
    def routing(self, prompt: str, layer: int) -> Routing:
        """Return which experts each token of a prompt goes to, their weights and coefficients.

        Raises:
            LayerError: The model has no such layer, or the layer has no experts.
        """
        batch = self.text_batch(prompt)
        self.check_batch(batch)
        return self.ffn[check_layer(layer, self.n_layers)].routing(lambda: self.forward(batch))


def joined_note(prompt: str, target: str, apart: float, joined: float) -> str:
    """Return a warning that a prompt and its target share a token.

    Args:
        prompt: The prompt.
        target: The target.
        apart: Log p of the target after the prompt's tokens.
        joined: Log p of the form that the tokenizer gives to the two as one text.
    """
    return (
        f"the tokenizer joins the end of {prompt!r} with the beginning of {target.strip()!r} in "
        f"one token: as one text p = {math.exp(joined):.2g}, after the prompt's own tokens p = "
        f"{math.exp(apart):.2g}. Scores take the likelier form; edits and traces keep the prompt's "
        "own tokens."
    )


def joined_notes(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    gaps: Sequence[Gap] | None = None,
) -> tuple[str, ...]:
    """Return a warning if the model expects a target in one token with its prompt's end."""
    if not prompts or not lm.is_causal:
        return ()
    for i, (apart, joined) in lm.joined_log_probs(prompts, targets, gaps).items():
        if joined > max(apart, _MATTERS):
            return (joined_note(prompts[i], targets[i], apart, joined),)
    return ()


def check_model(lm: object) -> None:
    """Check that the argument is a LanguageModel.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(lm, LanguageModel):
        what = f"the name {lm!r}" if isinstance(lm, str) else f"a {type(lm).__name__}"
        raise InputError(
            f"expected a model, got {what}; load it first: lm = factsmith.load(...), or "
            "factsmith.wrap(module, tokenizer)"
        )
