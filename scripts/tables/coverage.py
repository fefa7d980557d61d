"""The table of architectures that the coverage run tries."""

from typing import Any

from scripts.tables.results import markdown_table, read_result

RECIPES = ("paper", "fast")
FORMS = (*RECIPES, "defaults")
GROUPS = {
    "dense": "Dense",
    "experts": "Mixtures of experts",
    "hybrid": "Hybrids",
    "multimodal": "Multimodal, text side",
    "embedding": "Embeddings",
}
MOSTLY = 0.9
"""A smaller share of the decoder's weights than this, if it is quantized, is noted."""


def coverage_table(name: str) -> str:
    """One line per architecture, grouped by kind, and below the table the sentences that its notes refer to."""
    rows = read_result(name)["rows"]
    reasons: dict[str, int] = {}
    lines = []
    for group, title in GROUPS.items():
        members = [row for row in rows if row["group"] == group]
        if members:
            lines.append([f"**{title}**", *[""] * 7])
        lines += [_line(row, reasons) for row in members]
    header = ["architecture", "models", *(f"`{recipe}`" for recipe in RECIPES)]
    table = markdown_table([*header, "served", "same tokens", "largest difference", "note"], lines)
    notes = [f"{number}. {_plain(reason)}" for reason, number in reasons.items()]
    return "\n".join([_counts(rows), "", table, *(["", *notes] if notes else [])])


def head_text(name: str) -> str:
    """One sentence: how many architectures were tried with a head in binary planes, and what became of them."""
    rows = read_result(name)["rows"]
    served = [row for row in rows if row["fast"]["served"]]
    same = sum(row["fast"]["same_tokens"] for row in served)
    refused = [row for row in rows if not row["fast"]["converted"]]
    others = [row for row in rows if row["fast"]["converted"] and not row["fast"]["served"]]
    unknown = sum(not row["original"].get("served") for row in others)
    parts = [
        f"Of {len(rows)} architectures that were tried, {len(served)} are served, {same} of them with the tokens of "
        "their dequantized weights.",
        f"`bwla-convert` refuses it for {len(refused)}.",
        *([f"Of {unknown}, vLLM does not serve the original here either."] if unknown else []),
        *([f"Not served, though the original is: {len(others) - unknown}."] if len(others) > unknown else []),
    ]
    return " ".join(parts)


def _line(row: dict[str, Any], reasons: dict[str, int]) -> list[str]:
    """Return the cells of a row; a reason that is new is added to `reasons` with its number."""
    forms = [row[recipe] for recipe in RECIPES]
    converted = [_yes(form["converted"]) for form in forms]
    served = _yes(is_served(row)) if any(form["converted"] for form in forms) else ""
    compared = [form for form in forms if form.get("largest_difference") is not None]
    tokens = [form["same_tokens"] for form in compared if form.get("same_tokens") is not None]
    difference = f"{max(form['largest_difference'] for form in compared):.1e}" if compared else ""
    notes = []
    if not row["original"].get("served"):
        notes.append("vLLM does not serve the original here")
    shares = [form["share"] for form in forms if "share" in form]
    if shares and min(shares) < MOSTLY:
        notes.append(f"{min(shares):.0%} of the weights")
    if row["dtype"] != "float32":
        notes.append(row["dtype"] + _rounding(forms))
    if reason := next((form["error"] for form in (*forms, row["defaults"]) if "error" in form), None):
        notes.append(f"note {reasons.setdefault(reason, len(reasons) + 1)}")
    cells = [f"`{row['architecture']}`", row["models"], *converted, served]
    return [*cells, _yes(all(tokens)) if tokens else "", difference, ", ".join(notes)]


def _rounding(forms: list[dict[str, Any]]) -> str:
    """Return how far one-bit and dequantized weights are from transformers in float32, of forms that were compared."""
    found = [form["from_float32"] for form in forms if "from_float32" in form]
    if not found:
        return ""
    quantized, dequantized = (max(form[key] for form in found) for key in ("quantized", "dequantized"))
    return f" (from float32: {quantized:.1e}, dequantized {dequantized:.1e})"


def is_served(row: dict[str, Any]) -> bool:
    """Return whether vLLM serves every form of a row's model that was converted."""
    return all(row[form]["served"] for form in FORMS)


def _counts(rows: list[dict[str, Any]]) -> str:
    """Return a sentence with what most readers look for: how many there are of what."""
    converted = [row for row in rows if all(row[form]["converted"] for form in FORMS)]
    served = [row for row in converted if is_served(row)]
    compared = [row[recipe] for row in rows for recipe in RECIPES if "same_tokens" in row[recipe]]
    same = sum(form["same_tokens"] for form in compared)
    others = [row for row in converted if not is_served(row)]
    originals = sum(bool(row["original"].get("served")) for row in others)
    why = (
        f"vLLM serves the originals of {originals or 'none'} of the other {len(others)} here; "
        if others
        else ""
    )
    return (
        f"Of {len(rows)} architectures, {len(converted)} are converted with both recipes and {len(served)} of these "
        f"served; {why}{same} of {len(compared)} comparisons had the same tokens."
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _plain(sentence: str) -> str:
    """Return a message so that Markdown shows it as it is."""
    return "`" + sentence.replace("`", "'") + "`"
