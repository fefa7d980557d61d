"""Tables about GPUs."""

from collections.abc import Mapping

from scripts.tables.results import markdown_table, read_result

GPU_LAYERS = (
    ("gate_up", 1),
    ("down", 1),
    ("qkv", 1),
    ("o", 1),
    ("gate_up", 8),
    ("gate_up", 4096),
    ("qkv", 4096),
)
"""Linears of Qwen3-32B and numbers of tokens in the GPU table: every linear at one token, then larger batches."""


def gpu_table(name: str) -> str:
    """One line per linear of Qwen3-32B: microseconds of BWLA and of cuBLAS in bfloat16."""
    steps = read_result(name)["rows"]
    layers = {(row["layer"], row["m"]): row for row in steps["layer"] if row.get("model") == "32b"}
    heads = {
        row["head"]: row
        for row in steps["chain"]
        if row.get("head") and row["model"] == "32b" and row["m"] == 1
    }
    times = [
        (f"{layer} ({row['n']} x {row['k']}), {m} token{'s' * (m > 1)}", row["fused_us"], row["bf16_us"])
        for layer, m in GPU_LAYERS
        if (row := layers[layer, m])["ok"]
    ]
    head = heads["triton"]
    title = f"8-bit head ({head['v']} x {head['k']}), 1 token"
    times.append((title, head["head_us"], heads["bf16"]["head_us"]))
    return markdown_table(
        ["Qwen3-32B on an H200, microseconds", "BWLA", "cuBLAS bf16", "speedup"],
        [[what, f"{ours:.1f}", f"{bf16:.1f}", f"{bf16 / ours:.1f}x"] for what, ours, bf16 in times],
    )


def gpu_step_table(model: str, name: str) -> str:
    """One line per launch of a decoder layer's linears: bytes, expected and measured microseconds, and their sums.

    Args:
        model: a model of `benchmarks.kernels.gpu.shapes`.
        name: the result of `benchmarks.kernels.gpu_report`.
    """
    from benchmarks.kernels import gpu_estimate
    from benchmarks.kernels.gpu.shapes import MODELS

    day = read_result(name)
    measured = gpu_estimate.measured_layers(day, model)
    lines, total = [], {"bytes": 0.0, "before": 0.0, "after": 0.0}
    for layer, shape in MODELS[model].items():
        sizes = {"input": gpu_estimate.input_bytes(shape), "matmul": gpu_estimate.matmul_bytes(shape)}
        for kernel, size in sizes.items():
            cost = gpu_estimate.Cost(layer, kernel, size, 0)
            before, after = (cost.expected(when) for when in (gpu_estimate.BEFORE, gpu_estimate.AFTER))
            total = {
                "bytes": total["bytes"] + size,
                "before": total["before"] + before,
                "after": total["after"] + after,
            }
            time_us = measured.get((layer, kernel))
            cells = [layer, kernel, f"{size / 1e6:.2f}", f"{before:.1f}", f"{after:.1f}"]
            lines.append([*cells, "unmeasured" if time_us is None else f"{time_us:.1f}"])
    chain = gpu_estimate.measured_chain(day, model)
    sums = [f"{total['bytes'] / 1e6:.1f}", f"{total['before']:.1f}", f"{total['after']:.1f}"]
    together = f"{chain['early']:.1f} (in turn {chain['in turn']:.1f}, late {chain['late']:.1f})"
    lines.append(["all four", "8 launches", *sums, together])
    header = ["linear", "kernel", "MB", "expected before, us", "expected now, us", "measured, us"]
    return "\n".join([markdown_table(header, lines), "", _whole_model(model, total, chain)])


def _whole_model(model: str, total: Mapping[str, float], chain: Mapping[str, float]) -> str:
    """Return the sentence about all decoder layers of a model."""
    from benchmarks.kernels.gpu.shapes import DECODER_LAYERS
    from benchmarks.kernels.gpu_estimate import BANDWIDTH

    layers = DECODER_LAYERS[model]
    floor = layers * total["bytes"] / BANDWIDTH / 1e9
    before, after, measured = (
        layers * value / 1e3 for value in (total["before"], total["after"], chain["early"])
    )
    return (
        f"{layers} layers: {floor:.2f} ms of memory traffic at {BANDWIDTH} TB/s; expected {before:.2f} ms "
        f"before and {after:.2f} ms now; measured {measured:.2f} ms."
    )


def compiled_text(name: str) -> str:
    """One sentence: for what the Triton kernels were compiled, and how many of them spill registers."""
    result = read_result(name)
    architectures = sorted({row["arch"] for row in result["rows"]})
    *others, last = (str(architecture) for architecture in architectures)
    spilling = sum(row["spills"] > 0 for row in result["rows"])
    return (
        f"Compiled ahead of time with Triton {result['triton']} for sm_{', '.join(others)} and {last}: "
        f"{len(result['rows']):,} configurations, of which {spilling or 'none'} spill{'s' * (spilling == 1)} registers "
        f"([result](../benchmarks/results/{name}.json))."
    )
