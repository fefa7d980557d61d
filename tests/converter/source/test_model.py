"""Checks before a conversion: every sound model opens, and every other one is refused with a specific message."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bwla_converter.source.meta_model import GUIDE
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import SourceError
from paths import ROOT
from safetensors.torch import load_file, save_file

from benchmarks.common.tiny_models import FAMILIES

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def refused(folder: Path, *sentences: str) -> None:
    with pytest.raises(SourceError) as error:
        check_values(open_source(str(folder)))
    for sentence in sentences:
        assert sentence in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_family_opens_single_and_sharded(make_model, family: str, shards: int) -> None:
    folder = make_model(family, shards=shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards > 1)
    source = open_source(str(folder))
    check_values(source)
    assert source.structure.architecture == FAMILIES[family].architecture
    assert source.num_layers == 2
    layer = source.read(source.names_of_layer(1))
    assert layer["model.layers.1.mlp.down_proj.weight"].shape == (64, 128)
    assert all(name.startswith("model.layers.1.") for name in layer)
    assert "model.embed_tokens.weight" in source.names_outside_layers()


def test_tied_embeddings_need_no_head(make_model) -> None:
    source = open_source(str(make_model("Qwen3", tie_word_embeddings=True)))
    assert "lm_head.weight" not in source.entries


def test_biases_are_tensors_of_the_decoder_layer(make_model) -> None:
    source = open_source(str(make_model("Qwen2")))
    assert "model.layers.0.self_attn.q_proj.bias" in source.names_of_layer(0)


def test_a_path_that_is_neither_folder_nor_hub_id() -> None:
    with pytest.raises(SourceError, match="expected a folder, a GGUF file or a Hub id"):
        open_source("/no/such/folder/at all")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "expected a model, found no files: check the path")


def test_a_folder_without_weights(make_model) -> None:
    folder = make_model()
    (folder / "model.safetensors").unlink()
    refused(folder, "expected model.safetensors or model.safetensors.index.json, found config.json")


def test_a_missing_shard(make_model) -> None:
    folder = make_model(shards=3)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, shard.name, "the file is missing")


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file(make_model, keep: int) -> None:
    folder = make_model()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors: not a complete safetensors file")


def test_an_unknown_architecture(make_model, edit) -> None:
    folder = make_model()
    edit.json(folder / "config.json", architectures=["QwenForCausalLM"])
    refused(
        folder,
        "found the architecture QwenForCausalLM",
        "expected a model class of transformers",
        "update transformers",
    )
    refused(folder, GUIDE)
    assert (ROOT / GUIDE).is_file()


@pytest.mark.parametrize("architectures", [None, [], "none at all", [7], {"a": 1}])
def test_architectures_that_are_no_list_of_names(make_model, edit, architectures) -> None:
    folder = make_model()
    edit.json(folder / "config.json", architectures=architectures)
    refused(folder, "found the architecture")


def test_a_model_that_is_quantized_already(make_model, edit) -> None:
    folder = make_model()
    edit.json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(
        folder,
        "expected an unquantized model, or fp8, MXFP4, BitNet or MLX weights, found one quantized with gptq",
    )
    edit.json(folder / "config.json", quantization_config="gptq")
    refused(folder, "expected quantization_config to be an object, found 'gptq'")


def test_a_width_that_is_no_multiple_of_32_stays_in_16_bits(make_model) -> None:
    source = open_source(str(make_model(intermediate_size=100)))
    assert "model.layers.0.mlp.down_proj" not in source.linears_of_layer(0)
    assert source.notes == (
        "in 16 bits: mlp.down_proj (an input width must be a positive multiple of 32, found 100)",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_all_tensors_with_values_that_are_not_finite_are_listed(make_model, edit, value: float) -> None:
    folder = make_model("Qwen2")

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    names = [WEIGHT, "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"]
    for name in names:
        edit.tensor(folder / "model.safetensors", name, spoil)
    refused(
        folder,
        "found 4 problem(s)",
        *(f"{name}: expected finite values, found NaN or inf" for name in names),
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: None, f"{WEIGHT} is missing, expected shape [128, 64]"),
        (lambda t: t[:-1].contiguous(), f"{WEIGHT}: expected shape [128, 64], found [127, 64]"),
        (
            lambda t: t.to(torch.int8),
            f"{WEIGHT}: expected bfloat16, float16, float32 or scaled fp8, found torch.int8",
        ),
        (
            lambda t: t.to(torch.float8_e4m3fn),
            f"{WEIGHT}: expected weight_scale_inv or weight_scale for this fp8 weight, found neither",
        ),
    ],
)
def test_tensors_that_do_not_belong_to_the_config(make_model, edit, change, sentence: str) -> None:
    folder = make_model()
    edit.tensor(folder / "model.safetensors", WEIGHT, change)
    refused(folder, sentence)


def test_a_tensor_that_belongs_to_no_module(make_model, edit) -> None:
    folder = make_model()
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.extra.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    refused(folder, "model.extra.weight is not a tensor of Qwen3ForCausalLM")


def test_missing_shards_and_missing_tensors_are_listed_together(make_model, edit) -> None:
    folder = make_model(shards=4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    shards[1:3] = [folder / shard for shard in shards[1:3]]
    for shard in shards[1:3]:
        shard.unlink()
    edit.json(folder / "config.json", num_hidden_layers=3, layer_types=None)
    refused(
        folder,
        "found 13 problem(s)",
        f"{shards[1]}: the file is missing",
        f"{shards[2]}: the file is missing",
    )


def test_a_long_list_is_cut_with_its_count(make_model, edit) -> None:
    folder = make_model()
    edit.json(folder / "config.json", num_hidden_layers=9, layer_types=None)
    refused(folder, "found 77 problem(s)", "and 72 more")


def test_more_layers_than_any_model_has_are_not_built(make_model, edit) -> None:
    folder = make_model()
    edit.json(folder / "config.json", num_hidden_layers=10**9, layer_types=None)
    refused(folder, "expected at most 10000 num_hidden_layers, found 1000000000")


def test_an_index_beside_a_single_file_that_it_does_not_list(make_model) -> None:
    folder = make_model(shards=3)
    shutil.copy(next(folder.glob("model-*.safetensors")), folder / "model.safetensors")
    refused(folder, "expected model.safetensors or model.safetensors.index.json, found both")


def test_a_header_that_names_a_tensor_twice(make_model) -> None:
    """The safetensors library silently takes the last of the two."""
    folder = make_model()
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    name = b'"model.norm.weight":'
    header = raw[8 : 8 + size]
    start = header.index(name)
    entry = header[start : header.index(b"}", start) + 1]
    header = header.replace(entry, entry + b"," + entry)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    refused(folder, "model.safetensors: its header is not valid (the key 'model.norm.weight' appears twice)")


def test_json_that_is_nested_without_end(make_model) -> None:
    folder = make_model()
    (folder / "config.json").write_text('{"a":' * 100_000)
    refused(folder, "config.json: not valid JSON (nested too deeply)")


def test_all_offending_tensors_are_listed_at_once(make_model, edit) -> None:
    folder = make_model()
    edit.json(folder / "config.json", num_hidden_layers=3, layer_types=None)
    refused(folder, "found 11 problem(s)", "model.layers.2.self_attn.q_proj.weight is missing")


def test_a_config_that_contradicts_itself(make_model, edit) -> None:
    folder = make_model()
    edit.json(folder / "config.json", num_hidden_layers=3)
    refused(folder, "config.json: transformers cannot build this model")


def test_every_flipped_byte_of_the_index_is_noticed_or_harmless(make_model) -> None:
    folder = make_model(shards=3)
    index = folder / "model.safetensors.index.json"
    good = index.read_bytes()
    expected = open_source(str(folder)).entries
    noticed = 0
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 0x04
        index.write_bytes(bytes(bad))
        try:
            entries = open_source(str(folder)).entries
        except SourceError:
            noticed += 1
        else:
            # Only white space and metadata, which no loader uses, may differ.
            assert entries == expected
            assert json.loads(bytes(bad))["weight_map"] == json.loads(good)["weight_map"]
    assert noticed > 100
