"""All cases of the coverage run, by name."""

from collections.abc import Mapping

from benchmarks.coverage.case import Case
from benchmarks.coverage.dense import DENSE
from benchmarks.coverage.experts import EXPERTS
from benchmarks.coverage.hybrid import HYBRID
from benchmarks.coverage.multimodal import EMBEDDING, MULTIMODAL

CASES: Mapping[str, Case] = {case.name: case for case in (*DENSE, *EXPERTS, *HYBRID, *MULTIMODAL, *EMBEDDING)}
"""The cases, in the order of the table."""
