"""`BWLAConfig`: vLLM's quantization config of a BWLA checkpoint.

The format's schema is imported inside the methods: it imports compressed-tensors, which takes seconds, and every vLLM
process imports this module, even for models that are not quantized.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import expert_of
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE
from bwla_kernels.format.tensors import NOT_LISTED
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from bwla_vllm.errors import StartError, one_sentence
from bwla_vllm.observe import Observer, calls_to_check

if TYPE_CHECKING:
    from bwla_kernels.format.expert_checks import LayerExperts
    from bwla_kernels.format.schema import BWLAFormat

# vLLM attaches its log handlers to the logger "vllm"; loggers below it are formatted like vLLM's own.
logger = init_logger("vllm.bwla")

BACKEND_VARIABLE = "BWLA_BACKEND"
"""Environment variable that forces a backend by name; read once, when the config is created."""

USUAL_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "in_proj_qkvz": (("in_proj_qkv", "in_proj_z"),),
    "in_proj_ba": (("in_proj_b", "in_proj_a"),),
    "fused_qkv_a_proj": (("q_a_proj", "kv_a_proj_with_mqa"),),
    "w13": (("w1", "w3"), ("gate_proj", "up_proj")),
}
"""What vLLM's classes fuse, for those that do not say so in `packed_modules_mapping`."""

NO_CHECKPOINT = (
    "--quantization bwla needs a BWLA checkpoint, but the model's config.json has no quantization_config: "
    "convert the model first with `bwla-convert MODEL OUT` and serve OUT"
)


class BWLAConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM's view of a checkpoint's `quantization_config`.

    Attributes:
        format: the parsed config; None where vLLM created this object without a config (`--quantization bwla`
            on a model that is not quantized), in which case the methods raise a `StartError`.
        specs: full (unsharded) sizes of every quantized linear by checkpoint name, read from the
            safetensors headers in the front-end process; empty if the files are not downloaded yet.
        changed_sizes: what an override changes that the stored tensors do not fit, from `checks.changed_sizes`.
        backend: backend requested in the environment, or None for the fastest.
        observer: collects the summaries of the layers.
    """

    def __init__(self, quantization: "BWLAFormat | None" = None) -> None:
        super().__init__()
        self.format = quantization
        self.specs: dict[str, LayerSpec] = {}
        self.changed_sizes: str | None = None
        self.backend = os.environ.get(BACKEND_VARIABLE) or None
        self.observer = Observer(calls_to_check())
        self._start_checked = False
        self._experts: dict[str, LayerExperts] | None = None

    def __repr__(self) -> str:
        return f"BWLAConfig({self.format!r})"

    def get_name(self) -> str:
        """Return the name of the quantization method."""
        return "bwla"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of the activations between layers; inside a layer they are integers."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability that the kernels support, 8.0 (Ampere)."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: the config is part of config.json."""
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
        """Claim no checkpoints of other methods. The arguments differ between vLLM releases."""
        return

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Check the whole checkpoint by its headers, in the front-end process, before an engine starts.

        Args:
            model_name: folder or Hub id; for a Hub id, the local cache is checked if it is complete.
            hf_config: the model's transformers config with `--hf-overrides` applied, to compare the sizes with.
            revision: the Hub revision.

        Raises:
            StartError: not a BWLA checkpoint, or not a complete and consistent one.
        """
        from bwla_kernels import ops
        from vllm import __version__ as release

        from bwla_vllm import checks
        from bwla_vllm.compat.releases import outside_tested_range

        quantization = self.known_format()
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
                "The weights of %s are not downloaded yet: BWLA checks them while loading", model_name
            )
            return
        with one_sentence():
            self.specs = checks.check_checkpoint(Path(folder))
            if hf_config is not None:
                self.changed_sizes = checks.changed_sizes(Path(folder), hf_config, quantization.config)
        if quantization.tensors is None:
            logger.info("This checkpoint was %s", NOT_LISTED)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add the names that modules have inside vLLM to those in the checkpoint."""
        from bwla_kernels.format.schema import SETTINGS_BY_SUFFIX

        quantization = self.known_format()
        # Most prefixes end at a dot, and an entry of `ignore` may be the whole prefix ("model.visual").
        entries = [
            *quantization.ignore,
            *(f"{entry}." for entry in quantization.ignore if entry[:3] != "re:"),
        ]
        renamed = [name.removesuffix(".") for name in hf_to_vllm_mapper.apply_list(entries)]
        changes: dict[str, Any] = {"ignore": list(dict.fromkeys([*quantization.ignore, *renamed]))}
        for key in SETTINGS_BY_SUFFIX:
            setting = getattr(quantization, key)
            if isinstance(setting, dict):
                changes[key] = {**hf_to_vllm_mapper.apply_dict(dict(setting)), **setting}
        self.format = quantization.model_copy(update=changes)
        self.specs = {**_renamed(hf_to_vllm_mapper, self.specs), **self.specs}
        self._experts = None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Choose the quantization method of a layer.

        Args:
            layer: the module under construction.
            prefix: its name inside the model.

        Returns: `BWLALinearMethod` for a quantized linear, a method of `bwla_vllm.vocabulary` for a quantized head or
            embedding, `BWLAExpertsMethod` for one-bit experts, vLLM's unquantized method for another linear, None
            (vLLM's default) for everything else.

        Raises:
            StartError: a load format or an override that cannot work; a fused layer whose parts are quantized
                differently; a one-bit head; experts that no kernel computes; sizes that the tensor-parallel size does
                not divide.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from bwla_vllm.checks import check_kv_b_proj
        from bwla_vllm.compat.releases import is_moe_layer
        from bwla_vllm.linear import BWLALinearMethod
        from bwla_vllm.loading import BWLAScoreMethod

        quantization = self.known_format()
        self._check_start_once()
        if isinstance(layer, LinearBase):
            parts = self._quantized_parts(layer, prefix)
            if not parts:
                return (
                    BWLAScoreMethod(prefix)
                    if prefix.rpartition(".")[2] == "score"
                    else UnquantizedLinearMethod()
                )
            with one_sentence():
                check_kv_b_proj(parts)
            return BWLALinearMethod(quantization, prefix, parts, self.specs, self.backend, self.observer)
        if isinstance(layer, VocabParallelEmbedding) and (method := self._vocabulary_method(layer, prefix)):
            return method
        return self._experts_method(layer, prefix) if is_moe_layer(layer) else None

    def known_format(self) -> "BWLAFormat":
        """Return the parsed config.

        Raises:
            StartError: there is none, because the model is not a BWLA checkpoint.
        """
        if self.format is None:
            raise StartError(NO_CHECKPOINT)
        return self.format

    def _vocabulary_method(self, layer: Any, prefix: str) -> Any:
        """Return the method of a head or an embedding, or None where it is not quantized."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from bwla_vllm.vocabulary.head import BWLAEmbeddingMethod, BWLAHeadMethod, BWLATiedHeadMethod
        from bwla_vllm.vocabulary.planes_head import BWLAPlanesHeadMethod

        quantization = self.known_format()
        if isinstance(layer, ParallelLMHead):
            if quantization.is_quantized(HEAD_MODULE):  # some of vLLM's classes give their head no name
                return BWLAPlanesHeadMethod(quantization, self.backend, self.observer)
            if quantization.lm_head is not None:
                return BWLAHeadMethod(self.backend, self.observer)
            return BWLATiedHeadMethod() if quantization.embedding is not None and ties_head() else None
        # Some of vLLM's classes (Llama's) give their embedding no name.
        is_embedding = not prefix or prefix.rpartition(".")[2] == EMBEDDING_MODULE.rpartition(".")[2]
        if quantization.embedding is None or not is_embedding:
            return None
        return BWLAEmbeddingMethod(self.backend, self.observer, ties_head())

    def _check_start_once(self) -> None:
        """Check request and sharding before the first layer allocates: vLLM's own assertions do not name the layer."""
        from vllm import __version__ as release
        from vllm.config import get_current_vllm_config_or_none
        from vllm.distributed import get_tensor_model_parallel_world_size

        from bwla_vllm.checks import check_tensor_parallel
        from bwla_vllm.compat.compile_cache import reuse_compiled_graphs
        from bwla_vllm.compat.cpu_lora import skip_rows_without_adapter
        from bwla_vllm.loading import check_request
        from bwla_vllm.vocabulary.head import watch_vocabulary

        if not self._start_checked:
            config = get_current_vllm_config_or_none()
            check_request(config, self.known_format(), self.changed_sizes)
            parallel = None if config is None else config.parallel_config
            whole_experts = bool(getattr(parallel, "enable_expert_parallel", False))
            with one_sentence():
                check_tensor_parallel(self.specs, get_tensor_model_parallel_world_size(), whole_experts)
            watch_vocabulary(self.known_format(), ties_head())
            if config is not None:
                reuse_compiled_graphs(config, release)
                skip_rows_without_adapter(config, release)
            self._start_checked = True

    def _quantized_parts(self, layer: Any, prefix: str) -> tuple[str, ...]:
        """Return the checkpoint names of the linears that `layer` fuses (or its own name); () if unquantized."""
        stem, _, leaf = prefix.rpartition(".")
        candidates = [
            tuple(f"{stem}.{part}" if stem else part for part in leaves)
            for leaves in self._fused_leaves(leaf)
        ]
        stored = (parts for parts in candidates if any(part in self.specs for part in parts))
        quantized = (parts for parts in candidates if any(map(self.known_format().is_quantized, parts)))
        parts = next(stored, None) or next(quantized, ())
        with one_sentence():
            # N = 1 for all: the parts must agree in everything that describes the input transform.
            specs = [self.known_format().layer_spec(part, 1, layer.input_size) for part in parts]
            if any(spec != specs[0] for spec in specs):
                raise FormatError(_describe_mix(prefix, parts, specs))
        return parts

    def _fused_leaves(self, leaf: str) -> Iterator[tuple[str, ...]]:
        """Yield what the checkpoint may hold for a layer of vLLM called `leaf`, likeliest first.

        Some classes have no `packed_modules_mapping`, and some describe other files than those of this model: the file
        may hold the layer fused (GLM-4's gate_up_proj).
        """
        named = self.packed_modules_mapping.get(leaf)
        if named:
            yield tuple(named)
        yield (leaf,)
        yield from USUAL_PARTS.get(leaf, ())

    def _experts_method(self, layer: Any, prefix: str) -> Any:
        """Return the method of a mixture-of-experts layer, or None where its experts are in 16 bits."""
        from bwla_kernels.format.expert_checks import experts_of

        from bwla_vllm.moe.method import BWLAExpertsMethod
        from bwla_vllm.moe.select import experts_spec

        if self._experts is None:
            self._experts = experts_of(self.specs)
        with one_sentence():
            spec = experts_spec(self.known_format(), self._experts if self.specs else None, prefix, layer)
        if spec is None:
            return None
        return BWLAExpertsMethod(layer.moe_config, spec, prefix, self.backend, self.observer)


def _renamed(mapper: Any, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """Return `specs` by the names of vLLM's modules.

    The last part of the name of an expert's linear is kept: vLLM's mapper may have rules for stacked tensors of the
    same names, as for gpt-oss's `down_proj`.
    """
    renamed: dict[str, LayerSpec] = {}
    for name, spec in specs.items():
        for other in mapper.apply_list([name]):
            is_expert = expert_of(name) is not None
            renamed[f"{other.rpartition('.')[0]}.{name.rpartition('.')[2]}" if is_expert else other] = spec
    return renamed


def ties_head() -> bool:
    """Return whether the model that vLLM is building ties its head to the embedding; False outside an engine."""
    from vllm.config import get_current_vllm_config_or_none

    from bwla_vllm.loading import ties_embeddings

    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    return model is not None and ties_embeddings(model.hf_config)


def _describe_mix(prefix: str, parts: tuple[str, ...], specs: list[LayerSpec | None]) -> str:
    def describe(spec: LayerSpec | None) -> str:
        if spec is None:
            return "not quantized"
        sizes = f"rotation ({spec.rotation_groups}, {spec.n1}, {spec.n2})"
        if spec.grouped:
            sizes = f"groups of {spec.group_width} columns"
        return f"{sizes}, planes {spec.planes}, rank {spec.rank}, clip {spec.clip:g}"

    found = "; ".join(f"{part}: {describe(spec)}" for part, spec in zip(parts, specs, strict=True))
    return (
        f"{prefix}: vLLM computes {', '.join(part.rpartition('.')[2] for part in parts)} as one layer, so they "
        f"must be quantized identically, found {found}: convert the model again with equal settings for them"
    )
