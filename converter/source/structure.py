"""The structure of a model: its decoder layers, which linears in them read the same input, and what is around them.

All names are those of the stored tensors, which the output keeps, unless an attribute says otherwise. transformers may
call the same modules differently; `Structure.module_path` translates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bwla_converter.source.observe.experts import Experts
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS
from bwla_kernels.format.files import Entry
from bwla_kernels.format.schema import is_ignored

NATS, COSINE_DISTANCE = "nats per token", "cosine distance per token"
"""Units of losses, see `Structure.loss_unit`."""

MAX_NAMED = 4
"""How many modules that stay in 16 bits a sentence names for each reason."""


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that read the same input and share one input transform.

    The down projections of a layer's experts share one too, although each reads the hidden values of its expert.

    Attributes:
        members: names inside the decoder layer.
        stream: path, in transformers' module of the decoder layer, of the module (normally a norm) that reads the
            residual stream just before this group's output is added to it; None if the output is not added as it is.
        input_sharded: whether tensor parallelism shards the members along their input.
    """

    members: tuple[str, ...]
    stream: str | None = None
    input_sharded: bool = False

    @property
    def preferred_rotation_groups(self) -> int:
        """Preferred number of rotation groups: 8 if each process must hold whole groups, else 1."""
        return SHARDED_ROTATION_GROUPS if self.input_sharded else 1


@dataclass(frozen=True)
class Structure:
    """The structure of one model.

    Attributes:
        architecture: its class in config.json's `architectures`.
        layers: name of the list of decoder layers.
        blocks: input groups of each decoder layer, in execution order; layers may differ.
        embedding: name of the embedding.
        head: name of the language-model head.
        has_head: whether there is a head that predicts the next token. Models of embeddings have none.
        final_norm: name of the norm that reads the output of the last decoder layer; empty if none does.
        own_head: whether vLLM's class can have a head apart from its embedding; if not, a tied head stays
            unquantized.
        int8_head: whether vLLM's class lets the plugin choose how the head is stored; if not, it stays unquantized.
        int8_embedding: whether vLLM's class lets the plugin choose how the embedding is stored; if not, it stays
            unquantized.
        kept: what stays in 16 bits by rule -> the reason. The keys are entries of `ignore`, see
            `bwla_kernels.format.schema.is_ignored`.
        module_layers: path of the list of decoder layers in transformers' model; empty if it is called `layers`.
        renamed_members: name inside a decoder layer -> path in transformers' module, of the linears that differ.
        renamed_modules: the same outside the decoder layers, for embedding, head and final norm, by their full names.
        experts: index of a decoder layer -> its experts, whose linears are members of its groups.
    """

    architecture: str
    layers: str
    blocks: tuple[tuple[InputGroup, ...], ...]
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    has_head: bool = True
    final_norm: str = "model.norm"
    own_head: bool = True
    int8_head: bool = True
    int8_embedding: bool = True
    kept: Mapping[str, str] = field(default_factory=dict)
    module_layers: str = ""
    renamed_members: Mapping[str, str] = field(default_factory=dict)
    renamed_modules: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[int, Experts] = field(default_factory=dict)

    def layer_name(self, index: int) -> str:
        """Return the name of decoder layer `index`."""
        return f"{self.layers}.{index}"

    def layer_path(self, index: int) -> str:
        """Return the path of decoder layer `index` in transformers' model."""
        return f"{self.module_layers or self.layers}.{index}"

    def member_path(self, name: str) -> str:
        """Return the path, in transformers' module of its decoder layer, of the linear whose full name is `name`."""
        member = name.removeprefix(f"{self.layers}.").partition(".")[2]
        return self.renamed_members.get(member, member)

    def module_path(self, name: str) -> str:
        """Return the path in transformers' model of a linear, the embedding, the head or the final norm by its name."""
        index = self._layer_index(name)
        if index is None:
            return self.renamed_modules.get(name, name)
        return f"{self.layer_path(index)}.{self.member_path(name)}"

    def stored_name(self, path: str) -> str:
        """Return the name of the embedding, the head or the final norm by its path in transformers' model."""
        names = {module: name for name, module in self.renamed_modules.items()}
        return names.get(path, path)

    @property
    def loss_unit(self) -> str:
        """The unit of the losses that are predicted and measured.

        With a head, the loss is the increase of the negative log-likelihood. Without one it is one minus the cosine
        between the final hidden states of a token and the original's, because embeddings are compared by cosine.
        """
        return NATS if self.has_head else COSINE_DISTANCE

    @property
    def kept_note(self) -> str | None:
        """A sentence for the user about what stays in 16 bits; None if nothing does."""
        if not self.kept:
            return None
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            by_reason.setdefault(reason, []).append(name)
        return "in 16 bits: " + "; ".join(
            f"{', '.join(names[:MAX_NAMED])}{' and others' if len(names) > MAX_NAMED else ''} ({reason})"
            for reason, names in by_reason.items()
        )

    def linears(self) -> Iterator[tuple[InputGroup, str]]:
        """Yield every linear that can be quantized, by its full name, with its group, in execution order."""
        for index, groups in enumerate(self.blocks):
            for group in groups:
                for member in group.members:
                    yield group, f"{self.layer_name(index)}.{member}"

    def with_divided_experts(self, entries: Mapping[str, Entry], ignore: Sequence[str]) -> dict[str, Entry]:
        """Return the stored tensors with one for each linear of the experts that are stored in stacked tensors.

        Args:
            entries: all stored tensors.
            ignore: what is left as it is.
        """
        divided = dict(entries)
        for index, experts in self.experts.items():
            prefix = f"{self.layer_name(index)}."
            if is_ignored(f"{prefix}{experts.down[0]}", ignore):
                continue
            for stacked, names in experts.divisions():
                joined = divided.pop(f"{prefix}{stacked}", None)
                if joined is not None:  # a missing one is reported later
                    divided.update({f"{prefix}{name}": experts.entry(name, joined) for name in names})
        return divided

    def group_of(self, name: str) -> InputGroup:
        """Return the input group of the linear whose full name is `name`."""
        index = self._layer_index(name)
        assert index is not None
        member = name.removeprefix(f"{self.layer_name(index)}.")
        return next(group for group in self.blocks[index] if member in group.members)

    def layer_of(self, name: str) -> int | None:
        """Return the index of the decoder layer that holds the tensor or module `name`; None outside the layers."""
        index = self._layer_index(name)
        return index if index is not None and index < len(self.blocks) else None

    def _layer_index(self, name: str) -> int | None:
        if not name.startswith(f"{self.layers}."):
            return None
        index = name.removeprefix(f"{self.layers}.").partition(".")[0]
        return int(index) if index.isdecimal() else None
