"""The kernels of the search for several planes decide as the reference implementation, interpreted or on a GPU."""

from collections.abc import Mapping

import pytest
import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.sign_search.levels import choose_levels_reference, move_levels_reference
from bwla_kernels.triton import sign_steps
from torch import Tensor

SHAPES = [(32, 2, 1), (128, 2, 33), (96, 3, 20), (64, 4, 32), (20, 2, 20), (50, 3, 3), (1, 4, 2), (32, 1, 5)]
"""Columns, planes and rows: full and ragged programs, whole and padded blocks."""


def copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_blocks_are_decided_as_defined(shape: tuple[int, int, int], device: torch.device) -> None:
    """Where float32 holds every sum of a decision exactly, the signs are equal, ties included."""
    choose, move = sign_steps.draw_block(*shape, planes=True)
    found = copied(choose, device)
    sign_steps.choose_levels(**found)
    choose_levels_reference(**choose)
    assert torch.equal(found["sign"].cpu(), choose["sign"])
    for name in ("dots", "norms"):
        assert_close(found[name], choose[name])

    found = copied(move, device)
    sign_steps.move_levels(**found)
    move_levels_reference(**move)
    for name in ("sign", "change", "product"):
        assert torch.equal(found[name].cpu(), move[name]), name
    for name in ("dots", "norms"):
        assert_close(found[name], move[name])
    assert shape[0] < 32 or move["change"].abs().max() == 2, "something was moved"


def test_a_block_of_a_larger_tensor(device: torch.device) -> None:
    """What is outside the block is neither read nor written; the sums are those of the new signs."""
    columns, planes, rows, block = 72, 3, 37, slice(40, 72)
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(2 * columns, columns, generator=generator)
    hessian = samples.mT @ samples / len(samples) + 0.01 * torch.eye(columns)
    weight = torch.randn(rows, columns, generator=generator)
    scale = weight.abs().mean(1) * torch.tensor([[1.0], [0.5], [0.25]])
    sign = torch.where(torch.randn(columns, planes, rows, generator=generator) > 0, 1.0, -1.0)
    goal, product = hessian @ weight.mT, torch.einsum("ij,jpn->ipn", hessian, sign)
    wide = {"target": goal, "product": product, "sign": sign, "change": torch.full_like(sign, 5.0)}
    exact = {"hessian": hessian[block, block].contiguous(), "scale": scale}
    sums = {
        "dots": (sign * goal.unsqueeze(1)).sum(0),
        "norms": torch.einsum("ipn,iqn->pqn", sign, product),
    }

    def run(step: object, where: torch.device) -> dict[str, Tensor]:
        tensors = copied({**wide, **exact, **sums}, where)
        step(**{name: t[block] if name in wide else t for name, t in tensors.items()})  # type: ignore[operator]
        return tensors

    found, wanted = run(sign_steps.move_levels, device), run(move_levels_reference, torch.device("cpu"))
    for name in ("sign", "change"):
        assert torch.equal(found[name].cpu(), wanted[name]), name
    assert found["change"][: block.start].eq(5.0).all()
    for name in ("product", "dots", "norms"):
        assert_close(found[name], wanted[name])
    new = found["sign"].cpu()
    assert_close(found["norms"], torch.einsum("ipn,ij,jqn->pqn", new, hessian, new))


def test_misfits_are_refused(device: torch.device) -> None:
    choose, move = (copied(tensors, device) for tensors in sign_steps.draw_block(32, 2, 4, planes=True))
    for step, tensors in ((sign_steps.choose_levels, choose), (sign_steps.move_levels, move)):
        for name, tensor in tensors.items():
            for wrong in (tensor[..., :-1], tensor.double()):
                with pytest.raises(BackendError, match="expected .*, found"):
                    step(**{**tensors, name: wrong})
        with pytest.raises(BackendError, match=r"norms: expected .*\[2, 2, 4\].*, found"):
            step(**{**tensors, "norms": tensors["norms"][0]})


@pytest.mark.parametrize("planes", [2, 4])
def test_the_self_check(planes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes sound kernels and names a wrong one."""
    sign_steps.self_check(device, planes)
    launch = sign_steps.launch

    def wrong(step: str, tensors: Mapping[str, Tensor]) -> None:
        launch(step, tensors)
        if step == "move_levels":
            tensors["product"][3, 1, 19] += 1.0

    monkeypatch.setattr(sign_steps, "launch", wrong)
    with pytest.raises(BackendError, match=r"move_levels computes wrong product on .* report this"):
        sign_steps.self_check(device, planes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_large_blocks_on_a_gpu() -> None:
    for shape in ((128, 2, 4096), (128, 4, 20_000), (96, 3, 1001)):
        test_exact_blocks_are_decided_as_defined(shape, torch.device("cuda"))
