"""Time llama.cpp at the shapes of real models, on files with random weights, beside vLLM (serve.py calls this).

Its benchmark tool comes with the source distribution of llama-cpp-python, which carries llama.cpp:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B llama-build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build llama-build -j 2 --target llama-bench

A file has the linears (of attention, MLPs and experts) and the embedding in one type of weights, the head, or an
embedding that is tied to it, in Q6_K, or in Q8_0 where its width is no multiple of 256, as llama.cpp's own quantization
tool chooses, and norms and routers in float32. All bytes of a block are random, its scales around 0.01: speed does not
depend on them.
"""

import json
import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

SCALES = {
    "Q4_0": (0,),
    "Q8_0": (0,),
    "Q1_0": (0,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q2_K": (80, 82),
}
"""Types, and where the float16 scales of a block lie in it (llama.cpp, ggml/src/ggml-common.h)."""

HEAD = "Q6_K"
PATTERN_BLOCKS = 1 << 14
"""Blocks of random bytes that a tensor repeats."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a file: its name, the sizes of its axes with the row length last, and its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def type(self) -> GGMLQuantizationType:
        """The type by its number in the file."""
        return GGMLQuantizationType[self.kind]

    @property
    def size(self) -> int:
        """Bytes."""
        block, nbytes = gguf.GGML_QUANT_SIZES[self.type]
        return int(math.prod(self.shape) // block * nbytes)

    def data(self, generator: np.random.Generator) -> np.ndarray:
        """Return the bytes: uint8 [size]."""
        if self.kind == "F32":
            return np.full(self.size // 4, 0.02, dtype=np.float32).view(np.uint8)
        nbytes = gguf.GGML_QUANT_SIZES[self.type][1]
        pattern = generator.integers(0, 256, (PATTERN_BLOCKS, nbytes), dtype=np.uint8)
        for at in SCALES[self.kind]:
            scales = generator.uniform(0.005, 0.015, (PATTERN_BLOCKS, 1)).astype(np.float16)
            pattern[:, at : at + 2] = scales.view(np.uint8)
        return np.resize(pattern.reshape(-1), self.size)


def weights(settings: dict[str, Any], kind: str, head: str | None = None) -> Iterator[Weight]:
    """Yield the tensors of a Qwen2 or Qwen3 model of settings as in `engines.SHAPES`; `head` is the head's type."""
    hidden, head_size = settings["hidden_size"], settings["head_dim"]
    queries, keys = (head_size * settings[f"num_{name}_heads"] for name in ("attention", "key_value"))
    experts = settings.get("num_experts")

    def tensor(
        name: str, shape: tuple[int, ...], tensor_kind: str, layer: int | None = None, suffix: str = "weight"
    ) -> Weight:
        full = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[name]].format(bid=layer)
        return Weight(f"{full}.{suffix}", shape, tensor_kind)

    tied = settings["tie_word_embeddings"]
    divides = hidden % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[HEAD]][0] == 0
    head = head or (HEAD if divides else "Q8_0")
    yield tensor("TOKEN_EMBD", (settings["vocab_size"], hidden), head if tied else kind)
    yield tensor("OUTPUT_NORM", (hidden,), "F32")
    if not tied:
        yield tensor("OUTPUT", (settings["vocab_size"], hidden), head)
    for layer in range(settings["num_hidden_layers"]):
        yield tensor("ATTN_NORM", (hidden,), "F32", layer)
        yield tensor("FFN_NORM", (hidden,), "F32", layer)
        if settings["model_type"] == "qwen2":
            for name, size in (("ATTN_Q", queries), ("ATTN_K", keys), ("ATTN_V", keys)):
                yield tensor(name, (size,), "F32", layer, "bias")
        else:
            for name in ("ATTN_Q_NORM", "ATTN_K_NORM"):
                yield tensor(name, (head_size,), "F32", layer)
        for name, rows, columns in (
            ("ATTN_Q", queries, hidden),
            ("ATTN_K", keys, hidden),
            ("ATTN_V", keys, hidden),
            ("ATTN_OUT", hidden, queries),
        ):
            yield tensor(name, (rows, columns), kind, layer)
        wide = settings["moe_intermediate_size"] if experts else settings["intermediate_size"]
        each = (experts,) if experts else ()
        if experts:
            yield tensor("FFN_GATE_INP", (experts, hidden), "F32", layer)
        for name, rows, columns in (
            ("FFN_GATE", wide, hidden),
            ("FFN_UP", wide, hidden),
            ("FFN_DOWN", hidden, wide),
        ):
            yield tensor(f"{name}_EXP" if experts else name, (*each, rows, columns), kind, layer)


def write_gguf(path: Path, settings: dict[str, Any], kind: str, head: str | None = None) -> None:
    """Write a file of random weights without a vocabulary.

    Args:
        path: the file.
        settings: of the model, as in `engines.SHAPES` joined to `engines.COMMON`.
        kind: type of the linears' weights, one of `SCALES`.
        head: type of the head, or of the embedding that is tied to it; None for what llama.cpp's tool chooses.
    """
    experts = settings.get("num_experts")
    writer = GGUFWriter(path, settings["model_type"].replace("_", ""))
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(settings["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(settings["moe_intermediate_size"])
    tensors = list(weights(settings, kind, head))
    for tensor in tensors:
        shape = gguf.quant_shape_to_byte_shape(
            tensor.shape, tensor.type
        )  # of the bytes, as the writer expects
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.size, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for tensor in tensors:
        writer.write_tensor_data(tensor.data(generator))
    writer.close()


def time_model(
    bench: Path,
    model: Path,
    prefill: int,
    answer: int,
    threads: int,
    *,
    long_prefill: int = 0,
    contexts: Sequence[int] = (),
) -> dict[str, float]:
    """Run llama.cpp's benchmark tool on a file.

    Args:
        bench: the tool, `llama-bench`.
        model: the file.
        prefill: tokens of the prompt.
        answer: tokens of the answer, which follows an empty context.
        threads: threads.
        long_prefill: tokens of a longer prompt; 0 for none.
        contexts: tokens of context before further answers.

    Returns: `decode` and `prefill` in tokens/s, means of the tool's repetitions; of the longer ones, `prefill_2048` and
        `decode_1024`, for example.

    Raises:
        RuntimeError: the tool failed; quotes the end of its output.
    """
    runs: list[list[object]] = [["-p", prefill, "-n", answer, "-r", 3]]
    if long_prefill:
        runs.append(["-p", long_prefill, "-n", 0, "-r", 1])
    if contexts:
        runs.append(["-p", 0, "-n", answer, "-d", ",".join(map(str, contexts)), "-r", 1])
    found = {}
    for options in runs:
        command = [bench, "-m", model, "-t", threads, "-o", "json", *options]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{bench.name} failed on {model.name}: {done.stderr.strip()[-500:]}")
        for row in json.loads(done.stdout):
            name = "decode" if row["n_gen"] else "prefill"
            length = row.get("n_depth") or (row["n_prompt"] if row["n_prompt"] == long_prefill else 0)
            found[f"{name}_{length}" if length else name] = row["avg_ts"]
    return found
