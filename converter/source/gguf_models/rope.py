"""RoPE in GGUF files: its base, its scaling, and the factors that llama.cpp stores as tensors.

transformers' reader leaves the scaling out.
"""

import math
from typing import Any

import numpy as np
from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models.keys import Keys, read_floats
from bwla_kernels.errors import SourceError

LLAMA3_ORIGINAL_CONTEXT, LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ = 8192, 1.0, 4.0
"""Llama 3's RoPE scaling. GGUF files hold the resulting factors; these three are the same in all Llama 3 models."""


def head_dim_of(keys: Keys) -> int:
    """Return the size of an attention head."""
    return int(
        keys.get("attention.key_length", keys.need("embedding_length") // keys.need("attention.head_count"))
    )


def read_rope(file: GGUFFile, keys: Keys, base: float = 10_000.0) -> dict[str, Any]:
    """Return transformers' `rope_parameters`; `base` is the base of the frequencies if the file gives none."""
    theta = float(keys.get("rope.freq_base", base))
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": theta, **_llama3_rope(file, theta, head_dim_of(keys))}
    scaling = keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor")
    if scaling == "linear" and factor is not None:
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if scaling == "yarn" and factor is not None:
        return {"rope_theta": theta, **_yarn(file, keys, factor)}
    if scaling not in ("none", "longrope"):
        raise SourceError(
            f"{file.path}: found the RoPE scaling {scaling} with factor {factor}, expected none, linear, yarn or "
            "longrope: use another model"
        )
    return {"rope_theta": theta, "rope_type": "default"}


def _yarn(file: GGUFFile, keys: Keys, factor: float) -> dict[str, Any]:
    if keys.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0 or keys.get(
        "rope.scaling.yarn_log_multiplier", 0.0
    ):
        raise SourceError(
            f"{file.path}: its YaRN scaling has settings that transformers lacks: use another model"
        )
    optional = {
        "attention_factor": keys.get("rope.scaling.yarn_attn_factor"),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow"),
    }
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.need("rope.scaling.original_context_length"),
        **{name: value for name, value in optional.items() if value is not None},
    }


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3's RoPE scaling from the factors by which the file divides the frequencies.

    Raises:
        SourceError: the factors are not those of Llama 3's rule.
    """
    factors = np.array(read_floats(file, "rope_freqs.weight"))
    factor = float(str(np.float32(factors.max())))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    periods = LLAMA3_ORIGINAL_CONTEXT / wavelengths
    smooth = np.clip((periods - LLAMA3_LOW_FREQ) / (LLAMA3_HIGH_FREQ - LLAMA3_LOW_FREQ), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise SourceError(
            f"{file.path}: rope_freqs.weight: expected the factors of Llama 3's RoPE scaling, found others, which "
            "transformers cannot express: use another model"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ,
        "high_freq_factor": LLAMA3_HIGH_FREQ,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
    }
