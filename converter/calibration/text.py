"""Text for calibration -> windows of tokens."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bwla_converter.options import Calibration
from bwla_kernels.errors import SourceError
from torch import Tensor
from transformers import AutoTokenizer

TEXT_FILES = ("*.txt", "*.jsonl")


DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "wikitext2-test": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
    },
}
"""Names that stand for a dataset of the Hub, and how the `datasets` library finds it."""

DATASET_CHARACTERS = 20_000_000


def dataset_text(name: str) -> str:
    """The beginning of a dataset, its texts one after the other.

    Raises:
        SourceError: the library is missing or the Hub did not give it.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise SourceError(
            f"calibration {name}: needs the datasets library: pip install 'bwla[eval]', or give a text file"
        ) from None
    try:
        rows = load_dataset(**DATASETS[name], streaming=True)
        parts, size = [], 0
        for row in rows:
            parts.append(row["text"])
            size += len(parts[-1])
            if size > DATASET_CHARACTERS:
                break
    except Exception as cause:  # the library raises many kinds, of the network and of its own
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"calibration {name}: the Hub did not give it ({reason:.200}): check the network, or give a text file"
        ) from None
    return "\n".join(parts)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file or of all files of a folder; of JSON lines, each object's "text".

    Raises:
        SourceError: nothing to read, or a line that is no such object.
    """
    files = [path] if path.is_file() else sorted(file for kind in TEXT_FILES for file in path.rglob(kind))
    if not files:
        raise SourceError(f"calibration {path}: expected a file or a folder with .txt or .jsonl, found none")
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            yield text
            continue
        for number, line in enumerate(text.splitlines(), 1):
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise SourceError(
                    f'calibration {file}, line {number}: expected an object with a "text", found {line[:60]!r}'
                ) from None


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        SourceError: it has none, or a damaged one.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as cause:  # the libraries raise many kinds for damaged files
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{model}: calibration text needs the model's tokenizer, which cannot be read ({reason:.200}): "
            "put tokenizer.json and tokenizer_config.json there, or use recipe paper"
        ) from None


def calibration_samples(calibration: Calibration, model: Path, seed: int) -> tuple[Tensor, str]:
    """Random windows of the calibration text.

    Args:
        calibration: what text, how much of it.
        model: folder of the tokenizer.
        seed: chooses the windows.

    Returns: token ids [samples, length], and the SHA-256 of the text that was read.

    Raises:
        SourceError: no text, or less than one window of it.
    """
    name = calibration.source
    texts = [dataset_text(name)] if name in DATASETS else list(read_texts(Path(name).expanduser()))
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    tokenizer = load_tokenizer(model)
    pieces = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts]
    ids = torch.cat(pieces)
    room = len(ids) - calibration.max_seq_length
    if room < 0:
        raise SourceError(
            f"calibration {calibration.source}: expected at least {calibration.max_seq_length} tokens, found {len(ids)}"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, room + 1, (calibration.num_samples,), generator=generator).tolist()
    return torch.stack([ids[start : start + calibration.max_seq_length] for start in starts]), digest
