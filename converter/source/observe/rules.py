"""What stays in 16 bits by rule, whatever the model.

The rules go by the names that transformers' models share. A rule that is missing here costs quality or is refused by
vLLM; one that is too wide only costs bits.
"""

import re
from collections.abc import Iterator, Sequence

from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import choose_rotation
from torch import nn

MIN_ROWS = 32
"""Rows below which the row scales, the rotation and the kernels' padding cost more than the weights take."""

UNUSED = "the model does not use it for text"
EXPERTS = "experts that are not stored by transformers' rules have no kernel"
OUTSIDE = "is outside the decoder layers"
JOINED = "transformers joins or divides the stored tensors"
NO_LINEAR = "is no nn.Linear in transformers"

_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"(^|\.)experts(\.|$)", EXPERTS),
    (
        r"(^|\.)(gate|router|\w*_router|shared_expert_gate|router_\w+)(\.|$)",
        "a router or gate decides by small differences",
    ),
    (r"(^|\.)kv_b_proj$", "vLLM multiplies it into other weights of the attention (MLA)"),
    (
        r"(^|\.)(in_proj_(a|b|ba)|f_a_proj|f_b_proj|b_proj)$",
        "decay and step size of linear attention accumulate errors over all tokens",
    ),
    (r"(^|\.)(dt_proj|x_proj)$", "step size and state of Mamba accumulate errors over all tokens"),
    (r"(^|\.)altup(\.|$)", "AltUp mixes the residual streams by small coefficients"),
)

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linears that vLLM stores as one: all of them are quantized, or none."""


def reason_by_name(path: str) -> str | None:
    """Return why the module at `path` in a decoder layer stays in 16 bits; None if it may be quantized."""
    return next((reason for pattern, reason in _PATTERNS if re.search(pattern, path)), None)


def reason_by_shape(out_features: int, in_features: int, preferred_rotation_groups: int) -> str | None:
    """Return why a linear of this shape stays in 16 bits; None if it may be quantized."""
    if out_features < MIN_ROWS:
        return f"has {out_features} rows, fewer than {MIN_ROWS}"
    try:
        choose_rotation(in_features, preferred_rotation_groups)
    except FormatError as problem:
        return str(problem).partition(": ")[0]
    return None


def fused_with(path: str, paths: Sequence[str]) -> Iterator[str]:
    """Yield those of `paths` that vLLM stores together with `path`."""
    parent, _, name = path.rpartition(".")
    for fused in FUSED:
        if name in fused:
            others = (f"{parent}.{other}" if parent else other for other in fused if other != name)
            yield from (other for other in others if other in paths)


def plain_modules(block: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the modules of a decoder layer that hold matrices but no linears, with the reason why they stay."""
    for path, module in block.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        matrices = any(parameter.dim() > 1 for parameter in parameters.values())
        divided = any(isinstance(child, nn.Linear) for child in module.modules())
        if path and matrices and not divided and not isinstance(module, nn.modules.conv._ConvNd):
            yield path, reason_by_name(path) or NO_LINEAR
