"""Scale distillation: the whole quantized model learns the original's next-token distributions through its scales.

Signs stay (tuning them here hurts: NanoQuant's ablation); row and column scales, norms and low-rank factors are
few, so little text suffices. The original itself is not loaded: its last hidden states are at hand after the last
block, and its norm and head give its logits.
"""

import copy
import logging
from collections.abc import Callable, Mapping

import torch
from bwla_converter.activations import Activations
from bwla_converter.hf import BWLAHead, BWLALinear
from bwla_converter.plan import EMBEDDING_WEIGHT, HEAD_WEIGHT, LAST_NORM
from bwla_converter.shell import Shell
from bwla_converter.tunable import InputSide, TunableLinear, forget_inputs, norm_weights
from bwla_converter.tune import TuneOptions, parameter_groups, tune
from bwla_kernels.format.head import HEAD_MODULE
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DISTILLATION = TuneOptions(epochs=4, batch=4, scale_rate=1e-3, low_rank_rate=3e-3, norm_rate=1e-3)
"""How the scales are distilled; there are no latent weights."""


def distill(
    model: PreTrainedModel,
    shell: Shell,
    ids: Tensor,
    original_hidden: Activations,
    options: TuneOptions,
    seed: int,
    start: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the scales of a quantized model.

    Args:
        model: the model, its quantized linears `BWLALinear`; changed in place.
        shell: of the original; gives its head.
        ids: token ids of the calibration windows [S, T].
        original_hidden: the original's hidden states after its last block [S, T, hidden].
        options: see there.
        seed: orders the windows.
        start: stored tensors, by their full names, to start from instead of the model's.

    Returns: the stored tensors that changed, by their full names, and the mean divergence before, in each epoch, and
        after, in nats; those of `start` alone where it did not fall.
    """
    model = model.to(shell.device).eval()
    model.requires_grad_(False)
    logits_of = original_logits(model, shell)
    model.load_state_dict(start, strict=False)
    linears = make_tunable(model, shell)
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

    before = divergence()
    trace = tune(
        loss_of,
        parameter_groups(linears.values(), norms.values(), options),
        len(ids),
        options,
        torch.Generator().manual_seed(seed),
        lambda: forget_inputs(linears.values()),
    )
    trace = [before, *trace, divergence()]
    if trace[-1] >= before:
        log.warning(
            "distillation did not bring the model closer to the original: its scales stay as they were"
        )
        return dict(start), trace
    changed = {
        f"{name}.{key}": value for name, linear in linears.items() for key, value in linear.stored().items()
    }
    dtypes = {name: shell.source.entries[name].dtype for name in norms}
    changed |= {name: parameter.detach().to(dtypes[name], copy=True) for name, parameter in norms.items()}
    return changed, trace


def original_logits(model: PreTrainedModel, shell: Shell) -> Callable[[Tensor], Tensor]:
    """From the original's last hidden states [..., hidden] to its logits [..., V], float32.

    Args:
        model: the quantized model as it was stored: its last norm is the original's.
        shell: of the original.
    """
    norm = copy.deepcopy(model.get_submodule(LAST_NORM))
    name = EMBEDDING_WEIGHT if shell.source.tied_head else HEAD_WEIGHT
    head = shell.source.read([name])[name].to(shell.device, shell.dtype)
    cap = getattr(shell.config, "final_logit_softcapping", None)

    def logits_of(hidden: Tensor) -> Tensor:
        logits: Tensor = (norm(hidden) @ head.mT).float()
        return cap * torch.tanh(logits / cap) if cap else logits

    return logits_of


def make_tunable(model: PreTrainedModel, shell: Shell) -> dict[str, TunableLinear]:
    """Replace, in place, every BWLA linear by a tunable one with fixed signs, and an 8-bit head by a dense one."""
    linears: dict[str, TunableLinear] = {}
    for index in range(shell.source.num_blocks):
        for _, names in shell.source.groups_of_block(index):
            modules = {name: model.get_submodule(name) for name in names}
            side: InputSide | None = None
            for name, module in modules.items():
                assert isinstance(module, BWLALinear)
                stored = module.stored()
                side = side or InputSide(stored, module.spec)
                linears[name] = TunableLinear(side, stored, module.spec, stored.get("bias"))
                model.set_submodule(name, linears[name])
    head = model.get_submodule(HEAD_MODULE)
    if isinstance(head, BWLAHead):
        stored = head.stored()
        dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        weight = stored["weight_int8"].to(shell.dtype) * stored["weight_scale"].to(shell.dtype).unsqueeze(1)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(HEAD_MODULE, dense)
    return linears
