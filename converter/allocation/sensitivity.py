"""How much each input group's quantization error changes the model's output, from one backward pass.

For small errors dy of a linear's outputs, the KL divergence of the next-token distribution from the original's is half
their Fisher form: E[(g^T dy)^2] / 2, where g is the gradient of the log-likelihood of labels that are drawn from the
model's own distribution. Errors of different outputs and of different tokens are taken to be uncorrelated. Labels
from the text would give the empirical Fisher information, which also counts how wrong the original model is.

A model without a head, whose embeddings are compared by cosine, gets the cosine distance of the final hidden states
instead of the divergence. It is half the squared change of the normalized states, so g is the gradient along a random
direction of each token (Hutchinson's estimator), and all else is the same.

GPTQ's error feedback shapes the error of a row: with H = L L^T in the rotated basis, it is e diag(L) L^-1, where the
entries of e are the independent rounding errors of the columns. Their variance in units of the row's mean square
depends on the number of planes alone, see `loss`.

The model runs one decoder layer at a time: forwards once, keeping each layer's inputs, then backwards, each layer
computed again from its inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bwla_converter.calibration.activations import Activations, ActivationStore
from bwla_converter.calibration.layer_runner import Batch, DecoderLayer, LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.quantize.group import group_generator
from bwla_converter.quantize.moments import add_gram, rotate_hessian
from bwla_converter.quantize.okt.rotation import random_orthogonal
from bwla_converter.recipes.measurements import sensitivity_tokens
from bwla_converter.source.model import Source
from bwla_converter.training.divergence import sampled_direction_gradient, sampled_label_gradient
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import expert_of
from bwla_kernels.precision import fast_products
from torch import Tensor, nn

SAMPLES_PER_BATCH = 2
"""Samples that run through a decoder layer at a time, forwards and backwards."""

SharedGradients = dict[Any, list[Tensor]]
"""Gradients of a batch's shared states, see `layer_runner.Shared`."""

DAMPING = 0.01
"""Added to the diagonal of Hessians, in units of its mean, as `fast` does."""


@dataclass(frozen=True)
class Sensitivity:
    """How much the loss of the model depends on an input group, in the unit `Structure.loss_unit`.

    Attributes:
        weights: increase of the loss per unit of rounding-error variance of the rotated weights, in units of the mean
            square of each row, with error feedback.
        inputs: the same for independent errors of the rotated inputs, in units of each token's mean square.
    """

    weights: float
    inputs: float


def num_samples(specs: Mapping[str, LayerSpec], sequence_length: int) -> int:
    """Return how many calibration samples the pass runs on, if there are so many."""
    columns = max(spec.in_features for spec in specs.values())
    return -(-sensitivity_tokens(columns) // sequence_length)


def measure_sensitivities(
    source: Source,
    specs: Mapping[str, LayerSpec],
    ids: Tensor,
    seed: int,
    store: ActivationStore,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Sensitivity]:
    """Measure the sensitivity of every input group.

    Holds one decoder layer, and of the input groups of the layer two matrices [K, K] each. The inputs of all decoder
    layers are kept in `store`.

    Args:
        source: the original model.
        specs: spec of every linear to quantize.
        ids: token ids of calibration samples [S, T].
        seed: seed of the labels or directions and of the rotations.
        store: where the inputs are kept, and the device that computes.
        on_layer: called after each layer of the forward pass and of the backward pass.

    Returns: first linear of each input group -> its sensitivity.
    """
    runner = LayerRunner(source, store.device)
    inputs: list[Samples] = []
    samples = Samples.embedded(runner, store, ids, SAMPLES_PER_BATCH)
    for index in range(source.num_layers):
        inputs.append(samples)
        layer = _layer(runner, index)
        with torch.no_grad(), fast_products(store.device):
            samples = samples.run(layer, store, SAMPLES_PER_BATCH)
        on_layer()
    with fast_products(store.device):
        gradient = _output_gradient(runner, samples.hidden, torch.Generator().manual_seed(seed))
    found: dict[str, Sensitivity] = {}
    of_shared: list[SharedGradients] = [{} for _ in ids.split(SAMPLES_PER_BATCH)]
    for index in reversed(range(source.num_layers)):
        layer = _layer(runner, index)
        groups = [[name for name in names if name in specs] for _, names in source.groups_of_layer(index)]
        moments = [GradientMoments(layer, names, specs) for names in groups if names]
        parts = zip(inputs.pop().split(SAMPLES_PER_BATCH), gradient.split(SAMPLES_PER_BATCH), strict=True)
        with fast_products(store.device), watched(moments):
            found_parts = (_backward(layer, *part, of) for part, of in zip(parts, of_shared, strict=True))
            gradient = store.keep(gradient.shape, found_parts)
        found |= {collected.names[0]: collected.sensitivity(seed, ids.numel()) for collected in moments}
        on_layer()
    return {name: found[name] for name in specs if name in found}


def _layer(runner: LayerRunner, index: int) -> DecoderLayer:
    return runner.layer(index, runner.source.read(runner.source.names_of_layer(index)))


def _output_gradient(runner: LayerRunner, hidden: Activations, generator: torch.Generator) -> Activations:
    """Return the gradient with respect to the last layer's outputs [S, T, hidden], see the module's description."""
    outer, has_head = runner.outer, runner.source.structure.has_head

    def gradient_of_normed(normed: Tensor) -> Tensor:
        if not has_head:
            return sampled_direction_gradient(normed, generator)
        return sampled_label_gradient(normed, outer.logits, outer.vocabulary, generator)

    def gradient_of(part: Tensor) -> Tensor:
        leaf = part.detach().requires_grad_(True)
        normed = outer.normed(leaf)
        normed.backward(gradient_of_normed(normed.detach()))
        assert leaf.grad is not None
        return leaf.grad

    gradient = hidden.map(gradient_of, 1)
    outer.release()
    return gradient


def _backward(layer: DecoderLayer, batch: Batch, gradient: Tensor, of_shared: SharedGradients) -> Tensor:
    """Return the gradient with respect to the layer's inputs, given that with respect to its outputs.

    Args:
        layer: the layer.
        batch: its inputs.
        gradient: gradient of its outputs.
        of_shared: gradients of the states that this layer or earlier ones left for the layers after it; changed into
            those of the states that the layer reads.
    """
    leaf = batch.hidden.detach().requires_grad_(True)
    shared = {
        key: tuple(part.detach().requires_grad_(True) for part in parts)
        for key, parts in batch.shared.items()
    }
    outputs, left = layer.run_sharing(Batch(leaf, batch.ids, shared))
    tensors, gradients = [outputs], [gradient]
    for key in left.keys() & of_shared.keys():
        tensors += left[key]
        gradients += of_shared.pop(key)
    torch.autograd.backward(tensors, gradients)
    for key, parts in shared.items():
        found = [part.grad if part.grad is not None else torch.zeros_like(part) for part in parts]
        before = of_shared.get(key, found)
        of_shared[key] = found if before is found else [a + b for a, b in zip(before, found, strict=True)]
    assert leaf.grad is not None
    return leaf.grad


class GradientMoments:
    """Second moments of an input group's inputs, plain and weighted by the gradients of its outputs.

    Of the linears of experts, each expert's see the tokens that the router sends to it.

    Args:
        layer: the decoder layer.
        names: full names of the group's linears.
        specs: specs of at least these linears.
    """

    def __init__(self, layer: DecoderLayer, names: Sequence[str], specs: Mapping[str, LayerSpec]) -> None:
        self.names, self.spec = names, specs[names[0]]
        first = layer.linear(names[0]).weight
        assert isinstance(first, Tensor)
        columns = self.spec.in_features
        self.gram = torch.zeros(columns, columns, device=first.device)
        self.weighted_gram = torch.zeros_like(self.gram)
        self.inputs = 0
        by_expert: dict[int | None, dict[str, nn.Module]] = {}
        for name in names:
            by_expert.setdefault(expert_of(name), {})[name] = layer.linear(name)
        self._readers = list(by_expert.values())

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register the hooks that collect the moments while the layer runs forwards and backwards."""
        for linears in self._readers:
            yield from self._hooks_of(linears)

    def _hooks_of(self, linears: Mapping[str, nn.Module]) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register the hooks of linears that read the same tokens."""
        pending: dict[str, Tensor] = {}
        inputs: list[Tensor] = []
        names = list(linears)

        def hook_of(
            name: str, mean_squares: Tensor
        ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def gradient_known(gradient: Tensor) -> None:
                pending[name] = gradient.flatten(0, -2).float().square() @ mean_squares
                if len(pending) == len(names):
                    self.add(inputs.pop(), torch.stack([pending.pop(other) for other in names]).sum(0))

            def forward_done(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if name == names[0]:
                    inputs[:] = [args[0].detach().flatten(0, -2).float()]
                output.register_hook(gradient_known)

            return forward_done

        for name, linear in linears.items():
            assert isinstance(linear.weight, Tensor)
            yield linear.register_forward_hook(hook_of(name, linear.weight.square().mean(1)))

    def add(self, inputs: Tensor, token_weights: Tensor) -> None:
        """Add a batch of tokens.

        Args:
            inputs: [M, K].
            token_weights: sum over the group's rows of squared gradient times mean square, at least 0, [M].
        """
        add_gram(self.gram, inputs)
        add_gram(self.weighted_gram, inputs * token_weights.sqrt().unsqueeze(1))
        self.inputs += len(inputs)

    def sensitivity(self, seed: int, tokens: int) -> Sensitivity:
        """Return the group's sensitivity, with a random rotation of the sizes of its spec.

        Args:
            seed: seed of the rotation.
            tokens: number of tokens that ran through the model.

        Inputs that are always zero, or whose outputs have no effect, have none: their errors change nothing.
        """
        if not self.gram.any() or not self.weighted_gram.any():
            return Sensitivity(0.0, 0.0)
        generator, groups = group_generator(seed, self.names), self.spec.rotation_groups
        left, right = (
            random_orthogonal(groups, order, generator).to(self.gram.device)
            for order in (self.spec.n1, self.spec.n2)
        )
        gram = rotate_hessian(self.gram / max(self.inputs, 1), left, right)
        weighted = rotate_hessian(self.weighted_gram / max(tokens, 1), left, right)
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        # As in `quantize.fast`, only the factorization needs float64.
        lower = torch.linalg.cholesky(gram.double()).float()
        inverse = torch.linalg.solve_triangular(
            lower, torch.eye(len(lower), device=lower.device), upper=False
        )
        shaped = lower.diagonal().unsqueeze(1) * inverse
        with fast_products(gram.device):
            weights = float(((shaped @ weighted) * shaped).sum()) / 2
        return Sensitivity(weights, float(weighted.diagonal().sum()) / 2)


@contextmanager
def watched(moments: Iterable[GradientMoments]) -> Iterator[None]:
    """Collect moments while the body runs."""
    handles = [handle for collected in moments for handle in collected.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
