"""BWLA in transformers' registry of quantizers: `AutoModelForCausalLM.from_pretrained(OUT)` loads, and saves again.

Without it transformers only warns about an unknown quant_method and then starts from random weights. This module is
imported while transformers is, so everything else of ours is imported inside the methods.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "bwla"
BACKEND_VARIABLE = "BWLA_BACKEND"
"""Environment variable that forces a backend by name; "reference" is the definition itself."""


@register_quantization_config(QUANT_METHOD)
class BWLAHfConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """transformers' view of `quantization_config`: carried along as it is.

    Raises:
        FormatError: not a BWLA config of a version that is known.
    """

    def __init__(self, **config: Any) -> None:
        from bwla_kernels.format.schema import parse_config

        self.format = parse_config({"quant_method": QUANT_METHOD, **config})
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that was read."""
        return self.format.to_json()


@register_quantizer(QUANT_METHOD)
class BWLAHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `BWLALinear` where the checkpoint is quantized, and checks what is loaded before and after.

    Raises:
        FormatError: the checkpoint is damaged or does not fit its config.json; one sentence, before weights are read
            where their headers tell.
    """

    requires_calibration = True

    def update_tp_plan(self, config: Any) -> Any:
        """transformers' first question that names the model: check its folder before transformers opens a file."""
        from bwla_kernels.format.folder import check_folder

        folder = Path(getattr(config, "_name_or_path", "") or "/nowhere")
        if (folder / "config.json").is_file():
            check_folder(folder)
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from bwla_converter.hf.modules import check_files, replace_linears

        specs = check_files(model, Path(checkpoint_files[0]).parent) if checkpoint_files else None
        replace_linears(model, self.quantization_config.format, os.environ.get(BACKEND_VARIABLE), specs)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from bwla_converter.hf.modules import check_loaded

        check_loaded(model)
        return model

    def is_serializable(self) -> bool:
        """The stored tensors are the parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Signs have no gradient."""
        return False
