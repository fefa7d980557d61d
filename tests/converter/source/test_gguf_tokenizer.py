"""Tokenizers of GGUF files: a saved tokenizer gives the same tokens, with the first token where llama.cpp puts it."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from bwla_converter.source.gguf_folder import write_folder
from bwla_kernels.errors import SourceError
from transformers import AutoTokenizer

NORMAL, CONTROL, BYTE = 1, 3, 6
TEXT = "the theme: hé 12\n"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

Extra = Callable[[gguf.GGUFWriter], None]


def byte_level(pre: str = "gpt-2", add_bos: bool | None = None, first: str = "<s>") -> Extra:
    """Return what adds a byte-level BPE tokenizer with a few merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["t h", "th e", "Ġ the"]
    alphabet = list(bytes_to_unicode().values())
    tokens = [first, "</s>", *alphabet, *(merge.replace(" ", "") for merge in merges)]

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 2)])
        writer.add_token_merges(merges)
        _add_special(writer, add_bos)

    return extra


def sentencepiece(add_bos: bool | None = None) -> Extra:
    """Return what adds a SentencePiece tokenizer with byte fallback."""
    pieces = ["▁", "t", "h", "e", "th", "the", "▁the", "m", ":"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -0.3, -0.2, -0.1, -5.0, -6.0])
        writer.add_token_types([2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)])
        _add_special(writer, add_bos, first=1)

    return extra


def _add_special(writer: gguf.GGUFWriter, add_bos: bool | None, first: int = 0) -> None:
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(first + 1)
    writer.add_chat_template(TEMPLATE)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)


@pytest.mark.parametrize(
    ("family", "extra", "adds_bos"),
    [
        ("Llama", byte_level(), False),
        ("Llama", byte_level("llama-bpe"), True),
        ("Llama", byte_level("llama-bpe", add_bos=False), False),
        ("Qwen2", byte_level("qwen2"), False),
        ("Qwen2", byte_level("qwen2", add_bos=True), True),
        ("Qwen3", byte_level("qwen2"), False),
        ("Phi-3", byte_level("gpt-4o"), False),
        ("Llama", sentencepiece(), True),
        ("Llama", sentencepiece(add_bos=False), False),
        ("Phi-3", sentencepiece(), True),
        ("Gemma 2", sentencepiece(add_bos=True), True),
        ("Gemma 3", sentencepiece(add_bos=True), True),
    ],
)
def test_the_saved_tokenizer_gives_the_same_tokens(
    make_gguf, tmp_path: Path, family: str, extra: Extra, adds_bos: bool
) -> None:
    file = make_gguf(family, extra=extra)
    write_folder(file, tmp_path / "folder")
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    saved = AutoTokenizer.from_pretrained(tmp_path / "folder")
    expected = read(TEXT, add_special_tokens=False).input_ids
    assert saved(TEXT, add_special_tokens=False).input_ids == expected
    assert saved(TEXT).input_ids == [saved.bos_token_id] * adds_bos + expected
    assert saved.decode(expected) == TEXT
    assert saved.eos_token == "</s>"
    assert saved.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_file_without_a_tokenizer(make_gguf, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(make_gguf(), tmp_path / "folder")
    assert not list((tmp_path / "folder").glob("tokenizer*"))
    assert "model.gguf: has no tokenizer" in caplog.text


def test_a_tokenizer_that_transformers_cannot_read(make_gguf, tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a", "b"])

    with pytest.raises(SourceError, match="cannot read its tokenizer, of the type rwkv"):
        write_folder(make_gguf(extra=extra), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
