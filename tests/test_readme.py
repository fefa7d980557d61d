"""The documents: code blocks run, or say why not; the messages explained are those of the code; links lead somewhere.

A comment before a block says why it is not run here: `<!-- needs: gpu -->` (or network, docker, time, or names, where
some are to be filled in). Commands that CI runs anyway are listed in `COVERED`.
"""

import ast
import collections
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bwla_kernels.format.schema import parse_config
from markdown_it import MarkdownIt
from markdown_it.token import Token
from paths import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {"gpu", "network", "docker", "time", "names"}
COVERED = {"make setup", "make lint", "make test", "make demo", ".ci/run"}
"""What CI runs anyway: .ci/run itself, and tests/test_demo.py."""

COMMANDS = {
    "make",
    "bwla-convert",
    "bwla-eval",
    "bwla-inspect",
    "vllm",
    "python",
    "pip",
    "docker",
    "sh",
    "curl",
}
"""First words by which an indented block is told from a formula."""

LINKED_IN = ("examples", "benchmarks", "scripts", "kernels", "converter", "bwla_vllm", "docs")


@dataclass(frozen=True)
class Block:
    """A code block: where it stands, its language, its text, and the reason not to run it ("" for none)."""

    file: Path
    line: int
    language: str
    text: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.file.name}:{self.line}"

    @property
    def covered(self) -> bool:
        commands = [shlex.split(line, comments=True) for line in self.text.splitlines()]
        return all(" ".join(words) in COVERED for words in commands if words)


def tokens_of(file: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))


def language_of(token: Token) -> str:
    """`sh`, `python`, `json`; "" for what is there to be looked at."""
    if token.type == "fence":
        return {"bash": "sh", "console": "sh", "text": ""}.get(token.info.strip(), token.info.strip())
    words = token.content.split()
    known = words and (words[0] in COMMANDS or words[0].startswith(".env/bin/"))
    return "sh" if known else ""


def blocks_of(file: Path) -> Iterator[Block]:
    before: Token | None = None
    for token in tokens_of(file):
        if token.type in ("fence", "code_block"):
            mark = re.fullmatch(r"<!-- needs: (\w+) -->\s*", before.content) if before is not None else None
            line = (token.map or [0])[0] + 1
            yield Block(file, line, language_of(token), token.content, mark[1] if mark else "")
        before = token if token.type == "html_block" else None


BLOCKS = [block for file in DOCUMENTS for block in blocks_of(file)]
RUN = [
    block for block in BLOCKS if block.language in ("sh", "python") and not block.reason and not block.covered
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, example_bwla: Path) -> Path:
    """A folder in which the blocks run: parts of the repository, and the converted example as example-bwla."""
    folder = tmp_path_factory.mktemp("documents")
    for name in LINKED_IN:
        (folder / name).symlink_to(ROOT / name)
    (folder / "example-bwla").symlink_to(example_bwla)
    return folder


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.title)
def test_the_block_runs(block: Block, workspace: Path) -> None:
    command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    done = subprocess.run(
        [*command, block.text],
        cwd=workspace,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{block.title}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_blocks_are_run_or_say_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for block in BLOCKS:
        assert not block.reason or block.reason in REASONS, f"{block.title}: unknown reason {block.reason!r}"
        kind = "run here" if block in RUN else f"needs {block.reason}" if block.reason else "run by CI"
        counts[kind if block.language in ("sh", "python") else "shown"] += 1
        assert block.language in ("sh", "python", "json", ""), (
            f"{block.title}: how is {block.language!r} checked?"
        )
    with capsys.disabled():
        print(f"\ncode blocks in {len(DOCUMENTS)} documents: {dict(counts)}")
    assert counts["run here"] >= 3


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=lambda block: block.title)
def test_json_is_json_and_configs_are_valid(block: Block) -> None:
    data = json.loads(block.text)
    if "quant_method" in data:
        parse_config(data)


def links() -> list[tuple[Path, str]]:
    return [
        (file, str(child.attrs["href"]))
        for file in DOCUMENTS
        for token in tokens_of(file)
        for child in token.children or ()
        if child.type == "link_open" and "://" not in str(child.attrs["href"])
    ]


def test_links_lead_to_files() -> None:
    lost = [
        f"{file.name}: {link}"
        for file, link in links()
        if not (file.parent / link.partition("#")[0]).exists()
    ]
    assert not lost


def flatten(node: ast.AST) -> str | None:
    """A string as a message shows it, with "..." for what is filled in."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sd]", "...", node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(flatten(part) or "..." for part in node.values)
    return None


@pytest.fixture(scope="module")
def messages() -> str:
    """Every string in the three packages."""
    found = []
    for package in ("kernels", "converter", "bwla_vllm"):
        for file in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            constants = {
                target.id: node.value
                for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
                    node.value = constants.get(node.value.id, node.value)
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.FormattedValue) else p for p in node.values]
                    found.append("".join(flatten(part) or "..." for part in parts))
                elif (text := flatten(node)) is not None:
                    found.append(text)
    return "\n".join(found)


def explained() -> list[str]:
    """Messages of our own that docs/troubleshooting.md explains."""
    tokens = tokens_of(ROOT / "docs" / "troubleshooting.md")
    found = []
    for index, token in enumerate(tokens[:-4]):
        if token.type == "heading_open" and token.tag == "h3":
            content, after = tokens[index + 1].content, tokens[index + 4].content
            if content.startswith("`") and content.endswith("`") and not after.startswith("From vLLM"):
                found.append(content.strip("`"))
    return found


@pytest.mark.parametrize("message", explained())
def test_the_explained_message_exists(message: str, messages: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert re.search(pattern, messages), message


def test_the_tables_are_those_of_the_code_and_the_results() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run scripts/readme_tables.py"
