"""Fuse RMSNorm, residual addition and SiLU * mul into the load of a BWLA layer's input on a GPU.

vLLM runs a custom pass over every compiled graph, before its own IR ops are lowered: the one that is registered in
`CompilationConfig.inductor_compile_config` under the platform's `pass_key` (vllm/compilation/backends.py,
`configure_post_pass`). There a norm is still one node, `vllm_ir.rms_norm` or `vllm_ir.fused_add_rms_norm`
(vllm/ir/ops/layernorm.py); SiLU * mul is decomposed into elementary operations. vLLM fuses q, k, v and gate, up into
one layer each, so every norm feeds a single layer, and fusing it saves a launch and a round trip to memory.
"""

import operator
from typing import Any

import torch
from bwla_kernels.triton import backend
from torch import fx
from torch._inductor.custom_graph_pass import get_hash_for_files
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger("vllm.bwla")

LINEAR = torch.ops.bwla.linear_triton.default
NORM_LINEAR = torch.ops.bwla.rms_norm_linear_triton.default
ADD_NORM_LINEAR = torch.ops.bwla.add_rms_norm_linear_triton.default
SILU_MUL_LINEAR = torch.ops.bwla.silu_mul_linear_triton.default

SWITCH = "bwla_fuse_inputs"
"""Key of vLLM's `--additional-config` that disables the fusion: '{"bwla_fuse_inputs": false}'."""

_ROTATION_GROUPS = 11
"""Index of the number of rotation groups among the arguments of a linear op."""

_aten = torch.ops.aten
_prims = torch.ops.prims


class BWLAFusionPass(InductorPass):  # type: ignore[misc]
    """Rewrite a graph in place: fuse each norm or SiLU * mul that only one BWLA layer reads into that layer."""

    def __call__(self, graph: fx.Graph) -> None:
        """Run the pass on `graph`."""
        linears = graph.find_nodes(op="call_function", target=LINEAR)
        shared = sum(_has_other_readers(linear) for linear in linears)
        fused = sum(_fuse(graph, linear) for linear in linears)
        if fused:
            logger.info_once("BWLA layers: norms and SiLU * mul are fused into the layers that read them")
        elif linears and shared == len(linears):
            logger.info_once(
                "BWLA layers: norms and SiLU * mul run as separate kernels, because LoRA adapters or other operations "
                "read the layers' inputs too"
            )
        elif linears:
            logger.warning_once(
                "BWLA layers: no norm or SiLU * mul was found before %d layers of a graph; they run as separate "
                "kernels, which is slower but correct",
                len(linears),
            )
        logger.debug("BWLA layers: %d of %d inputs fused", fused, len(linears))

    def uuid(self) -> str:
        """Return a part of the compiler's cache key that changes with this file and with the ops."""
        return get_hash_for_files((__file__, backend.__file__)).hex()


def install(config: Any) -> None:
    """Register the pass with vLLM, once a backend on an NVIDIA GPU was chosen; log the reason if it cannot be used.

    Args:
        config: vLLM's config while it builds the model, which is before it creates its compiler.
    """
    compilation, additional = config.compilation_config, config.additional_config
    if isinstance(additional, dict) and not additional.get(SWITCH, True):
        logger.info_once(
            "BWLA layers: norms and SiLU * mul are not fused into them, as requested by %s", SWITCH
        )
        return
    if compilation.mode != CompilationMode.VLLM_COMPILE:
        logger.info_once(
            "BWLA layers: norms and SiLU * mul are not fused into them, because vLLM does not compile the model "
            "(remove --enforce-eager)"
        )
        return
    passes = compilation.inductor_compile_config
    present = passes.get(current_platform.pass_key)
    if present is None:
        passes[current_platform.pass_key] = BWLAFusionPass()
    elif not isinstance(present, BWLAFusionPass):
        logger.warning_once(
            "BWLA layers: norms and SiLU * mul are not fused into them, because the compilation config has "
            "another pass under %r",
            current_platform.pass_key,
        )


def _fuse(graph: fx.Graph, linear: fx.Node) -> bool:
    source = linear.args[0]
    if not isinstance(source, fx.Node) or _has_other_readers(linear):
        return False
    return any(rule(graph, linear, source) for rule in (_fuse_norm, _fuse_add_norm, _fuse_silu_mul))


def _has_other_readers(linear: fx.Node) -> bool:
    """Return whether the input of a linear is also read elsewhere (by the A matrix of a LoRA adapter, for example).

    Fusing would then compute the norm twice, or lose it for the other reader.
    """
    source = linear.args[0]
    return isinstance(source, fx.Node) and set(source.users) != {linear}


def _ir_op(name: str) -> Any:
    """Return one of vLLM's IR ops, or None in a vLLM that lacks it."""
    packet = getattr(torch.ops.vllm_ir, name, None)
    return None if packet is None else packet.default


def _norm_arguments(node: fx.Node, activations: int, linear: fx.Node) -> tuple[Any, ...] | None:
    """Return (x, [residual], weight, epsilon) of a norm that the kernel can compute, else None.

    The norm must have a weight and cover the whole row, and the layer must have one rotation group: with more groups,
    each of them would compute the mean square of the row again.
    """
    variance_size = node.args[activations + 2] if len(node.args) > activations + 2 else None
    inputs, (weight, epsilon) = node.args[:activations], node.args[activations : activations + 2]
    if (
        variance_size is not None
        or not isinstance(weight, fx.Node)
        or node.kwargs
        or linear.args[_ROTATION_GROUPS] != 1
    ):
        return None
    first = inputs[0]
    if any(not isinstance(x, fx.Node) or _value(x).dtype != _value(first).dtype for x in inputs):
        return None
    return (*inputs, weight, epsilon)


def _value(node: Any) -> Any:
    return node.meta["val"]


def _fuse_norm(graph: fx.Graph, linear: fx.Node, source: fx.Node) -> bool:
    if source.op != "call_function" or source.target != _ir_op("rms_norm"):
        return False
    arguments = _norm_arguments(source, 1, linear)
    if arguments is None:
        return False
    x, weight, epsilon = arguments
    _replace(graph, linear, NORM_LINEAR, (x, *linear.args[1:], weight, epsilon))
    graph.erase_node(source)
    return True


def _fuse_add_norm(graph: fx.Graph, linear: fx.Node, source: fx.Node) -> bool:
    """Fuse fused_add_rms_norm, which returns the normalized sum (read by the layer) and the sum (read by others)."""
    if source.target != operator.getitem or source.args[1] != 0:
        return False
    norm = source.args[0]
    if not isinstance(norm, fx.Node) or norm.target != _ir_op("fused_add_rms_norm"):
        return False
    arguments = _norm_arguments(norm, 2, linear)
    sums = [user for user in norm.users if user is not source]
    if arguments is None or any(user.target != operator.getitem or user.args[1] != 1 for user in sums):
        return False
    x, residual, weight, epsilon = arguments
    # The sum may be read before the layer, so both replace the norm: the layer's other inputs must exist by then.
    if any(
        node.op not in ("placeholder", "get_attr") for node in linear.all_input_nodes if node is not source
    ):
        return False
    with graph.inserting_before(norm):
        both = graph.call_function(ADD_NORM_LINEAR, (x, *linear.args[1:], weight, epsilon, residual))
        output = graph.call_function(operator.getitem, (both, 0))
        total = graph.call_function(operator.getitem, (both, 1))
    total_value = _value(norm)[1]
    both.meta["val"] = (_value(linear), total_value)
    output.meta["val"], total.meta["val"] = _value(linear), total_value
    linear.replace_all_uses_with(output)
    for user in sums:
        user.replace_all_uses_with(total)
    for node in (linear, source, *sums, norm):
        graph.erase_node(node)
    return True


def _fuse_silu_mul(graph: fx.Graph, linear: fx.Node, source: fx.Node) -> bool:
    x = _custom_silu_mul(source) or _plain_silu_mul(source)
    if x is None:
        return False
    _replace(graph, linear, SILU_MUL_LINEAR, (x, *linear.args[1:]))
    graph.eliminate_dead_code()
    return True


def _replace(graph: fx.Graph, linear: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(linear):
        fused = graph.call_function(target, arguments)
    fused.meta["val"] = _value(linear)
    linear.replace_all_uses_with(fused)
    graph.erase_node(linear)


def _custom_silu_mul(source: fx.Node) -> fx.Node | None:
    """Return x of vLLM's own kernel: getitem(auto_functionalized(_C.silu_and_mul, result=..., input=x), 1)."""
    if source.target != operator.getitem or source.args[1] != 1:
        return None
    call = source.args[0]
    packet = getattr(torch.ops._C, "silu_and_mul", None)
    if not isinstance(call, fx.Node) or packet is None or call.args[:1] != (packet.default,):
        return None
    x = call.kwargs.get("input")
    return x if isinstance(x, fx.Node) and set(call.users) == {source} else None


def _plain_silu_mul(source: fx.Node) -> fx.Node | None:
    """Return x of silu(x[..., :d]) * x[..., d:], as the compiler decomposes it."""
    if not _calls(source, _aten.mul.Tensor):
        return None
    for activated, up in (source.args, source.args[::-1]):
        gate = _silu_input(activated)
        x = _half(up, second=True)
        if gate is not None and x is not None and _half(gate, second=False) is x:
            return x
    return None


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _half(node: Any, second: bool) -> fx.Node | None:
    """Return x of a slice that is the first or second half of the last dimension of x."""
    if not _calls(node, _aten.slice.Tensor):
        return None
    defaults: list[Any] = [0, None, None, 1]
    given: list[Any] = list(node.args)
    x, axis, start, end, step = given + defaults[len(given) - 1 :]
    width, last = _value(x).shape[-1], _value(x).dim() - 1
    if not isinstance(width, int) or axis % (last + 1) != last or step != 1 or width % 2:
        return None
    start, end = 0 if start is None else start, width if end is None else end
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    expected = (width // 2, width) if second else (0, width // 2)
    whole: fx.Node = x
    return whole if (start, min(end, width)) == expected else None


def _before_float32(node: Any) -> Any:
    """Return the operand of a conversion to float32, or the node itself if it is something else."""
    if _calls(node, _prims.convert_element_type.default) and node.args[1] == torch.float32:
        return node.args[0]
    return node


def _silu_input(node: Any) -> Any:
    """Return v of silu(v), rounded to the dtype of v; None if the node is something else.

    Recognized forms: aten.silu(v), v / (1 + exp(-v)) and v * sigmoid(v), in float32 inside.
    """
    if _calls(node, _aten.silu.default):
        return node.args[0]
    rounded = _calls(node, _prims.convert_element_type.default)
    inner = node.args[0] if rounded else node
    if _calls(inner, _aten.div.Tensor):
        v, denominator = inner.args
        logistic = _one_plus_exp_of_minus(denominator)
    elif _calls(inner, _aten.mul.Tensor) and _calls(inner.args[1], _aten.sigmoid.default):
        v, logistic = inner.args[0], inner.args[1].args[0]
    else:
        return None
    if (
        logistic is None
        or _before_float32(v) is not _before_float32(logistic)
        or not isinstance(_before_float32(v), fx.Node)
    ):
        return None
    source = _before_float32(v)
    return source if _value(source).dtype == _value(node).dtype else None


def _one_plus_exp_of_minus(node: Any) -> Any:
    if not _calls(node, _aten.add.Tensor) or node.args[1] != 1 or not _calls(node.args[0], _aten.exp.default):
        return None
    negative = node.args[0].args[0]
    return negative.args[0] if _calls(negative, _aten.neg.default) else None
