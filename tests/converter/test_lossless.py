"""Models of one bit and three values in every published form: recognized and stored exactly."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.describe import describe_conversion
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.planning.choose import choose_recipe
from bwla_converter.source.model import open_source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.experts import stored_names
from bwla_kernels.format.files import read_folder, read_tensors
from bwla_kernels.format.folder import check_folder
from bwla_kernels.reference import dequantize
from few_values import FILE, change_tensor, few_values, write_bitnet, write_mlx, write_unpacked
from gguf_models import write_gguf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def gguf(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return write_gguf(folder / f"{kind}.gguf", few_values(planes=1 if kind == "Q1_0" else 2), kind)

    return write


FORMS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "Q1_0": (gguf("Q1_0"), 1),
    "TQ1_0": (gguf("TQ1_0"), 2),
    "TQ2_0": (gguf("TQ2_0"), 2),
    "unpacked": (lambda folder: write_unpacked(folder / "m", few_values()), 1),
    "unpacked, tied": (lambda folder: write_unpacked(folder / "m", few_values(tie_word_embeddings=True)), 1),
    "MLX, 1 bit": (lambda folder: write_mlx(folder / "m", few_values(tie_word_embeddings=True), 1, 128), 1),
    "MLX, 2 bits": (lambda folder: write_mlx(folder / "m", few_values(planes=2), 2, 128), 2),
    "BitNet": (lambda folder: write_bitnet(folder / "m", few_values("Llama", planes=2)), 2),
}
"""How a model is written, and the planes that it needs."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "cache"))


def options(model: Path, out: Path, **changes: object) -> Options:
    return replace(Options(str(model), out, device="cpu", threads=1, report=False, text_samples=0), **changes)  # type: ignore[arg-type]


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Return the dequantized weight of every quantized linear."""
    entries = read_folder(folder)
    weights = {}
    for name, spec in check_folder(folder, entries).items():
        names = stored_names(name, spec)
        stored = read_tensors(folder, entries, list(names.values()))
        weights[name] = dequantize({key: stored[source] for key, source in names.items()}, spec)
    return weights


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_stored_exactly(form: str, tmp_path: Path) -> None:
    write, planes = FORMS[form]
    model = write(tmp_path)
    summary = convert(options(model, tmp_path / "out"))
    assert summary.activation_bits == 8
    assert set(summary.planes) == {planes}
    assert max(linear.error for linear in summary.linears) == 0
    assert f"have {'two' if planes == 1 else 'three'} values in each group of" in summary.notes[-1]
    assert summary.notes[-1].endswith("the head is stored in planes too, the embedding unquantized")
    source, weights = open_source(str(model)), weights_of(tmp_path / "out")
    linears = [name for index in range(source.num_layers) for name in source.linears_of_layer(index)]
    assert [*weights.keys() - {"lm_head"}]
    assert set(linears) == weights.keys() - {"lm_head"}
    for name in linears:
        assert torch.equal(weights[name], source.read([f"{name}.weight"])[f"{name}.weight"].float())
    head = source.output_weight
    assert torch.equal(weights["lm_head"], source.read([head])[head].float())
    outside = set(source.names_outside_layers()) - {"lm_head.weight"}
    stored = load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(stored[name], source.read([name])[name]) for name in outside)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["recipe"] == "lossless"
    assert "quantization" not in config


def test_transformers_computes_what_the_original_computes(tmp_path: Path) -> None:
    model = few_values(planes=2)
    convert(options(write_unpacked(tmp_path / "m", model), tmp_path / "out", bits=16))
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    ids = torch.arange(30).unsqueeze(0)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_dequantized_checkpoint_has_the_same_values(tmp_path: Path) -> None:
    model = few_values()
    convert(options(write_unpacked(tmp_path / "m", model), tmp_path / "out"))
    write_dequantized(tmp_path / "out", tmp_path / "dense", "float16")
    expected = load_file(tmp_path / "m" / FILE)
    found = load_file(tmp_path / "dense" / FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_options_for_other_weights_mean_that_the_model_is_quantized(tmp_path: Path) -> None:
    source = open_source(str(write_unpacked(tmp_path / "m", few_values())))
    chosen, weights = choose_recipe(options(tmp_path / "m", tmp_path / "out"), source)
    assert (chosen.recipe, chosen.calibration) == ("lossless", None)
    assert weights is not None
    assert weights.head is not None
    asked = {"planes": 2, "target_bits": 2.2, "rank": 0, "calibration": Calibration("text.txt")}
    for name, value in asked.items():
        given = options(tmp_path / "m", tmp_path / "out", **{name: value})
        assert choose_recipe(given, source)[0].recipe == "fast"
        with pytest.raises(BWLAError, match="recipe 'lossless' stores the weights as they are, found --"):
            choose_recipe(replace(given, recipe="lossless"), source)
    assert (
        choose_recipe(options(tmp_path / "m", tmp_path / "out", recipe="paper"), source)[0].recipe == "paper"
    )


def test_an_ordinary_model_is_not_lossless(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(str(make_model()))
    assert choose_recipe(options(source.folder, tmp_path / "out"), source)[0].recipe == "fast"
    with pytest.raises(
        BWLAError, match="expected linears of two or three values in each group .* for recipe lossless"
    ):
        choose_recipe(options(source.folder, tmp_path / "out", recipe="lossless"), source)


@pytest.mark.parametrize(
    ("changes", "head", "embedding"),
    [
        ({"head_bits": 8, "embedding_bits": 8}, "int8", "int8"),
        ({"ignore": ("lm_head",)}, "weight", "weight"),
        ({"head_bits": 16}, "weight", "weight"),
    ],
)
def test_head_and_embedding_as_asked(
    changes: dict[str, object], head: str, embedding: str, tmp_path: Path
) -> None:
    convert(options(write_unpacked(tmp_path / "m", few_values()), tmp_path / "out", **changes))
    names = load_file(tmp_path / "out" / FILE).keys()
    keys = {"int8": "weight_int8", "weight": "weight"}
    assert f"lm_head.{keys[head]}" in names
    assert f"model.embed_tokens.{keys[embedding]}" in names
    assert "lm_head.weight_packed" not in names


def test_a_tied_head_beside_an_8_bit_embedding(tmp_path: Path) -> None:
    """It stays in planes of its own if it has few values, and is the embedding otherwise."""
    few = write_unpacked(tmp_path / "few", few_values(tie_word_embeddings=True))
    many = write_unpacked(tmp_path / "many", few_values(tie_word_embeddings=True))
    embedding = load_file(many / FILE)["model.embed_tokens.weight"]
    change_tensor(many, "model.embed_tokens.weight", embedding + torch.arange(len(embedding[0])).half() / 64)
    for model, in_planes in ((few, True), (many, False)):
        convert(options(model, tmp_path / "out", embedding_bits=8, overwrite=True))
        names = load_file(tmp_path / "out" / FILE).keys()
        assert "model.embed_tokens.weight_int8" in names
        assert ("lm_head.weight_packed" in names) == in_planes
        assert not any(name.startswith("lm_head.") for name in names) or in_planes
    with pytest.raises(BWLAError, match="found --embedding-bits 8 and --lm-head-bits 16"):
        convert(options(few, tmp_path / "out", embedding_bits=8, head_bits=16, overwrite=True))


def test_a_layer_that_is_unlike_the_others_is_named(tmp_path: Path) -> None:
    """The first layer, the one in the middle and the last one are looked at before the conversion starts."""
    model, name = (
        write_unpacked(tmp_path / "m", few_values(num_hidden_layers=5)),
        "model.layers.3.mlp.up_proj.weight",
    )
    weight = load_file(model / FILE)[name]
    weight[7, 9] = 0.5
    change_tensor(model, name, weight)
    with pytest.raises(
        BWLAError, match=rf"{name}: expected two values, .*, 0.5 in row 7, columns 0 to 127: use --recipe"
    ):
        convert(options(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_plan_says_what_will_be_stored(tmp_path: Path) -> None:
    write_unpacked(tmp_path / "m", few_values())
    text = describe_conversion(options(tmp_path / "m", tmp_path / "out"))
    assert "1.125 bits per quantized weight, everything counted, 8-bit activations" in text
    assert "head lm_head: 1 binary plane\n" in text
    assert "recipe lossless" in text


def test_the_plan_of_recipe_lossless_needs_the_weights(tmp_path: Path) -> None:
    few_values().config.save_pretrained(tmp_path / "m")
    with pytest.raises(
        BWLAError, match="expected the model's weights, .*, found no safetensors file: download"
    ):
        describe_conversion(replace(options(tmp_path / "m", tmp_path / "out"), recipe="lossless"))
