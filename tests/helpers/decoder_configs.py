"""Tiny configurations of many architectures, for tests that observe structure; no weights are built."""

import json
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
"""Name -> architecture, model_type and settings."""


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """Write the config.json of a case to `folder`, and nothing else; return the folder."""
    from transformers import AutoConfig

    case = CONFIGS[name]
    settings = {**case["settings"], **changes}
    config = AutoConfig.for_model(case["model_type"], **settings, architectures=[case["architecture"]])
    config.save_pretrained(folder)
    return folder
