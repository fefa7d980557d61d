"""Files with random weights for llama.cpp, and its benchmark tool's answer."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.serving.engines import COMMON, SHAPES
from benchmarks.serving.llama_cpp import SCALES, time_model, write_gguf

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "vocab_size": 512,
    "head_dim": 128,
    "num_attention_heads": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}


def settings(shape: str) -> dict[str, object]:
    small = {**SMALL, **(EXPERTS if "num_experts" in SHAPES[shape] else {}), "intermediate_size": 512}
    return {**COMMON, **SHAPES[shape], **small}


@pytest.mark.parametrize("kind", [kind for kind in SCALES if kind != "Q1_0"])
def test_every_type_dequantizes_to_finite_weights(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, settings("8b"), kind)
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
        assert values.std() > 0 or tensor.tensor_type.name == "F32", tensor.name


def test_the_type_that_gguf_does_not_dequantize_has_scales_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, settings("8b"), "Q1_0")
    blocks = [tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.tensor_type.name == "Q1_0"]
    assert len(blocks) == 1 + 2 * 7
    for data in blocks:
        scales = data.reshape(-1, 18)[:, :2].copy().view(np.float16)
        assert ((scales > 0.004) & (scales < 0.016)).all()
        assert scales.std() > 0.001
        assert data.reshape(-1, 18)[:, 2:].std() > 0


@pytest.mark.parametrize("shape", ["0.5b", "0.6b", "8b", "30b-a3b"])
def test_a_file_has_the_tensors_of_the_model(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, settings(shape), "TQ1_0")
    found = {
        tensor.name: (tensor.shape.tolist(), tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(path).tensors
    }
    tied = bool(settings(shape)["tie_word_embeddings"])
    assert found["token_embd.weight"] == ([256, 512], "Q6_K" if tied else "TQ1_0")
    assert ("output.weight" in found) == (not tied)
    assert found["blk.1.attn_q.weight"] == ([256, 512], "TQ1_0")
    if shape == "30b-a3b":
        assert found["blk.1.ffn_down_exps.weight"] == ([256, 256, 4], "TQ1_0")
        assert found["blk.1.ffn_gate_inp.weight"] == ([256, 4], "F32")
    else:
        assert found["blk.1.ffn_down.weight"] == ([512, 256], "TQ1_0")
    assert ("blk.0.attn_q.bias" in found) == (shape == "0.5b")
    assert len(found) == 2 + (not tied) + 2 * {"30b-a3b": 12, "0.5b": 12}.get(shape, 11)


def test_a_head_of_another_width_has_a_type_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {**settings("0.5b"), "hidden_size": 384}, "Q1_0")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (found["token_embd.weight"], found["blk.0.attn_q.weight"]) == ("Q8_0", "Q1_0")


def tool(folder: Path, script: str) -> Path:
    path = folder / "llama-bench"
    path.write_text(f"#!/bin/sh\n{script}\n")
    os.chmod(path, 0o755)
    return path


def test_both_speeds_are_read_from_the_tool(tmp_path: Path) -> None:
    rows = [{"n_prompt": 256, "n_gen": 0, "avg_ts": 90.5}, {"n_prompt": 0, "n_gen": 32, "avg_ts": 7.25}]
    bench = tool(tmp_path, f"echo '{json.dumps(rows)}'")
    assert time_model(bench, tmp_path / "m.gguf", 256, 32, 2) == {"prefill": 90.5, "decode": 7.25}


def test_longer_prompts_and_contexts_have_names_of_their_own(tmp_path: Path) -> None:
    script = """case "$*" in
*-d*) echo '[{"n_prompt": 0, "n_gen": 32, "n_depth": 1024, "avg_ts": 3.0}]' ;;
*2048*) echo '[{"n_prompt": 2048, "n_gen": 0, "n_depth": 0, "avg_ts": 2.0}]' ;;
*) echo '[{"n_prompt": 0, "n_gen": 32, "n_depth": 0, "avg_ts": 1.0}]' ;;
esac"""
    found = time_model(
        tool(tmp_path, script), tmp_path / "m.gguf", 256, 32, 2, long_prefill=2048, contexts=[1024]
    )
    assert found == {"decode": 1.0, "prefill_2048": 2.0, "decode_1024": 3.0}


def test_a_failure_of_the_tool_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        time_model(tool(tmp_path, "echo no such model >&2; exit 1"), tmp_path / "m.gguf", 256, 32, 2)
