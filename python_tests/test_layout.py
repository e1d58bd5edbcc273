"""The rooms of the package: imports run one way."""

from __future__ import annotations

import ast
from pathlib import Path

import lserve_ext

PACKAGE = Path(lserve_ext.__file__).parent


def modules() -> dict[str, Path]:
    """Dotted names within the package; the package itself is the empty name."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, anywhere in it: functions and TYPE_CHECKING count."""
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("lserve_ext")):
            parts = package.split(".") if package else []
            base = parts[: len(parts) - node.level + 1] if node.level else []
            base += (node.module or "").split(".")[0 if node.level else 1 :] if node.module else []
            for alias in node.names:
                longer = ".".join([*base, alias.name])
                found.add(longer if longer in known else ".".join(base))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("lserve_ext").lstrip(".") for a in node.names if "lserve_ext" in a.name}
    return {x for x in found if x in known and x != name} - ({""} if name else set())


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import nothing left are taken away again and again."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_imports_have_no_circles() -> None:
    known = modules()
    assert {"ops", "cache", "hf.cache", "eval.tasks"} <= known.keys()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert graph["cache"] >= {"ops", "config"} and graph["hf.cache"] >= {"hf.layers", "cache"}
    assert circles(graph) == []


def foreign(path: Path) -> set[str]:
    """Packages that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


def test_only_the_plugin_imports_vllm() -> None:
    importing = {name for name, path in modules().items() if "vllm" in foreign(path)}
    assert importing and all(name.startswith("vllm.") for name in importing)
    assert not importing & {"vllm.settings", "vllm.pages"}  # what is read and checked without it


def test_a_circle_is_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
