"""Make a language model ready to read and edit its memories.

    lm = load("atlas")                 # a bundled model, a folder, or a hub id
    lm = wrap(module, tokenizer)       # a transformers model already in memory
    lm.answer(["The mother tongue of Danielle Darrieux is"])
    lm.ffn[3].values                   # (d_ff, d_model)

Loading finds the model's structure in a dry run of a few tokens, and checks it against the model's
own full pass. A model whose structure is not understood is refused, and never used wrongly.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..core.errors import (
    ModelError,
    TokenizerError,
    UnsupportedModelError,
    first_line,
)
from ..core.progress import Progress, tell
from ..core.settled import settled
from .gguf import converted
from .language_model import LanguageModel
from .masked import MaskedLanguageModel
from .modes import unwrapped
from .offloaded import check_source, check_streamed, disk_map, offload_error, reporting, take_over
from .placing import DISK, LoadingOptions, check_attention, loading_options
from .quantised import packed_format, quantised_error
from .quiet import quietly
from .selfcheck import discover
from .source import Source, find_source, read_config, unreadable
from .tokens import fast_tokenizer

_log = logging.getLogger(__name__)


@settled()
def wrap(module: Any, tokenizer: Any) -> LanguageModel:
    """Return a LanguageModel around a transformers model in memory.

    It puts the model into evaluation mode and turns its gradients off. A model inside torch.compile
    or DataParallel is taken out: it shares its weights with the wrapper. A masked language model of
    the BERT family becomes a MaskedLanguageModel.

    Raises:
        UnsupportedModelError: The structure is not understood, the model is quantised, or it
            carries adapters of peft.
        TokenizerError: The tokenizer is not a fast one, or another model's.
    """
    module = unwrapped(module)
    if not (hasattr(module, "config") and hasattr(module, "get_input_embeddings")):
        raise UnsupportedModelError(
            f"module is a {type(module).__name__}; give a transformers language model"
        )
    return _wrapped(module, tokenizer, module.config.name_or_path or type(module).__name__)


def _wrapped(module: Any, tokenizer: Any, name: str) -> LanguageModel:
    """Return the model as transformers lists its class: causal or masked."""
    kind = type(module).__name__
    masked = (
        kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
    masked = masked and not module.config.is_encoder_decoder
    lm = (MaskedLanguageModel if masked else LanguageModel)(module, tokenizer, name)
    discover(lm)
    return lm


@settled()
def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a bundled model ("atlas", "atlas-llama"), a folder, a GGUF file, or a hub id.

    A GGUF file is dequantised, which takes a while. The result is kept in the user's cache, so that
    the next time is quick.

    Args:
        name_or_path: The model. A hub id may end in "@revision".
        device: Where to put it. "auto" and "disk": as the device maps of that name. None: the CPU.
        dtype: The dtype of the weights, such as torch.bfloat16 or "bfloat16". "auto": the
            checkpoint's own. None: float32 on the CPU, and the checkpoint's own elsewhere.
        revision: The branch, tag or commit on the hub. None: the main one.
        trust_remote_code: Run code that comes with the model. Without it such code never runs, and
            a model that needs it is refused.
        device_map: Instead of a device: how to spread the model over several, as transformers takes
            it: "auto", or {path: device}. "disk": every layer stays in its safetensors file, and is
            read when it runs, so that at most two layers are in memory; the device says where
            layers run. It needs the package accelerate.
        attn_implementation: How attention is computed, such as "eager" or "sdpa". None: as
            transformers chooses.
        progress: Gets what is being done, and a note about a file that was dequantised.

    Raises:
        ModelNotFoundError: There is no such model.
        TokenizerError: There is no tokenizer that can be read.
        ModelError: The weights are damaged or missing, the model is of another kind, or it needs
            code of its own.
        UnsupportedModelError: The structure is not understood, or the model is quantised.
        InputError: There is no such device, dtype or implementation of attention, or an argument
            has the wrong type.
    """
    source = find_source(name_or_path, revision, trust_remote_code)
    options = loading_options(device, dtype, device_map, attn_implementation)
    check_source(source, options.device_map)
    if source.gguf is None:
        return _loaded(source, options, progress)
    with converted(source, options.dtype, progress) as (folder, file):
        tell(progress, f"loading {file.path.name}", 0, None)
        lm = _loaded(folder, options, progress)
    lm.gguf = file
    return lm


def _loaded(source: Source, options: LoadingOptions, progress: Progress | None) -> LanguageModel:
    """Load a model that transformers can load."""
    name = source.name
    with quietly():
        config = read_config(source)
        auto = _class_to_load(name, config)
        check_attention(name, auto, config, options)
        tokenizer = _tokenizer(source)
        if options.device_map == DISK:
            assert options.device is not None
            spread = disk_map(source, auto, config, options.device)
            options = dataclasses.replace(options, device=None, device_map=spread)
        module, report = _weights(source, auto, config, options)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])} ...); copy or "
            "download it again"
        )
    if (packed := packed_format(module)) is not None:  # before `to`, which such a model refuses
        raise quantised_error(repr(name), packed)
    if options.device is not None:
        module = module.to(options.device)
    streamed = take_over(module, name)
    with nullcontext() if streamed is None else reporting(streamed, progress):
        lm = _wrapped(module, tokenizer, name)
    if streamed is not None:
        check_streamed(lm, streamed)
    kind = type(module).__name__
    _log.info("loaded %s: %s, %d layers, %s on %s", name, kind, lm.n_layers, lm.dtype, lm.device)
    return lm


def _tokenizer(source: Source) -> Any:
    """Return the tokenizer of a model; raise TokenizerError for one that cannot be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options())
    except Exception as error:  # the tokenizer libraries raise all kinds of errors
        raise source.refuses_code(error) or TokenizerError(
            f"{source.name!r} has no tokenizer that can be read ({first_line(error)}); put a "
            "tokenizer.json next to the weights"
        ) from error
    return fast_tokenizer(tokenizer)


def _weights(source: Source, auto: Any, config: Any, options: LoadingOptions) -> tuple[Any, Any]:
    """Return the model, and what transformers says about its weights."""
    try:
        return auto.from_pretrained(  # type: ignore[no-any-return]
            source.place,
            weights_only=True,  # a file of torch.save may hold tensors, and no code
            output_loading_info=True,
            **options.arguments(),
            **source.options(),
        )
    except Exception as error:  # damaged files cause errors of many libraries
        if quantised := getattr(config, "quantization_config", None):
            # Most often the library that unpacks the weights is not installed.
            how = (
                quantised.get("quant_method")
                if isinstance(quantised, dict)
                else getattr(quantised, "quant_method", None)
            )
            raise quantised_error(repr(source.name), str(how or "packed weights")) from error
        raise (
            source.refuses_code(error)
            or offload_error(source.name, error)
            or unreadable(source.name, error)
        ) from error


def _class_to_load(name: str, config: Any) -> Any:
    """Return the transformers class to load the model with.

    Raises:
        ModelError: It is another kind of model.
    """
    brought = getattr(config, "auto_map", None) or {}
    causal, masked = (
        type(config) in auto._model_mapping or auto.__name__ in brought
        for auto in (AutoModelForCausalLM, AutoModelForMaskedLM)
    )
    if not (causal or masked) or (masked and not causal and config.is_encoder_decoder):
        raise ModelError(
            f"{name!r} is a {config.model_type} model, neither a causal nor a masked language "
            "model; give one that continues text, or fills blanks in it"
        )
    # Some types are built either way. The class that was saved decides, and whether the config
    # says that it looks back only.
    names = getattr(config, "architectures", None)
    saved_as = {str(name) for name in names} if isinstance(names, list) else set()
    looks_back = bool(saved_as & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())) or getattr(
        config, "is_decoder", False
    )
    return (
        AutoModelForCausalLM
        if causal and (not masked or looks_back or config.is_encoder_decoder)
        else AutoModelForMaskedLM
    )
