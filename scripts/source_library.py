"""Read the names, classes, members and signatures of a Python package from its sources with `ast`.

Nothing is imported, so the package's dependencies need not be installed.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from scripts.wheel_sources import Read

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """The statement that defines a name, and its module."""

    module: str
    node: Definition


def walk_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, including those inside if, try and with."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from walk_statements(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from walk_statements(handler.body)


def names_of(statement: ast.stmt) -> list[str]:
    """Return the names that a statement binds."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [
            node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)
        ]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


class Library:
    """The sources of a package.

    Args:
        read: returns a file's text for its path, such as "vllm/config/__init__.py".
    """

    def __init__(self, read: Read) -> None:
        self.read = read
        self.module = functools.cache(self._module)

    def _module(self, name: str) -> tuple[ast.Module, str] | None:
        stem = name.replace(".", "/")
        for path, package in ((f"{stem}.py", name.rpartition(".")[0]), (f"{stem}/__init__.py", name)):
            text = self.read(path)
            if text is not None:
                return ast.parse(text), package
        return None

    def find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """Return the statement that defines `name` of `module`, following re-exports; None if there is none."""
        parsed = self.module(module)
        if parsed is None or (module, name) in seen:
            return None
        tree, package = parsed
        seen |= {(module, name)}
        for statement in walk_statements(tree.body):
            if name in names_of(statement):
                return Found(module, statement)  # type: ignore[arg-type]
            if not isinstance(statement, ast.ImportFrom):
                continue
            parts = package.split(".")[: len(package.split(".")) - max(statement.level - 1, 0)]
            source = ".".join(
                [*parts, statement.module or ""] if statement.level else [statement.module or ""]
            )
            for alias in statement.names:
                if name == (alias.asname or alias.name) or alias.name == "*":
                    original = name if alias.name == "*" else alias.name
                    found = self.find(source.rstrip("."), original, seen)
                    if found:
                        return found
        return None

    def lineage(self, found: Found) -> list[Found]:
        """Return a class and its base classes in this package, left to right, depth first."""
        if not isinstance(found.node, ast.ClassDef):
            return []
        line = [found]
        for base in found.node.bases:
            if isinstance(base, ast.Name) and (parent := self.find(found.module, base.id)):
                line += self.lineage(parent)
        return line

    def method(self, found: Found, name: str) -> Function | None:
        """Return a class's method `name`, its own or inherited."""
        for owner in self.lineage(found):
            assert isinstance(owner.node, ast.ClassDef)
            for statement in walk_statements(owner.node.body):
                if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and statement.name == name:
                    return statement
        return None

    def members(self, found: Found) -> set[str]:
        """Return the attributes of a class: methods, class attributes, and what its methods assign to self."""
        names: set[str] = set()
        for owner in self.lineage(found):
            assert isinstance(owner.node, ast.ClassDef)
            for statement in walk_statements(owner.node.body):
                names.update(names_of(statement))
            names.update(
                node.attr
                for node in ast.walk(owner.node)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            )
        return names

    def abstract(self, found: Found) -> set[str]:
        """Return the names of methods that a subclass must define."""
        names: set[str] = set()
        done: set[str] = set()
        for owner in self.lineage(found):
            assert isinstance(owner.node, ast.ClassDef)
            for statement in owner.node.body:
                if isinstance(statement, ast.FunctionDef) and statement.name not in done:
                    done.add(statement.name)
                    if any("abstractmethod" in ast.unparse(mark) for mark in statement.decorator_list):
                        names.add(statement.name)
        return names


def parameters(function: Function) -> list[str]:
    """Return the names of the positional parameters, without self and cls."""
    every = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return every[1:] if every[:1] in (["self"], ["cls"]) else every


def call_problem(function: Function, positional: int, keywords: set[str]) -> str | None:
    """Explain why a call with `positional` positional arguments and these keywords fails; return None if it works."""
    arguments, known = function.args, parameters(function)
    if positional > len(known) and arguments.vararg is None:
        return f"takes {len(known)} positional arguments, found {positional}"
    names = {*known, *(argument.arg for argument in arguments.kwonlyargs)}
    unknown = keywords - names
    if unknown and arguments.kwarg is None:
        return f"takes no argument {', '.join(sorted(unknown))}"
    optional = len(arguments.defaults)
    required = {*known[positional : len(known) - optional]}
    required |= {
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    }
    missing = required - keywords
    return f"also needs {', '.join(sorted(missing))}" if missing else None


def override_problem(base: Function, ours: Function) -> str | None:
    """Explain which arguments callers of `base` may pass that `ours` does not take, or the reverse; None if none.

    Arguments that the base takes by `**kwargs` are not known.
    """
    theirs, mine = base.args, ours.args
    open_list, open_names = mine.vararg is not None, mine.kwarg is not None
    names = {*parameters(ours), *(argument.arg for argument in mine.kwonlyargs)}
    passed = [*parameters(base), *(argument.arg for argument in theirs.kwonlyargs)]
    missing = [name for name in passed if name not in names and not (open_list or open_names)]
    if missing:
        return f"callers may pass {', '.join(missing)}, which ours does not take"
    required = parameters(ours)[: len(parameters(ours)) - len(mine.defaults)]
    extra = [name for name in required if name not in passed]
    if extra and theirs.vararg is None and theirs.kwarg is None:
        return f"ours needs {', '.join(extra)}, which callers do not pass"
    return None
