"""The bundle for an isolated GPU machine: only GPU code that the machine cannot use is overwritten."""

import io
import lzma
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from paths import SCRIPTS

from scripts import build_gpu_bundle, gpu_bundle_pins, gpu_fatbin, gpu_prepare

PTX, CODE = 1, 2


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    head = bytearray(32)
    struct.pack_into("<HHIQ", head, 0, kind, 0, len(head), len(payload))
    struct.pack_into("<I", head, 28, arch)
    return bytes(head) + payload


def fatbin(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def elf(sections: dict[str, bytes]) -> bytes:
    """A 64-bit ELF file with these sections and nothing else."""
    names, out = b"\0", bytearray(b"\x7fELF\x02" + bytes(59))
    headers = [struct.pack("<IIQQQQ", 0, 8, 0, 0, 0, 0)]
    for name, data in (*sections.items(), (".shstrtab", b"")):
        at = len(names)
        names += name.encode() + b"\0"
        data = names if name == ".shstrtab" else data
        headers.append(struct.pack("<IIQQQQ", at, 1, 0, 0, len(out), len(data)))
        out += data
    struct.pack_into("<Q", out, 0x28, len(out))
    struct.pack_into("<HHH", out, 0x3A, 40, len(headers), len(headers) - 1)
    return bytes(out) + b"".join(headers)


def test_code_of_other_gpus_is_overwritten_in_place() -> None:
    both = fatbin(entry(CODE, 80, b"A" * 16), entry(CODE, 90, b"B" * 16), entry(PTX, 90, b"C" * 16))
    ptx_only = fatbin(entry(CODE, 80, b"D" * 16), entry(PTX, 80, b"E" * 16))
    data = elf({".nv_fatbin": both + bytes(8) + ptx_only, ".symtab": b"S" * 8, ".dynsym": b"T" * 8})
    for keep_ptx in (True, False):
        slim = gpu_fatbin.slim_elf(data, 90, keep_ptx)
        assert len(slim) == len(data)
        kept = {letter for letter in "ABCDEST" if letter.encode() * 8 in slim}
        assert kept == ({"B", "E", "T"} if keep_ptx else {"B", "T"})
        sections = {name: (offset, size) for name, offset, size in gpu_fatbin.elf_sections(slim)}
        entries = [
            e for *_, part in gpu_fatbin.fatbin_containers(slim, *sections[".nv_fatbin"]) for e in part
        ]
        assert [e.arch for e in entries] == [80, 90, 120, 80, 80 if keep_ptx else 120]
        code, ptx = gpu_fatbin.usable(entries, 90)
        assert [e.arch for e in code] == [90]
        assert [e.arch for e in ptx] == ([80] if keep_ptx else [])
    assert gpu_fatbin.slim_elf(b"#!/bin/sh", 90, True) == b"#!/bin/sh"


def test_a_strange_fat_binary_is_refused() -> None:
    data = elf({".nv_fatbin": fatbin(entry(CODE, 90, b"B" * 16))[:-4] + bytes(4)})
    assert gpu_fatbin.slim_elf(data, 90, True) == data
    broken = bytearray(fatbin(entry(CODE, 90, b"B" * 16)))
    struct.pack_into("<Q", broken, 8, 40)
    with pytest.raises(ValueError, match="has an unknown layout"):
        gpu_fatbin.slim_elf(elf({".nv_fatbin": bytes(broken)}), 90, True)


def test_wheels_are_unpacked_without_what_is_left_out(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    contents = {
        "a/__init__.py": b"x = 1\n",
        "a/big.so": b"big",
        "a-1.data/purelib/b.py": b"y = 2\n",
        "a-1.data/scripts/tool": b"#!",
        "a-1.dist-info/RECORD": b"a/__init__.py,sha256=1,6\na/big.so,sha256=2,3\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
    files: dict[str, bytes] = {}
    build_gpu_bundle.unpack(wheel, files, ["a/*.so"], [])
    build_gpu_bundle.fix_records(files)
    assert set(files) == {"a/__init__.py", "b.py", "a-1.dist-info/RECORD"}
    assert files["a-1.dist-info/RECORD"] == b"a/__init__.py,,\n"
    with pytest.raises(build_gpu_bundle.BundleError, match="in two wheels"):
        build_gpu_bundle.unpack(wheel, files, [], [])

    archive_bytes = build_gpu_bundle.pack(files, 1)
    assert archive_bytes == build_gpu_bundle.pack(files, 1)
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive_bytes))) as tar:
        assert tar.getnames() == sorted(files, key=lambda path: (Path(path).suffix, path))
    build_gpu_bundle.write_parts(tmp_path, archive_bytes, 100)
    parts = sorted(tmp_path.glob("bundle.tar.xz.*"))
    assert b"".join(part.read_bytes() for part in parts) == archive_bytes
    assert max(part.stat().st_size for part in parts) <= 100


def test_the_install_script_is_complete() -> None:
    text = build_gpu_bundle.install_script()
    assert "@" not in text.replace('"$@"', "")
    assert "export VLLM_USE_FLASHINFER_SAMPLER=0" in text
    assert f'!= "{gpu_bundle_pins.TORCH}"' in text


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("gpu_*.sh")), ids=lambda path: path.name)
def test_the_shell_scripts_parse(script: Path) -> None:
    shell = script.read_text().split("\n", 1)[0].removeprefix("#!").rsplit("/", 1)[-1]
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_small_wheels_are_among_the_pinned() -> None:
    assert set(gpu_prepare.LACKING) <= set(gpu_bundle_pins.PACKAGES)


def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_prepare, "PYTHON", "2.7")
    with pytest.raises(gpu_prepare.PrepareError, match="expected Python and Triton 2.7"):
        gpu_prepare.check_python(sys.executable)
