"""The plan of a conversion: rotation sizes, rank, head, sizes on disk, and what it refuses."""

from dataclasses import replace

import pytest
from bwla_converter.common.bits import AUTO_RANK_BITS_PER_WEIGHT, auto_rank, largest_fitting_rank
from bwla_converter.planning.plan import (
    ConversionPlan,
    input_bytes,
    make_plan,
    with_clips,
    with_planes,
)
from bwla_converter.source.model import Source, open_source
from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.format.schema import Provenance, parse_config

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


def test_an_ignored_head_or_embedding_stays_unquantized(source: Source) -> None:
    made = plan(replace(source, ignore=("lm_head", "embed_tokens")))
    assert (made.head_source, made.embedding_source) == (None, None)
    assert made.format.ignore == ["lm_head", "embed_tokens"]
    with pytest.raises(
        SourceError, match="lm_head: expected --lm-head-bits 16 with --ignore lm_head, found 8"
    ):
        make_plan(replace(source, ignore=("lm_head",)), 2, 6, None, PROVENANCE, 8)


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
    with pytest.raises(SourceError, match="--ignore excludes all"):
        plan(replace(source, ignore=("re:.*_proj",)))
    for bits, clip in ((9, None), (6, 1.5)):
        with pytest.raises(FormatError):
            plan(source, bits=bits, clip=clip)


def head_plan(source: Source, planes: int = 1, bits: int = 4) -> ConversionPlan:
    return make_plan(source, 2, 6, None, PROVENANCE, bits, planes)


def test_a_head_in_planes_is_a_linear_of_its_own(source: Source, tied: Source) -> None:
    for model in (source, tied):
        made = head_plan(model)
        spec = made.head_spec
        assert spec is not None
        assert (spec.out_features, spec.in_features, spec.planes, spec.rank) == (96, 64, 4, 2)
        assert "lm_head" not in made.specs
        assert made.format.layer_spec("lm_head", 96, 64) == spec
        assert made.format.is_quantized("language_model.lm_head")
        assert (made.format.lm_head, made.format.format_version) == (None, 2)
        assert made.int8_sources == {"model.embed_tokens": EMBEDDING}
        assert made.is_replaced(HEAD)
        assert made.bits_per_weight == plan(model).bits_per_weight
        for name, of_layer in made.specs.items():
            assert made.format.layer_spec(name, of_layer.out_features, of_layer.in_features) == of_layer
        few, many = (head_plan(model, bits=bits).output_bytes(model) for bits in (2, 4))
        assert many - few == 2 * 96 * 64 // 8 + 2 * 2 * 96  # signs and scales


def test_as_many_planes_everywhere_are_one_number(source: Source) -> None:
    assert head_plan(source, planes=2, bits=2).format.planes == 2
    mixed = head_plan(source, planes=2, bits=3).format.planes
    assert mixed == {**dict.fromkeys(plan(source).format.rotation, 2), "lm_head": 3}


def test_allocated_planes_leave_the_head_its_own(source: Source) -> None:
    made = head_plan(source, planes=3)
    names = list(made.specs)
    for planes in (dict.fromkeys(names, 1), {name: 1 + number % 2 for number, name in enumerate(names)}):
        chosen = with_planes(made, planes, 5, 8)
        assert chosen.head_spec is not None
        assert (chosen.head_spec.planes, chosen.head_spec.rank, chosen.head_spec.bits) == (4, 5, 8)
        assert chosen.format.layer_spec("lm_head", 96, 64) == chosen.head_spec
        for name, spec in chosen.specs.items():
            assert chosen.format.layer_spec(name, spec.out_features, spec.in_features) == spec


def test_one_plane_everywhere_needs_version_2_with_an_8_bit_embedding(source: Source) -> None:
    """What --bits writes where it allocates a single plane to all linears."""
    made = make_plan(source, 2, 6, None, PROVENANCE, None, 2)
    chosen = with_planes(made, dict.fromkeys(made.specs, 1), 2, 6)
    assert (chosen.format.planes, chosen.format.format_version) == (1, 2)
    assert parse_config(chosen.format.to_json()) == chosen.format


def test_the_clip_of_a_head_in_planes(source: Source) -> None:
    made = head_plan(source)
    ones = dict.fromkeys([*made.specs, "lm_head"], 1.0)
    assert with_clips(made, ones) is made
    clipped = with_clips(made, {**ones, "lm_head": 0.5})
    assert clipped.head_spec is not None
    assert clipped.head_spec.clip == 0.5
    assert clipped.format.layer_spec("lm_head", 96, 64) == clipped.head_spec
