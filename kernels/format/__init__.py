"""The BWLA checkpoint format, version 1: the one place that knows names, shapes, dtypes and packing.

`layer` describes one stored linear, `packing` its signs, `schema` the `quantization_config` of
config.json, `folder` checks a whole checkpoint by its safetensors headers.
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
