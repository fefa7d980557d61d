"""The model card, README.md of a checkpoint, with metadata for the Hugging Face Hub."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bwla_converter.allocation.stage import target_option
from bwla_converter.checkpoint.contents import Contents, describe_weights
from bwla_converter.checkpoint.integrity import update_hash
from bwla_converter.common.atomic_files import whole_file
from bwla_converter.report.data import PAGE_FILE, calibration_warning
from bwla_converter.report.templating import environment
from bwla_converter.source.folder.locate import HUB_ID
from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.format.experts import kind_of
from bwla_kernels.format.folder import read_json
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

CARD_FILE = "README.md"
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata that is copied from the card of the original model."""

EVALUATION = ("<!-- evaluation -->", "<!-- end of evaluation -->")
"""Marks before and after the results, which `add_evaluation` replaces."""

LOCAL_FOLDER = "./THIS_FOLDER"
"""Stands for the checkpoint in the card's commands if its name on the Hub is not known."""

CALIBRATION_FLAGS = {"samples": "--num-calibration-samples", "length": "--max-seq-length"}
"""Command-line flags of the numbers in the provenance of the calibration text."""


def source_metadata(folder: Path) -> dict[str, Any]:
    """Return licence, language and task from the card of the model in `folder`; empty without a readable card."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        metadata = metadata_load(path)
    except (
        Exception
    ):  # of PyYAML and of huggingface_hub; a broken card of the original must not stop a conversion
        return {}
    return {key: metadata[key] for key in KEPT if isinstance(metadata, dict) and metadata.get(key)}


def model_card(contents: Contents, metadata: Mapping[str, Any], location: str = LOCAL_FOLDER) -> str:
    """Return the text of the card.

    Args:
        contents: the checkpoint.
        metadata: from `source_metadata`.
        location: how commands refer to the checkpoint: its name on the Hub, if that is known.
    """
    provenance, bits = contents.format.provenance, contents.format.bits
    base = provenance.base_model
    on_hub = HUB_ID.fullmatch(base) is not None and bool(provenance.revision)
    relation = {"base_model": base, "base_model_relation": "quantized"} if on_hub else {}
    fields: dict[str, Any] = {"pipeline_tag": "text-generation", **metadata, **relation}
    planes = planes_of(contents)
    tags = ["bwla", *(["1-bit"] if planes == {1} else []), "vllm", "quantized"]
    data = ModelCardData(library_name="vllm", tags=tags, **fields)
    return (
        environment()
        .get_template("model_card.md")
        .render(
            metadata=data.to_yaml(),
            title=base.rpartition("/")[2] or "A model",
            base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
            weights=describe_weights(planes),
            activations="unquantized activations" if bits == 16 else f"{bits}-bit activations",
            contents=contents,
            provenance=provenance,
            ranks=sorted({spec.rank for spec in contents.specs.values()}),
            page=PAGE_FILE,
            has_page=(contents.folder / PAGE_FILE).is_file(),
            location=location,
            command=command(contents),
            warning=calibration_warning(provenance.calibration),
            evaluation="\n".join(EVALUATION),
            kinds=", ".join(dict.fromkeys(map(kind_of, contents.specs))),
            licensed="license" in metadata,
        )
    )


def planes_of(contents: Contents) -> set[int]:
    """Return the numbers of planes that the decoder layers' linears have."""
    return {spec.planes for spec in contents.specs.values()}


def command(contents: Contents) -> str:
    """Return the command that reproduces this checkpoint, without local paths."""
    format_, provenance = contents.format, contents.format.provenance
    words = ["bwla-convert", provenance.base_model, "OUT", "--recipe", contents.recipe]
    calibration = provenance.calibration
    if calibration:
        words += ["--calibration", str(calibration.get("source", ""))]
        for key, flag in CALIBRATION_FLAGS.items():
            words += [flag, str(calibration[key])] if key in calibration else []
    if provenance.allocation:
        words += target_option(provenance)
    else:
        words += [word for count in planes_of(contents) if count > 1 for word in ("--planes", str(count))]
    if isinstance(format_.rank, int):
        words += ["--rank", str(format_.rank)]
    words += ["--abits", str(format_.bits)]
    if isinstance(format_.clip, float) and format_.clip != 1.0:
        words += ["--clip", str(format_.clip)]
    words += ["--lm-head-bits", str(contents.head_bits), "--embedding-bits", str(contents.embedding_bits)]
    words += ["--seed", str(provenance.seed)]
    words += [word for name in format_.ignore if name != "lm_head" for word in ("--ignore", name)]
    return shlex.join(words)


def write_card(folder: Path, text: str) -> None:
    """Write README.md atomically."""
    with whole_file(folder / CARD_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def add_evaluation(folder: Path, evaluation: Path) -> None:
    """Put the results of a `bwla-eval --out` file into a checkpoint's card, replacing earlier results.

    Raises:
        SourceError: the file was not written by `bwla-eval`.
        FormatError: the checkpoint has no card, or the marks for the results were removed from it.
    """
    data = read_json(evaluation, SourceError)
    results = data.get("results")
    try:
        rows = {name: (float(row["original"]), float(row["bwla"])) for name, row in results.items()}  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(
            f"{evaluation}: expected results with the numbers original and bwla, found something else: "
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
            "add the two lines where the results should go"
        )
    lines = "\n".join(f"| {name} | {original:.4g} | {bwla:.4g} |" for name, (original, bwla) in rows.items())
    section = (
        f"\n## Evaluation\n\nText: {text_name}, sequence length {data.get('window')} tokens.\n\n"
        f"| | original | this model |\n|---|---|---|\n{lines}\n"
    )
    card = ModelCard(before + begin + section + end + after)
    metrics = [
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
    card.data["eval_results"] = metrics
    write_card(folder, str(card))
    update_hash(folder, CARD_FILE)
