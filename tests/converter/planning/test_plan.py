"""The plan of a conversion: rotation sizes, rank, head, sizes on disk, and what it refuses."""

from dataclasses import replace

import pytest
from bwla_converter.common.bits import AUTO_RANK_BITS_PER_WEIGHT, auto_rank, largest_fitting_rank
from bwla_converter.planning.plan import (
    LARGE_HEAD,
    ConversionPlan,
    choose_embedding,
    choose_head,
    input_bytes,
    make_plan,
    with_clips,
)
from bwla_converter.source.model import Source, open_source
from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.format.schema import Provenance

PROVENANCE = Provenance(base_model="m", recipe="data-free", seed=0)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(make_model) -> Source:
    return open_source(str(make_model()))


@pytest.fixture
def tied(make_model) -> Source:
    return open_source(str(make_model(tie_word_embeddings=True)))


def plan(source: Source, rank: int | None = 2, bits: int = 6, clip: float | None = None) -> ConversionPlan:
    return make_plan(source, rank, bits, clip, PROVENANCE)


def scaled_up(source: Source, factor: int) -> Source:
    """The headers of a model whose linears and norms are `factor` times as wide; there are no such files."""
    entries = {
        name: replace(entry, shape=tuple(factor * size for size in entry.shape))
        for name, entry in source.entries.items()
    }
    return replace(source, entries=entries)


def test_every_linear_gets_a_spec_in_execution_order(source: Source) -> None:
    made = plan(source, clip=0.9)
    names = [name for index in range(source.num_layers) for name in source.linears_of_layer(index)]
    assert list(made.specs) == names
    assert len(names) == 14
    for name, spec in made.specs.items():
        assert (spec.out_features, spec.in_features) == source.entries[f"{name}.weight"].shape
        assert (spec.rank, spec.bits, spec.clip) == (2, 6, 0.9)
        assert spec.rotation_groups * spec.n1 * spec.n2 == spec.in_features
    assert made.format.rotation.keys() == {name.rpartition(".")[2] for name in names}
    assert made.format.ignore == ["lm_head"]


def test_a_layer_with_another_width_gets_a_rotation_of_its_own(source: Source) -> None:
    name = "model.layers.1.mlp.down_proj"
    entries = {**source.entries, f"{name}.weight": replace(source.entries[f"{name}.weight"], shape=(64, 192))}
    made = plan(replace(source, entries=entries))
    spec = made.specs[name]
    # vLLM's class of a multimodal model may have another prefix than the stored tensors.
    own = made.format.rotation["layers.1.mlp.down_proj"]
    assert own == (spec.rotation_groups, spec.n1, spec.n2) != made.format.rotation["down_proj"]
    assert made.format.layer_spec(f"language_model.{name}", 64, 192).rotation_groups == spec.rotation_groups
    assert made.format.layer_spec(name.replace("1", "0"), 64, 128).n1 == made.format.rotation["down_proj"][1]


def test_the_automatic_rank_stays_within_the_bits(source: Source) -> None:
    assert (plan(source, rank=None).rank, plan(source, rank=3).fitting_rank) == (0, 3)
    wide = scaled_up(source, 32)
    made = plan(wide, rank=None)
    assert made.fitting_rank == largest_fitting_rank(made.specs)
    assert made.rank == auto_rank(made.fitting_rank) > 0
    assert made.bits_per_weight <= AUTO_RANK_BITS_PER_WEIGHT
    assert plan(wide, rank=made.fitting_rank + 1).bits_per_weight > AUTO_RANK_BITS_PER_WEIGHT


def test_an_untied_head_is_quantized_unless_16_bits_are_requested(source: Source) -> None:
    assert [choose_head(source, bits) for bits in (None, 8, 16)] == [HEAD, HEAD, None]


def test_a_tied_head_is_quantized_where_it_is_large_or_requested(tied: Source) -> None:
    assert [choose_head(tied, bits) for bits in (None, 8, 16)] == [None, EMBEDDING, None]
    large = {**tied.entries, EMBEDDING: replace(tied.entries[EMBEDDING], shape=(LARGE_HEAD // 64, 64))}
    assert choose_head(replace(tied, entries=large), None) == EMBEDDING


def test_a_family_without_a_head_of_its_own_keeps_the_tied_one(make_model) -> None:
    source = open_source(str(make_model("Gemma 2", tie_word_embeddings=True)))
    assert choose_head(source, None) is None
    with pytest.raises(SourceError, match="tied and unquantized, found --lm-head-bits 8"):
        choose_head(source, 8)
    with pytest.raises(SourceError, match="found tie_word_embeddings false"):
        choose_head(replace(source, tied_head=False), None)


def test_the_embedding_has_8_bits_unless_16_are_requested(source: Source, tied: Source) -> None:
    assert [choose_embedding(source, bits) for bits in (None, 8, 16)] == [EMBEDDING, EMBEDDING, None]
    assert choose_embedding(source, None, head_bits=16) == EMBEDDING
    # A tied head has the bits of the embedding, so either option can ask for 16.
    assert [choose_embedding(tied, None, head_bits) for head_bits in (None, 8, 16)] == [
        EMBEDDING,
        EMBEDDING,
        None,
    ]
    with pytest.raises(
        SourceError, match="both have the same bits, found --embedding-bits 8 and --lm-head-bits 16"
    ):
        choose_embedding(tied, 8, head_bits=16)
    with pytest.raises(SourceError, match="--embedding-bits: expected 8, 16 or auto, found 4"):
        choose_embedding(source, 4)


def test_an_ignored_head_or_embedding_stays_unquantized(source: Source) -> None:
    made = plan(replace(source, ignore=("lm_head", "embed_tokens")))
    assert (made.head_source, made.embedding_source) == (None, None)
    assert made.format.ignore == ["lm_head", "embed_tokens"]
    with pytest.raises(
        SourceError, match="lm_head: expected --lm-head-bits 16 with --ignore lm_head, found 8"
    ):
        make_plan(replace(source, ignore=("lm_head",)), 2, 6, None, PROVENANCE, 8)


def test_a_family_whose_embedding_vllm_cannot_quantize_keeps_it(make_model) -> None:
    source = open_source(str(make_model("Gemma 2", tie_word_embeddings=True)))
    assert choose_embedding(source, None) is None
    with pytest.raises(
        SourceError, match="no quantized embedding for Gemma2ForCausalLM, found --embedding-bits 8"
    ):
        choose_embedding(source, 8)


def test_a_tied_head_is_the_8_bit_embedding(tied: Source) -> None:
    for head_bits in (None, 8):
        made = make_plan(tied, 2, 6, None, PROVENANCE, head_bits)
        assert made.int8_sources == {"model.embed_tokens": EMBEDDING}
        assert made.format.lm_head is None
        assert made.format.embedding is not None
        # Some models store the tied head beside the embedding.
        assert made.is_replaced(HEAD)
    apart = make_plan(tied, 2, 6, None, PROVENANCE, 8, embedding_bits=16)
    assert apart.int8_sources == {"lm_head": EMBEDDING}
    assert apart.format.embedding is None


def test_only_what_needs_it_is_written_as_version_2(source: Source) -> None:
    def version(planes: int, embedding_bits: int) -> int:
        made = make_plan(source, 2, 6, None, PROVENANCE, None, planes, embedding_bits)
        return made.format.format_version

    assert [version(1, 16), version(1, 8), version(2, 16), version(2, 8)] == [1, 2, 2, 2]


def test_the_predicted_size_counts_what_is_written(source: Source, tied: Source) -> None:
    made = plan(source)
    replaced = [name for name in source.entries if made.is_replaced(name)]
    assert sorted(replaced) == sorted([*(f"{name}.weight" for name in made.specs), EMBEDDING, HEAD])
    assert made.output_bytes(source) < input_bytes(source)
    assert plan(source, rank=3).output_bytes(source) > made.output_bytes(source)
    plain = make_plan(tied, 2, 6, None, PROVENANCE, head_bits=16)
    with_head = make_plan(tied, 2, 6, None, PROVENANCE, head_bits=8, embedding_bits=16)
    # The embedding stays, and its 8-bit copy with a float32 scale per row is added.
    assert not with_head.is_replaced(EMBEDDING)
    assert with_head.output_bytes(tied) == plain.output_bytes(tied) + 96 * 64 + 4 * 96
    # Or that copy replaces it.
    assert plan(tied).output_bytes(tied) == plain.output_bytes(tied) - 96 * 64 + 4 * 96


def test_clips_of_the_recipe_replace_those_of_the_plan(source: Source) -> None:
    made = plan(source)
    assert with_clips(made, dict.fromkeys(made.specs, 1.0)) is made
    clips = {name: 0.8 if name.endswith("down_proj") else 1.0 for name in made.specs}
    clipped = with_clips(made, clips)
    assert {name: spec.clip for name, spec in clipped.specs.items()} == clips
    assert clipped.format.clip == clips
    assert made.format.clip == 1.0


def test_what_cannot_be_planned_is_refused(source: Source) -> None:
    with pytest.raises(
        SourceError, match=r"q_proj: expected a rank of at most 64 for its 128 x 64 weight, found 65"
    ):
        plan(source, rank=65)
    with pytest.raises(SourceError, match="--lm-head-bits: expected 8, 16 or auto, found 4"):
        choose_head(source, 4)
    with pytest.raises(SourceError, match="--ignore excludes all"):
        plan(replace(source, ignore=("re:.*_proj",)))
    for bits, clip in ((9, None), (6, 1.5)):
        with pytest.raises(FormatError):
            plan(source, bits=bits, clip=clip)
