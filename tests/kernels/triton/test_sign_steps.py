"""The kernels of the sign search decide as the reference implementation, in the interpreter or on a GPU."""

from collections.abc import Mapping

import pytest
import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.sign_search import Metric
from bwla_kernels.sign_search.steps import choose_signs_reference, flip_signs_reference
from bwla_kernels.triton import gpu as triton_gpu
from bwla_kernels.triton import sign_steps
from torch import Tensor

SHAPES = [(32, 1, 1), (128, 1, 33), (96, 3, 20), (64, 2, 32), (32, 6, 34), (20, 1, 20), (50, 1, 3), (1, 1, 2)]
"""Columns, candidates and rows: full and ragged programs, whole and padded blocks."""


def copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_blocks_are_decided_as_defined(shape: tuple[int, int, int], device: torch.device) -> None:
    """Where float32 holds every sum of a decision exactly, the signs are equal, ties included."""
    choose, flip = sign_steps.draw_block(*shape)
    found = copied(choose, device)
    sign_steps.choose_signs(**found)
    choose_signs_reference(**choose)
    assert torch.equal(found["sign"].cpu(), choose["sign"])
    for name in ("dots", "norms"):
        assert_close(found[name], choose[name])

    found = copied(flip, device)
    sign_steps.flip_signs(**found)
    flip_signs_reference(**flip)
    for name in ("sign", "change", "product"):
        assert torch.equal(found[name].cpu(), flip[name]), name
    for name in ("dots", "norms"):
        assert_close(found[name], flip[name])
    assert shape[0] < 32 or flip["change"].abs().max() == 2, "something was flipped"


def metric_of(columns: int, generator: torch.Generator) -> Metric:
    samples = torch.randn(2 * columns, columns, generator=generator) * torch.rand(
        columns, generator=generator
    )
    return Metric.of(samples.mT @ samples / len(samples) + 0.01 * torch.eye(columns))


def test_real_blocks_in_slices_of_larger_tensors(device: torch.device) -> None:
    """Two blocks of a weight, whose tensors are slices: what is outside is neither read nor written."""
    columns, candidates, rows, block = 72, 3, 37, slice(40, 72)
    generator = torch.Generator().manual_seed(3)
    metric = metric_of(columns, generator)
    weight = torch.randn(rows, columns, generator=generator)
    scale = weight.abs().mean(1) * torch.tensor([[0.7], [1.0], [1.2]])
    goal = metric.factor.mT @ weight.mT
    signs = torch.where(torch.randn(columns, candidates, rows, generator=generator) > 0, 1.0, -1.0)
    product = torch.einsum("ij,icn->jcn", metric.factor[: block.start], signs[: block.start])
    wide = {"target": goal, "product": product, "sign": signs}
    exact = {
        "factor": metric.factor[block, block].contiguous(),
        "pivots": metric.pivots[block],
        "scale": scale,
    }
    zeros = {"dots": torch.zeros_like(scale), "norms": torch.zeros_like(scale)}

    def run(step: object, wide: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
        step(**{name: tensor[block] for name, tensor in wide.items()}, **others)  # type: ignore[operator]
        return {**wide, **others}

    found = run(sign_steps.choose_signs, copied(wide, device), copied({**exact, **zeros}, device))
    wanted = run(
        choose_signs_reference,
        copied(wide, torch.device("cpu")),
        copied({**exact, **zeros}, torch.device("cpu")),
    )
    assert torch.equal(found["sign"].cpu(), wanted["sign"]), "no row of this weight has a tie"
    assert_close(found["dots"], wanted["dots"])
    assert_close(found["norms"], wanted["norms"])

    sign, hessian = wanted["sign"], metric.hessian
    goal, product = hessian @ weight.mT, torch.einsum("ij,jcn->icn", hessian, sign)
    wide = {"target": goal, "product": product, "sign": sign, "change": torch.full_like(sign, 5.0)}
    exact = {"hessian": hessian[block, block].contiguous(), "scale": scale}
    sums = {"dots": (sign * goal.unsqueeze(1)).sum(0), "norms": (sign * product).sum(0)}
    found = run(sign_steps.flip_signs, copied(wide, device), copied({**exact, **sums}, device))
    wanted = run(
        flip_signs_reference,
        copied(wide, torch.device("cpu")),
        copied({**exact, **sums}, torch.device("cpu")),
    )
    for name in ("sign", "change"):
        assert torch.equal(found[name].cpu(), wanted[name]), name
    assert found["change"][: block.start].eq(5.0).all()
    for name in ("product", "dots", "norms"):
        assert_close(found[name], wanted[name])
    # The sums are those of the new signs: nothing but rounding lies between the steps and the definition.
    sign = found["sign"].cpu()
    assert_close(found["dots"], (sign * goal.unsqueeze(1)).sum(0))
    assert_close(found["norms"][0], torch.einsum("in,ij,jn->n", sign[:, 0], hessian, sign[:, 0]))


def test_products_are_as_precise_as_float32(device: torch.device) -> None:
    """The parts of the matrix add up: elements with all 24 bits, one change."""
    _, flip = sign_steps.draw_block(32, 1, 4)
    generator = torch.Generator().manual_seed(1)
    flip["hessian"] = torch.rand(32, 32, generator=generator).fill_diagonal_(100.0)
    flip["product"].zero_()
    flip["target"].zero_()
    flip["scale"].fill_(1.0)
    flip["target"][3] = -1000.0 * flip["sign"][3, 0]
    expected = flip["hessian"][3].unsqueeze(1) * (-2.0 * flip["sign"][3, 0])
    found = copied(flip, device)
    sign_steps.flip_signs(**found)
    assert torch.equal(found["change"].cpu().count_nonzero(0), torch.ones(1, 4, dtype=torch.int64))
    assert torch.equal(found["product"][:, 0].cpu(), expected)


def test_no_rows_or_candidates(device: torch.device) -> None:
    for shape in ((32, 1, 0), (32, 0, 4), (0, 1, 4)):
        choose, flip = sign_steps.draw_block(*shape)
        sign_steps.choose_signs(**copied(choose, device))
        sign_steps.flip_signs(**copied(flip, device))


def test_misfits_are_refused(device: torch.device) -> None:
    choose, flip = (copied(tensors, device) for tensors in sign_steps.draw_block(32, 2, 4))
    for step, tensors in ((sign_steps.choose_signs, choose), (sign_steps.flip_signs, flip)):
        for name, tensor in tensors.items():
            wrongs = [tensor[..., :-1], tensor.double(), tensor.repeat_interleave(2, -1)[..., ::2]]
            for wrong in (*wrongs, *([tensor[0]] if name in ("target", "scale") else [])):
                with pytest.raises(BackendError, match="expected .*, found"):
                    step(**{**tensors, name: wrong})
    wide, _ = sign_steps.draw_block(129, 1, 1)
    with pytest.raises(BackendError, match=r"at most 128 columns, found \[129, 1\]"):
        sign_steps.choose_signs(**copied(wide, device))


def test_offsets_beyond_32_bits_are_refused() -> None:
    meta = torch.device("meta")
    big = torch.empty(128, 8, 2**21, device=meta)
    with pytest.raises(BackendError, match="search fewer rows at a time"):
        sign_steps.choose_signs(big[:, 0], big, big, big, big[0], big, big[0], big[0])


def test_the_self_check(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes sound kernels and names a wrong one."""
    sign_steps.self_check(device)
    launch = sign_steps.launch

    def wrong(step: str, tensors: Mapping[str, Tensor]) -> None:
        launch(step, tensors)
        if step == "choose_signs":
            tensors["sign"][3, 1, 19] *= -1

    monkeypatch.setattr(sign_steps, "launch", wrong)
    with pytest.raises(BackendError, match=r"choose_signs computes wrong sign on .* report this"):
        sign_steps.self_check(device)


def test_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(triton_gpu, "gpu_properties", lambda device: triton_gpu.GpuProperties((8, 0), 108))
    assert sign_steps.can_run(gpu, 128)[0]
    assert sign_steps.can_run(gpu, 129) == (
        False,
        "the Triton kernels take blocks of at most 128 columns, found 129",
    )
    assert not sign_steps.can_run(torch.device("cpu"), 128)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_large_blocks_on_a_gpu() -> None:
    for shape in ((128, 6, 4096), (128, 1, 20_000), (96, 8, 1001)):
        test_exact_blocks_are_decided_as_defined(shape, torch.device("cuda"))
