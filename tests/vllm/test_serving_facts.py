"""The converter's tables of what vLLM's classes can store quantized, compared with the installed vLLM."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from bwla_converter.source.observe.serving import (
    INT8_BOTH,
    INT8_HEAD,
    LISTED,
    PLAIN,
    TIED_ONLY,
    UNMAPPED,
    UNNAMED,
)

from bwla_vllm.loading import LISTED_EXPERTS

NOT_IN_TRANSFORMERS = {"DeepseekAttention"}
"""Classes of vLLM's modules that only models use which transformers does not have (DeepSeek 1)."""

SHARED = {"interfaces", "interfaces_base", "utils"}
"""Modules beside the models."""


def models_folder() -> Path:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model_executor" / "models"


def registered() -> Iterator[tuple[str, str]]:
    """Yield the text generators that both vLLM and transformers have, with vLLM's module."""
    for node in ast.parse((models_folder() / "registry.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS":
            for architecture, (module, _) in ast.literal_eval(node.value).items():
                known = hasattr(transformers, architecture)
                if known and (models_folder() / f"{module}.py").is_file():
                    yield architecture, module


def trees(module: str) -> Iterator[ast.Module]:
    """Yield the source of a module, and of those whose classes its classes derive from."""
    path = models_folder() / f"{module}.py"
    if not path.is_file():
        return
    tree = ast.parse(path.read_text())
    yield tree
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    bases = {base.id for node in classes for base in node.bases if isinstance(base, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and {name.name for name in node.names} & bases:
            own = node.level == 1 or node.module.startswith("vllm.model_executor.models.")
            if own and node.module.rpartition(".")[2] not in SHARED:
                yield from trees(node.module.rpartition(".")[2])


def passes_config(module: str, layer: str) -> bool | None:
    """Return whether a model passes the `quant_config` to all its layers of a class; None if it has none."""
    for tree in trees(module):
        calls = [
            any(keyword.arg == "quant_config" for keyword in node.keywords)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == layer
        ]
        if calls:
            return all(calls)
    return None


def ties(node: ast.AST, by_config: bool = False) -> Iterator[bool]:
    """Yield, for each place where a class ties its head to its embedding, whether that depends on the config."""
    if isinstance(node, ast.If):
        by_config = by_config or "tie" in ast.unparse(node.test)
    called = node.func if isinstance(node, ast.Call) else None
    if (
        isinstance(called, ast.Attribute)
        and called.attr == "tie_weights"
        and "super" not in ast.unparse(called)
    ):
        yield by_config
    for child in ast.iter_child_nodes(node):
        yield from ties(child, by_config)


def always_ties(module: str) -> bool:
    """Return whether a model ties its head whatever the config says."""
    return not all(by_config for tree in trees(module) for by_config in ties(tree))


CASES = dict(registered())


@pytest.mark.parametrize("architecture", CASES)
def test_head_and_embedding(architecture: str) -> None:
    head = passes_config(CASES[architecture], "ParallelLMHead")
    embedding = passes_config(CASES[architecture], "VocabParallelEmbedding")
    assert (architecture in TIED_ONLY) == (head is None or always_ties(CASES[architecture]))
    assert (architecture in INT8_HEAD | INT8_BOTH) == bool(head)
    assert (architecture in INT8_BOTH) == bool(head and embedding)


def test_the_tables_name_models_that_vllm_has() -> None:
    assert TIED_ONLY | INT8_HEAD | INT8_BOTH | PLAIN.keys() <= CASES.keys()
    assert not INT8_HEAD & INT8_BOTH


def test_the_mixers_that_take_no_config() -> None:
    uses = {name for name in CASES if "mamba_mixer import MambaMixer" in _source(CASES[name])}
    assert uses == PLAIN.keys()
    mixer = models_folder().parent / "layers" / "mamba" / "mamba_mixer.py"
    linears = [
        node
        for node in ast.walk(ast.parse(mixer.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ParallelLinear")
    ]
    assert linears
    assert not any(keyword.arg == "quant_config" for node in linears for keyword in node.keywords)


def test_the_linears_without_a_name() -> None:
    found = {name: set(unnamed(CASES[name])) for name in CASES}
    expected = {
        name: {path.rpartition(".")[2] for path in UNNAMED[name]} if name in UNNAMED else set()
        for name in CASES
    }
    assert found == expected
    assert UNNAMED.keys() <= CASES.keys()


def test_the_linears_that_are_fused_by_their_weights_alone() -> None:
    registry = (models_folder() / "registry.py").read_text()
    found: dict[str, set[str]] = {}
    for path in models_folder().glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "orig_to_new_stacked":
                keys = (
                    ast.literal_eval(key)
                    for key in getattr(node.value, "keys", ())
                    if isinstance(key, ast.Constant)
                )
                parts = {
                    key.removesuffix(".weight").rpartition(".")[2] for key in keys if key.endswith(".weight")
                }
                if parts:
                    found.setdefault(path.stem, set()).update(parts)
    assert {module: parts for module, parts in found.items() if f'("{module}", ' in registry} == {
        "embedding_gemma2": set(UNMAPPED["EmbeddingGemma2Model"])
    }


def unnamed(module: str) -> Iterator[str]:
    """Yield the quantized linears of a model that get no `prefix`, from which vLLM's plugins take their name."""
    classes = (node for tree in trees(module) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for class_ in classes:
        for node in ast.walk(class_):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                given = {keyword.arg for keyword in node.value.keywords}
                is_linear = ast.unparse(node.value.func).endswith("Linear") and "quant_config" in given
                if is_linear and "prefix" not in given and class_.name not in NOT_IN_TRANSFORMERS:
                    yield ast.unparse(node.targets[0]).removeprefix("self.")


def _source(module: str) -> str:
    return (models_folder() / f"{module}.py").read_text()


def test_classes_that_look_up_the_parameters_of_experts_in_a_list() -> None:
    listed = "maybe_remap_moe_expert_param_name"
    found = {
        name for name, module in CASES.items() if listed in (models_folder() / f"{module}.py").read_text()
    }
    # Llama 4's experts multiply their inputs by the router's weights, so they stay in 16 bits anyway.
    assert found - {"Llama4ForCausalLM"} == set(LISTED)
    assert set(LISTED) == set(LISTED_EXPERTS)
