"""Text for the example model: reading plain text files, the tokenizer, and training batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_documents(path: Path) -> list[str]:
    """Return the documents of a UTF-8 file; two or more blank lines separate documents.

    Byte order marks are removed: some public-domain editions have them inside sentences.
    Raises ValueError when the file cannot be read, is not UTF-8 or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path}: expected a readable file, found {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, found a bad byte at {error.start}; convert it") from error
    parts = [part.strip() for part in re.split(r"\n{3,}", text.replace("\ufeff", ""))]
    documents = [part for part in parts if part]
    if not documents:
        raise ValueError(f"{path}: expected text, found only white space; give another file")
    return documents


def describe_file(path: Path) -> dict[str, object]:
    """Return the name, size in bytes and SHA-256 of an input file."""
    data = path.read_bytes()
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def train_tokenizer(documents: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `vocab_size` entries; <|endoftext|> (begin and end) is entry 0.

    Raises ValueError when the text is too small to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(f"--text: expected enough text for {vocab_size} tokens, found {found}; give more")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def load_stream(
    tokenizer: PreTrainedTokenizerFast, paths: list[Path], option: str, window: int
) -> tuple[Tensor, int]:
    """Return one int64 token stream [tokens] of several files, and the size of their text in bytes.

    Every document starts with <|endoftext|>. Raises ValueError when the text does not exceed one window.
    """
    documents = [document for path in paths for document in read_documents(path)]
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    stream = torch.tensor([i for encoding in encodings for i in (end, *encoding.ids)], dtype=torch.int64)
    if len(stream) <= window:
        raise ValueError(f"{option}: expected more than {window} tokens, found {len(stream)}; give more text")
    return stream, sum(len(document.encode()) for document in documents)


def batches(stream: Tensor, window: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield int64 batches [batch, window + 1] of `stream` [tokens] without end.

    Each pass over the text cuts it at a new random phase and takes the pieces in a new random order.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    offsets = torch.arange(window + 1)
    while True:
        phase = int(torch.randint(window, (), generator=generator))
        starts = torch.arange(phase, len(stream) - window, window)
        waiting = torch.cat([waiting, starts[torch.randperm(len(starts), generator=generator)]])
        while len(waiting) >= batch:
            chosen, waiting = waiting[:batch], waiting[batch:]
            yield stream[chosen[:, None] + offsets]
