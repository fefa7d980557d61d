"""Measurements on a GPU in short steps, each of which leaves its results behind whatever happens to the next.

`gpu_day.py` runs the steps (`scripts/gpu_day.sh` on an isolated machine), `gpu_report.py` reads what they left.
"""
