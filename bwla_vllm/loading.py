"""Check what vLLM was asked to do with a checkpoint (load format, overrides, other heads) before it reads weights."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bwla_kernels.format.head import HEAD_MODULE
from vllm import __version__ as release
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from bwla_vllm.compat.releases import experts_problem
from bwla_vllm.dummy import loads_dummy_weights
from bwla_vllm.errors import StartError

if TYPE_CHECKING:
    from bwla_kernels.format.schema import BWLAFormat

_REPACKED = (
    "holds weights as a vLLM process repacked them for its own machine, which cannot be checked; BWLA checkpoints load "
    "from the files that bwla-convert wrote"
)
_OTHER_FILES = "reads files other than the safetensors of a BWLA checkpoint"
_OTHER_METHOD = "belongs to another quantization method"

REFUSED_FORMATS: Mapping[str, str] = {
    "sharded_state": _REPACKED,
    "runai_streamer_sharded": _REPACKED,
    "tensorizer": _REPACKED,
    "ipc_cache": _REPACKED,
    "pt": _OTHER_FILES,
    "npcache": _OTHER_FILES,
    "mistral": _OTHER_FILES,
    "bitsandbytes": _OTHER_METHOD,
    "gguf": _OTHER_METHOD,
}
"""Load formats that cannot work, and why. A format that is not listed (a plugin's own) is left to vLLM."""

PACKAGES: Mapping[str, str] = {
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "runai_streamer": "runai_model_streamer",
}
"""Load formats that read a checkpoint as it is, and the module of the package that each needs."""

LISTED_EXPERTS = ("GraniteMoeHybridForCausalLM",)
"""Classes of vLLM that load experts by a list of their parameters' names
(`weight_utils.maybe_remap_moe_expert_param_name`)."""

GPU_ONLY = ("fastsafetensors", "instanttensor")
"""Those of them that vLLM implements for the memory of a GPU only."""


def check_load_format(name: str) -> None:
    """Check that vLLM can load a BWLA checkpoint with `--load-format name`.

    Raises:
        StartError: it cannot, it needs a GPU, or its package is missing or broken.
    """
    from vllm.platforms import current_platform

    if name in REFUSED_FORMATS:
        others = ", ".join(
            other for other in PACKAGES if current_platform.is_cuda_alike() or other not in GPU_ONLY
        )
        raise StartError(
            f"--load-format {name} {REFUSED_FORMATS[name]}: start vLLM without --load-format, or with auto, "
            f"safetensors, {others} or dummy"
        )
    if name in GPU_ONLY and not current_platform.is_cuda_alike():
        raise StartError(
            f"--load-format {name} reads weights into the memory of a GPU, and vLLM runs on "
            f"{current_platform.device_type} here: start vLLM without --load-format, or with runai_streamer"
        )
    if name in PACKAGES:
        module = PACKAGES[name]
        try:
            import_module(module)
        except Exception as cause:  # a missing dependency, or a library that does not fit this machine
            reason = " ".join(str(cause).split()) or type(cause).__name__
            raise StartError(
                f"--load-format {name} needs the Python module {module}, which cannot be imported ({reason:.200}): "
                f"run pip install {module.replace('_', '-')}, or start vLLM without --load-format"
            ) from None


def check_request(config: Any, quantization: "BWLAFormat", changed: str | None) -> None:
    """Check vLLM's whole configuration while it builds the model, which is before it reads weights.

    Args:
        config: vLLM's config; None outside an engine, where nothing is checked.
        quantization: the checkpoint's quantization config.
        changed: from `checks.changed_sizes`; dummy weights fit any size.

    Raises:
        StartError: the load format or an override asks for something that this checkpoint does not hold.
    """
    if config is None or config.model_config is None:
        return
    check_load_format(str(config.load_config.load_format))
    if quantization.experts is not None:
        problem = experts_problem(release)
        if problem is not None:
            raise StartError(f"experts: {problem}")
        check_expert_parallel(config.parallel_config)
        check_experts_class(config.model_config.hf_config)
        check_experts_adapters(config.lora_config)
    if loads_dummy_weights(config):
        return
    if changed is not None:
        raise StartError(changed)
    check_derived_head(config.model_config.hf_config, quantization)


def check_experts_class(hf_config: Any) -> None:
    """Check that vLLM's class of the model loads all tensors of one-bit experts.

    Raises:
        StartError: it looks their parameters up by a list of names, which has no rotations.
    """
    for name in getattr(hf_config, "architectures", None) or ():
        if name in LISTED_EXPERTS:
            raise StartError(
                f"experts: expected 16 bits, because vLLM's class {name} loads only weights and scales of experts, "
                "found one bit: convert the model again with --ignore experts"
            )


def check_experts_adapters(lora: Any) -> None:
    """Check that vLLM is not asked to put adapters on one-bit experts, which it does inside its own kernels.

    Args:
        lora: vLLM's config of adapters; None without them.

    Raises:
        StartError: it is.
    """
    targets = None if lora is None else getattr(lora, "target_modules", None)
    if lora is not None and (targets is None or any("experts" in name for name in targets)):
        raise StartError(
            "--enable-lora: expected adapters that leave one-bit experts alone, which vLLM cannot wrap, found that "
            "they may change every module: name the others, as in --lora-target-modules q_proj k_proj v_proj o_proj"
        )


def check_expert_parallel(parallel: Any) -> None:
    """Check that vLLM's options of expert parallelism work with one-bit experts.

    Args:
        parallel: vLLM's parallel config.

    Raises:
        StartError: an option under which a rank would not read expert 0, or would move experts between ranks.
    """
    if getattr(parallel, "enable_ep_weight_filter", False):
        raise StartError(
            "--enable-ep-weight-filter: expected every rank to read expert 0, which stores the input transform of all "
            "one-bit experts of a layer, found that ranks skip it: start vLLM without this option"
        )
    if getattr(parallel, "enable_eplb", False):
        raise StartError(
            "--enable-eplb: expected one-bit experts to stay on their rank, because their repacked tensors cannot be "
            "exchanged one expert at a time, found load balancing: start vLLM without this option"
        )


def derives_classifier(hf_config: Any) -> bool:
    """Return whether vLLM derives a classifier from rows of the language-model head, as for Qwen3-Reranker."""
    text = hf_config.get_text_config()
    return (
        getattr(hf_config, "classifier_from_token", getattr(text, "classifier_from_token", None)) is not None
    )


def ties_embeddings(hf_config: Any) -> bool:
    """Return whether a model ties its head to its embedding; not every text config inside another one says it."""
    found = (
        getattr(config, "tie_word_embeddings", None) for config in (hf_config.get_text_config(), hf_config)
    )
    return bool(next((value for value in found if value is not None), False))


def has_own_head(quantization: "BWLAFormat") -> bool:
    """Return whether the checkpoint has a quantized head that is not the embedding."""
    return quantization.lm_head is not None or quantization.is_quantized(HEAD_MODULE)


def check_derived_head(hf_config: Any, quantization: "BWLAFormat") -> None:
    """Check that a head from which vLLM derives a classifier is stored in 16 bits, or tied to the embedding.

    vLLM loads `lm_head.weight` into a layer without a quantization method.

    Raises:
        StartError: it is quantized.
    """
    tied = ties_embeddings(hf_config)
    if derives_classifier(hf_config) and has_own_head(quantization) and not tied:
        raise StartError(
            f"{HEAD_MODULE}: expected 16 bits, because vLLM derives the classifier from rows of the head "
            "(classifier_from_token), found a quantized head: convert the model again with --lm-head-bits 16"
        )


class BWLAScoreMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """Method of the unquantized `score` layer that vLLM adds for `--convert classify`, which must not stay unset.

    vLLM reports parameters that no file initialized, except for quantized models.

    Args:
        name: the layer's name, for messages.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Allocate the weight as vLLM does, filled with NaN."""
        super().create_weights(layer, *args, **kwargs)
        layer.weight.data.fill_(float("nan"))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that the weight was loaded.

        Raises:
            StartError: it was not.
        """
        if bool(layer.weight.data.isnan().any()):
            raise StartError(
                f"{self.name}.weight: not found in the checkpoint, which holds a language model without a classifier: "
                "remove --convert classify, or have vLLM derive the classifier from the head with --hf-overrides "
                "(classifier_from_token and method)"
            )
        super().process_weights_after_loading(layer)
