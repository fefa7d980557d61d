"""The choice of a configuration: for any size, from the table, and only what the compile check has seen."""

import json
from importlib import resources

import pytest
from bwla_kernels.errors import BackendError
from bwla_kernels.triton import tuning
from bwla_kernels.triton.layout import chunk_layout
from bwla_kernels.triton.tuning import BINARY, INTEGER, MatmulConfig, select_config, selectable

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
SM_COUNTS = {(8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 188}
SHAPES = [(51200, 5120, 1), (5120, 25600, 8), (1024, 4096, 1), (5120, 8192, 8), (16, 32, 1), (300, 992, 31)]


def choose(n: int, k: int, g: int, m: int, capability: tuple[int, int], planes: int = 1) -> MatmulConfig:
    chunk = chunk_layout(n, g, k // g).chunk
    return select_config(n, k, g, chunk, m, 6, capability, SM_COUNTS[capability], planes)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("n", "k", "g"), SHAPES)
def test_every_choice_fits_and_is_compiled_by_the_check(
    n: int, k: int, g: int, capability: tuple[int, int], planes: int
) -> None:
    known = selectable(tuning.table_arch(capability), g == 1, planes)
    layout = chunk_layout(n, g, k // g)
    for m in (0, 1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 64, 65, 500, 4096, 100_000):
        config = choose(n, k, g, m, capability, planes)
        fitted = [tuning.fit_unroll(one, g, layout.chunks_per_group, layout.chunk) for one in known]
        assert config in (fitted if config.kernel == BINARY else known)
        assert layout.rows % config.block_n == 0
        if m <= 4:
            assert config.kernel == (BINARY if capability[0] < 10 else INTEGER)
        if config.kernel == BINARY:
            assert max(m, 1) <= config.block_m
            row_warps = config.num_warps // config.k_warps
            assert config.block_n % (16 * row_warps) == 0


def test_small_matmuls_are_split() -> None:
    """Down and o of Qwen3-32B have 40 tiles for 132 multiprocessors; gate_up has enough."""
    assert choose(5120, 25600, 8, 16, (9, 0)).split == 8
    assert choose(51200, 5120, 1, 16, (9, 0)).split == 1


def test_binary_tiles_shrink_with_the_rows() -> None:
    assert choose(51200, 5120, 1, 1, (8, 0)).block_n == 128
    assert choose(5120, 25600, 8, 1, (8, 0)).block_n == 16


def test_no_more_steps_are_loaded_together_than_a_block_has() -> None:
    """A warp of four has 3 steps of 512 columns of a 5120 wide block, and of one of 512 that it has for itself one."""
    assert choose(1024, 5120, 1, 1, (9, 0)).unroll == 2
    assert choose(1024, 4096, 8, 1, (9, 0)).unroll == 1


def test_some_tens_of_tokens_are_split_where_rows_are_few() -> None:
    """Down of Qwen3-32B has 40 tiles at 64 tokens, on 132 multiprocessors."""
    assert choose(5120, 25600, 8, 64, (9, 0)).split == 8
    assert choose(51200, 5120, 1, 64, (9, 0)).split == 1
    assert choose(5120, 25600, 8, 129, (9, 0)).split == 1


def test_binary_entries_may_use_all_registers() -> None:
    """Left alone the assembler gives up loads in flight for more programs."""
    for arch in ("80", "89", "90"):
        assert {c.max_registers for c in selectable(arch, True) if c.kernel == BINARY} == {255}


@pytest.mark.parametrize("m", [5, 6, 7, 8])
def test_five_tokens_fill_a_tile_of_sixteen_on_hopper(m: int) -> None:
    """wgmma takes 8, but Triton 3.6 turns a tile of 8 tokens into mma.sync; others have no such instruction."""
    assert choose(51200, 5120, 1, m, (9, 0)).block_m == 16
    assert choose(51200, 5120, 1, m, (8, 9)).block_m == 8


def test_measured_shapes_win(monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads(json.dumps(tuning.load_table()))
    measured = MatmulConfig(INTEGER, 64, 128, 4, 2)
    table["architectures"]["90"]["shapes"] = {"4096x4096/1": {"64": tuning.as_entry(measured)}}
    monkeypatch.setattr(tuning, "load_table", lambda: table)
    assert choose(4096, 4096, 1, 40, (9, 0)) == measured
    assert choose(4096, 4096, 1, 65, (9, 0)) != measured
    assert choose(4096, 4096, 1, 40, (9, 0), planes=2) != measured
    assert choose(4096, 4096, 1, 40, (8, 0)) != measured


def test_old_gpus_are_refused() -> None:
    with pytest.raises(BackendError, match="8.0 or newer, found 7.5"):
        select_config(4096, 4096, 1, 256, 1, 6, (7, 5), 40)


def test_the_table_says_where_it_is_from() -> None:
    text = resources.files("bwla_kernels.triton").joinpath("tuning.json").read_text()
    table = json.loads(text)
    measured = any(arch["shapes"] for arch in table["architectures"].values())
    assert ("shapes of sm_" in table["origin"]) == measured
    assert ("nothing here has been measured" in table["origin"]) != measured
