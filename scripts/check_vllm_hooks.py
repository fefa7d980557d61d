"""Check without installing vLLM that a release has everything that bwla_vllm uses.

    python -m scripts.check_vllm_hooks --out benchmarks/results/vllm_hooks.json
    python -m scripts.check_vllm_hooks --folder .env/lib/python3.11/site-packages

The first form reads a few Python files of every release's CUDA wheel on the package index with range requests; the
second checks the installed release. The plugin's own sources show what it imports, calls and overrides; what else it
relies on (attributes, call sites inside vLLM) is listed in `FACTS`. This finds names that were removed or renamed and
signatures that changed, but not changed behaviour.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.record import write_result
from bwla_vllm.compat.releases import CPU_LORA_OPERATIONS
from scripts.source_library import Found, Function, Library, call_problem, override_problem
from scripts.wheel_sources import folder_reader, wheel_reader, wheel_urls

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "bwla_vllm"

LINEAR, PARAMETER = "vllm.model_executor.layers.linear", "vllm.model_executor.parameter"
HEAD = "vllm.model_executor.layers.vocab_parallel_embedding"
MOE = "vllm.model_executor.layers.fused_moe"


@dataclass(frozen=True)
class Members:
    """Requirement: a class, or for "A|B" one of these classes, has these attributes."""

    module: str
    name: str
    members: tuple[str, ...]

    def problem(self, library: Library) -> str | None:
        found = [hit for name in self.name.split("|") if (hit := library.find(self.module, name))]
        if not found:
            return f"{self.module}.{self.name} does not exist"
        missing = [
            member for member in self.members if not any(member in library.members(hit) for hit in found)
        ]
        return f"{self.module}.{self.name} has no {', '.join(missing)}" if missing else None


@dataclass(frozen=True)
class Constructor:
    """Requirement: the constructor of a class or of one of its bases takes these arguments."""

    module: str
    name: str
    arguments: tuple[str, ...]

    def problem(self, library: Library) -> str | None:
        found = library.find(self.module, self.name)
        if found is None:
            return f"{self.module}.{self.name} does not exist"
        known: set[str] = set()
        for owner in library.lineage(found):
            made = library.method(owner, "__init__")
            known |= (
                {argument.arg for argument in (*made.args.args, *made.args.kwonlyargs)} if made else set()
            )
        missing = [argument for argument in self.arguments if argument not in known]
        return (
            f"{self.module}.{self.name} takes no {', '.join(missing)} in its constructor" if missing else None
        )


@dataclass(frozen=True)
class CallSite:
    """Requirement: `module` calls `function` at least once with all of these keywords."""

    module: str
    function: str
    keywords: tuple[str, ...]

    def problem(self, library: Library) -> str | None:
        parsed = library.module(self.module)
        calls = [
            node
            for node in (ast.walk(parsed[0]) if parsed else ())
            if isinstance(node, ast.Call)
            and self.function == getattr(node.func, "attr", getattr(node.func, "id", None))
        ]
        if any({*self.keywords} <= {keyword.arg for keyword in call.keywords} for call in calls):
            return None
        return f"{self.module} has no call of {self.function} with {', '.join(self.keywords)}"


@dataclass(frozen=True)
class Text:
    """Requirement: the source of a module contains this string."""

    module: str
    text: str

    def problem(self, library: Library) -> str | None:
        parsed = library.module(self.module)
        held = parsed is not None and any(
            isinstance(node, ast.Constant) and node.value == self.text for node in ast.walk(parsed[0])
        )
        return None if held else f"{self.module} does not mention {self.text!r}"


BASE_ARGUMENTS = ("data", "weight_loader")
CREATE_EXPERTS = ("num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype")
LOAD_EXPERT = ("param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success")
FACTS: tuple[Members | Constructor | CallSite | Text, ...] = (
    Text("vllm.plugins", "vllm.general_plugins"),
    Members(LINEAR, "LinearBase", ("input_size", "quant_method")),
    Members(LINEAR, "ColumnParallelLinear", ("bias",)),
    Members(
        "vllm.model_executor.layers.quantization.base_config",
        "QuantizationConfig",
        ("packed_modules_mapping",),
    ),
    Members(
        MOE,
        "RoutedExperts",
        (
            "expert_map",
            "load_weights",
            "moe_config",
            "quant_method",
            "apply_router_weight_on_input",
            "_map_global_expert_id_to_local_expert_id",
        ),
    ),
    *(Text(f"{MOE}.routed_experts", name) for name in CREATE_EXPERTS),
    CallSite(f"{MOE}.routed_experts", "create_weights", ("layer",)),
    CallSite(f"{MOE}.routed_experts", "weight_loader", LOAD_EXPERT),
    CallSite(f"{MOE}.routed_experts", "apply", ("layer", "x", "topk_weights", "topk_ids")),
    # What `cpu_lora` replaces.
    *(CallSite("vllm.lora.punica_wrapper.punica_cpu", name, ()) for name in CPU_LORA_OPERATIONS),
    # Some classes load experts themselves.
    CallSite("vllm.model_executor.models.deepseek_v2", "weight_loader", LOAD_EXPERT[-3:]),
    # The plugin registers a subclass of this one.
    Members("vllm.model_executor.models.gpt_oss", "GptOssForCausalLM", ("load_weights",)),
    Text(f"{MOE}.activation", "swigluoai"),
    Members(f"{MOE}.fused_moe_method_base", "FusedMoEMethodBase", ("moe", "is_monolithic", "moe_kernel")),
    Members(
        f"{MOE}.config",
        "FusedMoEConfig",
        (
            "activation",
            "has_bias",
            "hidden_dim",
            "intermediate_size_per_partition",
            "moe_parallel_config",
            "num_logical_experts",
            "swiglu_limit",
        ),
    ),
    Members(f"{MOE}.config", "FusedMoEParallelConfig", ("tp_rank", "tp_size")),
    Members(
        "vllm.config",
        "ParallelConfig",
        ("enable_ep_weight_filter", "enable_eplb", "enable_expert_parallel"),
    ),
    Members(HEAD, "VocabParallelEmbedding", ("shard_indices", "quant_method")),
    Members(HEAD, "ParallelLMHead", ("shard_indices", "quant_method", "tie_weights")),
    Members(HEAD, "UnquantizedEmbeddingMethod", ("embedding", "tie_weights")),
    Members(HEAD, "VocabParallelEmbeddingShardIndices", ("org_vocab_start_index", "org_vocab_end_index")),
    Members(
        "vllm.config",
        "VllmConfig",
        (
            "additional_config",
            "load_config",
            "lora_config",
            "model_config",
            "parallel_config",
            "quant_config",
        ),
    ),
    Members("vllm.config", "ModelConfig", ("enforce_eager", "hf_config")),
    Members("vllm.config", "CompilationConfig", ("inductor_compile_config", "mode")),
    Members("vllm.config.load", "LoadConfig", ("load_format",)),
    Text("vllm.model_executor.models.adapters", "classifier_from_token"),
    Text("vllm.lora.layers.utils", "weight_packed"),
    Members("vllm.model_executor.models.utils", "WeightsMapper", ("apply_list", "apply_dict")),
    Members(PARAMETER, "BasevLLMParameter", ("tp_rank", "tp_size", "_shard_id_as_int")),
    Constructor(PARAMETER, "BasevLLMParameter", BASE_ARGUMENTS),
    Constructor(PARAMETER, "ChannelQuantScaleParameter", (*BASE_ARGUMENTS, "output_dim")),
    Constructor(PARAMETER, "PerTensorScaleParameter", BASE_ARGUMENTS),
    Constructor(
        PARAMETER,
        "PackedvLLMParameter",
        (*BASE_ARGUMENTS, "input_dim", "output_dim", "packed_dim", "packed_factor"),
    ),
    CallSite(LINEAR, "load_merged_column_weight", ("loaded_weight", "shard_id", "shard_size")),
    CallSite(LINEAR, "load_qkv_weight", ("loaded_weight", "shard_id", "shard_size", "num_heads")),
    CallSite(LINEAR, "load_row_parallel_weight", ("loaded_weight",)),
)


def imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Return local name -> (module, name) of everything that a file imports from vLLM."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            names.update(
                {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
            )
    return names


def class_problems(ours: ast.ClassDef, bases: list[Found], library: Library) -> Iterator[str]:
    """Yield the abstract methods of vLLM's bases that a class of the plugin lacks, and overrides that do not fit."""
    methods = {node.name: node for node in ours.body if isinstance(node, Function)}
    for base in bases:
        title = f"{ours.name}({base.node.name})" if isinstance(base.node, ast.ClassDef) else ours.name
        for name in sorted(library.abstract(base) - methods.keys()):
            if not any(name in library.members(other) - library.abstract(other) for other in bases):
                yield f"{title}: does not define {name}, which is abstract"
        for name, method in methods.items():
            original = library.method(base, name)
            if original is not None and not name.startswith("__"):
                problem = override_problem(original, method)
                if problem:
                    yield f"{title}.{name}: {problem}"


def plugin_problems(library: Library, sources: dict[str, ast.Module]) -> Iterator[str]:
    """Yield the imports, calls and overrides of the plugin that do not fit this release."""
    for file, tree in sources.items():
        resolved: dict[str, Found] = {}
        for local, (module, name) in imported(tree).items():
            found = library.find(module, name)
            if found is not None:
                resolved[local] = found
            elif library.module(f"{module}.{name}") is None:
                yield f"{file}: from {module} import {name}: does not exist"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in resolved:
                target = resolved[node.func.id].node
                keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
                if isinstance(target, Function):
                    problem = call_problem(target, len(node.args), keywords)
                    if problem:
                        yield f"{file}: {node.func.id}: {problem}"
            if isinstance(node, ast.ClassDef):
                bases = [
                    resolved[base.id]
                    for base in node.bases
                    if isinstance(base, ast.Name) and base.id in resolved
                ]
                for problem in class_problems(node, bases, library):
                    yield f"{file}: {problem}"


def problems(library: Library, plugin: Path = PLUGIN) -> list[str]:
    """Return everything that `plugin` needs and `library` does not have."""
    sources = {
        path.relative_to(plugin).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(plugin.rglob("*.py"))
    }
    own = [*plugin_problems(library, sources)]
    return own + [problem for fact in FACTS if (problem := fact.problem(library))]


def check_release(version: str, url: str) -> dict[str, Any]:
    """Check a release on the package index; return its row."""
    read = wheel_reader(url)
    wants = re.findall(
        r"^Requires-Dist: (torch==\S+|transformers\S.*)$", read("*.dist-info/METADATA") or "", re.M
    )
    missing = problems(Library(read))
    print(f"vllm {version}: {'; '.join(missing) or 'ok'}", flush=True)
    return {
        "vllm": version,
        "wheel": url.rpartition("/")[2],
        "requires": wants,
        "ok": not missing,
        "problems": missing,
    }


def main() -> int:
    """Run the command line; return 1 if a release lacks something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="check the vLLM in this site-packages folder instead")
    parser.add_argument("--oldest", default="0.26", help="oldest release to check (0.26)")
    parser.add_argument("--package", default="vllm", help="name on the package index (vllm)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if arguments.folder:
        missing = problems(Library(folder_reader(arguments.folder)))
        print("\n".join(missing) or "ok")
        return 1 if missing else 0

    def key(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    urls = {v: url for v, url in wheel_urls(arguments.package).items() if key(v) >= key(arguments.oldest)}
    rows = [check_release(version, urls[version]) for version in sorted(urls, key=key)]
    if arguments.out:
        write_result(arguments.out, rows)
    return 0 if rows and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
