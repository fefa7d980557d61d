"""Write what is outside the decoder layers, with the head and the embedding as the plan wants them."""

from bwla_converter.checkpoint.layout import Parts, int8_tensors
from bwla_converter.checkpoint.writer import CheckpointWriter
from bwla_converter.conversion import Conversion
from bwla_converter.options import LinearReport
from bwla_converter.recipes.best import BestRecipe
from bwla_converter.recipes.fast import FastRecipe
from bwla_converter.recipes.lossless import LosslessRecipe
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HEAD_MODULE
from torch import Tensor


def write_rest(writer: CheckpointWriter, conversion: Conversion) -> dict[str, float]:
    """Write the tensors outside the decoder layers: unchanged, except for the quantized head and embedding.

    Returns: the clip of a head in binary planes by its module path; empty where there is none.
    """
    source, plan = conversion.source, conversion.plan
    clips: dict[str, float] = {}
    for file, names in Parts(source).rest():
        tensors = source.read([name for name in names if not plan.is_replaced(name)])
        for name in names:
            tensors.update(int8_tensors(plan, name, lambda name: source.read([name])[name]))
            if plan.head_spec is not None and name == plan.head_source:
                quantized, clips[HEAD_MODULE] = _quantize_head(conversion, plan.head_spec, name)
                tensors.update(quantized)
        writer.write_shard(file, tensors)
    return clips


def _quantize_head(conversion: Conversion, spec: LayerSpec, name: str) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of a head in binary planes by their stored names, and its clip; `name` is its weight."""
    recipe = conversion.recipe
    assert isinstance(recipe, FastRecipe | BestRecipe | LosslessRecipe)  # see check_recipe
    conversion.listener.head_started(spec.planes)
    weight = conversion.source.read([name])[name]
    result = recipe.quantize_head(weight, spec)
    clip = spec.clip if result.clip is None else result.clip
    report = LinearReport(HEAD_MODULE, weight.numel(), result.errors[HEAD_MODULE], clip)
    conversion.listener.linear_quantized(report)
    return {f"{HEAD_MODULE}.{key}": value.cpu() for key, value in result.tensors[HEAD_MODULE].items()}, clip
