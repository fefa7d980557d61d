"""The configs that the serving benchmark writes for a GPU, where vLLM makes up the weights."""

import json
from pathlib import Path

from bwla_kernels.format.schema import parse_config

from benchmarks.serving.gpu_serve import METHODS, write_method


def test_each_method_has_a_config_for_dummy_weights(tmp_path: Path) -> None:
    written = {}
    for method in METHODS:
        (folder := tmp_path / method).mkdir()
        engine = write_method(folder, "0.6b", method)
        config = json.loads((folder / "config.json").read_text())
        written[method] = engine.get(
            "quantization", config.get("quantization_config", {}).get("quant_method")
        )
    assert written == {"bwla": "bwla", "bf16": None, "int4": "gptq", "fp8": "fp8"}


def test_the_config_of_one_bit_weights_lists_no_tensors_because_none_are_written(tmp_path: Path) -> None:
    write_method(tmp_path, "0.6b", "bwla")
    config = json.loads((tmp_path / "config.json").read_text())
    format_ = parse_config(config["quantization_config"])
    assert format_.tensors is None
    assert format_.config is not None
    assert format_.config["hidden_size"] == 1024
