"""Every architecture that transformers reads from GGUF files: read back as it was, or refused with the reason."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bwla_converter.source.gguf_config import make_config
from bwla_converter.source.gguf_file import open_gguf
from bwla_converter.source.gguf_folder import write_folder
from bwla_converter.source.gguf_models.architectures import ARCHITECTURES, REFUSED
from bwla_converter.source.gguf_tensors import tensor_origins
from bwla_converter.source.meta_model import build_meta_model
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import read_folder, read_json, read_tensors
from gguf_architectures import GGUF_CASES, write_pair
from gguf_models import ARCHITECTURES as FAMILIES
from gguf_models import finish
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

NO_SETTINGS = {"transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
ANOTHER_NAME = {"mistral": "llama", "umt5": "t5"}
"""What files call the architectures that have a name of their own in transformers only."""

READ_BY_THE_OLD_READER = ("stablelm", "starcoder2", "nemotron", "falcon 7B", "bloom", "lfm2", "gemma4 31B")
"""Models without experts whose tensors transformers' older reader gives the right values."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    entries = read_folder(folder)
    return read_tensors(folder, entries, list(entries))


@torch.no_grad()
@pytest.mark.parametrize("name", GGUF_CASES)
def test_a_model_is_read_back_as_it_was(tmp_path: Path, name: str) -> None:
    original, file = write_pair(tmp_path, name)
    folder = tmp_path / "folder"
    write_folder(file, folder)

    expected, found = tensors_of(original), tensors_of(folder)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        routing = key.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if routing else torch.bfloat16)
        # llama.cpp computes norms and decays in float32, which costs small values some of their bits.
        torch.testing.assert_close(
            tensor.float(), expected[key].float(), rtol=2**-7, atol=2**-20, msg=f"{key} differs"
        )
        if tensor.dim() > 1:
            assert torch.equal(tensor.float(), expected[key].float()), key

    was, config = read_json(original / "config.json"), read_json(folder / "config.json")
    lost = NO_SETTINGS | GGUF_CASES[name].lost
    assert {key: config.get(key) for key in was.keys() - lost} == {key: was[key] for key in was.keys() - lost}

    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        for path in (original, folder)
    ]
    tokens = torch.arange(40).view(1, 40) * 7 % 200
    logits, same = (model.eval()(tokens).logits for model in models)
    assert logits.std() > 0.1
    torch.testing.assert_close(same, logits, rtol=2e-2, atol=2e-2)
    check_values(open_source(str(folder)))


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "qwen35moe", "gemma4 26B", "falcon 40B"])
def test_quantized_experts_are_the_parts_of_the_whole_tensor(tmp_path: Path, name: str) -> None:
    original, file = write_pair(tmp_path, name, "Q8_0")
    folder = tmp_path / "folder"
    write_folder(file, folder)
    expected = tensors_of(original)
    for key, tensor in tensors_of(folder).items():
        error = (tensor.float() - expected[key].float()).abs().max()
        assert error <= expected[key].float().abs().max() / 100, key


@pytest.mark.parametrize("name", READ_BY_THE_OLD_READER)
def test_transformers_reads_the_same_values(tmp_path: Path, name: str) -> None:
    _, file = write_pair(tmp_path, name)
    folder = tmp_path / "folder"
    write_folder(file, folder)
    model = build_meta_model(folder, read_json(folder / "config.json"))
    expected = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    found = tensors_of(folder)
    assert expected
    for key in found.keys() & expected.keys():
        assert torch.equal(found[key].flatten(), expected[key].bfloat16().flatten()), key
    # The older reader knows names without a suffix in the file only, such as Gemma 4's scalars.
    assert {key.rpartition(".")[2] for key in found.keys() - expected.keys()} <= {"layer_scalar"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen35", "qwen35moe"])
def test_transformers_computes_the_same_from_the_file(tmp_path: Path, name: str) -> None:
    _, file = write_pair(tmp_path, name)
    folder = tmp_path / "folder"
    write_folder(file, folder)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, **options)
    found = AutoModelForCausalLM.from_pretrained(folder, **options)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    assert found.config.to_diff_dict()["layer_types"] == expected.config.to_diff_dict()["layer_types"]


def test_each_architecture_that_transformers_reads_is_read_or_refused() -> None:
    """A newer transformers that reads more fails here."""

    def plain(name: str) -> str:
        return ANOTHER_NAME.get(name, name).replace("_", "").replace("-", "")

    readable = {*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}
    known = {plain(entry.gguf) for entry in ARCHITECTURES} | {plain(name) for name in REFUSED}
    assert {plain(name) for name in readable} <= known


def test_each_architecture_is_tested() -> None:
    tested = {case.gguf for case in GGUF_CASES.values()} | set(FAMILIES.values())
    assert {entry.gguf for entry in ARCHITECTURES} == tested


@pytest.mark.parametrize("architecture", REFUSED)
def test_an_architecture_that_cannot_be_converted_is_refused_with_the_reason(
    tmp_path: Path, architecture: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_tensor("token_embd.weight", torch.zeros(96, 64).numpy())
    finish(writer)
    with pytest.raises(SourceError) as error:
        write_folder(tmp_path / "model.gguf", tmp_path / "folder")
    assert f"found the architecture {architecture} ({REFUSED[architecture]}), expected" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_blocks_that_predict_several_tokens_are_left_out(tmp_path: Path) -> None:
    _, path = write_pair(tmp_path, "qwen35")
    file = open_gguf(path)
    metadata = {**file.metadata, "qwen35.block_count": 3, "qwen35.nextn_predict_layers": 1}
    extra = {"blk.2.nextn.eh_proj.weight": file.tensors["blk.1.attn_q.weight"]}
    longer = type(file)(file.path, metadata, {**file.tensors, **extra})
    config = make_config(longer)
    assert config.num_hidden_layers == 2
    config.save_pretrained(tmp_path / "config")
    model = build_meta_model(tmp_path / "config", config.to_dict())
    assert tensor_origins(longer, model).keys() == tensor_origins(file, model).keys()


def test_keys_of_layers_that_use_those_of_others_are_left_out(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "blk.3.attn_k.weight": tensors["blk.1.attn_k.weight"]}

    original, file = write_pair(tmp_path, "gemma4 E2B", edit=edit)
    write_folder(file, tmp_path / "folder")
    assert tensors_of(tmp_path / "folder").keys() == tensors_of(original).keys()


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", ["qwen3moe", "minimax-m2", "gemma4 26B"])
def test_gate_and_up_may_be_one_tensor_or_two(tmp_path: Path, name: str, quantization: str) -> None:
    """llama.cpp's converter joins or divides them by an option."""

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        other = dict(tensors)
        for layer in range(2):
            gate, up, both = (f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "gate_up"))
            if both in other:
                other[gate], other[up] = (part.contiguous() for part in other.pop(both).chunk(2, dim=1))
            else:
                other[both] = torch.cat([other.pop(gate), other.pop(up)], dim=1)
        return other

    found = []
    for number, change in enumerate((lambda tensors: tensors, edit)):
        folder = tmp_path / str(number)
        _, file = write_pair(folder, name, quantization, change)
        write_folder(file, folder / "folder")
        found.append(tensors_of(folder / "folder"))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert torch.equal(found[1][key], tensor), key


@pytest.mark.parametrize(
    ("tensor", "shape", "sentence"),
    [
        (
            "blk.1.ffn_up_exps.weight",
            (4, 32, 64),
            "expected shape [64, 64] in each of 4 parts, found [4, 32, 64]",
        ),
        ("blk.1.ffn_up_exps.weight", None, "blk.1.ffn_up_exps.weight is missing"),
        ("blk.0.ffn_gate_inp.weight", (3, 64), "expected shape [4, 64], found [3, 64]"),
    ],
)
def test_experts_that_do_not_belong_to_the_model(
    tmp_path: Path, tensor: str, shape: tuple[int, ...] | None, sentence: str
) -> None:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        other = {name: value for name, value in tensors.items() if name != tensor}
        return other if shape is None else {**other, tensor: torch.zeros(shape)}

    _, file = write_pair(tmp_path, "qwen3moe", edit=edit)
    with pytest.raises(SourceError, match=re.escape(sentence)):
        write_folder(file, tmp_path / "folder")


def test_an_older_transformers_that_lacks_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = write_pair(tmp_path, "minimax-m2")
    monkeypatch.delitem(GGUF_CONFIG_MAPPING, "minimax_m2")
    with pytest.raises(
        SourceError, match="found the architecture minimax-m2, which the installed transformers"
    ):
        make_config(open_gguf(file))


def test_layers_of_qwen35_may_be_listed(tmp_path: Path) -> None:
    _, path = write_pair(tmp_path, "qwen35")
    file = open_gguf(path)
    listed = {**file.metadata, "qwen35.attention.recurrent_layers": [False, True]}
    config = make_config(type(file)(file.path, listed, file.tensors))
    assert config.layer_types == ["full_attention", "linear_attention"]


def test_yarn_of_qwen35(tmp_path: Path) -> None:
    _, path = write_pair(tmp_path, "qwen35")
    file = open_gguf(path)
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    scaled = {**file.metadata, **{f"qwen35.rope.scaling.{key}": value for key, value in yarn.items()}}
    found = make_config(type(file)(file.path, scaled, file.tensors)).rope_parameters
    assert found | make_config(file).rope_parameters | {"rope_type": "yarn"} == found
    assert (found["factor"], found["original_max_position_embeddings"]) == (4.0, 32)


@pytest.mark.parametrize(
    ("name", "key", "value", "sentence"),
    [
        ("gemma4", "rope.scaling.factor", 8.0, "found a RoPE scaling of 8.0, which Gemma 4 does not have"),
        ("qwen35", "ssm.state_size", None, "expected qwen35.ssm.state_size in its metadata, found none"),
        ("minimax-m2", "expert_gating_func", 9, "found the function 9 for choosing experts"),
        ("gpt-oss", "attention.sliding_window", None, "expected gpt-oss.attention.sliding_window"),
        ("lfm2", "attention.head_count_kv", None, "expected lfm2.attention.head_count_kv"),
    ],
)
def test_a_damaged_setting(tmp_path: Path, name: str, key: str, value: object, sentence: str) -> None:
    _, path = write_pair(tmp_path, name)
    file = open_gguf(path)
    metadata = {entry: old for entry, old in file.metadata.items() if entry != f"{name}.{key}"}
    if value is not None:
        metadata[f"{name}.{key}"] = value
    with pytest.raises(SourceError, match=sentence):
        make_config(type(file)(file.path, metadata, file.tensors))
