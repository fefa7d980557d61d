"""Check a whole checkpoint folder by its safetensors headers, without reading a tensor.

vLLM's stock model classes serve NaN for a missing tensor of a quantized model and silently narrow an oversized one,
so completeness and shapes are checked here, before a loader starts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import PACK_FACTOR
from bwla_kernels.format.expert_checks import expert_problems
from bwla_kernels.format.experts import expert_of, stored_specs
from bwla_kernels.format.files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    read_folder,
    read_headers,
    read_json,
    read_tensors,
    scan_folder,
)
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE, INT8_SUFFIX, HeadSpec, head_tensor_specs
from bwla_kernels.format.layer import (
    FLOAT_DTYPES,
    INPUT_TRANSFORM,
    LayerSpec,
    TensorSpec,
    describe_kind,
    shape_problem,
)
from bwla_kernels.format.model import config_problem, tied_conflict
from bwla_kernels.format.schema import BWLAFormat, parse_config
from bwla_kernels.format.tensors import PACKED_SUFFIX, listed_problems, tied_tensors

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Entry",
    "check_folder",
    "read_folder",
    "read_headers",
    "read_json",
    "read_tensors",
    "scan_folder",
]

ADVICE = "convert or download the model again"
HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")
"""Names that models' configs have for the width of the embedding."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names that models' configs have for the number of decoder layers."""

_LAYER_NAME = re.compile(r"(?P<stem>.*?\.)(?P<index>\d+)(?P<leaf>\..*)")


def check_folder(folder: Path, entries: Mapping[str, Entry] | None = None) -> dict[str, LayerSpec]:
    """Check that a folder is a complete BWLA checkpoint, by config and headers.

    Args:
        folder: the checkpoint.
        entries: its tensors from `read_folder`, if the caller has them already.

    Returns: the spec of every quantized linear.

    Raises:
        FormatError: the first problem found, naming file and tensor.
    """
    config_path = folder / "config.json"
    raw_config = read_json(config_path)
    config = parse_config(raw_config.get("quantization_config") or {}, str(config_path))
    problem = config_problem(config.config or {}, raw_config, config_path)
    if problem is not None:
        raise FormatError(problem)
    entries = read_folder(folder) if entries is None else entries
    specs = {}
    for key, entry in entries.items():
        if key.endswith(PACKED_SUFFIX):
            name = key.removesuffix(PACKED_SUFFIX)
            rows, words = (entry.shape[0], entry.shape[-1]) if len(entry.shape) in (2, 3) else (0, 0)
            has_bias = f"{name}.bias" in entries
            specs[name] = _spec_of(config, name, rows, words * PACK_FACTOR, has_bias, folder / entry.file)
    problem = next(_folder_problems(folder, entries, specs, config, raw_config), None)
    if problem is not None:
        raise FormatError(f"{problem}; {ADVICE}")
    return specs


def _folder_problems(
    folder: Path,
    entries: Mapping[str, Entry],
    specs: Mapping[str, LayerSpec],
    config: BWLAFormat,
    raw_config: Mapping[str, Any],
) -> Iterator[str]:
    """Yield one sentence for each problem of a checkpoint, in a fixed order; of tied tensors, values are compared."""
    yield from expert_problems(entries, specs, config, folder)
    by_linear = _tensors_by_linear(entries, specs)
    for name, spec in specs.items():
        yield from _layer_problems(name, by_linear[name], spec, folder)
    if not specs:
        yield f"{folder}: expected quantized layers (*{PACKED_SUFFIX}), found none"
    int8 = int8_modules(config, entries)
    for module in int8:
        yield from _int8_problems(module, entries, raw_config, folder)
    yield from _stray_files(entries, folder)
    for name in plain_names(entries, specs, int8):
        module = name.removesuffix(".weight")
        if module != name and config.is_quantized(module):
            yield (
                f"{folder / entries[name].file}: {name}: expected one-bit tensors, because config.json gives "
                f"sizes for {module} and does not ignore it, found an unquantized weight"
            )
    if config.tensors is not None:
        yield from listed_problems(config.tensors, entries, folder)
        tied = tied_tensors(config.tensors, entries)
    else:
        yield from _plain_problems(entries, specs, int8, folder)
        yield from _missing_linears(specs, config, raw_config, folder)
        is_tied = raw_config.get("tie_word_embeddings") is True
        tied = {f"{HEAD_MODULE}.weight": f"{EMBEDDING_MODULE}.weight"} if is_tied else {}
    conflict = tied_conflict(folder, entries, tied)
    if conflict is not None:
        yield conflict


def _missing_linears(
    specs: Mapping[str, LayerSpec], config: BWLAFormat, raw_config: Mapping[str, Any], folder: Path
) -> Iterator[str]:
    """Yield the linears that are missing, and those that config.json does not describe, where no list is stored."""
    path = folder / "config.json"
    if config.linears is not None:
        expected = [name for kind in config.linears for name in kind.full_names()]
        for name in expected:
            if name not in specs:
                yield f"{folder}: {name}{PACKED_SUFFIX} is missing, although config.json lists it in linears"
        for name in sorted(specs.keys() - set(expected)):
            yield f"{path}: expected linears to list {name}, because it is stored in one bit"
        return
    count = _layer_count(raw_config, path)
    for name in specs:
        match = _LAYER_NAME.fullmatch(name)
        if match and int(match["index"]) >= count:
            yield (
                f"{path}: expected num_hidden_layers to be more than {match['index']}, because {name} is "
                f"stored, found {count}"
            )
    for name in _expected_names(specs, count):
        if name not in specs and not config.is_ignored(name):
            yield f"{folder}: {name}{PACKED_SUFFIX} is missing, although other layers have it"


def _tensors_by_linear(
    entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec]
) -> dict[str, dict[str, Entry]]:
    """Return everything that is stored below the name of each quantized linear, by the rest of its name."""
    tensors: dict[str, dict[str, Entry]] = {name: {} for name in specs}
    for name, entry in entries.items():
        end = name.find(".")
        while end >= 0:
            if name[:end] in tensors:
                tensors[name[:end]][name[end + 1 :]] = entry
            end = name.find(".", end + 1)
    return tensors


def _layer_problems(name: str, stored: Mapping[str, Entry], spec: LayerSpec, folder: Path) -> Iterator[str]:
    """Yield the differences between a linear's stored tensors and those of its spec."""
    expected = stored_specs(name, spec)
    for missing in sorted(expected.keys() - stored.keys()):
        yield f"{folder}: {name}.{missing} is missing, expected shape {list(expected[missing].shape)}"
    for extra in sorted(stored.keys() - expected.keys()):
        shared = extra in INPUT_TRANSFORM and expert_of(name)
        reason = "only expert 0 stores the input transform" if shared else describe_kind(spec)
        yield f"{folder / stored[extra].file}: {name}.{extra} is not part of the format ({reason})"
    for key, want in expected.items():
        if key in stored:
            problem = shape_problem(want, stored[key].shape, stored[key].dtype)
            if problem:
                yield f"{folder / stored[key].file}: {name}.{key}: {problem}"


def int8_modules(config: BWLAFormat, names: Iterable[str] = ()) -> list[str]:
    """Return the module paths of the head and the embedding, as far as they are stored in 8 bits.

    Args:
        config: which of the two are.
        names: the stored tensors. Some models call these modules differently (`model.language_model.embed_tokens`);
            the usual names are returned where the stored ones do not agree with `config`.
    """
    usual = {HEAD_MODULE: config.lm_head, EMBEDDING_MODULE: config.embedding}
    expected = [module for module, arguments in usual.items() if arguments is not None]
    stored = [name.removesuffix(INT8_SUFFIX) for name in names if name.endswith(INT8_SUFFIX)]
    unexpected = usual.keys() - set(expected)
    return expected if len(stored) != len(expected) or unexpected & set(stored) else sorted(stored)


def plain_names(
    entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec], int8: Iterable[str] = ()
) -> list[str]:
    """Return the names of the stored tensors that are not quantized.

    Args:
        entries: all tensors.
        specs: the quantized linears.
        int8: modules in 8 bits, from `int8_modules`.
    """
    quantized = {f"{module}.{key}" for module in int8 for key in head_tensor_specs(HeadSpec(1, 1))}
    return [name for name in entries if name.rpartition(".")[0] not in specs and name not in quantized]


def _plain_problems(
    entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec], int8: Iterable[str], folder: Path
) -> Iterator[str]:
    """Yield the unquantized tensors whose dtype loaders would silently cast, where no list is stored."""
    for name in plain_names(entries, specs, int8):
        shape, dtype = entries[name].shape, entries[name].dtype
        problem = shape_problem(TensorSpec(shape, FLOAT_DTYPES), shape, dtype)
        if problem:
            yield f"{folder / entries[name].file}: {name}: {problem}"


def _stray_files(entries: Mapping[str, Entry], folder: Path) -> Iterator[str]:
    """Yield the weight files that are not part of the checkpoint: vLLM may read them over the others."""
    stray = {path.name for path in folder.glob("*.safetensors")} - {entry.file for entry in entries.values()}
    for file in sorted(stray):
        yield f"{folder / file}: expected only files of this checkpoint, found one that is not"


def _int8_problems(
    module: str, entries: Mapping[str, Entry], raw_config: Mapping[str, Any], folder: Path
) -> Iterator[str]:
    """Yield the differences between the stored 8-bit head or embedding and the sizes in config.json."""
    sizes = text_settings(raw_config)
    vocabulary = sizes.get("vocab_size")
    hidden = next((sizes[key] for key in HIDDEN_SIZES if key in sizes), None)
    if not isinstance(vocabulary, int) or not isinstance(hidden, int):
        yield (
            f"{folder / 'config.json'}: expected vocab_size and hidden_size, which {module} in 8 bits needs, found none"
        )
        return
    plain = entries.get(f"{module}.weight")
    if plain is not None:
        yield f"{folder / plain.file}: {module}.weight: expected no such tensor beside {module}.weight_int8, found one"
    for key, want in head_tensor_specs(HeadSpec(vocabulary, hidden)).items():
        name = f"{module}.{key}"
        entry = entries.get(name)
        if entry is None:
            yield f"{folder}: {name} is missing, expected shape {list(want.shape)}"
            continue
        problem = shape_problem(want, entry.shape, entry.dtype)
        if problem:
            yield f"{folder / entry.file}: {name}: {problem}"


def text_settings(raw_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model: all of it, or that of a multimodal model."""
    settings = raw_config.get("text_config") or raw_config
    return settings if isinstance(settings, Mapping) else {}


def _layer_count(raw_config: Mapping[str, Any], path: Path) -> int:
    sizes = text_settings(raw_config)
    count = next((sizes[key] for key in LAYER_COUNTS if key in sizes), None)
    if not isinstance(count, int) or isinstance(count, bool):
        raise FormatError(
            f"{path}: expected num_hidden_layers to be a number, found {count!r:.40}; restore this file"
        )
    return count


def _expected_names(specs: Mapping[str, LayerSpec], count: int) -> Iterator[str]:
    """Yield the names of all linears to expect: those that any decoder layer has, for every layer."""
    kinds = {(m["stem"], m["leaf"]) for m in map(_LAYER_NAME.fullmatch, specs) if m}
    for index in range(count):
        yield from (f"{stem}{index}{leaf}" for stem, leaf in sorted(kinds))


def _spec_of(config: BWLAFormat, name: str, n: int, k: int, bias: bool, file: Path) -> LayerSpec:
    spec = config.layer_spec(name, n, k, bias)
    if spec is None:
        raise FormatError(
            f"{file}: {name} is stored in one bit, but config.json gives no rotation and no group_size for it, or "
            "ignores it; convert or download the model again"
        )
    return spec
