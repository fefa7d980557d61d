"""The BWLA checkpoint format, versions 1 and 2: names, shapes, dtypes and packing of the stored tensors.

`layer` describes one stored linear, `packing` its signs, `schema` the `quantization_config` of config.json, `tensors`
its list of the stored tensors, `folder` checks a whole checkpoint by its safetensors headers. docs/format.md describes
the format.
"""

from bwla_kernels.format.layer import LayerSpec, TensorSpec, tensor_specs, to_storage_dtype, validate_layer
from bwla_kernels.format.packing import pack_signs, unpack_signs

__all__ = [
    "LayerSpec",
    "TensorSpec",
    "pack_signs",
    "tensor_specs",
    "to_storage_dtype",
    "unpack_signs",
    "validate_layer",
]
