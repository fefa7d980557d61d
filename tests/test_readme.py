"""The documents: code blocks run or say why not, commands and options exist, links and explained messages are right.

A comment before a block says why it is not run here: `<!-- needs: gpu -->` (or network, docker, time, or names, where
some are to be filled in). Commands that CI runs anyway are listed in `COVERED`.
"""

import ast
import collections
import itertools
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

README, PAGES = ROOT / "README.md", sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [
    *(
        README,
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "CODE_OF_CONDUCT.md",
    ),
    *(ROOT / "examples" / "README.md", ROOT / "scripts" / "vllm_cpu_shim" / "README.md"),
    *PAGES,
]
LONGEST_README = 160
REASONS = {"gpu", "network", "docker", "time", "names"}
COVERED = {"make setup", "make lint", "make docs", "make test", "make demo", ".ci/run"}
"""What CI runs anyway: .ci/run itself, and tests/test_demo.py."""

LANGUAGES = {"sh", "python", "json", "text"}
TOOLS = ("bwla-convert", "bwla-eval", "bwla-inspect")
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
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell block, split into words, without the environment variables before them."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            for separator, words in itertools.groupby(lexer, key=lambda word: word.strip("&|;") == ""):
                command = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))
                if command and not separator:
                    found.append(command)
        return found

    @property
    def covered(self) -> bool:
        return self.language == "sh" and all(" ".join(words) in COVERED for words in self.commands)


def tokens_of(file: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))


def blocks_of(file: Path) -> Iterator[Block]:
    before: Token | None = None
    for token in tokens_of(file):
        if token.type in ("fence", "code_block"):
            mark = re.fullmatch(r"<!-- needs: (\w+) -->\s*", before.content) if before is not None else None
            line = (token.map or [0])[0] + 1
            yield Block(file, line, token.info.strip(), token.content, mark[1] if mark else "")
        before = token if token.type == "html_block" else None


BLOCKS = [block for file in DOCUMENTS for block in blocks_of(file)]
RUN = [
    block for block in BLOCKS if block.language in ("sh", "python") and not block.reason and not block.covered
]
COMMANDS = [(block, words) for block in BLOCKS if block.language == "sh" for words in block.commands]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, example_bwla: Path) -> Path:
    """A folder in which the blocks run: parts of the repository, and the converted example as example-bwla."""
    folder = tmp_path_factory.mktemp("documents")
    for name in LINKED_IN:
        (folder / name).symlink_to(ROOT / name)
    (folder / "example-bwla").symlink_to(example_bwla)
    return folder


@pytest.mark.slow
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
        assert block.language in LANGUAGES, f"{block.title}: expected a block in one of {LANGUAGES}"
        kind = "run here" if block in RUN else f"needs {block.reason}" if block.reason else "run by CI"
        counts[kind if block.language in ("sh", "python") else "shown"] += 1
    with capsys.disabled():
        print(f"\ncode blocks in {len(DOCUMENTS)} documents: {dict(counts)}")
    assert counts["run here"] >= 10


def script_of(words: list[str]) -> Path | None:
    """The file in this repository that a command runs, if it runs one."""
    if Path(words[0]).name not in ("python", "bash", "sh") or len(words) < 2:
        return None
    if words[1] != "-m":
        path = words[1]
    else:
        packages = {"bwla_kernels": "kernels", "bwla_converter": "converter"}
        first, *rest = words[2].split(".")
        module = "/".join([packages.get(first, first), *rest])
        path = f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py"
    return ROOT / path if "/" in path else None


SCRIPTS = [(block, words, file) for block, words in COMMANDS if (file := script_of(words)) is not None]


def test_scripts_in_commands_exist() -> None:
    assert len(SCRIPTS) >= 20
    assert not [f"{block.title}: {' '.join(words)}" for block, words, file in SCRIPTS if not file.exists()]


def test_options_of_scripts_in_commands_exist() -> None:
    unknown = []
    for block, words, file in SCRIPTS:
        # Options that several benchmarks share are declared in benchmarks/common.
        folders = (file.parent, ROOT / "benchmarks" / "common")
        sources = [path for folder in folders for path in folder.glob("*.[ps][yh]")]
        text = "".join(path.read_text(encoding="utf-8") for path in sources)
        for word in words:
            if word.startswith("--") and not re.search(rf"{word}(?![\w-])", text):
                unknown.append(f"{block.title}: {' '.join(words)}")
    assert not unknown


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Options of each command-line tool, from its --help."""
    shown = {}
    for tool in TOOLS:
        command = [str(Path(sys.executable).with_name(tool)), "--help"]
        wide = {**os.environ, "COLUMNS": "250", "TERMINAL_WIDTH": "250", "NO_COLOR": "1"}
        done = subprocess.run(command, env=wide, capture_output=True, text=True, check=True)
        # An option stands at the beginning of its line, maybe behind a panel's border.
        shown[tool] = set(re.findall(r"^[^\w-]*(--[a-z][a-z-]+)", done.stdout, re.M))
    return shown


def test_options_in_commands_exist(options: dict[str, set[str]]) -> None:
    used = [(block, words[0], word) for block, words in COMMANDS if words[0] in TOOLS for word in words]
    assert [word for _, _, word in used if word.startswith("--")]
    unknown = [
        f"{block.title}: {tool} {word}"
        for block, tool, word in used
        if word.startswith("--") and word not in options[tool]
    ]
    assert not unknown


@pytest.mark.parametrize(
    ("tool", "page"),
    [("bwla-convert", "conversion.md"), ("bwla-inspect", "conversion.md"), ("bwla-eval", "evaluation.md")],
)
def test_the_guide_lists_every_option(tool: str, page: str, options: dict[str, set[str]]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    listed = {
        option
        for line in text.splitlines()
        if line.startswith("| `--")
        for option in re.findall(r"`(--[a-z-]+)`", line.split("|")[1])
    }
    assert options[tool] - listed - {"--help"} == set()
    assert listed - set().union(*options.values()) == set()


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=lambda block: block.title)
def test_json_is_json_and_configs_are_valid(block: Block) -> None:
    data = json.loads(block.text)
    if "quant_method" in data:
        parse_config(data)


def links() -> list[tuple[Path, str]]:
    return [
        (file, target)
        for file in DOCUMENTS
        for token in tokens_of(file)
        for child in token.children or ()
        if child.type in ("link_open", "image")
        and "://" not in (target := str(child.attrs.get("href") or child.attrs["src"]))
    ]


def anchors(file: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub and mkdocs make them."""
    tokens = tokens_of(file)
    titles = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_links_lead_to_files_and_headings() -> None:
    found = links()
    assert len(found) >= 50
    for file, link in found:
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{file.relative_to(ROOT)}: {link}"
        assert not anchor or anchor in anchors(target), f"{file.relative_to(ROOT)}: {link}"


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
    command = [sys.executable, "-m", "scripts.docs_tables", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0, "run python -m scripts.docs_tables"
