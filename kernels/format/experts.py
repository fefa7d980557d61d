"""Stored linears of the experts of a mixture-of-experts layer: their names, and the tensors that each one stores.

The linears of a layer's experts are called `<path>.experts.<number>.<leaf>`, where the leaves are those of a row of
`EXPERT_LEAVES`. All gate and up projections share one input transform, all down projections another; only the linears
of expert 0 store it.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from bwla_kernels.format.layer import INPUT_TRANSFORM, LayerSpec, TensorSpec, tensor_specs

EXPERT_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The two ways in which checkpoints call gate, up and down of an expert."""

BIAS_DTYPE = torch.bfloat16
"""Dtype of the biases of experts, which kernels stack: one for all models."""

ANY_EXPERT = "*"
"""What stands for the number of an expert in the keys of settings."""

_SETTING = re.compile(r"(?:[^*]+\.)?experts\.\*\.[^.*]+")


def _parts(name: str) -> tuple[str, str, str] | None:
    """Divide the name of an expert's linear into path, number and leaf; return None for other linears.

    A checkpoint of a large mixture of experts has tens of thousands of such names, so no regular expression is used.
    """
    stem, _, leaf = name.rpartition(".")
    module, _, number = stem.rpartition(".")
    is_number = number.isdecimal() and number.isascii() and (number[0] != "0" or number == "0")
    in_experts = module == "experts" or module.endswith(".experts")
    return (module, number, leaf) if is_number and in_experts and leaf else None


def expert_of(name: str) -> int | None:
    """Return the number of the expert that the linear called `name` belongs to, None for other linears."""
    parts = _parts(name)
    return int(parts[1]) if parts else None


def has_experts(names: Iterable[str]) -> bool:
    """Return whether any of the linears `names` belongs to an expert."""
    return any(expert_of(name) is not None for name in names)


def experts_module(name: str) -> str | None:
    """Return the path of the experts (`model.layers.0.mlp.experts`) that the linear `name` belongs to, or None."""
    parts = _parts(name)
    return parts[0] if parts else None


def settings_name(name: str) -> str:
    """Return the name of a linear with `*` for the number of its expert; unchanged for other linears."""
    parts = _parts(name)
    return f"{parts[0]}.{ANY_EXPERT}.{parts[2]}" if parts else name


def kind_of(name: str) -> str:
    """Return the last part of a linear's name (`q_proj`), and of an expert's the last three: `experts.*.w1`."""
    parts = settings_name(name).split(".")
    return ".".join(parts[-1:] if expert_of(name) is None else parts[-3:])


def first_expert(name: str) -> str:
    """Return the name of the same linear of expert 0; unchanged for other linears."""
    parts = _parts(name)
    return f"{parts[0]}.0.{parts[2]}" if parts else name


def is_setting(key: str) -> bool:
    """Return whether a key of the settings is valid: a `*` stands for the number of an expert, and for nothing else."""
    return ANY_EXPERT not in key or _SETTING.fullmatch(key) is not None


def stores(name: str, key: str) -> bool:
    """Return whether a tensor called `key` may be stored under the name of a linear."""
    return key not in INPUT_TRANSFORM or expert_of(name) in (None, 0)


def expert_specs(spec: LayerSpec) -> dict[str, TensorSpec]:
    """Return the tensors of one projection of an expert, wherever they are stored; its bias is bfloat16."""
    specs = tensor_specs(spec)
    if "bias" in specs:
        specs["bias"] = replace(specs["bias"], dtypes=(BIAS_DTYPE,))
    return specs


def linear_specs(name: str, spec: LayerSpec) -> dict[str, TensorSpec]:
    """Return the tensors of the linear `name`, of an expert or not, wherever they are stored."""
    return tensor_specs(spec) if expert_of(name) is None else expert_specs(spec)


def stored_specs(name: str, spec: LayerSpec) -> dict[str, TensorSpec]:
    """Return the tensors stored under the name of a linear: without the input transform for experts other than 0."""
    return {key: want for key, want in linear_specs(name, spec).items() if stores(name, key)}


def stored_names(name: str, spec: LayerSpec) -> dict[str, str]:
    """Return the names under which the tensors of a linear are stored, by the tensors of `tensor_specs`.

    The input transform of an expert is stored with expert 0.
    """
    own, first = stored_specs(name, spec), first_expert(name)
    return {key: f"{name if key in own else first}.{key}" for key in tensor_specs(spec)}
