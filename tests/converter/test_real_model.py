"""A pretrained model from a GGUF file: read as transformers reads it, and converted."""

from pathlib import Path

import bwla_converter.hf  # noqa: F401
import pytest
import torch
from bwla_converter.checkpoint.layout import verify
from bwla_converter.options import Calibration, Options, RecipeName
from bwla_converter.pipeline import convert
from bwla_converter.source.meta_model import build_meta_model
from bwla_kernels.format.files import read_folder, read_json, read_tensors
from paths import ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from benchmarks.common.real_models import get_gguf, real_model
from benchmarks.conversion.speed_models import write_first_layers

NAME = "smollm2-135m"

pytestmark = [pytest.mark.slow, pytest.mark.real_model(NAME)]


def test_transformers_reads_the_same_bits() -> None:
    folder = real_model(NAME)
    model = build_meta_model(folder, read_json(folder / "config.json"))
    file = str(get_gguf(NAME))
    expected = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    entries = read_folder(folder)
    assert entries.keys() == expected.keys()
    for name, tensor in read_tensors(folder, entries, list(entries)).items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_it_knows_the_capital_of_france() -> None:
    folder = real_model(NAME)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    text = tokenizer.decode(answer[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_its_first_layers_are_converted(tmp_path: Path) -> None:
    folder = write_first_layers(real_model(NAME), 2, tmp_path / "model")
    summary = convert(Options(str(folder), tmp_path / "out", report=False, recipe="data-free"))
    verify(tmp_path / "out")
    assert len(summary.linears) == 14
    assert max(linear.error for linear in summary.linears) < 0.8
    assert summary.bits_per_weight < 1.16


def residual_stream(folder: Path, ids: Tensor) -> Tensor:
    """Return the residual stream after the last decoder layer [S, T, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    streams: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    return streams[0]


@pytest.fixture(scope="module")
def first_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model's first four decoder layers."""
    return write_first_layers(real_model(NAME), 4, tmp_path_factory.mktemp("real") / "model")


@pytest.mark.parametrize(("recipe", "keeps"), [("paper", True), ("data-free", False)])
def test_calibration_keeps_the_direction_of_the_residual_stream(
    first_layers: Path, tmp_path: Path, recipe: RecipeName, keeps: bool
) -> None:
    """Measured mean cosine after four layers: PAPER_COS with `paper`, FREE_COS with `data-free`."""
    text = Calibration(str(ROOT / "examples" / "text" / "calibration.txt"), 16, 256)
    calibration = text if recipe == "paper" else None
    out = tmp_path / "out"
    convert(Options(str(first_layers), out, recipe=recipe, calibration=calibration, report=False))
    held_out = (ROOT / "examples" / "text" / "heldout.txt").read_text(encoding="utf-8")[:8000]
    tokens = AutoTokenizer.from_pretrained(first_layers)(held_out, return_tensors="pt").input_ids
    ids = tokens[:, :1024].view(4, 256)
    streams = [residual_stream(folder, ids) for folder in (first_layers, out)]
    cosine = float(torch.cosine_similarity(*streams, dim=-1).mean())
    print(recipe, cosine)
    assert (cosine > 0.8) == keeps
