"""What each process of a distributed test runs; in a module that a new process can import."""

from pathlib import Path

import torch
import torch.distributed as dist
from bwla_converter.calibration.distributed import Processes
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_kernels.format import LayerSpec, tensor_specs
from safetensors.torch import save_file


def exchange(process_rank: int, rendezvous: Path, results: Path) -> None:
    """Join two processes, run every collective operation and save what each returns."""
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=process_rank, world_size=2)
    processes, first = Processes(process_rank, 2), process_rank == 0
    spec = LayerSpec(8, 32, 1, 4, 8, rank=1)
    tensors = {key: torch.ones(t.shape, dtype=t.dtypes[0]) for key, t in tensor_specs(spec).items()}
    groups = [
        processes.broadcast_group(
            GroupResult({"q_proj": tensors}, {"q_proj": 0.5}, clip=clip) if first else None,
            {"q_proj": spec},
            torch.device("cpu"),
        )
        for clip in (0.9, None)
    ]
    moments = Moments.zeros(4, torch.device("cpu"), cross_gram=True)
    inputs = torch.full((process_rank + 1, 4), 2.0)
    moments.add(inputs, inputs)
    processes.sum_moments(moments)
    whole = torch.arange(5.0 * 2 * 3).view(5, 2, 3)
    part = processes.scatter(whole if first else None)
    result = {
        "flags": torch.tensor(processes.broadcast_flags([first, False, True])),
        "clips": torch.tensor([-1.0 if group.clip is None else group.clip for group in groups]),
        "gram": moments.gram,
        "count": torch.tensor(moments.count),
        "part": part,
        "whole": processes.gather(part).clone(),
        **groups[0].tensors["q_proj"],
    }
    save_file(result, results / f"{process_rank}.safetensors")
    dist.destroy_process_group()
