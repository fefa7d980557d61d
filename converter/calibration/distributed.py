"""Several processes on one conversion, each with a GPU of its own: they share out the calibration windows.

Every rank carries its windows through the model. The moments of a group's inputs are summed over all ranks; rank 0
makes the quantized group of them and hands its tensors to the others. Rank 0 alone writes. What differs from one
process is the order in which moments are summed.
"""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec, tensor_specs
from torch import Tensor

WAIT = timedelta(days=2)
"""Ranks wait for rank 0 while it checks the model and while it quantizes a group."""

RECIPES = ("fast",)
"""Recipes that can be shared out."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a conversion: this one's number, and how many there are."""

    rank: int = 0
    size: int = 1

    def part_of(self, count: int, rank: int | None = None) -> slice:
        """The windows, out of `count`, that a rank has (this one if not given): consecutive, as even as can be."""
        own = self.rank if rank is None else rank
        return slice(count * own // self.size, count * (own + 1) // self.size)

    def sum_moments(self, moments: Moments) -> None:
        """Make of each rank's moments those of all, in place."""
        if self.size == 1:
            return
        count = torch.tensor(moments.count, dtype=torch.int64)
        for tensor in (moments.gram, moments.cross_gram, moments.residual_cross_gram, count):
            if tensor is not None:
                dist.all_reduce(tensor)
        moments.count = int(count)

    def gather(self, part: Tensor) -> Tensor:
        """On rank 0, all ranks' windows in order, float32 [S, T, hidden] on the CPU; on the others, what was given."""
        part = part.cpu().contiguous()
        if self.rank:
            dist.send(torch.tensor(part.shape), 0)
            dist.send(part, 0)
            return part
        return torch.cat([part, *(_receive(rank) for rank in range(1, self.size))])

    def scatter(self, whole: Tensor | None) -> Tensor:
        """The inverse: rank 0 gives all windows (the others None), every rank gets its own, on the CPU."""
        if self.rank:
            return _receive(0)
        assert whole is not None
        for rank in range(1, self.size):
            part = whole[self.part_of(len(whole), rank)].contiguous()
            dist.send(torch.tensor(part.shape), rank)
            dist.send(part, rank)
        return whole[self.part_of(len(whole))].clone()

    def share(self, values: list[bool]) -> list[bool]:
        """Rank 0's list, of the same length everywhere, on every rank."""
        flags = torch.tensor(values, dtype=torch.int32)
        if self.size > 1:
            dist.broadcast(flags, 0)
        return [bool(flag) for flag in flags.tolist()]

    def share_group(
        self, result: GroupResult | None, specs: Mapping[str, LayerSpec], device: torch.device
    ) -> GroupResult:
        """Rank 0's quantized group on every rank; errors and traces stay with rank 0.

        Args:
            result: on rank 0; None on the others.
            specs: of the group's members.
            device: where the tensors are.
        """
        if self.size == 1 and result is not None:
            return result
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, spec in specs.items():
            tensors[name] = {}
            for key, want in tensor_specs(replace(spec, bias=False)).items():
                tensor = (
                    result.tensors[name][key].contiguous()
                    if result is not None
                    else torch.empty(want.shape, dtype=want.dtypes[0], device=device)
                )
                dist.broadcast(tensor, 0)
                tensors[name][key] = tensor
        chosen = torch.tensor(
            [math.nan if result is None or result.clip is None else result.clip], dtype=torch.float64
        )
        dist.broadcast(chosen, 0)
        clip = None if chosen.isnan().item() else chosen.item()
        return result or GroupResult(tensors, dict.fromkeys(specs, 0.0), clip=clip)


def _receive(rank: int) -> Tensor:
    shape = torch.empty(3, dtype=torch.int64)
    dist.recv(shape, rank)
    part = torch.empty(shape.tolist())
    dist.recv(part, rank)
    return part


def is_worker() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_ranks(count: int) -> None:
    """Become torchrun with `count` processes of this command; returns where they run already, or one is enough."""
    if count == 1 or is_worker():
        return
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    os.execv(sys.executable, [sys.executable, *run, "-m", "bwla_converter", *sys.argv[1:]])


def join_ranks(recipe: str, device: torch.device, windows: int) -> Ranks:
    """Find the other processes that torchrun started; on GPUs, each takes its own.

    Raises:
        BWLAError: the recipe cannot be shared out, or there are fewer GPUs or `windows` of text than processes.
    """
    if not is_worker():
        return Ranks()
    if recipe not in RECIPES:
        raise BWLAError(
            f"recipe {recipe!r}: expected {', '.join(RECIPES)} where several processes share the work"
        )
    if windows < int(os.environ["WORLD_SIZE"]):
        raise BWLAError(
            f"--gpus: expected a window of text for each process, found --samples {windows}: use more"
        )
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise BWLAError(
                f"--gpus: expected a GPU for each process, found {torch.cuda.device_count()}: use fewer"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_ranks() -> None:
    """The end of `join_ranks`."""
    if dist.is_initialized():
        dist.destroy_process_group()
