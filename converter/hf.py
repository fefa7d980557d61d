"""BWLA in transformers: after `import bwla_converter.hf`, `AutoModelForCausalLM.from_pretrained(OUT)` works.

transformers only warns about an unknown quant_method and then starts from random weights, so the quantizer
is registered through its public registry.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bwla_kernels import ops, reference
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec, TensorSpec, tensor_specs, validate_layer
from bwla_kernels.format.folder import check_folder
from bwla_kernels.format.head import HEAD_MODULE, HeadSpec, head_tensor_specs, validate_head
from bwla_kernels.format.schema import QUANT_METHOD, parse_config
from bwla_kernels.head import head_reference
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

BACKEND_VARIABLE = "BWLA_BACKEND"
REFERENCE = "reference"


class _Stored(nn.Module):
    """A module whose parameters are stored tensors, so that it saves back unchanged.

    What the backend made of them is kept beside them and made anew when the module moves.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        for key, want in specs.items():
            dtype = torch.get_default_dtype() if key == "bias" else want.dtypes[0]
            empty = torch.empty(want.shape, dtype=dtype, device="meta")
            self.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        self._prepared: tuple[torch.device, Any, dict[str, Tensor]] | None = None

    def stored(self) -> dict[str, Tensor]:
        """The tensors by their names in the format."""
        return {key: param.data for key, param in self.named_parameters()}

    def prepared(
        self, spec: Any, device: torch.device, select: Callable[[], Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        """The backend that `select` chooses, and what it made of the stored tensors."""
        if self._prepared is None or self._prepared[0] != device:
            backend = select()
            self._prepared = (device, backend, backend.prepare(self.stored(), spec))
        return self._prepared[1:]


class BWLALinear(_Stored):
    """A linear in the stored format, computed by the best backend for its device.

    Args:
        spec: the layer.
        name: its module path, for messages.
        backend: a backend's name, "reference" for the definition itself, None for the best.
    """

    def __init__(self, spec: LayerSpec, name: str, backend: str | None = None) -> None:
        super().__init__(tensor_specs(spec))
        self.spec, self.name, self.wanted = spec, name, backend
        self.in_features, self.out_features = spec.in_features, spec.out_features

    @classmethod
    def from_stored(
        cls, name: str, spec: LayerSpec, tensors: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> "BWLALinear":
        """A linear of given tensors, as the format stores them; `bias` [N] is its bias, whatever `spec` says."""
        given = {key: tensor for key, tensor in tensors.items() if key != "bias"}
        if bias is not None:
            given["bias"] = bias
        linear = cls(replace(spec, bias=bias is not None), name)
        for key, tensor in given.items():
            setattr(linear, key, nn.Parameter(tensor, requires_grad=False))
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        if self.wanted == REFERENCE:
            return reference.linear(x, self.stored(), self.spec)
        backend, tensors = self.prepared(
            self.spec, x.device, lambda: ops.select_backend(self.spec, x.device, self.wanted)[0]
        )
        y: Tensor = backend.apply(x, tensors, self.spec)
        return y

    def extra_repr(self) -> str:
        return str(self.spec)


class BWLAHead(_Stored):
    """The 8-bit language-model head, computed by the best backend for its device.

    Args:
        spec: its sizes.
        backend: a backend's name, "reference" for the definition, None for the best.
    """

    def __init__(self, spec: HeadSpec, backend: str | None = None) -> None:
        super().__init__(head_tensor_specs(spec))
        self.spec, self.wanted = spec, backend
        self.in_features, self.out_features = spec.in_features, spec.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., V] in the dtype of x."""
        if self.wanted == REFERENCE:
            return head_reference(x, **self.stored())
        backend, tensors = self.prepared(
            self.spec, x.device, lambda: ops.select_head_backend(self.spec, x.device, self.wanted)[0]
        )
        y: Tensor = backend.apply(x, tensors, self.spec)
        return y

    def extra_repr(self) -> str:
        return str(self.spec)


@register_quantization_config(QUANT_METHOD)
class BWLAHfConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """transformers' view of `quantization_config`: carried along as it is."""

    def __init__(self, **config: Any) -> None:
        self.format = parse_config({"quant_method": QUANT_METHOD, **config})
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that was read."""
        return self.format.to_json()


@register_quantizer(QUANT_METHOD)
class BWLAHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `BWLALinear` where the checkpoint is quantized, and checks what was loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        specs: Mapping[str, LayerSpec] | None = None
        if checkpoint_files:
            specs = check_folder(Path(checkpoint_files[0]).parent)
        replace_linears(model, self.quantization_config, os.environ.get(BACKEND_VARIABLE), specs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, BWLALinear):
                validate_layer(name, module.stored(), module.spec)
            elif isinstance(module, BWLAHead):
                validate_head(module.stored(), module.spec)
        return model

    def is_serializable(self) -> bool:
        """The stored tensors are the parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Signs have no gradient."""
        return False


def replace_linears(
    model: nn.Module,
    config: BWLAHfConfig,
    backend: str | None = None,
    specs: Mapping[str, LayerSpec] | None = None,
) -> None:
    """Replace, in place, every `nn.Linear` that the config quantizes by an empty `BWLALinear`.

    Args:
        model: a transformers model, usually on the meta device.
        config: its quantization config.
        backend: forced backend, see `BWLALinear`.
        specs: the specs that the checkpoint's headers gave, which must agree with the model's sizes.

    Raises:
        FormatError: config, checkpoint and model contradict each other.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if name == HEAD_MODULE and config.format.lm_head is not None:
            head = BWLAHead(HeadSpec(module.out_features, module.in_features), backend)
            model.set_submodule(name, head)
            continue
        spec = config.format.layer_spec(
            name, module.out_features, module.in_features, module.bias is not None
        )
        if spec is None:
            continue
        if specs is not None and specs.get(name) != spec:
            raise FormatError(
                f"{name}: config.json describes {spec}, the safetensors headers {specs.get(name)}: "
                "convert or download the model again"
            )
        model.set_submodule(name, BWLALinear(spec, name, backend))
