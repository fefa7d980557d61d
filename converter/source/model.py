"""The model to convert: locate it, check it before the conversion starts, and read it one decoder layer at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bwla_converter.common.ignored import check_ignored
from bwla_converter.source.folder.files import describe_left_out, files_beside
from bwla_converter.source.folder.kinds import missing_weights, read_listing
from bwla_converter.source.folder.locate import locate
from bwla_converter.source.folder.quantized import (
    entries_as_read,
    quantization_config,
    read_dequantized,
    scale_problems,
)
from bwla_converter.source.folder.tensor_names import names_problem, rename_tensors
from bwla_converter.source.gguf_path import OnProgress, ignore_progress, is_gguf
from bwla_converter.source.meta_model import build_meta_model
from bwla_converter.source.observe.derive import is_tied, observe_structure
from bwla_converter.source.observe.experts import Experts
from bwla_converter.source.observe.names import COMPUTED, StoredNames, stored_shapes, tied_names
from bwla_converter.source.observe.tensors import tensor_problems
from bwla_converter.source.problems import raise_if_any
from bwla_converter.source.structure import MAX_NAMED, InputGroup, Structure
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import Entry, read_json, scan_folder
from bwla_kernels.format.model import not_finite, tied_conflict
from bwla_kernels.format.schema import is_ignored
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """A checkpoint folder, described by its config.json and its safetensors headers.

    Attributes:
        folder: the checkpoint folder.
        config: contents of config.json.
        structure: its decoder layers and input groups.
        entries: file, shape and dtype of every tensor as `read` returns it: quantized weights in a float dtype, and one
            tensor for each linear of experts that are stored in stacked tensors and will be quantized.
        tied_head: whether the head shares the weight of the embedding.
        revision: commit of a Hub snapshot; empty for a local folder.
        ignore: linears to leave unquantized, see `bwla_kernels.format.schema.is_ignored`.
        stored: file, shape and dtype of every tensor in the files, including the scales of quantized weights; empty if
            there are no files.
        tied: name of a tensor that config.json ties to another one -> name of that tensor.
        quantization: what config.json says about weights that are stored quantized; empty where none are.
        name: name of the model for reports: the Hub id, or the name of the folder or of the GGUF file.
        notes: sentences for the user about tensors that were renamed and files that are not copied.
        loadable: whether transformers reads the folder too; False where it does not know the stored tensor names.
        names: the rules by which transformers reads the stored tensors; None if they have the parameters' names.
        defaults: `config` as transformers completes it.
    """

    folder: Path
    config: Mapping[str, Any]
    structure: Structure
    entries: Mapping[str, Entry]
    tied_head: bool
    revision: str = ""
    ignore: tuple[str, ...] = ()
    stored: Mapping[str, Entry] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    notes: tuple[str, ...] = ()
    loadable: bool = True
    names: StoredNames | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.structure.blocks)

    @property
    def embedding_weight(self) -> str:
        """Name of the embedding's tensor."""
        return f"{self.structure.embedding}.weight"

    @property
    def head_weight(self) -> str:
        """Name of the head's tensor, which a tied model does not store."""
        return f"{self.structure.head}.weight"

    @property
    def output_weight(self) -> str:
        """Name of the tensor that computes the logits: the head's, or that of the embedding it is tied to."""
        return self.embedding_weight if self.tied_head else self.head_weight

    def groups_of_layer(self, index: int) -> Iterator[tuple[InputGroup, list[str]]]:
        """Yield the input groups of a decoder layer that are to be quantized, with the names of their linears.

        Raises:
            SourceError: `ignore` names some linears of a group and not the others. It names all experts of a layer, or
                none; the other linears of their group may be quantized without them.
        """
        ignored_experts = self._ignored_experts.get(index, ())
        for group in self.structure.blocks[index]:
            names = [f"{self.structure.layer_name(index)}.{member}" for member in group.members]
            if ignored_experts:
                names = [name for name in names if name not in ignored_experts]
            ignored = [name for name in names if is_ignored(name, self.ignore)]
            if ignored and len(ignored) < len(names):
                others = ", ".join([name for name in names if name not in ignored][:MAX_NAMED])
                raise SourceError(
                    f"{ignored[0]}: is ignored but shares its input with {others}: --ignore all of them or none"
                )
            if names and not ignored:
                yield group, names

    @cached_property
    def _ignored_experts(self) -> dict[int, frozenset[str]]:
        """The names of all linears of the experts that `ignore` names, by their decoder layer.

        Raises:
            SourceError: `ignore` names some of a layer's experts and not the others.
        """
        ignored: dict[int, frozenset[str]] = {}
        for index, experts in self.structure.experts.items() if self.ignore else ():
            names = [
                f"{self.structure.layer_name(index)}.{name}" for name in (*experts.gate_up, *experts.down)
            ]
            others = [name for name in names if not is_ignored(name, self.ignore)]
            if others and len(others) < len(names):
                raise SourceError(
                    f"{others[0]}: is not ignored, but other linears of the layer's experts are: --ignore experts "
                    "leaves all of them as they are"
                )
            if not others:
                ignored[index] = frozenset(names)
        return ignored

    def quantizable(self) -> list[str]:
        """Return the names of all linears in decoder layers, of the head and of the embedding."""
        linears = (name for _, name in self.structure.linears())
        return [self.structure.head, self.structure.embedding, *linears]

    def linears_of_layer(self, index: int) -> list[str]:
        """Return the linears of a decoder layer that are to be quantized. Raises as `groups_of_layer` does."""
        return [name for _, names in self.groups_of_layer(index) for name in names]

    def names_of_layer(self, index: int) -> list[str]:
        """Return the names of all tensors of a decoder layer."""
        return list(self._names_by_layer.get(index, ()))

    def names_outside_layers(self) -> list[str]:
        """Return the names of all tensors outside the decoder layers: embedding, final norm, head, other towers."""
        return list(self._names_by_layer.get(None, ()))

    @cached_property
    def _names_by_layer(self) -> dict[int | None, list[str]]:
        """The names of all tensors by their decoder layer; None for those outside the layers."""
        names: dict[int | None, list[str]] = {}
        for name in self.entries:
            names.setdefault(self.structure.layer_of(name), []).append(name)
        return names

    def block_state(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of transformers' module of decoder layer `index`, from its stored tensors.

        Args:
            index: number of the decoder layer.
            tensors: all of the layer's tensors by their stored names, as `read(names_of_layer(index))` returns them.

        Returns: the tensors by their names inside the module, of the same dtypes, without what the module computes
            itself.
        """
        prefix = f"{self.structure.layer_path(index)}."
        if index in self.structure.experts:
            tensors = self.structure.experts[index].stack(f"{self.structure.layer_name(index)}.", tensors)
        parameters = tensors if self.names is None else self.names.convert(tensors)
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in parameters.items()
            if name.startswith(prefix)
            and not name.endswith(COMPUTED)
            and (self.names is None or name in self.names.parameters)
        }

    def stored_name(self, parameter: str) -> str:
        """Return the name of the stored tensor that a parameter outside the decoder layers is read from.

        Args:
            parameter: its name in transformers' model. One that is not stored, because it is tied, keeps its name.
        """
        return self._stored_by_parameter.get(parameter, parameter)

    @cached_property
    def _stored_by_parameter(self) -> dict[str, str]:
        """Stored names of the tensors outside the decoder layers that are not joined or divided, by their parameter."""
        names = self.names_outside_layers()
        if self.names is None:
            return {name: name for name in names}
        found = self.names.by_parameter(names)
        return {parameter: stored[0] for parameter, stored in found.items() if len(stored) == 1}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors by name and dequantize quantized weights. Nothing else is loaded into memory.

        Experts that are stored in stacked tensors are read as a whole and divided.
        """
        joined = {name: self._stacked[name] for name in names if name in self._stacked}
        read = list(dict.fromkeys(name if name not in joined else joined[name][0] for name in names))
        stored = read_dequantized(self.folder, self.stored, read, self.quantization)
        tensors: dict[str, Tensor] = {}
        for tensor in dict.fromkeys(joined.values()):
            name, index = tensor
            prefix = f"{self.structure.layer_name(index)}."
            tensors.update(self.structure.experts[index].split(prefix, {name: stored[name]}))
        return {name: tensors[name] if name in joined else stored[name] for name in names}

    def read_together(self) -> Iterable[list[str]]:
        """Return the names of all tensors, those together that are stored as one."""
        together: dict[str, list[str]] = {}
        for name in self.entries:
            together.setdefault(self._stacked.get(name, (name, 0))[0], []).append(name)
        return together.values()

    def experts_of_layer(self, index: int) -> Experts | None:
        """Return the experts of a decoder layer whose linears are to be quantized; None if there are none."""
        return None if index in self._ignored_experts else self.structure.experts.get(index)

    @cached_property
    def _stacked(self) -> dict[str, tuple[str, int]]:
        """Names of the experts' tensors that are stored in stacked ones -> the stored tensor and the decoder layer."""
        found = {}
        for index, experts in self.structure.experts.items():
            prefix = f"{self.structure.layer_name(index)}."
            for stacked, names in experts.divisions():
                found.update({f"{prefix}{name}": (f"{prefix}{stacked}", index) for name in names})
        return {name: stored for name, stored in found.items() if name in self.entries}


def open_source(model: str, ignore: Sequence[str] = (), on_progress: OnProgress = ignore_progress) -> Source:
    """Locate a model, read its headers and check that it can be converted; `check_values` checks the values.

    Args:
        model: a folder, a GGUF file or a Hub id.
        ignore: linears to leave unquantized.
        on_progress: called while a GGUF file is written as a folder, see `gguf_folder.prepare`.

    Raises:
        SourceError: config.json cannot be used, an entry of `ignore` matches nothing, or a list of all tensors and
            files with problems.
    """
    folder, revision = locate(model, on_progress)
    config_path = folder / "config.json"
    config = read_json(config_path, SourceError)
    quantization = quantization_config(config, str(config_path))
    meta_model = build_meta_model(folder, config)
    names, tied = StoredNames(meta_model), tied_names(meta_model)
    scan = scan_folder(folder)
    if not scan.entries and scan.problems and not scan.lost:
        # The list of all tensors, each of them missing, would hide the reason.
        raise SourceError(missing_weights(read_listing(folder), str(folder)) or scan.problems[0])
    expected = expected_names(meta_model, names, tied, scan.entries)
    renamed = rename_tensors(scan, expected, meta_model.base_model_prefix)
    scan = renamed.scan
    problem = names_problem(scan.entries, expected, type(meta_model).__name__)
    if problem is not None:
        raise SourceError(f"{folder}: {problem}")
    structure = observe_structure(meta_model, names, {*scan.entries, *expected}, str(config_path))
    entries = entries_as_read(scan.entries, quantization)
    source = Source(
        folder,
        config,
        structure,
        entries=structure.with_divided_experts(entries, ignore),
        tied_head=is_tied(meta_model),
        revision=revision,
        ignore=tuple(ignore),
        stored=scan.entries,
        tied=stored_ties(names, tied, scan.entries),
        quantization=quantization,
        name=_name(model, folder, revision),
        notes=tuple(
            filter(None, [renamed.note, describe_left_out(files_beside(folder)), structure.kept_note])
        ),
        loadable=renamed.loadable,
        names=names,
        defaults=meta_model.config.to_dict(),
    )
    check_ignored(source.ignore, [*source.quantizable(), *structure.kept])
    problems = [
        *scan.problems,
        *scale_problems(scan.entries, quantization),
        *tensor_problems(entries, scan, names, tied, structure.architecture),
    ]
    raise_if_any(folder, problems)
    return source


def expected_names(
    meta_model: PreTrainedModel, names: StoredNames, tied: Mapping[str, str], stored: Iterable[str]
) -> list[str]:
    """Return the names of the tensors that the files of a model should hold.

    Args:
        meta_model: the model.
        names: how its tensors are stored.
        tied: the tensors that are not stored, because others replace them.
        stored: the tensors that are stored. There are several ways to store some models; of these, the one that fits.
    """
    parameters = [name for name in names.parameters if name not in tied]
    if names.identical:
        return parameters
    found = names.by_parameter(stored)
    fitting = [name for parts in found.values() for name in parts]
    if all(name in found for name in parameters):
        return fitting
    usual = [name for name in stored_shapes(meta_model) if names.parameter(name)[0] not in {*found, *tied}]
    return [*fitting, *usual]


def stored_ties(names: StoredNames, tied: Mapping[str, str], stored: Iterable[str]) -> dict[str, str]:
    """Return `tied`, which maps parameters of transformers' model, for the names of the stored tensors."""
    found = names.by_parameter(stored)

    def stored_name(parameter: str) -> str:
        return next(iter(found.get(parameter, ())), parameter)

    return {stored_name(parameter): stored_name(other) for parameter, other in tied.items()}


def _name(model: str, folder: Path, revision: str) -> str:
    if revision:
        return model
    path = Path(model).expanduser()
    return path.name if is_gguf(path) else folder.resolve().name


def check_values(
    source: Source, vocabulary: Iterable[str] = (), on_tensor: Callable[[str], None] = lambda name: None
) -> None:
    """Read every tensor once and raise if any holds NaN or infinity.

    Args:
        source: the model.
        vocabulary: names of the tensors that the quantized head and embedding are made from.
        on_tensor: called with the name of each weight that will be quantized, after it was read.

    Raises:
        SourceError: the list of all tensors with problems.
    """
    quantized = {*_linear_weights(source), *vocabulary}
    problems = []
    for names in source.read_together():
        for name, tensor in source.read(names).items():
            if not_finite(tensor):
                file = source.entries[name].file
                problems.append(f"{file}: {name}: expected finite values, found NaN or infinity")
            if name in quantized:
                on_tensor(name)
    problems += filter(None, [tied_conflict(source.folder, source.stored, source.tied)])
    raise_if_any(source.folder, problems)


def _linear_weights(source: Source) -> Iterator[str]:
    """Yield the names of all weights that will be quantized, without the head's."""
    for index in range(source.num_layers):
        yield from (f"{name}.weight" for name in source.linears_of_layer(index))
