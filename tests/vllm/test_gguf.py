"""Models from GGUF files are served: tensors as from safetensors of the same values, and vLLM's answer on these."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels.format.files import read_folder, read_tensors
from gguf_architectures import GGUF_CASES, write_pair
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.coverage.build import write_words
from benchmarks.coverage.cases import CASES
from benchmarks.coverage.rows import compare
from benchmarks.coverage.steps import Step, run_step

KIND = gguf.GGMLQuantizationType.Q8_0
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 32, the narrowest that vLLM computes on the CPU."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    entries = read_folder(folder)
    return read_tensors(folder, entries, list(entries))


def as_in_the_file(tensor: Tensor) -> Tensor:
    """Return a tensor after it was quantized for a GGUF file and read back."""
    if tensor.dim() == 1 or tensor.shape[-1] % 32:
        return tensor.bfloat16()
    blocks = gguf.quants.quantize(tensor.float().numpy(), KIND)
    return torch.from_numpy(gguf.quants.dequantize(blocks, KIND)).view_as(tensor).bfloat16()


@pytest.mark.parametrize(("name", "changes"), [("lfm2", HEADS), ("starcoder2", HEADS), ("gemma4", {})])
def test_a_model_from_a_gguf_file_is_served(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "cache"))
    written = GGUF_CASES[name]
    monkeypatch.setitem(GGUF_CASES, name, replace(written, settings={**written.settings, **changes}))
    original, file = write_pair(tmp_path, name, "Q8_0")
    values = {key: as_in_the_file(tensor) for key, tensor in tensors_of(original).items()}
    save_file(values, original / "model.safetensors", {"format": "pt"})
    exact: dict[str, Any] = {"bits": 16, "head_bits": 16, "embedding_bits": 16, "text_samples": 0}
    for model, form in ((file, "from-gguf"), (original, "from-safetensors")):
        convert(Options(str(model), tmp_path / form, recipe="data-free", device="cpu", report=False, **exact))
    found, expected = tensors_of(tmp_path / "from-gguf"), tensors_of(tmp_path / "from-safetensors")
    assert found.keys() == expected.keys()
    assert not [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]

    case = CASES[written.case]
    write_dequantized(tmp_path / "from-safetensors", tmp_path / "dequantized", case.dtype)
    for form in ("from-gguf", "dequantized"):
        write_words(tmp_path / form)  # these files have no tokenizer
    reference, served = (
        run_step(Step("serve", form), case, tmp_path) for form in ("dequantized", "from-gguf")
    )
    difference = compare(reference, served)
    assert difference["same_tokens"]
    assert difference["largest_difference"] < 1e-3
