"""Tiny random BWLA checkpoints, their reference in transformers, and one place that starts vLLM."""

import functools
import gc
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.files import read_folder
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.format.model import config_values
from bwla_kernels.format.schema import BWLAFormat, activation_args
from bwla_kernels.format.tensors import describe_tensors
from golden import NEW_TOKENS, Golden, find_golden, margin_of
from safetensors.torch import save_file
from torch import Tensor, nn

LayerFactory = Callable[[LayerSpec, int], dict[str, Tensor]]

HIDDEN, INTERMEDIATE, HEAD_DIM, HEADS, KV_HEADS, VOCAB = 64, 128, 32, 4, 2, 256
ROTATION = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (1, 8, 8)),
    **dict.fromkeys(("o_proj", "down_proj"), (2, 8, 8)),
}


@pytest.fixture
def plugin_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Capture each line of the plugin's log once, whatever vLLM and pytest have done to the loggers above it."""
    logger = logging.getLogger("vllm.bwla")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    return caplog


@pytest.fixture(scope="session", autouse=True)
def _engine_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An engine in this process, on one thread, with a compile cache of its own."""
    patch = pytest.MonkeyPatch()
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm_cache")),
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        patch.setenv(name, value)
    patch.delenv("BWLA_BACKEND", raising=False)
    yield
    patch.undo()


@pytest.fixture
def vllm_config() -> Iterator[None]:
    """The configuration that vLLM sets while it builds a model."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be a tensor-parallel rank: `on_rank(rank, size)`; (0, 1) before the first call."""
    import vllm.distributed
    import vllm.model_executor.layers.linear as linear
    import vllm.model_executor.layers.vocab_parallel_embedding as embedding
    import vllm.model_executor.parameter as parameter

    def pretend(rank: int, size: int) -> None:
        for module in (vllm.distributed, linear, embedding, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank, raising=False)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    return pretend


class ReferenceLinear(nn.Module):
    """`reference.linear` in a transformers model; remembers how close its last input came to a rounding tie."""

    def __init__(self, tensors: dict[str, Tensor], spec: LayerSpec) -> None:
        super().__init__()
        self.tensors, self.spec = tensors, spec
        self.margin = 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.margin = margin_of(x, self.tensors, self.spec)
        return reference.linear(x, self.tensors, self.spec)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the float32 model that defines it."""

    folder: Path
    model: nn.Module
    specs: dict[str, LayerSpec]

    def margin(self) -> float:
        """How close the last forward pass came to a rounding tie, in codes."""
        return min(m.margin for m in self.model.modules() if isinstance(m, ReferenceLinear))

    def golden(self) -> Golden:
        """A prompt whose activations stay clear of rounding ties, and its answer."""
        return find_golden(self.model, self.margin, VOCAB)


def make_config(kind: str, tied: bool) -> Any:
    """The transformers config of a tiny model of architecture `kind`."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 255,
    }
    if kind == "qwen2":  # derives the head width from the hidden size
        return AutoConfig.for_model(kind, **{**sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
    return AutoConfig.for_model(kind, head_dim=HEAD_DIM, **sizes)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words t0 .. t255, so that a server can decode."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer() -> Callable[[Path], None]:
    """`write_tokenizer` for tests."""
    return write_tokenizer


def input_group(name: str) -> str:
    """The name that layers reading the same input share."""
    stem, _, leaf = name.rpartition(".")
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp_in", "up_proj": "mlp_in"}
    return f"{stem}.{groups.get(leaf, leaf)}"


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Two safetensors files and their index."""
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in half}, folder / file)
        weight_map.update(dict.fromkeys(half, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def build(
    make_layer: LayerFactory,
    folder: Path,
    kind: str = "qwen3",
    *,
    bits: int = 6,
    rank: int | dict[str, int] = 2,
    clip: float | dict[str, float] = 1.0,
    tied: bool = False,
    rotation: dict[str, tuple[int, int, int]] | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    planes: int | dict[str, int] = 1,
    seed: int = 0,
) -> Checkpoint:
    """Write a random checkpoint of architecture `kind` and build its reference."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    config = make_config(kind, tied)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and name.endswith("norm.weight")
            parameter.copy_(1 + 0.1 * noise if norm else 0.3 * noise)
    quantization = BWLAFormat(
        format_version=1 if planes == 1 else 2,
        planes=planes,
        input_activations=activation_args(bits),
        rank=rank,
        clip=clip,
        rotation={**ROTATION, **(rotation or {})},
        ignore=list(ignore),
    )
    tensors: dict[str, Tensor] = {}
    specs: dict[str, LayerSpec] = {}
    shared: dict[str, dict[str, Tensor]] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        bias = module.bias is not None
        spec = quantization.layer_spec(name, module.out_features, module.in_features, bias)
        if spec is None:
            continue
        layer = make_layer(spec, seed + len(specs))
        own = {key: layer[key] for key in INPUT_TRANSFORM if key in layer}
        layer.update(shared.setdefault(input_group(name), own))
        tensors.update({f"{name}.{key}": tensor for key, tensor in layer.items()})
        specs[name] = spec
        model.set_submodule(name, ReferenceLinear(layer, spec))
    tensors.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, tensors)
    config.architectures = [type(model).__name__]
    data = config.to_dict()
    described = {"tensors": describe_tensors(read_folder(folder), {}), "config": config_values(data)}
    data["quantization_config"] = quantization.model_copy(update=described).to_json()
    (folder / "config.json").write_text(json.dumps(data))
    write_tokenizer(folder)
    return Checkpoint(folder, model, specs)


@pytest.fixture(scope="session")
def make_checkpoint(make_layer: LayerFactory) -> Callable[..., Checkpoint]:
    """`make_checkpoint(folder, kind, **format)`: `build` for tests."""
    return functools.partial(build, make_layer)


@pytest.fixture(scope="session")
def qwen3(make_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint that most tests share; leave it as it is."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def golden(qwen3: Checkpoint) -> Golden:
    """A prompt for `qwen3` and its right answer."""
    return qwen3.golden()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Start engines in this process; they end with the test."""
    engines = []

    def start_one(folder: Path, **options: Any) -> Any:
        from vllm import LLM, ModelRegistry

        # A registered class is inspected in this process; a lazy name, in one of its own for half a minute.
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        registered = ModelRegistry.models.get(name)  # none for a class that only transformers has
        if hasattr(registered, "load_model_cls"):
            ModelRegistry.register_model(name, registered.load_model_cls())
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 64,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": 16 * 2**20,
            "disable_log_stats": True,
        }
        engines.append(LLM(str(folder), **{**defaults, **options}))
        return engines[-1]

    yield start_one
    engines.clear()
    gc.collect()


@pytest.fixture(scope="session")
def score() -> Callable[..., list[dict[int, float]]]:
    """Ask an engine for the log probabilities of a prompt's tokens from the second on, and of the likeliest."""

    def score_one(engine: Any, prompt: list[int]) -> list[dict[int, float]]:
        from vllm import SamplingParams

        options = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=5)
        (result,) = engine.generate({"prompt_token_ids": prompt}, options, use_tqdm=False)
        tables = result.prompt_logprobs[1:]
        return [{token: value.logprob for token, value in table.items()} for table in tables]

    return score_one


@pytest.fixture(scope="session")
def compare(score: Callable[..., list[dict[int, float]]]) -> Callable[..., None]:
    """Check that an engine answers as the reference does: greedy tokens, and scores to 4 decimals."""

    def compare_one(engine: Any, golden: Golden) -> None:
        from vllm import SamplingParams

        options = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        (result,) = engine.generate({"prompt_token_ids": golden.prompt}, options, use_tqdm=False)
        assert list(result.outputs[0].token_ids) == golden.answer
        scored = score(engine, [*golden.prompt, *golden.answer])
        assert len(scored) == len(golden.logprobs)
        # Logits are float32, and as large as the smallest log probabilities: hundreds in some random models.
        bound = 1e-4 + 1e-6 * float(golden.logprobs.abs().max())
        for wanted, found in zip(golden.logprobs, scored, strict=True):
            assert len(found) >= 5
            for token, value in found.items():
                assert value == pytest.approx(wanted[token].item(), abs=bound)

    return compare_one
