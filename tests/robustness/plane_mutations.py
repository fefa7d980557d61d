"""Mutations of what version 2 of the format stores: several binary planes, experts in one bit, a head in planes.

They are like those of `mutations`; in a folder without such tensors they damage nothing and return None.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.robustness.mutations import INDEX, edit, edit_tensors, read, shards

EXPERT = ".experts."
NO_PLANES: tuple[Any, ...] = (0, 5, -1, 2.5, None, [2], {}, True)
"""Values of `planes` that are not valid for a checkpoint with several planes."""


def tensor_names(folder: Path) -> dict[str, Path]:
    """Return the names of all tensors, each with its file."""
    return {name: path for path in shards(folder) for name in load_file(path)}


def quantization(folder: Path) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint; nothing for a model that is none of ours."""
    table: dict[str, Any] = read(folder / "config.json").get("quantization_config") or {}
    return table if table.get("quant_method") == "bwla" else {}


def planes_of(folder: Path) -> dict[str, Path]:
    """Return the linears with several planes, each with the file that holds its signs and scales."""
    suffix = ".weight_packed"
    return {
        name.removesuffix(suffix): path
        for path in shards(folder)
        for name, tensor in load_file(path).items()
        if name.endswith(suffix) and tensor.dim() == 3
    }


def rename(folder: Path, renamed: Mapping[str, str | None]) -> None:
    """Store tensors under other names, or remove those whose new name is None; the index follows."""
    for path in shards(folder):
        tensors = load_file(path)
        changed = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        changed.pop(None, None)
        if tensors.keys() & renamed.keys():
            save_file({str(name): value for name, value in changed.items()}, path, metadata={"format": "pt"})
    if (folder / INDEX).exists():
        index = read(folder / INDEX)
        moved = {renamed.get(name, name): file for name, file in index["weight_map"].items()}
        moved.pop(None, None)
        (folder / INDEX).write_text(json.dumps({**index, "weight_map": moved}))


def add(folder: Path, name: str, tensor: torch.Tensor, path: Path) -> None:
    """Store another tensor in the file `path`; the index follows."""
    edit_tensors(path, lambda tensors: tensors.__setitem__(name, tensor.contiguous()))
    if (folder / INDEX).exists():
        edit(folder / INDEX, lambda index: index["weight_map"].__setitem__(name, path.name))


def change(
    folder: Path, rng: random.Random, key: str, changed: Callable[[torch.Tensor], torch.Tensor]
) -> str | None:
    """Change the tensor called `key` of a linear with several planes; return the linear's name."""
    paths = planes_of(folder)
    if not paths:
        return None
    name = rng.choice(sorted(paths))
    path = tensor_names(folder)[f"{name}.{key}"]

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.{key}"] = changed(tensors[f"{name}.{key}"]).contiguous()

    edit_tensors(path, replace)
    return name


def scales_of_other_planes(folder: Path, rng: random.Random) -> str | None:
    forms: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[:, :-1],
        lambda t: torch.cat([t, t[:, :1]], 1),
        lambda t: t[:, 0],
        lambda t: t.mT,
        lambda t: t.unsqueeze(-1),
        lambda t: t.flatten(),
    ]
    name = change(folder, rng, "weight_scale", rng.choice(forms))
    return name and f"{name}.weight_scale: of another number of planes"


def signs_of_other_planes(folder: Path, rng: random.Random) -> str | None:
    forms: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[:, :-1],
        lambda t: torch.cat([t, t[:, :1]], 1),
        lambda t: t[:, 0],
        lambda t: t.transpose(0, 1),
        lambda t: t.flatten(1),
    ]
    name = change(folder, rng, "weight_packed", rng.choice(forms))
    return name and f"{name}.weight_packed: of another number of planes"


def plane_missing(folder: Path, rng: random.Random) -> str | None:
    """Remove the last plane of a linear, its signs and its scales."""
    paths = planes_of(folder)
    if not paths:
        return None
    name = rng.choice(sorted(paths))
    files = tensor_names(folder)
    for key in ("weight_packed", "weight_scale"):
        whole = load_file(files[f"{name}.{key}"])[f"{name}.{key}"]
        fewer = whole[:, :-1] if whole.shape[1] > 2 else whole[:, 0]
        add(folder, f"{name}.{key}", fewer, files[f"{name}.{key}"])
    return f"{name}: without its last plane"


def other_planes_in_config(folder: Path, rng: random.Random) -> str | None:
    """Change the number of planes in config.json: of all linears, of some, or to no number of planes at all."""
    planes = quantization(folder).get("planes", 1)
    if planes == 1:
        return None
    changed: Any = rng.choice(NO_PLANES)
    if isinstance(planes, dict) and rng.random() < 0.8:
        key = rng.choice(sorted(planes))
        other = rng.choice([count for count in range(-1, 7) if count != planes[key]])
        changed = {**planes, key: other}
    elif rng.random() < 0.5:
        changed = rng.choice([count for count in range(1, 5) if count != planes])
    edit(folder / "config.json", lambda config: config["quantization_config"].update(planes=changed))
    return f"quantization_config: planes {changed}"


def older_version(folder: Path, rng: random.Random) -> str | None:
    """Declare a checkpoint that needs version 2 as version 1."""
    if quantization(folder).get("format_version") != 2:
        return None
    edit(folder / "config.json", lambda config: config["quantization_config"].update(format_version=1))
    return "quantization_config: format_version 1"


def experts_of(folder: Path) -> dict[str, set[int]]:
    """Return the numbers of the experts of each layer that stores them separately, by the path before the number."""
    found: dict[str, set[int]] = {}
    for name in tensor_names(folder):
        path, _, rest = name.partition(EXPERT)
        if rest and rest.partition(".")[0].isdecimal():
            found.setdefault(path + EXPERT, set()).add(int(rest.partition(".")[0]))
    return found


def _names_of_expert(folder: Path, rng: random.Random, first: int = 0) -> tuple[str, int, list[str]] | None:
    layers = experts_of(folder)
    if not layers:
        return None
    layer = rng.choice(sorted(layers))
    number = rng.choice(sorted(found for found in layers[layer] if found >= first))
    names = [name for name in tensor_names(folder) if name.startswith(f"{layer}{number}.")]
    return layer, number, sorted(names)


def expert_missing(folder: Path, rng: random.Random) -> str | None:
    """Remove all tensors of an expert, or those of one of its linears."""
    found = _names_of_expert(folder, rng)
    if found is None:
        return None
    layer, number, names = found
    if rng.random() < 0.5:
        leaf = rng.choice(names).removeprefix(f"{layer}{number}.").partition(".")[0]
        names = [name for name in names if name.startswith(f"{layer}{number}.{leaf}.")]
    rename(folder, dict.fromkeys(names))
    return f"without {names[0]} and {len(names) - 1} more"


def expert_renumbered(folder: Path, rng: random.Random) -> str | None:
    """Give an expert a number that none has."""
    found = _names_of_expert(folder, rng)
    if found is None:
        return None
    layer, number, names = found
    other = rng.choice(["4", "04", "-1", "1000000", "x"])
    rename(folder, {name: f"{layer}{other}{name.removeprefix(f'{layer}{number}')}" for name in names})
    return f"{layer}{number} as {other}"


def transform_of_another_expert(folder: Path, rng: random.Random) -> str | None:
    """Store the input transform that all experts share with another expert, too or instead."""
    found = _names_of_expert(folder, rng, first=1)
    if found is None or not quantization(folder):
        return None
    layer, number, _ = found
    keys = ("rotation_left", "rotation_right", "column_scale", "low_rank_a")
    files = tensor_names(folder)
    name = rng.choice(sorted(n for n in files if n.startswith(f"{layer}0.") and n.endswith(keys)))
    other = name.replace(f"{layer}0.", f"{layer}{number}.")
    if rng.random() < 0.5:
        rename(folder, {name: other})
    else:
        add(folder, other, load_file(files[name])[name], files[name])
    return f"{name} as {other}"


def experts_in_16_bits(folder: Path, rng: random.Random) -> str | None:
    """Store the weight of an expert's linear beside its one-bit tensors, or instead of them."""
    found = _names_of_expert(folder, rng)
    if found is None or not quantization(folder):
        return None
    _, _, names = found
    linear = rng.choice(names).rpartition(".")[0]
    path = tensor_names(folder)[f"{linear}.weight_packed"]
    packed = load_file(path)[f"{linear}.weight_packed"]
    add(folder, f"{linear}.weight", torch.zeros(len(packed), packed.shape[-1] * 32).bfloat16(), path)
    if rng.random() < 0.5:
        rename(folder, {name: None for name in names if name.startswith(f"{linear}.weight_")})
    return f"{linear}.weight: unquantized"


def other_experts_in_config(folder: Path, rng: random.Random) -> str | None:
    """Change what config.json says of one-bit experts: that there are any, or the settings of one of their linears."""
    table = quantization(folder)
    if "experts" not in table:
        return None
    key = rng.choice(sorted(key for key in table["rotation"] if "*" in key))
    leaf = key.rpartition(".")[2]
    rotation = {name: sizes for name, sizes in table["rotation"].items() if name != key}
    changes: list[dict[str, Any]] = [
        {"experts": None},
        {"experts": {"input_transform": "last"}},
        {"experts": {}},
        {"rotation": rotation},
        {"rotation": {**rotation, f"*.{leaf}": table["rotation"][key]}},
        {"rotation": {**rotation, f"experts.1.{leaf}": table["rotation"][key]}},
        {"ignore": [*table["ignore"], "experts"]},
    ]
    chosen = rng.choice(changes)
    edit(folder / "config.json", lambda config: config["quantization_config"].update(chosen))
    return f"quantization_config: {str(chosen)[:60]}"


def other_head(folder: Path, rng: random.Random) -> str | None:
    """Damage a head in planes: ignore it, remove it, or store another one beside it."""
    table = quantization(folder)
    files = tensor_names(folder)
    own = sorted(name for name in files if name.startswith("lm_head."))
    if "lm_head.weight_packed" not in own:
        return None
    rows, columns = len(load_file(files[own[0]])["lm_head.weight_packed"]), 64
    kind = rng.choice(["ignored", "removed", "unquantized", "in 8 bits", "8 bits in config.json", "tied"])
    if kind == "ignored":
        ignore = [*table["ignore"], "lm_head"]
        edit(folder / "config.json", lambda config: config["quantization_config"].update(ignore=ignore))
    elif kind == "removed":
        rename(folder, dict.fromkeys(own))
    elif kind == "unquantized":
        add(folder, "lm_head.weight", torch.zeros(rows, columns).bfloat16(), files[own[0]])
    elif kind == "in 8 bits":
        add(folder, "lm_head.weight_int8", torch.zeros(rows, columns, dtype=torch.int8), files[own[0]])
    elif kind == "tied":
        edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    else:
        eight = table.get("embedding") or {"num_bits": 8, "strategy": "channel"}
        edit(folder / "config.json", lambda config: config["quantization_config"].update(lm_head=eight))
    return f"lm_head: {kind}"


def exchange_planes(folder: Path, rng: random.Random) -> str | None:
    """Exchange two planes of a linear's signs, but not of its scales."""
    name = change(folder, rng, "weight_packed", lambda tensor: tensor.flip(1))
    return name and f"{name}.weight_packed: planes exchanged"


def exchange_experts(folder: Path, rng: random.Random) -> str | None:
    """Exchange the names of two experts."""
    found = _names_of_expert(folder, rng, first=1)
    if found is None:
        return None
    layer, number, names = found
    others = sorted(experts_of(folder)[layer] - {0, number})
    if not others:
        return None
    other = rng.choice(others)
    pairs = {name: name.replace(f"{layer}{number}.", f"{layer}{other}.") for name in names}
    rename(folder, {**pairs, **{new: old for old, new in pairs.items()}})
    return f"{layer}{number} <-> {other}"
