"""Write the tables of README.md and docs/ that repeat what is known elsewhere.

    python -m scripts.docs_tables            # write them
    python -m scripts.docs_tables --check    # exit with 1 if a document is not up to date

A table stands between `<!-- table: KIND RESULTS; scripts/docs_tables.py -->` and `<!-- end of table -->`. RESULTS names
files in benchmarks/results without `.json`, joined by `+`. The kinds `families` and `gguf` read lists of the converter,
`training` the record of the example model.
"""

import re
import statistics
import sys
from collections.abc import Callable
from functools import partial

from bwla_converter.source.families import family_table
from bwla_converter.source.gguf_models.architectures import gguf_table

from scripts.tables.coverage import coverage_table, head_text
from scripts.tables.gpu import compiled_text, gpu_step_table, gpu_table
from scripts.tables.quality import (
    ablation_table,
    amounts_table,
    calibration_text_table,
    demo_table,
    embedding_table,
    expert_transforms_table,
    frontier_table,
    head_table,
    llama_cpp_table,
    okt_table,
    quality_table,
    training_table,
)
from scripts.tables.reliability import damage_table, kill_states_table, kills_table, load_table
from scripts.tables.results import ROOT, markdown_table, read_result, read_rows
from scripts.tables.speed import (
    conversion_memory_table,
    conversion_table,
    cpu_table,
    experts_table,
    groups_table,
    imported_table,
    lengths_table,
    llama_table,
    phase_table,
    serving_table,
    start_table,
    variants_table,
)

DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BEGIN = "<!-- table: "
MARKED = re.compile(
    r"(<!-- table: (\w+) ?(\S*); scripts/docs_tables.py -->\n).*?(\n<!-- end of table -->)", re.S
)


def summary_table(names: str) -> str:
    """README's few lines: quality, CPU serving, a mixture of experts and a GPU kernel, from four result files."""
    quality, serving, experts, gpu = names.split("+")
    rows = [row for row in read_rows(quality) if row["abits"] == 6]
    recipes = ("fast", "best")
    perplexities = [statistics.mean(row["ppl"] for row in rows if row["method"] == r) for r in recipes]
    served = next(row for row in read_result(serving)["rows"] if row["batch"] == 1)
    layer = next(
        row
        for row in read_result(gpu)["rows"]["layer"]
        if (row.get("model"), row["layer"], row["m"]) == ("32b", "gate_up", 1)
    )
    ours = [f"{value:.1f}" for value in perplexities]
    lines = [
        [
            "perplexity, example model, `fast` / `best`",
            " / ".join(ours),
            f"{rows[0]['ppl_original']:.1f}",
            quality,
        ]
    ]
    model = served["model"].replace("qwen", "Qwen").replace("b", "B")
    for what, key, scale in (
        ("decode, tokens/s", "decode_tok_s", 1),
        ("prefill, tokens/s", "prefill_tok_s", 1),
        ("memory with KV cache, GB", "resident_bytes", 1e9),
    ):
        pair = [f"{served[f'{side}_{key}'] / scale:.1f}" for side in ("bwla", "bf16")]
        lines.append([f"{model} shape in vLLM, 2 CPU cores, batch 1: {what}", *pair, serving])
    mixture = read_result(experts)["rows"][0]
    what = "Qwen3-30B-A3B shape in vLLM, 2 CPU cores, batch 1: decode, tokens/s"
    lines.append([what, f"{mixture['bwla_decode_tok_s']:.1f}", "does not fit", experts])
    what = f"{layer['n']} x {layer['k']} linear on an H200, 1 token: microseconds"
    lines.append([what, f"{layer['fused_us']:.1f}", f"{layer['bf16_us']:.1f}", gpu])
    linked = [[*cells, f"[json](benchmarks/results/{name}.json)"] for *cells, name in lines]
    return markdown_table(["", "BWLA", "bf16", "result"], linked)


TABLES: dict[str, Callable[[str], str]] = {
    "families": lambda _: family_table(),
    "gguf": lambda _: gguf_table(),
    "quality": quality_table,
    "ablations": ablation_table,
    "amounts": amounts_table,
    "embedding": embedding_table,
    "head": head_table,
    "okt": okt_table,
    "expert_transforms": expert_transforms_table,
    "calibration_text": calibration_text_table,
    "cpu": cpu_table,
    "experts": experts_table,
    "variants": variants_table,
    "serving": serving_table,
    "llama": llama_table,
    "llama_quality": llama_cpp_table,
    "imported": imported_table,
    "groups": groups_table,
    "lengths": lengths_table,
    "start": start_table,
    "gpu": gpu_table,
    "compiled": compiled_text,
    "gpu_step_32b": partial(gpu_step_table, "32b"),
    "gpu_step_8b": partial(gpu_step_table, "8b"),
    "summary": summary_table,
    "conversion": conversion_table,
    "phases": phase_table,
    "demo": demo_table,
    "frontier": frontier_table,
    "coverage": coverage_table,
    "coverage_head": head_text,
    "load": load_table,
    "kills": kills_table,
    "kill_states": kill_states_table,
    "damage": damage_table,
    "conversion_memory": conversion_memory_table,
    "training": training_table,
}


def with_tables(text: str, document: str) -> str:
    """Return a document's text with every marked table written anew.

    Raises:
        ValueError: if a mark is broken or names an unknown kind of table.
    """

    def write(mark: re.Match[str]) -> str:
        if mark[2] not in TABLES:
            raise ValueError(f"{document}: expected a table of {', '.join(TABLES)}, found {mark[2]}")
        return mark[1] + TABLES[mark[2]](mark[3]) + mark[4]

    new, count = MARKED.subn(write, text)
    if count != text.count(BEGIN):
        raise ValueError(f"{document}: expected {text.count(BEGIN)} complete tables, found {count}")
    return new


def main() -> int:
    """Run the command line; return 1 if --check finds a document out of date."""
    outdated = []
    for file in DOCUMENTS:
        old = file.read_text(encoding="utf-8")
        new = with_tables(old, file.relative_to(ROOT).as_posix())
        if new != old:
            outdated.append(file)
            if "--check" not in sys.argv[1:]:
                file.write_text(new, encoding="utf-8")
    for file in outdated:
        print(f"{'outdated' if '--check' in sys.argv[1:] else 'written'}: {file.relative_to(ROOT)}")
    return int("--check" in sys.argv[1:] and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
