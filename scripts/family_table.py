"""Write the table of supported model families into README.md, from the converter's registry.

python scripts/family_table.py            # write it
python scripts/family_table.py --check    # fail where README differs
"""

import sys
from pathlib import Path

from bwla_converter.families import family_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- families: scripts/family_table.py -->\n", "\n<!-- end of families -->"


def with_table(text: str) -> str:
    """README's text with the table between its two marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + family_table() + END + after


def main() -> int:
    """Command line; with --check, 1 where README is not up to date."""
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
