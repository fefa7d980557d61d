"""Read single files of wheels on the package index with range requests, without downloading the wheels."""

import io
import json
import re
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

INDEX = "https://pypi.org/simple"
CHUNK = 1 << 18
"""Bytes of a request; the list of 5,000 files at a wheel's end takes three."""

Read = Callable[[str], str | None]
"""Function that returns the text of a file inside a wheel, or None if there is no such file."""


def _get(url: str, **headers: str) -> bytes:
    request = urllib.request.Request(
        url, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        data: bytes = answer.read()
    return data


class RemoteFile(io.RawIOBase):
    """A file behind HTTP as a seekable stream: each read is a range request.

    Raises:
        OSError: the server does not support range requests.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
        if found is None:
            raise OSError(f"{url}: expected a server that supports range requests")
        self.size, self.place = int(found[1]), 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self.place + len(buffer), self.size)
        if self.place >= end:
            return 0
        data = _get(self.url, Range=f"bytes={self.place}-{end - 1}")
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def wheel_urls(package: str, platform: str = "x86_64") -> dict[str, str]:
    """Return version -> URL of the wheel for `platform`, for every final release on the package index."""
    listing = json.loads(_get(f"{INDEX}/{package}/", Accept="application/vnd.pypi.simple.v1+json"))
    found = {}
    for file in listing["files"]:
        match = re.fullmatch(r"[^-]+-(\d+(?:\.\d+)+)-.+\.whl", file["filename"])
        if match and platform in file["filename"] and not file.get("yanked"):
            found[match[1]] = file["url"]
    return found


def wheel_reader(url: str) -> Read:
    """Return a function that reads files of the wheel at `url`."""
    archive = zipfile.ZipFile(io.BufferedReader(RemoteFile(url), CHUNK))
    names = set(archive.namelist())

    def read(path: str) -> str | None:
        if path.startswith("*"):  # the .dist-info folder is named after the version
            path = next((name for name in names if name.endswith(path[1:])), path)
        return archive.read(path).decode() if path in names else None

    return read


def folder_reader(folder: Path) -> Read:
    """Return a function that reads files of an unpacked wheel, such as a site-packages folder."""

    def read(path: str) -> str | None:
        file = folder / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return read
