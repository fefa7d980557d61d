"""Find the sizes of the one-bit experts that a layer of vLLM computes."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bwla_kernels.errors import FormatError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.spec import ALPHA, LIMIT, SWIGLU_OAI
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.expert_checks import LayerExperts
from bwla_kernels.format.experts import EXPERT_LEAVES

from bwla_vllm.checks import ADVICE

if TYPE_CHECKING:
    from bwla_kernels.format.schema import BWLAFormat

_LIMITS = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")

_LAYER = re.compile(r".*?\.\d+\.")
"""The beginning of the names in a decoder layer."""


def experts_spec(
    quantization: "BWLAFormat", stored: Mapping[str, LayerExperts] | None, prefix: str, layer: Any
) -> ExpertsSpec | None:
    """Return the sizes of all experts of a layer, not sharded, or None where they are in 16 bits.

    Args:
        quantization: the checkpoint's config.
        stored: the checkpoint's experts by path, from `experts_of`; None where its headers were not read.
        prefix: the layer's name inside vLLM.
        layer: vLLM's layer of routed experts.

    Raises:
        FormatError: the checkpoint stores the experts under a name that does not belong to one layer of the model, or
            no kernel computes them.
    """
    # In some releases vLLM's layer is a part of the module that the checkpoint names: `experts.routed_experts`.
    stem = prefix.removesuffix(".routed_experts")
    if stored is None:
        found = _described(quantization, stem, layer)
    else:
        module = _stored_module(quantization, stored, stem)
        found = None if module is None else _linears(module, stored[module])
    if found is None:
        return None
    number, gate, down = found
    activation, limit, alpha = activation_of(layer.moe_config)
    try:
        return ExpertsSpec(
            number, replace(gate, out_features=2 * gate.out_features), down, activation, limit, alpha
        )
    except FormatError as error:
        raise FormatError(f"{stem}: {error}") from None


def activation_of(moe: Any) -> tuple[str, float, float]:
    """Return the name in `ACTIVATIONS` of a layer's activation, its limit and its factor alpha.

    vLLM has two names for that of gpt-oss. `swigluoai` has gpt-oss's constants, whatever the config says;
    `swigluoai_uninterleave` has the config's, and is that of gpt-oss if its beta is 1. Whether rows of the gate and of
    up are interleaved does not matter here.

    Args:
        moe: vLLM's config of the layer.
    """
    if _takes_limits(moe):
        alpha = getattr(moe, "swiglu_alpha", None)
        return SWIGLU_OAI, float(moe.swiglu_limit), 1.0 if alpha is None else float(alpha)
    return _activation_name(moe), LIMIT, ALPHA


def unused_limits(moe: Any) -> list[str]:
    """Return the settings of vLLM's config of a layer that limit its activation but are not part of `activation_of`."""
    if _takes_limits(moe):
        return []
    return [name for name in _LIMITS if getattr(moe, name, None)]


def _takes_limits(moe: Any) -> bool:
    limit, beta = getattr(moe, "swiglu_limit", None), getattr(moe, "swiglu_beta", None)
    return _activation_name(moe) == f"{SWIGLU_OAI}_uninterleave" and limit is not None and beta == 1.0


def _activation_name(moe: Any) -> str:
    return str(getattr(moe.activation, "value", moe.activation))


def _linears(module: str, experts: LayerExperts) -> tuple[int, LayerSpec, LayerSpec]:
    """Return the number of stored experts, and the sizes of gate and down of the first."""
    first = experts.get(0, {})
    for gate, up, down in EXPERT_LEAVES:
        if first.keys() == {gate, up, down}:
            return len(experts), first[gate], first[down]
    wanted = " or ".join(", ".join(leaves) for leaves in EXPERT_LEAVES)
    raise FormatError(
        f"{module}.0: expected the one-bit linears {wanted}, found {', '.join(first) or 'none'}; {ADVICE}"
    )


def _stored_module(quantization: "BWLAFormat", stored: Mapping[str, LayerExperts], stem: str) -> str | None:
    """Return the path of the experts in the checkpoint; None where the layer's experts are in 16 bits.

    Classes of vLLM may call the module around the experts differently than the files, and rename it while they load.
    """
    if stem in stored:
        return stem
    if all(quantization.is_ignored(f"{stem}.0.{leaf}") for leaves in EXPERT_LEAVES for leaf in leaves):
        return None
    decoder_layer = _LAYER.match(f"{stem}.")
    others = [module for module in stored if decoder_layer and module.startswith(decoder_layer[0])]
    if len(others) > 1:
        raise FormatError(
            f"{stem}: expected the checkpoint to store these experts under this name, or one group of experts in this "
            f"decoder layer, found {', '.join(others)}; {ADVICE}"
        )
    return others[0] if others else None


def _described(quantization: "BWLAFormat", stem: str, layer: Any) -> tuple[int, LayerSpec, LayerSpec] | None:
    """Return the number of experts, gate and down as config.json describes them, with the sizes of the model."""
    if quantization.experts is None:
        return None
    moe = layer.moe_config
    inner = moe.intermediate_size_per_partition * moe.moe_parallel_config.tp_size
    for leaves in EXPERT_LEAVES:
        bias = bool(getattr(moe, "has_bias", False))
        gate = quantization.layer_spec(f"{stem}.0.{leaves[0]}", inner, moe.hidden_dim, bias)
        down = quantization.layer_spec(f"{stem}.0.{leaves[2]}", moe.hidden_dim, inner, bias)
        if gate is not None and down is not None:
            return int(moe.num_logical_experts), gate, down
    return None
