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
import hashlib
import json
import math
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import rich
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
MAX_WEIGHT_BYTES = 4_000_000  # the folder lives in git
SPEED_STEPS = 30  # with --minutes: steps measured before the number of steps is fixed
EXAMPLES = """examples:
  %(prog)s --text book1.txt book2.txt --valid other.txt --out my-model --minutes 20
  %(prog)s --text books/*.txt --valid valid.txt --test heldout.txt --out my-model --steps 3000
  %(prog)s --text book1.txt --valid other.txt --out try --steps 50 --warmup 10   # a quick look
"""


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, next to the text. Lengths are in tokens, `batch` in windows."""

    seed: int = 0
    window: int = 512
    batch: int = 8
    lr: float = 3e-3
    min_lr: float = 3e-5
    warmup: int = 200
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    autocast_bf16: bool = True
    compile: bool = False
    threads: int = 2


def model_config() -> Qwen3Config:
    """The example's shape: 1,968,064 parameters; hidden and intermediate sizes are multiples of 64."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


# --- text ---------------------------------------------------------------------------------------------


def read_documents(path: Path) -> list[str]:
    """The documents of one UTF-8 file; two or more blank lines separate documents. Byte order marks go.

    Raises ValueError when the file cannot be read, is not UTF-8 or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: expected a readable text file, found {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found another byte at {error.start}; convert it") from error
    parts = [part.strip() for part in re.split(r"\n{3,}", text.replace("\ufeff", ""))]
    documents = [part for part in parts if part]
    if not documents:
        raise ValueError(f"{path}: expected text, found only white space; give another file")
    return documents


def describe_file(path: Path) -> dict[str, object]:
    """Name, size in bytes and SHA-256 of one input file, for the record."""
    data = path.read_bytes()
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries; <|endoftext|> is entry 0.

    Raises ValueError when the text is too small to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        found = tokenizer.get_vocab_size()
        raise ValueError(f"--text: expected enough text for {VOCAB_SIZE} tokens, found {found}; give more text")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model_config().max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """One int64 stream [tokens]; every document starts with <|endoftext|>."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([i for encoding in encodings for i in (end, *encoding.ids)], dtype=torch.int64)


def load_stream(tokenizer: PreTrainedTokenizerFast, paths: list[Path], option: str, window: int) -> tuple[Tensor, int]:
    """The token stream of some files and the size of their text in bytes.

    Raises ValueError when there is less than one window and one token of it.
    """
    documents = [document for path in paths for document in read_documents(path)]
    stream = encode(tokenizer, documents)
    if len(stream) <= window:
        raise ValueError(f"{option}: expected more than {window} tokens, found {len(stream)}; give more text")
    return stream, sum(len(document.encode()) for document in documents)


def batches(stream: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless [batch, window + 1] batches. Each pass cuts the stream at a new random phase and shuffles it."""
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting = torch.empty(0, dtype=torch.int64)
    offsets = torch.arange(recipe.window + 1)
    while True:
        phase = int(torch.randint(recipe.window, (), generator=generator))
        starts = torch.arange(phase, len(stream) - recipe.window, recipe.window)
        waiting = torch.cat([waiting, starts[torch.randperm(len(starts), generator=generator)]])
        while len(waiting) >= recipe.batch:
            chosen, waiting = waiting[: recipe.batch], waiting[recipe.batch :]
            yield stream[chosen[:, None] + offsets]


# --- training -----------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int | None, recipe: Recipe) -> float:
    """Linear warm-up, then cosine from `lr` to `min_lr`; `steps` is not needed during the warm-up."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if steps is None:
        raise ValueError("the number of steps must be known after the warm-up")
    progress = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * progress))


def make_optimizer(model: Qwen3ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; matrices decay, norm weights do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, stream: Tensor, window: int, batch: int = 16, limit: int | None = None) -> float:
    """Mean next-token loss in nats over non-overlapping windows, each without any earlier context.

    A window of 512 tokens gives 511 predictions. `limit` takes that many windows, spread evenly.
    """
    windows = stream[: len(stream) // window * window].view(-1, window)
    if limit is not None and limit < len(windows):
        windows = windows[torch.linspace(0, len(windows) - 1, limit).long()]
    total = 0.0
    for chunk in windows.split(batch):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * (window - 1))


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

    Returns the record: steps, tokens seen, seconds, and the loss curve (a point every `every` steps: the mean
    training loss since the last point and the loss of 64 validation windows).
    """

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast_bf16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if recipe.compile else loss_of
    optimizer = make_optimizer(model, recipe)
    source = batches(data, recipe)
    curve: list[dict[str, float]] = []
    sums, since, step = torch.zeros(()), 0, 0
    start = speed_start = time.perf_counter()
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=math.nan, speed=0.0)
        while steps is None or step < steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe)
            loss = step_loss(next(source))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            sums, since = sums + loss.detach(), since + 1
            now = time.perf_counter()
            if step == 5:  # the first steps compile and warm up
                speed_start = now
            if steps is None and step == SPEED_STEPS:
                seconds_a_step = (now - speed_start) / (SPEED_STEPS - 5)
                steps = step + max(recipe.warmup, round((minutes * 60 - (now - start)) / seconds_a_step))
                console.print(f"{seconds_a_step:.3f} s a step: {steps} steps in about {minutes:g} minutes")
            speed = step * recipe.batch * recipe.window / (now - start)
            progress.update(task, advance=1, total=steps, loss=loss.item(), speed=speed)
            if step % every == 0 or step == steps:
                model.eval()
                checked = evaluate(model, valid, recipe.window, limit=64)
                model.train()
                train_loss = sums.item() / since
                if not math.isfinite(train_loss):
                    raise FloatingPointError(f"step {step}: the loss is not finite; use a lower --lr")
                curve.append({"step": step, "train_loss": round(train_loss, 4), "valid_loss": round(checked, 4)})
                console.print(f"step {step:5d}  train {train_loss:.4f}  valid {checked:.4f}  {speed:,.0f} tokens/s")
                sums, since = torch.zeros(()), 0
    return {
        "steps": step,
        "tokens_seen": step * recipe.batch * recipe.window,
        "passes_over_text": round(step * recipe.batch * recipe.window / len(data), 2),
        "training_seconds": round(time.perf_counter() - start, 1),
        "loss_curve": curve,
    }


# --- the record and the folder ------------------------------------------------------------------------


def scores(model: Qwen3ForCausalLM, stream: Tensor, text_bytes: int, window: int) -> dict[str, float]:
    """Loss (nats a token), perplexity, and bits a byte (which does not depend on the tokenizer)."""
    loss = evaluate(model, stream, window)
    bits = loss / math.log(2) * len(stream) / text_bytes
    return {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 3), "bits_per_byte": round(bits, 4)}


def processor_name() -> str:
    """The processor's name where the system tells it, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return str(names[0]) if names else platform.machine()


def command_line(arguments: list[str]) -> str:
    """The command with every path cut to its last part: folders are nobody's business."""
    parts = [Path(a).name if "/" in a or "\\" in a else a for a in arguments]
    return shlex.join(["python", "train_example.py", *parts])


def save_folder(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bfloat16), config, generation config and tokenizer to `out`.

    Raises ValueError when the weights are over `MAX_WEIGHT_BYTES`.
    """
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"model.safetensors: expected at most {MAX_WEIGHT_BYTES} bytes, found {size}; shrink the model")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; `--help` shows examples."""
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="train_example.py",
        description="Train the small example language model from scratch on plain text files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, metavar="FILE", help="text to watch the loss on")
    parser.add_argument("--test", type=Path, metavar="FILE", help="text scored once, at the end")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder for the model")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=20.0, help="how long to train (default: %(default)s)")
    length.add_argument("--steps", type=int, help="exact number of steps instead of --minutes")
    parser.add_argument("--seed", type=int, default=default.seed, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=default.lr, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=default.batch, help="windows a step (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=default.warmup, help="warm-up steps (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=default.weight_decay, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between loss records (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=default.threads, help="CPU threads (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: a little faster, needs g++")
    parser.add_argument("--fp32", action="store_true", help="compute in float32, for a CPU without bfloat16")
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, before any work, on values that cannot lead to a model."""
    for name in ("batch", "warmup", "every", "threads", "lr", "minutes"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name}: expected more than 0, found {getattr(args, name)}; give a positive number")
    if args.steps is not None and args.steps <= args.warmup:
        raise ValueError(f"--steps: expected more than --warmup ({args.warmup}), found {args.steps}; change one")
    if args.steps is None and args.warmup < SPEED_STEPS:
        raise ValueError(f"--warmup: expected at least {SPEED_STEPS} with --minutes, found {args.warmup}; raise it")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out}: expected a new or empty folder, found something there; choose another --out")


def run(arguments: list[str], console: Console) -> None:
    """Train, save, load the saved folder again and score that. Raises ValueError on bad input."""
    args = parse_arguments(arguments)
    check_arguments(args)
    recipe = Recipe(
        seed=args.seed,
        batch=args.batch,
        lr=args.lr,
        min_lr=args.lr / 100,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        autocast_bf16=not args.fp32,
        compile=args.compile,
        threads=args.threads,
    )
    began = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)

    files = {"train": args.text, "valid": [args.valid]} | ({"test": [args.test]} if args.test else {})
    tokenizer = train_tokenizer([document for path in args.text for document in read_documents(path)])
    streams = {name: load_stream(tokenizer, paths, f"--{name}", recipe.window) for name, paths in files.items()}
    model = Qwen3ForCausalLM(model_config())
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {len(streams['train'][0]):,} training tokens")
    record = train(
        model, streams["train"][0], streams["valid"][0], recipe, args.steps, args.minutes, args.every, console
    )
    save_folder(model.to(torch.bfloat16), tokenizer, args.out)

    # What counts is the file: bfloat16 weights, read back.
    saved = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).eval()
    final = {name: scores(saved, stream, size, recipe.window) for name, (stream, size) in streams.items()}
    result = {
        "command": command_line(arguments),
        "recipe": asdict(recipe),
        "parameters": parameters,
        "text": {name: [describe_file(path) for path in paths] for name, paths in files.items()},
        "text_tokens": {name: len(stream) for name, (stream, _) in streams.items()},
        **record,
        "final": final | {"note": f"saved bfloat16 weights, separate {recipe.window}-token windows, loss in nats"},
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
        "machine": {"processor": processor_name(), "threads": recipe.threads, "system": platform.system()},
    }
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rich.print(final)
    prompt = tokenizer("The old man", return_tensors="pt").input_ids
    console.print(tokenizer.decode(saved.generate(prompt, max_new_tokens=80, do_sample=False)[0]), markup=False)


def main() -> int:
    """Command-line entry point; returns the exit status."""
    console = Console()
    try:
        run(sys.argv[1:], console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
