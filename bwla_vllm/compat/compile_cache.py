"""Let a restarted vLLM reuse the kernels that it compiled for a CPU.

vLLM saves a compiled model ahead of time (`VLLM_USE_AOT_COMPILE`, its default since torch 2.10). What it saves on a CPU
it cannot load: its loader expects the function that its own compiler returns
(vllm/compilation/decorators.py, `_try_load_aot_compiled_fn`: `finalize_loading`), but on a CPU it hands the model to
torch's compiler (vllm/platforms/cpu.py, `DYNAMO_TRACE_ONCE`). So every start compiles again. Without that path, torch's
own cache of compiled graphs is read.
"""

import os
from typing import Any

from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from bwla_vllm.compat.releases import outside_tested_range

logger = init_logger("vllm.bwla")

VARIABLE = "VLLM_USE_AOT_COMPILE"
"""vLLM's environment variable; a value that the user gave is kept."""


def reuse_compiled_graphs(config: Any, release: str) -> bool:
    """Disable vLLM's ahead-of-time compilation where it cannot load what it saved; return whether it was disabled.

    Args:
        config: vLLM's config while it builds the model, which is before it compiles it.
        release: vLLM's release. An untested one may have been mended, so it is left alone.
    """
    if (
        VARIABLE in os.environ
        or not current_platform.is_cpu()
        or config.compilation_config.mode != CompilationMode.DYNAMO_TRACE_ONCE
        or outside_tested_range(release) is not None
    ):
        return False
    os.environ[VARIABLE] = "0"
    logger.info_once(
        "BWLA: %s=0 is set, because vLLM %s cannot load what it compiled ahead of time for a CPU; torch's cache of "
        "compiled graphs makes the next start faster",
        VARIABLE,
        release,
    )
    return True
