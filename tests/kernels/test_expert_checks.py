"""A folder whose experts contradict each other, or config.json, is refused in one sentence that names them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import stored_specs
from bwla_kernels.format.folder import check_folder, read_folder
from bwla_kernels.format.schema import BWLAFormat
from bwla_kernels.format.tensors import describe_tensors
from random_tensors import random_layer
from safetensors.torch import save_file
from torch import Tensor

LAYERS, EXPERTS = 2, 3
SIZES = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
ROTATION = {"gate_proj": (1, 8, 8), "up_proj": (1, 8, 8), "down_proj": (1, 8, 12)}

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, dict[str, Any]], Any]


def module(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def linear(name: str, spec: LayerSpec) -> Tensors:
    """The tensors that are stored for a linear."""
    layer = random_layer(spec)
    return {f"{name}.{key}": layer[key] for key in stored_specs(name, spec)}


def parts(planes: int = 2) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the settings of a checkpoint whose down projections have two planes."""
    tensors: Tensors = {"model.norm.weight": torch.ones(64)}
    for layer in range(LAYERS):
        for number in range(EXPERTS):
            for leaf, sizes in SIZES.items():
                count = planes if leaf == "down_proj" else 1
                spec = LayerSpec(*sizes, *ROTATION[leaf], rank=2, planes=count)
                tensors |= linear(f"{module(layer)}.{number}.{leaf}", spec)
    settings = {
        "rotation": {f"experts.*.{leaf}": sizes for leaf, sizes in ROTATION.items()},
        "planes": {"experts.*.down_proj": planes},
        "rank": 2,
        "format_version": 2,
        "experts": {"input_transform": "first"},
    }
    return tensors, settings


def write(folder: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    """Write a checkpoint whose list of tensors agrees with them, so that nothing else finds the damage."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    listed = describe_tensors(read_folder(folder), {})
    quantization = BWLAFormat(**settings, tensors=listed, config={}).to_json()
    (folder / "config.json").write_text(
        json.dumps({"num_hidden_layers": LAYERS, "quantization_config": quantization})
    )
    return folder


def add_biases(tensors: Tensors, dtype: torch.dtype, leaf: str = "down_proj") -> None:
    """Add biases to the linears `leaf` of the first layer's experts."""
    rows = SIZES[leaf][0]
    tensors.update({f"{module(0)}.{n}.{leaf}.bias": torch.zeros(rows, dtype=dtype) for n in range(EXPERTS)})


def test_experts_with_biases_pass(tmp_path: Path) -> None:
    tensors, settings = parts()
    add_biases(tensors, torch.bfloat16)
    specs = check_folder(write(tmp_path, tensors, settings))
    assert specs[f"{module(0)}.1.down_proj"].bias
    assert not specs[f"{module(0)}.1.up_proj"].bias


def test_complete_experts_pass(tmp_path: Path) -> None:
    folder = write(tmp_path, *parts())
    specs = check_folder(folder)
    assert len(specs) == LAYERS * EXPERTS * 3
    assert specs[f"{module(1)}.2.down_proj"] == LayerSpec(64, 96, 1, 8, 12, rank=2, planes=2)
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]["tensors"]
    assert listed == {
        "model.layers.[0-1].mlp.experts.[0-2].down_proj.weight_packed": "int32 [64, 2, 3]",
        "model.layers.[0-1].mlp.experts.[0-2].gate_proj.weight_packed": "int32 [96, 2]",
        "model.layers.[0-1].mlp.experts.[0-2].up_proj.weight_packed": "int32 [96, 2]",
        "model.norm.weight": "float32 [64]",
    }


def test_a_layer_with_experts_in_16_bits_passes(tmp_path: Path) -> None:
    tensors, settings = parts()
    drop(f"{module(1)}.")(tensors, settings)
    for number in range(EXPERTS):
        for leaf, sizes in SIZES.items():
            tensors[f"{module(1)}.{number}.{leaf}.weight"] = torch.ones(sizes)
    settings["ignore"] = ["lm_head", module(1)]
    assert len(check_folder(write(tmp_path, tensors, settings))) == EXPERTS * 3


def drop(start: str) -> Change:
    """Remove the tensors whose names begin so."""

    def change(tensors: Tensors, settings: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]

    return change


def put(name: str, make: Callable[[Tensors], Tensor]) -> Change:
    """Add or replace a tensor."""

    def change(tensors: Tensors, settings: dict[str, Any]) -> None:
        tensors[name] = make(tensors)

    return change


def set_key(key: str, value: Any) -> Change:
    """Change a setting."""

    def change(tensors: Tensors, settings: dict[str, Any]) -> None:
        settings[key] = value

    return change


def resize(leaf: str, rows: int, columns: int, only: int | None = None) -> Change:
    """Store linears of another size, of all experts of layer 0 or of one."""

    def change(tensors: Tensors, settings: dict[str, Any]) -> None:
        for number in range(EXPERTS) if only is None else [only]:
            name = f"{module(0)}.{number}.{leaf}"
            drop(f"{name}.")(tensors, settings)
            planes = settings["planes"]["experts.*.down_proj"] if leaf == "down_proj" else 1
            tensors |= linear(name, LayerSpec(rows, columns, *ROTATION[leaf], rank=2, planes=planes))

    return change


GATE_2 = f"{module(0)}.2.gate_proj"
DAMAGE: dict[str, tuple[Change, str]] = {
    "no key in config.json": (
        set_key("experts", None),
        "config.json: expected the key experts in quantization_config, because model.layers.0.mlp.experts is stored",
    ),
    "the key without experts": (
        lambda tensors, settings: (
            drop("model.layers.")(tensors, settings),
            tensors.update(linear("model.layers.0.q_proj", LayerSpec(32, 64, 1, 8, 8, rank=2))),
            settings["rotation"].update(q_proj=(1, 8, 8)),
        ),
        "config.json: expected one-bit experts, because quantization_config has the key experts, found none",
    ),
    "an expert is missing": (
        drop(f"{module(1)}.1."),
        "model.layers.1.mlp.experts: expected experts 0 to 2 without gaps, found none with the number 1",
    ),
    "the first expert is missing": (
        drop(f"{module(1)}.0."),
        "model.layers.1.mlp.experts: expected experts 0 to 2 without gaps, found none with the number 0",
    ),
    "a linear of one expert is missing": (
        drop(f"{module(0)}.2.up_proj."),
        "experts.2: expected the one-bit linears gate_proj, up_proj, down_proj, found down_proj, gate_proj",
    ),
    "a linear of all experts is missing": (
        lambda tensors, settings: [
            drop(f"{module(0)}.{n}.up_proj.")(tensors, settings) for n in range(EXPERTS)
        ],
        "experts.0: expected the one-bit linears gate_proj, up_proj, down_proj, found down_proj, gate_proj",
    ),
    "another size of one expert": (
        resize("gate_proj", 64, 64, only=1),
        "experts.1.gate_proj: expected the same sizes for all experts, found 64 x 64, rotation (1, 8, 8), planes 1, "
        "rank 2, clip 1, found 96 x 64",
    ),
    "a setting for one expert": (
        set_key("clip", {"0.mlp.experts.1.up_proj": 0.5}),
        "experts.1.up_proj: expected the same sizes for all experts",
    ),
    "gate and up differ": (
        resize("up_proj", 64, 64),
        "model.layers.0.mlp.experts: expected equal sizes of gate_proj and up_proj, which share an input transform, "
        "found 96 x 64",
    ),
    "down does not fit": (
        resize("down_proj", 32, 96),
        "model.layers.0.mlp.experts: expected down_proj of 64 x 96, which fits gate_proj, found 32 x 96",
    ),
    "a bias of another dtype": (
        lambda tensors, settings: add_biases(tensors, torch.float32),
        "model.layers.0.mlp.experts.0.down_proj.bias: expected dtype bfloat16, found float32",
    ),
    "a bias of one expert": (
        put(f"{module(0)}.2.down_proj.bias", lambda tensors: torch.zeros(64).bfloat16()),
        "model.layers.0.mlp.experts.2.down_proj: expected the same sizes for all experts, found 64 x 96",
    ),
    "a bias of the gate alone": (
        lambda tensors, settings: add_biases(tensors, torch.bfloat16, "gate_proj"),
        "model.layers.0.mlp.experts: expected equal sizes of gate_proj and up_proj",
    ),
    "another expert with an input transform": (
        put(f"{GATE_2}.column_scale", lambda tensors: torch.ones(64).bfloat16()),
        "experts.2.gate_proj.column_scale is not part of the format (only expert 0 stores the input transform)",
    ),
    "the first expert without a part of it": (
        drop(f"{module(0)}.0.up_proj.rotation_left"),
        "model.layers.0.mlp.experts.0.up_proj.rotation_left is missing, expected shape [1, 8, 8]",
    ),
    "an expert without scales": (
        drop(f"{GATE_2}.weight_scale"),
        "model.layers.0.mlp.experts.2.gate_proj.weight_scale is missing, expected shape [96]",
    ),
    "an expert in 16 bits": (
        lambda tensors, settings: (
            drop(f"{GATE_2}.")(tensors, settings),
            tensors.update({f"{GATE_2}.weight": torch.ones(96, 64)}),
        ),
        "experts.2.gate_proj.weight: expected all experts of a layer in one bit or none, found an unquantized tensor",
    ),
    "16 bits beside one bit": (
        put(f"{GATE_2}.weight", lambda tensors: torch.ones(96, 64)),
        "model.layers.0.mlp.experts.2.gate_proj.weight is not part of the format",
    ),
    "more experts in 16 bits": (
        put(f"{module(0)}.3.gate_proj.weight", lambda tensors: torch.ones(96, 64)),
        "experts.3.gate_proj.weight: expected all experts of a layer in one bit or none, found an unquantized tensor",
    ),
    "stacked experts beside them": (
        put(f"{module(0)}.gate_up_proj", lambda tensors: torch.ones(3, 192, 64)),
        "experts.gate_up_proj: expected all experts of a layer in one bit or none, found an unquantized tensor beside "
        "one-bit linears of model.layers.0.mlp.experts",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_contradictions_are_named(damage: str, tmp_path: Path) -> None:
    change, sentence = DAMAGE[damage]
    tensors, settings = parts()
    change(tensors, settings)
    folder = write(tmp_path, tensors, settings)
    with pytest.raises(FormatError, match=re.escape(sentence)) as caught:
        check_folder(folder)
    assert str(caught.value).endswith("; convert or download the model again")


def test_a_number_that_no_expert_has_is_found_by_the_list(tmp_path: Path) -> None:
    """The last expert leaves no gap: the list of tensors says how many there are."""
    tensors, settings = parts()
    folder = write(tmp_path, tensors, settings)
    drop(f"{module(0)}.2.")(tensors, settings)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"0.mlp.experts.2.down_proj.weight_packed is missing, expected shape"
    ):
        check_folder(folder)


def test_other_tensors_below_experts_are_left_alone(tmp_path: Path) -> None:
    """Some models keep the router's bias there."""
    tensors, settings = parts()
    tensors[f"{module(0)}.e_score_correction_bias"] = torch.ones(EXPERTS)
    assert check_folder(write(tmp_path, tensors, settings))
