"""The structure of many architectures, observed from transformers' models without weights."""

from pathlib import Path

import pytest
import torch
import transformers
from bwla_converter.checkpoint.dummy import config_source
from bwla_converter.hf.expert_linears import divide_experts
from bwla_converter.source.structure import InputGroup, Structure
from bwla_kernels.errors import SourceError
from bwla_kernels.format.schema import is_ignored
from decoder_configs import write_config

from benchmarks.coverage.cases import CASES

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = InputGroup(("self_attn.o_proj",), "input_layernorm", input_sharded=True)
GATE_UP = InputGroup(("mlp.gate_proj", "mlp.up_proj"))
DOWN = InputGroup(("mlp.down_proj",), "post_attention_layernorm", input_sharded=True)
ATTENTION = (InputGroup(QKV), O_PROJ)
GATED = (*ATTENTION, GATE_UP, DOWN)
SANDWICHED = (
    InputGroup(QKV),
    InputGroup(("self_attn.o_proj",), None, input_sharded=True),
    GATE_UP,
    InputGroup(("mlp.down_proj",), None, input_sharded=True),
)
SEVEN = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma2": SANDWICHED,
    "gemma3_text": SANDWICHED,
    "phi3": (
        InputGroup(("self_attn.qkv_proj",)),
        O_PROJ,
        InputGroup(("mlp.gate_up_proj",)),
        DOWN,
    ),
}
"""Groups of the families that were once written by hand."""

NO_LINEARS = "gpt2"


def observed(folder: Path, name: str) -> Structure:
    return config_source(write_config(folder, name)).structure


def groups(structure: Structure, index: int) -> list[tuple[str, ...]]:
    return [group.members for group in structure.blocks[index]]


@pytest.mark.parametrize("name", SEVEN)
def test_the_families_that_were_written_by_hand(tmp_path: Path, name: str) -> None:
    structure = observed(tmp_path, name)
    assert structure.blocks == (SEVEN[name],) * 2
    assert structure.layers == "model.layers"
    assert (structure.embedding, structure.head, structure.final_norm) == (
        "model.embed_tokens",
        "lm_head",
        "model.norm",
    )
    assert not structure.kept
    assert structure.own_head == structure.int8_head == structure.int8_embedding == (name != "gemma2")
    assert structure.layer_path(1) == structure.layer_name(1) == "model.layers.1"


@pytest.mark.parametrize("name", [name for name in CASES if name != NO_LINEARS])
def test_every_architecture_is_observed(tmp_path: Path, name: str) -> None:
    source = config_source(write_config(tmp_path, name))
    structure = source.structure
    linears = [linear for _, linear in structure.linears()]
    assert len(set(linears)) == len(linears)
    assert source.num_layers == len(structure.blocks)
    assert all(structure.blocks)
    assert all(f"{linear}.weight" in source.entries for linear in linears)
    assert not [linear for linear in linears if is_ignored(linear, structure.kept)]
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        model = getattr(transformers, structure.architecture)(config)
        for index, experts in structure.experts.items():
            divide_experts(model.get_submodule(structure.layer_path(index)), experts)
    for group, linear in structure.linears():
        module = model.get_submodule(structure.module_path(linear))
        assert isinstance(module, torch.nn.Linear)
        assert tuple(module.weight.shape) == source.entries[f"{linear}.weight"].shape
        if group.stream is not None:
            index = structure.layer_of(linear)
            assert index is not None
            block = model.get_submodule(structure.layer_path(index))
            assert not list(block.get_submodule(group.stream).children())
    for name_outside in filter(None, [structure.embedding, structure.final_norm]):
        model.get_submodule(structure.module_path(name_outside))


def experts_of(stem: str, *leaves: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{number}.{leaf}" for number in range(4) for leaf in leaves)


def test_one_norm_for_attention_and_mlp_makes_one_group(tmp_path: Path) -> None:
    structure = observed(tmp_path, "cohere2")
    assert structure.blocks[0] == (
        InputGroup((*QKV, "mlp.gate_proj", "mlp.up_proj")),
        O_PROJ,
        InputGroup(("mlp.down_proj",), None, input_sharded=True),
    )


def test_the_head_of_gpt_neox_is_stored_under_another_name(tmp_path: Path) -> None:
    structure = observed(tmp_path, "gpt_neox")
    assert groups(structure, 0) == [
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ]
    assert [group.stream for group in structure.blocks[0]] == [None] * 4
    assert structure.head == "embed_out"
    assert structure.module_path("embed_out") == "lm_head"
    assert structure.stored_name("lm_head") == "embed_out"
    assert (structure.embedding, structure.final_norm) == ("gpt_neox.embed_in", "gpt_neox.final_layer_norm")


def test_layers_of_two_kinds(tmp_path: Path) -> None:
    structure = observed(tmp_path, "lfm2")
    feed_forward = (
        InputGroup(("feed_forward.w1", "feed_forward.w3")),
        InputGroup(("feed_forward.w2",), "ffn_norm", input_sharded=True),
    )
    assert structure.blocks[0] == (
        InputGroup(("conv.in_proj",)),
        InputGroup(("conv.out_proj",), "operator_norm", input_sharded=True),
        *feed_forward,
    )
    assert structure.blocks[1][0] == InputGroup(QKV)
    assert structure.blocks[1][2:] == feed_forward


def test_gated_delta_networks_keep_decay_and_step_size(tmp_path: Path) -> None:
    structure = observed(tmp_path, "qwen3_5_text")
    assert structure.blocks == (
        (
            InputGroup(("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")),
            InputGroup(("linear_attn.out_proj",), "input_layernorm", input_sharded=True),
            GATE_UP,
            DOWN,
        ),
        GATED,
    )
    assert set(structure.kept) == {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}


def test_latent_attention_and_experts(tmp_path: Path) -> None:
    structure = observed(tmp_path, "deepseek_v3")
    attention = (
        InputGroup(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        InputGroup(("self_attn.q_b_proj",)),
        O_PROJ,
    )
    assert structure.blocks[0] == (*attention, GATE_UP, DOWN)
    assert structure.blocks[1] == (
        *attention,
        InputGroup(
            (
                *experts_of("mlp.experts", "gate_proj", "up_proj"),
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
            )
        ),
        InputGroup(experts_of("mlp.experts", "down_proj"), None, input_sharded=True),
        InputGroup(("mlp.shared_experts.down_proj",), None, input_sharded=True),
    )
    assert set(structure.kept) == {"self_attn.kv_b_proj", "mlp.gate"}


def test_layers_that_share_keys_have_smaller_groups(tmp_path: Path) -> None:
    structure = observed(tmp_path, "gemma3n_text")
    queries = ("laurel.linear_left", "self_attn.q_proj")
    assert groups(structure, 0)[0] == (*queries, "self_attn.k_proj", "self_attn.v_proj")
    assert groups(structure, 2)[0] == groups(structure, 3)[0] == queries
    assert groups(structure, 0)[1:] == groups(structure, 2)[1:]
    assert {"altup.prediction_coefs", "per_layer_model_projection"} <= set(structure.kept)
    assert structure.final_norm == "model.norm", (
        "it reads the mean of the streams, not the last layer's output"
    )


def test_experts_have_their_stored_names(tmp_path: Path) -> None:
    structure = observed(tmp_path, "mixtral")
    stem = "block_sparse_moe.experts"
    block = (
        *ATTENTION,
        InputGroup(experts_of(stem, "w1", "w3")),
        InputGroup(experts_of(stem, "w2"), None, input_sharded=True),
    )
    assert structure.blocks == (block, block)
    assert set(structure.kept) == {"block_sparse_moe.gate"}


def test_experts_that_no_kernel_computes_are_kept_under_their_stored_name(tmp_path: Path) -> None:
    structure = observed(tmp_path, "nemotron_h")
    assert structure.kept["mixer.experts"] == "experts without a gate have no kernel"


def test_transposed_experts_get_the_names_of_linears(tmp_path: Path) -> None:
    structure = observed(tmp_path, "gpt_oss")
    assert structure.blocks[0][2:] == (
        InputGroup(experts_of("mlp.experts", "gate_proj", "up_proj")),
        InputGroup(experts_of("mlp.experts", "down_proj"), None, input_sharded=True),
    )
    assert set(structure.kept) == {"mlp.router"}


def test_a_multimodal_model_is_quantized_in_its_decoder_only(tmp_path: Path) -> None:
    structure = observed(tmp_path, "gemma3")
    assert structure.blocks == (SANDWICHED, SANDWICHED)
    assert structure.layers == "language_model.model.layers"
    assert structure.layer_path(0) == "model.language_model.layers.0"
    assert structure.module_path("language_model.model.layers.1.mlp.down_proj") == (
        "model.language_model.layers.1.mlp.down_proj"
    )
    assert set(structure.kept) == {"vision_tower"}
    assert not structure.int8_embedding


def test_an_output_that_was_changed_in_place_is_not_added_as_it_is(tmp_path: Path) -> None:
    """Llama 4 adds the experts' outputs to those of the shared expert in place, before the residual stream."""
    structure = observed(tmp_path, "llama4_text")
    assert structure.blocks[0][3] == InputGroup(("feed_forward.shared_expert.down_proj",), None, True)
    assert structure.blocks[0][1] == O_PROJ


def test_a_model_of_embeddings_has_no_head(tmp_path: Path) -> None:
    assert observed(tmp_path / "decoder", "qwen3_embedding").has_head
    for name in ("gemma3_embed", "modernbert", "xlm_roberta"):
        structure = observed(tmp_path / name, name)
        assert not structure.has_head
        assert structure.loss_unit == "cosine distance per token"


def test_linears_that_are_conv1d_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="GPT2LMHeadModel stores its linears as Conv1D"):
        observed(tmp_path, NO_LINEARS)


def test_layers_that_share_weights_are_refused(tmp_path: Path) -> None:
    transformers.Zamba2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_attention_heads=2,
        num_key_value_heads=2,
        mamba_headdim=32,
        n_mamba_heads=4,
        mamba_d_state=16,
        mamba_ngroups=1,
        num_mem_blocks=1,
        adapter_rank=32,
        vocab_size=64,
        architectures=["Zamba2ForCausalLM"],
    ).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="Zamba2ForCausalLM shares model.layers.3.* between layers"):
        config_source(tmp_path)


def test_a_model_with_an_encoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(
        d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2, architectures=["T5ForConditionalGeneration"]
    ).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="expected a model with a decoder only, found T5ForConditional"):
        config_source(tmp_path)


def test_an_architecture_that_vllm_does_not_quantize_is_refused(tmp_path: Path) -> None:
    transformers.MambaConfig(
        hidden_size=64, state_size=16, num_hidden_layers=2, vocab_size=64, architectures=["MambaForCausalLM"]
    ).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="found none .*Mamba-1 layer takes no quantization config"):
        config_source(tmp_path)


def test_narrow_linears_stay_and_with_them_what_vllm_fuses(tmp_path: Path) -> None:
    settings = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 100}
    structure = config_source(write_config(tmp_path, "llama", **settings)).structure
    assert groups(structure, 0) == [("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj")]
    assert structure.kept["self_attn.k_proj"] == "has 16 rows, fewer than 32"
    assert "vLLM stores it in one with self_attn.k_proj" in structure.kept["self_attn.q_proj"]
    assert "found 100" in structure.kept["mlp.down_proj"]
