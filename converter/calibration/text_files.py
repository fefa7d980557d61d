"""Read the texts of files: plain text or JSON, in UTF-8, UTF-16 or UTF-32, compressed or not."""

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bwla_kernels.errors import SourceError

KINDS = (".txt", ".jsonl", ".ndjson")
"""Suffixes of the files that are read from a folder."""

COMPRESSED: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    ".gz": (b"\x1f\x8b", gzip.decompress),
    ".bz2": (b"BZh", bz2.decompress),
    ".xz": (b"\xfd7zXZ\x00", lzma.decompress),
}
"""Suffixes of compressed files, with the bytes that such a file starts with."""

OTHER_FORMATS: dict[bytes, str] = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF document",
    b"\x28\xb5\x2f\xfd": "a file compressed by Zstandard",
    b"ARROW1": "an Arrow file",
}
"""Formats that people have text in and that are not read, by the bytes that they start with."""

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
"""Control characters that no text contains; tab, line and page breaks and the escape character are not among them."""

ALLOWED_CONTROLS = 1e-3
"""Largest share of control characters in a text."""

SAMPLE_BYTES = 2**20
"""How much of a file the detection of its encoding reads."""

Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]
"""Turns a conversation into text by the tokenizer's chat template."""


def read_texts(path: Path, render: Render, option: str = "--calibration") -> Iterator[str]:
    """Yield the texts of a file, or of all files of a folder whose suffixes are in `KINDS`.

    A plain text file is one text. A JSON file holds one object per line, or an array of them; an object's text is its
    "text", or its conversation in "messages" or "conversations" as the chat template renders it. Files may be
    compressed by gzip, bzip2 or xz. Their encoding is that of their byte-order mark, else UTF-8 or UTF-16.

    Args:
        path: the file or folder.
        render: renders a conversation, a list of {"role", "content"}.
        option: the command-line option that named the path, for the messages.

    Raises:
        SourceError: there is no such file, or it cannot be read as text; the message names file and line.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_text_file(file))
    if not files:
        raise SourceError(
            f"{option} {path}: expected a file or a folder with {', '.join(KINDS)} files (or these as .gz, .bz2 or "
            f".xz), found {'none of them' if path.exists() else 'nothing of that name'}: check the path"
        )
    empty = True
    for file in files:
        for text in _texts_of(file, render, option):
            empty = empty and not text.strip()
            yield text
    if empty:
        raise SourceError(f"{option} {path}: expected text, found none: the file is empty")


def _is_text_file(file: Path) -> bool:
    return file.is_file() and _plain_name(file).endswith(KINDS)


def _plain_name(file: Path) -> str:
    """Return the name of a file in lower case, without the suffix of a compression."""
    name = file.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def _texts_of(file: Path, render: Render, option: str) -> Iterator[str]:
    """Yield the texts of one file."""
    text = read_text(file, option)
    if not _is_json(file, text):
        yield text
        return
    for number, value in _json_values(file, text, option):
        where = f"{option} {file}, line {number}"
        found = _text_of(value, where, render)
        if match := SURROGATE.search(found):
            raise SourceError(
                f"{where}: expected Unicode text, found half of a surrogate pair, \\u{ord(match[0]):04x}: repair the "
                "text where it was cut"
            )
        yield found


def read_text(file: Path, option: str) -> str:
    """Read a text file in any Unicode encoding, compressed or not.

    Args:
        file: the file.
        option: the command-line option that named it, for the messages.

    Raises:
        SourceError: it cannot be read, is no text, or has another encoding.
    """
    where = f"{option} {file}"
    try:
        data = file.read_bytes()
    except OSError as cause:
        raise SourceError(f"{where}: the file cannot be read ({cause.strerror}): check it") from None
    for magic, decompress in COMPRESSED.values():
        if data.startswith(magic):
            try:
                data = decompress(data)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as cause:
                raise SourceError(
                    f"{where}: expected compressed text, found a damaged file ({cause}): copy it again"
                ) from None
            break
    for magic, title in OTHER_FORMATS.items():
        if data.startswith(magic):
            raise SourceError(
                f"{where}: expected text, found {title}: write its texts as lines of JSON, each an object with a "
                '"text"'
            )
    text = _decode(data, where)
    controls = sum(1 for _ in CONTROL.finditer(text))
    if controls > ALLOWED_CONTROLS * len(text):
        raise SourceError(
            f"{where}: expected text, found binary data ({controls:,} control characters): check the path"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, where: str) -> str:
    """Decode text by its byte-order mark, else as UTF-16 if it looks like that, else as UTF-8."""
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    encoding = BYTE_ORDER_MARKS[mark] if mark is not None else _utf16_without_mark(data) or "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as cause:
        problem = cause
    # Which 8-bit encoding it is cannot be known for certain, and a wrong guess would calibrate on noise.
    line = data[: problem.start].count(b"\n") + 1
    raise SourceError(
        f"{where}, line {line}: expected text in {encoding.upper()}, found the byte 0x{data[problem.start]:02x}: "
        "convert the file to UTF-8, for example with iconv -f WINDOWS-1252 -t UTF-8"
    ) from None


def _utf16_without_mark(data: bytes) -> str | None:
    """Return the UTF-16 encoding of text without a byte-order mark, which has a zero in most even or odd places."""
    sample = data[: SAMPLE_BYTES & ~1]
    if len(sample) < 2:
        return None
    zeros = [sample[start::2].count(0) / len(sample[start::2]) for start in (0, 1)]
    if max(zeros) > 0.4 and min(zeros) < 0.05:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return None


def _is_json(file: Path, text: str) -> bool:
    """Return whether a file holds JSON: by its suffix, or because its first line is a JSON object."""
    if _plain_name(file).endswith((".json", ".jsonl", ".ndjson")):
        return True
    start = text.lstrip()
    if start[:1] not in ("{", "["):
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(start)
    except ValueError:
        return False
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def _json_values(file: Path, text: str, option: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the value of every object of a JSON file: its lines, or the items of its array.

    Lines end with a newline only: JSON strings may contain the other separators that `str.splitlines` splits at. An
    array counts as one line.
    """
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as cause:
            raise _not_json(file, option, getattr(cause, "lineno", 1), str(cause)) from None
        yield from ((1, value) for value in values)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for place, (number, line) in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = _whole_value(text) if place == 0 else None
            if value is None:
                raise _not_json(file, option, number, repr(line[:60])) from None
            yield number, value
            return
        yield number, value


def _whole_value(text: str) -> Any:
    """Return the JSON value that takes a whole file, over several lines; None if there is no such value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _not_json(file: Path, option: str, line: int, found: str) -> SourceError:
    return SourceError(
        f'{option} {file}, line {line}: expected a JSON object with a "text" on each line, or an array of them, '
        f"found {found}"
    )


def _text_of(value: Any, where: str, render: Render) -> str:
    """Return the text of a JSON value: a string, or an object with a "text" or a conversation."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        text = value.get("text")
        if isinstance(text, str):
            return text
        for key in ("messages", "conversations"):
            if text is None and key in value:
                return _render(value[key], f'{where}, "{key}"', render)
        if "text" in value:
            raise SourceError(f'{where}: expected "text" to be a string, found {text!r:.60}')
    raise SourceError(
        f'{where}: expected an object with a "text" or with "messages", found {json.dumps(value):.60}'
    )


def _render(value: Any, where: str, render: Render) -> str:
    """Render a conversation, in the form of OpenAI ("role", "content") or of ShareGPT ("from", "value")."""
    roles = {"human": "user", "gpt": "assistant"}
    messages: Messages = []
    if not isinstance(value, list) or not value:
        raise SourceError(f"{where}: expected a list of messages, found {json.dumps(value):.60}")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            content = "".join(str(part["text"]) for part in content if isinstance(part.get("text"), str))
        if not isinstance(role, str) or not isinstance(content, str):
            raise SourceError(
                f'{where}: expected a "role" and a "content" in every message, both strings, found '
                f"{json.dumps(message):.60}"
            )
        messages.append({"role": roles.get(role, role), "content": content})
    try:
        return render(messages)
    except Exception as cause:  # a chat template can raise anything
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise SourceError(
            f"{where}: the tokenizer's chat template cannot render this conversation ({reason:.200}): correct it, or "
            'give its text as "text"'
        ) from None
