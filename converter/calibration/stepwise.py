"""Run calibration samples through a decoder layer from one input group to the next, computing nothing twice.

Where the inputs of a group's linear are the last thing that its submodule computes (`o_proj` of the attention,
`down_proj` of the MLP), they are kept. Everything after them is computed from the kept inputs, by the linear that is in
the layer at that time: the original one, or the quantized one that has replaced it.
"""

from collections.abc import Iterable, Iterator

import torch
from bwla_converter.calibration.activations import Activations, ActivationStore
from bwla_converter.calibration.layer_runner import DecoderLayer
from bwla_converter.common.precision import has_fast_bfloat16
from torch import Tensor

SAMPLES_PER_BATCH = 4
"""Calibration samples that run through a decoder layer at a time."""

PROBE_TOKENS = 8
"""Tokens of the run that finds out which linears end their submodule."""


def kept_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which inputs of linears are kept: bfloat16 where products round their operands anyway."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


class StepwiseLayer:
    """A decoder layer and the hidden states that run through it.

    Args:
        layer: the decoder layer; its linears may be replaced between two steps.
        hidden: the inputs of the layer.
        store: where inputs of linears are kept.
        names: full names of the first linear of each input group, in execution order.
    """

    def __init__(
        self, layer: DecoderLayer, hidden: Activations, store: ActivationStore, names: Iterable[str]
    ) -> None:
        self.layer, self.hidden, self._store = layer, hidden, store
        probe = next(hidden.split(1), None)
        self._tails = {} if probe is None else layer.find_tails(names, probe[:, :PROBE_TOKENS])
        self._kept: dict[str, Activations] = {}

    def inputs_of(self, name: str, stream: str | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield, for each batch of samples, the inputs of a linear [S, T, K] and of the module at path `stream`.

        The linears before it must be in their final state.

        Args:
            name: full name of the linear.
            stream: path in the layer of a module whose inputs are wanted too; None for none.
        """
        if name not in self._tails:
            yield from (self.layer.inputs_and_stream(name, stream, hidden) for hidden in self._batches())
            return
        with self._store.writer(len(self.hidden), kept_dtype(self._store.device)) as writer:
            for hidden in self._batches():
                inputs, stream_inputs = self.layer.inputs_and_stream(name, stream, hidden)
                writer.append(inputs)
                yield inputs, stream_inputs
        self._kept[name] = writer.activations

    def outputs(self) -> Activations:
        """Return the outputs of the layer, and release the kept inputs. The linears must be in their final state."""
        outputs = self._store.keep(self.hidden.shape, map(self.layer.run, self._batches()))
        self._kept = {}
        return outputs

    def _batches(self) -> Iterator[Tensor]:
        """Yield the hidden states of each batch, while the layer goes on from the inputs that are kept for it."""
        names = list(self._kept)
        parts = zip(*(self._kept[name].split(SAMPLES_PER_BATCH) for name in names), strict=True)
        for hidden in self.hidden.split(SAMPLES_PER_BATCH):
            inputs = next(parts) if names else ()
            known = {
                self._tails[name]: (self.layer.linear(name), part.to(hidden.dtype))
                for name, part in zip(names, inputs, strict=True)
            }
            with self.layer.resumed(known):
                yield hidden
