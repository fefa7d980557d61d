"""The settings that have the same meaning in all architectures, by the names that transformers gives them."""

from collections.abc import Mapping
from typing import Any

from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models.keys import Keys
from bwla_converter.source.gguf_models.rope import head_dim_of
from bwla_converter.source.meta_model import MAX_LAYERS
from bwla_kernels.errors import SourceError
from transformers.integrations import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

EMBEDDING = "token_embd.weight"
NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
RMS_EPSILON, EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
OTHER_EPSILON = {RMS_EPSILON: EPSILON, EPSILON: RMS_EPSILON}
"""llama.cpp's converter names the epsilon by the name it has in config.json, and not by the kind of norm."""


def read_common(
    file: GGUFFile, keys: Keys, table: str, partial: bool = False, differing: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the settings that transformers' table of GGUF keys names, the tokens, and the dtype.

    RoPE is left to `rope.read_rope`, and the size of the vocabulary is that of the embedding.

    Args:
        file: the file.
        keys: its metadata.
        table: name of the architecture in transformers' table.
        partial: whether the class can rotate a part of each head.
        differing: keys whose values may differ between layers, which the caller reads itself.

    Raises:
        SourceError: a setting is missing, or transformers' class cannot express it.
    """
    _check_layers(file, keys, differing)
    settings: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(table, {}))
    for key, name in table_of(file, table).items():
        if name is None or key == "vocab_size" or key.startswith("rope.") or key in differing:
            continue
        value = keys.get(key)
        if key in OTHER_EPSILON:
            other = keys.get(OTHER_EPSILON[key])
            value = other if value is None else value
        if value is None and (key in NEEDED or key in OTHER_EPSILON):
            value = keys.need(key)
        if value is not None:
            settings[name] = value
    if "num_attention_heads" in settings:
        settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    return {
        **settings,
        **read_rest(file),
        "max_position_embeddings": keys.need("context_length"),
        "head_dim": _checked_head_dim(file, keys, partial),
    }


def table_of(file: GGUFFile, table: str) -> Mapping[str, str | None]:
    """Return transformers' names of an architecture's settings by GGUF key.

    Raises:
        SourceError: the installed transformers does not have the architecture.
    """
    if table not in GGUF_CONFIG_MAPPING:
        raise too_old(file)
    found: Mapping[str, str | None] = GGUF_CONFIG_MAPPING[table]
    return found


def too_old(file: GGUFFile) -> SourceError:
    """Return the error for an architecture that a newer transformers reads."""
    return SourceError(
        f"{file.path}: found the architecture {file.architecture}, which the installed transformers does not read "
        "from GGUF files: update transformers"
    )


def read_rest(file: GGUFFile) -> dict[str, Any]:
    """Return what all architectures have: the vocabulary, whether the head is tied, the tokens, the dtype."""
    keys_of_ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in keys_of_ids.items()
    }
    return {
        "vocab_size": file.shape(EMBEDDING)[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "bfloat16",
        **ids,
    }


def _check_layers(file: GGUFFile, keys: Keys, differing: tuple[str, ...]) -> None:
    heads = keys.need("attention.head_count")
    kv_heads = heads if "attention.head_count_kv" in differing else keys.get("attention.head_count_kv", heads)
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


def _checked_head_dim(file: GGUFFile, keys: Keys, partial: bool) -> int:
    head_dim = head_dim_of(keys)
    rotated = keys.get("rope.dimension_count", head_dim)
    if rotated != head_dim and not partial:
        raise SourceError(
            f"{file.path}: expected RoPE of all {head_dim} dimensions of a head, found that of {rotated}, which "
            "transformers' class cannot do: use another model"
        )
    return head_dim
