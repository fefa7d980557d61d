"""Find the decoder in a model of any class: the list of decoder layers, and the modules around it."""

from bwla_kernels.errors import SourceError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def find_layers(model: PreTrainedModel, source: str) -> tuple[PreTrainedModel, nn.ModuleList, str]:
    """Return the decoder of `model`, the list of its layers, and the path of that list in `model`.

    Args:
        model: a model of any class.
        source: names the model's config.json in errors.

    Raises:
        SourceError: there is none.
    """
    architecture = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise SourceError(
            f"{source}: expected a model with a decoder only, found {architecture}, which has an encoder too: "
            "this model is not supported"
        )
    outer: PreTrainedModel = model.get_decoder()
    count = getattr(outer.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in outer.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise SourceError(
            f"{source}: expected a list of {count} decoder layers in {architecture}, found none: this model is not "
            "supported"
        )
    # Experts, or the modules of another kind in the model, may be as many.
    depth = min(path.count(".") for path, _ in lists)
    layers = max(
        (module for path, module in lists if path.count(".") == depth),
        key=lambda module: sum(weight.numel() for weight in module.parameters()),
    )
    kinds = {type(module) for module in layers.modules()}
    if nn.Linear not in kinds and Conv1D in kinds:
        raise SourceError(
            f"{source}: expected decoder layers of nn.Linear, found that {architecture} stores its linears as Conv1D: "
            "this model is not supported"
        )
    decoder = models_around(outer, layers)[-1]
    return decoder, layers, next(path for path, module in model.named_modules() if module is layers)


def models_around(model: PreTrainedModel, layers: nn.ModuleList) -> list[PreTrainedModel]:
    """Return the models inside `model`, itself included, that take token ids and run `layers`; the outermost first.

    `get_decoder` returns one of them, which may be a language model with its head (Llama 4, whose text class has the
    prefix of the class around it). A language model may also pass over the outer ones (OPT).
    """
    embedding = model.get_input_embeddings()
    return [
        module
        for module in model.modules()
        if module is model
        or (
            isinstance(module, PreTrainedModel)
            and {id(layers), id(embedding)} <= {id(inner) for inner in module.modules()}
        )
    ]
