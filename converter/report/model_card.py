"""The model card, README.md of a checkpoint: metadata that the Hub reads, and what a reader must know."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bwla_converter.checkpoint.contents import Contents, kind_of
from bwla_converter.checkpoint.integrity import update_hash
from bwla_converter.common.atomic_files import whole_file
from bwla_converter.report.data import PAGE_FILE, calibration_warning
from bwla_converter.source.model import HUB_ID
from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.format.folder import read_json
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

CARD_FILE = "README.md"
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What is taken over from the metadata of the original's card."""

EVALUATION = ("<!-- evaluation -->", "<!-- end of evaluation -->")
"""What stands between these is replaced by `add_evaluation`."""


def source_metadata(folder: Path) -> dict[str, Any]:
    """What the card of the original in `folder` says of licence, language and task; empty without a readable card."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        found = metadata_load(path)
    except (
        Exception
    ):  # of PyYAML and of the library itself; a broken card of the original is no reason to stop
        return {}
    return {key: found[key] for key in KEPT if isinstance(found, dict) and found.get(key)}


def model_card(contents: Contents, metadata: Mapping[str, Any], place: str = "./THIS_FOLDER") -> str:
    """The text of the card.

    Args:
        contents: the checkpoint.
        metadata: from `source_metadata`.
        place: what to call the checkpoint in commands: its name on the Hub where that is known.
    """
    base = contents.format.provenance.base_model
    on_hub = HUB_ID.fullmatch(base) is not None and bool(contents.format.provenance.revision)
    relation = {"base_model": base, "base_model_relation": "quantized"} if on_hub else {}
    fields: dict[str, Any] = {"pipeline_tag": "text-generation", **metadata, **relation}
    data = ModelCardData(library_name="vllm", tags=["bwla", "1-bit", "vllm", "quantized"], **fields)
    body = "\n\n".join(
        part
        for part in (
            f"# {base.rpartition('/')[2] or 'A model'}, BWLA 1-bit",
            _what(contents, f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`"),
            _bits(contents),
            _serving(contents, place),
            _made(contents),
            "\n".join(EVALUATION),
            _limits(contents, "license" in metadata),
        )
        if part
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _what(contents: Contents, base: str) -> str:
    bits = contents.format.bits
    inputs = "activations left as they are" if bits == 16 else f"{bits}-bit activations"
    page = (
        f" [{PAGE_FILE}]({PAGE_FILE}) shows how that went, layer by layer."
        if (contents.folder / PAGE_FILE).is_file()
        else ""
    )
    return (
        f"{base} with 1-bit weights and {inputs}, made with `bwla-convert`, after "
        "[BWLA (arXiv 2605.00422)](https://arxiv.org/abs/2605.00422). Every quantized linear layer stores the signs of "
        f"its rotated weight, row and column scales{_rank_words(contents)} and the rotation's factors.{page}"
    )


def _rank_words(contents: Contents) -> str:
    ranks = sorted({spec.rank for spec in contents.specs.values()})
    return "" if ranks == [0] else f", a low-rank correction of rank {', '.join(map(str, ranks))}"


def _bits(contents: Contents) -> str:
    rows = "\n".join(f"| {part} | {bits:.4f} |" for part, bits in contents.bits.items() if bits)
    head = "8-bit" if contents.format.lm_head is not None else "not quantized"
    return (
        f"## Size\n\n{sum(contents.bytes.values()):,} bytes of tensors; {contents.weights:,} quantized weights at "
        f"{contents.bits_per_weight:.4f} bits each, everything that is stored for them counted:\n\n"
        f"| what for | bits per weight |\n|---|---|\n{rows}\n\n"
        f"The language-model head is {head}; embeddings and norms are as they were."
    )


def _serving(contents: Contents, place: str) -> str:
    return (
        "## Use\n\nWith the `bwla` package installed beside vLLM:\n\n"
        f"```\nvllm serve {place} --quantization bwla\n```\n\n"
        "In transformers:\n\n"
        "```python\nimport bwla_converter.hf\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}")\n```\n\n'
        "`bwla-inspect` shows what is inside and checks the files against their hashes."
    )


def _made(contents: Contents) -> str:
    warning = calibration_warning(contents.format.provenance.calibration)
    provenance = contents.format.provenance
    lines = [f"bwla {provenance.bwla_version}", f"recipe `{provenance.recipe}`", f"seed {provenance.seed}"]
    if provenance.revision:
        lines.append(f"base model at revision `{provenance.revision}`")
    if provenance.calibration:
        text = ", ".join(f"{key} `{value}`" for key, value in provenance.calibration.items())
        lines.append(f"calibration text: {text}")
    listed = "\n".join(f"- {line}" for line in lines)
    note = f"\n\n**{warning}**" if warning else ""
    return f"## How it was made\n\n```\n{command(contents)}\n```\n\n{listed}{note}"


def command(contents: Contents) -> str:
    """The command that makes this checkpoint again; paths of the machine that made it are not told."""
    format_, provenance = contents.format, contents.format.provenance
    words = ["bwla-convert", provenance.base_model, "OUT", "--recipe", provenance.recipe]
    calibration = provenance.calibration
    if calibration:
        words += ["--calibration", str(calibration.get("source", ""))]
        words += [
            word
            for key in ("samples", "length")
            if key in calibration
            for word in (f"--{key}", str(calibration[key]))
        ]
    if isinstance(format_.rank, int):
        words += ["--rank", str(format_.rank)]
    words += ["--abits", str(format_.bits)]
    if isinstance(format_.clip, float) and format_.clip != 1.0:
        words += ["--clip", str(format_.clip)]
    words += ["--lm-head-bits", "8" if format_.lm_head is not None else "16", "--seed", str(provenance.seed)]
    words += [word for name in format_.ignore if name != "lm_head" for word in ("--ignore", name)]
    return shlex.join(words)


def _limits(contents: Contents, licensed: bool) -> str:
    kinds = ", ".join(dict.fromkeys(map(kind_of, contents.specs)))
    licence = "" if licensed else " The licence is that of the base model."
    return (
        f"## Limits\n\nOne bit costs accuracy, small models far more than large ones: measure it on your own task "
        f"(`bwla-eval`) before you rely on it. Only the linear layers of the blocks are quantized ({kinds}). What "
        f"is said of the base model's uses, biases and risks holds here too.{licence}"
    )


def write_card(folder: Path, text: str) -> None:
    """Put README.md in its place, whole or not at all."""
    with whole_file(folder / CARD_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def add_evaluation(folder: Path, evaluation: Path) -> None:
    """Put the figures of a `bwla-eval --out` file into a checkpoint's card, in place of those from before.

    Raises:
        SourceError: that file is none of `bwla-eval`.
        FormatError: the checkpoint has no card, or the place for figures was taken out of it.
    """
    data = read_json(evaluation, SourceError)
    results = data.get("results")
    try:
        rows = {name: (float(row["original"]), float(row["bwla"])) for name, row in results.items()}  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(
            f"{evaluation}: expected results with an original and a bwla figure each, found something else: "
            "give a file that bwla-eval --out wrote"
        ) from None
    text_name = Path(str(data.get("text", "text"))).name
    path = folder / CARD_FILE
    before, begin, rest = (
        path.read_text(encoding="utf-8").partition(EVALUATION[0]) if path.is_file() else ("", "", "")
    )
    _, end, after = rest.partition(EVALUATION[1])
    if not begin or not end:
        raise FormatError(
            f"{path}: expected a card with {EVALUATION[0]} and {EVALUATION[1]}, found none: "
            "put the two lines where the figures are to be"
        )
    lines = "\n".join(f"| {name} | {original:.4g} | {bwla:.4g} |" for name, (original, bwla) in rows.items())
    section = (
        f"\n## Evaluation\n\nText: {text_name}, windows of {data.get('window')} tokens.\n\n"
        f"| | original | this model |\n|---|---|---|\n{lines}\n"
    )
    card = ModelCard(before + begin + section + end + after)
    figures = [
        EvalResult(
            task_type="text-generation",
            dataset_type=text_name,
            dataset_name=text_name,
            metric_type="perplexity" if name == "perplexity" else name,
            metric_value=round(bwla, 6),
        )
        for name, (_, bwla) in rows.items()
        if math.isfinite(bwla)
    ]
    card.data["model_name"] = card.data.get("model_name") or folder.resolve().name
    card.data["eval_results"] = figures
    write_card(folder, str(card))
    update_hash(folder, CARD_FILE)
