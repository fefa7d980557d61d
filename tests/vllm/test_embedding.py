"""The 8-bit embedding in vLLM: shards of the vocabulary, the head that is tied to it, compiled and reloaded engines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels.format.schema import BWLAFormat, head_args
from bwla_kernels.head import dequantize_rows, head_reference, quantize_head
from golden import find_golden, load_reference, watched
from torch import Tensor

from benchmarks.common.tiny_models import write_model
from bwla_vllm.config import BWLAConfig, ties_head
from bwla_vllm.errors import StartError

VOCABULARY, HIDDEN, PADDED = 250, 64, 256
"""vLLM pads the vocabulary to a multiple of 64."""


@pytest.fixture
def stored() -> dict[str, Tensor]:
    return quantize_head(torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def config() -> BWLAConfig:
    return BWLAConfig(
        BWLAFormat(format_version=2, rotation={"q_proj": (1, 8, 8)}, embedding=head_args(), rank=0)
    )


@pytest.fixture
def tie(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether the model that vLLM builds ties its head."""
    return lambda tied: monkeypatch.setattr("bwla_vllm.config.ties_head", lambda: tied)


def make_layer(kind: str, config: BWLAConfig, dtype: torch.dtype = torch.float32) -> Any:
    import vllm.model_executor.layers.vocab_parallel_embedding as layers

    return getattr(layers, kind)(
        VOCABULARY, HIDDEN, params_dtype=dtype, quant_config=config, prefix="model.embed_tokens"
    )


def load(layer: Any, stored: dict[str, Tensor]) -> Any:
    for name, tensor in stored.items():
        parameter = layer.get_parameter(name)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.fixture
def on_vocabulary_rank(
    on_rank: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], None]:
    """`on_rank` for layers that shard the vocabulary; their output is that of this rank alone."""
    import vllm.model_executor.layers.vocab_parallel_embedding as layers

    def pretend(rank: int, size: int) -> None:
        on_rank(rank, size)
        monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(layers, "tensor_model_parallel_all_reduce", lambda output: output)

    pretend(0, 1)
    return pretend


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("vllm_config")
def test_shards_of_the_vocabulary(
    size: int,
    dtype: torch.dtype,
    config: BWLAConfig,
    stored: dict[str, Tensor],
    tie: Callable[[bool], None],
    on_vocabulary_rank: Callable[[int, int], None],
) -> None:
    """The rows of all ranks add up to the embedding's, and their logits, one after the other, are the tied head's."""
    tie(True)
    ids = torch.tensor([[0, 1, 127, 128], [129, VOCABULARY - 1, 64, 0]])
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows, logits = torch.zeros(*ids.shape, HIDDEN, dtype=dtype), []
    for rank in range(size):
        on_vocabulary_rank(rank, size)
        layer = load(make_layer("VocabParallelEmbedding", config, dtype), stored)
        rows += layer(ids)
        logits.append(layer.quant_method.apply(layer, x))
    assert torch.equal(rows, dequantize_rows(**stored, ids=ids, dtype=dtype))
    joined = torch.cat(logits, 1)
    assert joined.shape == (3, PADDED)
    assert not joined[:, VOCABULARY:].any()
    torch.testing.assert_close(joined[:, :VOCABULARY], head_reference(x, **stored))


@pytest.mark.usefixtures("vllm_config", "on_rank")
def test_the_tied_head_is_the_embedding(
    config: BWLAConfig, stored: dict[str, Tensor], tie: Callable[[bool], None]
) -> None:
    tie(True)
    embedding = load(make_layer("VocabParallelEmbedding", config), stored)
    head = make_layer("ParallelLMHead", config)
    assert list(head.parameters()) == []
    assert head.tie_weights(embedding) is embedding
    # A model class that ties its head in another way must not serve one without weights.
    with pytest.raises(StartError, match=r"lm_head: config.json ties .*--embedding-bits 16"):
        head.quant_method.process_weights_after_loading(head)


@pytest.mark.usefixtures("vllm_config", "on_rank")
def test_an_untied_head_is_a_layer_of_its_own(
    config: BWLAConfig, stored: dict[str, Tensor], tie: Callable[[bool], None]
) -> None:
    tie(False)
    assert type(make_layer("ParallelLMHead", config).quant_method).__name__ == "UnquantizedEmbeddingMethod"
    embedding = load(make_layer("VocabParallelEmbedding", config), stored)
    # Rows are looked up in the stored tensors; nothing is kept for products with them.
    assert {name: tensor.shape for name, tensor in embedding.named_parameters()} == {
        name: (PADDED, *tensor.shape[1:]) for name, tensor in stored.items()
    }


@pytest.mark.usefixtures("vllm_config", "on_rank")
def test_other_embeddings_are_left_alone(config: BWLAConfig) -> None:
    import vllm.model_executor.layers.vocab_parallel_embedding as layers

    other = layers.VocabParallelEmbedding(16, 8, quant_config=config, prefix="model.embed_positions")
    assert [name for name, _ in other.named_parameters()] == ["weight"]
    # Llama's class in vLLM does not name its embedding.
    own = layers.VocabParallelEmbedding(16, 8, quant_config=config)
    assert [name for name, _ in own.named_parameters()] == ["weight_int8", "weight_scale"]


@pytest.mark.usefixtures("vllm_config", "on_rank")
@pytest.mark.parametrize("missing", ["weight_int8", "weight_scale"])
def test_an_embedding_that_was_not_loaded_is_named(
    missing: str, config: BWLAConfig, stored: dict[str, Tensor]
) -> None:
    del stored[missing]
    with pytest.raises(StartError, match=rf"model.embed_tokens.{missing}: .*again"):
        load(make_layer("VocabParallelEmbedding", config), stored)


@pytest.mark.parametrize("tied", [False, True])
def test_whether_the_head_is_tied_is_vllms_answer(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(tie_word_embeddings=tied)
    model = SimpleNamespace(hf_config=SimpleNamespace(get_text_config=lambda: text))
    monkeypatch.setattr(
        "vllm.config.get_current_vllm_config_or_none", lambda: SimpleNamespace(model_config=model)
    )
    assert ties_head() is tied


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tokenizer: Callable[[Path], None]) -> Path:
    """A converted model whose head is tied to its 8-bit embedding; leave it as it is."""
    folder = tmp_path_factory.mktemp("tied")
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 249}
    source = write_model(
        folder / "source", "Qwen3", dtype=torch.float32, lively=True, tie_word_embeddings=True, **ids
    )
    tokenizer(source)
    convert(Options(str(source), folder / "out", rank=2, recipe="data-free"))
    return folder / "out"


@pytest.fixture(scope="module")
def golden(tied: Path) -> Any:
    model = load_reference(tied)
    with watched(model) as margin:
        return find_golden(model, margin, VOCABULARY)


def test_compiled_equals_reference(
    tied: Path, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    compare(start(tied, enforce_eager=False), golden)


def test_reloaded_weights_answer_the_same(
    tied: Path, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    engine = start(tied)

    def spoil(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    engine.apply_model(spoil)
    engine.collective_rpc("reload_weights")
    compare(engine, golden)


def test_dummy_weights_need_no_weights(
    tied: Path, start: Callable[..., Any], score: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(tied, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))
    scores = score(start(folder, load_format="dummy"), [1, 2, 3])
    assert all(value <= 0 for table in scores for value in table.values())  # no NaN either


def test_bfloat16_serves_the_embedding_in_bfloat16(
    tied: Path, start: Callable[..., Any], score: Callable[..., Any]
) -> None:
    engine = start(tied, dtype="bfloat16")

    def dtype(model: torch.nn.Module) -> str:
        return str(model.model.embed_tokens(torch.tensor([1])).dtype)

    assert engine.apply_model(dtype) == ["torch.bfloat16"]
    assert all(value <= 0 for table in score(engine, [1, 2, 3]) for value in table.values())


@pytest.mark.slow
def test_two_ranks_equal_one(
    tied: Path,
    golden: Any,
    start: Callable[..., Any],
    compare: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    compare(start(tied, tensor_parallel_size=2, distributed_executor_backend="mp"), golden)
