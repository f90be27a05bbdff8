"""The settings of a model that decide its answers, apart from its weights.

    answering_settings(config)       # {"rms_norm_eps": 1e-06, "rope_parameters": {...}, ...}

A config holds much more: notes, names, outputs to return, settings of training. Most of what is
left follows from the rest, or is what the class gives by itself. Such entries come and go with the
version of transformers, so they are left out.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from .quiet import quietly

_NEVER = re.compile(
    # where the model comes from
    r"_.*|name_or_path|transformers_version|architectures|auto_map|tokenizer_class|factsmith"
    r"|run_name|finetuning_task|task_specific_params|quantization_config"
    # how it is run and what it returns
    r"|(torch_)?dtype|use_cache|cache_implementation|return_dict|use_return_dict"
    r"|output_(hidden_states|attentions|scores|past|router_logits|logits)"
    r"|torchscript|pretraining_tp|num_nextn_predict_layers"
    r"|.*gradient_checkpointing|chunk_size_feed_forward|pruned_heads|.*_implementation"
    # training
    r"|.*drop(out|_path|_rate|_prob)?(_.*)?|.*_p?drop(out)?|layerdrop|.*_layerdrop|.*initializer.*"
    r"|.*init_std|init_(method|scale|.*std)|.*aux_loss.*|.*z_loss.*|.*jitter.*|seq_aux"
    r"|.*_loss_(coef|weight|alpha)"
    # heads that choose among labels
    r"|problem_type|num_labels|id2label|label2id|summary_.*|classifier_.*"
    # The ids that end a text count by themselves. Those that fill rows are hidden by the mask.
    r"|(pad|bos|eos|sep|cls|unk|mask)_token_id|decoder_start_token_id|forced_.*_token_id"
    # ways to generate other than the greedy one
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups"
    r"|num_return_sequences"
    r"|diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty"
    r"|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|suppress_tokens"
    r"|begin_suppress_tokens|exponential_decay_length_penalty|remove_invalid_values|prefix"
)
"""Names of entries that never change a number of a greedy answer."""


def answering_settings(config: Any, module: Any = None) -> dict[str, Any]:
    """Return the entries of a config that decide a model's answers.

    Args:
        config: A config of transformers.
        module: The model. Its code tells whether it reads an entry that its config class does not
            know. None: such entries are left out.
    """
    known = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = (type(config), type(module), known)
    if key not in _SEEN:
        if len(_SEEN) > _MOST:
            _SEEN.clear()
        with quietly():
            _SEEN[key] = _answering(config, _source(module))
    return _SEEN[key]


_SEEN: dict[tuple[type, type, str], dict[str, Any]] = {}
_MOST = 64


def _answering(config: Any, source: str) -> dict[str, Any]:
    parts = {
        name: part
        for name, part in vars(config).items()
        if name in getattr(config, "sub_configs", {}) and hasattr(part, "to_dict")
    }
    every = {
        name: value
        for name, value in config.to_dict().items()
        if name not in parts and not _NEVER.fullmatch(name) and name != "model_type"
    }
    given = {name: part.to_dict() for name, part in parts.items()}
    try:
        declared = set(type(config)().to_dict())
    except Exception:  # a class that cannot be made without arguments
        declared = set(every)
    settings = {
        name: value for name, value in every.items() if name in declared or _reads(source, name)
    }
    whole = _pruned(settings)
    # Lists and mappings mostly follow from the numbers, so they are tried first.
    for name in sorted(settings, key=lambda x: (not isinstance(settings[x], (list, dict)), x)):
        less = {other: value for other, value in settings.items() if other != name}
        if _rebuilt(config, less | given, whole) == whole:
            settings = less
    return {
        "model_type": getattr(config, "model_type", ""),
        **_renamed(_pruned(settings)),
        **{name: _answering(part, source) for name, part in sorted(parts.items())},
    }


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return entries in the form of the newest transformers, which renamed and moved some."""
    if "num_local_experts" in settings:
        settings["num_experts"] = settings.pop("num_local_experts")
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict):
        if by_kind := {name: x for name, x in rope.items() if isinstance(x, dict)}:
            settings["rope_parameters"] = rope = by_kind
        if "partial_rotary_factor" in rope:
            settings.pop("partial_rotary_factor", None)
    return settings


def _rebuilt(config: Any, arguments: Mapping[str, Any], names: Mapping[str, Any]) -> Any:
    """Return the entries of a config that is made of these arguments; None if it cannot be."""
    try:
        return _plain(type(config)(**json.loads(json.dumps(arguments))), names)
    except Exception:  # a class may refuse anything
        return None


def _plain(config: Any, names: Mapping[str, Any]) -> Any:
    return _pruned({name: x for name, x in config.to_dict().items() if name in names})


def _pruned(value: Any) -> Any:
    """Return plain JSON values without the entries of a mapping that are None."""
    if isinstance(value, Mapping):
        return {str(name): _pruned(x) for name, x in value.items() if x is not None}
    if isinstance(value, (list, tuple)):
        return [_pruned(x) for x in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _source(module: Any) -> str:
    """Return the code of the file that defines a model; "" if there is none to read."""
    if module is None:
        return ""
    try:
        return inspect.getsource(sys.modules[type(module).__module__])
    except (OSError, TypeError, KeyError):
        return ""


def _reads(source: str, name: str) -> bool:
    """Return whether code reads an entry of a config by its name."""
    word = re.escape(name)
    pattern = rf"config\.{word}\b|getattr\(\s*[\w.]*config,\s*[\"']{word}[\"']"
    return re.search(pattern, source) is not None
