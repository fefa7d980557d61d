"""How the input kernel is cut: sizes that it can handle, for every layer, number of tokens and architecture."""

from collections.abc import Iterator

from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.prepare_config import InputConfig, column_pieces, padded_rows, select_many


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
        for wished in (1, 8):
            blocks, n1, n2 = choose_rotation(width, wished)
            for rank in (0, 1, 16, 100):
                spec = LayerSpec(64, width, blocks, n1, n2, rank=rank)
                for m in (1, 4, 5, 33, 128, 129, 300, 1024, 1025, 8192):
                    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
                        yield spec, m, select_many(spec, m, capability)


def test_configurations_keep_what_the_kernel_needs() -> None:
    for spec, m, config in _all_configs():
        for number in (config.tokens, config.u_tokens, config.u_ranks, config.u_step, config.num_warps):
            assert number & (number - 1) == 0
        assert config.tokens * padded_rows(spec.n1) <= 128
        assert m > 4 or config.tokens == 1, "bit planes are written for one token a program"
        assert not config.u_dot or min(config.u_tokens, config.u_ranks) >= 16
