"""A random BWLA checkpoint of any transformers model, for architectures whose conversion is tested elsewhere."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bwla_converter.source.model import open_source
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import expert_of, first_expert, settings_name, stored_specs
from bwla_kernels.format.files import read_folder, read_tensors
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.format.model import config_values
from bwla_kernels.format.schema import BWLAFormat, activation_args, longest_suffix
from bwla_kernels.format.tensors import describe_tensors
from random_tensors import random_layer
from safetensors.torch import save_file
from torch import Tensor

PLAIN = re.compile(
    r"visual|vision|mtp|[.](gate|router|kv_b_proj|in_proj_[ab]|in_proj_ba|x_proj|dt_proj|\w*gate)$"
)
"""Modules that stay in 16 bits: towers, routers and what vLLM needs unquantized."""

INPUT_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linears that read the same input."""

LAYER = re.compile(r"(?P<layers>.*?(?:layers|h))[.](?P<index>\d+)[.](?P<name>.*)")


@dataclass(frozen=True)
class Experts:
    """Settings of one-bit experts.

    Attributes:
        rotation: of down, where it differs from the usual one.
        planes: of down.
        rank: of gate and up.
    """

    rotation: tuple[int, int, int] | None = None
    planes: int = 1
    rank: int = 2

    def spec_of(self, spec: LayerSpec, leaf: str) -> LayerSpec:
        """Return the spec of a linear called `leaf` of any expert."""
        if leaf not in ("down_proj", "w2"):
            return replace(spec, rank=self.rank)
        groups, n1, n2 = self.rotation or (spec.rotation_groups, spec.n1, spec.n2)
        return replace(spec, planes=self.planes, rotation_groups=groups, n1=n1, n2=n2)

    def settings(self, specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
        """Return the settings of `BWLAFormat` that describe the experts among `specs`, and rank 2 for the others."""
        own = [spec_name for spec_name in specs if expert_of(spec_name) is not None]
        down = {
            f"experts.*.{name.rpartition('.')[2]}": specs[name].planes
            for name in own
            if specs[name].planes > 1
        }
        ranks = {name.rpartition(".")[2]: 2 for name in specs}
        ranks |= {f"experts.*.{name.rpartition('.')[2]}": specs[name].rank for name in own}
        return {
            "format_version": 2,
            "experts": {"input_transform": "first"},
            "rank": ranks,
            **({"planes": down} if down else {}),
        }


def write_source(folder: Path, model_class: Any, config: Any, seed: int = 0) -> Path:
    """Save a model with random weights, in float32 and with the stored names of its original; return the folder."""
    torch.manual_seed(seed)
    model: Any = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if "embed" in name else parameter[0].numel() ** -0.5)
            elif name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def linears_of(tensors: dict[str, Tensor], experts: bool) -> list[str]:
    """Return the stored names of the linears in decoder layers that are quantized here, with or without experts."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    sizes = {name: tensors[f"{name}.weight"].shape for name in names}
    return [
        name
        for name in names
        if LAYER.fullmatch(name) and not PLAIN.search(name)
        if len(sizes[name]) == 2 and sizes[name][0] >= 32 and sizes[name][1] % 32 == 0
        if experts or expert_of(name) is None
    ]


def input_group(name: str) -> str:
    """Return the name that the linears of an input group share; all experts of a layer are in one."""
    stem, _, leaf = first_expert(name).rpartition(".")
    group = next((members for members in INPUT_GROUPS if leaf in members), (leaf,))
    return f"{stem}.{group[0]}"


def read_source(source: Path, divided: bool) -> dict[str, Tensor]:
    """Return all tensors of a model folder; `divided`: with those of single experts in the place of stacked ones."""
    if divided:
        opened = open_source(str(source))
        if any(experts.stacked for experts in opened.structure.experts.values()):
            return opened.read(list(opened.entries))
    entries = read_folder(source)
    return read_tensors(source, entries, list(entries))


def write_checkpoint(
    source: Path, out: Path, bits: int = 16, ignore: Iterable[str] = (), experts: Experts | None = None
) -> dict[str, LayerSpec]:
    """Write `source` to `out` with random one-bit linears; return their specs.

    Args:
        source: a model folder.
        out: the folder to create.
        bits: activation bits.
        ignore: modules to leave as they are, besides those of `PLAIN`.
        experts: settings of the experts, which stay in 16 bits without.
    """
    tensors = read_source(source, experts is not None)
    given = BWLAFormat(rotation={}, ignore=list(ignore))
    specs: dict[str, LayerSpec] = {}
    rotation: dict[str, tuple[int, int, int]] = {}
    shared: dict[str, dict[str, Tensor]] = {}
    stored: dict[str, Tensor] = {}
    for name in linears_of(tensors, experts is not None):
        if given.is_ignored(name):
            continue
        weight = tensors.pop(f"{name}.weight")
        rows, columns = weight.shape
        spec = LayerSpec(
            rows, columns, *choose_rotation(columns), rank=2, bits=bits, bias=f"{name}.bias" in tensors
        )
        leaf = name.rpartition(".")[2]
        if experts is not None and expert_of(name) is not None:
            spec = experts.spec_of(spec, leaf)
            leaf = f"experts.*.{leaf}"
        layer = random_layer(spec, len(specs))
        own = {key: layer[key] for key in INPUT_TRANSFORM if key in layer}
        layer.update(shared.setdefault(input_group(name), own))
        layer.pop("bias", None)
        stored.update(
            {f"{name}.{key}": layer[key].clone() for key in stored_specs(name, replace(spec, bias=False))}
        )
        specs[name] = spec
        sizes = (spec.rotation_groups, spec.n1, spec.n2)
        if rotation.setdefault(leaf, sizes) != sizes:
            rotation[settings_name(name)] = sizes
    one_bit_experts = {} if experts is None else experts.settings(specs)
    plain = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    left = [name for name in plain if longest_suffix(rotation, name) is not None]
    quantization = BWLAFormat(
        input_activations=activation_args(bits),
        rotation=rotation,
        ignore=list(dict.fromkeys(["lm_head", *ignore, *left])),
        **{"rank": 2, **one_bit_experts},
    )
    out.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **stored}, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    described = {"tensors": describe_tensors(read_folder(out), {}), "config": config_values(config)}
    config["quantization_config"] = quantization.model_copy(update=described).to_json()
    (out / "config.json").write_text(json.dumps(config))
    return specs
