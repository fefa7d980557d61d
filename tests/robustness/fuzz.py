"""Give damaged model folders to everything that reads them: none may crash without a message or load wrong data.

    python -m tests.robustness.fuzz --count 1000 --out benchmarks/results/fuzz.json

There are three readers: the converter's checks before a conversion, the plugin's checks before and during loading
(those of `process_weights_after_loading`, without an engine; `--engines N` also starts N engines), and transformers.
What a reader accepts is compared with the undamaged folder. A changed value that is as valid as the original one (a
flipped sign bit, a different norm epsilon) is counted as `other valid data`; in a checkpoint, the hashes that
`bwla-inspect` checks must then differ. The same seed gives the same mutations: they are plain functions of a seeded
generator rather than hypothesis strategies, which promise no reproducible sequence across versions.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import bwla_converter
import bwla_kernels
import torch
from bwla_converter.checkpoint import merge
from bwla_converter.checkpoint.integrity import check_hashes
from bwla_converter.hf import modules as hf
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.source.gguf_path import CACHE_VARIABLE
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import validate_layer
from bwla_kernels.format.experts import stored_names
from bwla_kernels.format.files import read_folder, read_tensors
from bwla_kernels.format.folder import int8_modules
from bwla_kernels.format.head import HeadSpec, head_tensor_specs, validate_head
from bwla_kernels.format.layer import INPUT_TRANSFORM
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import bwla_vllm
from benchmarks.common.record import write_result
from benchmarks.common.tiny_models import EXPERTS, FAMILIES, write_model
from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError
from tests.helpers.few_values import few_values, write_bitnet, write_mlx
from tests.robustness import conversions
from tests.robustness.kinds import MAY_PASS, MUST_REFUSE
from tests.robustness.mutations import Mutation

HOST_ERRORS = (OSError, ValueError, RuntimeError, StrictDataclassError)
"""Errors that transformers and vLLM raise on purpose before they call our code; any other one counts as a crash."""

WITH_PLANES = ("planes by bits", "two planes, head in three", "experts in two planes")
"""Kinds of conversions in `conversions.KINDS` whose checkpoints have several planes."""

LIMIT_S = 180
"""Time limit of one reader on one folder, in seconds; usually it takes less than one."""

OUR_CODE = tuple(Path(package.__file__).parent for package in (bwla_converter, bwla_kernels, bwla_vllm))
"""Folders of our code: an unexpected error whose traceback passes through one of them is ours."""


@dataclass(frozen=True)
class Case:
    """One damaged folder, and the outcome of reading it."""

    number: int
    reader: str
    mutation: str
    what: str
    outcome: str
    message: str = ""


def digest(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a hash of each tensor's shape, dtype and bytes."""
    return {
        name: hash((tuple(tensor.shape), tensor.dtype, raw_bytes(tensor))) for name, tensor in tensors.items()
    }


def raw_bytes(tensor: Tensor) -> bytes:
    raw: bytes = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return raw


def finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values())


def read_as_source(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that a conversion would read."""
    source = open_source(str(folder))
    check_values(source)
    return source.read(list(source.entries))


def read_as_plugin(folder: Path) -> dict[str, Tensor] | None:
    """Return the tensors that vLLM would load, or None if it would not use the plugin."""
    hf_config = AutoConfig.from_pretrained(folder)
    table = getattr(hf_config, "quantization_config", None)
    if not isinstance(table, dict) or table.get("quant_method") != "bwla":
        return None
    config = BWLAConfig.from_config(table)
    config.maybe_update_config(str(folder), hf_config=hf_config, revision=None)
    entries = read_folder(folder)
    tensors = read_tensors(folder, entries, list(entries))
    for name, spec in config.specs.items():
        stored = {key: tensors[full] for key, full in stored_names(name, spec).items()}
        validate_layer(name, stored, spec)
    for module in int8_modules(config.known_format()):
        names = head_tensor_specs(HeadSpec(1, 1))
        stored_int8 = {key: tensors[f"{module}.{key}"] for key in names}
        validate_head(stored_int8, HeadSpec(*stored_int8["weight_int8"].shape), module)
    if not hf_config.architectures:
        raise ValueError("vLLM refuses a model without architectures")
    _refuse_unequal_copies(hf_config.architectures[0], hf_config.num_hidden_layers, tensors)
    return tensors


def _refuse_unequal_copies(architecture: str, num_layers: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise as `BWLALinearMethod` does where vLLM fuses the members of an input group."""
    families = [*FAMILIES.values(), EXPERTS]
    groups = next(family.input_groups for family in families if family.architecture == architecture)
    for index in range(num_layers):
        for group in groups:
            names = [name for leaf in group for name in _linears(tensors, f".layers.{index}.", leaf)]
            for key in INPUT_TRANSFORM:
                copies = [tensors[f"{name}.{key}"] for name in names if f"{name}.{key}" in tensors]
                if any(not torch.equal(copy, copies[0]) for copy in copies[1:]):
                    raise StartError(
                        f"{names[0]}.{key}: expected identical copies in its input group, found different ones"
                    )


def _linears(tensors: Mapping[str, Tensor], layer: str, leaf: str) -> list[str]:
    """Return the quantized linears with the leaf name `leaf` in the decoder layer whose names contain `layer`."""
    names = (name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed"))
    return [name for name in names if layer in name and name.endswith(f".{leaf}")]


def read_as_transformers(folder: Path) -> dict[str, Tensor] | None:
    """Return what transformers loads, or None if it does not recognize a BWLA checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if not any(isinstance(module, hf.BWLALinear) for module in model.modules()):
        return None
    return dict(model.state_dict())


READERS: dict[str, Callable[[Path], dict[str, Tensor] | None]] = {
    "converter": read_as_source,
    "plugin": read_as_plugin,
    "transformers": read_as_transformers,
}


def make_folders(work: Path) -> dict[str, list[Path]]:
    """Return the undamaged folders of each reader: models, and their converted checkpoints.

    Of the two families, the first checkpoint has several files and an index, the second one a single file. The others
    are models of one bit and three values, in the forms in which such models are published, and one checkpoint; and a
    mixture of experts, and the checkpoints with several planes.
    """
    sources = [
        write_model(work / "qwen3", "Qwen3", shards=3, lively=True),
        write_model(work / "gemma2", "Gemma 2", lively=True),
    ]
    checkpoints = []
    for source, limit in zip(sources, (20_000, merge.MAX_FILE_BYTES), strict=True):
        checkpoints.append(work / f"{source.name}-bwla")
        with patch.object(merge, "MAX_FILE_BYTES", limit):
            convert(Options(str(source), checkpoints[-1], rank=2, recipe="data-free"))
    sources.append(write_mlx(work / "mlx", few_values(), 1, 128))
    sources.append(write_bitnet(work / "bitnet", few_values("Llama", planes=2)))
    checkpoints.append(work / "bitnet-bwla")
    convert(Options(str(sources[-1]), checkpoints[-1], text_samples=0))
    checkpoints += make_checkpoints_with_planes(work)
    sources.append(work / "experts")
    return {"converter": sources, "plugin": checkpoints, "transformers": checkpoints}


def make_checkpoints_with_planes(work: Path) -> list[Path]:
    """Write the models of `conversions.MODELS` and return checkpoints of them with several planes, and several files.

    The planes of the first differ between its input groups, the second has a head in planes, the third is a mixture of
    experts.
    """
    conversions.write_models(work)
    outs = []
    with (
        patch.object(merge, "MAX_FILE_BYTES", 100_000),
        patch.dict(os.environ, {CACHE_VARIABLE: str(work / "cache")}),
    ):
        for name in WITH_PLANES:
            outs.append(work / name.replace(" ", "-"))
            convert(conversions.Case(name, overwrite=False).options(work, outs[-1]))
    return outs


class HangError(Exception):
    """A reader took longer than `LIMIT_S`."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise `HangError` in the body of the with statement after `LIMIT_S` seconds."""

    def stop(number: int, frame: object) -> None:
        raise HangError(f"no answer within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the readers' progress bars and warnings."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
        yield


def judge(
    read: Callable[[Path], dict[str, Tensor] | None], folder: Path, good: Mapping[str, int], must_refuse: bool
) -> tuple[str, str]:
    """Read a damaged folder; return the outcome and the reader's message."""
    try:
        with quiet(), limited():
            tensors = read(folder)
    except HangError as error:
        return "CRASH: hangs", str(error)
    except (BWLAError, StartError) as error:
        text = str(error)
        listed = text.count("\n") == 0 or "problem(s):" in text
        return ("refused", text) if text and listed else ("CRASH: no message", repr(error))
    except HOST_ERRORS as error:
        return (
            ("refused by its host", f"{type(error).__name__}: {error}")
            if str(error)
            else ("CRASH", repr(error))
        )
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = any(Path(frame.filename).is_relative_to(home) for frame in frames for home in OUR_CODE)
        kind = "CRASH" if ours else "crash of its host"
        place = Path(frames[-1].filename)
        return kind, f"{type(error).__name__}: {error} ({place.parent.name}/{place.name}:{frames[-1].lineno})"
    if tensors is None:
        return "not used", ""
    if not finite(tensors):
        return "SILENT: not finite", ""
    now = digest(tensors)
    if must_refuse:
        return ("SILENT: wrong data", "") if now != good else ("SILENT: damage not detected", "")
    return ("other valid data", "") if now != good else ("same data", "")


def run(count: int, seed: int, work: Path, on_case: Callable[[Case], None] = lambda case: None) -> list[Case]:
    """Try `count` mutations, spread over the readers and the kinds of damage; return the outcomes."""
    with quiet():
        folders = make_folders(work)
        good = {
            (reader, folder): digest(READERS[reader](folder) or {})
            for reader in READERS
            for folder in folders[reader]
        }
    cases: list[Case] = []
    kinds: list[Mutation] = [*MUST_REFUSE, *MAY_PASS]
    number = 0
    while len(cases) < count:
        rng = random.Random(seed * 1_000_003 + number)
        number += 1
        reader = sorted(READERS)[number % len(READERS)]
        mutate = kinds[(number // len(READERS)) % len(kinds)]
        damaged = work / "damaged"
        found = damage(folders[reader], damaged, mutate, rng)
        if found is None:
            continue
        origin, what = found
        outcome, message = judge(READERS[reader], damaged, good[reader, origin], mutate in MUST_REFUSE)
        if reader != "converter" and outcome in ("other valid data", "same data", "not used"):
            outcome += ", hashes differ" if not check_intact(damaged) else ", HASHES ARE EQUAL"
        cases.append(Case(number, reader, mutate.__name__, f"{origin.name}: {what}", outcome, message[:300]))
        on_case(cases[-1])
    return cases


def damage(
    origins: Sequence[Path], damaged: Path, mutate: Mutation, rng: random.Random
) -> tuple[Path, str] | None:
    """Write a damaged copy of one of the folders to `damaged`; return which one, and what was changed.

    Returns None if none of the folders contains what the mutation damages.
    """
    for origin in rng.sample(list(origins), len(origins)):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(origin, damaged)
        what = mutate(damaged, rng)
        if what is not None:
            return origin, what
    return None


def check_intact(folder: Path) -> bool:
    """Return whether `bwla-inspect` would call the folder intact."""
    try:
        verdict = check_hashes(folder)
    except BWLAError:
        return False
    return verdict is None or verdict.intact


def is_failure(case: Case) -> bool:
    """Return whether a reader crashed, loaded damaged data, or even the hashes do not show the change."""
    undetected = "HASHES ARE EQUAL" in case.outcome and not case.outcome.startswith("same data")
    return case.outcome.startswith(("CRASH", "SILENT")) or undetected


def summary(cases: list[Case]) -> list[dict[str, Any]]:
    """Return the number of cases by reader and outcome."""
    counts = Counter((case.reader, case.outcome) for case in cases)
    return [
        {"reader": reader, "outcome": outcome, "count": n} for (reader, outcome), n in sorted(counts.items())
    ]


def main() -> int:
    """Run the command line; return 1 if a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="number of mutations (1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (0)")
    parser.add_argument(
        "--engines", type=int, default=0, help="number of damaged checkpoints to start vLLM with (0)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()

    def show(case: Case) -> None:
        if is_failure(case) or case.outcome == "crash of its host":
            print(asdict(case), flush=True)
        elif case.number % 100 == 0:
            print(f"{case.number} ({time.monotonic() - started:.0f} s)", flush=True)

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        cases = run(options.count, options.seed, Path(work), show)
        if options.engines:
            from tests.robustness.engines import run_engines

            cases += run_engines(options.engines, options.seed, Path(work), show)
    rows = summary(cases)
    for row in rows:
        print(f"{row['reader']:13} {row['count']:5}  {row['outcome']}")
    failures = [asdict(case) for case in cases if is_failure(case)]
    hosts = [asdict(case) for case in cases if case.outcome in ("crash of its host", "refused by its host")]
    if options.out:
        shown = [case for case in hosts if case["outcome"] == "crash of its host"]
        write_result(
            options.out, rows, count=len(cases), seed=options.seed, engines=options.engines, failures=failures,
            host_crashes=shown, seconds=round(time.monotonic() - started),
        )  # fmt: skip
    print(f"{len(cases)} cases, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
