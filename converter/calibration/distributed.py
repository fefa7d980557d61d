"""Conversion on several GPUs: one process per GPU, which share out the calibration samples (data parallel).

Each process carries its own samples through the model. The moments of a group's inputs are summed over all processes;
process 0 then quantizes the group and broadcasts the tensors. Only process 0 writes files. The result differs from
that of one process only by the order in which the moments are summed.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from bwla_converter.options import AUTO_RECIPE
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec, tensor_specs
from torch import Tensor

_MAX_DIMENSIONS = 5
"""Most dimensions of a tensor that processes send to each other."""

TIMEOUT = timedelta(days=2)
"""The other processes wait this long while process 0 checks the model or quantizes a group."""

DISTRIBUTED_RECIPES = ("paper", "fast")
"""Recipes that can run in several processes."""


@dataclass(frozen=True)
class Processes:
    """The processes of a conversion: the rank of this one, and how many there are."""

    process_rank: int = 0
    world_size: int = 1

    def samples_of(self, count: int, process_rank: int | None = None) -> slice:
        """Return which of `count` samples a process (default: this one) has: consecutive, as evenly as possible."""
        own = self.process_rank if process_rank is None else process_rank
        return slice(count * own // self.world_size, count * (own + 1) // self.world_size)

    def sum_moments(self, moments: Moments) -> None:
        """Add up the moments of all processes, in place."""
        if self.world_size == 1:
            return
        count = torch.tensor(moments.count, dtype=torch.int64)
        for tensor in (moments.gram, moments.cross_gram, moments.error_cross_gram, count):
            if tensor is not None:
                dist.all_reduce(tensor)
        moments.count = int(count)

    def gather(self, part: Tensor) -> Tensor:
        """Return the samples of all processes in order in process 0, and `part` in the others; [S, T, hidden], CPU."""
        part = part.cpu().contiguous()
        if self.process_rank:
            _send(part, 0)
            return part
        return torch.cat([part, *(_receive(source) for source in range(1, self.world_size))])

    def scatter(self, whole: Tensor | None) -> Tensor:
        """Send each process its samples and return this one's, on the CPU: the inverse of `gather`.

        Args:
            whole: all samples in process 0; None in the others.
        """
        if self.process_rank:
            return _receive(0)
        assert whole is not None
        for target in range(1, self.world_size):
            part = whole[self.samples_of(len(whole), target)].contiguous()
            _send(part, target)
        return whole[self.samples_of(len(whole))].clone()

    def broadcast_flags(self, flags: list[bool]) -> list[bool]:
        """Return process 0's `flags` in every process; all processes pass lists of the same length."""
        if self.world_size == 1:
            return flags
        return [bool(flag) for flag in self.broadcast_numbers([float(flag) for flag in flags])]

    def broadcast_numbers(self, numbers: list[float]) -> list[float]:
        """Return process 0's `numbers` in every process; all processes pass lists of the same length."""
        if self.world_size == 1:
            return numbers
        # A tensor, because broadcast_object_list would serialize Python objects.
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(tensor, 0)
        received: list[float] = tensor.tolist()
        return received

    def broadcast_group(
        self, result: GroupResult | None, specs: Mapping[str, LayerSpec], device: torch.device
    ) -> GroupResult:
        """Return process 0's quantized group in every process; only process 0 has its errors and traces.

        Args:
            result: the group in process 0; None in the others.
            specs: specs of the group's linears.
            device: where the tensors are.
        """
        if self.world_size == 1 and result is not None:
            return result
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, spec in specs.items():
            tensors[name] = {}
            for key, expected in tensor_specs(replace(spec, bias=False)).items():
                tensor = (
                    result.tensors[name][key].contiguous()
                    if result is not None
                    else torch.empty(expected.shape, dtype=expected.dtypes[0], device=device)
                )
                dist.broadcast(tensor, 0)
                tensors[name][key] = tensor
        clip = None if result is None else result.clip
        chosen, value = self.broadcast_numbers([float(clip is not None), clip or 0.0])
        return result or GroupResult(tensors, dict.fromkeys(specs, 0.0), clip=value if chosen else None)


def _send(part: Tensor, target: int) -> None:
    shape = torch.zeros(_MAX_DIMENSIONS, dtype=torch.int64)
    shape[: part.dim()] = torch.tensor(part.shape)
    dist.send(shape, target)
    dist.send(part, target)


def _receive(source: int) -> Tensor:
    shape = torch.empty(_MAX_DIMENSIONS, dtype=torch.int64)
    dist.recv(shape, source)
    part = torch.empty([size for size in shape.tolist() if size])
    dist.recv(part, source)
    return part


def is_worker() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_processes(count: int) -> None:
    """Replace this process by torchrun with `count` processes of the same command line.

    Return without doing so where `count` is 1 or torchrun has started this process already.
    """
    if count == 1 or is_worker():
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "bwla_converter", *sys.argv[1:]])


def join_processes(recipe: str, device: torch.device, num_samples: int) -> Processes:
    """Join the other processes that torchrun started, and select this one's GPU.

    Raises:
        BWLAError: the recipe cannot run in several processes, or there are more processes than GPUs or samples.
    """
    if not is_worker():
        return Processes()
    if recipe not in (AUTO_RECIPE, *DISTRIBUTED_RECIPES):
        raise BWLAError(
            f"recipe {recipe!r} cannot run in several processes: use --gpus 1, or recipe "
            f"{' or '.join(DISTRIBUTED_RECIPES)}"
        )
    if num_samples < int(os.environ["WORLD_SIZE"]):
        raise BWLAError(
            f"--gpus: expected at least one calibration sample per process, found {num_samples} samples for "
            f"{os.environ['WORLD_SIZE']} processes: use more samples or fewer GPUs"
        )
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise BWLAError(
                f"--gpus: expected one GPU per process, found {torch.cuda.device_count()} GPUs: use fewer processes"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Processes(dist.get_rank(), dist.get_world_size())


def leave_processes() -> None:
    """Shut down what `join_processes` set up."""
    if dist.is_initialized():
        dist.destroy_process_group()
