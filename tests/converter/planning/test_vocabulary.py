"""How the head and the embedding are stored: what is chosen, what vLLM supports, and what is refused."""

from dataclasses import replace

import pytest
from bwla_converter.planning.vocabulary import LARGE_HEAD, choose_embedding, choose_head
from bwla_converter.source.model import Source, open_source
from bwla_kernels.errors import SourceError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(make_model) -> Source:
    return open_source(str(make_model()))


@pytest.fixture
def tied(make_model) -> Source:
    return open_source(str(make_model(tie_word_embeddings=True)))


def test_an_untied_head_is_quantized_unless_16_bits_are_requested(source: Source) -> None:
    assert [choose_head(source, bits) for bits in (None, 8, 16, 3)] == [HEAD, HEAD, None, HEAD]


def test_a_tied_head_is_quantized_where_it_is_large_or_requested(tied: Source) -> None:
    assert [choose_head(tied, bits) for bits in (None, 8, 16, 3)] == [None, EMBEDDING, None, EMBEDDING]
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


def test_a_family_whose_embedding_vllm_cannot_quantize_keeps_it(make_model) -> None:
    source = open_source(str(make_model("Gemma 2", tie_word_embeddings=True)))
    assert choose_embedding(source, None) is None
    with pytest.raises(
        SourceError, match="no quantized embedding for Gemma2ForCausalLM, found --embedding-bits 8"
    ):
        choose_embedding(source, 8)


def test_other_numbers_of_bits_are_refused(source: Source) -> None:
    for bits in (1, 5):
        with pytest.raises(
            SourceError, match=f"--lm-head-bits: expected 2, 3, 4, 8, 16 or auto, found {bits}"
        ):
            choose_head(source, bits)
