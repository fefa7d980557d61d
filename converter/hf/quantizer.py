"""BWLA's quantizer for transformers, so that `from_pretrained` loads BWLA checkpoints and `save_pretrained` saves them.

Without it, transformers warns about an unknown quant_method and loads random weights. Everything that is only needed to
load a checkpoint is imported inside the methods.
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
"""Environment variable with the name of the backend to use, or "reference" for the reference implementation."""


@register_quantization_config(QUANT_METHOD)
class BWLAHfConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """BWLA's `quantization_config` as transformers holds it; saved back unchanged.

    Raises:
        FormatError: the config is invalid or of an unknown version.
    """

    def __init__(self, **config: Any) -> None:
        from bwla_kernels.format.schema import parse_config

        self.format = parse_config({"quant_method": QUANT_METHOD, **config})
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that was read."""
        return self.format.to_json()


@register_quantizer(QUANT_METHOD)
class BWLAHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the quantized linears by `BWLALinear`, and checks the checkpoint before and after it is loaded.

    Raises:
        FormatError: the checkpoint is damaged or does not fit its config.json. Raised before weights are read, except
            for invalid values.
    """

    requires_calibration = True

    def update_tp_plan(self, config: Any) -> Any:
        """Check the checkpoint folder, if there is one; leave `config` unchanged.

        This is the first hook that gets the model's path, before transformers opens any file.
        """
        from bwla_kernels.format.folder import check_folder

        folder = Path(getattr(config, "_name_or_path", "") or "/nowhere")
        if (folder / "config.json").is_file():
            check_folder(folder)
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from bwla_converter.hf.files import check_files
        from bwla_converter.hf.replace import replace_linears

        specs = check_files(model, Path(checkpoint_files[0]).parent) if checkpoint_files else None
        replace_linears(model, self.quantization_config.format, os.environ.get(BACKEND_VARIABLE), specs)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from bwla_converter.hf.files import cast_renamed, check_loaded

        check_loaded(model)
        cast_renamed(model, model.dtype if model.config.dtype is None else model.config.dtype)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return the conversions of stored tensors, without those that stack experts where these are in one bit."""
        from bwla_converter.hf.expert_modules import without_merging

        quantizes = self.quantization_config.format.experts is not None
        return without_merging(super().update_weight_conversions(weight_conversions), quantizes)

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[None, dict[str, str]]:
        """Describe the model as it is now in its `quantization_config`, which transformers saves with it.

        Returns: None, because the stored tensors are those of the model's state dict, and no metadata.
        """
        from bwla_converter.hf.files import describe_saved

        self.quantization_config.format = describe_saved(model, self.quantization_config.format)
        return None, {}

    def is_serializable(self) -> bool:
        """Return True: the stored tensors are the parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: signs have no gradient, but adapters do, since gradients pass through the quantized linears."""
        return True
