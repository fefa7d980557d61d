"""What the plugin tells: the table at load, and `BWLA_CHECK_LAYERS`, which must find a wrong layer."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import TorchHead, quantize_head
from bwla_kernels.torch_backend import TorchBackend
from torch import Tensor

from bwla_vllm import observe
from bwla_vllm.checked import MAX_ROWS, largest_error, sample_rows
from bwla_vllm.errors import StartError
from bwla_vllm.observe import CHECK_VARIABLE, Observer, calls_to_check

LayerFactory = Callable[[LayerSpec, int], dict[str, Tensor]]
SPEC = LayerSpec(48, 128, 2, 8, 8, rank=2)


class Wrong(TorchBackend):
    """Computes something else from the row on that it is given."""

    def apply(self, x: Tensor, tensors: Any, spec: LayerSpec) -> Tensor:
        y = super().apply(x, tensors, spec)
        return torch.cat([y[:-1], -y[-1:]])


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is reported, through a logger of our own: an engine sets up vLLM's loggers anew."""
    logger = logging.getLogger("observed")
    monkeypatch.setattr(observe, "logger", logger)
    caplog.set_level(logging.INFO, "observed")
    return caplog


@pytest.fixture
def call(make_layer: LayerFactory) -> Callable[..., None]:
    """Build a layer under an observer and call it as often as asked."""

    def run(observer: Observer, backend: Any, name: str, calls: int = 1, **changes: Any) -> None:
        spec = dataclasses.replace(SPEC, **changes)
        watched = observer.watch_layer(backend, name)
        tensors = watched.prepare(make_layer(spec, 0), spec)
        for seed in range(calls):
            x = torch.randn(5, SPEC.in_features, generator=torch.Generator().manual_seed(seed))
            watched.apply(x, tensors, dataclasses.replace(spec, bias=False))

    return run


@pytest.mark.parametrize(("text", "calls"), [(None, 0), ("", 0), ("0", 0), ("3", 3)])
def test_the_number_of_calls(text: str | None, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHECK_VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(CHECK_VARIABLE, text)
    assert calls_to_check() == calls


def test_a_number_that_is_none_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, "all")
    with pytest.raises(StartError, match="BWLA_CHECK_LAYERS: expected a number of calls like 2, found 'all'"):
        calls_to_check()


def test_largest_error_is_that_of_the_worst_row() -> None:
    wanted = torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, 0.0]])
    assert largest_error(wanted, wanted) == 0
    assert largest_error(wanted + torch.tensor([[0.0], [1.0], [0.0]]), wanted) == pytest.approx(2**0.5 / 5)
    assert largest_error(wanted + 1, wanted) == float("inf")  # where nothing should be
    assert largest_error(wanted * float("nan"), wanted) == float("inf")
    assert largest_error(wanted, wanted * float("nan")) == 0  # the input was broken already


@pytest.mark.parametrize("rows", [1, 2, MAX_ROWS, 1000])
def test_sampled_rows_include_both_ends(rows: int) -> None:
    picked = sample_rows(torch.zeros(rows, 3)).tolist()
    assert picked[0] == 0
    assert picked[-1] == rows - 1
    assert len(set(picked)) == min(rows, MAX_ROWS)


def test_one_table_when_the_last_layer_is_loaded(
    log: pytest.LogCaptureFixture, make_layer: LayerFactory
) -> None:
    observer, backend = Observer(), TorchBackend()
    names = [f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("qkv_proj", "down_proj")]
    prepared = backend.prepare(make_layer(SPEC, 0), SPEC)
    for name in names:
        observer.expect(name)
    for name in names[:-1]:
        observer.loaded(name, backend, SPEC, prepared, 0.5)
    assert log.records == []
    observer.loaded(names[-1], backend, SPEC, prepared, 0.5)
    (record,) = log.records
    lines = record.getMessage().splitlines()
    assert len(lines) == 5  # title, headings, two kinds, all
    for line, kind in zip(lines[2:4], ("qkv_proj", "down_proj"), strict=True):
        assert line.split()[:2] == [kind, "torch"]
        assert "plain torch" in line
        assert "W1A6 rank 2" in line
        assert "48 x 128" in line
        assert line.endswith("1.00")
    stored = sum(tensor.nbytes for tensor in prepared.values())
    assert f"{8 * stored / (48 * 128):.2f}" in lines[2]
    assert lines[4].split()[:2] == ["all", "4"]
    assert lines[4].endswith("2.00")
    observer.loaded(names[0], backend, SPEC, prepared, 0.5)  # weights loaded anew
    assert len(log.records) == 1


def test_backends_are_left_alone_unless_asked() -> None:
    backend, head = TorchBackend(), TorchHead()
    assert Observer().watch_layer(backend, "a") is backend
    assert Observer().watch_head(head, "lm_head") is head


@pytest.mark.parametrize("changes", [{}, {"rank": 0}, {"bits": 16}, {"bias": True}])
def test_right_layers_agree_and_only_the_first_calls_are_checked(
    changes: dict[str, Any], log: pytest.LogCaptureFixture, call: Callable[..., None]
) -> None:
    call(Observer(2), TorchBackend(), "model.down_proj", calls=4, **changes)
    reports = [record.getMessage() for record in log.records if "relative error" in record.getMessage()]
    assert len(reports) == 2
    assert "call 2 of 2, 1 layers, 5 rows: worst model.down_proj" in reports[1]
    assert all(float(report.rpartition(" ")[2]) < 1e-5 for report in reports)


def test_a_wrong_layer_is_named_among_right_ones(
    log: pytest.LogCaptureFixture, make_layer: LayerFactory
) -> None:
    observer = Observer(1)
    table = {"model.a": TorchBackend(), "model.b": Wrong(), "model.c": TorchBackend()}
    watched = {name: observer.watch_layer(backend, name) for name, backend in table.items()}
    x = torch.randn(3, SPEC.in_features, generator=torch.Generator().manual_seed(0))
    for seed, backend in enumerate(watched.values()):
        backend.apply(x, backend.prepare(make_layer(SPEC, seed), SPEC), SPEC)
    (error,) = [record for record in log.records if record.levelno == logging.ERROR]
    assert (
        "worst model.b, relative error 2; these differ from the reference implementation: model.b"
        in error.getMessage()
    )


def test_the_head_is_checked_too(log: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    spec = HeadSpec(40, 32)
    observer = Observer(1)
    head = observer.watch_head(TorchHead(), "lm_head")
    tensors = head.prepare(quantize_head(torch.randn(40, 32, generator=generator)), spec)
    head.apply(torch.randn(2, 32, generator=generator), tensors, spec)
    assert "1 heads, 2 rows: worst lm_head" in log.records[-1].getMessage()


def test_an_engine_reports_table_and_checks(
    qwen3: Any,
    golden: Any,
    start: Callable[..., Any],
    compare: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    compare(start(qwen3.folder), golden)
    messages = [record.getMessage() for record in log.records if record.name == "observed"]
    (table,) = [message for message in messages if message.startswith("BWLA layers in this process")]
    assert all(kind in table for kind in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "W1A6"))
    (report,) = [message for message in messages if "relative error" in message]
    assert "call 1 of 1, 8 layers" in report
    assert "NOT" not in report


def test_a_compiled_engine_refuses_checks(
    qwen3: Any, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    with pytest.raises(StartError, match="BWLA_CHECK_LAYERS .* add --enforce-eager"):
        start(qwen3.folder, enforce_eager=False)
