"""The tensors of a GGUF file under transformers' names, with what llama.cpp has changed about them undone."""

from collections.abc import Iterator

import gguf
from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.observe.names import tied_names
from bwla_converter.source.problems import raise_if_any
from torch import Tensor
from transformers import PreTrainedModel

PERMUTED = "llama"
"""The architecture in whose files the rows of q_proj and k_proj are permuted."""

SHIFTED = ("gemma2", "gemma3")
"""The architectures in whose files norm weights are stored with 1 added."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that become settings in config.json, see `gguf_config`."""


def tensor_names(file: GGUFFile, model: PreTrainedModel) -> dict[str, str]:
    """Return the name in the file of every tensor of a model, by transformers' name.

    Args:
        file: the file.
        model: the model of its config.json, on the meta device.

    Raises:
        SourceError: the list of all tensors that are missing, have another shape, or are not part of the model.
    """
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    name_map = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = tied_names(model)
    names, problems = {}, []
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        stored = f"{name_map.get_name(module)}.{kind}"
        if stored in file.tensors:
            names[name] = stored
            if file.shape(stored) != tuple(parameter.shape):
                problems.append(
                    f"{stored}: expected shape {list(parameter.shape)}, found {list(file.shape(stored))}"
                )
        elif name not in tied:
            problems.append(f"{stored} is missing ({name}), expected shape {list(parameter.shape)}")
    problems += _foreign_tensors(file, set(names.values()), type(model).__name__)
    raise_if_any(file.path, problems)
    return names


def _foreign_tensors(file: GGUFFile, used: set[str], architecture: str) -> Iterator[str]:
    for name in file.tensors:
        if name not in used and name not in ROPE_TENSORS:
            yield f"{name} is not a tensor of {architecture}"


def read_tensor(file: GGUFFile, stored: str, model: PreTrainedModel) -> Tensor:
    """Return the tensor that the file calls `stored` as transformers expects it, in bfloat16."""
    if file.architecture in SHIFTED and stored.endswith("norm.weight"):
        return file.read(stored, offset=1.0)
    tensor = file.read(stored)
    if file.architecture == PERMUTED and ".attn_q." in stored:
        return unpermute(tensor, model.config.num_attention_heads)
    if file.architecture == PERMUTED and ".attn_k." in stored:
        return unpermute(tensor, model.config.num_key_value_heads)
    return tensor


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Undo the permutation of rows that llama.cpp applies to q_proj and k_proj of Llama models.

    llama.cpp rotates pairs of neighbouring outputs of a head; transformers rotates an output of the head's first half
    together with one of its second half.

    Args:
        tensor: a weight [heads * head_dim, K] or a bias [heads * head_dim].
        heads: number of heads.
    """
    pairs = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, pairs, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
