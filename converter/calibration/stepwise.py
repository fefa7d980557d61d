"""Run calibration samples through a decoder layer from one input group to the next, computing nothing twice.

The inputs of output projections (`o_proj` of the attention, `down_proj` of the MLP) are kept. Later steps compute the
projection from the kept inputs, with the linear that is in the layer at that time: the original one, or the quantized
one that has replaced it.
"""

from collections.abc import Iterable, Iterator, Mapping

from bwla_converter.calibration.activations import Activations, ActivationStore
from bwla_converter.calibration.layer_runner import Batch, DecoderLayer, OutputProjection
from bwla_converter.calibration.samples import Samples
from bwla_kernels.precision import product_dtype
from torch import Tensor

SAMPLES_PER_BATCH = 4
"""Calibration samples that run through a decoder layer at a time."""

PROBE_TOKENS = 8
"""Tokens of the run that finds the output projections."""


def find_output_projections(
    layer: DecoderLayer, names: Iterable[str], samples: Samples
) -> Mapping[str, OutputProjection]:
    """Return the output projections among the linears `names`, found on a few tokens of the layer's inputs."""
    probe = next(samples.split(1), None)
    if probe is not None and probe.hidden.dim() == 3 and not probe.shared:
        probe = Batch(probe.hidden[:, :PROBE_TOKENS], probe.ids[:, :PROBE_TOKENS])
    return {} if probe is None else layer.output_projections(names, probe)


class StepwiseLayer:
    """A decoder layer and the samples that run through it.

    Args:
        layer: the decoder layer; its linears may be replaced between two steps.
        samples: the inputs of the layer.
        store: where inputs of linears are kept.
        projections: the output projections whose inputs are kept, see `find_output_projections`.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        samples: Samples,
        store: ActivationStore,
        projections: Mapping[str, OutputProjection],
    ) -> None:
        self.layer, self.samples, self._store, self._projections = layer, samples, store, projections
        self._kept: dict[str, Activations] = {}

    def inputs_of(self, name: str, stream: str | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield, for each batch of samples, the inputs of a linear [S, T, K] and of the module at path `stream`.

        The linears before it must be in their final state.

        Args:
            name: full name of the linear.
            stream: path in the layer of a module whose inputs are wanted too; None for none.
        """
        if name not in self._projections:
            yield from (self.layer.inputs_and_stream(name, stream, batch) for batch in self._batches())
            return
        with self._store.writer(len(self.samples), product_dtype(self._store.device)) as writer:
            for batch in self._batches():
                inputs, stream_inputs = self.layer.inputs_and_stream(name, stream, batch)
                writer.append(inputs)
                yield inputs, stream_inputs
        self._kept[name] = writer.activations

    def routing(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each batch of samples, `DecoderLayer.routing` of the experts that hold the linear `name`.

        The linears before the experts must be in their final state.
        """
        yield from (self.layer.routing(name, batch) for batch in self._batches())

    def outputs(self) -> Samples:
        """Return the samples after the layer, and release the kept inputs. The linears must be in their final state."""
        outputs = self.samples.run(self.layer, self._store, self._batches())
        self._kept = {}
        return outputs

    def _batches(self) -> Iterator[Batch]:
        """Yield each batch of samples, while the layer goes on from the inputs that are kept for it."""
        names = list(self._kept)
        parts = zip(*(self._kept[name].split(SAMPLES_PER_BATCH) for name in names), strict=True)
        for batch in self.samples.split(SAMPLES_PER_BATCH):
            inputs = next(parts) if names else ()
            known = {name: part.to(batch.hidden.dtype) for name, part in zip(names, inputs, strict=True)}
            with self.layer.resumed(known, self._projections):
                yield batch
