"""The GPU op of layers with scales for groups of columns, which `backend.TritonBackend` uses for them."""

from collections.abc import Mapping
from typing import Any

import torch
from bwla_kernels import gradients, reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec, pack_signs
from torch import Tensor

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = (
    "Tensor weight_chunks, Tensor weight_scale, Tensor? bias, int out_features, int rotation_groups, "
    "int group_width, int bits, float clip, int planes"
)
_LIBRARY.define(f"grouped_linear_triton(Tensor x, {_LAYER}) -> Tensor")

CHECK_TOKENS = (1, 17)
"""Numbers of tokens that are computed at load: one, and one tile with one token more."""

_checked: set[tuple[object, ...]] = set()


def _spec(*sizes: Any) -> LayerSpec:
    out_features, groups, width, bits, clip, planes = sizes
    columns = groups * width
    return LayerSpec(
        out_features, columns, groups, 1, width, bits=bits, clip=clip, planes=planes, grouped=True
    )


def _tensors(weight_chunks: Tensor, weight_scale: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    tensors = {"weight_chunks": weight_chunks, "weight_scale": weight_scale}
    return tensors if bias is None else {**tensors, "bias": bias}


def _linear(x: Tensor, *layer: Any) -> Tensor:
    from bwla_kernels.triton.grouped import run_grouped

    return run_grouped(x, _tensors(*layer[:3]), _spec(*layer[3:]))


def _linear_fake(x: Tensor, *layer: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], layer[3])


_LIBRARY.impl("grouped_linear_triton", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("bwla::grouped_linear_triton", _linear_fake, lib=_LIBRARY)


def _input_gradient(gradient: Tensor, *layer: Any) -> Tensor:
    from bwla_kernels.triton.layout import layer_layout, unpack_weights

    spec, packed = _spec(*layer[3:]), layer[0]
    rows = torch.arange(spec.out_features, device=packed.device)
    scales = layer[1].permute(2, 1, 0)  # [N_padded, P, G]

    def slab(part: slice) -> Tensor:
        signs = unpack_weights(packed, layer_layout(spec), rows[part])
        cells: Tensor = signs.unflatten(2, (spec.rotation_groups, -1)) * scales[rows[part]].unsqueeze(-1)
        return cells.sum(1).flatten(1)

    parts = gradients.row_slabs(spec.out_features, spec.planes * spec.in_features)
    return gradients.product_of_slabs(gradient, (slab(part) for part in parts), spec.in_features)


gradients.register_input_gradient(
    _LIBRARY, "grouped_linear_triton", _LAYER, _input_gradient, lambda *layer: layer[4] * layer[5]
)


def prepare_grouped(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Repack a layer, and check the kernels once for each kind of layer.

    Raises:
        BackendError: a kernel computes wrong numbers with this GPU and this Triton.
    """
    from bwla_kernels.triton.grouped import repack_grouped

    device = tensors["weight_packed"].device
    if device.type == "cuda":
        check_grouped(spec, torch.get_default_dtype(), device)
    return repack_grouped(tensors, spec)


def apply_grouped(x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """Compute x [..., K] -> [..., N] in the dtype of x."""
    y: Tensor = torch.ops.bwla.grouped_linear_triton.default(
        x,
        tensors["weight_chunks"],
        tensors["weight_scale"],
        tensors.get("bias"),
        spec.out_features,
        spec.rotation_groups,
        spec.group_width,
        spec.bits,
        spec.clip,
        spec.planes,
    )
    return y


def check_grouped(spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Compare the kernels with the reference implementation on a small layer of the same kind, once.

    Raises:
        BackendError: a value differs by more than rounding can explain.
    """
    import triton
    from bwla_kernels.triton.grouped import repack_grouped, run_grouped
    from bwla_kernels.triton.self_check import ADVICE

    groups = min(spec.rotation_groups, 3)
    small = _spec(40, groups, spec.group_width, spec.bits, spec.clip, spec.planes)
    kind = (small, dtype, device)
    if kind in _checked:
        return
    generator = torch.Generator().manual_seed(0)
    shape = (40,) if small.planes == 1 else (40, small.planes)
    layer = {
        "weight_packed": pack_signs(torch.randint(0, 2, (*shape, small.in_features), generator=generator)),
        "weight_scale": torch.rand(*shape, groups, generator=generator).half(),
    }
    on_device = {name: tensor.to(device) for name, tensor in layer.items()}
    prepared = repack_grouped(on_device, small)
    for tokens in CHECK_TOKENS:
        x = torch.randn(tokens, small.in_features, generator=generator).to(device, dtype)
        found, wanted = run_grouped(x, prepared, small).float(), reference.linear(x, on_device, small).float()
        if not torch.allclose(found, wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max().item()):
            raise BackendError(
                f"the Triton kernels compute wrong numbers for layers with scales for groups of {spec.group_width} "
                f"columns on {device} with Triton {triton.__version__}: {ADVICE}"
            )
    _checked.add(kind)
