"""Find GPU code in ELF files and overwrite the parts that a GPU does not use (standard library only).

A fat binary contains one entry for each architecture, and the driver reads only the one that it selects. The others
can be overwritten with zeros in place: offsets do not change, and the entries in use stay bit-identical.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

NO_ARCH = 120
"""Architecture of overwritten PTX entries: newer than any target, so that the driver never selects them."""

_MAGIC = 0xBA55ED50
_NO_BYTES = 8  # SHT_NOBITS: a section that occupies no space in the file


class Entry(NamedTuple):
    """Code of one architecture; `kind` is 1 for PTX and 2 for machine code, offsets and size are in bytes."""

    kind: int
    arch: int
    header: int
    start: int
    size: int


def elf_sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of each section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    for name, kind, _, _, offset, size in headers:
        if kind != _NO_BYTES:
            start = names + name
            yield bytes(data[start : data.index(b"\0", start)]).decode(), offset, size


def fatbin_containers(data: bytes, offset: int, size: int) -> Iterator[tuple[int, int, list[Entry]]]:
    """Yield (start, end, entries) of each fat binary in a .nv_fatbin section.

    Raises:
        ValueError: a fat binary has an unknown layout.
    """
    position, stop = offset, offset + size
    while position + 16 <= stop:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, position)
        if magic != _MAGIC:  # padding between containers
            position += 8
            continue
        entries, at, end = [], position + header, position + header + length
        while at < end:
            kind, _, head, payload = struct.unpack_from("<HHIQ", data, at)
            (arch,) = struct.unpack_from("<I", data, at + 28)
            entries.append(Entry(kind, arch, at, at + head, payload))
            at += head + payload
        if at != end or end > stop:
            raise ValueError(f"the fat binary at {position:#x} has an unknown layout")
        yield position, end, entries
        position = end


def usable(entries: list[Entry], arch: int) -> tuple[list[Entry], list[Entry]]:
    """Return the entries that run on sm_<arch>: machine code of its generation, and PTX that the driver can compile."""
    code = [e for e in entries if e.kind == 2 and e.arch // 10 == arch // 10 and e.arch <= arch]
    return code, [e for e in entries if e.kind == 1 and e.arch <= arch]


def slim_elf(data: bytes, arch: int, keep_ptx: bool) -> bytes:
    """Overwrite with zeros what sm_<arch> does not use, and the linker's symbol tables (.symtab, .strtab).

    Args:
        data: a file's contents, which are returned unchanged unless it is an ELF file.
        arch: the target architecture.
        keep_ptx: whether to keep PTX if there is no machine code for the target.
    """
    if data[:5] != b"\x7fELF\x02":
        return data
    out = bytearray(data)
    for name, offset, size in elf_sections(data):
        if name in (".symtab", ".strtab"):
            out[offset : offset + size] = bytes(size)
        elif name == ".nv_fatbin":
            for _, _, entries in fatbin_containers(data, offset, size):
                code, ptx = usable(entries, arch)
                keep = code or (ptx if keep_ptx else [])
                for entry in (e for e in entries if e not in keep):
                    out[entry.start : entry.start + entry.size] = bytes(entry.size)
                    if entry.kind == 1:
                        struct.pack_into("<I", out, entry.header + 28, NO_ARCH)
    return bytes(out)
