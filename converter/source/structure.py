"""The structure of a model: its decoder layers, which linears in them read the same input, and what is around them."""

from collections.abc import Iterator
from dataclasses import dataclass

from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that read the same input and share one input transform.

    Attributes:
        members: module paths inside the decoder layer.
        stream: module path, inside the decoder layer, of the norm that reads the residual stream just before this
            group's output is added to it; None if the output is not added as it is.
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
        layers: module path of the list of decoder layers.
        blocks: input groups of each decoder layer, in execution order.
        embedding: module path of the embedding.
        head: module path of the language-model head.
        final_norm: module path of the norm after the last decoder layer.
        own_head: whether vLLM's class can have a head apart from its embedding; if not, a tied head stays
            unquantized.
        int8_embedding: whether vLLM's class lets the plugin choose how the embedding is stored; if not, it stays
            unquantized.
        scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size).
    """

    architecture: str
    layers: str
    blocks: tuple[tuple[InputGroup, ...], ...]
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    own_head: bool = True
    int8_embedding: bool = True
    scaled_embedding: bool = False

    def layer_name(self, index: int) -> str:
        """Return the module path of decoder layer `index`."""
        return f"{self.layers}.{index}"

    def linears(self) -> Iterator[tuple[InputGroup, str]]:
        """Yield every linear that can be quantized, by its full name, with its group, in execution order."""
        for index, groups in enumerate(self.blocks):
            for group in groups:
                for member in group.members:
                    yield group, f"{self.layer_name(index)}.{member}"

    def group_of(self, name: str) -> InputGroup:
        """Return the input group of the linear whose full name is `name`."""
        return next(group for group, linear in self.linears() if linear == name)
