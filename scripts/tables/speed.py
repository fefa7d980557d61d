"""Tables about speed and memory, of serving and of conversion."""

from typing import Any

from scripts.tables.results import METHODS, markdown_table, read_result

CONVERSION_PEERS = {
    "llmcompressor-gptq": "GPTQ, 4 bits (llm-compressor)",
    "gptqmodel-gptq": "GPTQ, 4 bits (GPTQModel)",
    "autoround-light": "AutoRound light, 4 bits",
}
CPU_LAYERS = ((4096, 2048), (24576, 4096), (4096, 12288), (10240, 5120), (51200, 5120), (5120, 25600))
"""Linears (N, K) of Qwen3-1.7B, 8B and 32B in the CPU table."""


def cpu_table(name: str) -> str:
    """One line per linear: BWLA and vLLM's bf16 linear, for one token and for 128."""
    rows = {(row["n"], row["k"], row["m"]): row for row in read_result(name)["rows"]}
    lines = []
    for n, k in CPU_LAYERS:
        one, many = rows[n, k, 1], rows[n, k, 128]
        times = [f"{row['bwla_us']:.0f} / {row['vllm_bf16_us']:.0f}" for row in (one, many)]
        ratios = [f"{row['vllm_bf16_us'] / row['bwla_us']:.1f}x" for row in (one, many)]
        kernel = f"{many['vllm_bf16_us'] / many['bwla_matmul_us']:.1f}x"
        share = f"{one['read_share']:.2f}"
        lines.append([f"{n} x {k}", times[0], ratios[0], share, times[1], ratios[1], kernel])
    header = ["N x K", "M = 1: BWLA / bf16 (us)", "speedup", "GEMM alone, share of read bandwidth"]
    return markdown_table([*header, "M = 128: BWLA / bf16 (us)", "speedup", "GEMM alone"], lines)


def experts_table(name: str) -> str:
    """One line per number of tokens: the one-bit experts of a layer and vLLM's bf16 experts."""
    lines = []
    for row in read_result(name)["rows"]:
        ours, bf16, bound = (
            f"{row[key] / 1e3:.2f}" for key in ("bwla_rank0_us", "vllm_bf16_us", "bwla_rank0_bound_us")
        )
        lines.append(
            [
                str(row["m"]),
                f"{row['experts_used']:.0f}",
                f"{ours} / {bf16}",
                f"{row['bf16_to_bwla_rank0']:.1f}x",
                f"{row['bf16_to_bwla_rank16']:.1f}x",
                bound,
            ]
        )
    header = ["tokens", "experts used", "BWLA / bf16 (ms)", "speedup", "speedup, rank 16"]
    return markdown_table([*header, "reading the 1-bit weights once (ms)"], lines)


def variants_table(name: str) -> str:
    """One line per linear and number of tokens: the CPU kernel with table lookup and with AMX, one and two threads."""
    rows = {(row["n"], row["k"], row["m"], row["threads"]): row for row in read_result(name)["rows"]}
    lines = []
    for n, k, m in sorted(
        {key[:3] for key in rows if key[2] in (16, 512)}, key=lambda key: (key[2], key[0] * key[1])
    ):
        cells = [f"{n} x {k}", str(m)]
        for threads in (1, 2):
            row = rows[n, k, m, threads]
            cells += [f"{row['before_us']:.0f} / {row['after_us']:.0f}", f"{row['speedup']:.1f}x"]
        lines.append([*cells, f"{rows[n, k, m, 1]['after_gmacs']:.0f}"])
    header = ["N x K", "M", "one thread: table lookup / AMX (us)", "speedup", "two threads (us)", "speedup"]
    return markdown_table([*header, "AMX, one thread: 10^9 multiply-adds/s"], lines)


def _model(row: dict[str, Any]) -> str:
    """Return the name of a row's model, with its head if that is not one of 8 bits."""
    bits = row.get("head_bits", 8)
    return str(row["model"]) + ("" if bits == 8 else f", head in {bits} planes")


def _llama_kinds(row: dict[str, Any]) -> list[str]:
    """Return the types of weights with which llama.cpp was timed beside a row: `llama_Q4_0`, for example."""
    ends = (key.partition("_file_bytes") for key in row if key.startswith("llama_"))
    return [kind for kind, end, _ in ends if end]


def serving_table(names: str) -> str:
    """One line per model and batch size: decode, prefill and memory in vLLM, BWLA and bf16."""
    lines = []
    for row in (row for name in names.split("+") for row in read_result(name)["rows"]):
        cells = [_model(row), str(row["batch"])]
        for phase, digits in (("decode", 1), ("prefill", 0)):
            ours, bf16 = row[f"bwla_{phase}_tok_s"], row.get(f"bf16_{phase}_tok_s")
            cells.append(f"{ours:.{digits}f} / " + ("-" if bf16 is None else f"{bf16:.{digits}f}"))
            cells.append("" if bf16 is None else f"{ours / bf16:.1f}x")
        bf16 = row.get("bf16_resident_bytes")
        memory = "-" if bf16 is None else f"{bf16 / 1e9:.1f}"
        lines.append([*cells, f"{row['bwla_resident_bytes'] / 1e9:.1f} / {memory}"])
    header = ["model", "batch", "decode BWLA / bf16", "speedup", "prefill BWLA / bf16", "speedup"]
    return markdown_table([*header, "memory BWLA / bf16 (GB)"], lines)


def llama_table(names: str) -> str:
    """One line per model and type of llama.cpp's weights: file size, decode and prefill, and BWLA's speed over them."""
    lines = []
    for row in (row for name in names.split("+") for row in read_result(name)["rows"]):
        kinds = _llama_kinds(row)
        if kinds:
            size = f"{row['bwla_checkpoint_bytes'] / 1e9:.1f}"
            ours = [f"{row['bwla_decode_tok_s']:.1f}", "", f"{row['bwla_prefill_tok_s']:.0f}", ""]
            lines.append([_model(row), "BWLA in vLLM", size, *ours])
        for kind in kinds:
            cells = [_model(row), f"llama.cpp {kind.removeprefix('llama_')}"]
            cells.append(f"{row[f'{kind}_file_bytes'] / 1e9:.1f}")
            for phase, digits in (("decode", 1), ("prefill", 0)):
                theirs = row[f"{kind}_{phase}_tok_s"]
                cells += [f"{theirs:.{digits}f}", f"{row[f'bwla_{phase}_tok_s'] / theirs:.1f}x"]
            lines.append(cells)
    header = ["model", "engine", "file (GB)", "decode", "BWLA / this", "prefill", "BWLA / this"]
    return markdown_table(header, lines)


def imported_table(names: str) -> str:
    """One line per model and type of a file: llama.cpp's speed, vLLM's on the imported checkpoint, and the ratios."""
    lines = []
    for row in (row for name in names.split("+") for row in read_result(name)["rows"]):
        cells = [row["model"], row["type"]]
        for phase, digits in (("decode", 1), ("prefill", 0)):
            theirs, ours = row[f"llama_{phase}_tok_s"], row[f"bwla_{phase}_tok_s"]
            cells += [f"{theirs:.{digits}f}", f"{ours:.{digits}f}", f"{ours / theirs:.1f}x"]
        lines.append([*cells, f"{row['bwla_decode_8_tok_s']:.0f}"])
    engines = ["llama.cpp", "BWLA in vLLM", "ratio"]
    header = [
        "model",
        "type",
        *(f"{phase}, {engine}" for phase in ("decode", "prefill") for engine in engines),
    ]
    return markdown_table([*header, "decode, 8 requests"], lines)


def groups_table(name: str) -> str:
    """One line per shape and activation bits: how many times the time of one scale a row each layer takes."""
    rows, lines = read_result(name)["rows"], []
    layers = [row["layer"] for row in rows if row["layer"] != "row"]
    names = list(dict.fromkeys(layers))
    for n, k, bits in dict.fromkeys((row["n"], row["k"], row["bits"]) for row in rows):
        mine = {row["layer"]: row for row in rows if (row["n"], row["k"], row["bits"]) == (n, k, bits)}
        ratios = [f"{mine[layer]['to_row']:.2f}x" if layer in mine else "" for layer in names]
        lines.append([f"{n} x {k}", str(bits), f"{mine['row']['us']:.0f}", *ratios])
    return markdown_table(["N x K", "activation bits", "one scale a row (us)", *names], lines)


ENGINES = {
    "eager": "not compiled (`--enforce-eager`)",
    "aot": "compiled ahead of time, vLLM's default",
    "default": "with the plugin",
}


def start_table(name: str) -> str:
    """One line per model and kind of engine: seconds from the start of the process to the first answer."""
    rows = read_result(name)["rows"]
    kinds = dict.fromkeys((row["model"], row["engine"]) for row in rows)
    lines = [
        [
            model,
            ENGINES[engine],
            *(
                f"{row['first_answer_s']:.0f}"
                for row in rows
                if (row["model"], row["engine"]) == (model, engine)
            ),
        ]
        for model, engine in kinds
    ]
    return markdown_table(["model", "engine", "first start (s)", "second start (s)"], lines)


LENGTHS = ("prefill", "prefill_2048", "decode", "decode_1024", "decode_4096")
"""Figures of the table of prompt and context lengths."""


def lengths_table(names: str) -> str:
    """One line per engine: tokens per second with short and long prompts and contexts, for one request."""
    lines: list[list[str]] = []
    for row in (row for name in names.split("+") for row in read_result(name)["rows"]):
        if "bwla_decode_4096_tok_s" not in row:
            continue
        engines = {"bwla": f"{_model(row)}, BWLA", "bf16": f"{row['model']}, vLLM bf16"}
        for kind in _llama_kinds(row):
            engines[kind] = f"{row['model']}, llama.cpp {kind.removeprefix('llama_')}"
        for engine, title in engines.items():
            if all(line[0] != title for line in lines):
                found = [row.get(f"{engine}_{what}_tok_s") for what in LENGTHS]
                lines.append([title, *("" if speed is None else f"{speed:.1f}" for speed in found)])
    header = ["", "prefill 256", "prefill 2,048", "decode", "behind 1,024 tokens", "behind 4,096"]
    return markdown_table(header, lines)


def conversion_table(name: str) -> str:
    """One line per model and method: what a conversion costs."""
    lines = []
    for row in read_result(name)["rows"]:
        method = METHODS.get(row["method"]) or CONVERSION_PEERS[row["method"]]
        text = f"{row['tokens']:,}" if row["tokens"] else "none"
        model = f"{row['model']}, {row['layers']} layer{'s' * (row['layers'] > 1)}"
        cells = [model, method, f"{row['weights'] / 1e6:.0f}", text]
        lines.append([*cells, f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['peak_gb']:.2f}"])
    header = ["model", "method", "million weights", "tokens", "seconds", "CPU seconds", "peak memory (GB)"]
    return markdown_table(header, lines)


def phase_table(name: str) -> str:
    """One line per phase of a conversion: its seconds for each recipe, for the first model of the result."""
    rows = [row for row in read_result(name)["rows"] if "phases" in row]
    rows = [row for row in rows if row["model"] == rows[0]["model"]]
    phases: dict[str, float] = {}
    for row in rows:
        for phase, part in row["phases"].items():
            phases[phase] = max(phases.get(phase, 0.0), part["seconds"])
    lines = []
    for phase in sorted(phases, key=lambda phase: -phases[phase]):
        parts = [row["phases"].get(phase) for row in rows]
        lines.append([phase, *("" if part is None else f"{part['seconds']:.1f}" for part in parts)])
    return markdown_table([f"seconds, {rows[0]['model']}", *(METHODS[row["method"]] for row in rows)], lines)


def conversion_memory_table(names: str) -> str:
    """One line per conversion: the model, and the predicted and the measured peak of memory."""
    lines = []
    for row in (row for name in names.split("+") for row in read_result(name)["rows"]):
        width = row["hidden"] if "hidden" in row else row["shape"]["hidden_size"]
        model = f"{row['layers']} layer{'s' * (row['layers'] > 1)}, width {width:,}"
        sizes = [row["model_bytes"], row.get("predicted_bytes"), row["limit_bytes"], row["peak_bytes"]]
        cells = ["" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        lines.append([METHODS[row.get("recipe", "data-free")], model, *cells])
    header = ["recipe", "model", "its size in bfloat16 (GB)", "predicted (GB)", "limit (GB)", "peak (GB)"]
    return markdown_table(header, lines)
