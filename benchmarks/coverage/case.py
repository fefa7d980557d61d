"""What a case of the coverage run is, and the settings that tiny models share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

VOCABULARY = 256
ORDINARY_TOKENS = 240
"""Token ids below this have no special meaning in any case; images, ends of sentences and the like are above."""

Group = Literal["dense", "experts", "hybrid", "multimodal", "embedding"]

TEXT: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 255,
    "pad_token_id": 0,
}
"""Settings of all models."""


@dataclass(frozen=True)
class Case:
    """A tiny random model that stands for published ones.

    Attributes:
        name: name of the case, transformers' name of the module where there is one.
        models: well-known models of this architecture.
        architecture: its class in config.json's `architectures`.
        model_type: transformers' name of its configuration.
        blocks: kinds of decoder layers, separated by bars; the parts of a layer are joined by plus signs, or by an
            ampersand if they read the same input.
        settings: the configuration.
        group: section of the table.
        dtype: dtype of the weights and of the computation in vLLM; float32 unless vLLM's CPU kernels need another.
        bare: whether the tensors are stored without the prefix of the base model, and without a head.
        transposed: ends of the names of tensors that published files hold transposed, which transformers reads, but
            does not write.
    """

    name: str
    models: str
    architecture: str
    model_type: str
    blocks: str
    settings: Mapping[str, Any]
    group: Group = "dense"
    dtype: str = "float32"
    bare: bool = False
    transposed: tuple[str, ...] = ()


def wide(**settings: Any) -> dict[str, Any]:
    """Return settings of a model that sets its head width: 4 heads of 32, 2 for keys and values."""
    return {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, **settings}


def derived(**settings: Any) -> dict[str, Any]:
    """Return settings of a model that derives its head width from the hidden size: 2 heads of 32, 1 for both."""
    return {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 1, **settings}
