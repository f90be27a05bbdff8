"""The fingerprint of a model: a digest of its weights, its config and its tokenizer.

model_digest(module, config, tokenizer)     # sha256 (hex), a pass over all weights
weight_state(module)                        # cheap; differs after any weight has changed
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def weight_state(module: nn.Module) -> object:
    """Return something small that differs after any weight has changed."""
    state = []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 8)][:9]
        state.append((name, tensor.data_ptr(), tensor._version, tuple(sample.float().tolist())))
    return tuple(state)


def model_digest(module: nn.Module, config: Any, tokenizer: Any) -> str:
    """Return the sha256 (hex) over every weight, the config and the tokenizer.

    A weight counts with its name, dtype, shape and bytes. Config entries that do not change the
    model are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    plain = {k: v for k, v in config.to_dict().items() if k not in _NOT_THE_MODEL}
    digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


_NOT_THE_MODEL = {  # entries of a config
    "factsmith",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}
