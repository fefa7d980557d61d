"""Distillation: the whole quantized model learns the original's next-token distributions.

Row and column scales, norms and low-rank factors learn all the time; signs in sections of as many blocks as
`sections.SIGNS_AT_ONCE` allows, one section after the other, so that a large model needs latent weights and their
optimizer's state of one section only. All sections together see the text as often as the options say.

A sign moves when its gradient has pushed the same way for long: its latent weight starts at what the original weight
would be here, but nowhere nearer to zero than `tunable.SMALLEST_LATENT`, and the steps are small. NanoQuant's ablation
found signs better left alone here; so it is with latent weights that come from the blocks' tuning, many of which are
next to zero, or with large steps (measured: divergence three times as large instead of half).

The original itself is not loaded: its last hidden states are at hand after the last block, and its norm and head
give its logits; its weights are read a linear at a time where latent weights begin.
"""

import copy
import logging
from collections.abc import Callable, Mapping

import torch
from bwla_converter.calibration.activations import Activations
from bwla_converter.calibration.layer_runner import LayerRunner
from bwla_converter.hf.modules import BWLAHead, BWLALinear
from bwla_converter.source.names import EMBEDDING_WEIGHT, FINAL_NORM, HEAD_WEIGHT
from bwla_converter.training.optimize import TuneOptions, parameter_groups, tune
from bwla_converter.training.stages import sections, split_budget
from bwla_converter.training.ste_linear import InputTransform, STELinear, forget_inputs, norm_weights
from bwla_kernels.format.head import HEAD_MODULE
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DISTILLATION = TuneOptions(
    epochs=4, batch=2, latent_rate=3e-3, scale_rate=1e-3, low_rank_rate=3e-3, norm_rate=1e-3, momentum=0.8
)
"""How the whole model is distilled; at a latent rate of 0 all signs stay as they are."""


def distill(
    model: PreTrainedModel,
    runner: LayerRunner,
    ids: Tensor,
    original_hidden: Activations,
    options: TuneOptions,
    seed: int,
    start: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[float]]:
    """Train a quantized model as a whole.

    Args:
        model: the model, its quantized linears `BWLALinear`; changed in place.
        runner: of the original; gives its head.
        ids: token ids of the calibration windows [S, T].
        original_hidden: the original's hidden states after its last block [S, T, hidden].
        options: see there; no latent weights at a latent rate of 0.
        seed: orders the windows.
        start: stored tensors, by their full names, to start from instead of the model's.

    Returns: the stored tensors that changed, by their full names, and the mean divergence before, in each epoch of
        each section, and after, in nats; those of `start` alone where it did not fall.
    """
    model = model.to(runner.device).eval()
    model.requires_grad_(False)
    logits_of = original_logits(model, runner)
    model.load_state_dict(start, strict=False)
    linears = make_tunable(model, runner)
    norms = norm_weights(model)
    for parameter in norms.values():
        parameter.requires_grad_(True)

    def loss_of(indices: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = nn.functional.log_softmax(logits_of(original_hidden[indices]), -1)
        found = nn.functional.log_softmax(model(ids[indices], use_cache=False).logits.float(), -1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    @torch.no_grad()
    def divergence() -> float:
        parts = torch.arange(len(ids)).split(options.batch)
        total = sum(float(loss_of(part)) * len(part) for part in parts)
        forget_inputs(linears.values())
        return total / len(ids)

    generator = torch.Generator().manual_seed(seed)
    trace = [divergence()]
    parts = [blocks for blocks, _ in sections(runner.source)] if options.latent_rate else [[]]
    for blocks, share in zip(parts, split_budget(options, len(ids), len(parts)), strict=True):
        moving = [name for index in blocks for name in runner.source.linears_of_layer(index)]
        before = {name: free_signs(linears[name], f"{name}.weight", runner) for name in moving}
        groups = parameter_groups(linears.values(), norms.values(), share)
        trace += tune(loss_of, groups, len(ids), share, generator, lambda: forget_inputs(linears.values()))
        moved = sum(int((linears[name].fix_signs() != signs).sum()) for name, signs in before.items())
        if moving:
            share_moved = 100 * moved / sum(signs.numel() for signs in before.values())
            log.info("distillation: blocks %d-%d, %.2f %% of signs moved", blocks[0], blocks[-1], share_moved)
    trace.append(divergence())
    if trace[-1] >= trace[0]:
        log.warning(
            "distillation did not bring the model closer to the original: it stays as it was; try more "
            "--num-calibration-samples"
        )
        return dict(start), trace
    changed = {
        f"{name}.{key}": value for name, linear in linears.items() for key, value in linear.stored().items()
    }
    dtypes = {name: runner.source.entries[name].dtype for name in norms}
    changed |= {name: parameter.detach().to(dtypes[name], copy=True) for name, parameter in norms.items()}
    return changed, trace


def free_signs(linear: STELinear, weight: str, runner: LayerRunner) -> Tensor:
    """Let the signs of a linear move, from the original's weight of that name; returns what they are, int8 [N, K]."""
    assert linear.signs is not None
    signs = linear.signs
    linear.free_signs(linear.original_latent(runner.source.read([weight])[weight].to(runner.device)))
    return signs


def original_logits(model: PreTrainedModel, runner: LayerRunner) -> Callable[[Tensor], Tensor]:
    """From the original's last hidden states [..., hidden] to its logits [..., V], float32.

    Args:
        model: the quantized model as it was stored: its last norm is the original's.
        runner: of the original.
    """
    norm = copy.deepcopy(model.get_submodule(FINAL_NORM))
    name = EMBEDDING_WEIGHT if runner.source.tied_head else HEAD_WEIGHT
    head = runner.source.read([name])[name].to(runner.device, runner.dtype)
    cap = getattr(runner.config, "final_logit_softcapping", None)

    def logits_of(hidden: Tensor) -> Tensor:
        logits: Tensor = (norm(hidden) @ head.mT).float()
        return cap * torch.tanh(logits / cap) if cap else logits

    return logits_of


def make_tunable(model: PreTrainedModel, runner: LayerRunner) -> dict[str, STELinear]:
    """Replace, in place, every BWLA linear by a tunable one with fixed signs, and an 8-bit head by a dense one."""
    linears: dict[str, STELinear] = {}
    for index in range(runner.source.num_layers):
        for _, names in runner.source.groups_of_layer(index):
            modules = {name: model.get_submodule(name) for name in names}
            side: InputTransform | None = None
            for name, module in modules.items():
                assert isinstance(module, BWLALinear)
                stored = module.stored()
                side = side or InputTransform(stored, module.spec)
                linears[name] = STELinear(side, stored, module.spec, stored.get("bias"))
                model.set_submodule(name, linears[name])
    head = model.get_submodule(HEAD_MODULE)
    if isinstance(head, BWLAHead):
        stored = head.stored()
        dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        weight = stored["weight_int8"].to(runner.dtype) * stored["weight_scale"].to(runner.dtype).unsqueeze(1)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(HEAD_MODULE, dense)
    return linears
