"""Calibration text in the forms that people have it: read correctly, or refused with file and line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from bwla_converter.calibration.text_files import Messages, read_text, read_texts
from bwla_kernels.errors import SourceError

FRENCH = "Le café était fermé, à côté de l'hôtel où l'on dînait en été.\nLa forêt brûlée et le cœur déçu.\n"
LINES = '{"text": "one\\u2028two"}\n{"text": "three"}\n'


def render(messages: Messages) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def texts_of(folder: Path, name: str, data: bytes) -> list[str]:
    (folder / name).write_bytes(data)
    return list(read_texts(folder / name, render))


RUSSIAN = "Мой дядя самых честных правил,\nКогда не в шутку занемог,\n" * 2  # noqa: RUF001
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 3
UNICODE = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("text", [FRENCH, RUSSIAN, JAPANESE], ids=["French", "Russian", "Japanese"])
@pytest.mark.parametrize("encoding", UNICODE)
def test_encodings_of_unicode(tmp_path: Path, encoding: str, text: str) -> None:
    assert texts_of(tmp_path, "text.txt", text.encode(encoding)) == [text]


def test_characters_beyond_16_bits_in_utf_16(tmp_path: Path) -> None:
    text = f"{RUSSIAN}\U0001f600\n"
    assert texts_of(tmp_path, "text.txt", text.encode("utf-16-be")) == [text]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text.txt.gz", gzip.compress(FRENCH.encode())),
        ("text.txt.bz2", bz2.compress(FRENCH.encode())),
        ("text.txt.xz", lzma.compress(FRENCH.encode())),
        ("text.txt.lzma", lzma.compress(FRENCH.encode(), format=lzma.FORMAT_ALONE)),
        ("named-as-text.txt", lzma.compress(FRENCH.encode())),
        ("twice.gz", gzip.compress(bz2.compress(FRENCH.encode()))),
        ("in-two-parts.gz", gzip.compress(FRENCH[:20].encode()) + gzip.compress(FRENCH[20:].encode())),
        ("text", gzip.compress(FRENCH.encode("utf-16"))),
        ("windows.txt", FRENCH.replace("\n", "\r\n").encode()),
        ("old-mac.txt", FRENCH.replace("\n", "\r").encode()),
    ],
)
def test_compressed_text_and_line_ends(tmp_path: Path, name: str, data: bytes) -> None:
    assert texts_of(tmp_path, name, data) == [FRENCH]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("text.jsonl", LINES.encode(), ["one\u2028two", "three"]),
        (
            "raw.jsonl",
            '{"text": "one\u2028\u0085two"}\n\n  \n{"text": "three"}'.encode(),
            ["one\u2028\u0085two", "three"],
        ),
        ("text.jsonl.gz", gzip.compress(LINES.encode()), ["one\u2028two", "three"]),
        ("bom.jsonl", LINES.encode("utf-8-sig"), ["one\u2028two", "three"]),
        ("utf16.jsonl", LINES.encode("utf-16"), ["one\u2028two", "three"]),
        ("array.json", b'[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ("array.jsonl", b'[{"text": "one"},\n {"text": "two"}]', ["one", "two"]),
        ("object.json", b'{\n "text": "one"\n}', ["one"]),
        ("strings.jsonl", b'"one"\n"two"\n', ["one", "two"]),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode(), ["one\u2028two", "three"]),
        ("joined.jsonl", LINES.encode() + LINES.encode("utf-8-sig"), ["one\u2028two", "three"] * 2),
        ("bz2.jsonl", bz2.compress(LINES.encode()), ["one\u2028two", "three"]),
        ("over-lines.jsonl", b'{\n "text": "one"\n}\n{\n "text": "two"\n}\n', ["one", "two"]),
        ("one-line.jsonl", b'{"text": "one"}{"text": "two"}', ["one", "two"]),
        ("strings.txt", b'["one", "two"]', ["one", "two"]),
        ("quotation.txt", b'"One," she said.\n"Two."\n', ['"One," she said.\n"Two."\n']),
        ("named-as-text.txt", LINES.encode(), ["one\u2028two", "three"]),
        ("no-suffix", b'[{"text": "one"}]', ["one"]),
        ("starts-with-a-bracket.txt", b"[1] A footnote.", ["[1] A footnote."]),
        ("starts-with-a-brace.txt", b"{x | x > 0} is a set.", ["{x | x > 0} is a set."]),
    ],
)
def test_json_in_every_layout(tmp_path: Path, name: str, data: bytes, expected: list[str]) -> None:
    assert texts_of(tmp_path, name, data) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
        {
            "id": 3,
            "text": None,
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
        },
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
        {"conversation": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]},
                {"role": "assistant", "content": "Yes?"},
            ]
        },
    ],
)
def test_conversations_are_rendered_by_the_chat_template(tmp_path: Path, value: Any) -> None:
    assert texts_of(tmp_path, "chat.jsonl", json.dumps(value).encode()) == ["<user>Hi<assistant>Yes?"]


def test_conversations_as_lines_of_lists(tmp_path: Path) -> None:
    line = json.dumps([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}])
    expected = ["<user>Hi<assistant>Yes?"] * 2
    assert texts_of(tmp_path, "chats.jsonl", f"{line}\n{line}\n".encode()) == expected
    assert texts_of(tmp_path, "chats.txt", f"[{line}, {line}]".encode()) == expected


@pytest.mark.parametrize("arguments", ['{"city": "Ulm"}', {"city": "Ulm"}])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_of_tools_reach_the_chat_template(
    tmp_path: Path, arguments: Any, content: dict[str, Any]
) -> None:
    """OpenAI's messages that call a tool have no content, and arguments in a string."""
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", **content, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "Sun"},
    ]
    rendered: list[Messages] = []

    def keep(messages: Messages) -> str:
        rendered.append(messages)
        return "text"

    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    assert list(read_texts(tmp_path / "chat.jsonl", keep)) == ["text"]
    function = {"name": "weather", "arguments": {"city": "Ulm"}}
    assert rendered[0][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    assert rendered[0][2] == {"role": "tool", "content": "Sun"}


def test_the_roles_of_sharegpt(tmp_path: Path) -> None:
    pairs = [("system", "S"), ("human", "H"), ("function_call", "F"), ("observation", "O"), ("gpt", "G")]
    chat = {"conversations": [{"from": role, "value": value} for role, value in pairs]}
    expected = "<system>S<user>H<assistant>F<tool>O<assistant>G"
    assert texts_of(tmp_path, "chat.json", json.dumps([chat]).encode()) == [expected]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "null.jsonl",
            b'{"text": "fine"}\n{"text": null}\n',
            'line 2: expected "text" to be a string, found None',
        ),
        ("number.jsonl", b'{"text": 3}\n', 'line 1: expected "text" to be a string, found 3'),
        ("other.jsonl", b'{"words": "no"}\n', 'line 1: expected an object with a "text" or with "messages"'),
        ("nulls.jsonl", b'"one"\nnull\n', "line 2: expected an object .* found null"),
        ("cut.jsonl", b'{"text": "fine"}\n{"text": "cu', "line 2: expected a JSON object"),
        ("cut.json", b'[{"text": "fine"},\n {"text": "cu', "line 2: expected a JSON object"),
        (
            "surrogate.jsonl",
            b'{"text": "fine"}\n{"text": "\\ud83d"}\n',
            r"line 2: .* half of a surrogate pair, \\ud83d",
        ),
        ("chat.jsonl", b'{"messages": []}\n', 'line 1, "messages": expected a list of messages'),
        ("chat2.jsonl", b'{"messages": [{"role": "user"}]}\n', 'expected a "role" and a "content"'),
        ("data.parquet", b"PAR1\x15\x04", "expected text, found a Parquet file"),
        ("data.zip", b"PK\x03\x04\x00", "expected text, found a zip archive"),
        ("paper.pdf", b"%PDF-1.7\n", "expected text, found a PDF document"),
        ("text.zst", b"\x28\xb5\x2f\xfd\x00", "expected text, found a file compressed by Zstandard"),
        ("nothing.jsonl", b'{"messages": [{"role": "user", "content": null}]}', "found .*null.*: correct it"),
        ("string.jsonl", b'{"messages": "Hi"}', 'expected a list of messages, found "Hi"'),
        ("commas.jsonl", b'{"text": "one"},\n{"text": "two"}', "line 1: .*correct it, or leave it out"),
        ("python.jsonl", b"{'text': 'one'}", "line 1: expected a JSON object"),
        ("cut.txt", b'{"text": "fine"}\n{"text": "cu', "line 2: expected a JSON object"),
        ("cut-array.txt", b'[\n{"text": "cu', "line 2: expected a JSON object"),
        ("deep.json", b"[" * 100000, "line 1: expected a JSON object"),
        ("object.json", b"{}", 'line 1: expected an object with a "text"'),
        ("columns.json", b'{"text": ["one", "two"]}', 'expected "text" to be a string'),
        ("text.7z", b"7z\xbc\xaf\x27\x1c\x00", "found a 7z archive: unpack it"),
        ("text.lz4", b"\x04\x22\x4d\x18\x00", "by LZ4: decompress it with lz4 -d"),
        ("text.tar.gz", gzip.compress(bytes(257) + b"ustar\x00"), "found a tar archive: unpack it"),
        (
            "pointer.txt",
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer .*: run git lfs pull",
        ),
        ("image.txt", b"\x89PNG\r\n\x1a\n" + bytes(50), "line 1: .*0x89 in binary data: check the path"),
        ("odd.txt", "text".encode("utf-16") + b"a", "expected text in UTF-16, .*: copy the file again"),
        ("surrogates.txt", b"\xed\xa0\xbd\xed\xb8\x80", "expected text in UTF-8"),
        ("mark-only.txt", b"\xff\xfe", "expected text, found none"),
        (
            "two-encodings.txt",
            b"The first half of this file is one that can be read, and here is the other half.\n" * 3
            + "Der zweite Teil.\n".encode("utf-16-le"),
            "found binary data",
        ),
        ("cut.gz", gzip.compress(FRENCH.encode() * 20)[:-20], "found a damaged file"),
        ("model.bin", bytes(range(256)) * 16, "expected text"),
        (
            "latin-1.txt",
            b"fine\n" + FRENCH[:40].encode("latin-1"),
            "line 2: expected text in UTF-8, found the byte 0xe9",
        ),
        (
            "windows.jsonl",
            '{"text": "été"}'.encode("cp1252"),
            "line 1: expected text in UTF-8, found the byte 0xe9",
        ),
        (
            "shift-jis.txt",
            "吾輩は猫である".encode("shift-jis"),
            "line 1: expected text in UTF-8, found the byte",
        ),
        ("zeros.txt", bytes(1000), "found binary data"),
        ("empty.txt", b"", "expected text, found none"),
        ("blank.txt", b" \n\n", "expected text, found none"),
        ("empty.jsonl", b"\n", "expected text, found none"),
        (
            "half.txt",
            b"fine\n" + "é".encode("utf-16-be") + b"\x00\xff\xfe",
            "line 2: expected text in UTF-8, found the byte",
        ),
    ],
)
def test_what_is_no_text_is_refused_by_file_and_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        texts_of(tmp_path, name, data)
    assert str(caught.value).startswith(f"--calibration {tmp_path / name}")


def test_a_conversation_that_the_chat_template_refuses(tmp_path: Path) -> None:
    def refuse(messages: Messages) -> str:
        raise ValueError("Conversation roles must alternate")

    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    with pytest.raises(SourceError, match=r"line 1, \"messages\": .*\(Conversation roles must alternate\)"):
        list(read_texts(tmp_path / "chat.jsonl", refuse))


def test_the_files_of_a_folder_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("first")
    (tmp_path / "b.TXT.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n{"text": "fourth"}')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.md").write_text("not this")
    assert list(read_texts(tmp_path, render)) == ["first", "second", "third", "fourth"]


def test_a_folder_without_text_and_a_path_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"with .txt, .jsonl, .ndjson files .* found none of them"):
        list(read_texts(tmp_path, render))
    with pytest.raises(SourceError, match="found nothing of that name"):
        list(read_texts(tmp_path / "missing", render))


def test_a_link_to_nothing_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").symlink_to("/no/such/file")
    with pytest.raises(SourceError, match=r"b.txt: expected a file, found a link that leads nowhere"):
        list(read_texts(tmp_path, render))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "text.txt").write_text("secret")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SourceError, match=r"text.txt: the file cannot be read \(Permission denied\)"):
        read_text(tmp_path / "text.txt", "--text")
