"""A backend wrapper that compares another backend's experts with the reference implementation (for `observe.py`)."""

from collections.abc import Mapping

from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.reference import binary_experts
from torch import Tensor

from bwla_vllm.checked import Checked, largest_error, sample_rows, stored_copy, stored_name


class CheckedExperts(Checked):
    """Wrap an `ops.ExpertsBackend` and compare its output with the reference."""

    def prepare(
        self, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], spec: ExpertsSpec
    ) -> dict[str, Tensor]:
        """Return the tensors of the wrapped backend, and the stored ones under prefixed names."""
        prepared: dict[str, Tensor] = self.backend.prepare(gate_up, down, spec)
        for which, tensors in (("w13", gate_up), ("w2", down)):
            prepared |= {stored_name(f"{which}_{name}"): tensor for name, tensor in tensors.items()}
        return prepared

    def apply(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        tensors: Mapping[str, Tensor],
        spec: ExpertsSpec,
    ) -> Tensor:
        """Compute x [M, H] -> [M, H] with the wrapped backend, and check some rows if the recorder wants them."""
        own = {name: tensor for name, tensor in tensors.items() if not stored_copy(name)}
        y: Tensor = self.backend.apply(x, topk_weights, topk_ids, own, spec)
        if len(x) and self.recorder.wants(self.layer):
            rows = sample_rows(x)
            gate_up, down = (
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                for prefix in (stored_name("w13_"), stored_name("w2_"))
            )
            expected = binary_experts(x[rows], topk_weights[rows], topk_ids[rows], gate_up, down, spec)
            self.recorder.report(self.layer, len(rows), largest_error(y[rows], expected))
        return y
