"""Build the model that a config.json describes, without memory for its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from bwla_kernels.errors import SourceError
from bwla_kernels.format.folder import text_settings
from transformers import AutoConfig, PreTrainedModel

MAX_LAYERS = 10_000
"""Largest accepted num_hidden_layers. More means that config.json is damaged, and would take hours to build."""

GUIDE = "docs/developer/adding-a-model-family.md"


def build_meta_model(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    """Build the model that the config.json in `folder` describes on the meta device, without memory for its weights.

    Args:
        folder: a folder with a config.json.
        config: its contents.

    Raises:
        SourceError: transformers does not know the architecture, or cannot build the model.
    """
    path = folder / "config.json"
    num_layers = text_settings(config).get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > MAX_LAYERS:
        raise SourceError(
            f"{path}: expected at most {MAX_LAYERS} num_hidden_layers, found {num_layers}: "
            "restore the model's own config.json"
        )
    model_class = find_model_class(config, path)
    try:
        with torch.device("meta"):
            hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
            expected = model_class.config_class
            if expected is not None and not isinstance(hf_config, expected):
                raise SourceError(
                    f"{path}: expected the model_type of {model_class.__name__}, {expected.model_type}, found "
                    f"{hf_config.model_type}: restore the model's own config.json"
                )
            model: PreTrainedModel = model_class(hf_config)
    except SourceError:
        raise
    except ImportError as cause:
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{path}: expected the packages that {model_class.__name__} needs, found one missing ({reason:.100}): "
            "install it"
        ) from None
    except Exception as cause:  # transformers raises many types of exceptions for an inconsistent config
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{path}: transformers cannot build this model ({reason:.300}): restore the model's own config.json"
        ) from None
    return model.eval()


def find_model_class(config: Mapping[str, Any], path: Path) -> type[PreTrainedModel]:
    """Return transformers' class of the model by `architectures` in its config.json; `path` names the file in errors.

    Raises:
        SourceError: transformers does not have the class.
    """
    architectures = config.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise SourceError(
        f"{path}: found the architecture {', '.join(map(str, names)) or 'none'}, expected a model class of "
        f"transformers {transformers.__version__}: correct `architectures`, or update transformers ({GUIDE} describes "
        "what a model needs)"
    )
