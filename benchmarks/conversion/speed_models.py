"""The models that `speed.py` converts."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from bwla_converter.source.folder.files import files_beside
from bwla_converter.source.model import open_source
from safetensors.torch import save_file

from benchmarks.common.real_models import MODELS as REAL_MODELS
from benchmarks.common.real_models import real_model
from benchmarks.conversion.memory import write_random_model


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights.

    Attributes:
        shape: a name in `memory.SHAPES`.
        layers: how many decoder layers it has unless a number is asked for.
    """

    shape: str
    layers: int


RANDOM_MODELS = {"qwen3-0.6b": RandomModel("0.6b", 4), "qwen3-8b": RandomModel("8b", 1)}


def make_model(name: str, layers: int | None, folder: Path) -> Path:
    """Return the folder of a model.

    Args:
        name: one of `real_models.MODELS` or `RANDOM_MODELS`, or the folder of a model.
        layers: number of decoder layers, the first ones; None for all of a real model, and for those that
            `RANDOM_MODELS` says.
        folder: where a model is written that does not exist yet.
    """
    if name in RANDOM_MODELS:
        model = RANDOM_MODELS[name]
        folder.mkdir(parents=True)
        write_random_model(folder, layers or model.layers, model.shape)
        return folder
    whole = real_model(name) if name in REAL_MODELS else Path(name)
    return whole if layers is None else write_first_layers(whole, layers, folder)


def write_first_layers(model: Path, layers: int, folder: Path) -> Path:
    """Write a model's first decoder layers and everything outside its layers to `folder`; return the folder."""
    source = open_source(str(model))
    folder.mkdir(parents=True)
    for name in files_beside(source.folder).kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.folder / name, folder / name)
    config = dict(source.config)
    config["num_hidden_layers"] = min(layers, source.num_layers)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    names = source.names_outside_layers()
    for index in range(config["num_hidden_layers"]):
        names += source.names_of_layer(index)
    save_file(source.read(names), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
