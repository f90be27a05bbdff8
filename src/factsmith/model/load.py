"""Make a language model ready to read and edit its memories.

    lm = load("atlas")                 # a bundled model, a folder, or a hub id
    lm = wrap(module, tokenizer)       # a transformers model already in memory
    lm.answer(["The mother tongue of Danielle Darrieux is"])
    lm.ffn[3].values                   # (d_ff, d_model)

Loading finds the model's structure in a dry run of a few tokens, and checks it against the model's
own full pass. A model whose structure is not understood is refused, and never used wrongly.
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

_log = logging.getLogger(__name__)


def wrap(module: Any, tokenizer: Any) -> LanguageModel:
    """Return a LanguageModel around a transformers model in memory.

    It puts the model into evaluation mode and turns its gradients off. A masked language model of
    the BERT family becomes a MaskedLanguageModel.

    Raises:
        UnsupportedModelError: The structure is not understood, or the model is quantised.
        TokenizerError: The tokenizer is not a fast one, or another model's.
    """
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


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Load a bundled model ("atlas", "atlas-llama"), a folder, or a hub id.

    Args:
        name_or_path: The model.
        device: Where to put it. None: the CPU.
        dtype: The dtype of the weights. None: float32 on the CPU, and the checkpoint's own
            elsewhere.

    Raises:
        ModelNotFoundError: There is no such model.
        TokenizerError: There is no tokenizer that can be read.
        ModelError: The weights are damaged or missing, or the model is of another kind.
        UnsupportedModelError: The structure is not understood, or the model is quantised.
        InputError: There is no such device.
    """
    name = os.fspath(name_or_path)
    source, local = _locate(name)
    try:
        where = torch.device("cpu" if device is None else device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used ({first_line(error)}); give 'cpu', 'cuda' ...",
            argument="device",
        ) from None
    default = torch.float32 if where.type == "cpu" else "auto"
    wanted: torch.dtype | str = default if dtype is None else dtype
    with quietly():
        config = _config(name, source, local)
        auto = _class_to_load(name, config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except Exception as error:  # the tokenizer libraries raise all kinds of errors
            raise TokenizerError(
                f"{name!r} has no tokenizer that can be read ({first_line(error)}); put a "
                "tokenizer.json next to the weights"
            ) from error
        fast_tokenizer(tokenizer)
        try:
            module, report = auto.from_pretrained(
                source, dtype=wanted, local_files_only=local, output_loading_info=True
            )
        except Exception as error:  # damaged files cause errors of many libraries
            if quantised := getattr(config, "quantization_config", None):
                # Most often the library that unpacks the weights is not installed.
                how = (
                    quantised.get("quant_method")
                    if isinstance(quantised, dict)
                    else getattr(quantised, "quant_method", None)
                )
                raise quantised_error(repr(name), str(how or "packed weights")) from error
            raise ModelError(
                f"the weights of {name!r} cannot be read ({type(error).__name__}: "
                f"{first_line(error)}); copy or download them again"
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])} ...); copy or "
            "download it again"
        )
    if (packed := packed_format(module)) is not None:  # before `to`, which such a model refuses
        raise quantised_error(repr(name), packed)
    lm = _wrapped(module.to(where), tokenizer, name)
    kind = type(module).__name__
    _log.info("loaded %s: %s, %d layers, %s on %s", name, kind, lm.n_layers, lm.dtype, where)
    return lm


def _locate(name: str) -> tuple[str, bool]:
    """Return where to load a model from, and whether that is a folder."""
    if name in atlas.names():
        return str(atlas.folder(name)), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"the folder {name!r} has no config.json; give a folder with a transformers model, "
                "its weights and its tokenizer"
            )
        return str(path), True
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"there is no model {name!r}: it is neither a folder nor a bundled model "
            f"({_bundled()}); give one of these, a folder with config.json, weights and tokenizer, "
            "or a hub id such as owner/name"
        )
    return name, False


def _config(name: str, source: str, local: bool) -> Any:
    """Return the model's config.

    Raises:
        ModelNotFoundError: The hub has no such model, or cannot be reached.
        ModelError: The config cannot be used.
    """
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local)
    except Exception as error:  # hub, network, JSON and validation errors alike
        if local:
            raise ModelError(
                f"the config.json of {name!r} cannot be used: {first_line(error)}"
            ) from error
        raise ModelNotFoundError(
            f"there is no model {name!r} on the hub, or the hub cannot be reached: "
            f"{first_line(error)}; check the name and the network, or give a folder or a bundled "
            f"model ({_bundled()})"
        ) from error


def _class_to_load(name: str, config: Any) -> Any:
    """Return the transformers class to load the model with.

    Raises:
        ModelError: It is another kind of model.
    """
    causal, masked = (
        type(config) in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMaskedLM)
    )
    if not (causal or masked) or (masked and not causal and config.is_encoder_decoder):
        raise ModelError(
            f"{name!r} is a {config.model_type} model, neither a causal nor a masked language "
            "model; give one that continues text, or fills blanks in it"
        )
    # Some types are built either way. The class that was saved decides, and whether the config
    # says that it looks back only.
    saved_as = set(getattr(config, "architectures", None) or ())
    looks_back = bool(saved_as & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())) or getattr(
        config, "is_decoder", False
    )
    return (
        AutoModelForCausalLM
        if causal and (not masked or looks_back or config.is_encoder_decoder)
        else AutoModelForMaskedLM
    )


def _bundled() -> str:
    return ", ".join(atlas.names()) or "none are installed"


@contextmanager
def quietly() -> Generator[None, None, None]:
    """Silence transformers' progress bars and notices while the block runs."""
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
