"""The tokenizer of a GGUF file, read by transformers."""

import logging
from pathlib import Path

from bwla_converter.source.gguf_file import GGUFFile
from bwla_kernels.errors import SourceError
from transformers import AutoTokenizer

MODEL, PRE, ADD_BOS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"
NO_TOKENIZER = (None, "none", "no_vocab")

BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Pre-tokenizers with which llama.cpp puts the first token before a text unless the file says otherwise."""


def save_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Save the tokenizer and the chat template of a GGUF file in `folder`; nothing if the file has no tokenizer.

    Raises:
        SourceError: transformers cannot read the tokenizer.
    """
    model = file.metadata.get(MODEL)
    if model in NO_TOKENIZER:
        logging.getLogger(__name__).warning("%s: has no tokenizer", file.path.name)
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as cause:  # transformers raises many types of exceptions for unusual vocabularies
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{file.path}: transformers cannot read its tokenizer, of the type {model} ({reason:.200}): use another "
            "file of this model"
        ) from None
    # transformers reads the vocabulary without this setting.
    tokenizer.add_bos_token = adds_bos(file) and tokenizer.bos_token is not None
    tokenizer.save_pretrained(folder)


def adds_bos(file: GGUFFile) -> bool:
    """Return whether llama.cpp puts the beginning-of-sequence token before a text."""
    default = file.metadata.get(MODEL) == "llama" or file.metadata.get(PRE) in BOS_BY_DEFAULT
    return bool(file.metadata.get(ADD_BOS, default))
