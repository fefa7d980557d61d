"""Check that a tag, the changelog and the built files agree; the release workflow runs this before it publishes.

    python scripts/check_release.py v0.2.0 --notes notes.md
    python scripts/check_release.py v0.2.0 --dist dist

The version comes from the tag (setuptools-scm), but only if the build finds the tag and a clean tree: otherwise the
files are called, for example, 0.2.1.dev3+g1a2b3c4. Standard library only.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = re.compile(r"v(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)")
"""Tags in the normalized form of the version, which is also the one in the names of files."""


class ReleaseError(Exception):
    """The release must not be published; the message says what does not fit and what to do."""


def version_of(tag: str) -> str:
    """Return the version that `tag` stands for.

    Raises:
        ReleaseError: the tag does not name a version.
    """
    found = TAG.fullmatch(tag)
    if found is None:
        raise ReleaseError(
            f"expected a tag such as v0.2.0 or v0.2.0rc1, found {tag!r}: delete it and tag again"
        )
    return found[1]


def notes_of(version: str, changelog: str) -> str:
    """Return the changelog's section `## VERSION - DATE`, without its heading.

    Raises:
        ReleaseError: there is no such section, or it is empty.
    """
    sections = re.split(r"^## (.+)$", changelog, flags=re.M)
    for heading, text in zip(sections[1::2], sections[2::2], strict=True):
        if re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", heading.strip()):
            if not text.strip():
                raise ReleaseError(f"CHANGELOG.md: the section of {version} is empty: say what changed")
            return text.strip() + "\n"
    raise ReleaseError(
        f"CHANGELOG.md: expected a heading `## {version} - YYYY-MM-DD`, found {', '.join(sections[1::2])}: "
        "rename the section Unreleased, commit, and move the tag"
    )


def check_files(version: str, dist: Path) -> None:
    """Check that `dist` holds one source distribution and wheels for manylinux of this version, and nothing else.

    Raises:
        ReleaseError: something is missing, or there is another file.
    """
    names = sorted(path.name for path in dist.iterdir())
    sdist = f"bwla-{version}.tar.gz"
    wheel = re.compile(rf"bwla-{re.escape(version)}-py3-none-manylinux\w+(\.manylinux\w+)*\.whl")
    wheels = [name for name in names if wheel.fullmatch(name)]
    if sdist not in names or not wheels or len(names) != 1 + len(wheels):
        raise ReleaseError(
            f"{dist}: expected {sdist} and wheels bwla-{version}-py3-none-manylinux*.whl, "
            f"found {', '.join(names) or 'nothing'}: build from the tagged commit without changed files"
        )


def main() -> int:
    """Run the command line; return 1 if the release must not be published."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tag", help="the tag, such as v0.2.0")
    parser.add_argument("--dist", type=Path, help="folder with the built files, to check them too")
    parser.add_argument("--notes", type=Path, help="file to which the section of the changelog is written")
    arguments = parser.parse_args()
    try:
        version = version_of(arguments.tag)
        notes = notes_of(version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
        if arguments.dist:
            check_files(version, arguments.dist)
    except ReleaseError as error:
        print(f"check_release: {error}", file=sys.stderr)
        return 1
    if arguments.notes:
        arguments.notes.write_text(notes, encoding="utf-8")
    print(f"{arguments.tag}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
