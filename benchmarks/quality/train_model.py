"""Train a larger model than the example for quality benchmarks, or continue to train an existing one.

    python -m benchmarks.quality.train_model --text books/*.txt --valid other.txt --out my-model --minutes 120
    python -m benchmarks.quality.train_model --start FOLDER --text books/*.txt --valid other.txt --out my-model

Without `--start`, a Qwen3 model with 16.6 million parameters is trained from scratch. The folder should be outside of
the repository; `training.json`, the record of the run, is kept in benchmarks/results.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common.record import write_result
from examples.example_text import describe_file, load_stream, read_documents, train_tokenizer
from examples.train_example import Recipe, model_config, scores, train


def new_config(width: int, layers: int) -> Qwen3Config:
    """Return a Qwen3 config of `width` (a multiple of 128): heads of 64, MLP three times as wide, untied head."""
    return model_config(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        head_dim=64,
        initializer_range=width**-0.5,
        tie_word_embeddings=False,
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, help="folder of the model to go on with")
    parser.add_argument("--width", type=int, default=384, help="hidden size of a new model")
    parser.add_argument("--layers", type=int, default=6, help="blocks of a new model")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to watch the loss on")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--batch", type=int, default=4096, help="tokens a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out}: exists already; choose another folder")
    return arguments


def main() -> None:
    """Train, save in bfloat16, score what was saved."""
    arguments = parse_arguments()
    console = Console()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.start:
        tokenizer = AutoTokenizer.from_pretrained(arguments.start)
        model = AutoModelForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
    else:
        texts = [document for path in arguments.text for document in read_documents(path)]
        config = new_config(arguments.width, arguments.layers)
        tokenizer = train_tokenizer(texts, config.vocab_size, config.max_position_embeddings)
        model = Qwen3ForCausalLM(config)
    chosen = {name: getattr(arguments, name) for name in ("seed", "batch", "lr", "threads")}
    recipe = replace(Recipe(), **chosen, warmup=50)
    files = {"text": arguments.text, "valid": [arguments.valid]}
    streams = {
        name: load_stream(tokenizer, paths, f"--{name}", recipe.window) for name, paths in files.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{parameters:,} parameters, {len(streams['text'][0]):,} training tokens")
    started = time.monotonic()
    record = train(
        model, streams["text"][0], streams["valid"][0], recipe, None, arguments.minutes, 50, console
    )
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    saved = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    final = {name: scores(saved, *stream, recipe.window) for name, stream in streams.items()}
    write_result(
        arguments.out / "training.json",
        [],
        start=arguments.start.name if arguments.start else None,
        recipe=asdict(recipe),
        parameters=parameters,
        files={name: [describe_file(path) for path in paths] for name, paths in files.items()},
        seconds=round(time.monotonic() - started, 1),
        final=final,
        **record,
    )
    console.print_json(json.dumps(final))


if __name__ == "__main__":
    main()
