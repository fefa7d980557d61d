"""Tensors of GGUF files: under the right names, with the right values, and none too many or too few."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bwla_converter.source.families import FAMILIES
from bwla_converter.source.gguf_folder import write_folder
from bwla_converter.source.gguf_models.reorder import unpermute
from bwla_converter.source.meta_model import build_meta_model
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import read_folder, read_json, read_tensors
from gguf_models import permute, tiny, write_gguf
from random_tensors import normal
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

NAMES = [family.name for family in FAMILIES if family.gguf]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    entries = read_folder(folder)
    return read_tensors(folder, entries, list(entries))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_unquantized_weights_are_those_of_the_original(tmp_path: Path, family: str, tied: bool) -> None:
    tied = tied or family == "Gemma 2"  # llama.cpp never stores its head
    model = tiny(family, tie_word_embeddings=tied)
    write_folder(write_gguf(tmp_path / "model.gguf", model), tmp_path / "folder")
    found = tensors_of(tmp_path / "folder")
    expected = model.state_dict()
    assert expected.keys() - found.keys() == ({"lm_head.weight"} if tied else set())
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if family.startswith("Gemma") and name.endswith("norm.weight"):
            # 1 was added in float32, which costs small values some of their bits.
            torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=2**-23)
        else:
            assert torch.equal(tensor.float(), expected[name]), name


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", NAMES)
def test_transformers_reads_the_same_bits(tmp_path: Path, family: str, quantization: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny(family), quantization)
    folder = tmp_path / "folder"
    write_folder(file, folder)
    model = build_meta_model(folder, read_json(folder / "config.json"))
    expected = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_unpermute_undoes_the_permutation_of_llama_cpp(shape: tuple[int, ...]) -> None:
    tensor = normal(*shape)
    assert torch.equal(unpermute(permute(tensor, 3), 3), tensor)
    assert not torch.equal(permute(tensor, 3), tensor)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        (
            {"blk.1.ffn_up.weight": None, "output_norm.weight": None},
            [
                "found 2 problem(s)",
                "blk.1.ffn_up.weight is missing (model.layers.1.mlp.up_proj.weight), expected shape [128, 64]",
            ],
        ),
        (
            {"blk.0.attn_k.weight": np.zeros((32, 64), np.float32)},
            ["blk.0.attn_k.weight: expected shape [64, 64], found [32, 64]"],
        ),
        (
            {"v.blk.0.attn_q.weight": np.zeros((64, 64), np.float32)},
            ["v.blk.0.attn_q.weight is not a tensor of Qwen3ForCausalLM"],
        ),
    ],
)
def test_tensors_that_do_not_belong_together(
    make_gguf, tmp_path: Path, changes, sentences: list[str]
) -> None:
    with pytest.raises(SourceError) as error:
        write_folder(make_gguf(changes=changes), tmp_path / "folder")
    for sentence in sentences:
        assert sentence in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
