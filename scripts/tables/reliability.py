"""Tables about reliability: answers under load, killed conversions, damaged files."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from scripts.tables.results import markdown_table, read_result

MODELS = {
    "example": "example model",
    "dummy": "random weights, shape of Qwen3-0.6B",
    "planes": "example model, two planes a weight",
    "lora": "example model with LoRA adapters",
    "experts": "mixture of experts, random weights",
}
"""Titles of the models of `benchmarks.serving.load`; others are shown by their names."""

LARGEST, WRONG = "largest_gap_of_rescored_nats", "smallest_gap_of_wrong_{}_nats"
"""Entries of a row of `benchmarks.serving.load`."""

SAME = "the same bytes"
"""What `tests.robustness.kill_resume` calls the outcome that is asked for."""

STATES = {
    "sensitivities partly written": "while the sensitivities were written to the cache",
    "no work folder": "before the work folder was made",
    "no manifest": "before its manifest was written",
    "checking": "while the model was being checked",
    "complete": "while the output was being completed",
    "all settled": "while the output was being completed",
    "renamed": "after the output got its name",
}
"""States in which `tests.robustness.kill_resume` finds a killed conversion, in their order; layers come in between."""

OUTCOMES = {
    "SILENT": "loaded silently with wrong data",
    "CRASH": "crash in our code",
    "refused": "refused by us",
    "refused by its host": "refused by transformers or vLLM",
    "other valid data": "other valid values",
    "same data": "the same data as before the damage",
    "not used": "not taken for a checkpoint of ours",
    "not asked": "not taken for a checkpoint of ours",
    "serves": "served by vLLM, after damage that changes nothing",
    "crash of its host": "crash in transformers or vLLM, before our code",
}
"""Outcomes of `tests.robustness.fuzz`, in the order of the table; the first two are always shown."""

READERS = {
    "converter": "converter",
    "plugin": "plugin",
    "transformers": "transformers",
    "vllm": "vLLM engine",
}


def load_table(name: str) -> str:
    """One line per figure, one column per model of the load test."""
    rows = read_result(name)["rows"]
    figures: dict[str, Callable[[dict[str, Any]], str]] = {
        "requests / clients": lambda row: f"{row['requests']:,} / {row['clients']}",
        "whole, streamed, cancelled, malformed": lambda row: _kinds(row["kinds"]),
        "requests lost": lambda row: str(row["failed"]),
        "answers to another request": lambda row: str(row["mixed_up"]),
        "answers cut short": lambda row: str(row.get("cut_short", "")),
        "answers identical to those alone": lambda row: f"{row['identical']} of {row['compared']}",
        "largest gap of the others (nats)": lambda row: _gap(row, LARGEST),
        "smallest gap of answers to other prompts (nats)": lambda row: _gap(row, WRONG.format("prompts")),
        "smallest gap of answers of other adapters (nats)": lambda row: _gap(row, WRONG.format("adapters")),
        "seconds": lambda row: f"{row['seconds']:.0f}",
        "seconds to the end of an answer, p50 / p99": lambda row: _quantiles(row["latency_s"]),
        "seconds to the first token, p50 / p99": lambda row: _quantiles(row["first_token_s"]),
        "memory at the end (GB)": lambda row: f"{row['memory_bytes']['last'] / 1e9:.2f}",
        "its growth from the start (MB)": lambda row: f"{_growth(row['memory_bytes']) / 1e6:.0f}",
        "its growth in the last two fifths (kB for each request)": (
            lambda row: f"{row['memory_slope_of_the_last_two_fifths'] / 1e3:.1f}"
        ),
    }
    lines = [[title, *(figure(row) for row in rows)] for title, figure in figures.items()]
    header = ["", *(MODELS.get(row["model"], row["model"]) for row in rows)]
    return markdown_table(header, [line for line in lines if any(line[1:])])


def _kinds(counts: dict[str, int]) -> str:
    """Return the numbers of requests of each kind."""
    return ", ".join(str(counts[kind]) for kind in ("whole", "stream", "cancel", "malformed"))


def _gap(row: dict[str, Any], key: str) -> str:
    """Return a gap in nats, or nothing if no answer has one."""
    none = row.get(key) is None or (key == LARGEST and not row["rescored"])
    return "" if none else f"{row[key]:.3f}"


def _growth(memory: dict[str, float]) -> float:
    """Return the bytes by which memory has grown."""
    return memory["last"] - memory["first"]


def _quantiles(found: dict[str, float]) -> str:
    """Return median and 99th percentile."""
    return f"{found['p50']:.2f} / {found['p99']:.1f}"


def kills_table(name: str) -> str:
    """One line per kind of conversion: how often it was killed, and how its conversions ended."""
    result = read_result(name)
    outcomes = list(dict.fromkeys(row["what"] for row in result["rows"]))
    counts: Counter[tuple[str, str]] = Counter()
    kills: dict[str, int] = {}
    for row in result["rows"]:
        counts[row["kind"], row["what"]] += row["times"]
        kills[row["kind"]] = row["kills"]
    lines = [
        [kind, str(kills[kind]), *(str(counts[kind, outcome]) for outcome in outcomes)] for kind in kills
    ]
    if len(lines) > 1:
        sums = [str(sum(counts[kind, outcome] for kind in kills)) for outcome in outcomes]
        lines.append(["together", str(result["kills"]), *sums])
    titles = ["finished with the same bytes" if outcome == SAME else outcome for outcome in outcomes]
    failed = f"Conversions with other bytes or an incomplete output: {len(result['failures'])}."
    return "\n".join([markdown_table(["conversion", "kills", *titles], lines), "", failed])


def kill_states_table(name: str) -> str:
    """One line per state in which conversions were killed."""
    found = read_result(name)["killed_at"]
    order = list(STATES)

    def place(state: str) -> tuple[float, str]:
        return (order.index(state) if state in STATES else order.index("checking") + 0.5, state)

    lines = [[STATES.get(state, state), str(found[state])] for state in sorted(found, key=place)]
    return markdown_table(["state of the conversion", "kills"], lines)


def damage_table(name: str) -> str:
    """One line per outcome of reading damaged files, one column per reader."""
    rows = read_result(name)["rows"]
    readers = list(dict.fromkeys(row["reader"] for row in rows))
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        counts[_outcome(row["outcome"]), row["reader"]] += row["count"]
    found = {outcome for outcome, _ in counts}
    shown = [*list(OUTCOMES.values())[:2]]
    shown += [title for title in OUTCOMES.values() if title in found]
    shown += sorted(found)
    lines = [
        [outcome, *(str(counts[outcome, reader]) for reader in readers), str(_total(counts, outcome))]
        for outcome in dict.fromkeys(shown)
    ]
    return markdown_table(
        ["outcome", *(READERS.get(reader, reader) for reader in readers), "together"], lines
    )


def _total(counts: Counter[tuple[str, str]], outcome: str) -> int:
    """Return the count of an outcome over all readers."""
    return sum(count for (what, _), count in counts.items() if what == outcome)


def _outcome(stored: str) -> str:
    """Return the title of an outcome, with what the hashes of `bwla-inspect` say where they do not show the damage."""
    plain = re.sub(r", hashes \w+$", "", stored)
    kind, separator, detail = plain.partition(", HASHES ARE EQUAL")
    title = OUTCOMES.get(kind) or OUTCOMES.get(kind.partition(":")[0]) or kind
    return f"{title}, hashes equal" if separator and not detail and kind != "same data" else title
