"""Gradients through converted models in transformers: adapters train, and inputs get the attribution they should."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bwla_converter.hf import modules as hf
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels import ops, reference
from bwla_kernels.format import LayerSpec
from random_tensors import normal, random_layer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

SPEC = LayerSpec(48, 64, 1, 8, 8, rank=2, bias=True)
IDS = torch.arange(24).view(2, 12)
FAMILIES = [("Qwen2", False), ("Qwen3", True), ("Gemma 3", True)]
"""Families, and whether their head is tied to the embedding: biases, a tied head, an embedding with a factor."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Return a function that converts a random model of a family once and returns (source, checkpoint)."""
    from benchmarks.common.tiny_models import write_model

    root, made = tmp_path_factory.mktemp("gradients"), {}

    def make(family: str = "Qwen2", tied: bool = False, bits: int = 16) -> tuple[Path, Path]:
        key = (family, tied, bits)
        if key not in made:
            folder = root / f"{family} {tied} {bits}"
            options = {"lively": True, "dtype": torch.float32, "tie_word_embeddings": tied}
            source = write_model(folder / "source", family, **options)
            convert(Options(str(source), folder / "out", rank=2, bits=bits, recipe="data-free"))
            made[key] = (source, folder / "out")
        return made[key]

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def dequantized(ours: nn.Module, source: Path) -> PreTrainedModel:
    """Load the source model with the dequantized weights of `ours`."""
    plain = load(source)
    for name, module in ours.named_modules():
        if isinstance(module, hf.BWLALinear):
            plain.get_submodule(name).weight.copy_(reference.dequantize(module.stored(), module.spec))
        elif isinstance(module, hf.BWLAHead | hf.BWLAEmbedding):
            stored = module.stored()
            weight = stored["weight_int8"] * stored["weight_scale"].unsqueeze(1)
            plain.get_submodule(name).weight.copy_(weight)
    return plain


def embedding_gradient(model: PreTrainedModel, **options) -> Tensor:
    """Return the gradient of the loss with respect to the input embeddings."""
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=IDS, **options).loss.backward()
    assert embeds.grad is not None
    return embeds.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_the_gradient_of_the_embeddings_is_that_of_the_dequantized_model(converted, family, tied) -> None:
    source, out = converted(family, tied)
    ours = load(out)
    expected = embedding_gradient(dequantized(ours, source))
    assert relative(embedding_gradient(ours), expected) <= 2e-3
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, f"{name} is not quantized and must get its gradient"


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.25), (6, 0.6)])
def test_the_straight_through_gradient_points_the_same_way(converted, bits: int, largest: float) -> None:
    source, out = converted(bits=bits)
    ours = load(out)
    assert relative(embedding_gradient(ours), embedding_gradient(dequantized(ours, source))) <= largest


def test_every_backend_has_the_gradient_of_the_reference(converted, monkeypatch) -> None:
    _, out = converted(bits=6)
    found = {}
    for name in (*(backend.name for backend in ops.backends()), hf.REFERENCE):
        if name == hf.REFERENCE or able(name):
            monkeypatch.setenv(hf.BACKEND_VARIABLE, name)
            found[name] = embedding_gradient(load(out))
    assert len(found) >= 2
    for name, gradient in found.items():
        assert relative(gradient, found[hf.REFERENCE]) <= 2e-2, name  # codes at rounding ties may differ


def able(backend_name: str) -> bool:
    backend = next(backend for backend in ops.backends() if backend.name == backend_name)
    return backend.can_implement(SPEC, torch.device("cpu"))[0]


def test_bfloat16_models_and_autocast(converted) -> None:
    _, out = converted()
    expected = embedding_gradient(load(out))
    assert relative(embedding_gradient(load(out, torch.bfloat16)), expected) <= 0.12
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(embedding_gradient(load(out)), expected) <= 0.12


class Adapter(nn.Module):
    """A low-rank adapter beside a linear, as PEFT builds it."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_adapters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Put an adapter around every quantized linear; return the parameters to train."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, hf.BWLALinear)]
    for name, module in linears:
        model.set_submodule(name, Adapter(module))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("family", "tied"), FAMILIES[:2])
def test_adapters_train_and_the_quantized_layers_stay(converted, family: str, tied: bool) -> None:
    model = load(converted(family, tied, bits=6)[1])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    parameters = with_adapters(model)
    assert len(parameters) == 2 * 14
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
    after = {name.replace(".base", ""): buffer for name, buffer in model.named_buffers()}
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_a_trained_adapter_of_the_first_layer_gets_the_dequantized_models_gradient(converted) -> None:
    """It lies before every other quantized layer, so that a gradient lost in one of them would show."""
    source, out = converted()
    ours = load(out)
    plain = dequantized(ours, source)
    gradients = []
    for model in (ours, plain):
        torch.manual_seed(1)
        model.requires_grad_(False)
        adapter = Adapter(model.model.layers[0].self_attn.q_proj)
        model.model.layers[0].self_attn.q_proj = adapter
        model(IDS, labels=IDS).loss.backward()
        gradients.append(adapter.up.weight.grad)
    assert relative(*gradients) <= 2e-3


def test_gradient_checkpointing_and_hooks_on_the_embedding(converted) -> None:
    """The path of trainers for frozen models: decoder layers are computed again in the backward pass."""
    model = load(converted(bits=6)[1])
    parameters = with_adapters(model)
    model(IDS, labels=IDS).loss.backward()
    expected = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_trainers_of_transformers_may_train_adapters(converted) -> None:
    assert load(converted(bits=6)[1]).hf_quantizer.is_trainable


def test_inference_before_training_and_a_copy(converted) -> None:
    """What a backend prepares in inference mode must serve a later backward pass."""
    model = load(converted(bits=6)[1])
    with torch.inference_mode():
        model(IDS)
    expected = embedding_gradient(model)
    assert torch.equal(embedding_gradient(copy.deepcopy(model)), expected)
    with torch.no_grad():
        assert not model(IDS).logits.requires_grad


def linear_of(spec: LayerSpec = SPEC) -> hf.BWLALinear:
    layer = random_layer(spec)
    return hf.BWLALinear.from_stored("up_proj", spec, layer, layer.get("bias"))


@pytest.mark.parametrize("run_before", [False, True])
def test_a_compiled_module_computes_and_differentiates_as_the_eager_one(run_before: bool) -> None:
    """The first call packs the weights, which no compiler may trace: it would read freed memory."""
    linear = linear_of()
    x, again = normal(3, 64).requires_grad_(), normal(3, 64).requires_grad_()
    expected = linear_of()(again)
    expected.sum().backward()
    if run_before:
        linear(x.detach())
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=run_before)
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, again.grad)
    assert torch.equal(compiled(x), expected)


def test_a_graph_without_breaks_needs_one_call_before() -> None:
    compiled = torch.compile(linear_of(), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="run the model once before torch.compile"):
        compiled(normal(3, 64))


def test_modules_on_the_meta_device() -> None:
    x = torch.empty(2, 3, 64, device="meta", requires_grad=True)
    y = linear_of().to("meta")(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape, x.grad.device.type) == ((2, 3, 48), x.shape, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gradients_on_a_gpu(converted) -> None:
    _, out = converted(bits=6)
    expected = embedding_gradient(load(out))
    model = load(out).cuda()
    embeds = model.get_input_embeddings()(IDS.cuda()).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=IDS.cuda()).loss.backward()
    assert relative(embeds.grad.cpu(), expected) <= 2e-2
