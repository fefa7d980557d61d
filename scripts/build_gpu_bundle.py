"""Pack vLLM (CUDA) small enough to be carried to an isolated GPU machine.

    python -m scripts.build_gpu_bundle --out DIR          (scripts/gpu_prepare.py --serve runs it)

The machine must have x86-64 Linux, Python 3.12, the torch version that this vLLM pins and its usual companions
(transformers, tokenizers, numpy, aiohttp, ...); it needs no package index. The vLLM wheel and the packages that the
machine lacks (gpu_bundle_pins.py) are downloaded with pip. DIR then contains

    bundle.tar.xz.00, .01, ...   an xz-compressed tar in parts of at most --limit-mib
    SHA256SUMS                   their checksums
    install.sh                   unpacks the parts on the machine: sh install.sh [TARGET] [PARTS_DIR]
    scripts/                     gpu_check.py, which tests the bundle's GPU code on the machine

The bundle is small because optional parts of vLLM that a dense decoder model on Hopper does not use are left out
(DROP), and because GPU code for other GPUs, PTX next to machine code, and the linker's symbol tables are overwritten
with zeros (gpu_fatbin.py; --all-arch turns this off), which compress to almost nothing. The output depends only on the
pinned wheels, these scripts and the version of liblzma.
"""

import argparse
import csv
import fnmatch
import hashlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.gpu_bundle_pins import ARCH, DROP, ENVIRONMENT, NO_PTX, NOT_CARRIED, PACKAGES, PYTHON, TORCH
from scripts.gpu_fatbin import slim_elf

HERE = Path(__file__).resolve().parent
Files = dict[str, bytes]

LAUNCHER = """\
#!/usr/bin/env python3
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""


class BundleError(Exception):
    """Raised if the bundle cannot be built."""


def download(folder: Path, packages: Mapping[str, tuple[str, str]]) -> list[Path]:
    """Download the pinned wheels for the target; pip verifies their checksums.

    Raises:
        BundleError: pip failed, or a wheel is missing afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    lines = [f"{name}=={version} --hash=sha256:{digest}" for name, (version, digest) in packages.items()]
    requirements.write_text("\n".join(lines) + "\n")
    platforms = [f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version", PYTHON, "--implementation", "cp"]
    words += [word for platform in platforms for word in ("--platform", platform)]
    words += ["--dest", str(folder), "--requirement", str(requirements)]
    if subprocess.run(words, check=False).returncode:
        raise BundleError("pip could not download the pinned wheels, see its output above")
    wheels = {}
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        name = name.lower().replace("_", "-").replace(".", "-")
        if packages.get(name, ("",))[0] == version:
            wheels[name] = path
    if missing := sorted(set(packages) - set(wheels)):
        raise BundleError(f"pip did not download: {', '.join(missing)}")
    return [wheels[name] for name in sorted(wheels)]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def unpack(wheel: Path, files: Files, drop: Sequence[str], keep: Sequence[str]) -> None:
    """Add a wheel's files to `files` (path -> contents).

    Raises:
        BundleError: two wheels contain the same path.
    """
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            path = info.filename
            if info.is_dir():
                continue
            top, _, rest = path.partition("/")
            if top.endswith(".data"):
                scheme, _, path = rest.partition("/")
                if scheme not in ("purelib", "platlib"):
                    continue  # headers, scripts and data are not needed
            if _matches(path, drop) and not _matches(path, keep):
                continue
            if path in files:
                raise BundleError(f"{path} is in two wheels")
            files[path] = archive.read(info)


def fix_records(files: Files) -> None:
    """Update each RECORD, since files were left out or changed."""
    for path in [path for path in files if path.endswith(".dist-info/RECORD")]:
        rows = csv.reader(io.StringIO(files[path].decode()))
        kept = [row[0] for row in rows if row and row[0] in files]
        files[path] = "".join(f"{name},,\n" for name in kept).encode()


def pack(files: Files, preset: int) -> bytes:
    """Return a deterministic .tar.xz of the files."""
    out = io.BytesIO()
    # The x86 filter improves the compression of host code.
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset}]
    with (
        lzma.LZMAFile(out, "w", check=lzma.CHECK_CRC64, filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        # Similar files next to each other compress better: by kind of file, then by path.
        for path in sorted(files, key=lambda path: (not path.endswith(".so"), Path(path).suffix, path)):
            info = tarfile.TarInfo(path)
            info.size = len(files[path])
            info.mode = 0o755 if path.startswith("bin/") else 0o644
            info.mtime = 0
            archive.addfile(info, io.BytesIO(files[path]))
    return out.getvalue()


def install_script() -> str:
    """Return install.sh with this bundle's settings."""
    text = (HERE / "gpu_bundle_install.sh").read_text()
    exports = "\n".join(f"export {name}={value}" for name, value in ENVIRONMENT.items())
    for mark, value in (("@EXPORTS@", exports), ("@TORCH@", TORCH), ("@NOT_CARRIED@", NOT_CARRIED)):
        text = text.replace(mark, value)
    return text


def write_parts(out: Path, archive: bytes, limit: int) -> None:
    """Write the archive in parts of at most `limit` bytes, and a file of their checksums."""
    for old in out.glob("bundle.tar.xz.*"):
        old.unlink()
    sums = ""
    for number, start in enumerate(range(0, len(archive), limit)):
        name, part = f"bundle.tar.xz.{number:02d}", archive[start : start + limit]
        (out / name).write_bytes(part)
        sums += f"{hashlib.sha256(part).hexdigest()}  {name}\n"
        print(f"{name}: {len(part) / 2**20:.1f} MiB")
    (out / "SHA256SUMS").write_text(sums)


def build(
    out: Path, wheels: Sequence[Path], all_arch: bool, keep: Sequence[str], preset: int, limit: int
) -> None:
    """Unpack, reduce and pack the wheels into `out`."""
    files: Files = {}
    for wheel in wheels:
        unpack(wheel, files, DROP, keep)
    if not all_arch:
        for path in [path for path in files if path.endswith(".so")]:
            files[path] = slim_elf(files[path], ARCH, path not in NO_PTX)
    fix_records(files)
    files["bin/vllm"] = LAUNCHER.encode()
    print(f"{len(files)} files, {sum(map(len, files.values())) / 2**20:.1f} MiB; compressing", flush=True)
    write_parts(out, pack(files, preset), limit)
    (out / "install.sh").write_text(install_script())
    checks = out / HERE.name
    checks.mkdir(exist_ok=True)
    for name in ("__init__.py", "gpu_check.py", "gpu_fatbin.py"):
        shutil.copy(HERE / name, checks)


def main() -> int:
    """Run the command line; return 1 if the bundle cannot be built."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for the downloaded wheels (OUT/wheels)")
    parser.add_argument("--limit-mib", type=float, default=60, help="size limit of a part in MiB (60)")
    parser.add_argument(
        "--all-arch", action="store_true", help="keep the GPU code of all architectures (larger)"
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help="keep files that DROP leaves out"
    )
    parser.add_argument(
        "--add-wheel", action="append", default=[], type=Path, metavar="FILE", help="further wheel"
    )
    parser.add_argument("--preset", type=int, default=9, help="xz preset (9)")
    arguments = parser.parse_args()
    begun = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        wheels = download(arguments.work or arguments.out / "wheels", PACKAGES)
        build(
            arguments.out,
            [*wheels, *arguments.add_wheel],
            arguments.all_arch,
            arguments.keep,
            arguments.preset,
            int(arguments.limit_mib * 2**20),
        )
    except BundleError as error:
        print(f"build_gpu_bundle: {error}", file=sys.stderr)
        return 1
    print(f"done in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
