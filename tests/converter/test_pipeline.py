"""Conversions of tiny models: what is written, and that the output appears complete or not at all."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from bwla_converter.checkpoint import merge
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.checkpoint.layout import verify
from bwla_converter.options import Options
from bwla_converter.pipeline import convert, disk_bytes
from bwla_converter.quantize import data_free
from bwla_converter.source.model import Source
from bwla_kernels import reference
from bwla_kernels.errors import BWLAError, FormatError, SourceError
from bwla_kernels.format.folder import check_folder, read_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common.tiny_models import FAMILIES


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in read_folder(folder).items():
        with safe_open(folder / entry.file, framework="pt") as handle:
            tensors[name] = handle.get_tensor(name)
    return tensors


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_and_passes_the_loader_checks(make_model, tmp_path, family: str) -> None:
    folder, out = make_model(family, shards=2), tmp_path / "out"
    summary = convert(Options(str(folder), out, rank=2, recipe="data-free"))
    verify(out)
    specs = check_folder(out)
    entry = FAMILIES[family]
    assert len(specs) == 2 * sum(map(len, entry.input_groups))
    assert {spec.rank for spec in specs.values()} == {2}
    before, after = read_all(folder), read_all(out)
    for name, tensor in before.items():
        if f"{name.removesuffix('.weight')}.weight_int8" in after:
            assert name in ("model.embed_tokens.weight", "lm_head.weight")
        elif name.removesuffix(".weight") not in specs:
            assert torch.equal(after[name], tensor), name
    assert ("model.embed_tokens.weight_int8" in after) is entry.int8_embedding
    assert summary.bytes_after == sum(t.numel() * t.element_size() for t in after.values())
    assert summary.bytes_before == sum(t.numel() * t.element_size() for t in before.values())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("rank", [0, 3])
def test_undoing_the_rotation_gives_the_weight_minus_the_recorded_error(
    make_model, tmp_path, rank: int
) -> None:
    folder, out = make_model(dtype=torch.float32), tmp_path / "out"
    summary = convert(Options(str(folder), out, rank=rank, recipe="data-free"))
    before, after, specs = read_all(folder), read_all(out), check_folder(out)
    for linear in summary.linears:
        stored = {
            k.removeprefix(linear.name + "."): t for k, t in after.items() if k.startswith(linear.name + ".")
        }
        weight = before[f"{linear.name}.weight"].float()
        error = (weight - reference.dequantize(stored, specs[linear.name])).norm() / weight.norm()
        assert error.item() == pytest.approx(linear.error, abs=1e-3)
        assert 0.1 < linear.error < 1.0


def test_linears_of_an_input_group_store_identical_input_transforms(make_model, tmp_path) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model()), out, rank=1, recipe="data-free"))
    stored = read_all(out)
    for key in ("rotation_left", "rotation_right", "column_scale", "low_rank_a"):
        q, k, v = (stored[f"model.layers.0.self_attn.{part}_proj.{key}"] for part in "qkv")
        assert torch.equal(q, k)
        assert torch.equal(q, v)


def test_one_seed_gives_one_result_and_another_seed_another(make_model, tmp_path) -> None:
    folder = make_model()
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        convert(Options(str(folder), out, seed=seed, rank=1, recipe="data-free"))
        for report in ("bwla_report.json", "bwla_report.html"):  # which contain times
            (out / report).unlink()
    assert digests(outs[0]) == digests(outs[1])
    assert digests(outs[0]) != digests(outs[2])


def test_config_and_report_record_the_conversion(make_model, tmp_path) -> None:
    folder, out = make_model(), tmp_path / "out"
    summary = convert(Options(str(folder), out, bits=4, clip=0.9, seed=5, recipe="data-free"))
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization["lm_head"]["num_bits"] == 8
    assert config == json.loads((folder / "config.json").read_text())
    assert quantization["input_activations"]["num_bits"] == 4
    assert quantization["clip"] == 0.9
    assert quantization["provenance"] | {"bwla_version": ""} == {
        "base_model": "model", "revision": "", "recipe": "data-free", "seed": 5, "bwla_version": "", "calibration": {}
    }  # fmt: skip
    report = json.loads((out / "bwla_report.json").read_text())
    assert [entry["name"] for entry in report["linears"]] == [linear.name for linear in summary.linears]
    for trace in report["traces"].values():
        assert len(trace["okt"]) == 41
        assert trace["okt"][-1] < trace["okt"][0]


def test_only_one_layer_is_read_at_a_time(make_model, tmp_path, monkeypatch) -> None:
    reads: list[set[str]] = []
    plain = Source.read

    def watched(self: Source, names: list[str]) -> dict[str, Tensor]:
        reads.append({name.split(".")[2] if name.startswith("model.layers.") else "rest" for name in names})
        return plain(self, names)

    monkeypatch.setattr(Source, "read", watched)
    convert(Options(str(make_model(shards=2)), tmp_path / "out", recipe="data-free"))
    assert [layers for layers in reads if len(layers) != 1] == []
    # The values are checked tensor by tensor, which ends before the first layer is quantized.
    # The rest: what is copied, then the embedding and the head.
    assert list(map(min, reads))[-5:] == ["0", "1", "rest", "rest", "rest"]


def test_hard_links_to_one_file_take_its_disk_space_once(tmp_path: Path) -> None:
    """A killed conversion leaves the hidden states under `activations` and, linked, under `states`."""
    for name in ("activations", "states"):
        (tmp_path / "out.work" / name).mkdir(parents=True)
    states = tmp_path / "out.work" / "activations" / "0"
    states.write_bytes(bytes(1000))
    (tmp_path / "out.work" / "states" / "after-00000.hidden").hardlink_to(states)
    (tmp_path / "out.work" / "manifest.json").write_bytes(bytes(10))
    assert disk_bytes(tmp_path / "out.work") == 1010
    assert disk_bytes(tmp_path / "nothing") == 0


def test_an_existing_output_is_refused_and_untouched(make_model, tmp_path) -> None:
    folder, out = make_model(), tmp_path / "out"
    convert(Options(str(folder), out, recipe="data-free"))
    before = digests(out)
    with pytest.raises(BWLAError, match="already exists: choose another output or add --overwrite"):
        convert(Options(str(folder), out, seed=1, recipe="data-free"))
    assert digests(out) == before
    convert(Options(str(folder), out, seed=1, overwrite=True, recipe="data-free"))
    assert digests(out) != before
    assert leftovers(tmp_path) == []


def test_overwrite_replaces_models_only(make_model, tmp_path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    with pytest.raises(BWLAError, match="expected a model to overwrite, found other files"):
        convert(Options(str(make_model()), out, overwrite=True, recipe="data-free"))
    assert (out / "thesis.txt").read_text() == "all of it"


def test_the_source_cannot_be_the_output(make_model) -> None:
    folder = make_model()
    before = digests(folder)
    with pytest.raises(BWLAError, match="is the model to convert"):
        convert(Options(str(folder), folder, overwrite=True, recipe="data-free"))
    assert digests(folder) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_midway_keeps_the_old_output_and_the_finished_layers(
    make_model, tmp_path, monkeypatch, error
) -> None:
    folder, out = make_model(), tmp_path / "out"
    convert(Options(str(folder), out, recipe="data-free"))
    before = digests(out)
    calls = []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 6:
            raise error("in the middle")
        return plain(*args, **kwargs)

    plain = data_free.quantize_group
    monkeypatch.setattr(data_free, "quantize_group", failing)
    with pytest.raises(error):
        convert(Options(str(folder), out, overwrite=True, recipe="data-free"))
    assert len(calls) == 6
    assert digests(out) == before
    assert leftovers(tmp_path) == []
    assert [path.name for path in (tmp_path / "out.work" / "checkpoint").iterdir()] == [
        "part-00001.safetensors"  # the first layer, for --resume
    ]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_bad_input_leaves_no_trace(make_model, tmp_path, edit, name: str) -> None:
    folder, out = make_model(), tmp_path / "out"
    edit.tensor(folder / "model.safetensors", name, lambda t: t * float("nan"))
    with pytest.raises(SourceError, match=f"{name}: expected finite values, found NaN"):
        convert(Options(str(folder), out, head_bits=8, recipe="data-free"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 9}, "activation bits must be 2..8 or 16, found 9"),
        ({"clip": 0.0}, "clip must lie in"),
        ({"rank": 65}, "expected a rank of at most 64 for its 64 x 64 weight, found 65"),
        ({"head_bits": 5}, "--lm-head-bits: expected 2, 3, 4, 8, 16 or auto, found 5"),
        ({"head_bits": 4}, "recipe 'data-free' does not quantize the head, found --lm-head-bits 4"),
        ({"embedding_bits": 4}, "--embedding-bits: expected 8, 16 or auto, found 4"),
        ({"recipe": "magic"}, "recipe 'magic' does not exist"),
    ],
)
def test_options_out_of_range(make_model, tmp_path, options: dict, sentence: str) -> None:
    with pytest.raises(BWLAError) as error:
        convert(
            Options(
                str(make_model(num_attention_heads=2)), tmp_path / "out", **{"recipe": "data-free", **options}
            )
        )
    assert sentence in str(error.value)


def test_verify_notices_damage(make_model, tmp_path, edit) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model()), out, recipe="data-free"))
    shard = out / read_folder(out)["model.layers.1.mlp.up_proj.weight_scale"].file
    edit.tensor(shard, "model.layers.1.mlp.up_proj.weight_scale", lambda t: -t)
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.weight_scale: expected positive scales"):
        verify(out)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_verify_notices_damage_of_the_head_and_the_embedding(make_model, tmp_path, edit, module: str) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model()), out, head_bits=8, recipe="data-free"))
    shard = out / read_folder(out)[f"{module}.weight_scale"].file
    edit.tensor(shard, f"{module}.weight_scale", lambda t: t * float("nan"))
    with pytest.raises(FormatError, match=rf"{module}\.weight_scale: expected"):
        verify(out)


def test_a_missing_layer_is_noticed(make_model, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MAX_FILE_BYTES", 1)
    out = tmp_path / "out"
    convert(Options(str(make_model()), out, recipe="data-free"))
    index = out / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    shard = data["weight_map"]["model.layers.1.mlp.up_proj.weight_packed"]
    data["weight_map"] = {name: file for name, file in data["weight_map"].items() if file != shard}
    index.write_text(json.dumps(data))
    (out / shard).unlink()
    with pytest.raises(FormatError, match=r"model\.layers\.1\..*is missing, expected shape"):
        check_folder(out)


def test_small_tied_embeddings_stay_tied(make_model, tmp_path) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model(tie_word_embeddings=True)), out, embedding_bits=16, recipe="data-free"))
    assert not [name for name in read_all(out) if name.startswith("lm_head")]
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["format_version"] == 1


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_has_8_bits_by_default(make_model, tmp_path, tied: bool) -> None:
    folder, out = make_model(tie_word_embeddings=tied), tmp_path / "out"
    summary = convert(Options(str(folder), out, recipe="data-free"))
    original, after = read_all(folder)["model.embed_tokens.weight"].float(), read_all(out)
    codes, scale = after["model.embed_tokens.weight_int8"], after["model.embed_tokens.weight_scale"]
    assert ((codes * scale.unsqueeze(1) - original).abs() <= scale.unsqueeze(1) * 0.5001).all()
    assert "model.embed_tokens.weight" not in after
    # A tied head is the embedding.
    assert [name for name in after if name.startswith("lm_head")] == (
        [] if tied else ["lm_head.weight_int8", "lm_head.weight_scale"]
    )
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["quantization_config"]["format_version"] == 2
    assert summary.bytes_after == sum(t.numel() * t.element_size() for t in after.values())
    contents = read_contents(out)
    assert (contents.embedding_bits, contents.head_bits) == (8, 8)


def test_a_tied_head_that_the_model_stores_is_not_written_beside_the_8_bit_embedding(
    make_model, tmp_path
) -> None:
    folder, out = make_model(tie_word_embeddings=True), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    summary = convert(Options(str(folder), out, recipe="data-free"))
    after = read_all(out)
    assert "model.embed_tokens.weight_int8" in after
    assert not [name for name in after if name.startswith("lm_head")]
    assert summary.bytes_after == sum(t.numel() * t.element_size() for t in after.values())


def test_the_bits_of_an_untied_head_and_of_the_embedding_are_independent(make_model, tmp_path) -> None:
    folder = make_model()
    for head_bits, embedding_bits in ((16, 8), (8, 16)):
        out = tmp_path / f"{head_bits}-{embedding_bits}"
        convert(
            Options(str(folder), out, head_bits=head_bits, embedding_bits=embedding_bits, recipe="data-free")
        )
        contents = read_contents(out)
        assert (contents.head_bits, contents.embedding_bits) == (head_bits, embedding_bits)
        assert ("lm_head.weight" in contents.entries) is (head_bits == 16)
        assert ("model.embed_tokens.weight" in contents.entries) is (embedding_bits == 16)


@pytest.mark.parametrize("tied", [False, True])
def test_an_8_bit_head_is_a_tensor_of_its_own(make_model, tmp_path, tied: bool) -> None:
    folder, out = make_model(tie_word_embeddings=tied), tmp_path / "out"
    summary = convert(Options(str(folder), out, head_bits=8, embedding_bits=16, recipe="data-free"))
    before, after = read_all(folder), read_all(out)
    original = before["model.embed_tokens.weight" if tied else "lm_head.weight"].float()
    codes, scale = after["lm_head.weight_int8"], after["lm_head.weight_scale"]
    assert codes.dtype == torch.int8
    # Round to nearest: no weight is off by more than half a step.
    assert ((codes * scale.unsqueeze(1) - original).abs() <= scale.unsqueeze(1) * 0.5001).all()
    assert "lm_head.weight" not in after
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert summary.bytes_after == sum(t.numel() * t.element_size() for t in after.values())


def test_an_untied_head_has_8_bits_by_default(make_model, tmp_path) -> None:
    folder = make_model()
    convert(Options(str(folder), tmp_path / "a", recipe="data-free"))
    convert(Options(str(folder), tmp_path / "b", head_bits=16, recipe="data-free"))
    assert "lm_head.weight_int8" in read_all(tmp_path / "a")
    assert torch.equal(read_all(tmp_path / "b")["lm_head.weight"], read_all(folder)["lm_head.weight"])


def test_a_damaged_head_is_noticed(make_model, tmp_path, edit) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model()), out, recipe="data-free"))
    shard = out / read_folder(out)["lm_head.weight_int8"].file
    edit.tensor(shard, "lm_head.weight_int8", lambda t: t[:-1].contiguous())
    with pytest.raises(
        FormatError, match=r"lm_head\.weight_int8: expected shape \[96, 64\], found \[95, 64\]"
    ):
        check_folder(out)


def test_ignored_linears_are_copied(make_model, tmp_path) -> None:
    folder, out = make_model(), tmp_path / "out"
    convert(
        Options(
            str(folder),
            out,
            ignore=("down_proj", "re:model[.]layers[.]1[.]self_attn[.][qkv]_proj"),
            recipe="data-free",
        )
    )
    before, after = read_all(folder), read_all(out)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        assert torch.equal(after[name], before[name])
    assert len(check_folder(out)) == 14 - 2 - 3


def test_part_of_a_group_cannot_be_ignored(make_model, tmp_path) -> None:
    with pytest.raises(
        SourceError, match=r"k_proj: is ignored but shares its input with .*q_proj.*--ignore all of them"
    ):
        convert(Options(str(make_model()), tmp_path / "out", ignore=("k_proj",), recipe="data-free"))


def test_a_width_that_cannot_be_packed_may_be_ignored(make_model, tmp_path) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model(intermediate_size=100)), out, ignore=("down_proj",), recipe="data-free"))
    assert len(check_folder(out)) == 12
