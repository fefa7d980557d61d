"""The config.json of a model in a GGUF file.

transformers can read a configuration from a GGUF file itself, but leaves out what our families need: the head size of
Qwen3, RoPE scaling (linear, YaRN, and Llama 3's and LongRoPE's factors, which are tensors), the two RoPE bases and the
sliding windows of Gemma 3, the softcapping of Gemma 2, the partial rotation of Phi-3. Such a model would load without
an error and compute something else.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from bwla_converter.source.families import FAMILIES, Family
from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.meta_model import MAX_LAYERS
from bwla_kernels.errors import SourceError
from transformers import AutoConfig, PretrainedConfig

IGNORED = (
    "vocab_size",  # the embedding says it
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.causal",
    "rope.dimension_count_swa",
    "rope.scaling.type",
    "rope.scaling.finetuned",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
)
"""Keys that are checked elsewhere in this module, or say nothing about the computation."""

LLAMA3_ORIGINAL_CONTEXT, LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ = 8192, 1.0, 4.0
"""Llama 3's RoPE scaling. GGUF files hold the resulting factors; these three are the same in all Llama 3 models."""

GEMMA_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Number of layers by which llama.cpp recognizes the 27B models, whose attention is scaled by hidden_size / heads."""

GEMMA3_PATTERN = 6
"""Every sixth layer of Gemma 3 has full attention, unless the file says otherwise."""


class _Keys:
    """The metadata of one architecture, without the prefix; keeps track of the keys that were read."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, self._prefix = file, f"{file.architecture}."
        self._unread = {name for name in file.metadata if name.startswith(self._prefix)}

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, with floats as short as float32 allows: 1e-05 instead of 9.999999747378752e-06."""
        name = self._prefix + key
        self._unread.discard(name)
        value = self._file.metadata.get(name, default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """Return the value of a key.

        Raises:
            SourceError: the file does not have it.
        """
        value = self.get(key)
        if value is None:
            raise SourceError(
                f"{self._file.path}: expected {self._prefix}{key} in its metadata, found none: the file is damaged or "
                "was written by an old converter, so get a newer one"
            )
        return value

    def unread(self) -> list[str]:
        """Return the keys that nobody has asked for."""
        return sorted(self._unread - {self._prefix + key for key in IGNORED})


def find_gguf_family(file: GGUFFile) -> Family:
    """Return the family of the model in a GGUF file.

    Raises:
        SourceError: its architecture is not supported.
    """
    for family in FAMILIES:
        if family.gguf and family.gguf == file.architecture:
            return family
    names = dict.fromkeys(family.gguf for family in FAMILIES if family.gguf)
    supported = ", ".join(
        f"{name} ({', '.join(family.name for family in FAMILIES if family.gguf == name)})" for name in names
    )
    raise SourceError(
        f"{file.path}: found the architecture {file.architecture}, expected one of {supported}: use a supported model"
    )


def make_config(file: GGUFFile) -> PretrainedConfig:
    """Return the configuration of the model in a GGUF file, as its config.json would be.

    Raises:
        SourceError: the architecture is not supported, a setting is missing or has no counterpart in transformers.
    """
    family = find_gguf_family(file)
    keys = _Keys(file)
    if keys.get("expert_count"):
        raise SourceError(f"{file.path}: is a mixture of experts, which is not supported: use a dense model")
    try:
        settings = {**_common(file, keys), **_SPECIFIC[file.architecture](file, keys)}
        config = AutoConfig.for_model(family.model_type, architectures=[family.architecture], **settings)
    except SourceError:
        raise
    except Exception as cause:  # for values of other types than expected, or that contradict each other
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{file.path}: transformers cannot use the settings in its metadata ({reason:.300}): get the file again"
        ) from None
    for key in keys.unread():
        logging.getLogger(__name__).warning("%s: %s is not used", file.path.name, key)
    return config


def _common(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    """Return the settings that have the same name in all families."""
    if "token_embd.weight" not in file.tensors:
        raise SourceError(
            f"{file.path}: expected the tensor token_embd.weight, found none: get the file again"
        )
    heads = keys.need("attention.head_count")
    kv_heads = keys.get("attention.head_count_kv", heads)
    layers = keys.need("block_count")
    if not all(isinstance(value, int) for value in (heads, kv_heads, layers)) or heads < 1:
        raise SourceError(
            f"{file.path}: expected one number of heads for all layers, found {heads} and {kv_heads}: layers with "
            "different numbers of heads are not supported"
        )
    if not 1 <= layers <= MAX_LAYERS:
        raise SourceError(
            f"{file.path}: expected 1 to {MAX_LAYERS} layers in its metadata, found {layers}: get the file again"
        )
    head_dim = _head_dim(keys)
    rotated = keys.get("rope.dimension_count", head_dim)
    if rotated != head_dim and file.architecture != "phi3":
        raise SourceError(
            f"{file.path}: expected RoPE of all {head_dim} dimensions of a head, found that of {rotated}, which "
            "transformers' class cannot do: use another model"
        )
    keys_of_ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in keys_of_ids.items()
    }
    return {
        "vocab_size": file.shape("token_embd.weight")[0],
        "max_position_embeddings": keys.need("context_length"),
        "hidden_size": keys.need("embedding_length"),
        "intermediate_size": keys.need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "bfloat16",
        **ids,
    }


def _head_dim(keys: _Keys) -> int:
    return int(
        keys.get("attention.key_length", keys.need("embedding_length") // keys.need("attention.head_count"))
    )


def _llama(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(file, keys),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _qwen2(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    return {"rope_parameters": _rope(file, keys)}


def _qwen3(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(file, keys),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def _gemma2(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    return {
        **_gemma(file, keys),
        "rope_parameters": _rope(file, keys),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "tie_word_embeddings": True,
    }


def _gemma3(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    layers = keys.need("block_count")
    pattern = keys.get("attention.sliding_window_pattern", GEMMA3_PATTERN)
    if isinstance(pattern, list):
        slides = [bool(slide) for slide in pattern]
    else:
        slides = [(index + 1) % pattern != 0 for index in range(layers)]
    local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", 10_000.0))}
    return {
        **_gemma(file, keys),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": {"sliding_attention": local, "full_attention": _rope(file, keys, 1_000_000.0)},
    }


def _gemma(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    """Return the settings of Gemma 2 and 3."""
    large = keys.need("block_count") == GEMMA_LAYERS_OF_27B[file.architecture]
    scalar = keys.need("embedding_length") // keys.need("attention.head_count") if large else _head_dim(keys)
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.need("attention.sliding_window"),
        "final_logit_softcapping": keys.get(
            "final_logit_softcapping", 30.0 if file.architecture == "gemma2" else None
        ),
    }


def _phi3(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    head_dim = _head_dim(keys)
    rotated = keys.get("rope.dimension_count", head_dim)
    context = keys.need("context_length")
    original = keys.get("rope.scaling.original_context_length", context)
    rope = {**_rope(file, keys), "partial_rotary_factor": rotated / head_dim}
    if "rope_factors_long.weight" in file.tensors:
        # Read without effect: transformers computes it from the contexts, as llama.cpp has done.
        keys.get("rope.scaling.attn_factor")
        factors = {
            f"{kind}_factor": _floats(file, f"rope_factors_{kind}.weight") for kind in ("long", "short")
        }
        rope = {**rope, "rope_type": "longrope", "original_max_position_embeddings": original, **factors}
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        # 0 stands for no window, in Phi-4.
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


_SPECIFIC: dict[str, Callable[[GGUFFile, _Keys], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def _rope(file: GGUFFile, keys: _Keys, base: float = 10_000.0) -> dict[str, Any]:
    """Return transformers' `rope_parameters`; `base` is the base of the frequencies if the file gives none."""
    theta = float(keys.get("rope.freq_base", base))
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": theta, **_llama3_rope(file, theta, _head_dim(keys))}
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


def _yarn(file: GGUFFile, keys: _Keys, factor: float) -> dict[str, Any]:
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
    factors = np.array(_floats(file, "rope_freqs.weight"))
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


def _floats(file: GGUFFile, name: str) -> list[float]:
    """Return the values of a small tensor.

    Raises:
        SourceError: it is missing, or not float32.
    """
    tensor = file.tensors.get(name)
    if tensor is None or tensor.data.dtype != np.float32:
        raise SourceError(f"{file.path}: expected {name} in float32, found none: get the file again")
    return [float(str(value)) for value in tensor.data.ravel()]
