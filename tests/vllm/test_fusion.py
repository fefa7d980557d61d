"""Norms and SiLU * mul move into the BWLA layers that read them, and the rewritten graph computes the same.

The graphs are traced from vLLM's own modules, with the compiler's own decompositions. Stand-ins compute the
layers here; the ops themselves are tested with the kernels.
"""

import operator
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bwla_kernels.triton import launch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from vllm import ir
from vllm.compilation.passes.inductor_pass import InductorPass, pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, get_current_vllm_config
from vllm.config.utils import Range
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from bwla_vllm import fusion, linear

WIDTH, INNER, TOKENS, EPSILON = 32, 64, 5, 1e-5


@pytest.fixture(autouse=True)
def _ir_ops_in_graphs(vllm_config: None) -> Iterator[None]:
    """As vLLM has it where it compiles with its own backend."""
    with ir.enable_torch_wrap(True):
        yield
    torch._dynamo.reset()


class Linear(nn.Module):
    """Calls the op as `TritonBackend.apply` does, with a layer's sizes and small tensors."""

    def __init__(self, n: int, k: int, blocks: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(n + k)
        self.column_scale = nn.Parameter(torch.rand(k, generator=generator))
        self.weight_scale = nn.Parameter(torch.rand(n, generator=generator))
        self.rest = nn.Parameter(torch.zeros(1))
        self.sizes = (n, blocks, k // blocks // 8, 8, 0, 6, 1.0, 1)

    def forward(self, x: Tensor) -> Tensor:
        rest = self.rest
        y: Tensor = torch.ops.bwla.linear_triton.default(
            x, rest, self.weight_scale, rest, rest, rest, self.column_scale, None, None, None, *self.sizes
        )
        return y


class Block(nn.Module):
    """The linears, norms and activations of two decoder layers in vLLM's order; "attention" is a tanh."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (
            RMSNorm(WIDTH, EPSILON, dtype=dtype) for _ in range(4)
        )
        for i, norm in enumerate((self.first, self.second, self.third, self.last)):
            nn.init.uniform_(norm.weight, 0.5 + i, 1.5 + i)
        self.qkv, self.o = Linear(2 * WIDTH, WIDTH), Linear(WIDTH, WIDTH, 2)
        self.gate_up, self.down = Linear(2 * INNER, WIDTH), Linear(WIDTH, INNER, 2)
        self.next_qkv = Linear(2 * WIDTH, WIDTH)
        self.act = SiluAndMul()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer's q, k, v, and a norm that no BWLA layer reads, like the one before the head."""
        residual = x
        x = self.qkv(self.first(x))
        x = self.o(torch.tanh(x[:, :WIDTH]))
        x, residual = self.second(x, residual)
        x = self.down(self.act(self.gate_up(x)))
        x, residual = self.third(x, residual)
        return self.next_qkv(x), self.last(residual)


def stand_in(x: Tensor, *layer: Any) -> Tensor:
    """A layer that shows what it read: its input weighed, times its scales."""
    return ((x.float() * layer[5]).sum(-1, keepdim=True) * layer[1] + x.float()[:, :1]).to(x.dtype)


def norm_stand_in(x: Tensor, *arguments: Any) -> Tensor:
    *layer, weight, epsilon = arguments
    return stand_in(ir.ops.rms_norm.impls["native"].impl_fn(x, weight, epsilon), *layer)


def add_norm_stand_in(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *layer, weight, epsilon, residual = arguments
    normed, total = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, epsilon)
    return stand_in(normed, *layer), total


def silu_mul_stand_in(x: Tensor, *layer: Any) -> Tensor:
    return stand_in(SiluAndMul.forward_native(x), *layer)


STAND_INS = {
    fusion.LINEAR: stand_in,
    fusion.NORM_LINEAR: norm_stand_in,
    fusion.ADD_NORM_LINEAR: add_norm_stand_in,
    fusion.SILU_MUL_LINEAR: silu_mul_stand_in,
}


class Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(STAND_INS.get(target, target), args, kwargs)


def run(
    model: nn.Module, x: Tensor, rewrite: Callable[[fx.Graph], None] = lambda graph: None
) -> tuple[list[Tensor], fx.Graph]:
    """Compile up to where vLLM runs its passes, and rewrite; the outputs, computed with stand-ins, and the graph."""
    torch._dynamo.reset()
    graphs: list[fx.Graph] = []

    def compiler(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        with pass_context(Range(1, 64)):
            rewrite(module.graph)
        module.graph.lint()
        graphs.append(module.graph)
        return make_boxed_func(lambda *arguments: Interpreter(module).run(*arguments))

    rest = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())

    def backend(module: fx.GraphModule, example: Any) -> Any:
        with pass_context(Range(1, 64)):
            VllmIRInplaceFunctionalizationPass(get_current_vllm_config())(module.graph)
        module.recompile()
        return rest(module, example)

    with torch.no_grad():
        found = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)(x.clone())
    (graph,) = graphs
    return list(found) if isinstance(found, tuple) else [found], graph


def count(graph: fx.Graph) -> dict[Any, int]:
    targets = [node.target for node in graph.nodes]
    return {target: targets.count(target) for target in STAND_INS if target in targets}


FUSED = {
    fusion.LINEAR: 1,  # o reads attention
    fusion.NORM_LINEAR: 1,
    fusion.ADD_NORM_LINEAR: 2,
    fusion.SILU_MUL_LINEAR: 1,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_decoder_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Block(dtype), torch.randn(TOKENS, WIDTH).to(dtype)
    plain, graph = run(model, x)
    assert count(graph) == {fusion.LINEAR: 5}
    fused, graph = run(model, x, fusion.BWLAFusionPass())
    assert count(graph) == FUSED
    left = [str(node.target) for node in graph.nodes]
    assert left.count("vllm_ir.rms_norm.default") == 1
    assert not any("fused_add" in target or "exp" in target for target in left)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=2e-3)
        assert a.abs().max() > 0.1


class Similar(nn.Module):
    """Graphs that look similar and must stay as they are."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.norm = RMSNorm(WIDTH, EPSILON, dtype=torch.float32)
        self.one, self.two = Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH)
        self.blocks = Linear(WIDTH, WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        wide = torch.cat([x, x + 1], -1)
        graphs: dict[str, Callable[[], Tensor]] = {
            "two readers": lambda: (lambda h: self.one(h) + self.two(h))(self.norm(x)),
            "also an output": lambda: (lambda h: self.one(h) + h)(self.norm(x)),
            "several blocks": lambda: self.blocks(self.norm(x)),
            "not the input": lambda: self.one(self.norm(x) * 2),
            "the halves swapped": lambda: self.one(silu(wide[:, WIDTH:]) * wide[:, :WIDTH]),
            "not halves": lambda: self.one(silu(wide[:, :WIDTH]) * wide[:, WIDTH - 1 : -1]),
            "twice the same half": lambda: self.one(silu(wide[:, :WIDTH]) * wide[:, :WIDTH]),
            "another activation": lambda: self.one(nn.functional.gelu(wide[:, :WIDTH]) * wide[:, WIDTH:]),
        }
        return graphs[self.which]()


@pytest.mark.parametrize(
    "which",
    [
        "two readers",
        "also an output",
        "several blocks",
        "not the input",
        "the halves swapped",
        "not halves",
        "twice the same half",
        "another activation",
    ],
)
def test_what_stays(which: str) -> None:
    model, x = Similar(which), torch.randn(TOKENS, WIDTH)
    before, _ = run(model, x)
    after, graph = run(model, x, fusion.BWLAFusionPass())
    assert set(count(graph)) == {fusion.LINEAR}
    assert torch.equal(before[0], after[0])


class Adapted(nn.Module):
    """A linear inside vLLM's LoRA wrapper: the adapter reads the same input and is added to the output in place."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.rand(4, len(base.column_scale)))
        self.b = nn.Parameter(torch.rand(len(base.weight_scale), 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        y += nn.functional.linear(nn.functional.linear(x, self.a), self.b)
        return y


@pytest.mark.parametrize(
    ("adapted", "left", "said"),
    [
        (("qkv", "o", "gate_up", "down", "next_qkv"), {fusion.LINEAR: 5}, "separate kernels, because LoRA"),
        (
            ("qkv", "gate_up"),
            {fusion.LINEAR: 3, fusion.ADD_NORM_LINEAR: 1, fusion.SILU_MUL_LINEAR: 1},
            "are fused",
        ),
    ],
    ids=["all linears", "two of them"],
)
def test_layers_with_adapters_keep_their_norms(
    adapted: tuple[str, ...], left: dict[Any, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter reads the normalized input; the other layers are fused as before."""
    torch.manual_seed(0)
    model, x = Block(torch.float32), torch.randn(TOKENS, WIDTH)
    for name in adapted:
        setattr(model, name, Adapted(getattr(model, name)))
    logged: list[str] = []
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(fusion.logger, level, lambda message, *_: logged.append(message), raising=False)
    plain, _ = run(model, x)
    fused, graph = run(model, x, fusion.BWLAFusionPass())
    assert count(graph) == left
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert [said in message for message in logged] == [True]


def test_vllms_own_silu_kernel() -> None:
    """If vLLM is configured to use its custom op, the graph holds it functionalized."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized

    packet = getattr(torch.ops._C, "silu_and_mul", None)
    if packet is None:
        pytest.skip("this vLLM has no _C.silu_and_mul")
    graph = fx.Graph()
    x, out, weight = (graph.placeholder(name) for name in ("x", "out", "weight"))
    x.meta["val"], weight.meta["val"] = torch.empty(TOKENS, 2 * INNER), torch.empty(WIDTH)
    call = graph.call_function(auto_functionalized, (packet.default,), {"result": out, "input": x})
    source = graph.call_function(operator.getitem, (call, 1))
    source.meta["val"] = torch.empty(TOKENS, INNER)
    sizes = (WIDTH, 2, 4, 8, 0, 6, 1.0, 1)
    y = graph.call_function(fusion.LINEAR, (source, *(weight,) * 6, None, None, None, *sizes))
    y.meta["val"] = torch.empty(TOKENS, WIDTH)
    graph.output((y,))
    fusion.BWLAFusionPass()(graph)
    graph.lint()
    (fused,) = graph.find_nodes(op="call_function", target=fusion.SILU_MUL_LINEAR)
    assert fused.args == (x, *(weight,) * 6, None, None, None, *sizes)
    assert not graph.find_nodes(op="call_function", target=auto_functionalized)


def test_where_it_is_installed() -> None:
    """Under the platform's key, where vLLM looks; not where it does not compile, or a user says so or has a pass."""
    key = current_platform.pass_key

    def config(mode: CompilationMode, fuse: bool = True, **inductor: Any) -> Any:
        compilation = CompilationConfig(mode=mode, inductor_compile_config=inductor)
        return SimpleNamespace(compilation_config=compilation, additional_config={fusion.SWITCH: fuse})

    compiled = config(CompilationMode.VLLM_COMPILE)
    fusion.install(compiled)
    fusion.install(compiled)
    found = compiled.compilation_config.inductor_compile_config[key]
    assert isinstance(found, fusion.BWLAFusionPass)
    assert len(found.uuid()) == 64
    assert (
        compiled.compilation_config.compute_hash()
        != CompilationConfig(mode=CompilationMode.VLLM_COMPILE).compute_hash()
    ), "a graph compiled without the pass must not be loaded from the cache"

    for off in (config(CompilationMode.NONE), config(CompilationMode.VLLM_COMPILE, fuse=False)):
        fusion.install(off)
        assert key not in off.compilation_config.inductor_compile_config

    class Other(InductorPass):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph) -> None:
            """Somebody else's pass."""

    other = Other()
    taken = config(CompilationMode.VLLM_COMPILE, **{key: other})
    fusion.install(taken)
    assert taken.compilation_config.inductor_compile_config[key] is other


def test_vllm_runs_the_pass() -> None:
    """vLLM's own backend takes what stands under the key, runs it, and then lowers the norms that are left."""
    from vllm.compilation.backends import VllmBackend

    config = VllmConfig()
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    fusion.install(config)
    backend = VllmBackend(config)
    backend.configure_post_pass()
    assert isinstance(backend.pass_manager.passes[-1], fusion.BWLAFusionPass)
    torch.manual_seed(0)
    model, x = Block(torch.float32), torch.randn(TOKENS, WIDTH)
    plain, _ = run(model, x)
    fused, graph = run(model, x, backend.pass_manager)
    assert count(graph) == FUSED
    assert not any("vllm_ir" in str(node.target) for node in graph.nodes)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("additional", "on"), [({}, True), ({linear.DEPENDENT_SWITCH: False}, False), (None, True)]
)
def test_dependent_launch_can_be_turned_off(additional: dict[str, bool] | None, on: bool) -> None:
    with launch.dependent_launch(True):
        linear._switch_dependent_launch(additional)
        assert (launch.trigger(True) != launch.OFF) is on
