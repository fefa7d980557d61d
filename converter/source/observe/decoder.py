"""Find the decoder in a model of any class: the list of decoder layers, and the modules around it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bwla_kernels.errors import SourceError
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

COUNTS = ("num_hidden_layers", "num_layers")
"""Settings with the number of decoder layers. LongCat's num_hidden_layers counts its attentions, two in each layer."""


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
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        raise SourceError(
            f"{source}: expected one embedding of token ids in {architecture}, found none, as where several models are "
            "in one: this model is not supported"
        ) from None
    outer = _outermost(model)
    config = outer.config.get_text_config()
    found = (_lists_of(outer, getattr(config, setting, None)) for setting in COUNTS)
    lists = next(filter(None, found), None)
    if lists is None:
        raise SourceError(
            f"{source}: expected a list of num_hidden_layers, {getattr(config, COUNTS[0], None)}, decoder layers in "
            f"{architecture}, found none, as where layers run several times: this model is not supported"
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


def _lists_of(model: PreTrainedModel, count: int | None) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of `count` modules in `model`, with their paths."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]


def _outermost(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside `model` that transformers calls its decoder, or the one without its head.

    `get_decoder` takes a module by its name `decoder`, which in some classes is the head (ModernBERT).
    """
    found: Any = model.get_decoder()
    if isinstance(found, PreTrainedModel):
        return found
    base: PreTrainedModel = model.base_model
    inner: Any = base.get_decoder() if base is not model else None
    return inner if isinstance(inner, PreTrainedModel) else base


def language_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost model inside `model` that has its head, or `model` if there is none.

    Some of the outer ones need images (BLIP-2), or do not say that they have a head (Nemotron-H Omni).
    """
    around = models_around(model, find_layers(model, type(model).__name__)[1])
    return next((inner for inner in reversed(around) if inner.get_output_embeddings() is not None), model)


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the head of `model`, or None if it has none."""
    head: nn.Module | None = language_model_of(model).get_output_embeddings()
    return head


def ties_embeddings(model: PreTrainedModel) -> bool:
    """Return whether config.json ties the head that a model lacks; False where it does not say (EmbeddingGemma 2)."""
    configs = (model.config, model.config.get_text_config())
    return bool(next((c.tie_word_embeddings for c in configs if hasattr(c, "tie_word_embeddings")), False))


@contextmanager
def without_tracebacks() -> Iterator[None]:
    """Have torch not log the traceback of what a model's code raises on fake tensors, which is reported in words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def why_it_does_not_run(cause: Exception) -> str:
    """Return in words what `cause`, raised by a model's code on tensors without values, says."""
    if isinstance(cause, DataDependentOutputException | DynamicOutputShapeException):
        return "code that takes decisions by the values of tensors"
    reason = " ".join(str(cause).split())
    return f"{type(cause).__name__} ({reason:.200})"


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
