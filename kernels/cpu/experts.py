"""The experts of a mixture-of-experts layer on the CPU: repack them once, then compute them in one parallel region.

The op is declared here and implemented in the library (torch_ops.h). All experts of a projection lie in one packed
tensor, so that nothing in Python runs for each expert.
"""

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from bwla_kernels import gradients
from bwla_kernels.cpu.library import Isa, LayerStruct, load
from bwla_kernels.cpu.linear import (
    DTYPES,
    PACKED_TENSORS,
    PANEL_ROWS,
    can_implement,
    empty_huge,
    expect,
    layer_struct,
)
from bwla_kernels.cpu.linear import STATUS as LINEAR_STATUS
from bwla_kernels.errors import BackendError
from bwla_kernels.experts.spec import ACTIVATIONS, ExpertsSpec, expect_routing, stacked_specs
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import BIAS_DTYPE
from bwla_kernels.format.layer import to_compute_dtype
from torch import Tensor

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_SIZES = (
    ("int", "rotation_groups"), ("int", "n1"), ("int", "n2"), ("int", "rank"),
    ("int", "bits"), ("float", "clip"), ("int", "planes"),
)  # fmt: skip
_SIZE_ARGUMENTS = ", ".join(
    f"{kind} {which}_{name}" for which in ("gate_up", "down") for kind, name in _SIZES
)
_LIBRARY.define(
    "experts_cpu(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor packed_gate_up, Tensor packed_down, "
    "Tensor? bias_gate_up, Tensor? bias_down, int experts, int activation, float limit, float alpha, "
    f"{_SIZE_ARGUMENTS}) -> Tensor"
)

STATUS = {**LINEAR_STATUS, 1: "its sizes are invalid or an expert's number is too large"}


@dataclass(frozen=True)
class _Projection:
    """A projection for the library: the address of `struct`, and the bytes of all its packed parts."""

    struct: LayerStruct
    address: int
    parts: int
    size: int


@functools.lru_cache(maxsize=64)
def _projection(spec: LayerSpec, parts: int, isa: Isa | None) -> _Projection:
    struct = layer_struct(spec, isa)
    address = ctypes.addressof(struct)
    return _Projection(struct, address, parts, load().handle.bwla_experts_bytes(address, parts))


def _projections(spec: ExpertsSpec, isa: Isa | None) -> tuple[_Projection, _Projection]:
    """Return gate and up, as two parts for each expert, and down, as one."""
    part = replace(spec.gate_up, out_features=spec.intermediate_size)
    return _projection(part, 2 * spec.experts, isa), _projection(spec.down, spec.experts, isa)


def _check(status: int, spec: ExpertsSpec) -> None:
    if status:
        raise BackendError(f"the CPU kernel refused {spec}: {STATUS.get(status, f'status {status}')}")


def _pack(
    which: str, tensors: Mapping[str, Tensor], spec: LayerSpec, projection: _Projection, whole: ExpertsSpec
) -> Tensor:
    specs = {name: want for name, want in stacked_specs(whole.experts, spec).items() if name != "bias"}
    for name, want in specs.items():
        expect(f"{which}.{name}", tensors[name], want.dtypes[0], want.shape)
    tensors = to_compute_dtype(tensors)
    pointers = [tensors[name].data_ptr() if name in specs else None for name in PACKED_TENSORS]
    packed = empty_huge(projection.size)
    _check(
        load().handle.bwla_pack_experts(
            projection.address, projection.parts, *pointers, packed.data_ptr(), torch.get_num_threads()
        ),
        whole,
    )
    return packed


def pack(
    gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], spec: ExpertsSpec, isa: Isa | None = None
) -> tuple[Tensor, Tensor]:
    """Repack the stacked tensors of both projections, once, into the memory that the kernel reads.

    Args:
        gate_up, down: stacked tensors (see `experts.spec.stacked_specs`), contiguous, on the CPU; not modified. Biases
            are not packed, see `pack_biases`.
        spec: their sizes.
        isa: variant that will read them; by default the loaded one.

    Returns: uint8 tensors of gate and up, and of down.

    Raises:
        BackendError: a tensor does not fit.
    """
    first, second = _projections(spec, isa)
    return (
        _pack("gate_up", gate_up, spec.gate_up, first, spec),
        _pack("down", down, spec.down, second, spec),
    )


def pack_biases(
    gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], spec: ExpertsSpec
) -> dict[str, Tensor]:
    """Return the biases of those projections that have one, as the kernel reads them.

    Args:
        gate_up, down: stacked tensors, as for `pack`.
        spec: their sizes.

    Returns: `bias_gate_up` bfloat16 [E, 2, I padded to 64] and `bias_down` bfloat16 [E, H].

    Raises:
        BackendError: a bias does not fit.
    """
    biases = {}
    for which, tensors, side in (("gate_up", gate_up, spec.gate_up), ("down", down, spec.down)):
        if side.bias:
            want = stacked_specs(spec.experts, side)["bias"]
            expect(f"{which}.bias", tensors["bias"], want.dtypes[0], want.shape)
            biases[f"bias_{which}"] = tensors["bias"]
    if "bias_gate_up" in biases:
        parts = biases["bias_gate_up"].view(spec.experts, 2, spec.intermediate_size)
        padding = -spec.intermediate_size % PANEL_ROWS
        biases["bias_gate_up"] = torch.nn.functional.pad(parts, (0, padding)).contiguous()
    return biases


def experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    packed: tuple[Tensor, Tensor],
    spec: ExpertsSpec,
    isa: Isa | None = None,
    threads: int | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Compute the experts, in agreement with `experts.reference.binary_experts`; for tests: the op is faster to call.

    Args:
        x: [M, H] bfloat16, float16 or float32.
        topk_weights: float32 [M, top-k].
        topk_ids: int32 or int64 [M, top-k], negative for experts of another rank.
        packed: from `pack` with the same spec and variant.
        spec: the sizes.
        isa: variant; by default the loaded one.
        threads: maximum number of threads, by default torch's; negative: exactly that number.
        biases: from `pack_biases` with the same spec; None where no projection has one.

    Returns: [M, H] in the dtype of x. A token's result is bitwise independent of the number of threads and of the
        other tokens.

    Raises:
        BackendError: a tensor does not fit, or an id is not below the number of experts.
    """
    expect_routing(x, topk_weights, topk_ids, spec)
    first, second = _projections(spec, isa)
    expect("x", x, x.dtype if x.dtype in DTYPES else torch.float32, tuple(x.shape))
    expect("topk_weights", topk_weights, torch.float32, tuple(topk_ids.shape))
    expect(
        "topk_ids",
        topk_ids,
        torch.int64 if topk_ids.dtype == torch.int64 else torch.int32,
        tuple(topk_ids.shape),
    )
    for name, tensor, projection in zip(("gate_up", "down"), packed, (first, second), strict=True):
        expect(f"packed {name}", tensor, torch.uint8, (projection.size,))
    shapes = {
        "bias_gate_up": (spec.experts, 2, -(-spec.intermediate_size // PANEL_ROWS) * PANEL_ROWS),
        "bias_down": (spec.experts, spec.hidden_size),
    }
    biases = {} if biases is None else biases
    for name, tensor in biases.items():
        expect(name, tensor, BIAS_DTYPE, shapes[name])
    pointers = [
        biases[name].data_ptr() if side.bias else None
        for name, side in zip(shapes, (spec.gate_up, spec.down), strict=True)
    ]
    out = torch.empty_like(x)
    status = load().handle.bwla_experts(
        first.address, second.address, spec.experts, ACTIVATIONS.index(spec.activation), spec.limit, spec.alpha,
        packed[0].data_ptr(), packed[1].data_ptr(), *pointers, x.data_ptr(), x.shape[0], x.shape[1], DTYPES[x.dtype],
        topk_weights.data_ptr(), topk_ids.data_ptr(), topk_ids.element_size(), topk_ids.shape[1],
        out.data_ptr(), torch.get_num_threads() if threads is None else threads,
    )  # fmt: skip
    _check(status, spec)
    return out


def _experts_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


torch.library.register_fake("bwla::experts_cpu", _experts_fake, lib=_LIBRARY)
gradients.refuse_gradient(_LIBRARY, "experts_cpu", "experts are for inference only")


def _sizes(spec: LayerSpec) -> list[int | float]:
    return [getattr(spec, name) for _, name in _SIZES]


class CpuExperts:
    """Compute experts with the compiled table-lookup kernel on the CPU."""

    name = "cpu"

    def can_implement(self, spec: ExpertsSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether the kernel was built and covers the experts, and the reason."""
        if device.type != "cpu":
            return False, f"the compiled kernel runs on the CPU, not on {device}"
        able, reason = can_implement(spec.gate_up)
        return can_implement(spec.down) if able else (able, reason)

    def prepare(
        self, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], spec: ExpertsSpec
    ) -> dict[str, Tensor]:
        """Repack each projection into one tensor, and its bias, if it has one, into another."""
        packed_gate_up, packed_down = pack(gate_up, down, spec)
        packed = {"packed_gate_up": packed_gate_up, "packed_down": packed_down}
        return packed | pack_biases(gate_up, down, spec)

    def apply(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        tensors: Mapping[str, Tensor],
        spec: ExpertsSpec,
    ) -> Tensor:
        """Compute x [M, H] -> [M, H] in the dtype of x."""
        y: Tensor = torch.ops.bwla.experts_cpu.default(
            x,
            topk_weights.float().contiguous(),
            topk_ids.contiguous(),
            tensors["packed_gate_up"],
            tensors["packed_down"],
            tensors.get("bias_gate_up"),
            tensors.get("bias_down"),
            spec.experts,
            ACTIVATIONS.index(spec.activation),
            spec.limit,
            spec.alpha,
            *_sizes(spec.gate_up),
            *_sizes(spec.down),
        )
        return y
