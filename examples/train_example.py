"""Train the small example language model from scratch on plain text files, on a CPU.

It makes a byte-level BPE tokenizer (vocabulary 2048) and a Qwen3-architecture causal language model
(4 layers, hidden size 192, about 2 million parameters), and writes a folder that `AutoTokenizer` and
`AutoModelForCausalLM` load, plus `training.json`, the record of the run.

The same text, seed, steps, thread count and library versions on the same kind of processor give the same
weights, bit for bit. `--minutes` measures the speed first and then fixes the number of steps; the record
holds that number, so `--steps` repeats such a run exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.example_text import batches, describe_file, load_stream, read_documents, train_tokenizer

MAX_WEIGHT_BYTES = 4_000_000  # the folder lives in git
SCORED_WINDOWS = 600  # about 300,000 tokens
SPEED_STEPS = 30  # with --minutes: steps that are timed before the number of steps is fixed
EXAMPLES = """examples:
  %(prog)s --text book1.txt book2.txt --valid other.txt --out my-model --minutes 20
  %(prog)s --text books/*.txt --valid valid.txt --test heldout.txt --out my-model --steps 3000
  %(prog)s --text book1.txt --valid other.txt --out try --steps 50 --warmup 10   # a quick look
"""


@dataclass(frozen=True)
class Recipe:
    """Training hyperparameters; sizes are in tokens.

    Most steps use short windows, which are faster; the last ones train the positions of the long window.
    """

    seed: int = 0
    window: int = 512
    short_window: int = 256
    short_part: float = 0.8
    batch: int = 4096
    lr: float = 6e-3
    warmup: int = 200
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    bf16: bool = True
    threads: int = 2


def model_config(**changes: object) -> Qwen3Config:
    """Return the example's config (1,968,064 parameters), with `changes`; hidden sizes are multiples of 64.

    `changes` replace entries of the config.
    """
    shape: dict[str, object] = {
        "vocab_size": 2048,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.06,  # about 1 / sqrt(hidden_size) learns faster here than the usual 0.02
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return Qwen3Config(**{**shape, **changes})


def learning_rate(step: int, steps: int | None, recipe: Recipe) -> float:
    """Return the learning rate: linear warm-up, cosine decay to `lr` / 100; the warm-up does not need `steps`."""
    if step < recipe.warmup or steps is None:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / (steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Qwen3ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay for matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, stream: Tensor, window: int, limit: int | None = None) -> float:
    """Return the mean next-token loss in nats over non-overlapping windows of `stream`, int64 [tokens].

    Windows share no context, so 512 tokens give 511 predictions. With `limit`, only that many windows are used, spread
    evenly over the stream.
    """
    windows = stream[: len(stream) // window * window].view(-1, window)
    if limit is not None and limit < len(windows):
        windows = windows[torch.linspace(0, len(windows) - 1, limit).long()]
    total = 0.0
    for chunk in windows.split(16):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * (window - 1))


def steps_for(minutes: float, seconds_a_step: float, recipe: Recipe) -> int:
    """Return the number of steps that fit into `minutes`, at least twice the warm-up."""
    return max(2 * recipe.warmup, round(minutes * 60 / seconds_a_step))


def train(
    model: Qwen3ForCausalLM,
    data: Tensor,
    valid: Tensor,
    recipe: Recipe,
    steps: int | None,
    minutes: float,
    every: int,
    console: Console,
) -> dict[str, object]:
    """Train `model` in place for `steps`, or for about `minutes` when `steps` is None.

    `data` and `valid` are int64 streams [tokens]. Returns the steps, tokens seen, seconds, and the loss
    curve: every `every` steps the mean training loss since the last point and the loss of 48 validation
    windows. Raises FloatingPointError when the loss stops being finite.
    """

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    optimizer = make_optimizer(model, recipe)
    short = batches(data, recipe.short_window, recipe.batch // recipe.short_window, recipe.seed)
    long = batches(data, recipe.window, recipe.batch // recipe.window, recipe.seed + 1)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    step = 0
    start = settled = time.perf_counter()
    loss_text, speed_text = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
    )
    columns = (
        loss_text,
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        TextColumn("left"),
        Remaining(),
        speed_text,
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=math.nan, speed=0.0)
        while steps is None or step < steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe)
            is_short = steps is None or step < recipe.short_part * steps
            loss = loss_of(next(short if is_short else long))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"step {step}: the loss is {losses[-1]}; use a lower --lr")
            now = time.perf_counter()
            if step == SPEED_STEPS // 3:  # the first steps fill caches
                settled = now
            if steps is None and step == SPEED_STEPS:
                steps = steps_for(minutes, (now - settled) / (SPEED_STEPS - SPEED_STEPS // 3), recipe)
                console.print(f"{steps} steps fit into about {minutes:g} minutes")
            speed = step * recipe.batch / (now - start)
            progress.update(task, advance=1, total=steps, loss=losses[-1], speed=speed)
            if step % every == 0 or step == steps:
                mean = sum(losses) / len(losses)
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                    checked = evaluate(model, valid, recipe.window, limit=48)
                curve.append({"step": step, "train_loss": round(mean, 4), "valid_loss": round(checked, 4)})
                console.print(f"step {step:5d}  train {mean:.4f}  valid {checked:.4f}  {speed:,.0f} tokens/s")
                losses.clear()
    return {
        "steps": step,
        "tokens_seen": step * recipe.batch,
        "passes_over_text": round(step * recipe.batch / len(data), 2),
        "training_seconds": round(time.perf_counter() - start, 1),
        "loss_curve": curve,
    }


def scores(model: Qwen3ForCausalLM, stream: Tensor, text_bytes: int, window: int) -> dict[str, float]:
    """Return the loss (nats per token), the perplexity, and bits per byte, which do not depend on the tokenizer.

    A long text is scored on `SCORED_WINDOWS` windows, spread evenly.
    """
    loss = evaluate(model, stream, window, limit=SCORED_WINDOWS)
    bits = loss / math.log(2) * len(stream) / text_bytes
    return {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 3), "bits_per_byte": round(bits, 4)}


def processor_name() -> str:
    """Return the processor's name on Linux, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return str(names[0]) if names else platform.machine()


def save_folder(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, config, generation config and tokenizer to `out`.

    Raises ValueError when the weights are over `MAX_WEIGHT_BYTES`.
    """
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(
            f"model.safetensors: expected at most {MAX_WEIGHT_BYTES} bytes, found {size}; shrink it"
        )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; `--help` shows examples."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_example",
        description="Train the small example language model from scratch on plain text files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, recipe = parser.add_argument, Recipe()
    add("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text to train on")
    add("--valid", type=Path, required=True, metavar="FILE", help="text for the validation loss")
    add("--test", type=Path, metavar="FILE", help="text scored once, at the end")
    add("--out", type=Path, required=True, metavar="DIR", help="new or empty folder for the model")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=20.0, help="training time (default: %(default)s)")
    length.add_argument("--steps", type=int, help="exact number of steps instead of --minutes")
    add("--seed", type=int, default=recipe.seed, help="(default: %(default)s)")
    add("--lr", type=float, default=recipe.lr, help="highest learning rate (default: %(default)s)")
    add("--batch", type=int, default=recipe.batch, help="tokens per step (default: %(default)s)")
    add("--warmup", type=int, default=recipe.warmup, help="warm-up steps (default: %(default)s)")
    add("--every", type=int, default=100, help="steps between loss records (default: %(default)s)")
    add("--threads", type=int, default=recipe.threads, help="CPU threads (default: %(default)s)")
    add("--fp32", action="store_true", help="compute in float32, for a CPU without bfloat16 instructions")
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError on invalid options."""
    for name in ("batch", "warmup", "every", "threads", "lr", "minutes"):
        value = getattr(args, name)
        if value <= 0:
            raise ValueError(f"--{name}: expected more than 0, found {value}; give a positive number")
    if args.batch % Recipe.window:
        raise ValueError(f"--batch: expected a multiple of {Recipe.window}, found {args.batch}; change it")
    if args.steps is not None and args.steps <= args.warmup:
        raise ValueError(
            f"--steps: expected more than --warmup {args.warmup}, found {args.steps}; change one"
        )
    if args.steps is None and args.warmup < SPEED_STEPS:
        raise ValueError(f"--warmup: --minutes needs at least {SPEED_STEPS}, found {args.warmup}; raise it")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(
            f"{args.out}: expected a new or empty folder, found files in it; choose another --out"
        )


def command_line(arguments: list[str]) -> str:
    """Return the command line, with the last component of each path only."""
    return shlex.join(
        ["python", "-m", "examples.train_example", *(Path(a).name if "/" in a else a for a in arguments)]
    )


def run(arguments: list[str], console: Console) -> None:
    """Train, save, read the saved folder back and score that. Raises ValueError on bad input."""
    args = parse_arguments(arguments)
    check_arguments(args)
    chosen = {name: getattr(args, name) for name in ("seed", "batch", "lr", "warmup", "threads")}
    recipe = Recipe(**chosen, bf16=not args.fp32)
    began = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)

    config = model_config()
    files = {"text": args.text, "valid": [args.valid]} | ({"test": [args.test]} if args.test else {})
    documents = {path: read_documents(path) for paths in files.values() for path in paths}
    texts = [document for path in args.text for document in documents[path]]
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_position_embeddings)
    streams = {name: load_stream(tokenizer, files[name], f"--{name}", recipe.window) for name in files}
    data, valid = streams["text"][0], streams["valid"][0]
    model = Qwen3ForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {len(data):,} training tokens")
    record = train(model, data, valid, recipe, args.steps, args.minutes, args.every, console)
    save_folder(model.to(torch.bfloat16), tokenizer, args.out)

    # Score the bfloat16 weights as written.
    saved = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16)
    final = {name: scores(saved, *streams[name], recipe.window) for name in streams}
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    result = {
        "command": command_line(arguments),
        "recipe": asdict(recipe),
        "parameters": parameters,
        "files": {name: [describe_file(path) for path in paths] for name, paths in files.items()},
        "tokens": {name: len(stream) for name, (stream, _) in streams.items()},
        **record,
        "final_note": f"saved bfloat16 weights, separate {recipe.window}-token windows, loss in nats a token",
        "final": final,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": {"processor": processor_name(), "threads": recipe.threads, "system": platform.system()},
    }
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print_json(data=final)
    prompt = tokenizer("The old man", return_tensors="pt").input_ids
    sample = saved.generate(prompt, max_new_tokens=80, do_sample=False)
    console.print(tokenizer.decode(sample[0]), markup=False, soft_wrap=True)


def main() -> int:
    """Command-line entry point; returns the exit status."""
    console = Console()
    try:
        run(sys.argv[1:], console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
