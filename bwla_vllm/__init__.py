"""vLLM plugin that loads and serves BWLA checkpoints through vLLM's stock model classes (gpt-oss: a subclass).

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process that
it starts (front end, engine, workers).
"""

import logging


def register() -> None:
    """Register `quant_method: bwla` with vLLM.

    Cheap (imports neither kernels nor compressed-tensors), repeatable, and never raises: an exception here would stop
    vLLM for every model, quantized or not. Errors are logged, and vLLM then reports bwla as an unknown quantization
    method.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.models import ModelRegistry

        from bwla_vllm.config import BWLAConfig

        register_quantization_config("bwla")(BWLAConfig)
        # By name: vLLM imports the class when it serves such a model.
        ModelRegistry.register_model("GptOssForCausalLM", "bwla_vllm.moe.gpt_oss:GptOssForCausalLM")
    except Exception:
        logging.getLogger("vllm.bwla").exception(
            "The bwla plugin could not be registered; BWLA checkpoints cannot be served by this vLLM"
        )
