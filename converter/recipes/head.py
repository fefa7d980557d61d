"""The cost of a head in binary planes, which recipes `fast` and `best` quantize at their end."""

from bwla_converter.quantize.experts import CHUNK_ROWS
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.recipes.fast import binarization_compute, quantize_group_bytes
from bwla_converter.recipes.workload import WORKSPACE_BYTES, ComputeEstimate, GroupShape, MemoryEstimate
from bwla_kernels.format import LayerSpec


def head_cost(spec: LayerSpec | None, device: str) -> tuple[list[MemoryEstimate], ComputeEstimate]:
    """Estimate the memory and the work of quantizing the head; none for one in 8 or 16 bits."""
    if spec is None:
        return [], ComputeEstimate()
    shape = GroupShape(spec.out_features, spec.in_features, spec.planes)
    chunk = GroupShape(min(spec.out_features, CHUNK_ROWS), spec.in_features, spec.planes)
    held = 2 * shape.weights + spec.planes * shape.weights // 8
    memory = MemoryEstimate(held + quantize_group_bytes(chunk, device) + WORKSPACE_BYTES, "the head")
    return [memory], binarization_compute(shape, FastOptions().efforts, device)
