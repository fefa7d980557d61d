"""Damaged and foreign checkpoints are refused in the front process, in one sentence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bwla_kernels.errors import FormatError
from safetensors.torch import load_file, save_file

from bwla_vllm.checks import check_checkpoint, check_tensor_parallel
from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"
NARROW, WIDE = [1, 8, 8], [2, 8, 8]
ROTATION = {"k_proj": NARROW, "v_proj": NARROW, "gate_proj": NARROW, "up_proj": NARROW}
ROTATION |= {"o_proj": WIDE, "down_proj": WIDE}


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint to damage."""

    def copy_one(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy_one


def check(folder: Path) -> BWLAConfig:
    """Ask vLLM's questions in vLLM's order, as `VllmConfig` does."""
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(folder)
    config = BWLAConfig.from_config(hf_config.quantization_config)
    config.maybe_update_config(str(folder), hf_config=hf_config, revision=None)
    return config


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_quantization(folder: Path, **changes: Any) -> None:
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**stored, **changes})


def change_tensor(folder: Path, name: str, change: Any) -> None:
    """Replace a tensor by `change` of it, or remove it from file and index where that is None."""
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    if change is None:
        del tensors[name], index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)


def remove_everywhere(folder: Path, leaf: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name in index["weight_map"]:
        if f".{leaf}." in name:
            change_tensor(folder, name, None)


def truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def test_good_checkpoint_passes(qwen3: Any) -> None:
    config = check(qwen3.folder)
    assert config.specs == qwen3.specs


def test_a_checkpoint_without_a_list_of_tensors_says_so(
    qwen3: Any, copy_of: Callable[[Path], Path], plugin_log: pytest.LogCaptureFixture
) -> None:
    plugin_log.set_level("INFO")
    check(qwen3.folder)
    assert "older version" not in plugin_log.text
    folder = copy_of(qwen3.folder)
    edit_quantization(folder, tensors=None, config=None)
    assert check(folder).specs == qwen3.specs
    assert "was written by an older version of BWLA" in plugin_log.text


def test_biases_pass(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "qwen2", rotation={"o_proj": (1, 8, 8)}, tied=True)
    assert check(tmp_path).specs == checkpoint.specs


DAMAGE = {
    "missing packed signs": (
        lambda f: change_tensor(f, Q_PROJ + ".weight_packed", None),
        r"q_proj.weight_packed is missing",
    ),
    "missing scale": (
        lambda f: change_tensor(f, Q_PROJ + ".weight_scale", None),
        r"q_proj.weight_scale is missing, expected shape \[128\]",
    ),
    "misshapen rotation": (
        lambda f: change_tensor(f, Q_PROJ + ".rotation_left", lambda t: t[:, :4]),
        r"q_proj.rotation_left: expected shape \[1, 8, 8\], found \[1, 4, 8\]",
    ),
    "float where words belong": (
        lambda f: change_tensor(f, Q_PROJ + ".weight_packed", lambda t: t.float()),
        r"q_proj.weight_packed: expected dtype int32, found float32",
    ),
    "another rank": (
        lambda f: edit_quantization(f, rank=3),
        r"low_rank_a: expected shape \[3, (64|128)\], found \[2, (64|128)\]",
    ),
    "rotation of another width": (
        lambda f: edit_quantization(f, rotation={**ROTATION, "q_proj": [1, 8, 16]}),
        r"q_proj: rotation \(1, 8, 16\) covers 128 columns, but the layer reads 64",
    ),
    "no rotation": (
        lambda f: edit_quantization(f, rotation={"q_proj": [1, 8, 8]}),
        r"is stored in one bit, but config.json gives no rotation and no group_size for it",
    ),
    "truncated shard": (truncate, r"not a complete safetensors file"),
    "missing shard": (
        lambda f: next(f.glob("*00002-of*")).unlink(),
        r"model-00002-of-00002.safetensors: the file is missing",
    ),
    "index that is no JSON": (lambda f: (f / INDEX).write_text("{"), r"index.json: not valid JSON"),
    "missing norm of one block": (
        lambda f: change_tensor(f, "model.layers.1.input_layernorm.weight", None),
        r"model.layers.1.input_layernorm.weight is missing, expected shape \[64\]",
    ),
    "missing head": (lambda f: change_tensor(f, "lm_head.weight", None), r"lm_head.weight is missing"),
    "missing embedding": (
        lambda f: change_tensor(f, "model.embed_tokens.weight", None),
        r"model.embed_tokens.weight is missing",
    ),
    "a linear missing in every block": (
        lambda f: remove_everywhere(f, "up_proj"),
        r"model.layers.0.mlp.up_proj.weight_packed is missing, expected shape \[128, 2\]",
    ),
    "a block too few": (
        lambda f: edit_config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"config.json: expected num_hidden_layers 2, as when the tensors were written, found 3: restore",
    ),
    "another number of heads": (
        lambda f: edit_config(f, num_attention_heads=8),
        r"config.json: expected num_attention_heads 4, .* found 8",
    ),
    "another vocabulary": (
        lambda f: edit_config(f, vocab_size=512),
        r"config.json: expected vocab_size 256, .* found 512",
    ),
    "fewer blocks than are stored": (
        lambda f: edit_config(f, num_hidden_layers=1, layer_types=["full_attention"]),
        r"config.json: expected num_hidden_layers 2, .* found 1",
    ),
    "an embedding with NaN": (
        lambda f: change_tensor(f, "model.embed_tokens.weight", lambda t: t / 0 * 0),
        r"model.embed_tokens.weight: expected finite values, found NaN",
    ),
    "integers where a norm belongs": (
        lambda f: change_tensor(f, "model.norm.weight", lambda t: t.int()),
        r"model.norm.weight: expected dtype float32, found int32",
    ),
    "a tensor of no module": (
        lambda f: add_tensor(f, "model.layers.0.spare.weight"),
        r"model.layers.0.spare.weight is not a tensor of this model",
    ),
    "a head tied to an embedding with other values": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        r"config.json: expected tie_word_embeddings False, .* found True",
    ),
    "the class of another model": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLM"]),
        r"config.json: expected architectures \['Qwen3ForCausalLM'\], .* found \['LlamaForCausalLM'\]",
    ),
    "a config that transformers cannot build": (
        lambda f: edit_config(f, hidden_act="no such function"),
        r"config.json: expected hidden_act 'silu', .* found 'no such function': restore",
    ),
    "a weight file of something else": (
        lambda f: shutil.copy(next(f.glob("*.safetensors")), f / "old.safetensors"),
        r"old.safetensors: expected only files of this checkpoint",
    ),
    "an index beside a single file": (
        lambda f: shutil.copy(next(f.glob("*.safetensors")), f / "model.safetensors"),
        r"expected model.safetensors or model.safetensors.index.json, found both",
    ),
    "a bias that the model lacks": (
        lambda f: add_bias(f),
        r"q_proj.bias is not a tensor of this model",
    ),
}


def add_bias(folder: Path) -> None:
    add_tensor(folder, Q_PROJ + ".bias")


def add_tensor(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][Q_PROJ + ".weight_scale"]
    tensors = load_file(folder / file)
    tensors[name] = tensors[Q_PROJ + ".weight_scale"].clone()
    index["weight_map"][name] = file
    save_file(tensors, folder / file)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(damage: str, qwen3: Any, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(qwen3.folder)
    apply, sentence = DAMAGE[damage]
    apply(folder)
    with pytest.raises(StartError, match=sentence) as caught:
        check(folder)
    assert "\n" not in str(caught.value)
    assert re.search("again|restore|remove", str(caught.value))  # says what to do


@pytest.mark.parametrize("count", [None, "2", True, [2]])
def test_a_number_of_blocks_that_is_none(qwen3: Any, copy_of: Callable[[Path], Path], count: Any) -> None:
    """Where no library has looked at config.json before."""
    folder = copy_of(qwen3.folder)
    edit_config(folder, num_hidden_layers=count)
    with pytest.raises(FormatError, match="expected num_hidden_layers 2, .* found"):
        check_checkpoint(folder)
    edit_quantization(folder, tensors=None, config=None)
    with pytest.raises(FormatError, match="expected num_hidden_layers to be a number, found"):
        check_checkpoint(folder)


def test_missing_bias_is_noticed(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2", rotation={"o_proj": (1, 8, 8)})
    for block in (0, 1):
        change_tensor(tmp_path, f"model.layers.{block}.self_attn.v_proj.bias", None)
    with pytest.raises(StartError, match=r"v_proj.bias is missing, expected shape \[32\]"):
        check(tmp_path)


def test_folder_without_weights_is_left_to_the_loader(qwen3: Any, copy_of: Callable[[Path], Path]) -> None:
    """`--load-format dummy` needs a config and nothing more."""
    folder = copy_of(qwen3.folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert check(folder).specs == {}


@pytest.mark.parametrize("ranks", [4, 3])
def test_tensor_parallel_sizes_must_divide(ranks: int, qwen3: Any) -> None:
    check_tensor_parallel(qwen3.specs, 2)
    with pytest.raises(FormatError, match=rf"_proj: expected a tensor-parallel size .* found {ranks}"):
        check_tensor_parallel(qwen3.specs, ranks)


class TestHubCache:
    """A Hub id is checked where the Hub's cache holds all of it, and nothing is downloaded."""

    @pytest.fixture
    def cache(self, qwen3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        repo = tmp_path / "models--some--model"
        shutil.copytree(qwen3.folder, repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        return repo / "snapshots" / "abc"

    def ask(self, qwen3: Any, **options: Any) -> dict[str, Any]:
        config = BWLAConfig.from_config(
            json.loads((qwen3.folder / "config.json").read_text())["quantization_config"]
        )
        config.maybe_update_config("some/model", **options)
        return config.specs

    def test_complete(self, cache: Path, qwen3: Any) -> None:
        assert self.ask(qwen3) == qwen3.specs
        assert self.ask(qwen3, revision="main") == qwen3.specs

    def test_damaged(self, cache: Path, qwen3: Any) -> None:
        truncate(cache)
        with pytest.raises(StartError, match="not a complete safetensors file"):
            self.ask(qwen3)

    def test_not_all_there_yet(self, cache: Path, qwen3: Any) -> None:
        next(cache.glob("*00002-of*")).unlink()
        assert self.ask(qwen3) == {}

    def test_never_seen(self, qwen3: Any) -> None:
        config = BWLAConfig.from_config(
            json.loads((qwen3.folder / "config.json").read_text())["quantization_config"]
        )
        for name in ("nobody/nothing", "s3://bucket/model", "/no/such/folder"):
            config.maybe_update_config(name)
            assert config.specs == {}
