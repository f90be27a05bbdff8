"""A GGUF file as a transformers model in memory, by transformers' own reader.

    conversion = convert(source, read_header(path), torch.float32)
    conversion.save(folder)            # as `save_pretrained` does

transformers leaves out some of what decides the answers: how positions are scaled, all but one of
the tokens that end a text, and some ways to split text before it becomes tokens. `convert` adds
these where the file says them, and `Conversion.remarks` names what is still missing.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..core.errors import ModelError, first_line
from ..core.progress import Progress, tell
from .gguf_header import Header
from .quiet import quietly
from .source import Source, check_sizes

_F32, _F16, _BF16 = 0, 1, 30

_PLAIN = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Fields of tokens that end a text: of the text, of a turn, of a message."""

_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
"""Ways to split text that llama.cpp lists: each digit by itself, the rest as GPT-2 does."""

_AS_GPT2 = frozenset({"gpt-2", "gpt2", "default", "phi-2", "olmo", "jais", "mpt", "bloom"})
"""Ways to split text that need nothing added to a byte-level tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A model that was read from a GGUF file.

    Attributes:
        name: The name of the file.
        module: The model, dequantised.
        tokenizer: Its tokenizer, with the chat template.
        type: The type of most of its weights in the file, such as "Q4_1".
        remarks: What of the file transformers does not read, as sentences.
    """

    name: str
    module: Any
    tokenizer: Any
    type: str
    remarks: list[str]

    @property
    def n_bytes(self) -> int:
        """The size of the weights in memory."""
        return sum(each.numel() * each.element_size() for each in self.module.parameters())

    def save(self, folder: Path) -> None:
        """Write model and tokenizer into a folder; raises OSError and SafetensorError."""
        with quietly():
            self.module.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def own_dtype(header: Header) -> torch.dtype:
    """Return the dtype in which a file has its weights; float32 for a quantised one."""
    types = {each.type for each in header.tensors if len(each.shape) > 1}
    return _PLAIN.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


def convert(
    source: Source, header: Header, dtype: torch.dtype, progress: Progress | None = None
) -> Conversion:
    """Read a model from a GGUF file, dequantised.

    Args:
        source: The file.
        header: Its head.
        dtype: The dtype of the result.
        progress: Gets what is being done.

    Raises:
        ModelError: when the file is damaged, or transformers cannot read such a model from GGUF.
    """
    check_libraries()
    _check_data(header)
    _check_architecture(header)
    place = {"pretrained_model_name_or_path": str(header.path.parent)}
    place |= {"gguf_file": header.path.name}
    tell(progress, f"dequantising {header.path.name}", 0, None)
    try:
        with quietly(), _reported(progress, f"dequantising {header.path.name}"):
            config = AutoConfig.from_pretrained(**place, local_files_only=True)
            _set_length(header, config)
            _set_width(header, config)
            check_sizes(source, config.to_dict(), [each.shape for each in header.tensors])
            if type(config) not in AutoModelForCausalLM._model_mapping:
                raise ModelError(
                    f"{source.name!r} is a {config.model_type} model, which does not continue "
                    "text; give one that does"
                )
            tokenizer = AutoTokenizer.from_pretrained(**place, local_files_only=True)
            module, report = AutoModelForCausalLM.from_pretrained(
                **place,
                local_files_only=True,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                **_dequantised(),
            )
    except ModelError:
        raise
    except Exception as error:  # damaged files cause errors of many libraries
        raise ModelError(
            f"{source.name!r} cannot be read by transformers {transformers.__version__} "
            f"({type(error).__name__}: {first_line(error)}); copy or download it again, or convert "
            "the model again with a newer llama.cpp"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source.name!r} lacks {len(missing)} of the weights of a {config.model_type} model "
            f"({', '.join(missing[:3])} ...); copy or download it again"
        )
    _plain(module)
    remarks = [*_positions(header, module), *_split(header, tokenizer), *_unread(header, module)]
    _set_ends(header, module)
    return Conversion(
        name=header.path.name,
        module=module,
        tokenizer=tokenizer,
        type=main_type(header),
        remarks=remarks,
    )


def check_libraries() -> None:
    """Raise ModelError unless the libraries that read GGUF are installed."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"a GGUF file needs the library {' and '.join(missing)}, which is not installed; "
            'install it with `pip install "factsmith[gguf]"`'
        )


def main_type(header: Header) -> str:
    """Return the name of the type that most numbers of a file have."""
    from gguf import GGMLQuantizationType

    numbers: Counter[int] = Counter()
    for each in header.tensors:
        numbers[each.type] += each.n_numbers
    return str(GGMLQuantizationType(numbers.most_common(1)[0][0]).name)


# ── before any work ───────────────────────────────────────────────────────────────────────────────


def _check_data(header: Header) -> None:
    """Check that the data of every tensor is in the file."""
    from gguf import GGML_QUANT_SIZES

    room = header.n_bytes - header.data_start
    for each in header.tensors:
        if each.type not in GGML_QUANT_SIZES:
            raise ModelError(
                f"{header.path} has the tensor {each.name} in the unknown type {each.type}; "
                "update the gguf library (`pip install -U gguf`), or convert the model to another "
                "type with llama.cpp"
            )
        block, n_bytes = GGML_QUANT_SIZES[each.type]
        if each.shape[-1] % block or each.offset + each.n_numbers // block * n_bytes > room:
            raise ModelError(
                f"{header.path} is damaged: it ends before the end of the tensor {each.name} "
                f"({header.n_bytes:,} bytes); copy or download it again"
            )


def _check_architecture(header: Header) -> None:
    """Check that transformers can read this architecture, and that the head fits the tensors."""
    name = header.architecture
    known = _architectures()
    if _folded(name) not in {_folded(each) for each in known}:
        raise ModelError(
            f"{header.path} is of the architecture {name!r}, which transformers "
            f"{transformers.__version__} cannot read from GGUF. It reads {', '.join(known)}. Give "
            "a file of one of these, or the folder of the transformers model"
        )
    layers = header.fields.get(f"{name}.block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(header.tensors):
        raise ModelError(
            f"{header.path} is damaged: it says that it has {layers} layers, and it has "
            f"{len(header.tensors)} tensors; copy or download it again"
        )


def _architectures() -> list[str]:
    """Return the architectures that transformers reads from GGUF."""
    names: set[str] = set()
    try:
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        names |= set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    except ImportError:
        pass
    try:
        from transformers.integrations.gguf import GGUF_ARCHS

        names |= set(GGUF_ARCHS)
    except ImportError:  # before transformers 5.23
        pass
    return sorted(names)


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


# ── transformers' reader ──────────────────────────────────────────────────────────────────────────


def _dequantised() -> dict[str, Any]:
    """Return the arguments that keep newer versions of transformers from leaving blocks packed."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _reported(progress: Progress | None, step: str) -> Iterator[None]:
    """Report how many tensors transformers has read, in place of its own bar."""
    try:
        from transformers import modeling_gguf_pytorch_utils as reader
    except ImportError:
        yield
        return

    def counted(items: Any, *_: Any, **__: Any) -> Iterator[Any]:
        for done, item in enumerate(items):
            tell(progress, step, done, len(items))
            yield item

    bar = getattr(reader, "tqdm", None)
    if bar is not None:
        reader.tqdm = counted
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar


def _plain(module: Any) -> None:
    """Take the marks of a quantised model off one that is not quantised any more."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(module):
            delattr(module, name)
    if "quantization_config" in vars(module.config):
        del module.config.quantization_config


# ── what transformers leaves out ──────────────────────────────────────────────────────────────────


def _set_length(header: Header, config: Any) -> None:
    """Give a config the length of text that the file says: some types keep their default."""
    length = header.fields.get(f"{header.architecture}.context_length")
    present = getattr(config, "max_position_embeddings", None)
    if isinstance(length, int) and isinstance(present, int) and 0 < length != present:
        config.max_position_embeddings = length


def _set_width(header: Header, config: Any) -> None:
    """Give a config the width of the layers where it computes it from another size by default."""
    width = header.fields.get(f"{header.architecture}.feed_forward_length")
    if isinstance(width, int) and getattr(config, "n_inner", 0) is None:
        config.n_inner = width


def _set_ends(header: Header, module: Any) -> None:
    """Let every token that the file says ends a text or a turn end an answer."""
    values = [header.fields.get(f"tokenizer.ggml.{name}") for name in _ENDS]
    present = module.generation_config.eos_token_id
    ends = [present] if isinstance(present, int) else list(present or [])
    ends += [value for value in values if isinstance(value, int)]
    ends = list(dict.fromkeys(each for each in ends if 0 <= each < module.config.vocab_size))
    if ends:
        module.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends


def _split(header: Header, tokenizer: Any) -> list[str]:
    """Split text into digits where the file says so; return remarks."""
    kind = header.fields.get("tokenizer.ggml.pre")
    if header.fields.get("tokenizer.ggml.model") != "gpt2" or not isinstance(kind, str):
        return []
    if kind in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return []
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        GGUF_PRE_TOKENIZER_SPLITS = {}
    if kind in GGUF_PRE_TOKENIZER_SPLITS or kind in _AS_GPT2:
        return []
    return [
        f"it splits text in the way {kind!r}, which transformers does not know, so numbers and "
        "other scripts may become other tokens than in llama.cpp"
    ]


def _positions(header: Header, module: Any) -> list[str]:
    """Scale positions as the file says; return remarks."""
    rope = getattr(module.config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        return []
    factors = _factors(header)
    if factors is not None:
        scaling = _by_wavelength(header, factors, float(rope.get("rope_theta", 10_000.0)))
        if scaling is not None:
            module.config.rope_parameters = {**rope, **scaling}
            return []
    kind = header.fields.get(f"{header.architecture}.rope.scaling.type", "none")
    factor = header.fields.get(f"{header.architecture}.rope.scaling.factor", 1.0)
    if kind == "linear" and factors is None:
        module.config.rope_parameters = {**rope, "rope_type": "linear", "factor": float(factor)}
        return []
    if kind in ("none", "linear") and factors is None:
        return []
    return [
        "it scales positions in a way that is not read here, so answers to long texts differ from "
        "those of llama.cpp"
    ]


_ROPE = "rope_freqs.weight"


def _factors(header: Header) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Return by what the frequency of each pair of dimensions is divided; None: the file has no
    such tensor."""
    entry = next((each for each in header.tensors if each.name == _ROPE), None)
    if entry is None or entry.type != _F32:
        return None
    with header.path.open("rb") as file:
        file.seek(header.data_start + entry.offset)
        return np.frombuffer(file.read(4 * entry.n_numbers), "<f4")


def _by_wavelength(header: Header, factors: Any, theta: float) -> dict[str, Any] | None:
    """Return the settings of a scaling by wavelength that gives these factors; None if none does.

    Short wavelengths stay, long ones are divided, and those between are interpolated.
    """
    n, largest = len(factors), float(factors.max())
    if largest <= 1:
        return {}
    stated = header.fields.get(f"{header.architecture}.rope.scaling.original_context_length")
    length = stated if isinstance(stated, int) else 8192
    low, high = 1.0, 4.0
    waves = 2 * math.pi * theta ** (np.arange(n) / n)
    smooth = np.clip((length / waves - low) / (high - low), 0.0, 1.0)
    if np.abs(1 / ((1 - smooth) / largest + smooth) - factors).max() > 1e-2 * largest:
        return None
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _unread(header: Header, module: Any) -> list[str]:
    """Return a remark if the file has numbers for which the model has no place."""
    tensors = [each for each in header.tensors if each.name != _ROPE]
    sizes = Counter(each.numel() for each in module.parameters())
    sizes.update(each.numel() for _, each in module.named_buffers())
    if sum(each.n_numbers for each in tensors) <= sum(each.numel() for each in module.parameters()):
        return []
    names = []
    for each in tensors:
        if sizes[each.n_numbers]:
            sizes[each.n_numbers] -= 1
        else:
            names.append(each.name)
    if not names:
        return []
    return [
        f"transformers has no place for {len(names)} of its tensors ({', '.join(names[:3])}), so "
        "the answers may differ from those of llama.cpp"
    ]
