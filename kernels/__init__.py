"""The arithmetic of one BWLA layer: checkpoint format, reference implementation, torch ops and backends.

Depends on torch, safetensors and, for the config schema, compressed-tensors and pydantic; on no other package of this
project.
"""
