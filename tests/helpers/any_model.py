"""Tiny random models of any class of transformers, and sources made from them without the converter's own checks."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from bwla_converter.source.model import Source
from bwla_converter.source.structure import InputGroup, Structure
from bwla_kernels.format.files import scan_folder
from bwla_kernels.format.model import tied_names
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def build_any_model(
    architecture: str, model_type: str, drop: tuple[str, ...] = (), **config: Any
) -> PreTrainedModel:
    """Return a random float32 model of a class of transformers whose every weight matters to the logits.

    Args:
        architecture: name of the class.
        model_type: transformers' name of its configuration.
        drop: sizes that its configuration does not have.
        config: other settings.
    """
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key not in drop}
    settings = AutoConfig.for_model(model_type, **{**sizes, **config}, architectures=[architecture])
    model: PreTrainedModel = getattr(transformers, architecture)(settings).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "norm" not in name:
                parameter.normal_(std=0.1)
    return model.eval()


def write_any_model(model: PreTrainedModel, folder: Path) -> Source:
    """Write a model, its tensors by their names in its modules, and return it as a source."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    tied = tied_names(model)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if key not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scan = scan_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    return Source(
        folder,
        config,
        observed_structure(model),
        scan.entries,
        tied_head=bool(tied),
        stored=scan.entries,
        tied=tied,
    )


def observed_structure(model: PreTrainedModel) -> Structure:
    """Return a model's structure: linears with the same input in a short run form a group."""
    decoder = model.get_decoder()
    paths = {module: name for name, module in model.named_modules()}
    number = decoder.config.get_text_config().num_hidden_layers
    blocks = next(
        module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == number
    )
    groups: list[dict[int, list[str]]] = [{} for _ in blocks]
    kept, handles = [], []
    for block, found in zip(blocks, groups, strict=True):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):

                def note(_: nn.Module, inputs: Any, name: str = name, found: Any = found) -> None:
                    kept.append(inputs[0])  # so that no other tensor gets its address
                    found.setdefault(inputs[0].data_ptr(), []).append(name)

                handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(torch.arange(8)[None])
    for handle in handles:
        handle.remove()
    head = model.get_output_embeddings()
    norms = [
        name for name, module in decoder.named_children() if "norm" in name and hasattr(module, "weight")
    ]
    return Structure(
        type(model).__name__,
        paths[blocks],
        tuple(tuple(InputGroup(tuple(names)) for names in found.values()) for found in groups),
        embedding=paths[model.get_input_embeddings()],
        head=paths.get(head, "lm_head"),
        final_norm=f"{paths[decoder]}.{'norm' if 'norm' in norms else norms[-1]}" if norms else "none",
    )
