"""Samples on their way through the decoder layers: hidden states, token ids, and what layers leave for later ones."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bwla_converter.calibration.activations import Activations, ActivationStore, StoredStates
from bwla_converter.calibration.layer_runner import Batch, DecoderLayer, LayerRunner
from torch import Tensor

StoredShared = Mapping[Any, tuple[Activations, ...]]
"""As `layer_runner.Shared`, of all samples."""


@dataclass(frozen=True)
class Samples:
    """All samples before a decoder layer.

    Attributes:
        hidden: hidden states [S, T, hidden], see `Batch`.
        ids: token ids [S, T].
        shared: what earlier layers left for later ones.
    """

    hidden: Activations
    ids: Tensor
    shared: StoredShared = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.hidden)

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return the samples of the given indices [n]."""
        shared = {key: tuple(part[indices] for part in parts) for key, parts in self.shared.items()}
        return Batch(self.hidden[indices], self.ids[indices], shared)

    def split(self, count: int) -> Iterator[Batch]:
        """Yield consecutive batches of `count` samples; the last one may be smaller."""
        shared = [zip(*(part.split(count) for part in parts), strict=True) for parts in self.shared.values()]
        for number, hidden in enumerate(self.hidden.split(count)):
            states = (next(parts) for parts in shared)
            ids = self.ids[number * count :][:count]
            yield Batch(hidden, ids, dict(zip(self.shared, states, strict=True)))

    def run(self, layer: DecoderLayer, store: ActivationStore, batches: Iterable[Batch] | int) -> "Samples":
        """Return the samples after a decoder layer.

        Args:
            layer: the layer.
            store: where the results are kept.
            batches: all samples in order, or how many to run at a time.
        """
        left: dict[Any, list[tuple[Tensor, ...]]] = {}

        def outputs() -> Iterator[Tensor]:
            for batch in self.split(batches) if isinstance(batches, int) else batches:
                hidden, states = layer.run_sharing(batch)
                for key, parts in states.items():
                    left.setdefault(key, []).append(parts)
                yield hidden

        hidden = store.keep(self.hidden.shape, outputs())
        new = {
            key: tuple(_keep(store, len(self), parts) for parts in zip(*states, strict=True))
            for key, states in left.items()
        }
        return Samples(hidden, self.ids, {**self.shared, **new})

    def stored(self, name: str) -> dict[str, Tensor | StoredStates]:
        """Return what to store for `take`, by names that start with `name`."""
        shared = {
            f"{name}.{key}.{number}": part.stored()
            for key, parts in self.shared.items()
            for number, part in enumerate(parts)
        }
        return {name: self.hidden.stored(), **shared}

    @classmethod
    def embedded(cls, runner: LayerRunner, store: ActivationStore, ids: Tensor, count: int) -> "Samples":
        """Return the samples before layer 0 for token ids [S, T], of which `count` are looked up at a time."""
        with store.writer(len(ids)) as writer:
            for part in ids.split(count):
                writer.append(runner.embed(part))
        runner.outer.release()
        return cls(writer.activations, ids)

    @classmethod
    def take(
        cls, state: Mapping[str, Tensor | StoredStates], name: str, store: ActivationStore, ids: Tensor
    ) -> "Samples":
        """Return the samples that an earlier session stored by `stored`."""
        shared: dict[Any, tuple[Activations, ...]] = {}
        for full_name in sorted(state):  # safetensors sorts the names
            side, *key = full_name.split(".")
            if side == name and key:
                shared[_key(key[0])] = (*shared.get(_key(key[0]), ()), store.take(state[full_name]))
        return cls(store.take(state.get(name)), ids, shared)


def _key(text: str) -> int | str:
    """Return a key of the shared states, the number of a layer or the name of its kind, from its text."""
    return int(text) if text.isdigit() else text


def _keep(store: ActivationStore, count: int, parts: Iterable[Tensor]) -> Activations:
    """Store the states of all samples, given in consecutive parts."""
    with store.writer(count) as writer:
        for part in parts:
            writer.append(part)
    return writer.activations
