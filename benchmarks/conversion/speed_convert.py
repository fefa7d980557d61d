"""Convert a model as `bwla-convert` does, and measure seconds, CPU seconds and peak memory, split by phase.

    python -m benchmarks.conversion.speed_convert RESULT MODEL OUT [options of bwla-convert]

`speed.py` runs this module for each conversion. RESULT is the JSON file to write.
"""

import json
import sys
from pathlib import Path

from bwla_converter.cli.convert import app

from benchmarks.conversion.peers import Meter


def main() -> int:
    """Run the command line; return the exit status of the conversion."""
    # Imported here, because what `bwla_converter.cli` tells OpenMP must be known before torch is imported. Everything
    # that a conversion needs is imported before the clock starts.
    import bwla_converter.pipeline  # noqa: F401
    from bwla_converter.checkpoint.contents import read_contents

    from benchmarks.conversion.speed_phases import PhaseClock, phases_counted

    result, *arguments = sys.argv[1:]
    clock, meter = PhaseClock(), Meter()
    with phases_counted(clock):
        status = app(arguments, standalone_mode=False)
    measured = {**meter.read(), "phases": clock.totals()}
    if status:
        return int(status)
    contents = read_contents(Path(arguments[1]))
    measured |= {"weights": contents.weights, "bits_per_weight": round(contents.bits_per_weight, 4)}
    Path(result).write_text(json.dumps(measured), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
