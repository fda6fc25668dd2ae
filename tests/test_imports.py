"""No module imports itself by way of others; imports inside functions count."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"fastgrpo": ROOT / "fastgrpo", "fastgrpo.kernels": ROOT / "kernels", "bench": ROOT / "bench"}


def find_modules(folders):
    """{name: file} of every module; a package is named as its folder."""
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for package, folder in folders.items()
        for path in folder.rglob("*.py")
    }


def find_imports(name, modules):
    """The modules that one imports, wherever in it. ``from a import b`` is of the module a.b where there is one."""
    found = set()
    for node in ast.walk(ast.parse(modules[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = absolute(name, modules[name], node)
            found |= {inner if (inner := f"{home}.{a.name}") in modules else home for a in node.names}
    return found & modules.keys()


def absolute(name, path, node):
    """The full name of what ``from ... import`` imports from."""
    if not node.level:
        return node.module
    parts = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    return ".".join(parts[: len(parts) - node.level + 1] + [node.module] * (node.module is not None))


def find_cycle(graph):
    """[a, b, ..., a], or None. graph: {name: names}."""
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        cycles = (visit(other, [*path, name]) for other in sorted(graph[name]))
        cycle = next((c for c in cycles if c), None)
        done.add(name)
        return cycle

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), None)


def graph_of(folders, left_out=()):
    modules = find_modules(folders)
    names = [name for name in modules if not any(f"{name}.".startswith(f"{known}.") for known in left_out)]
    return {name: find_imports(name, modules) & set(names) for name in names}


def test_no_import_cycle():
    graph = graph_of(FOLDERS)
    assert len(graph) > 50
    assert graph["fastgrpo"] >= {"fastgrpo.loss", "fastgrpo.reference"}
    assert "fastgrpo.kernels.tiles" in graph["fastgrpo.kernels.forward"]
    assert find_cycle(graph) is None


@pytest.mark.parametrize("line", ["import p.b", "from p import b", "from .b import x", "from . import b"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_cycle_is_found(tmp_path, line, inside):
    files = {"__init__": "", "a": "def f():\n    " * inside + line, "b": "from p.c import x", "c": "import torch, p.a"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert find_cycle(graph_of({"p": tmp_path})) == ["p.a", "p.b", "p.c", "p.a"]
    assert find_cycle(graph_of({"p": tmp_path}, ["p.b"])) is None


@pytest.mark.quick
def test_what_is_optional_is_imported_on_use():
    """``import fastgrpo`` is enough for README's one changed line."""
    import fastgrpo

    assert callable(fastgrpo.integrations.liger.apply)
    for module in (fastgrpo, fastgrpo.integrations):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing


def test_a_preset_is_looked_up_before_the_packages_are_imported():
    """They take seconds, after which a misspelt name would be refused."""
    code = """import sys; from fastgrpo.trainer import cli
try: cli.main(["train", "contdown"])
finally: assert "transformers" not in sys.modules and "accelerate" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("did you mean countdown?")
