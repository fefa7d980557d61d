"""What the server of `benchmarks.coverage.worker` imports, so that processes forked from it need not."""

import gc
import importlib

from benchmarks.coverage import torchvision_stand_in

MODULES = (
    "bwla_converter.cli",  # says how OpenMP waits, before torch is imported
    "bwla_converter.pipeline",
    "bwla_converter.checkpoint.dequantize",
    "bwla_kernels.ops",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "benchmarks.coverage.build",
    "benchmarks.coverage.worker",
)

torchvision_stand_in.install()
for module in MODULES:
    importlib.import_module(module)
# No process has to search what all of them share for garbage.
gc.freeze()
