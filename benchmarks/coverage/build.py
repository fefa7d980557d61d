"""Write the model of a case as a Hugging Face folder, with a tokenizer and text to calibrate with."""

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from bwla_converter.source.observe.decoder import find_layers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.coverage.case import Case

TEXT_FILE = "text.txt"
"""Name of the file with the text, in the model's folder."""

WORDS_OF_TEXT = 200
LETTERS = string.ascii_letters + string.digits + string.punctuation
STD = 0.2
"""Standard deviation of the weights: large enough for each one to matter to the logits, unlike transformers' own."""


def make_config(case: Case, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a case, with changes to its settings."""
    settings = {**case.settings, **changes}
    for part, own in settings.items():
        if part.endswith("_config") and own is not None and "model_type" in own:
            settings[part] = AutoConfig.for_model(**own)
    return AutoConfig.for_model(case.model_type, **settings, architectures=[case.architecture])


def build(case: Case, seed: int = 0) -> PreTrainedModel:
    """Return the random model of a case in its dtype."""
    torch.manual_seed(seed)
    config = make_config(case)
    if case.bare:
        model = AutoModel.from_config(config, attn_implementation="eager")
    else:
        build_class = getattr(transformers, case.architecture)
        model = build_class._from_config(config, attn_implementation="eager")
    model = model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.dim() == 1 else parameter.copy_(STD * noise)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model.to(getattr(torch, case.dtype)).eval()


def decoder_weights(model: PreTrainedModel) -> int:
    """Return the number of weights in the matrices of the decoder's layers."""
    _, layers, _ = find_layers(model, type(model).__name__)
    return sum(parameter.numel() for parameter in layers.parameters() if parameter.dim() > 1)


def write_words(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes, and a text of random words.

    Byte-level BPE without merges is what every class makes of these files, also those that transformers chooses by the
    model's type and that ignore another kind of tokenizer.
    """
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    symbols = Tokenizer(models.BPE(vocabulary, []))
    symbols.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    symbols.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=symbols).save_pretrained(folder)
    draw = random.Random(0)
    words = ["".join(draw.choices(LETTERS, k=5)) for _ in range(WORDS_OF_TEXT)]
    (folder / TEXT_FILE).write_text(" ".join(words), encoding="utf-8")


def _transpose(file: Path, ends: tuple[str, ...]) -> None:
    """Exchange the last two axes of the tensors in `file` whose names end in one of `ends`."""
    tensors = load_file(file)
    chosen = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if name.endswith(ends)}
    save_file({**tensors, **chosen}, file, {"format": "pt"})


def write_case(case: Case, folder: Path) -> int:
    """Write the model of a case to `folder`; return the number of weights in its decoder's layers."""
    model = build(case)
    model.save_pretrained(folder)
    if case.transposed:
        _transpose(folder / "model.safetensors", case.transposed)
    write_words(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # save_pretrained writes the class of the model, which for a model without a head is not the published one.
    path.write_text(json.dumps({**config, "architectures": [case.architecture]}), encoding="utf-8")
    return decoder_weights(model)
