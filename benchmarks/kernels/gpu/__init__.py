"""GPU measurements in short, independent steps.

`gpu_day.py` runs the steps (`scripts/gpu_day.sh` on an isolated machine), `gpu_report.py` reports their results.
"""
