"""Checks across the experts of a layer, by config and headers: they must fit each other for a kernel to stack them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bwla_kernels.format.experts import EXPERT_LEAVES, expert_of, experts_module
from bwla_kernels.format.files import Entry
from bwla_kernels.format.layer import LayerSpec

if TYPE_CHECKING:  # imports compressed-tensors, which takes seconds
    from bwla_kernels.format.schema import BWLAFormat

LayerExperts = dict[int, dict[str, LayerSpec]]
"""The one-bit linears of a layer's experts: number -> leaf of the name -> spec."""


def experts_of(specs: Mapping[str, LayerSpec]) -> dict[str, LayerExperts]:
    """Return the experts among the quantized linears `specs`, by the path that their names share."""
    layers: dict[str, LayerExperts] = {}
    for name, spec in specs.items():
        module, number = experts_module(name), expert_of(name)
        if module is not None and number is not None:
            layers.setdefault(module, {}).setdefault(number, {})[name.rpartition(".")[2]] = spec
    return layers


def expert_problems(
    entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec], config: "BWLAFormat", folder: Path
) -> Iterator[str]:
    """Yield one sentence for each contradiction between a layer's experts, or between them and config.json.

    Args:
        entries: all stored tensors.
        specs: the quantized linears.
        config: the checkpoint's `quantization_config`.
        folder: where the checkpoint is, for messages.
    """
    layers = experts_of(specs)
    path = folder / "config.json"
    if layers and config.experts is None:
        yield (
            f"{path}: expected the key experts in quantization_config, because {next(iter(layers))} is stored in one "
            "bit, found none"
        )
    if config.experts is not None and not layers:
        yield f"{path}: expected one-bit experts, because quantization_config has the key experts, found none"
    yield from _mixed_layers(entries, layers, specs, folder)
    for module, experts in layers.items():
        yield from _layer_problems(f"{folder}: {module}", experts)


def _layer_problems(where: str, experts: LayerExperts) -> Iterator[str]:
    """Yield the contradictions between the experts of one layer; of equal experts, the first says it for all."""
    missing = next((number for number in range(len(experts)) if number not in experts), None)
    if missing is not None:
        yield f"{where}: expected experts 0 to {max(experts)} without gaps, found none with the number {missing}"
        return
    first = experts[0]
    leaves = next((leaves for leaves in EXPERT_LEAVES if first.keys() <= {*leaves}), None)
    for number in sorted(experts):
        if leaves is None or experts[number].keys() != {*leaves}:
            wanted = " or ".join(", ".join(names) for names in ((leaves,) if leaves else EXPERT_LEAVES))
            found = ", ".join(sorted(experts[number]))
            yield f"{where}.{number}: expected the one-bit linears {wanted}, found {found}"
            return
        for leaf, spec in experts[number].items():
            if spec != first[leaf]:
                found = f"{_settings(spec)}, found {_settings(first[leaf])} for expert 0"
                yield f"{where}.{number}.{leaf}: expected the same sizes for all experts, found {found}"
    if leaves is None:
        return
    gate, up, down = (first[leaf] for leaf in leaves)
    if gate != up:
        yield (
            f"{where}: expected equal sizes of {leaves[0]} and {leaves[1]}, which share an input transform, found "
            f"{_settings(gate)}, and {_settings(up)}"
        )
    if (down.out_features, down.in_features) != (gate.in_features, gate.out_features):
        yield (
            f"{where}: expected {leaves[2]} of {gate.in_features} x {gate.out_features}, which fits {leaves[0]}, found "
            f"{down.out_features} x {down.in_features}"
        )


def _mixed_layers(
    entries: Mapping[str, Entry],
    layers: Mapping[str, LayerExperts],
    specs: Mapping[str, LayerSpec],
    folder: Path,
) -> Iterator[str]:
    """Yield the unquantized weights of experts that stand beside one-bit ones of the same layer, one for each layer."""
    seen: set[str] = set()
    for name, entry in entries.items() if layers else ():
        owner = name.rpartition(".")[0]
        if owner in specs:
            continue
        # Models may store the experts of a layer in one tensor: `mlp.experts.gate_up_proj`.
        module = experts_module(owner) or (owner if len(entry.shape) == 3 else None)
        if module is not None and module in layers and module not in seen:
            seen.add(module)
            yield (
                f"{folder / entry.file}: {name}: expected all experts of a layer in one bit or none, found an "
                f"unquantized tensor beside one-bit linears of {module}"
            )


def _settings(spec: LayerSpec) -> str:
    """Describe everything in which the experts of a layer must agree."""
    return (
        f"{spec.out_features} x {spec.in_features}, rotation ({spec.rotation_groups}, {spec.n1}, {spec.n2}), "
        f"planes {spec.planes}, rank {spec.rank}, clip {spec.clip:g}{', with a bias' if spec.bias else ''}"
    )
