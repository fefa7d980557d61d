"""Distillation: train the whole quantized model on the original's next-token distributions (KL divergence).

Row and column scales, norms and low-rank factors are trained throughout. Signs are trained in stages of as many
decoder layers as `stages.MAX_STAGE_WEIGHTS` allows, one stage after the other, so that only one stage's latent weights
and optimizer state are in memory. All stages together use the samples as often as the options say.

A sign flips when its gradient has kept the same direction for many steps: its latent weight starts at the rotated
original weight, but not closer to zero than `ste_linear.MIN_LATENT`, and the learning rate is small. NanoQuant's
ablation found it better not to train signs here. We measured the same (three times the divergence instead of half)
with latent weights taken from the tuning of the layers, many of which are close to zero, and with a large rate.

The original model itself is not loaded: its hidden states after the last layer are known from calibration, and its
final norm and head turn them into logits. Its weights are read one linear at a time to initialize latent weights.
"""

import logging
from collections.abc import Mapping

import torch
from bwla_converter.calibration.activations import Activations
from bwla_converter.calibration.layer_runner import LayerRunner
from bwla_converter.common.weights import dequantized_weight
from bwla_converter.hf.calls import head_logits
from bwla_converter.hf.modules import BWLAHead, BWLALinear
from bwla_converter.hf.whole_model import base_of
from bwla_converter.training.divergence import kl_divergence
from bwla_converter.training.optimize import TuneOptions, parameter_groups, tune
from bwla_converter.training.stages import Stage, make_stages, split_budget
from bwla_converter.training.ste_linear import InputTransform, STELinear, clear_input_caches, norm_weights
from bwla_kernels.format.experts import stores
from bwla_kernels.precision import fast_products
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DISTILLATION = TuneOptions(
    epochs=4, batch=2, latent_rate=3e-3, scale_rate=1e-3, low_rank_rate=3e-3, norm_rate=1e-3, momentum=0.8
)
"""Default hyperparameters of distillation; with a latent rate of 0 no signs are trained."""


class Distiller:
    """Train a quantized model as a whole.

    Args:
        model: the quantized model, with `BWLALinear` modules; changed in place.
        runner: runner of the original model, for its final norm, head and weights.
        ids: token ids of the calibration samples [S, T].
        original_hidden: the original's hidden states after its last layer [S, T, hidden].
        options: hyperparameters.
        initial: stored tensors, by their full names, that replace the model's before training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        runner: LayerRunner,
        ids: Tensor,
        original_hidden: Activations,
        options: TuneOptions,
        initial: Mapping[str, Tensor],
    ) -> None:
        self.model = model.to(runner.device).eval()
        self.runner, self.ids, self.original_hidden, self.options = runner, ids, original_hidden, options
        self.initial = initial
        model.requires_grad_(False)
        model.load_state_dict(initial, strict=False)
        self.linears = make_trainable(model, runner)
        self.norms = norm_weights(model)
        for parameter in self.norms.values():
            parameter.requires_grad_(True)

    def loss(self, indices: Tensor) -> Tensor:
        """Return the mean KL divergence from the original in nats per token, over the samples of the given indices."""
        with torch.no_grad():
            original = self.runner.outer.normed(self.original_hidden[indices])
        outputs = base_of(self.model)(self.ids[indices], use_cache=False)
        outer = self.runner.outer

        def head(rows: Tensor) -> Tensor:
            return head_logits(self.model, outputs, rows)

        return kl_divergence(outputs.last_hidden_state, head, original, outer.logits, outer.vocabulary)

    @torch.no_grad()
    def divergence(self) -> float:
        """Return the mean KL divergence over all samples."""
        parts = torch.arange(len(self.ids)).split(self.options.batch)
        total = sum(float(self.loss(part)) * len(part) for part in parts)
        clear_input_caches(self.linears.values())
        return total / len(self.ids)

    def run(self, seed: int) -> tuple[dict[str, Tensor], list[float]]:
        """Train all stages; a distillation that does not reduce the divergence is discarded.

        Args:
            seed: seed of the order of the samples.

        Returns: the stored tensors that changed, by their full names (`initial` alone where training is discarded),
            and the mean divergence in nats: before, in each epoch of each stage, and after.
        """
        generator = torch.Generator().manual_seed(seed)
        stages = make_stages(self.runner.source) if self.options.latent_rate else [Stage()]
        budgets = split_budget(self.options, len(self.ids), len(stages))
        with fast_products(self.runner.device):
            trace = [self.divergence()]
            for stage, options in zip(stages, budgets, strict=True):
                trace += self.run_stage(stage, options, generator)
            trace.append(self.divergence())
        if trace[-1] < trace[0]:
            return self.changed_tensors(), trace
        log.warning(
            "distillation did not bring the model closer to the original and is rolled back: try more "
            "--num-calibration-samples"
        )
        return dict(self.initial), trace

    def run_stage(self, stage: Stage, options: TuneOptions, generator: torch.Generator) -> list[float]:
        """Train with the signs of one stage's layers unfrozen; return the mean loss of each epoch."""
        names = [name for index in stage.layers for name in self.runner.source.linears_of_layer(index)]
        before = {name: self.unfreeze_signs(name) for name in names}
        groups = parameter_groups(self.linears.values(), self.norms.values(), options)
        trace = tune(
            self.loss,
            groups,
            len(self.ids),
            options,
            generator,
            lambda: clear_input_caches(self.linears.values()),
        )
        flipped = sum(
            int((self.linears[name].freeze_signs() != signs).sum()) for name, signs in before.items()
        )
        if names:
            percent = 100 * flipped / sum(signs.numel() for signs in before.values())
            first, last = stage.layers[0], stage.layers[-1]
            log.info("distillation: layers %d-%d, %.2f %% of signs flipped", first, last, percent)
        return trace

    def unfreeze_signs(self, name: str) -> Tensor:
        """Train a linear's signs, starting from the original weight; return the current signs, int8 [N, K]."""
        linear, weight = self.linears[name], f"{name}.weight"
        assert linear.signs is not None
        signs = linear.signs
        original = self.runner.source.read([weight])[weight].to(self.runner.device)
        linear.unfreeze_signs(linear.original_latent(original))
        return signs

    def changed_tensors(self) -> dict[str, Tensor]:
        """Return all trained tensors as they are stored, by their full names."""
        changed = {
            f"{name}.{key}": value
            for name, linear in self.linears.items()
            for key, value in linear.stored().items()
            if stores(name, key)
        }
        for name, parameter in self.norms.items():
            changed[name] = parameter.detach().to(self.runner.source.entries[name].dtype, copy=True)
        return changed


def make_trainable(model: PreTrainedModel, runner: LayerRunner) -> dict[str, STELinear]:
    """Replace, in place, the linears of all layers by trainable ones with frozen signs, and dequantize the head."""
    linears: dict[str, STELinear] = {}
    structure = runner.source.structure
    for index in range(runner.source.num_layers):
        for _, names in runner.source.groups_of_layer(index):
            modules = {name: model.get_submodule(structure.module_path(name)) for name in names}
            input_transform: InputTransform | None = None
            for name, module in modules.items():
                assert isinstance(module, BWLALinear)
                stored = module.stored()
                input_transform = input_transform or InputTransform(stored, module.spec)
                linears[name] = STELinear(input_transform, stored, module.spec, stored.get("bias"))
                model.set_submodule(structure.module_path(name), linears[name])
    head = model.get_submodule(structure.module_path(structure.head))
    if isinstance(head, BWLAHead | BWLALinear):
        model.set_submodule(structure.module_path(structure.head), _dense_head(head, runner.dtype))
    return linears


def _dense_head(head: BWLAHead | BWLALinear, dtype: torch.dtype) -> nn.Linear:
    """Return a linear with the weight that a quantized head represents."""
    stored = head.stored()
    if isinstance(head, BWLALinear):
        weight = dequantized_weight(stored, head.spec, dtype)
    else:
        weight = stored["weight_int8"].to(dtype) * stored["weight_scale"].to(dtype).unsqueeze(1)
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if "bias" in stored:
        dense.bias = nn.Parameter(stored["bias"].to(dtype), requires_grad=False)
    return dense
