"""The fingerprint of a model: a digest of what decides its answers.

    identity = identify(module, tokenizer)     # a pass over all weights
    identity.fingerprint                       # sha256 (hex)
    identity.is_also(older)                    # whether an earlier version called it `older`
    model_state(module, tokenizer)             # cheap; differs after any of it has changed
    weight_digests(module)["wte.weight"]       # sha256 of one tensor

The weights count, the settings that change a number (`settings`), the tokenizer, and the tokens
that end an answer. What a config notes, which outputs it returns, and how the tokenizer pads at the
moment do not count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..core.identity import note_earlier
from .absent import place_of, whole
from .settings import answering_settings

_FORMAT = "factsmith model 2"


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity:
    """What a model is known as, with these weights.

    Attributes:
        fingerprint: sha256 (hex) of what decides the answers.
    """

    fingerprint: str
    _weights: Any  # the sha256 object that has seen the weights
    _config: Any
    _tokenizer: str
    _steps: list[tuple[object, Any]]  # after each weight, its state and the sha256 object
    _others: set[str] = field(default_factory=set)

    def is_also(self, fingerprint: str) -> bool:
        """Return whether a fingerprint names this model, also if an earlier version computed it.

        Earlier versions hashed the whole config, so the version of transformers counted. Entries
        that a later one has added are left out in turn.
        """
        if fingerprint == self.fingerprint:
            return True
        if len(fingerprint) != len(self.fingerprint) or fingerprint in self._others:
            return False
        for config in _earlier_configs(self._config):
            for tokenizer in _earlier_tokenizers(self._tokenizer):
                if _earlier_digest(self._weights, config, tokenizer) == fingerprint:
                    note_earlier(fingerprint, self.fingerprint)
                    return True
        self._others.add(fingerprint)
        return False


def identify(module: Any, tokenizer: Any, earlier: Identity | None = None) -> Identity:
    """Return what a model is known as. It takes a pass over all weights.

    A weight counts with its name, dtype, shape and bytes.

    Args:
        module: The model.
        tokenizer: Its tokenizer.
        earlier: What it was known as before. The pass begins at the first weight whose state has
            changed since. None: it reads every weight.
    """
    weights = hashlib.sha256()
    steps: list[tuple[object, Any]] = []
    before = [] if earlier is None else earlier._steps
    for i, (name, tensor) in enumerate(_weights(module)):
        state = (tensor.dtype, tuple(tensor.shape), _tensor_state(name, tensor))
        if i < len(before) and before[i][0] == state:
            steps.append(before[i])
            weights = before[i][1].copy()
            continue
        before = []  # what comes after a change is hashed again
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(_bytes(tensor))
        steps.append((state, weights.copy()))
    text = tokenizer.backend_tokenizer.to_str()
    parts = {
        "weights": weights.hexdigest(),
        "settings": answering_settings(module.config, module),
        "tokenizer": _tokenizer_digest(text),
        "reading": _reading(module, tokenizer),
    }
    record = json.dumps([_FORMAT, parts], sort_keys=True, ensure_ascii=True)
    fingerprint = hashlib.sha256(record.encode()).hexdigest()
    config = module.config.to_dict()
    note_earlier(_earlier_digest(weights, config, text), fingerprint)
    return Identity(
        fingerprint=fingerprint,
        _weights=weights,
        _config=module.config,
        _tokenizer=text,
        _steps=steps,
    )


def weight_digests(module: nn.Module) -> dict[str, str]:
    """Return the sha256 (hex) of the bytes of every tensor of a model, by name."""
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in _weights(module)}


def _weights(module: Any) -> list[tuple[str, Tensor]]:
    return sorted(module.state_dict(keep_vars=True).items())


def _bytes(tensor: Tensor) -> Any:
    return whole(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def model_state(module: Any, tokenizer: Any) -> object:
    """Return something small that differs after a weight, a setting or the tokenizer has changed.

    A changed weight shows in the tensor's identity or in PyTorch's version counter. A few sampled
    entries of every tensor show writes that go round the counter.
    """
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    settings = json.dumps(module.config.to_dict(), sort_keys=True, default=str)
    return (
        _weight_state(module),
        settings,
        len(tokenizer),
        tuple(map(repr, parts)),
        repr(_reading(module, tokenizer)),
    )


def _weight_state(module: nn.Module) -> object:
    return tuple(
        _tensor_state(name, tensor)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    )


def _tensor_state(name: str, tensor: Tensor) -> tuple[object, ...]:
    if (place := place_of(tensor)) is not None:
        return name, place.state
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // 8)][:9]
    # An inference tensor has no version counter.
    version = 0 if tensor.is_inference() else tensor._version
    return name, tensor.data_ptr(), version, tuple(sample.float().tolist())


def end_ids(module: Any, tokenizer: Any) -> set[int]:
    """Return ids that end a text, from the tokenizer and from the model's generation settings."""
    ends: set[int] = set()
    generation = getattr(module, "generation_config", None)
    for value in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        ends.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return ends


def _reading(module: Any, tokenizer: Any) -> dict[str, Any]:
    """Return how text becomes ids and ids become answers, apart from the tokenizer's own file."""
    words = module.get_input_embeddings()
    return {
        "ends": sorted(end_ids(module, tokenizer)),
        "left out": sorted({tokenizer.bos_token_id, tokenizer.unk_token_id} - {None}),
        "mask": tokenizer.mask_token_id,
        "tidies": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        # Embeddings of positions that leave out a row count the positions from it. What contains
        # the embeddings of words names the row of the padding token, which decides nothing.
        "first positions": sorted(
            (name, part.padding_idx)
            for name, part in module.named_modules()
            if getattr(part, "padding_idx", None) is not None
            and all(inner is not words for inner in part.modules())
        ),
    }


@lru_cache(maxsize=4)
def _tokenizer_digest(text: str) -> str:
    """Return the sha256 (hex) of a tokenizer's file, without its momentary padding and cutting."""
    parts = {
        name: part
        for name, part in json.loads(text).items()
        if name not in ("version", "padding", "truncation")
    }
    if isinstance(merges := (parts.get("model") or {}).get("merges"), list):
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
        parts["model"] = {**parts["model"], "merges": pairs}
    return hashlib.sha256(json.dumps(_stated(parts), sort_keys=True).encode()).hexdigest()


def _stated(value: Any) -> Any:
    """Return JSON values without entries that are None or False, which versions add."""
    if isinstance(value, dict):
        return {name: _stated(x) for name, x in value.items() if x is not None and x is not False}
    return [_stated(x) for x in value] if isinstance(value, list) else value


# ── as earlier versions computed it ───────────────────────────────────────────────────────────────

_EARLIER_LEFT_OUT = {
    "factsmith",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}

_MOST_ADDED = 10
"""Entries that a later transformers may have added: all subsets of so many are tried."""


def _earlier_digest(weights: Any, config: Mapping[str, Any], tokenizer: str) -> str:
    digest = weights.copy()
    plain = {name: x for name, x in config.items() if name not in _EARLIER_LEFT_OUT}
    digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    digest.update(tokenizer.encode())
    return str(digest.hexdigest())


def _earlier_configs(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the forms in which an earlier transformers may have had a config."""
    now = config.to_dict()
    try:
        default = type(config)().to_dict()
    except Exception:  # a class that cannot be made without arguments
        default = {}
    unset = {name: default.get(name) for name in now if name in default and name in _SET_IN_PASSING}
    common = PreTrainedConfig().to_dict()
    extra = [name for name in now if name not in common]
    added = [name for name in extra if name in default and now[name] == default[name]]
    added = [name for name in added if now[name] is None or name in _ADDED][:_MOST_ADDED]
    rope = now.get("rope_parameters")
    rotary = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    for base in (now, {**now, **unset}):
        for more in ({}, {"partial_rotary_factor": rotary}) if rotary is not None else ({},):
            for size in range(len(added) + 1):
                for names in itertools.combinations(added, size):
                    yield {k: x for k, x in (base | more).items() if k not in names}


_SET_IN_PASSING = {
    "pad_token_id",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "problem_type",
}
"""Entries that scripts change, and that earlier versions counted."""

_ADDED = {"output_router_logits", "num_nextn_predict_layers", "swiglu_alpha", "swiglu_limit"}
"""Entries with a default other than None that came with a version after 5.0."""


def _earlier_tokenizers(text: str) -> Iterator[str]:
    """Yield the forms in which a tokenizer was: as it is, and without padding and cutting."""
    yield text
    plain = Tokenizer.from_str(text)
    plain.no_padding()
    plain.no_truncation()
    if (other := plain.to_str()) != text:
        yield other
