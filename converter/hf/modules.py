"""Quantized linears, 8-bit head and embedding as torch modules, for models of transformers and the converter itself.

transformers uses them through `quantizer`, which `import bwla_converter.hf` registers.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from bwla_converter.hf.quantizer import BACKEND_VARIABLE
from bwla_kernels import ops, reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec, TensorSpec
from bwla_kernels.format.experts import linear_specs
from bwla_kernels.format.head import HeadSpec, head_tensor_specs
from bwla_kernels.format.layer import FLOAT_DTYPES, loading_dtype
from bwla_kernels.head import dequantize_rows, head_reference
from torch import Tensor, nn

__all__ = [
    "BACKEND_VARIABLE",
    "REFERENCE",
    "BWLAEmbedding",
    "BWLAHead",
    "BWLALinear",
    "BWLATiedHead",
]

REFERENCE = "reference"
"""Name of the reference implementation where a backend is chosen by name."""


class _Stored(nn.Module):
    """A module whose buffers are the tensors of the format, so that it is saved back unchanged.

    They are no parameters, because transformers takes the dtype of a model's first parameter for that of the model,
    and because they are not trained: no optimizer finds them. The tensors that the backend prepares from them are
    cached, and prepared again after the module has moved to another device.

    Casts such as `model.to(torch.float16)` and `half()` change the dtype of the module's inputs and outputs, as
    `from_pretrained(dtype=...)` does, but not the stored tensors: their dtypes belong to the format.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        nn.Module.__init__(self)  # not that of a second base class, which would allocate a weight
        for key, spec in specs.items():
            dtype = torch.get_default_dtype() if spec.dtypes == FLOAT_DTYPES else loading_dtype(spec)
            empty = torch.empty(spec.shape, dtype=dtype, device="meta")
            self.register_buffer(key, empty)
        self._casts_bias = "bias" in specs and len(specs["bias"].dtypes) > 1
        self._prepared: tuple[torch.device, Any, dict[str, Tensor]] | None = None

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the format."""
        return dict(self.named_buffers())

    def prepared(
        self, spec: Any, device: torch.device, select: Callable[[], Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return the backend that `select` chooses and the tensors that it prepares from the stored ones."""
        if self._prepared is None or self._prepared[0] != device:
            self._prepare(spec, device, select)
        assert self._prepared is not None
        return self._prepared[1:]

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="prepare the backend's tensors: run the model once before torch.compile"
    )
    def _prepare(self, spec: Any, device: torch.device, select: Callable[[], Any]) -> None:
        backend = select()
        # Tensors that are created in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self._prepared = (device, backend, backend.prepare(self.stored(), spec))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Stored":
        """Move the stored tensors as `fn` does, without its cast; torch calls this for `to`, `half`, `cuda` and others.

        Raises:
            BackendError: a cast to a dtype in which no backend computes, such as float64.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            if moved.dtype not in FLOAT_DTYPES:
                raise BackendError(
                    f"{type(self).__name__}: expected a cast to bfloat16, float16 or float32, found {moved.dtype}"
                )
            return tensor.to(moved.device)

        # It has the dtype of the model, not one of the format; but for those of experts.
        bias = self._buffers.get("bias") if self._casts_bias else None
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if bias is not None:
            self._buffers["bias"] = fn(bias)
        return self


class _LinearLike(_Stored, nn.Linear):
    """A linear without a weight, which other libraries recognize as a linear.

    PEFT wraps instances of `nn.Linear` (peft/tuners/lora/layer.py, `dispatch_default`), reads `in_features`,
    `out_features` and `weight`, which is None here, and places an adapter on the device of `qweight`.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], out_features: int, in_features: int) -> None:
        super().__init__(specs)
        self.out_features, self.in_features = out_features, in_features
        self.register_parameter("weight", None)
        if "bias" not in specs:
            self.register_parameter("bias", None)

    @property
    def qweight(self) -> Tensor:
        """The largest stored tensor, integers."""
        return next(tensor for tensor in self.stored().values() if not tensor.is_floating_point())

    def reset_parameters(self) -> None:
        """Do nothing: the tensors are loaded from a checkpoint."""


class BWLALinear(_LinearLike):
    """A quantized linear, computed by the best backend for its device.

    Args:
        spec: sizes and quantization parameters.
        name: module path, for error messages.
        backend: name of a backend, "reference" for the reference implementation, None for the best backend.
    """

    def __init__(self, spec: LayerSpec, name: str, backend: str | None = None) -> None:
        super().__init__(linear_specs(name, spec), spec.out_features, spec.in_features)
        self.spec, self.name, self.backend = spec, name, backend

    @classmethod
    def from_stored(
        cls, name: str, spec: LayerSpec, tensors: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> "BWLALinear":
        """Build a linear from stored tensors, with a bias if `bias` [N] is given, whatever `spec` says."""
        parameters = {key: tensor for key, tensor in tensors.items() if key != "bias"}
        if bias is not None:
            parameters["bias"] = bias
        linear = cls(replace(spec, bias=bias is not None), name)
        for key, tensor in parameters.items():
            linear.register_buffer(key, tensor.detach())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., K] -> [..., N] in the dtype of x.

        The gradient with respect to x, for adapters and attribution, is straight-through: that of the dequantized
        weight, since activations that are rounded to a few bits have no useful one (`bwla_kernels.straight_through`).
        The stored tensors get none.
        """
        if self.backend == REFERENCE:
            return reference.linear(x, self.stored(), self.spec)
        backend, tensors = self.prepared(
            self.spec, x.device, lambda: ops.select_backend(self.spec, x.device, self.backend)[0]
        )
        if self.spec.bias:
            tensors = {**tensors, "bias": self.bias}  # which may have been cast since
        y: Tensor = backend.apply(x, tensors, self.spec)
        return y

    def extra_repr(self) -> str:
        return str(self.spec)


class BWLAHead(_LinearLike):
    """The 8-bit language-model head, computed by the best backend for its device.

    Args:
        spec: sizes.
        backend: name of a backend, "reference" for the reference implementation, None for the best backend.
    """

    def __init__(self, spec: HeadSpec, backend: str | None = None) -> None:
        super().__init__(head_tensor_specs(spec), spec.out_features, spec.in_features)
        self.spec, self.backend = spec, backend

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x; the gradient is as a linear's."""
        if self.backend == REFERENCE:
            return head_reference(x, **self.stored())
        backend, tensors = self.prepared(
            self.spec, x.device, lambda: ops.select_head_backend(self.spec, x.device, self.backend)[0]
        )
        y: Tensor = backend.apply(x, tensors, self.spec)
        return y

    def extra_repr(self) -> str:
        return str(self.spec)


class BWLAEmbedding(_Stored):
    """An 8-bit embedding.

    Args:
        spec: sizes.
        dtype: dtype of the looked-up rows.
        factor: number that the rows are multiplied by, in `dtype`; Gemma's sqrt(hidden_size).
    """

    weight_int8: Tensor

    def __init__(self, spec: HeadSpec, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__(head_tensor_specs(spec))
        self.spec, self.dtype, self.factor = spec, dtype, factor
        self.num_embeddings, self.embedding_dim = spec.out_features, spec.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Stored:
        """Cast the looked-up rows as `fn` casts a tensor of their dtype."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device=self.weight_int8.device)).dtype
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Look up token ids [...]: [..., K]."""
        rows = dequantize_rows(**self.stored(), ids=ids, dtype=self.dtype)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor).to(rows.dtype)

    def extra_repr(self) -> str:
        return str(self.spec)


class BWLATiedHead(BWLAHead):
    """A head that computes with the tensors of the 8-bit embedding to which it is tied, and stores none itself.

    Args:
        embedding: the embedding.
        backend: as in `BWLAHead`.
    """

    def __init__(self, embedding: BWLAEmbedding, backend: str | None = None) -> None:
        super().__init__(embedding.spec, backend)
        for key in head_tensor_specs(embedding.spec):
            delattr(self, key)
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors of the embedding."""
        return self._embedding[0].stored()
