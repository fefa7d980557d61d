"""The loss that quantization adds, measured with one decoder layer of a model in memory at a time."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import DecoderLayer, LayerRunner
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.source.model import Source
from bwla_converter.training.divergence import Head, chunk_logits
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.files import read_tensors
from bwla_kernels.precision import fast_products
from torch import Tensor

SAMPLES_PER_BATCH = 4
"""Samples that run through a decoder layer at a time."""


@dataclass(frozen=True)
class StoredModel:
    """The original model or its BWLA checkpoint, read tensor by tensor.

    Attributes:
        runner: builds the original's decoder layers.
        names: names of all stored tensors.
        read: names of tensors -> the tensors by their names.
        specs: specs of the quantized linears, by module path; none in the original.
    """

    runner: LayerRunner
    names: Collection[str]
    read: Callable[[list[str]], Mapping[str, Tensor]]
    specs: Mapping[str, LayerSpec] = field(default_factory=dict)

    def layer(self, index: int) -> DecoderLayer:
        """Build decoder layer `index` with its quantized linears."""
        prefix = self.runner.source.structure.layer_name(index) + "."
        tensors = self.read([name for name in self.names if name.startswith(prefix)])
        plain = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in self.specs}
        layer = self.runner.layer(index, plain)
        for name, spec in self.specs.items():
            if name.startswith(prefix):
                own = {
                    key.rpartition(".")[2]: value.to(self.runner.device)
                    for key, value in tensors.items()
                    if key.startswith(f"{name}.")
                }
                layer.replace(name, BWLALinear.from_stored(name, spec, own, own.get("bias")))
        return layer

    def matrix(self, weight: str) -> Tensor:
        """Return the embedding or the head [V, K] by the name of its weight, dequantized where it is stored in int8."""
        codes, scale = f"{weight}_int8", f"{weight}_scale"
        if codes not in self.names:
            return self.read([weight])[weight].to(self.runner.device, self.runner.dtype)
        stored = {key: value.to(self.runner.device) for key, value in self.read([codes, scale]).items()}
        return stored[codes].to(self.runner.dtype) * stored[scale].to(self.runner.dtype).unsqueeze(1)

    def head(self) -> Head:
        """Return the head, which may be the embedding."""
        source = self.runner.source
        name = source.head_weight
        is_stored = name in self.names or f"{name}_int8" in self.names
        weight = self.matrix(name if is_stored else source.embedding_weight)
        return Head(weight, getattr(self.runner.config, "final_logit_softcapping", None))


@torch.no_grad()
def measure_loss(source: Source, folder: Path, ids: Tensor, device: torch.device) -> float:
    """Return the mean increase of the negative log-likelihood of the next token, in nats per token.

    Args:
        source: the original model.
        folder: its BWLA checkpoint, complete but for documents.
        ids: token ids [S, T].
        device: where to compute.
    """
    store, runner, contents = (
        ActivationStore(device=device),
        LayerRunner(source, device),
        read_contents(folder),
    )
    original = StoredModel(runner, source.entries.keys(), source.read)
    quantized = StoredModel(
        runner,
        contents.entries.keys(),
        lambda names: read_tensors(folder, contents.entries, names),
        contents.specs,
    )
    with fast_products(device):
        return _negative_log_likelihood(quantized, ids, store) - _negative_log_likelihood(
            original, ids, store
        )


def _negative_log_likelihood(model: StoredModel, ids: Tensor, store: ActivationStore) -> float:
    """Return the mean over all predicted tokens, in nats."""
    runner = model.runner
    table, scale = model.matrix(runner.source.embedding_weight), runner.embedding_scale
    shape = torch.Size((*ids.shape, table.shape[1]))
    batches = ids.to(runner.device).split(SAMPLES_PER_BATCH)
    hidden = store.keep(shape, (torch.nn.functional.embedding(batch, table) * scale for batch in batches))
    del table
    for index in range(runner.source.num_layers):
        hidden = hidden.map(model.layer(index).run, SAMPLES_PER_BATCH)
    norm, final_norm = copy.deepcopy(runner.final_norm()), runner.source.structure.final_norm
    state = model.read([f"{final_norm}.{key}" for key in norm.state_dict()])
    norm.load_state_dict({name.removeprefix(f"{final_norm}."): value for name, value in state.items()})
    head, total = model.head(), 0.0
    tokens = max(1, chunk_logits(runner.device.type) // len(head.weight))
    for sample, states in zip(ids.to(runner.device), hidden.split(1), strict=True):
        rows, labels = norm(states)[0, :-1].split(tokens), sample[1:].split(tokens)
        for part, targets in zip(rows, labels, strict=True):
            loss = torch.nn.functional.cross_entropy(head.logits(part), targets, reduction="sum")
            total += float(loss.double())
    return total / (ids[:, 1:].numel())
