"""vLLM's load formats: each one loads a checkpoint, or is refused by its name before weights are read."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
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


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: found)


@pytest.mark.parametrize("name", sorted(loading.PACKAGES))
def test_a_format_without_its_package_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, True)
    module = loading.PACKAGES[name]
    monkeypatch.setitem(sys.modules, module, None)
    sentence = (
        rf"--load-format {name} needs the Python module {module}, .*: run pip install [a-z-]+, or start"
    )
    with pytest.raises(StartError, match=sentence):
        loading.check_load_format(name)
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    loading.check_load_format(name)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'a_dependency'"), OSError("libgds.so: no such file")]
)
@pytest.mark.parametrize("name", sorted(loading.PACKAGES))
def test_a_format_with_a_broken_package_is_refused(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package may lack what it imports."""
    on_a_gpu(monkeypatch, True)

    def broken(module: str) -> ModuleType:
        assert module == loading.PACKAGES[name]
        raise error

    monkeypatch.setattr(loading, "import_module", broken)
    with pytest.raises(StartError, match=rf"which cannot be imported \({error}\)") as caught:
        loading.check_load_format(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", loading.GPU_ONLY)
def test_a_format_for_gpus_is_refused_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its package is installed or not."""
    on_a_gpu(monkeypatch, False)
    monkeypatch.setitem(sys.modules, loading.PACKAGES[name], ModuleType(name))
    with pytest.raises(StartError, match=rf"^--load-format {name} .* memory of a GPU.*with runai_streamer$"):
        loading.check_load_format(name)


def test_formats_for_gpus_are_not_advised_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (True, False):
        on_a_gpu(monkeypatch, found)
        with pytest.raises(StartError) as caught:
            loading.check_load_format("pt")
        assert ("fastsafetensors" in str(caught.value)) is found
        assert "runai_streamer" in str(caught.value)


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


@pytest.mark.parametrize(
    "extra",
    [
        {"enable_multithread_load": True, "num_threads": 2},
        {"safetensors_load_strategy": "eager"},
        {"safetensors_load_strategy": "prefetch"},
    ],
)
def test_ways_of_reading_safetensors(
    extra: dict[str, Any], qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    options = extra if "safetensors_load_strategy" in extra else {"model_loader_extra_config": extra}
    compare(start(qwen3.folder, load_format="safetensors", **options), golden)


def test_runai_streamer(
    qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    """With the package itself."""
    pytest.importorskip("runai_model_streamer")
    compare(start(qwen3.folder, load_format="runai_streamer"), golden)


@contextmanager
def loader_called(
    name: str, stream: Callable[[list[str]], Iterator[tuple[str, torch.Tensor]]]
) -> Iterator[None]:
    """Register a load format of vLLM that loads what `stream` yields of a checkpoint's files."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader(name)
    class Streaming(DefaultModelLoader):  # type: ignore[misc]
        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            model.load_weights(
                stream([str(file) for file in sorted(Path(model_config.model).glob("*.safetensors"))])
            )

    try:
        yield
    finally:
        del _LOAD_FORMAT_TO_MODEL_LOADER[name]


def test_the_tensors_of_fastsafetensors(
    qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    """With the package itself, as vLLM calls it, but in the memory of the processor, which vLLM does not offer."""
    pytest.importorskip("fastsafetensors")
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    def stream(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        loader = ParallelLoader(pg=SingleGroup(), hf_weights_files=files, device="cpu", nogds=True)
        try:
            yield from loader.iterate_weights()
        finally:
            loader.close()

    with loader_called("fastsafetensors-on-cpu", stream):
        compare(start(qwen3.folder, load_format="fastsafetensors-on-cpu"), golden)


def test_the_file_of_tensorizer_is_refused(qwen3: Any, tmp_path: Path, start: Callable[..., Any]) -> None:
    """With the package itself; without it, or without the file, vLLM ends before it builds the model."""
    tensorizer = pytest.importorskip("tensorizer")
    folder = Path(shutil.copytree(qwen3.folder, tmp_path / "model"))
    serializer = tensorizer.TensorSerializer(str(folder / "model.tensors"))
    for file in sorted(folder.glob("*.safetensors")):
        serializer.write_state_dict(load_file(file))
    serializer.close()
    with pytest.raises(StartError, match="^--load-format tensorizer holds weights"):
        start(folder, load_format="tensorizer")


def test_a_loader_that_reuses_its_buffer(
    qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    """As runai_streamer does: a tensor is overwritten as soon as the next one is asked for."""

    def stream(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for file in files:
            for name, tensor in load_file(file).items():
                yield name, tensor
                tensor.zero_()

    with loader_called("reusing", stream):
        compare(start(qwen3.folder, load_format="reusing"), golden)
