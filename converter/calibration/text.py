"""Read calibration text and cut samples of tokens from it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bwla_converter.calibration.text_files import Messages, read_texts
from bwla_converter.options import SELF, Calibration
from bwla_kernels.errors import SourceError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "wikitext2-test": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
    },
}
"""Names of datasets on the Hub, with the arguments by which the `datasets` library loads them."""

MAX_HELD_OUT_TOKENS = 8192
"""Tokens of calibration text that are kept apart from the samples at most, to measure the loss on."""

DATASET_CHARACTERS = 20_000_000
"""How much of a dataset is read."""


def dataset_text(name: str) -> str:
    """Return the first texts of a dataset, joined by an empty line as in GPTQ's and most later scripts.

    Raises:
        SourceError: the `datasets` library is not installed, or the dataset cannot be downloaded.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise SourceError(
            f"dataset {name}: expected the datasets library, found that it is not installed: run "
            "pip install 'bwla[eval]', or use a text file"
        ) from None
    try:
        rows = load_dataset(**DATASETS[name], streaming=True)
        parts, size = [], 0
        for row in rows:
            parts.append(row["text"])
            size += len(parts[-1])
            if size > DATASET_CHARACTERS:
                break
    except Exception as cause:  # the library has no common base class for its own and the network's errors
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"dataset {name}: the dataset cannot be downloaded ({reason:.200}): check the network, "
            "or use a text file"
        ) from None
    return "\n\n".join(parts)


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model's folder.

    Raises:
        SourceError: it is missing or damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        # Without its files, transformers may return a tokenizer that knows special tokens only.
        if len(tokenizer.get_vocab()) > len(tokenizer.all_special_tokens):
            return tokenizer
        reason = "its vocabulary is empty"
    except Exception as cause:  # damaged files raise errors of many types
        reason = " ".join(str(cause).split())
    raise SourceError(
        f"{model}: expected the model's tokenizer, found that it cannot be loaded ({reason:.200}): add "
        "tokenizer.json and tokenizer_config.json to the folder, or use recipe data-free, which needs no text"
    )


def calibration_samples(calibration: Calibration, model: Path, seed: int) -> tuple[Tensor, str]:
    """Cut random samples from the calibration text, or return those that the model has written.

    Args:
        calibration: which text to use, and how much of it.
        model: folder of the tokenizer.
        seed: seed of the choice of samples.

    Returns: token ids [num_samples, max_seq_length], and the SHA-256 of the text.

    Raises:
        SourceError: there is no text, or less than one sample of it.
    """
    if calibration.source == SELF:
        samples = written_samples(calibration)
        return samples[: calibration.num_samples], hashlib.sha256(samples.numpy().tobytes()).hexdigest()
    ids, digest = _read_ids(calibration, model)
    length = calibration.max_seq_length
    return torch.stack(
        [ids[start : start + length] for start in _starts(len(ids), calibration, seed)]
    ), digest


def held_out_tokens(calibration: Calibration) -> int:
    """Return how many tokens are kept apart from the calibration samples: as many as these have, up to a limit.

    Measuring the loss on them takes about as long as calibrating on as many samples.
    """
    return min(calibration.num_samples * calibration.max_seq_length, MAX_HELD_OUT_TOKENS)


def held_out_samples(calibration: Calibration, model: Path, seed: int, tokens: int) -> Tensor | None:
    """Cut samples from the calibration text that do not overlap with those of `calibration_samples`.

    Args:
        calibration, model, seed: as in `calibration_samples`.
        tokens: how many tokens to return at most.

    Returns: token ids [S, max_seq_length]; None if there is no text left.
    """
    length = calibration.max_seq_length
    if calibration.source == SELF:
        others = written_samples(calibration)[calibration.num_samples :]
        return others[: max(1, tokens // length)] if len(others) else None
    ids, _ = _read_ids(calibration, model)
    unused = torch.ones(len(ids), dtype=torch.bool)
    for start in _starts(len(ids), calibration, seed):
        unused[start : start + length] = False
    samples: list[Tensor] = []
    start = 0
    while start + length <= len(ids) and len(samples) * length < tokens:
        used = (~unused[start : start + length]).nonzero()
        if len(used):
            start += int(used[-1]) + 1
        else:
            samples.append(ids[start : start + length])
            start += length
    return torch.stack(samples[: max(1, tokens // length)]) if samples else None


def written_samples(calibration: Calibration) -> Tensor:
    """Return the token ids [S, max_seq_length] of all samples that the model has written itself."""
    if calibration.written is None:
        raise SourceError("--calibration self: expected the text that the model has written, found none")
    ids: Tensor = load_file(calibration.written)["ids"]
    return ids.long()


def _read_ids(calibration: Calibration, model: Path) -> tuple[Tensor, str]:
    """Return the token ids of the whole calibration text [T], and the text's SHA-256."""
    name = calibration.source
    tokenizer = load_tokenizer(model)

    def render(messages: Messages) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        # The tokenizer adds the token again.
        return text.removeprefix(tokenizer.bos_token or "")

    path = Path(name).expanduser()
    texts = [dataset_text(name)] if name in DATASETS else list(read_texts(path, render))
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return tokenize(tokenizer, texts, model, f"--calibration {name}"), digest


def tokenize(tokenizer: Any, texts: Iterable[str], model: Path, text_name: str) -> Tensor:
    """Return the token ids of texts, one after the other, [T].

    Args:
        tokenizer: the model's tokenizer.
        texts: the texts; empty ones are skipped.
        model: folder of the model.
        text_name: the option and the name of the text, for messages.

    Raises:
        SourceError: a token is not in the model's vocabulary, or the text has no tokens.
    """
    pieces = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts if text]
    ids = torch.cat(pieces).long() if pieces else torch.empty(0, dtype=torch.long)
    if not len(ids):
        raise SourceError(
            f"{text_name}: expected tokens, found none: check the text and {model / 'tokenizer.json'}"
        )
    vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    largest = int(ids.max())
    if largest >= vocabulary:
        raise SourceError(
            f"{model}: expected token ids below {vocabulary}, the vocab_size of config.json, found {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}) in {text_name}: the tokenizer belongs to another model, "
            "put this model's tokenizer files in the folder"
        )
    return ids


def _starts(length: int, calibration: Calibration, seed: int) -> list[int]:
    """Return the first token of each calibration sample in a text of `length` tokens."""
    last_start = length - calibration.max_seq_length
    if last_start < 0:
        raise SourceError(
            f"--calibration {calibration.source}: expected at least {calibration.max_seq_length} tokens "
            f"(--max-seq-length), found {length}: use more text, or a smaller --max-seq-length"
        )
    generator = torch.Generator().manual_seed(seed)
    starts: list[int] = torch.randint(
        0, last_start + 1, (calibration.num_samples,), generator=generator
    ).tolist()
    return starts
