"""The config.json of a model in a GGUF file.

transformers' table of keys says what most of them are called in config.json. What it leaves out, each architecture's
function in `gguf_models` adds.
"""

import logging

from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models.architectures import (
    ARCHITECTURES,
    REFUSED,
    Architecture,
    find_architecture,
)
from bwla_converter.source.gguf_models.common import EMBEDDING
from bwla_converter.source.gguf_models.keys import Keys
from bwla_kernels.errors import SourceError
from transformers import AutoConfig, PretrainedConfig


def architecture_of(file: GGUFFile) -> Architecture:
    """Return the architecture of the model in a GGUF file.

    Raises:
        SourceError: it is not supported.
    """
    found = find_architecture(file.architecture)
    if found is not None:
        return found
    supported = ", ".join(entry.gguf for entry in ARCHITECTURES)
    reason = f" ({REFUSED[file.architecture]})" if file.architecture in REFUSED else ""
    raise SourceError(
        f"{file.path}: found the architecture {file.architecture}{reason}, expected one of {supported}: "
        "use a supported model"
    )


def make_config(file: GGUFFile) -> PretrainedConfig:
    """Return the configuration of the model in a GGUF file, as its config.json would be.

    Raises:
        SourceError: the architecture is not supported, a setting is missing or has no counterpart in transformers.
    """
    architecture = architecture_of(file)
    keys = Keys(file)
    if architecture.gguf == "llama" and keys.get("expert_count"):
        raise SourceError(
            f"{file.path}: is a mixture of experts of the architecture llama, which is not supported: use a dense model"
        )
    if EMBEDDING not in file.tensors:
        raise SourceError(f"{file.path}: expected the tensor {EMBEDDING}, found none: get the file again")
    try:
        settings = architecture.settings(file, keys)
        config = AutoConfig.for_model(
            architecture.model_type, architectures=[architecture.model_class], **settings
        )
    except SourceError:
        raise
    except Exception as cause:  # for values of other types than expected, or that contradict each other
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{file.path}: transformers cannot use the settings in its metadata ({reason:.300}): get the file again"
        ) from None
    for key in keys.unread():
        logging.getLogger(__name__).warning("%s: %s is not used", file.path.name, key)
    return config
