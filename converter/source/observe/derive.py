"""Derive the structure of a model from what was observed when it ran."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bwla_converter.source.observe import rules
from bwla_converter.source.observe.decoder import (
    find_layers,
    output_embeddings,
    ties_embeddings,
    why_it_does_not_run,
    without_tracebacks,
)
from bwla_converter.source.observe.experts import Experts, experts_modules, find_experts, unsupported
from bwla_converter.source.observe.names import StoredNames, stored_modules, tied_names
from bwla_converter.source.observe.run import BlockRecord, observe_run
from bwla_converter.source.observe.serving import serving_facts
from bwla_converter.source.structure import InputGroup, Structure
from bwla_kernels.errors import SourceError
from bwla_kernels.format.schema import is_ignored
from torch import nn
from transformers import PreTrainedModel


def observe_structure(
    model: PreTrainedModel, names: StoredNames, stored: Collection[str], source: str
) -> Structure:
    """Return the structure of `model`, which is on the meta device.

    Args:
        model: the model.
        names: how its tensors are stored.
        stored: names of the stored tensors.
        source: names the model's config.json in errors.

    Raises:
        SourceError: the model has no decoder of linears, or its code cannot be run without weights.
    """
    decoder, layers, layers_path = find_layers(model, source)
    shared = next((name for name in tied_names(model) if name.startswith(f"{layers_path}.")), None)
    if shared is not None:
        raise SourceError(
            f"{source}: expected decoder layers with weights of their own, found that {type(model).__name__} shares "
            f"{shared} between layers: this model is not supported"
        )
    try:
        model.to(torch.bfloat16)  # the only dtype that torch has fused experts for
        with without_tracebacks():
            record = observe_run(decoder, layers)
    except Exception as cause:  # whatever the model's code raises
        raise SourceError(
            f"{source}: expected {type(model).__name__} to run on token ids without its weights, so that its input "
            f"groups can be observed, found {why_it_does_not_run(cause)}: this model is not supported"
        ) from None
    parameters = names.by_parameter(stored)
    modules = stored_modules(names, parameters)
    architecture = type(model).__name__
    facts = serving_facts(architecture)
    deriving = _Deriving(model, layers, layers_path, modules, parameters, facts.plain, names)
    blocks, kept, renamed = [], _Kept(), {}
    experts: dict[int, Experts] = {}
    known: dict[Any, _Block] = {}
    for index, block in enumerate(record.blocks):
        key = (id(block), frozenset(path for path in deriving.paths(index) if deriving.stored(index, path)))
        if key not in known:
            known[key] = deriving.block(index, block)
        derived = known[key]
        blocks.append(derived.groups)
        kept.add(index, derived.reasons)
        renamed.update(derived.renamed)
        if derived.experts is not None:
            experts[index] = derived.experts
    if not any(blocks):
        raise SourceError(
            f"{source}: expected linears that can be quantized in the decoder layers of {architecture}, found none"
            f"{_example(kept)}: this model is not supported"
        )
    embedding, head = (
        _path_of(model, model.get_input_embeddings()),
        _path_of(model, output_embeddings(model)),
    )
    norm = _join(_path_of(model, decoder), record.final_norm) if record.final_norm is not None else ""
    outside = {path: modules.get(path, path) for path in (embedding, head, norm) if path}
    structure = Structure(
        architecture,
        deriving.layers_name,
        tuple(blocks),
        embedding=outside.get(embedding, "model.embed_tokens"),
        head=outside.get(head, "lm_head"),
        # An encoder with a head predicts masked tokens, not the next one.
        has_head=bool(head) and not architecture.endswith("ForMaskedLM"),
        final_norm=outside.get(norm, ""),
        own_head=facts.own_head,
        int8_head=facts.int8_head,
        int8_embedding=facts.int8_embedding,
        module_layers="" if layers_path == deriving.layers_name else layers_path,
        renamed_members=renamed,
        renamed_modules={name: path for path, name in outside.items() if name != path},
        experts=experts,
    )
    kept_names = kept.entries(structure) | dict(_outside(model, structure, modules, names, stored))
    return replace(structure, kept=kept_names)


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head has the embedding's weight; of a model without a head, whether it would have."""
    head = _path_of(model, output_embeddings(model))
    return f"{head}.weight" in tied_names(model) if head else ties_embeddings(model)


@dataclass(frozen=True)
class _Block:
    """What was derived of a decoder layer.

    Attributes:
        groups: its input groups.
        reasons: what stays in 16 bits -> why.
        renamed: stored name -> path, of the linears that differ.
        experts: its experts, if their linears are members of the groups.
    """

    groups: tuple[InputGroup, ...]
    reasons: dict[str, str]
    renamed: dict[str, str]
    experts: Experts | None


@dataclass(frozen=True)
class _Deriving:
    """Derives the groups of decoder layers.

    Attributes:
        model, layers, layers_path: the model, its decoder layers and their path.
        modules: module path -> stored name.
        parameters: parameter -> stored tensors.
        plain: paths in a decoder layer to which vLLM's class passes no quantization -> the reason.
        names: how the tensors are stored.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    layers_path: str
    modules: Mapping[str, str]
    parameters: Mapping[str, list[str]]
    plain: Mapping[str, str]
    names: StoredNames

    @property
    def layers_name(self) -> str:
        """Stored name of the list of layers."""
        start = f"{self.layers_path}.0."
        first = next((name for path, name in self.modules.items() if path.startswith(start)), start)
        return first.partition(".0.")[0]

    def paths(self, index: int) -> Iterator[str]:
        """Yield the paths of all linears of a decoder layer."""
        for path, module in self.layers[index].named_modules():
            if isinstance(module, nn.Linear):
                yield path

    def stored(self, index: int, path: str) -> str | None:
        """Return the stored name, inside its layer, of the module at `path` in a layer; None if it has none."""
        name = self.modules.get(f"{self.layers_path}.{index}.{path}")
        prefix = f"{self.layers_name}.{index}."
        return name.removeprefix(prefix) if name is not None and name.startswith(prefix) else None

    def block(self, index: int, record: BlockRecord) -> _Block:
        """Return what is derived of a decoder layer."""
        linears = {path: self.layers[index].get_submodule(path) for path in self.paths(index)}
        experts, plain = self._experts(index, record)
        members_of = (
            {} if experts is None else {experts.path: tuple(map(experts.module_path, experts.gate_up))}
        )
        by_input: dict[object, list[str]] = {}
        for path, key in record.inputs.items():
            by_input.setdefault(key, []).extend(members_of.get(path, (path,) if path in linears else ()))
            if experts is not None and path == experts.path:
                # The inputs of all experts' down projections are one group, although they are different tensors.
                by_input[path] = list(map(experts.module_path, experts.down))
        unused = (path for path in linears if path not in record.inputs)
        reasons = {path: self._reason_by_name(path) or rules.UNUSED for path in unused}
        for paths in by_input.values():
            sharded = self._is_sharded(paths, linears)
            for path in paths:
                reason = self._reason(index, path, linears[path], sharded) if path in linears else None
                if reason is not None:
                    reasons[path] = reason
        for path, reason in list(reasons.items()):
            for other in rules.fused_with(path, list(record.inputs)):
                reasons.setdefault(other, f"vLLM stores it in one with {path}, which {reason}")
        groups, renamed = [], {}
        for read, paths in by_input.items():
            members = [path for path in paths if path not in reasons]
            if not members:
                continue
            names = tuple(self._name(index, path, experts) for path in members)
            renamed.update({name: path for name, path in zip(names, members, strict=True) if name != path})
            streams: set[str | None] = {record.streams.get(path) for path in members}
            stream = streams.pop() if len(streams) == 1 else None
            sharded = experts is not None and read == experts.path
            groups.append(InputGroup(names, stream, sharded or self._is_sharded(paths, linears)))
        named = {self.stored(index, path) or path: reason for path, reason in reasons.items()}
        for path, reason in rules.plain_modules(self.layers[index]):
            if path not in members_of:
                name = self.stored(index, path) or self._stored_matrices(index, path)
                named.setdefault(name, plain.get(path, reason))
        return _Block(tuple(groups), named, renamed, experts)

    def _experts(self, index: int, record: BlockRecord) -> tuple[Experts | None, dict[str, str]]:
        """Return the experts of a decoder layer that can be quantized, and why others stay in 16 bits, by path."""
        found: list[Experts] = []
        reasons: dict[str, str] = {}
        for path, module in experts_modules(self.layers[index]).items():
            if path not in record.inputs:
                reasons[path] = rules.UNUSED
                continue
            start = f"{self.layers_path}.{index}.", f"{self.layers_name}.{index}."
            reason = self._plain_reason(path) or unsupported(module)
            if reason is not None:
                reasons[path] = reason
                continue
            experts = find_experts(module, path, *start, self.names, self.parameters)
            reason = rules.JOINED if experts is None else _shape_reason(experts)
            if reason is not None:
                reasons[path] = reason
            elif experts is not None:
                found.append(experts)
        if len(found) > 1:
            reasons.update(
                {experts.path: "a layer with several sets of experts has no kernel" for experts in found}
            )
        return (found[0] if len(found) == 1 else None), reasons

    def _name(self, index: int, path: str, experts: Experts | None) -> str:
        """Return the stored name, inside its layer, of a linear, which may be an expert's; its path if it has none."""
        if experts is not None and path.startswith(f"{experts.path}."):
            return experts.stored_name(path)
        return self.stored(index, path) or path

    def _stored_matrices(self, index: int, path: str) -> str:
        """Return the stored name, inside its layer, of a module whose parameters are not stored as they are."""
        prefix, start = f"{self.layers_name}.{index}.", f"{self.layers_path}.{index}.{path}."
        stored = next((names[0] for name, names in self.parameters.items() if name.startswith(start)), "")
        before, found, _ = stored.removeprefix(prefix).partition(f"{path.rpartition('.')[2]}.")
        return f"{before}{found}".rstrip(".") if found else path

    def _plain_reason(self, path: str) -> str | None:
        return next((reason for part, reason in self.plain.items() if f".{part}." in f".{path}."), None)

    def _reason_by_name(self, path: str) -> str | None:
        return self._plain_reason(path) or rules.reason_by_name(path)

    def _reason(self, index: int, path: str, linear: nn.Module, sharded: bool) -> str | None:
        assert isinstance(linear, nn.Linear)
        reason = self._reason_by_name(path)
        if reason is None and self.stored(index, path) is None:
            reason = rules.JOINED
        groups = InputGroup((), None, sharded).preferred_rotation_groups
        return reason or rules.reason_by_shape(linear.out_features, linear.in_features, groups)

    def _is_sharded(self, paths: list[str], linears: Mapping[str, nn.Module]) -> bool:
        """Return whether tensor parallelism shards the linears at `paths`, which read the same, along their input.

        transformers' plan says so, unless it does not know the linears, or gathers their outputs because its own code
        cannot work on shards, which vLLM's can. Then it is the last linear before the residual stream.
        """
        plan = self.model.tp_plan
        styles = [plan.get(f"{self.layers_path}.*.{path}", "") for path in paths]
        if any("rowwise" in style for style in styles):
            return True
        if any(style == "colwise" for style in styles):
            return False
        hidden = self.model.config.get_text_config().hidden_size
        return len(paths) == 1 and getattr(linears[paths[0]], "out_features", 0) == hidden


def _shape_reason(experts: Experts) -> str | None:
    """Return why experts of these sizes stay in 16 bits; None if they may be quantized."""
    sizes = {False: (experts.inner, experts.hidden), True: (experts.hidden, experts.inner)}
    found = (
        rules.reason_by_shape(*size, InputGroup((), None, sharded).preferred_rotation_groups)
        for sharded, size in sizes.items()
    )
    return next(filter(None, found), None)


@dataclass
class _Kept:
    """Collects what stays in 16 bits in the decoder layers."""

    layers: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, index: int, reasons: Mapping[str, str]) -> None:
        for member, reason in reasons.items():
            self.layers.setdefault((member, reason), []).append(index)

    def entries(self, structure: Structure) -> dict[str, str]:
        """Return entries of `ignore` with the reasons: the name inside the layer if it holds for all layers."""
        quantized = [name for _, name in structure.linears()]
        entries: dict[str, str] = {}
        for (member, reason), indices in self.layers.items():
            if any(is_ignored(name, [member]) for name in quantized) or member in entries:
                entries.update({f"{structure.layer_name(index)}.{member}": reason for index in indices})
            else:
                entries[member] = reason
        return entries


def _outside(
    model: PreTrainedModel,
    structure: Structure,
    modules: Mapping[str, str],
    names: StoredNames,
    stored: Collection[str],
) -> Iterator[tuple[str, str]]:
    """Yield what holds matrices outside the decoder layers, by the part of its name that tells it apart."""
    ends = (f"{structure.module_layers or structure.layers}.", f"{structure.module_path(structure.head)}.")
    linears = {
        modules.get(path, path): rules.OUTSIDE
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{path}.".startswith(ends)
    }
    unused = {name.rpartition(".")[0]: rules.UNUSED for name in stored if names.is_unused(name)}
    quantized = [name for _, name in structure.linears()]
    inside = structure.layers.split(".")
    for name, reason in (linears | unused).items():
        parts = name.split(".")
        number = next(
            (n for n, (part, other) in enumerate(zip(parts, inside, strict=False)) if part != other),
            len(inside),
        )
        entry = ".".join(parts[: number + 1])
        short = parts[min(number, len(parts) - 1)]
        if not short.isdecimal() and not any(is_ignored(linear, [short]) for linear in quantized):
            entry = short
        yield entry, reason


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    """Return the path of `module` in `model`; an empty string if it is not there, or is the model itself."""
    return next((path for path, found in model.named_modules() if found is module), "")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _example(kept: _Kept) -> str:
    first = next(iter(kept.layers), None)
    return f" ({first[0]}: {first[1]})" if first else ""
