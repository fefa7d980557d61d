"""Read the texts of files: plain text or JSON, in UTF-8, UTF-16 or UTF-32, compressed or not."""

import bz2
import codecs
import gzip
import json
import lzma
import re
import string
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
    ".lzma": (b"]\x00\x00", lzma.decompress),
}
"""Suffixes of compressed files, with the bytes that such a file starts with."""

_AS_JSON = 'write its texts as lines of JSON, each an object with a "text"'
_UNPACK = "unpack it and give the file or folder with its text"
OTHER_FORMATS: dict[bytes, tuple[str, str]] = {
    b"PAR1": ("a Parquet file", _AS_JSON),
    b"ARROW1": ("an Arrow file", _AS_JSON),
    b"SQLite format 3\x00": ("an SQLite database", _AS_JSON),
    b"\x89HDF\r\n": ("an HDF5 file", _AS_JSON),
    b"%PDF": ("a PDF document", _AS_JSON),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": ("a RAR archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a file compressed by Zstandard", "decompress it with zstd -d"),
    b"\x04\x22\x4d\x18": ("a file compressed by LZ4", "decompress it with lz4 -d"),
    b"\x1f\x9d": ("a file compressed by compress", "decompress it with gzip -d"),
    b"version https://git-lfs": ("a Git LFS pointer instead of the file", "run git lfs pull"),
}
"""Formats that people have text in and that are not read, by the bytes that they start with, and what to do."""

TAR = (257, b"ustar")
"""Place and bytes by which a tar archive is recognized."""

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

FEWEST_UNITS = 64
"""Shortest text, in code units, whose UTF-16 encoding is recognized without a byte-order mark."""

LETTERS = frozenset(b" \n" + string.ascii_letters.encode())
"""Bytes that most of a text in an 8-bit encoding consists of."""

CONVERSATION_KEYS = ("messages", "conversations", "conversation")
"""Keys of a conversation: OpenAI's, ShareGPT's and LMSYS's."""

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's roles, as chat templates call them."""

_JSON_START = re.compile(r'\s*(\[\s*)*\{\s*"(\\.|[^"\\])*"\s*:')
"""The start of a JSON object, or of an array of them, in text that a person did not write."""

Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]
"""Turns a conversation into text by the tokenizer's chat template."""


def read_texts(path: Path, render: Render, option: str = "--calibration") -> Iterator[str]:
    """Yield the texts of a file, or of all files of a folder whose suffixes are in `KINDS`.

    A plain text file is one text. A JSON file holds objects one after the other, usually one per line, or an array of
    them; an object's text is its "text", or its conversation (`CONVERSATION_KEYS`) as the chat template renders it. A
    conversation may also stand alone, as an array of messages. Files may be compressed by gzip, bzip2, xz or lzma.
    Their encoding is that of their byte-order mark, else UTF-8, UTF-16 or UTF-32.

    Args:
        path: the file or folder.
        render: renders a conversation, a list of {"role", "content"}.
        option: the command-line option that named the path, for the messages.

    Raises:
        SourceError: there is no such file, or it cannot be read as text; the message names file and line.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_text_file(file))
    broken = next((file for file in files if not file.exists()), None)
    if broken is not None:
        raise SourceError(
            f"{option} {broken}: expected a file, found a link that leads nowhere: correct or remove it"
        )
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
    return _plain_name(file).endswith(KINDS) and (file.is_file() or (file.is_symlink() and not file.exists()))


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
    data = _decompress(data, where)
    for magic, (title, advice) in OTHER_FORMATS.items():
        if data.startswith(magic):
            raise SourceError(f"{where}: expected text, found {title}: {advice}")
    if data[TAR[0] :].startswith(TAR[1]):
        raise SourceError(f"{where}: expected text, found a tar archive: {_UNPACK}")
    text = _decode(data, where)
    if _is_binary(text):
        raise SourceError(f"{where}: expected text, found binary data (control characters): check the path")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decompress(data: bytes, where: str) -> bytes:
    """Decompress data until they are no longer compressed: some are twice."""
    while True:
        decompress = next(
            (function for magic, function in COMPRESSED.values() if data.startswith(magic)), None
        )
        if decompress is None:
            return data
        try:
            data = decompress(data)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as cause:
            raise SourceError(
                f"{where}: expected compressed text, found a damaged file ({cause}): copy it again"
            ) from None


def _is_binary(text: str) -> bool:
    """Return whether there are more control characters than in any text."""
    return sum(1 for _ in CONTROL.finditer(text)) > ALLOWED_CONTROLS * len(text)


def _decode(data: bytes, where: str) -> str:
    """Decode text by its byte-order mark, else as UTF-32 or UTF-16 if it looks like that, else as UTF-8."""
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    encoding = BYTE_ORDER_MARKS[mark] if mark is not None else _wide_without_mark(data) or "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as cause:
        problem = cause
    # Which 8-bit encoding it is cannot be known for certain, and a wrong guess would calibrate on noise.
    line = data[: problem.start].count(b"\n") + 1
    found = f"the byte 0x{data[problem.start]:02x}"
    advice = "convert the file to UTF-8, for example with iconv -f WINDOWS-1252 -t UTF-8"
    if encoding != "utf-8":
        advice = "copy the file again, or convert it to UTF-8"
    elif _is_binary(data[:SAMPLE_BYTES].decode("latin-1")):
        found, advice = f"{found} in binary data", "check the path"
    raise SourceError(
        f"{where}, line {line}: expected text in {encoding.upper()}, found {found}: {advice}"
    ) from None


def _wide_without_mark(data: bytes) -> str | None:
    """Return the encoding of UTF-32 or UTF-16 text without a byte-order mark; None if it does not look like one.

    Text in 8-bit encodings and in UTF-8 has no zero byte. Any four other bytes are rarely a character of UTF-32. Text
    in UTF-16 has a zero in most even or odd places if its script is Latin; in another script, its spaces and newlines
    have one, and they are none if the two bytes are swapped.
    """
    if 0 not in data:
        return None
    for encoding in ("utf-32-le", "utf-32-be"):
        try:
            data[: SAMPLE_BYTES & ~3].decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    sample = data[: SAMPLE_BYTES & ~1]
    if len(sample) < 2:
        return None
    zeros = [sample[start::2].count(0) / len(sample[start::2]) for start in (0, 1)]
    if max(zeros) > 0.4 and min(zeros) < 0.05:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    if len(sample) < 2 * FEWEST_UNITS or len(data) % 2:
        return None
    blanks = {}
    for encoding in ("utf-16-le", "utf-16-be"):
        # A pair of surrogates may be cut at the end of the sample.
        text = sample.decode(encoding, "replace")
        letters = sum(unit >> 8 in LETTERS and unit & 255 in LETTERS for unit in map(ord, text))
        is_text = not _is_binary(text) and 2 * letters < len(text) and text.count("\ufffd") <= 1
        blanks[encoding] = text.count(" ") + text.count("\n") if is_text else 0
    found = [encoding for encoding, count in blanks.items() if count]
    return found[0] if len(found) == 1 else None


def _is_json(file: Path, text: str) -> bool:
    """Return whether a file holds JSON: by its suffix, or because it starts as a JSON object or is a JSON array."""
    if _plain_name(file).endswith((".json", ".jsonl", ".ndjson")) or _JSON_START.match(text):
        return True
    if not text.lstrip().startswith("["):
        return False
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _json_values(file: Path, text: str, option: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the value of every object of a JSON file, or of the items of its arrays.

    Values follow each other, usually one on a line. Lines end with a newline only: JSON strings may contain the other
    separators that `str.splitlines` splits at. All items of an array have the line of its start. An array of messages
    is one value.
    """
    decoder, number, counted = json.JSONDecoder(), 1, 0
    place = _next_value(text, 0)
    while place < len(text):
        number, counted = number + text.count("\n", counted, place), place
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as cause:
            line = getattr(cause, "lineno", number)
            raise _not_json(file, option, line, text.split("\n", line)[line - 1]) from None
        if isinstance(value, list) and not _is_conversation(value):
            yield from ((number, item) for item in value)
        else:
            yield number, value
        place = _next_value(text, end)


_BETWEEN = re.compile(r"[\s\ufeff]*")
"""What may stand between JSON values; a byte-order mark does where files were joined."""


def _next_value(text: str, place: int) -> int:
    """Return the first place from `place` on that may start a JSON value."""
    match = _BETWEEN.match(text, place)
    return match.end() if match is not None else place


def _is_conversation(value: Any) -> bool:
    """Return whether a JSON value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    )


def _not_json(file: Path, option: str, line: int, found: str) -> SourceError:
    return SourceError(
        f'{option} {file}, line {line}: expected a JSON object with a "text" on each line, or an array of them, '
        f"found {found.strip()[:60]!r}: correct it, or leave it out"
    )


def _text_of(value: Any, where: str, render: Render) -> str:
    """Return the text of a JSON value: a string, or an object with a "text" or a conversation."""
    if isinstance(value, str):
        return value
    if _is_conversation(value):
        return _render(value, where, render)
    if isinstance(value, dict):
        text = value.get("text")
        if isinstance(text, str):
            return text
        for key in CONVERSATION_KEYS:
            if text is None and key in value:
                return _render(value[key], f'{where}, "{key}"', render)
        if "text" in value:
            raise SourceError(f'{where}: expected "text" to be a string, found {text!r:.60}')
    raise SourceError(
        f'{where}: expected an object with a "text" or with "messages", found {json.dumps(value):.60}'
    )


def _render(value: Any, where: str, render: Render) -> str:
    """Render a conversation, in the form of OpenAI ("role", "content") or of ShareGPT ("from", "value")."""
    if not isinstance(value, list) or not value:
        raise SourceError(
            f"{where}: expected a list of messages, found {json.dumps(value):.60}: correct it, or leave it out"
        )
    messages = [_message(message, where) for message in value]
    try:
        return render(messages)
    except Exception as cause:  # a chat template can raise anything
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise SourceError(
            f"{where}: the tokenizer's chat template cannot render this conversation ({reason:.200}): correct it, or "
            'give its text as "text"'
        ) from None


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message as chat templates expect it: role and content, and the tools that it calls."""
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(str(part["text"]) for part in content if isinstance(part.get("text"), str))
    calls = fields.get("tool_calls")
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise SourceError(
            f'{where}: expected a "role" and a "content" in every message, both strings, found '
            f"{json.dumps(message):.60}: correct it, or leave it out"
        )
    found = {"role": ROLES.get(role, role), "content": content}
    return {**found, "tool_calls": [_tool_call(call) for call in calls]} if isinstance(calls, list) else found


def _tool_call(call: Any) -> Any:
    """Return the call of a tool with its arguments as an object: OpenAI's are a string, chat templates write JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
