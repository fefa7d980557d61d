"""Replace the modules of a transformers model that a checkpoint quantizes by those of `modules`."""

from collections.abc import Iterable, Mapping

from bwla_converter.hf.expert_modules import divide_quantized_experts, quantized_linear
from bwla_converter.hf.modules import BWLAEmbedding, BWLAHead, BWLATiedHead
from bwla_converter.source.observe.names import StoredNames, tied_names
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import expert_of
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE, HeadSpec
from bwla_kernels.format.schema import BWLAFormat
from torch import nn
from transformers import PreTrainedModel


def module_paths(model: nn.Module, linears: Iterable[str]) -> dict[str, str]:
    """Return stored name -> path in `model`, of linears."""
    names = StoredNames(model) if isinstance(model, PreTrainedModel) else None
    weights = {name: f"{name}.weight" for name in linears}
    return {name: _path(name, weight, names) for name, weight in weights.items()}


def _path(name: str, weight: str, names: StoredNames | None) -> str:
    parameter, pattern = names.parameter(weight) if names else (weight, None)
    if pattern is None or expert_of(name) is None:
        return parameter.removesuffix(".weight")
    # transformers stacks the weights of all experts; the linears that replace them have their stored names.
    number_and_leaf = name.split(".")[-2:]
    return ".".join([parameter.rpartition(".")[0], *number_and_leaf])


def replace_linears(
    model: nn.Module,
    config: BWLAFormat,
    backend: str | None = None,
    specs: Mapping[str, LayerSpec] | None = None,
) -> None:
    """Replace, in place, all modules that the config quantizes by their BWLA counterparts on the meta device.

    Args:
        model: a transformers model, usually on the meta device.
        config: its quantization config.
        backend: name of the backend to use, see `BWLALinear`.
        specs: the specs from the checkpoint's headers, which must agree with the config and the model.

    Raises:
        FormatError: config, checkpoint and model do not agree.
    """
    if config.embedding is not None:
        _replace_embedding(model, backend)
    paths = module_paths(model, specs or ())
    divide_quantized_experts(model, paths)
    stored = {path: name for name, path in paths.items()}
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if path == HEAD_MODULE and config.lm_head is not None:
            head = BWLAHead(HeadSpec(module.out_features, module.in_features), backend)
            model.set_submodule(path, head)
            continue
        if specs is not None and path not in stored:
            continue  # the tower of a multimodal model may have linears of the same names
        name = stored.get(path, path)
        spec = config.layer_spec(name, module.out_features, module.in_features, module.bias is not None)
        if spec is None:
            continue
        if specs is not None and specs.get(name) != spec:
            raise FormatError(
                f"{name}: expected {spec} by config.json, found {specs.get(name)} in the safetensors headers: "
                "convert or download the model again"
            )
        model.set_submodule(path, quantized_linear(model, spec, name, path, backend))


def _replace_embedding(model: nn.Module, backend: str | None) -> None:
    """Replace the embedding, and a head that is tied to it.

    Raises:
        FormatError: the model has no such embedding, or one that computes more than a lookup and a factor.
    """
    module = dict(model.named_modules()).get(EMBEDDING_MODULE)
    factor = getattr(module, "scalar_embed_scale", 1.0)
    if not isinstance(module, nn.Embedding) or (type(module) is not nn.Embedding and factor == 1.0):
        raise FormatError(
            f"{EMBEDDING_MODULE}: expected an embedding, found {type(module).__name__}; the quantization_config does "
            "not belong to this model: convert or download the model again"
        )
    embedding = BWLAEmbedding(
        HeadSpec(module.num_embeddings, module.embedding_dim), module.weight.dtype, factor
    )
    model.set_submodule(EMBEDDING_MODULE, embedding)
    tied = tied_names(model)
    if tied.pop(f"{HEAD_MODULE}.weight", None) is not None:
        model.set_submodule(HEAD_MODULE, BWLATiedHead(embedding, backend))
        # Else transformers would tie weights that neither module has, now and in `tie_weights`.
        model.all_tied_weights_keys = model._tied_weights_keys = tied  # type: ignore[assignment]
