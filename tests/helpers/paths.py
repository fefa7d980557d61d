"""Paths of the repository and of its example."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
EXAMPLES = ROOT / "examples"
EXAMPLE = EXAMPLES / "model"
CALIBRATION_TEXT = EXAMPLES / "text" / "calibration.txt"
HELDOUT_TEXT = EXAMPLES / "text" / "heldout.txt"
