"""Start vLLM engines in this process on damaged checkpoints, and compare their output with the undamaged one."""

import gc
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from bwla_converter.options import Options
from bwla_converter.pipeline import convert

from benchmarks.common.tiny_models import write_model
from bwla_vllm.errors import StartError
from tests.robustness.fuzz import HOST_ERRORS, Case, damage, make_checkpoints_with_planes, quiet
from tests.robustness.kinds import MAY_PASS, MUST_REFUSE

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
}
VOCABULARY = 256


def first_token(folder: Path, name: str) -> float:
    """Start an engine; return the log probability of the most likely token after a prompt."""
    from vllm import LLM, ModelRegistry, SamplingParams

    # vLLM inspects a registered class in this process, a lazy name in a subprocess that takes half a minute.
    if hasattr(ModelRegistry.models[name], "load_model_cls"):
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    engine = LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, skip_tokenizer_init=True,
        kv_cache_memory_bytes=16 * 2**20, disable_log_stats=True,
    )  # fmt: skip
    options = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, ignore_eos=True, detokenize=False)
    (answer,) = engine.generate({"prompt_token_ids": [3, 1, 4, 1, 5]}, options, use_tqdm=False)
    (table,) = answer.outputs[0].logprobs
    return float(next(iter(table.values())).logprob)


def judge_engine(folder: Path, name: str, must_refuse: bool) -> tuple[str, str]:
    """Serve a damaged checkpoint; return the outcome and the message, as `fuzz.judge` does."""
    try:
        with quiet():
            value = first_token(folder, name)
    except StartError as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("CRASH: no message", str(error))
    except HOST_ERRORS as error:
        return "refused by its host", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "crash of its host", f"{type(error).__name__}: {error}"
    finally:
        gc.collect()
    if value != value:
        return "SILENT: not finite", ""
    return ("SILENT: damage not detected", "") if must_refuse else ("serves", "")


def run_engines(count: int, seed: int, work: Path, on_case: Callable[[Case], None]) -> list[Case]:
    """Start an engine on each of `count` damaged checkpoints; return the outcomes."""
    os.environ.update(SETTINGS)
    own = work / "served"
    source = write_model(own / "qwen3", "Qwen3", shards=3, lively=True, vocab_size=VOCABULARY)
    origins = [own / "qwen3-bwla"]
    with quiet():
        convert(Options(str(source), origins[0], rank=2, recipe="data-free"))
        origins += make_checkpoints_with_planes(own)
    cases: list[Case] = []
    kinds = [*MUST_REFUSE, *MAY_PASS]
    rng = random.Random(seed)
    order = rng.sample(kinds, len(kinds)) * (1 + count // len(kinds))
    for number, mutate in enumerate(order[:count]):
        damaged = own / "damaged"
        found = damage(origins, damaged, mutate, rng)
        if found is None:
            continue
        origin, what = found
        (name,) = json.loads((origin / "config.json").read_text())["architectures"]
        outcome, message = judge_engine(damaged, name, mutate in MUST_REFUSE)
        cases.append(Case(number, "vllm", mutate.__name__, f"{origin.name}: {what}", outcome, message[:300]))
        on_case(cases[-1])
    return cases
