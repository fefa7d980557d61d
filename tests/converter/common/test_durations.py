"""Lengths of time in words."""

from bwla_converter.common.durations import duration


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.1, 8.44, 45, 300, 7300, 23423)] == [
        "0.1 s",
        "8.4 s",
        "45 s",
        "5 min",
        "2 h 02 min",
        "6 h 30 min",
    ]
