"""Mutations that damage a model folder.

A mutation is a function of a folder and a random number generator; it returns a description of what it changed, or
None if the folder contains nothing that it can damage. `kinds` lists the mutations after which every reader must refuse
the folder, and those (single bits, values) after which it may be another valid model.
"""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Mutation = Callable[[Path, random.Random], str | None]

INDEX = "model.safetensors.index.json"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "moe_intermediate_size",
)
VALUES: tuple[Any, ...] = (None, 0, -1, 1, 2**40, 1e30, "", "x", [], {}, True, [1, 2], "ÿ", 0.5)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = read(path)
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def flip(path: Path, rng: random.Random, first: int, last: int) -> str:
    raw = bytearray(path.read_bytes())
    position, bit = rng.randrange(first, max(first + 1, min(last, len(raw)))), rng.randrange(8)
    raw[position] ^= 1 << bit
    path.write_bytes(raw)
    return f"{path.name}: bit {bit} of byte {position}"


def header(path: Path) -> tuple[int, bytes, bytes]:
    """Return the header's length, the header and the data of a safetensors file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return size, raw[8 : 8 + size], raw[8 + size :]


def write_header(path: Path, head: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def bit_in_header(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    return flip(path, rng, 0, 8 + header(path)[0])


def bit_in_data(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    return flip(path, rng, 8 + header(path)[0], path.stat().st_size)


def bit_in_json(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in (folder / "config.json", folder / INDEX) if p.exists()])
    return flip(path, rng, 0, path.stat().st_size)


def change_config_value(folder: Path, rng: random.Random) -> str:
    key, value = rng.choice(sorted(read(folder / "config.json"))), rng.choice(VALUES)
    edit(folder / "config.json", lambda config: config.__setitem__(key, value))
    return f"config.json: {key} = {value!r}"


def drop_config_key(folder: Path, rng: random.Random) -> str:
    key = rng.choice(sorted(read(folder / "config.json")))
    edit(folder / "config.json", lambda config: config.pop(key))
    return f"config.json: without {key}"


def change_quantization_value(folder: Path, rng: random.Random) -> str | None:
    table = read(folder / "config.json").get("quantization_config")
    if not table:
        return None
    key, value = rng.choice(sorted(table)), rng.choice(VALUES)
    edit(folder / "config.json", lambda config: config["quantization_config"].__setitem__(key, value))
    return f"quantization_config: {key} = {value!r}"


def exchange_equal_tensors(folder: Path, rng: random.Random) -> str | None:
    """Exchange two tensors of the same shape and dtype."""
    path = rng.choice(shards(folder))
    tensors = load_file(path)
    pairs = [
        (a, b)
        for a in tensors
        for b in tensors
        if a < b and tensors[a].dtype == tensors[b].dtype and not torch.equal(tensors[a], tensors[b])
        if tensors[a].shape == tensors[b].shape
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    save_file({**tensors, a: tensors[b], b: tensors[a]}, path, metadata={"format": "pt"})
    return f"{path.name}: {a} <-> {b}"


def extra_key_in_config(folder: Path, rng: random.Random) -> str:
    edit(folder / "config.json", lambda config: config.__setitem__("surprise", rng.choice(VALUES)))
    return "config.json: an unknown key"


def truncate(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in [*shards(folder), folder / "config.json", folder / INDEX] if p.exists()])
    size = rng.randrange(path.stat().st_size - 2)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name}: cut to {size} bytes"


def append(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 8, 1000])))
    return f"{path.name}: longer"


def header_length(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    size, head, data = header(path)
    length = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + head + data)
    return f"{path.name}: header length {length}"


def huge_header(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    _, head, data = header(path)
    write_header(path, head + b" " * (101 * 2**20), data)
    return f"{path.name}: header of 101 MiB"


def key_twice_in_header(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    _, head, data = header(path)
    name, entry = rng.choice([item for item in json.loads(head).items() if item[0] != "__metadata__"])
    again = f"{json.dumps(name)}:{json.dumps(entry)}".encode()
    write_header(path, head.rstrip()[:-1] + b"," + again + b"}", data)
    return f"{path.name}: {name} twice"


def key_twice_in_json(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in (folder / "config.json", folder / INDEX) if p.exists()])
    key, value = rng.choice(sorted(read(path).items()))
    text = path.read_text().rstrip()
    path.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}")
    return f"{path.name}: {key} twice"


def offsets(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    _, head, data = header(path)
    table = json.loads(head)
    name = rng.choice([key for key in table if key != "__metadata__"])
    table[name]["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 2**40])
    write_header(path, json.dumps(table).encode(), data)
    return f"{path.name}: offsets of {name}"


def swap_shards(folder: Path, rng: random.Random) -> str | None:
    paths = shards(folder)
    if len(paths) < 2:
        return None
    a, b = rng.sample(paths, 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return f"{a.name} <-> {b.name}"


def remove_file(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in [*shards(folder), folder / "config.json", folder / INDEX] if p.exists()])
    path.unlink()
    return f"without {path.name}"


def folder_for_file(folder: Path, rng: random.Random) -> str:
    name = remove_file(folder, rng).removeprefix("without ")
    (folder / name).mkdir()
    return f"{name}: a folder"


def remove_tensor(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    name = rng.choice(sorted(load_file(path)))
    edit_tensors(path, lambda tensors: tensors.pop(name))
    if (folder / INDEX).exists() and rng.random() < 0.5:
        edit(folder / INDEX, lambda index: index["weight_map"].pop(name))
    return f"{path.name}: without {name}"


def add_tensor(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    name = rng.choice(["model.layers.0.spare.weight", "model.layers.7.mlp.up_proj.weight", "x"])
    edit_tensors(path, lambda tensors: tensors.__setitem__(name, torch.zeros(4)))
    if (folder / INDEX).exists():
        edit(folder / INDEX, lambda index: index["weight_map"].__setitem__(name, path.name))
    return f"{path.name}: {name} added"


def _change_tensor(
    folder: Path, rng: random.Random, what: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> str:
    path = rng.choice(shards(folder))
    name = rng.choice(sorted(load_file(path)))
    edit_tensors(path, lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous()))
    return f"{path.name}: {name} {what}"


def reshape(folder: Path, rng: random.Random) -> str:
    changes = [
        lambda t: t[:-1],
        lambda t: torch.cat([t, t]),
        lambda t: t.unsqueeze(0),
        lambda t: t.reshape(-1, 1, 1),
    ]
    return _change_tensor(folder, rng, "with another shape", rng.choice(changes))


def retype(folder: Path, rng: random.Random) -> str:
    dtypes = [torch.float64, torch.int16, torch.uint8, torch.bool, torch.int64]
    first, other = rng.sample(dtypes, 2)
    return _change_tensor(
        folder, rng, "as another dtype", lambda tensor: tensor.to(other if tensor.dtype == first else first)
    )


def not_a_number(folder: Path, rng: random.Random) -> str | None:
    path = rng.choice(shards(folder))
    names = [name for name, tensor in load_file(path).items() if tensor.is_floating_point()]
    name, value = rng.choice(sorted(names)), rng.choice([float("nan"), float("inf"), -float("inf")])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value

    edit_tensors(path, spoil)
    return f"{path.name}: {name} holds {value}"


def invalid_values(folder: Path, rng: random.Random) -> str | None:
    """Make a scale negative, or a rotation not orthogonal."""
    path = rng.choice(shards(folder))
    kinds = ("weight_scale", "column_scale", "rotation_left", "rotation_right")
    names = [name for name in load_file(path) if name.endswith(kinds)]
    if not names:
        return None
    name = rng.choice(sorted(names))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name]
        tensors[name] = tensor * 1.01 if "rotation" in name else tensor * -1.0

    edit_tensors(path, spoil)
    return f"{path.name}: {name} with invalid values"


def index_elsewhere(folder: Path, rng: random.Random) -> str | None:
    if not (folder / INDEX).exists():
        return None
    name = rng.choice(sorted(read(folder / INDEX)["weight_map"]))
    other = [path.name for path in shards(folder) if path.name != read(folder / INDEX)["weight_map"][name]]
    file = rng.choice(
        ["../secret.safetensors", "/etc/passwd", "..", "", "none.safetensors", "config.json", 7, *other]
    )
    edit(folder / INDEX, lambda index: index["weight_map"].__setitem__(name, file))
    return f"{INDEX}: {name} in {file!r}"


def index_of_another_kind(folder: Path, rng: random.Random) -> str | None:
    if not (folder / INDEX).exists():
        return None
    text = rng.choice(
        ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "null", "[" * 100_000, "\x00", ""]
    )
    (folder / INDEX).write_text(text)
    return f"{INDEX}: {text[:20]!r}"


def config_of_another_kind(folder: Path, rng: random.Random) -> str:
    data = rng.choice([b"[]", b"{}", b"null", b'{"a":' * 100_000, b"\xff\xfe", b"", b"7"])
    (folder / "config.json").write_bytes(data)
    return f"config.json: {data[:20]!r}"


def another_size(folder: Path, rng: random.Random) -> str:
    config = read(folder / "config.json")
    # Where every layer has experts, no tensor has the size of an MLP.
    unused = {"intermediate_size"} if "moe_intermediate_size" in config else set()
    key = rng.choice([key for key in SIZES if key in config and key not in unused])
    factor = rng.choice([2, 4, 2**20])
    edit(folder / "config.json", lambda config: config.__setitem__(key, config[key] * factor))
    return f"config.json: {key} times {factor}"


def another_depth(folder: Path, rng: random.Random) -> str:
    # Not 10^9: transformers would build lists for hours before it calls our code (the converter refuses at once).
    now = read(folder / "config.json")["num_hidden_layers"]
    depth = rng.choice([0, 1, now + 1, 10**5, -1])
    types = ["full_attention"] * min(max(depth, 0), 10)
    change = {"num_hidden_layers": depth, "layer_types": rng.choice([None, types])}
    edit(folder / "config.json", lambda config: config.update(change))
    return f"config.json: {depth} layers"


def another_architecture(folder: Path, rng: random.Random) -> str:
    now = read(folder / "config.json")["architectures"][0]
    others = [
        name for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM", "Nothing") if name != now
    ]
    edit(folder / "config.json", lambda config: config.__setitem__("architectures", [rng.choice(others)]))
    return "config.json: another architecture"


def another_quantization(folder: Path, rng: random.Random) -> str:
    """Declare a model as quantized by another method, or change the version, rank or rotation of a checkpoint."""
    table = read(folder / "config.json").get("quantization_config")
    if not table or table.get("quant_method") != "bwla":
        other = {"quant_method": rng.choice(["gptq", "awq", "bitsandbytes", "bwla", "fp9", None])}
        edit(folder / "config.json", lambda config: config.__setitem__("quantization_config", other))
        return f"config.json: quantized with {other['quant_method']}"
    rotation = {name: [sizes[0], 2 * sizes[1], sizes[2]] for name, sizes in table["rotation"].items()}
    groups = {name: 2 * size for name, size in table.get("group_size", {}).items()}
    sizes = "group_size" if groups else "rotation"
    change: dict[str, Any] = rng.choice(
        [{"format_version": 3}, {"surprise": 1}, {"rank": table["rank"] + 1}, {sizes: groups or rotation},
         {sizes: {}}, {"clip": 2.0}, {"weights": {"num_bits": 2}}, {"ignore": ["re:.*q_proj"]},
         {"input_activations": {**table["input_activations"], "num_bits": 9}}]
    )  # fmt: skip
    edit(folder / "config.json", lambda config: config["quantization_config"].update(change))
    return f"quantization_config: {str(change)[:60]}"
