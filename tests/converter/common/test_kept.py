"""Values that are kept in the cache."""

from pathlib import Path
from threading import Thread

import pytest
from bwla_converter.allocation.kept import Numbers
from bwla_converter.common.kept import kept_or_computed

COMPUTED: Numbers = {"q_proj": (0.1, 1 / 3)}


def never() -> Numbers:
    pytest.fail("computed again")


def test_a_value_is_computed_once_and_read_exactly(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "numbers.json"
    assert kept_or_computed(file, Numbers, lambda: COMPUTED) == COMPUTED
    assert kept_or_computed(file, Numbers, never) == COMPUTED
    assert kept_or_computed(tmp_path / "value.json", float, lambda: 2 / 3) == 2 / 3
    assert kept_or_computed(tmp_path / "value.json", float, lambda: 0.0) == 2 / 3


def test_of_several_that_want_a_value_one_computes_it(tmp_path: Path) -> None:
    file, computed, found = tmp_path / "numbers.json", [], []

    def compute() -> Numbers:
        computed.append(1)
        return COMPUTED

    threads = [
        Thread(target=lambda: found.append(kept_or_computed(file, Numbers, compute))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(computed), found) == (1, 4 * [COMPUTED])


@pytest.mark.parametrize("contents", ["", "{", '{"q_proj": [1]}', '{"q_proj": ["a", "b"]}', "[1]"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, contents: str) -> None:
    file = tmp_path / "numbers.json"
    file.write_text(contents)
    assert kept_or_computed(file, Numbers, lambda: COMPUTED) == COMPUTED
    assert kept_or_computed(file, Numbers, never) == COMPUTED


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert kept_or_computed(tmp_path / "cache" / "numbers.json", Numbers, lambda: COMPUTED) == COMPUTED
