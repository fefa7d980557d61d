"""What the server of `benchmarks.coverage.worker` imports, so that processes forked from it need not."""

import gc

from benchmarks.coverage import torchvision_stand_in

torchvision_stand_in.install()

import bwla_converter.checkpoint.dequantize

# How OpenMP waits is said before torch is imported.
import bwla_converter.cli
import bwla_converter.pipeline  # noqa: F401
import bwla_kernels.ops  # noqa: F401
import vllm.entrypoints.llm
import vllm.model_executor.model_loader
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker  # noqa: F401

import benchmarks.coverage.build
import benchmarks.coverage.worker  # noqa: F401

# No process has to search what all of them share for garbage.
gc.freeze()
