"""The load test's plan and its verdict, without a server."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.serving.load import memory_facts, passed
from benchmarks.serving.load_judge import compare, count_separating, draw_controls
from benchmarks.serving.load_models import ADAPTERS, MODELS, Served, make_model
from benchmarks.serving.load_requests import (
    MALFORMED,
    Answer,
    Prompt,
    Request,
    make_plan,
    make_pool,
    with_adapters,
)

WORDS = " ".join(f"word{index}" for index in range(2000))
ROW = {
    "failed": 0,
    "mixed_up": 0,
    "cut_short": 0,
    "left_running": 0.0,
    "alive": True,
    "adapters": 4,
    "largest_gap_of_rescored_nats": 0.02,
    "smallest_gap_of_wrong_prompts_nats": 1.5,
    "smallest_gap_of_wrong_adapters_nats": 0.8,
}
"""A row that passes."""


def reply(*tokens: int, prompt: int = 0, finish: str = "length", error: str = "") -> Answer:
    return Answer(tokens=list(tokens), prompt_tokens=[prompt], finish=finish, error=error)


def test_prompts_and_plan_come_from_the_seed() -> None:
    pool = make_pool(WORDS, 20, 50, seed=3)
    assert pool == make_pool(WORDS, 20, 50, seed=3) != make_pool(WORDS, 20, 50, seed=4)
    assert len({prompt.text for prompt in pool}) == 20
    assert {prompt.chat for prompt in pool} == {False, True}
    assert make_plan(100, 20, seed=3) == make_plan(100, 20, seed=3) != make_plan(100, 20, seed=4)


def test_each_prompt_is_sent_to_the_base_model_and_to_each_adapter() -> None:
    prompts = make_pool(WORDS, 2, 50, seed=0)
    pool = with_adapters(prompts, ("one", "two"))
    assert [prompt.adapter for prompt in pool] == ["", "one", "two"] * 2
    assert [replace(prompt, adapter="") for prompt in pool] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert with_adapters(prompts, ()) == prompts


def test_every_kind_of_request_goes_to_every_adapter() -> None:
    pool = with_adapters(make_pool(WORDS, 16, 50, seed=0), ADAPTERS)
    plan = make_plan(1000, len(pool), seed=0)
    kinds = [request.kind for request in plan]
    shares = {"whole": 400, "stream": 400, "cancel": 100, "malformed": 100}
    assert {kind: kinds.count(kind) for kind in shares} == shares
    for kind in ("whole", "stream", "cancel"):
        asked = [pool[request.index].adapter for request in plan if request.kind == kind]
        assert {asked.count(name) for name in ("", *ADAPTERS)} == {shares[kind] // 5}
    assert {request.index for request in plan if request.kind == "malformed"} == set(range(len(MALFORMED)))


@pytest.mark.parametrize(
    ("kind", "answer", "found"),
    [
        ("whole", reply(1, 2, 3), "identical"),
        ("cancel", reply(1, 2, finish=""), "identical"),
        ("stream", reply(1, 2, 9), "rounded"),
        ("cancel", reply(1, 9, finish=""), "rounded"),
        ("whole", reply(4, 5, 6), "mixed_up"),
        ("whole", reply(1, 2, 9, prompt=1), "mixed_up"),
        ("stream", reply(1, 2), "cut_short"),
        ("stream", reply(1, 2, 3, finish=""), "cut_short"),
        ("stream", reply(1, 9, finish=""), "cut_short"),
        ("stream", reply(), "cut_short"),
    ],
)
def test_an_answer_is_compared_with_the_one_alone(kind: str, answer: Answer, found: str) -> None:
    references = [reply(1, 2, 3), reply(4, 5, 6, prompt=1)]
    counts, different = compare([Request(kind, 0)], [answer], references)
    wanted = dict.fromkeys(("identical", "mixed_up", "cut_short"), 0) | {"compared": 1}
    if found in wanted:
        wanted[found] = 1
    assert counts == wanted
    assert different == ([] if found == "identical" else [0])


def test_lost_and_malformed_requests_are_not_compared() -> None:
    plan = [Request("whole", 0), Request("malformed", 0), Request("whole", 0), Request("stream", 0)]
    answers = [reply(error="timeout"), Answer(400), reply(1), reply(2)]
    counts, different = compare(plan, answers, [reply(1)])
    assert counts == {"compared": 2, "identical": 1, "mixed_up": 0, "cut_short": 0}
    assert different == [3]


def test_the_answer_of_another_adapter_to_the_same_prompt_is_mixed_up() -> None:
    references = [reply(1, 2), reply(3, 4)]
    counts, _ = compare([Request("whole", 0)], [reply(3, 4)], references)
    assert counts["mixed_up"] == 1


def test_controls_differ_in_the_text_or_in_the_adapter_and_in_the_answer() -> None:
    prompts = [Prompt(text, False, 2) for text in ("a", "b", "c")]
    pool = with_adapters(prompts, ("one",))
    references = [reply(1), reply(2), reply(3), reply(3), reply(4), reply(5)]
    texts = draw_controls(pool, references, "text")
    assert len(texts) == len(draw_controls(pool, references, "text")) == 40
    for mine, other in texts:
        assert pool[mine].text != pool[other].text
        assert pool[mine].adapter == pool[other].adapter
    assert set(draw_controls(pool, references, "adapter")) == {(0, 1), (1, 0), (4, 5), (5, 4)}
    assert count_separating(pool, references) == 2
    assert draw_controls(prompts, references[::2], "adapter") == []


@pytest.mark.parametrize(
    "change",
    [
        {"failed": 1},
        {"mixed_up": 1},
        {"cut_short": 1},
        {"left_running": 1.0},
        {"left_running": -1.0},
        {"alive": False},
        {"largest_gap_of_rescored_nats": 1.0},
        {"largest_gap_of_rescored_nats": 2.0, "adapters": 0},
        {"largest_gap_of_rescored_nats": 0.0, "smallest_gap_of_wrong_adapters_nats": 0.0},
    ],
)
def test_a_row_passes_only_if_nothing_went_wrong(change: dict[str, float]) -> None:
    assert passed(ROW)
    assert not passed({**ROW, **change})


def test_without_adapters_other_prompts_are_the_only_comparison() -> None:
    row = {key: value for key, value in ROW.items() if "wrong_adapters" not in key}
    assert passed({**row, "adapters": 0})


def test_the_growth_of_memory_is_that_after_the_first_fifth() -> None:
    samples = [(0, {"vllm": 10}), (20, {"vllm": 100}), (60, {"vllm": 140}), (100, {"vllm": 180, "new": 4})]
    facts = memory_facts(samples, 100)
    assert facts["memory_bytes"] == {"first": 10, "last": 184}
    assert facts["grown_bytes_by_process"] == {"vllm": 80, "new": 4}
    assert facts["memory_slope_of_the_last_two_fifths"] == 1.1


def test_any_other_name_is_a_folder(tmp_path: Path) -> None:
    assert list(MODELS) == ["example", "planes", "lora", "experts", "dummy"]
    assert make_model(str(tmp_path), tmp_path / "work") == Served(tmp_path)
