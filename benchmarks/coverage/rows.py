"""Rows of the result: what the steps of a case show about its architecture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.coverage.case import Case
from benchmarks.coverage.cases import CASES
from benchmarks.coverage.steps import DEFAULTS, ORIGINAL, Answer

Row = dict[str, Any]


def make_row(case: Case, recipes: Sequence[str], answers: Mapping[str, Answer], folder: Path) -> Row:
    """Return the row of a case.

    Args:
        case: the case.
        recipes: the recipes that were tried.
        answers: what each step gave, by its name.
        folder: the case's folder, which error messages are freed from.
    """
    row: Row = {
        "case": case.name,
        "group": case.group,
        "models": case.models,
        "architecture": case.architecture,
        "blocks": case.blocks,
        "dtype": case.dtype,
    }
    weights = answers[f"build {ORIGINAL}"].get("weights")
    row[ORIGINAL] = _outcome(answers, ("build", "serve"), ORIGINAL, folder)
    for form in (*recipes, DEFAULTS):
        row[form] = _outcome(answers, ("convert", "serve"), form, folder)
        converted = answers[f"convert {form}"]
        if "linears" in converted:
            row[form] |= {key: converted[key] for key in ("linears", "bits_per_weight")}
            row[form]["share"] = round(converted["quantized_weights"] / weights, 3)
    for recipe in recipes:
        reference, found = (answers[f"serve {form}"] for form in (f"{recipe}-dequantized", recipe))
        row[recipe] |= compare(reference, found)
        scores = answers.get(f"score {recipe}", {}).get("logprobs")
        if scores is not None and "logprobs" in reference and "logprobs" in found:
            row[recipe]["from_float32"] = {
                "quantized": largest_difference(scores, found["logprobs"]),
                "dequantized": largest_difference(scores, reference["logprobs"]),
            }
        error = answers[f"dequantize {recipe}"].get("error") or reference.get("error")
        if error is not None:
            row[recipe]["reference_error"] = _without(folder, error)
    row["seconds"] = round(sum(answer.get("seconds", 0.0) for answer in answers.values()), 1)
    return row


def _outcome(answers: Mapping[str, Answer], actions: Sequence[str], form: str, folder: Path) -> Row:
    """Return whether each action on a form succeeded, and the error of the first that did not."""
    words = {"build": "built", "convert": "converted", "serve": "served"}
    outcome: Row = {}
    for action in actions:
        answer = answers[f"{action} {form}"]
        outcome[words[action]] = "error" not in answer and "skipped" not in answer
        if "error" in answer:
            outcome["error"] = _without(folder, answer["error"])
    return outcome


def _without(folder: Path, message: str) -> str:
    return message.replace(f"{folder}/", "")


def compare(reference: Answer, found: Answer) -> Row:
    """Return whether two answers have the same tokens, and the largest difference of their log probabilities.

    Log probabilities are compared up to the first token that differs, since what follows answers another text. Of two
    embeddings, the largest difference of the normalized vectors is returned. Without two answers, nothing is.
    """
    if "embedding" in reference and "embedding" in found:
        return {"largest_difference": _embedding_difference(reference["embedding"], found["embedding"])}
    if "tokens" not in reference or "tokens" not in found:
        return {}
    tokens, others = reference["tokens"], found["tokens"]
    same = next((i for i, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1]), None)
    scored = len(reference["logprobs"]) - (0 if same is None else len(tokens) - same - 1)
    difference = largest_difference(reference["logprobs"][:scored], found["logprobs"][:scored])
    return {"same_tokens": same is None, "largest_difference": difference}


def largest_difference(
    tables: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]
) -> float | None:
    """Return the largest difference of the log probabilities that both have, over the positions that both have.

    Returns None if one is not finite.
    """
    differences = [
        abs(table[token] - other[token])
        for table, other in zip(tables, others, strict=False)
        for token in table.keys() & other.keys()
    ]
    return max(differences) if all(map(math.isfinite, differences)) else None


def _embedding_difference(reference: Sequence[float], found: Sequence[float]) -> float:
    lengths = [math.sqrt(sum(value * value for value in vector)) for vector in (reference, found)]
    return max(abs(a / lengths[0] - b / lengths[1]) for a, b in zip(reference, found, strict=True))


def merge(rows: Sequence[Row], row: Row) -> list[Row]:
    """Return the rows with one more, which replaces the one of the same case, in the order of `CASES`."""
    merged = {old["case"]: old for old in rows} | {row["case"]: row}
    return [merged[name] for name in CASES if name in merged]


def summary_of(row: Row, recipes: Sequence[str]) -> str:
    """Return a line about a row, for the terminal."""
    parts = [
        f"{row['case']}: vLLM {'serves' if row[ORIGINAL].get('served') else 'does not serve'} the original"
    ]
    for form in (*recipes, DEFAULTS):
        part = row[form]
        state = "served" if part["served"] else "converted" if part["converted"] else "refused"
        if part.get("largest_difference") is not None:
            tokens = {True: "same tokens, ", False: "other tokens, ", None: ""}[part.get("same_tokens")]
            state += f" ({tokens}{part['largest_difference']:.1e})"
        parts.append(f"{form} {state}")
    error = next((row[form]["error"] for form in recipes if "error" in row[form]), None)
    return ", ".join(parts) + f"; {row['seconds']:.0f} s" + (f"\n    {error}" if error else "")
