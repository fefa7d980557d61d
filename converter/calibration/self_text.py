"""Calibration text that the model writes itself, so that a conversion needs no other text.

Self-generated calibration data goes back to LLM-QAT (arXiv 2305.17888), which starts from random tokens; Williams et
al. (arXiv 2410.17170) find it as good as real text for post-training quantization. If the tokenizer has a chat
template, every other sample is a conversation whose two sides the model writes, as in Magpie (arXiv 2406.08464).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bwla_converter.calibration.generation import Script, sample_sequences
from bwla_converter.calibration.text import held_out_tokens, load_tokenizer, written_samples
from bwla_converter.common.atomic_files import whole_file
from bwla_converter.common.bars import no_bars
from bwla_converter.common.tensors import tensor_bytes
from bwla_converter.options import Calibration
from bwla_converter.source.folder.cached import cached_file
from bwla_converter.source.meta_model import build_meta_model
from bwla_converter.source.model import Source
from bwla_converter.source.observe.decoder import language_model_of
from bwla_kernels.errors import SourceError
from bwla_kernels.precision import product_dtype
from filelock import FileLock
from rich.filesize import decimal
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

LONGEST = 512
"""Tokens of a sequence that is written in one piece. A longer sample is put together from several: the time of a step
grows with the length, and a larger batch makes better use of the weights."""

CACHE_BYTES = 8 * 2**30
"""Keys and values of the sequences that are sampled at the same time."""

STARTS = 64
"""Random tokens that are drawn for each sequence, to start a new text after each end token."""

MARK = "(user message)"
VERSION = 4
"""Increased when the same model would write other text."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Writing:
    """What determines the text.

    Attributes:
        folder: folder of the model.
        calibration: number and length of the samples.
        seed: seed of the random numbers.
        device: where the model runs.
        memory: bytes of memory that may be used on that device, infinite if unknown.
    """

    folder: Path
    calibration: Calibration
    seed: int
    device: torch.device
    memory: float

    @property
    def samples(self) -> int:
        """Number of samples: those for calibration, and others to measure the loss on."""
        held_out = -(-held_out_tokens(self.calibration) // self.calibration.max_seq_length)
        return self.calibration.num_samples + held_out

    @property
    def pieces(self) -> int:
        """Number of sequences that a sample is put together from."""
        return -(-self.calibration.max_seq_length // LONGEST)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return -(-self.calibration.max_seq_length // self.pieces)

    def cache_file(self) -> Path:
        """Return the file in the cache, under a digest of everything that determines its contents."""
        numbers = [self.calibration.num_samples, self.calibration.max_seq_length, self.seed, VERSION]
        return cached_file("self", ".safetensors", self.folder, numbers, self.device.type)


def write_calibration(source: Source, writing: Writing, on_step: OnStep) -> Path:
    """Return the file with the model's own text; let the model write it unless the cache has it.

    Args:
        source: the model.
        writing: how much text, and where the model runs.
        on_step: called after each step with the steps that are done and with the number of all steps.

    Raises:
        SourceError: the model does not fit into memory, has no tokenizer, or cannot write text.
    """
    file = writing.cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                ids = _write(source, writing, on_step)
                with whole_file(file) as part:
                    save_file({"ids": ids.int().contiguous()}, part)
    except OSError as cause:
        raise SourceError(
            f"{file}: the calibration text cannot be kept ({cause.strerror}): name another folder in BWLA_CACHE"
        ) from None
    return file


def text_lines(calibration: Calibration, folder: Path) -> Iterator[str]:
    """Yield the samples as lines of JSON with a "text", which --calibration can read again.

    Args:
        calibration: the calibration, with what the model has written.
        folder: folder of the model.
    """
    tokenizer = load_tokenizer(folder)
    for ids in written_samples(calibration):
        yield json.dumps({"text": tokenizer.decode(ids)}, ensure_ascii=False)


def _write(source: Source, writing: Writing, on_step: OnStep) -> Tensor:
    """Let the model write all samples; return their token ids [S, T]."""
    tokenizer = load_tokenizer(source.folder)
    meta_model = build_meta_model(source.folder, source.config)
    dtype = choose_dtype(source, writing)
    batch = _batch_size(source, meta_model, writing, dtype)
    model = _load(source, meta_model, dtype).to(writing.device)
    generator = torch.Generator().manual_seed(writing.seed)
    ends = end_tokens(tokenizer, model)
    scripts = make_scripts(tokenizer, ends, writing.samples * writing.pieces, generator)
    length = writing.length
    vocabulary = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    batches = [scripts[start : start + batch] for start in range(0, len(scripts), batch)]
    parts: list[Tensor] = []
    for number, some in enumerate(batches):

        def on_token(step: int, done: int = number * length) -> None:
            on_step(done + step, len(batches) * length)

        parts.append(
            sample_sequences(language_model_of(model), some, length, (ends, vocabulary), generator, on_token)
        )
    return torch.cat(parts).view(writing.samples, -1)[:, : writing.calibration.max_seq_length]


def choose_dtype(source: Source, writing: Writing) -> torch.dtype:
    """Return the dtype in which the model writes: its own, or float32 where that is faster and fits into memory.

    A processor without instructions for bfloat16 multiplies several times faster in float32. The model gets at most
    half of the memory for that, as keys and values need the rest.
    """
    own = next(iter(source.entries.values())).dtype
    fits = 2 * _weight_bytes(source, torch.float32) <= writing.memory
    if writing.device.type == "cpu" and product_dtype(writing.device) == torch.float32 and fits:
        return torch.float32
    return own


def _weight_bytes(source: Source, dtype: torch.dtype) -> int:
    """Return the size of the model in bytes, with its floating-point tensors in `dtype`."""
    return sum(
        tensor_bytes(entry.shape, dtype if entry.dtype.is_floating_point else entry.dtype)
        for entry in source.entries.values()
    )


def _batch_size(source: Source, model: PreTrainedModel, writing: Writing, dtype: torch.dtype) -> int:
    """Return how many sequences are sampled at the same time, so that model, keys and values fit into memory.

    Raises:
        SourceError: not even one does.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sequence = 2 * config.num_hidden_layers * heads * width * dtype.itemsize * writing.length
    weights = _weight_bytes(source, dtype)
    free = writing.memory - weights
    if free < sequence:
        raise SourceError(
            f"--calibration self: expected {decimal(weights + sequence)} of memory for {source.name}, which writes its "
            f"own calibration text, found {decimal(int(writing.memory))}: give --calibration a text file, or wikitext2"
        )
    return max(1, min(writing.samples * writing.pieces, int(min(free, CACHE_BYTES) // sequence)))


def _load(source: Source, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Load the whole original model, with dequantized fp8 weights, in `dtype`."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tensors = source.read(list(source.entries))
    with no_bars():
        loaded: PreTrainedModel = type(model).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype
        )
    return loaded.eval()


def end_tokens(tokenizer: Any, model: PreTrainedModel) -> set[int]:
    """Return the ids of the tokens that end a text or a turn of a conversation."""
    ends: set[int] = set()
    config = model.config if hasattr(model.config, "eos_token_id") else model.config.get_text_config()
    for ids in (tokenizer.eos_token_id, model.generation_config.eos_token_id, config.eos_token_id):
        ends.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return ends


def make_scripts(tokenizer: Any, ends: set[int], count: int, generator: torch.Generator) -> list[Script]:
    """Return what each sequence starts with, and how it continues after an end token.

    A text starts with what the tokenizer puts before every text and a random token. Every other sequence is a
    conversation if there is a chat template.

    Args:
        tokenizer: the model's tokenizer.
        ends: ids of the end tokens.
        count: number of sequences.
        generator: random numbers.
    """
    words = sorted({*range(len(tokenizer))} - {*tokenizer.all_special_ids})
    turns = conversation_parts(tokenizer, ends)
    before = tokenizer("", add_special_tokens=True).input_ids
    before = before[:1] if before and before[0] == tokenizer.bos_token_id else []
    choices = torch.randint(len(words), (count, STARTS), generator=generator).tolist()
    scripts = []
    for number in range(count):
        if turns is not None and number % 2:
            scripts.append(Script(turns))
        else:
            scripts.append(Script([[*before, words[choice]] for choice in choices[number]]))
    return scripts


def conversation_parts(tokenizer: Any, ends: set[int]) -> list[list[int]] | None:
    """Return what stands before a user's message and before the answer to it; None without a usable chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a chat template can raise anything
        return None
    before, found, after = text.partition(MARK)
    if not found or not before:
        return None
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]
    # The model has written the end of the user's message itself.
    return [parts[0], parts[1][1:] if parts[1] and parts[1][0] in ends else parts[1]]
