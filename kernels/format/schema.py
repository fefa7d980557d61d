"""`quantization_config` of config.json as a pydantic model, built on the argument models of compressed-tensors.

compressed-tensors' `CompressionFormat` is a closed enum, so its compressor registry cannot name BWLA; its
`QuantizationArgs` and its name matching are reused.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import PACK_FACTOR
from bwla_kernels.format.experts import is_setting, settings_name
from bwla_kernels.format.layer import MAX_PLANES, LayerSpec
from bwla_kernels.format.tensors import parse_tensors
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils import match_name
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

QUANT_METHOD = "bwla"
FORMAT_VERSIONS = (1, 2)
"""Versions that can be read. Version 2 has `planes`, `embedding`, `experts` and `group_size`; without them, version 1
is written."""

SETTINGS_BY_SUFFIX = ("rotation", "group_size", "planes", "rank", "clip")
"""Settings that may differ between linears: dictionaries of module-name suffixes, which a renamed module needs anew."""

_ARGUMENTS = {"num_bits", "type", "symmetric", "strategy", "dynamic"}
"""Fields of `QuantizationArgs` that are written to config.json."""

Value = TypeVar("Value")


def one_bit_weights() -> QuantizationArgs:
    """Return the only weight format: one signed bit, one scale per row, for each plane."""
    return QuantizationArgs(num_bits=1, type="int", symmetric=True, strategy="channel")


def head_args() -> QuantizationArgs:
    """Return the only format of a quantized head or embedding: int8, one scale per row."""
    return QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")


def activation_args(bits: int) -> QuantizationArgs:
    """Return the format of activations of `bits` bits: dynamic, symmetric, one scale per token and rotation group."""
    return QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True)


@functools.lru_cache(maxsize=64)  # one linear has several settings
def _suffixes(name: str) -> tuple[str, ...]:
    """Return a name and its ends after each dot, longest first; each is followed by its form for any expert."""
    suffixes = []
    forms = list(dict.fromkeys((name, settings_name(name))))
    while forms[0]:
        suffixes += forms
        forms = [form.partition(".")[2] for form in forms]
    return tuple(suffixes)


def longest_suffix(table: Mapping[str, Value], name: str) -> Value | None:
    """Look up a module by suffix: return the value of the longest key that equals `name` or ends it at a dot.

    In a key, `*` stands for the number of an expert: "experts.*.down_proj".
    """
    return next((table[suffix] for suffix in _suffixes(name) if suffix in table), None)


def is_ignored(name: str, ignore: Iterable[str]) -> bool:
    """Return whether an entry of `ignore` matches a module.

    An entry is a `re:` pattern for the full name, or consecutive parts of it: "down_proj" matches every module of that
    name, "model.layers.0" everything below that layer.
    """
    return any(match_name(name, target) or f".{target}." in f".{name}." for target in ignore)


class Provenance(BaseModel):
    """How a checkpoint was made. Informational: no loader reads it.

    Attributes:
        allocation: what the planes were chosen for, "bits" per weight or "loss" in nats per token; empty where all
            linears were given the same number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str = ""
    revision: str = ""
    recipe: str = ""
    seed: int = 0
    bwla_version: str = ""
    calibration: dict[str, Any] = Field(default_factory=dict)
    allocation: dict[str, float] = Field(default_factory=dict)


class LayerLinears(BaseModel):
    """The quantized linears of decoder layers of one kind, as checkpoints without `tensors` list them.

    Attributes:
        layers: module path of the list of decoder layers, "model.layers" for example.
        indices: the decoder layers of this kind.
        names: module paths of their quantized linears, inside a decoder layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: str
    indices: list[int]
    names: list[str]

    def full_names(self) -> list[str]:
        """Return the full names of these linears."""
        return [f"{self.layers}.{index}.{name}" for index in self.indices for name in self.names]


class ExpertsFormat(BaseModel):
    """How the experts of a mixture of experts are stored in one bit.

    Attributes:
        input_transform: which experts of a layer store the input transform that all of them share: expert 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_transform: Literal["first"]


class BWLAFormat(BaseModel):
    """The `quantization_config`: everything that a loader must know before it reads a tensor.

    Attributes:
        rotation: module-name suffix -> (G, n1, n2); the longest match wins. A linear without a match
            is not quantized, unless `group_size` names it. Here and in the other settings by suffix, `*` stands for the
            number of an expert.
        group_size: module-name suffix -> columns that share a weight scale and an activation scale, of linears
            without an input transform; the longest match wins, and no linear matches both this and `rotation`.
            Version 1 does not know it.
        planes: number of binary planes, one for all or by suffix; version 1 knows a single one.
        rank: rank of the low-rank correction, one for all or by suffix.
        clip: activation clip, one for all or by suffix.
        ignore: modules that are not quantized, by name or `re:` pattern (compressed-tensors' matching).
        linears: all quantized linears of a checkpoint without `tensors`; None where every decoder layer that `ignore`
            does not exclude has the same ones.
        lm_head: 8-bit weights of a language-model head that is stored, or None where it is not quantized.
        embedding: 8-bit weights of the embedding, and of a head that is tied to it, or None where they are not
            quantized; version 1 does not know it.
        experts: how experts are stored in one bit, or None where none are; version 1 does not know it.
        tensors: all stored tensors whose shape does not follow from another one's, see `bwla_kernels.format.tensors`;
            None in a checkpoint that was written by an older version.
        config: what the rest of config.json must say for these tensors to fit, see `model.config_values`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["bwla"] = "bwla"
    format_version: Literal[1, 2] = 1
    weights: QuantizationArgs = Field(default_factory=one_bit_weights)
    input_activations: QuantizationArgs = Field(default_factory=lambda: activation_args(6))
    clip: float | dict[str, float] = 1.0
    planes: int | dict[str, int] = 1
    rank: int | dict[str, int] = 0
    rotation: dict[str, tuple[int, int, int]] = Field(default_factory=dict)
    group_size: dict[str, int] = Field(default_factory=dict)
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    linears: list[LayerLinears] | None = None
    lm_head: QuantizationArgs | None = None
    embedding: QuantizationArgs | None = None
    experts: ExpertsFormat | None = None
    tensors: dict[str, str] | None = None
    config: dict[str, Any] | None = None
    provenance: Provenance = Provenance()

    @field_validator("weights")
    @classmethod
    def _weights_are_signs(cls, args: QuantizationArgs) -> QuantizationArgs:
        if (args.num_bits, args.type, args.symmetric, args.strategy) != (1, "int", True, "channel"):
            raise ValueError("weights must be 1-bit, symmetric, one scale per row (strategy 'channel')")
        return args

    @field_validator("input_activations")
    @classmethod
    def _activations_are_dynamic(cls, args: QuantizationArgs) -> QuantizationArgs:
        if (args.type, args.symmetric, args.strategy, args.dynamic) != ("int", True, "token", True):
            raise ValueError("input_activations must be dynamic, symmetric integers (strategy 'token')")
        return args

    @field_validator("lm_head", "embedding")
    @classmethod
    def _vocabulary_is_int8(
        cls, args: QuantizationArgs | None, info: ValidationInfo
    ) -> QuantizationArgs | None:
        if args and (args.num_bits, args.type, args.symmetric, args.strategy) != (8, "int", True, "channel"):
            raise ValueError(
                f"{info.field_name} must be 8-bit, symmetric, one scale per row (strategy 'channel')"
            )
        return args

    @field_validator("rotation")
    @classmethod
    def _rotations_are_sizes(cls, table: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        for suffix, sizes in table.items():
            if min(sizes) < 1:
                raise ValueError(f"rotation sizes must be positive, found {suffix}: {list(sizes)}")
        return table

    @field_validator("group_size")
    @classmethod
    def _groups_are_words(cls, table: dict[str, int]) -> dict[str, int]:
        for suffix, size in table.items():
            if size < PACK_FACTOR or size % PACK_FACTOR:
                raise ValueError(f"a group_size must be a multiple of {PACK_FACTOR}, found {suffix}: {size}")
        return table

    @field_validator(*SETTINGS_BY_SUFFIX)
    @classmethod
    def _stars_are_experts(cls, setting: Any) -> Any:
        for key in setting if isinstance(setting, dict) else ():
            if not is_setting(key):
                raise ValueError(
                    f"'*' stands for the number of an expert, as in experts.*.down_proj, found {key!r}"
                )
        return setting

    @field_validator("tensors")
    @classmethod
    def _tensors_can_be_parsed(cls, tensors: dict[str, str] | None) -> dict[str, str] | None:
        parse_tensors(tensors or {})
        return tensors

    @model_validator(mode="after")
    def _additions_need_version_2(self) -> "BWLAFormat":
        counts = self.planes.values() if isinstance(self.planes, dict) else [self.planes]
        if not all(1 <= count <= MAX_PLANES for count in counts):
            raise ValueError(f"planes must be 1..{MAX_PLANES}, found {self.planes}")
        if self.format_version == 1 and self.planes != 1:
            raise ValueError(f"planes other than 1 need format_version 2, found {self.planes}")
        if self.format_version == 1 and self.embedding is not None:
            raise ValueError("an 8-bit embedding needs format_version 2, found 1")
        if self.format_version == 1 and self.experts is not None:
            raise ValueError("one-bit experts need format_version 2, found 1")
        if self.format_version == 1 and self.group_size:
            raise ValueError("scales for groups of columns need format_version 2, found 1")
        return self

    @property
    def bits(self) -> int:
        """Activation bits, 2..8 or 16."""
        return int(self.input_activations.num_bits)

    def is_ignored(self, name: str) -> bool:
        """Return whether `ignore` excludes the module called `name`."""
        return is_ignored(name, self.ignore)

    def is_quantized(self, name: str) -> bool:
        """Return whether the linear called `name` is stored in one bit."""
        return not self.is_ignored(name) and self._sizes(name) is not None

    def _sizes(self, name: str) -> tuple[int, int, int] | int | None:
        """Return the rotation or the group size of a linear.

        Raises:
            FormatError: it has both.
        """
        rotation, group_size = longest_suffix(self.rotation, name), longest_suffix(self.group_size, name)
        if rotation is not None and group_size is not None:
            raise FormatError(
                f"{name}: expected either a rotation or a group_size, found {list(rotation)} and {group_size}; "
                "restore the config.json that bwla-convert wrote"
            )
        return group_size if rotation is None else rotation

    def layer_spec(
        self, name: str, out_features: int, in_features: int, bias: bool = False
    ) -> LayerSpec | None:
        """Return the spec of the linear called `name`, or None if it is not quantized.

        Raises:
            FormatError: the config and the layer's sizes contradict each other; the message names the layer.
        """
        found = None if self.is_ignored(name) else self._sizes(name)
        if found is None:
            return None
        grouped = isinstance(found, int)
        sizes = (in_features // found, 1, found) if isinstance(found, int) else found
        rank = self.rank if isinstance(self.rank, int) else longest_suffix(self.rank, name) or 0
        planes = self.planes if isinstance(self.planes, int) else longest_suffix(self.planes, name) or 1
        clip = self.clip if isinstance(self.clip, float) else longest_suffix(self.clip, name) or 1.0
        try:
            return LayerSpec(
                out_features,
                in_features,
                *sizes,
                rank=rank,
                bits=self.bits,
                clip=clip,
                bias=bias,
                planes=planes,
                grouped=grouped,
            )
        except FormatError as error:
            raise FormatError(
                f"{name}: {error}; the quantization_config does not belong to this model: "
                "convert or download the model again"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Return the dictionary for config.json, without the defaults of the argument models."""
        data = self.model_dump(mode="json", exclude={"lm_head", "embedding"})
        if self.format_version == 1:
            del data["planes"]
        for field in ("experts", "linears", "tensors", "config"):
            if data[field] is None:
                del data[field]
        if not self.group_size:
            del data["group_size"]
        if not self.provenance.allocation:
            del data["provenance"]["allocation"]
        for field in ("weights", "input_activations", "lm_head", "embedding"):
            arguments = getattr(self, field)
            if arguments is not None:
                data[field] = arguments.model_dump(mode="json", include=_ARGUMENTS)
        return data


def parse_config(config: Mapping[str, Any], source: str = "quantization_config") -> BWLAFormat:
    """Read a `quantization_config`; `source` names its file, for the message.

    Raises:
        FormatError: another quant_method, an unknown format_version or key, or a value out of range.
    """
    if not isinstance(config, Mapping):
        raise FormatError(
            f"{source}: expected an object, found {config!r:.40}: restore the config.json that bwla-convert wrote"
        )
    version = config.get("format_version")
    if config.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{source}: expected quant_method '{QUANT_METHOD}', found {config.get('quant_method')!r}: "
            "this is not a BWLA checkpoint, make one with bwla-convert"
        )
    if version not in FORMAT_VERSIONS or isinstance(version, bool):
        raise FormatError(
            f"{source}: expected format_version {' or '.join(map(str, FORMAT_VERSIONS))}, found {version!r}: "
            "install the bwla release that wrote it, or convert the model again"
        )
    try:
        return BWLAFormat.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        raise FormatError(
            f"{source}: {place}: {first['msg']} (found {first.get('input')!r:.80}): "
            "restore the config.json that bwla-convert wrote"
        ) from None
