"""All cases of the coverage run, by name."""

from collections.abc import Mapping

from benchmarks.coverage.case import Case
from benchmarks.coverage.dense import DENSE
from benchmarks.coverage.experts import EXPERTS
from benchmarks.coverage.hybrid import HYBRID
from benchmarks.coverage.multimodal import EMBEDDING, MULTIMODAL

CASES: Mapping[str, Case] = {case.name: case for case in (*DENSE, *EXPERTS, *HYBRID, *MULTIMODAL, *EMBEDDING)}
"""The cases, in the order of the table."""

SELECTION: Mapping[str, str] = {
    "linears stored as one": "phi3",
    "attention and MLP read the same input": "cohere2",
    "convolutions": "lfm2",
    "linear attention": "qwen3_5_text",
    "multi-head latent attention": "deepseek_v2",
    "experts": "qwen3_moe",
    "a decoder in a multimodal model": "gemma3",
}
"""Kinds of decoder layers, each with the case that the tests convert and serve."""
