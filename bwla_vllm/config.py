"""`BWLAConfig`: what vLLM asks about a BWLA checkpoint before it builds a model.

The format's schema is imported inside the methods: it brings compressed-tensors, which takes seconds, and
this module is imported by every vLLM process, also for models that are not quantized.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bwla_kernels.errors import BackendError, FormatError
from bwla_kernels.format import LayerSpec
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from bwla_vllm.errors import StartError, one_sentence
from bwla_vllm.observe import Observer, calls_to_check

if TYPE_CHECKING:
    from bwla_kernels.format.schema import BWLAFormat

# vLLM's log handlers hang on the logger "vllm"; a name below it is shown like vLLM's own.
logger = init_logger("vllm.bwla")

BACKEND_VARIABLE = "BWLA_BACKEND"
"""Environment variable that forces a backend by name; read once, when the configuration is made."""

EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that the linears of an expert go by."""

NO_CHECKPOINT = (
    "--quantization bwla needs a BWLA checkpoint, but the model's config.json has no quantization_config: "
    "convert the model first with `bwla-convert MODEL OUT` and serve OUT"
)


class BWLAConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a BWLA checkpoint, as vLLM's hook.

    Attributes:
        format: the parsed config; None where vLLM made this object without a config (`--quantization bwla`
            on a model that is not quantized), in which case every question ends in a `StartError`.
        specs: full (unsharded) sizes of every quantized linear by checkpoint name, read from the
            safetensors headers in the front process; empty where the files are not there yet.
        backend: backend asked for in the environment, or None for the best one.
        observer: what the layers report to.
    """

    def __init__(self, quantization: "BWLAFormat | None" = None) -> None:
        super().__init__()
        self.format = quantization
        self.specs: dict[str, LayerSpec] = {}
        self.backend = os.environ.get(BACKEND_VARIABLE) or None
        self.observer = Observer(calls_to_check())
        self._sharding_checked = False

    def __repr__(self) -> str:
        return f"BWLAConfig({self.format!r})"

    def get_name(self) -> str:
        """The quantization method's name."""
        return "bwla"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the activations between layers; inside a layer they are integers."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the oldest GPU that the kernels are built for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the config lives in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BWLAConfig":
        """Parse config.json's `quantization_config`.

        Raises:
            StartError: an unknown version or key, or a value out of range.
        """
        from bwla_kernels.format.schema import parse_config

        with one_sentence():
            return cls(parse_config(config, "config.json: quantization_config"))

    @classmethod
    def override_quantization_method(cls, *args: Any, **kwargs: Any) -> None:
        """Claim no other method's checkpoints. Any arguments: vLLM has changed them between releases."""
        return

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Check the whole checkpoint by its headers, in the front process, before an engine starts.

        Args:
            model_name: folder or Hub id; of a Hub id, the local cache is checked if it is complete.
            hf_config: transformers' config of the model, to compare the sizes with.
            revision: the Hub revision.

        Raises:
            StartError: not a BWLA checkpoint, or not a complete and consistent one.
        """
        from bwla_kernels import ops
        from vllm import __version__ as release

        from bwla_vllm import checks
        from bwla_vllm.compat import outside_tested_range

        self.known_format()
        warning = outside_tested_range(release)
        if warning:
            logger.warning(warning)
        names = [backend.name for backend in ops.backends()]
        if self.backend is not None and self.backend not in names:
            raise StartError(
                f"{BACKEND_VARIABLE}: expected one of {', '.join(names)}, found {self.backend!r}: "
                "correct or unset the environment variable"
            )
        with one_sentence():
            folder = checks.local_folder(model_name, revision)
        if folder is None:
            logger.info(
                "The weights of %s are not on this machine yet: BWLA checks them while loading", model_name
            )
            return
        with one_sentence():
            self.specs = checks.check_checkpoint(Path(folder), hf_config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn the names that modules have inside vLLM, beside those in the checkpoint."""
        quantization = self.known_format()
        renamed = hf_to_vllm_mapper.apply_list(list(quantization.ignore))
        ignore = list(dict.fromkeys([*quantization.ignore, *renamed]))
        self.format = quantization.model_copy(update={"ignore": ignore})
        self.specs = {**hf_to_vllm_mapper.apply_dict(dict(self.specs)), **self.specs}

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Choose how a layer is computed.

        Args:
            layer: the module under construction.
            prefix: its name inside the model.

        Returns: `BWLALinearMethod` for a quantized linear, `BWLAHeadMethod` for an 8-bit head, vLLM's
            unquantized method for another linear, None (vLLM's default) for everything else.

        Raises:
            StartError: a fused layer whose parts are not quantized alike; one-bit experts or head; sizes that
                the tensor-parallel size does not divide.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from bwla_vllm.compat import is_moe_layer
        from bwla_vllm.head import BWLAHeadMethod
        from bwla_vllm.linear import BWLALinearMethod

        quantization = self.known_format()
        if isinstance(layer, LinearBase):
            self._check_sharding_once()
            parts = self._quantized_parts(layer, prefix)
            if not parts:
                return UnquantizedLinearMethod()
            return BWLALinearMethod(quantization, prefix, parts, self.specs, self.backend, self.observer)
        if isinstance(layer, ParallelLMHead) and quantization.lm_head is not None:
            return BWLAHeadMethod(self.backend, self.observer)
        refused = [prefix] if isinstance(layer, ParallelLMHead) else []
        if is_moe_layer(layer):
            refused = [f"{prefix}.0.{leaf}" for leaf in EXPERT_LEAVES]
        with one_sentence():
            self._refuse(refused)
        return None

    def known_format(self) -> "BWLAFormat":
        """The parsed config.

        Raises:
            StartError: there is none, because the model is not a BWLA checkpoint.
        """
        if self.format is None:
            raise StartError(NO_CHECKPOINT)
        return self.format

    def _check_sharding_once(self) -> None:
        """Before the first layer allocates: vLLM asserts on sizes that do not divide, without a name."""
        from vllm.distributed import get_tensor_model_parallel_world_size

        from bwla_vllm.checks import check_tensor_parallel

        if not self._sharding_checked:
            with one_sentence():
                check_tensor_parallel(self.specs, get_tensor_model_parallel_world_size())
            self._sharding_checked = True

    def _quantized_parts(self, layer: Any, prefix: str) -> tuple[str, ...]:
        """Checkpoint names of the linears that `layer` fuses (itself, if it fuses none); () if unquantized."""
        stem, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf) or [leaf]
        parts = tuple(f"{stem}.{part}" if stem else part for part in leaves)
        with one_sentence():
            # One output row stands for N: what must agree here is everything on the input side.
            specs = [self.known_format().layer_spec(part, 1, layer.input_size) for part in parts]
            if all(spec is None for spec in specs):
                return ()
            if any(spec != specs[0] for spec in specs):
                raise FormatError(_describe_mix(prefix, parts, specs))
        return parts

    def _refuse(self, names: list[str]) -> None:
        from bwla_kernels.format.schema import longest_suffix

        quantization = self.known_format()
        for name in names:
            if not quantization.is_ignored(name) and longest_suffix(quantization.rotation, name) is not None:
                raise BackendError(
                    f"{name}: this release of the plugin serves neither experts nor a language-model head in "
                    f"one bit: convert the model again with --ignore {name.rpartition('.')[2]}"
                )


def _describe_mix(prefix: str, parts: tuple[str, ...], specs: list[LayerSpec | None]) -> str:
    def say(spec: LayerSpec | None) -> str:
        if spec is None:
            return "not quantized"
        return (
            f"rotation ({spec.rotation_groups}, {spec.n1}, {spec.n2}), rank {spec.rank}, clip {spec.clip:g}"
        )

    found = "; ".join(f"{part}: {say(spec)}" for part, spec in zip(parts, specs, strict=True))
    return (
        f"{prefix}: vLLM computes {', '.join(part.rpartition('.')[2] for part in parts)} as one layer, so they "
        f"must be quantized alike, found {found}: convert the model again with equal settings for them"
    )
