"""A language model ready for reading and editing its memories.

    lm = load("atlas")                 # a bundled model, a folder, or a hub id
    lm = wrap(module, tokenizer)       # a transformers model already in memory
    lm.answer(["The mother tongue of Danielle Darrieux is"])
    lm.ffn[3].values                   # (d_ff, d_model)

Loading finds the model's structure in a dry run of a few tokens and checks what it found against the model's own full pass;
a model whose structure is not understood is refused in words, never used wrongly.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as notices

from .. import atlas
from ..core.errors import (
    InputError,
    ModelError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedModelError,
    first_line,
)
from .language_model import LanguageModel
from .masked import MaskedLanguageModel
from .quantised import packed_format, quantised_error
from .selfcheck import discover
from .tokens import fast_tokenizer


def wrap(module: Any, tokenizer: Any) -> LanguageModel:
    """A LanguageModel around a transformers model in memory; puts it into evaluation mode and turns its gradients off.

    A masked language model of the BERT family becomes a MaskedLanguageModel. Raises UnsupportedModelError when its structure is not
    understood, TokenizerError without a fast tokenizer.
    """
    if not (hasattr(module, "config") and hasattr(module, "get_input_embeddings")):
        raise UnsupportedModelError(
            f"wrap takes a transformers language model; got a {type(module).__name__}"
        )
    return _wrapped(module, tokenizer, module.config.name_or_path or type(module).__name__)


def _wrapped(module: Any, tokenizer: Any, name: str) -> LanguageModel:
    """The model as what transformers lists its class as."""
    kind = type(module).__name__
    masked = (
        kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
    masked = masked and not module.config.is_encoder_decoder
    lm = (MaskedLanguageModel if masked else LanguageModel)(module, tokenizer, name)
    discover(lm)
    return lm


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Load a bundled model ("atlas", "atlas-llama"), a folder, or a hub id.

    device: where to put it (None: the CPU). dtype: None takes float32 on the CPU and the checkpoint's own elsewhere.
    Raises ModelNotFoundError, TokenizerError, ModelError (damaged or missing weights, another kind of model), UnsupportedModelError (its
    structure is not understood, or it is quantised), InputError (no such device).
    """
    name = os.fspath(name_or_path)
    source, local = _locate(name)
    try:
        where = torch.device("cpu" if device is None else device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used here ({first_line(error)}); expected 'cpu', 'cuda' ..."
        ) from None
    wanted: torch.dtype | str = (
        dtype if dtype is not None else (torch.float32 if where.type == "cpu" else "auto")
    )
    with quietly():
        config = _config(name, source, local)
        auto = _class_to_load(name, config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except (
            Exception
        ) as error:  # the tokenizer libraries raise many things, down to bare Exception
            raise TokenizerError(
                f"{name!r} has no tokenizer that can be read ({first_line(error)}); expected a tokenizer.json beside the weights"
            ) from error
        fast_tokenizer(tokenizer)
        try:
            module, report = auto.from_pretrained(
                source, dtype=wanted, local_files_only=local, output_loading_info=True
            )
        except Exception as error:  # likewise: damaged files surface as errors of many libraries
            if quantised := getattr(
                config, "quantization_config", None
            ):  # most often, its library is not there
                how = (
                    quantised.get("quant_method")
                    if isinstance(quantised, dict)
                    else getattr(quantised, "quant_method", None)
                )
                raise quantised_error(repr(name), str(how or "packed weights")) from error
            raise ModelError(
                f"the weights of {name!r} cannot be read ({type(error).__name__}: {first_line(error)}); copy or download them again"
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])} ...); copy or download it again"
        )
    if (
        packed := packed_format(module)
    ) is not None:  # such a model refuses to be moved, in words of its own
        raise quantised_error(repr(name), packed)
    return _wrapped(module.to(where), tokenizer, name)


def _locate(name: str) -> tuple[str, bool]:
    """Where a model is to be loaded from, and whether that is a folder; raises ModelNotFoundError."""
    if name in atlas.names():
        return str(atlas.folder(name)), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"folder {name!r} holds no config.json; expected a transformers model with its weights and tokenizer"
            )
        return str(path), True
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"no model {name!r}: neither a folder nor a bundled model ({', '.join(atlas.names()) or 'none are installed'}); "
            "give one of these, a folder with config.json, weights and tokenizer, or a hub id such as owner/name"
        )
    return name, False


def _config(name: str, source: str, local: bool) -> Any:
    """Its config.json; raises ModelNotFoundError when the hub lacks it, ModelError when it cannot be used."""
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local)
    except Exception as error:  # hub, network, JSON and validation errors alike
        if local:
            raise ModelError(
                f"the config.json of {name!r} cannot be used: {first_line(error)}"
            ) from error
        raise ModelNotFoundError(
            f"no model {name!r} on the hub, or the hub cannot be reached: {first_line(error)}; "
            f"check the name and the network, or give a folder or a bundled model ({', '.join(atlas.names()) or 'none are installed'})"
        ) from error


def _class_to_load(name: str, config: Any) -> Any:
    """The transformers class to load it with; raises ModelError for another kind of model."""
    causal, masked = (
        type(config) in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMaskedLM)
    )
    if not (causal or masked) or (masked and not causal and config.is_encoder_decoder):
        raise ModelError(
            f"{name!r} is a {config.model_type} model, neither a causal nor a masked language model; expected one that continues text, "
            "or fills blanks in it"
        )
    # Some types are built either way; what the checkpoint was saved as decides, and whether it was told to look back only.
    saved_as = set(getattr(config, "architectures", None) or ())
    looks_back = bool(saved_as & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())) or getattr(
        config, "is_decoder", False
    )
    return (
        AutoModelForCausalLM
        if causal and (not masked or looks_back or config.is_encoder_decoder)
        else AutoModelForMaskedLM
    )


@contextmanager
def quietly() -> Generator[None, None, None]:
    """Hold back transformers' progress bars and notices for a while."""
    level, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity(logging.CRITICAL)
    notices.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notices.set_verbosity(level)
        if bars:
            notices.enable_progress_bar()
