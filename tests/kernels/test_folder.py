"""What the check of a whole folder reads from config.json: the names of 8-bit modules and the number of layers."""

import json
from pathlib import Path

import pytest
import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.folder import check_folder, int8_modules, read_folder
from bwla_kernels.format.schema import BWLAFormat, head_args
from bwla_kernels.format.tensors import describe_tensors
from random_tensors import random_layer
from safetensors.torch import save_file

ROTATION = {"q_proj": (1, 8, 8)}
HEAD, EMBEDDING = "lm_head.weight_int8", "model.embed_tokens.weight_int8"
INNER_EMBEDDING = "model.language_model.embed_tokens.weight_int8"


@pytest.mark.parametrize(
    ("modules", "names", "found"),
    [
        (("lm_head", "embedding"), [EMBEDDING, HEAD], ["lm_head", "model.embed_tokens"]),
        (("embedding",), [INNER_EMBEDDING], ["model.language_model.embed_tokens"]),
        (("embedding",), [], ["model.embed_tokens"]),
        (("embedding",), [HEAD], ["model.embed_tokens"]),
        (("lm_head", "embedding"), [HEAD], ["lm_head", "model.embed_tokens"]),
        ((), [HEAD], []),
    ],
)
def test_8_bit_modules_have_the_names_of_the_files(
    modules: tuple[str, ...], names: list[str], found: list[str]
) -> None:
    config = BWLAFormat(format_version=2, rotation=ROTATION, **dict.fromkeys(modules, head_args()))
    assert int8_modules(config, [*names, "model.norm.weight"]) == found


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [
        ({"num_hidden_layers": 1}, False),
        ({"n_layer": 1}, False),
        ({"text_config": {"num_hidden_layers": 1}}, False),
        ({"n_layer": 2}, True),
        ({"text_config": {"num_hidden_layers": 2}, "num_hidden_layers": 1}, True),
    ],
)
def test_the_number_of_layers_has_several_names(
    sizes: dict[str, object], missing: bool, tmp_path: Path
) -> None:
    layer = random_layer(LayerSpec(32, 64, 1, 8, 8))
    tensors = {f"model.layers.0.q_proj.{key}": tensor for key, tensor in layer.items()}
    save_file({**tensors, "model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    quantization = BWLAFormat(rotation=ROTATION).to_json()
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "quantization_config": quantization}))
    if missing:
        with pytest.raises(FormatError, match=r"model.layers.1.q_proj.weight_packed is missing"):
            check_folder(tmp_path)
    else:
        assert list(check_folder(tmp_path)) == ["model.layers.0.q_proj"]


@pytest.mark.parametrize("listed", [True, False])
def test_a_tied_tensor_that_is_stored_too_has_the_same_values(listed: bool, tmp_path: Path) -> None:
    """Where tensors are not listed, tie_word_embeddings and the usual names say what is tied."""
    layer = random_layer(LayerSpec(32, 64, 1, 8, 8))
    tensors = {f"model.layers.0.q_proj.{key}": tensor for key, tensor in layer.items()}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    config = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    for head in (torch.ones(8, 64), torch.zeros(8, 64)):
        plain = {"model.embed_tokens.weight": torch.ones(8, 64), "lm_head.weight": head}
        save_file({**tensors, **plain}, tmp_path / "model.safetensors")
        described = {"tensors": describe_tensors(read_folder(tmp_path), tied)} if listed else {}
        quantization = BWLAFormat(rotation=ROTATION, **described).to_json()
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        if head.any():
            assert list(check_folder(tmp_path)) == ["model.layers.0.q_proj"]
        else:
            with pytest.raises(FormatError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
                check_folder(tmp_path)
