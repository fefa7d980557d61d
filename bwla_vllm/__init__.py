"""The vLLM plugin: loads and serves BWLA checkpoints through vLLM's stock model classes.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process it
starts (front, engine, workers).
"""

import logging


def register() -> None:
    """Tell vLLM that `quant_method: bwla` exists.

    Cheap (no kernels, no compressed-tensors), repeatable, and never raises: an exception here would end
    vLLM for every model, quantized or not. Whatever goes wrong is logged, and vLLM then reports bwla as an
    unknown quantization method.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from bwla_vllm.config import BWLAConfig

        register_quantization_config("bwla")(BWLAConfig)
    except Exception:
        logging.getLogger("vllm.bwla").exception(
            "The bwla plugin could not be registered; BWLA checkpoints cannot be served by this vLLM"
        )
