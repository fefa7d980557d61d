"""How the input kernel is cut: sizes that it can handle, for every layer, number of tokens and architecture."""

from collections.abc import Iterator

from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.prepare_config import (
    PLANES_MAX_TOKENS,
    FewConfig,
    InputConfig,
    column_pieces,
    equal_pieces,
    few_tokens,
    padded_rows,
    select_config,
    select_few,
    select_many,
)


def test_column_pieces() -> None:
    assert column_pieces(80, 64) == (64, 16)
    assert column_pieces(128, 128) == (128,)
    assert column_pieces(100, 64) == (64, 32, 16)
    assert column_pieces(1, 64) == (16,)
    for n2 in range(1, 129):
        for widest in (16, 32, 64, 128):
            pieces = column_pieces(n2, widest)
            assert 0 <= sum(pieces) - n2 < 16
            assert all(piece & (piece - 1) == 0 and 16 <= piece <= widest for piece in pieces)


def _all_configs() -> Iterator[tuple[LayerSpec, int, InputConfig]]:
    for width in (1024, 2048, 3072, 4096, 5120, 11008, 14336, 25600):
        for preferred in (1, 8):
            blocks, n1, n2 = choose_rotation(width, preferred)
            for rank in (0, 1, 16, 100):
                spec = LayerSpec(64, width, blocks, n1, n2, rank=rank)
                for m in (1, 4, 5, 33, 128, 129, 300, 1024, 1025, 8192):
                    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
                        yield spec, m, select_many(spec, m, capability)


def test_configurations_keep_what_the_kernel_needs() -> None:
    for spec, _, config in _all_configs():
        for number in (config.tokens, config.u_tokens, config.u_ranks, config.u_step, config.num_warps):
            assert number & (number - 1) == 0
        assert config.tokens * padded_rows(spec.n1) <= 128
        assert min(config.u_tokens, config.u_ranks) >= 16


def test_pieces_of_one_width_cover_the_columns() -> None:
    assert equal_pieces(80) == (32, 32, 32)
    assert equal_pieces(48) == (64,)
    assert equal_pieces(112) == (128,)
    for n2 in range(1, 129):
        pieces = equal_pieces(n2)
        assert len(set(pieces)) == 1
        assert n2 <= sum(pieces) <= 128
        assert pieces[0] in (32, 64, 128)


def test_rotations_that_spill_below_hopper_are_cut_for_any_number_of_tokens() -> None:
    wide, fitting = LayerSpec(64, 96 * 128, 1, 96, 128), LayerSpec(64, 64 * 80, 1, 64, 80)
    assert isinstance(select_config(wide, 8192, (8, 0)), FewConfig)
    assert isinstance(select_config(wide, 8192, (9, 0)), InputConfig)
    assert isinstance(select_config(fitting, 8192, (8, 0)), InputConfig)


def test_few_tokens_are_cut_and_many_are_not() -> None:
    """Every layer decodes with the kernel for few tokens, whose shares of u cover the width."""
    for spec, m, _ in _all_configs():
        config = select_config(spec, m, (9, 0))
        assert isinstance(config, FewConfig) == (m <= few_tokens(spec))
        few = select_few(spec)
        assert few_tokens(spec) >= PLANES_MAX_TOKENS
        steps = -(-spec.in_features // (few.slices * few.step))
        assert few.slices * steps * few.step >= spec.in_features
        assert few.step & (few.step - 1) == 0
