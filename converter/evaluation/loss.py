"""The loss that quantization adds, measured with one decoder layer of a model in memory at a time."""

from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import DecoderLayer, LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.common.kept import kept_or_computed
from bwla_converter.common.weights import dequantized_weight
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.source.folder.cached import cached_file, digest_of_tokens
from bwla_converter.source.model import Source
from bwla_converter.training.divergence import chunk_logits
from bwla_kernels.format import LayerSpec, tensor_specs
from bwla_kernels.format.experts import stored_names
from bwla_kernels.format.files import read_tensors
from bwla_kernels.precision import fast_products
from torch import Tensor

SAMPLES_PER_BATCH = 4
"""Samples that run through a decoder layer at a time."""


class StoredModel:
    """The original model or its BWLA checkpoint, read tensor by tensor.

    Args:
        source: the original model.
        device: where to compute.
        names: names of all stored tensors.
        read: names of tensors -> the tensors by their names.
        specs: specs of the quantized linears, by module path; none in the original.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        names: Collection[str],
        read: Callable[[list[str]], Mapping[str, Tensor]],
        specs: Mapping[str, LayerSpec],
    ) -> None:
        self.source, self.names, self.read, self.specs = source, names, read, specs
        self.runner = LayerRunner(source, device, read=self.outside)

    def layer(self, index: int) -> DecoderLayer:
        """Build decoder layer `index` with its quantized linears."""
        prefix = self.source.structure.layer_name(index) + "."
        tensors = self.read([name for name in self.names if name.startswith(prefix)])
        plain = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in self.specs}
        layer = self.runner.layer(index, plain)
        for name, spec in self.specs.items():
            if name.startswith(prefix):
                own = {
                    key: tensors[stored].to(self.runner.device)
                    for key, stored in stored_names(name, spec).items()
                }
                layer.replace(name, BWLALinear.from_stored(name, spec, own, own.get("bias")))
        return layer

    def outside(self, name: str) -> Tensor:
        """Return a tensor outside the decoder layers, dequantized where it is quantized; a tied one's other."""
        module = name.removesuffix(".weight")
        if module in self.specs:
            spec = self.specs[module]
            stored = self.read([f"{module}.{key}" for key in tensor_specs(spec)])
            own = {key.removeprefix(f"{module}."): tensor for key, tensor in stored.items()}
            return dequantized_weight(own, spec, self.runner.dtype).to(self.runner.device)
        codes, scale = f"{name}_int8", f"{name}_scale"
        if codes in self.names:
            stored = {key: value.to(self.runner.device) for key, value in self.read([codes, scale]).items()}
            return stored[codes].to(self.runner.dtype) * stored[scale].to(self.runner.dtype).unsqueeze(1)
        if name in self.names:
            return self.read([name])[name]
        return self.outside(self.source.tied[name])


@torch.no_grad()
def measure_loss(source: Source, folder: Path, ids: Tensor, device: torch.device) -> float:
    """Return the mean increase of the negative log-likelihood of the next token, in nats per token.

    The original's negative log-likelihood is kept in the cache, for further conversions of the same model.

    Of a model without a head, return the mean cosine distance between a token's final hidden states in the original and
    in the checkpoint.

    Args:
        source: the original model.
        folder: its BWLA checkpoint, complete but for documents.
        ids: token ids [S, T].
        device: where to compute.
    """
    store, contents = ActivationStore(device=device), read_contents(folder)
    original = StoredModel(source, device, source.entries.keys(), source.read, {})
    quantized = StoredModel(
        source,
        device,
        contents.entries.keys(),
        lambda names: read_tensors(folder, contents.entries, names),
        contents.all_specs,
    )
    with fast_products(device):
        if not source.structure.has_head:
            return _cosine_distance(original, quantized, ids, store)
        parts = (digest_of_tokens(ids), device.type, version("bwla"))
        file = cached_file("likelihoods", ".json", source.folder, *parts)
        before = kept_or_computed(file, float, lambda: _negative_log_likelihood(original, ids, store))
        return _negative_log_likelihood(quantized, ids, store) - before


def _after_last_layer(model: StoredModel, ids: Tensor, store: ActivationStore) -> Samples:
    """Return the samples after the last decoder layer."""
    samples = Samples.embedded(model.runner, store, ids, SAMPLES_PER_BATCH)
    for index in range(model.source.num_layers):
        samples = samples.run(model.layer(index), store, SAMPLES_PER_BATCH)
    return samples


def _cosine_distance(
    original: StoredModel, quantized: StoredModel, ids: Tensor, store: ActivationStore
) -> float:
    """Return the mean over all tokens of one minus the cosine between the final hidden states of both models."""
    models = (original, quantized)
    hidden = [_after_last_layer(model, ids, store).hidden.split(1) for model in models]
    total = 0.0
    for parts in zip(*hidden, strict=True):
        states, others = (model.runner.outer.normed(part) for model, part in zip(models, parts, strict=True))
        total += float((1 - torch.cosine_similarity(states, others, dim=-1)).double().sum())
    for model in models:
        model.runner.outer.release()
    return total / ids.numel()


def _negative_log_likelihood(model: StoredModel, ids: Tensor, store: ActivationStore) -> float:
    """Return the mean over all predicted tokens, in nats."""
    runner, outer = model.runner, model.runner.outer
    samples = _after_last_layer(model, ids, store)
    total, tokens = 0.0, max(1, chunk_logits(runner.device.type) // outer.vocabulary)
    for sample, states in zip(ids.to(runner.device), samples.hidden.split(1), strict=True):
        rows, labels = outer.normed(states)[0, :-1].split(tokens), sample[1:].split(tokens)
        for part, targets in zip(rows, labels, strict=True):
            loss = torch.nn.functional.cross_entropy(outer.logits(part), targets, reduction="sum")
            total += float(loss.double())
    outer.release()
    return total / (ids[:, 1:].numel())
