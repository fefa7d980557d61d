"""vLLM's load formats: each one loads a checkpoint, or is refused by its name before weights are read."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bwla_kernels.errors import FormatError
from safetensors.torch import load_file

from bwla_vllm import loading
from bwla_vllm.checks import check_checkpoint
from bwla_vllm.errors import StartError

WORKING = {"auto", "hf", "safetensors", "dummy", "modelexpress"}
"""`modelexpress` hands over to a package of its own; vLLM names it where it is missing."""


def test_every_format_of_vllm_is_known() -> None:
    """A format that a new release adds must be looked at; older releases also had the last two."""
    from vllm.model_executor.model_loader import LoadFormats

    known = WORKING | {*loading.REFUSED_FORMATS} | {*loading.PACKAGES}
    assert {*get_args(LoadFormats)} <= known
    assert known - {*get_args(LoadFormats)} <= {"bitsandbytes", "gguf"}


@pytest.mark.parametrize("name", sorted(loading.REFUSED_FORMATS))
def test_a_format_that_cannot_work_is_refused(name: str) -> None:
    with pytest.raises(
        StartError, match=rf"^--load-format {name} .*: start vLLM without --load-format"
    ) as caught:
        loading.check_load_format(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(loading.PACKAGES))
def test_a_format_without_its_package_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda module: None)
    with pytest.raises(
        StartError, match=rf"--load-format {name} needs the Python module {loading.PACKAGES[name]}"
    ):
        loading.check_load_format(name)
    monkeypatch.setattr(loading, "find_spec", lambda module: object())
    loading.check_load_format(name)


@pytest.mark.parametrize("name", [*sorted(WORKING), "a-plugins-own"])
def test_other_formats_are_left_to_vllm(name: str) -> None:
    loading.check_load_format(name)


@pytest.mark.parametrize("name", ["sharded_state", "pt", "mistral"])
def test_an_engine_ends_with_the_sentence(name: str, qwen3: Any, start: Callable[..., Any]) -> None:
    with pytest.raises(StartError, match=f"--load-format {name} "):
        start(qwen3.folder, load_format=name)


def test_a_folder_that_vllm_saved_is_named(qwen3: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen3.folder, tmp_path / "saved"))
    next(folder.glob("*.safetensors")).rename(folder / "model-rank-0-part-0.safetensors")
    sentence = r"model-rank-0-part-0.*save_sharded_state.*serve the converted folder"
    with pytest.raises(FormatError, match=sentence):
        check_checkpoint(folder)


def test_a_loader_that_reuses_its_buffer(
    qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    """As runai_streamer does: a tensor is overwritten as soon as the next one is asked for."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader("reusing")
    class Reusing(DefaultModelLoader):  # type: ignore[misc]
        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            model.load_weights(self.stream(Path(model_config.model)))

        def stream(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
            for file in sorted(folder.glob("*.safetensors")):
                for name, tensor in load_file(file).items():
                    yield name, tensor
                    tensor.zero_()

    try:
        compare(start(qwen3.folder, load_format="reusing"), golden)
    finally:
        del _LOAD_FORMAT_TO_MODEL_LOADER["reusing"]
