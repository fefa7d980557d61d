"""The steps of a case: build the model, convert it, serve each of its forms. They run in a process of their own.

What a step needs is imported inside it, so that a process that only plans or reads results starts at once.
`benchmarks.coverage.worker` imports it beforehand.
"""

import gc
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.coverage.case import ORDINARY_TOKENS, Case

ORIGINAL, DEFAULTS = "original", "defaults"
"""Names of forms of a model besides the recipes: as it was, and converted with the default options."""

WITHOUT_TEXT = ("data-free",)
"""Recipes that use no calibration text."""

PROMPT = [1 + 17 * i % (ORDINARY_TOKENS - 1) for i in range(14)]
"""Token ids of the prompt, which is longer than the sliding windows."""

NEW_TOKENS, SCORED = 5, 20
"""Tokens of the answer, and tokens scored at each position."""

EXACT_BITS = 16
"""Bits of activations, head and embedding with which a converted model must equal its dequantized form. With a head in
binary planes it must do so too, because the activations that the head reads are not rounded either."""

NO_MEDIA = {"image": 0, "video": 0, "audio": 0}
"""Images, videos and sounds in a prompt."""

KV_CACHE_BYTES = 16 * 2**20
MAX_MODEL_LEN = 64

Answer = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A step of a case.

    Attributes:
        action: "build", "convert", "dequantize", "score" (by transformers, in float32) or "serve".
        form: `ORIGINAL`, `DEFAULTS`, a recipe, or a recipe with "-dequantized".
        needs: steps that must have succeeded.
        head_bits: bits of the head of a model that is converted with a recipe.
    """

    action: str
    form: str
    needs: tuple[str, ...] = ()
    head_bits: int = EXACT_BITS

    @property
    def name(self) -> str:
        """Return the step's name in results."""
        return f"{self.action} {self.form}"


def steps_of(recipes: Sequence[str], dtype: str = "float32", head_bits: int = EXACT_BITS) -> list[Step]:
    """Return the steps of a case, in the order in which they run.

    Where vLLM does not compute in float32, transformers does, with weights that are dequantized to float32: how far
    vLLM's log probabilities are from that, with dequantized weights that are rounded to the case's dtype, is how much
    rounding alone changes.

    Args:
        recipes: the recipes to try.
        dtype: dtype of the case.
        head_bits: bits of the head of the models that are converted with a recipe.
    """
    build = Step("build", ORIGINAL)
    steps = [build]
    for recipe in recipes:
        steps += [
            Step("convert", recipe, (build.name,), head_bits),
            Step("dequantize", recipe, (f"convert {recipe}",)),
        ]
        if dtype != "float32":
            steps.append(Step("score", recipe, (f"convert {recipe}",)))
    converted = (f"convert {recipe}" for recipe in recipes)
    steps += [Step("convert", DEFAULTS, (build.name,)), Step("serve", ORIGINAL, (build.name,))]
    for step in converted:
        recipe = step.removeprefix("convert ")
        steps += [
            Step("serve", f"{recipe}-dequantized", (f"dequantize {recipe}",)),
            Step("serve", recipe, (step,)),
        ]
    return [*steps, Step("serve", DEFAULTS, (f"convert {DEFAULTS}",))]


def run_step(step: Step, case: Case, folder: Path) -> Answer:
    """Run a step of a case in `folder`, which holds the forms of its model; return what is recorded about it."""
    actions: dict[str, Callable[[Step, Case, Path], Answer]] = {
        "build": _build,
        "convert": _convert,
        "dequantize": _dequantize,
        "score": _score,
        "serve": _serve,
    }
    start = time.monotonic()
    answer = actions[step.action](step, case, folder)
    return {**answer, "seconds": round(time.monotonic() - start, 1)}


def _build(_: Step, case: Case, folder: Path) -> Answer:
    from benchmarks.coverage.build import write_case

    return {"weights": write_case(case, folder / ORIGINAL)}


def _convert(step: Step, case: Case, folder: Path) -> Answer:
    """Convert the model: with recipe `fast` and the defaults, or with a recipe and everything else in 16 bits."""
    from bwla_converter.options import Calibration, Options
    from bwla_converter.pipeline import convert

    from benchmarks.coverage.build import TEXT_FILE

    source, out = folder / ORIGINAL, folder / step.form
    shutil.rmtree(out, ignore_errors=True)
    options: dict[str, Any] = {
        "restart": True,  # a run that was killed may have left an unfinished conversion
        "calibration": Calibration(str(source / TEXT_FILE), num_samples=8, max_seq_length=32),
        "device": "cpu",
        "threads": 1,
        "report": False,
        "text_samples": 0,
    }
    if step.form in WITHOUT_TEXT:
        del options["calibration"]
    if step.form != DEFAULTS:
        exact = dict.fromkeys(("bits", "embedding_bits"), EXACT_BITS)
        options |= {"recipe": step.form, "head_bits": step.head_bits, **exact}
    summary = convert(Options(str(source), out, **options))
    return {
        "linears": len(summary.linears),
        "quantized_weights": summary.weights,
        "bits_per_weight": round(summary.bits_per_weight, 3),
    }


def _dequantize(step: Step, case: Case, folder: Path) -> Answer:
    """Write the dequantized form of a converted model."""
    from bwla_converter.checkpoint.dequantize import write_dequantized

    out = folder / f"{step.form}-dequantized"
    shutil.rmtree(out, ignore_errors=True)
    return {"dequantized": write_dequantized(folder / step.form, out, case.dtype).linears}


def _score(step: Step, case: Case, folder: Path) -> Answer:
    """Return the log probabilities that transformers computes in float32 after each prompt token but the last."""
    import torch
    import transformers
    from bwla_converter.checkpoint.dequantize import write_dequantized

    exact = folder / f"{step.form}-float32"
    shutil.rmtree(exact, ignore_errors=True)
    write_dequantized(folder / step.form, exact, "float32")
    model_class = getattr(transformers, case.architecture)
    model = model_class.from_pretrained(exact, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, :-1]
    rows = torch.log_softmax(logits.float(), dim=-1).tolist()
    return {"logprobs": [{str(token): value for token, value in enumerate(row)} for row in rows]}


def _serve(step: Step, case: Case, folder: Path) -> Answer:
    """Start vLLM on a form of the model in this process; return tokens and log probabilities, or an embedding."""
    from vllm import LLM, ModelRegistry, SamplingParams

    model = folder / step.form
    (name,) = json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"]
    if hasattr(ModelRegistry.models.get(name), "load_model_cls"):
        # A registered class is inspected in this process; a lazy name, in one of its own for half a minute.
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    embeds = case.group == "embedding"
    engine = LLM(
        str(model),
        runner="pooling" if embeds else "generate",
        dtype=case.dtype,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=1,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **({"limit_mm_per_prompt": NO_MEDIA} if "vision_config" in case.settings else {}),
    )
    prompt = {"prompt_token_ids": PROMPT}
    try:
        if embeds:
            (result,) = engine.embed(prompt, use_tqdm=False)
            return {"embedding": list(result.outputs.embedding)}
        options = SamplingParams(
            temperature=0.0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            logprobs=SCORED,
            prompt_logprobs=SCORED,
        )
        (result,) = engine.generate(prompt, options, use_tqdm=False)
    finally:
        del engine
        gc.collect()
    (output,) = result.outputs
    tables = [*result.prompt_logprobs[1:], *output.logprobs]
    scores = [{str(token): value.logprob for token, value in table.items()} for table in tables]
    return {"tokens": list(output.token_ids), "logprobs": scores}
