"""Calibration and evaluation text of the benchmarks that measure perplexity on a real model."""

import argparse
import os
from pathlib import Path

from bwla_converter.calibration.text import load_tokenizer, tokenize
from bwla_converter.calibration.text_files import read_text
from bwla_converter.evaluation.perplexity import windows_of
from torch import Tensor

from benchmarks.common.real_models import MODELS, real_model
from benchmarks.common.record import ROOT

EXAMPLES = ROOT / "examples" / "text"


def add_text_options(parser: argparse.ArgumentParser, samples: int, length: int) -> None:
    """Add the options for the model and its text.

    Args:
        parser: the parser.
        samples, length: default number and length of the calibration samples.
    """
    add = parser.add_argument
    add("--model", default="smollm2-135m", help=f"{', '.join(MODELS)}, or a folder (smollm2-135m)")
    add("--num-calibration-samples", type=int, default=samples, help=f"calibration samples ({samples})")
    add("--max-seq-length", type=int, default=length, help=f"tokens of a calibration sample ({length})")
    add("--text", type=Path, default=EXAMPLES / "heldout.txt", help="evaluation text")
    add("--window", type=int, default=1024, help="tokens of an evaluation window (1024)")
    add("--limit", type=int, default=16, help="number of evaluation windows, the first of the text (16)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads (all cores)")
    add("--work", type=Path, help="folder for the conversions (a temporary one)")


def model_folder(name: str) -> Path:
    """Return the folder of a model that `--model` names."""
    return real_model(name) if name in MODELS else Path(name)


def evaluation_windows(model: Path, arguments: argparse.Namespace) -> Tensor:
    """Return the first windows [W, T] of token ids of the evaluation text.

    Raises:
        SourceError: the text or the tokenizer cannot be used.
    """
    texts = [read_text(arguments.text, "--text")]
    ids = tokenize(load_tokenizer(model), texts, model, f"--text {arguments.text}")
    return windows_of(ids, arguments.window)[: arguments.limit]
