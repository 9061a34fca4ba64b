"""The trust boundary as imports: who may know whom, and what nobody may use. Reads source, imports nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# Neither side may reach the other, and what both share reaches neither.
FORBIDDEN = {
    "tsqp.enclave": ("tsqp.worker",),
    "tsqp.decoder": ("tsqp.worker", "tsqp.cli", "tsqp.serve"),
    "tsqp.worker": ("tsqp.enclave", "tsqp.decoder", "tsqp.bench", "tsqp.cli", "tsqp.prefill"),
    "tsqp.wire": ("tsqp.enclave", "tsqp.worker"),
    "tsqp.transport": ("tsqp.enclave", "tsqp.worker"),
    "tsqp.model": ("tsqp.enclave", "tsqp.worker"),
    "tsqp.arith": ("tsqp.enclave", "tsqp.worker", "tsqp.wire", "tsqp.transport", "tsqp.model"),
}
# Only a demonstration keeps and shows what a worker is sent: none of these may reach what does. ``tsqp.cli`` itself
# lists all commands, and so imports the demonstration's.
# Ray runs what others send it, with pickle: it stays with the pools, and no enclave knows of those.
WITHOUT_POOLS = (
    "tsqp.enclave",
    "tsqp.engine",
    "tsqp.serve",
    "tsqp.worker",
    "tsqp.wire",
    "tsqp.transport",
    "tsqp.cli.serve",
    "tsqp.cli.prefill",
    "tsqp.cli.generate",
    "tsqp.prefill",
    "tsqp.levels",
)
WITH_RAY = ("tsqp.cluster.controller", "tsqp.cluster.link", "tsqp.cluster.on_ray")
SERVING = ("tsqp.worker", "tsqp.cli.serve", "tsqp.cli.worker", "tsqp.serve.app", "tsqp.engine")
SHOWING = ("tsqp.serve.observer", "tsqp.serve.demo_worker", "tsqp.serve.demo", "tsqp.serve.view")
# They run or build objects from data.
UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
UNSAFE_CALLS = ("torch.load", "eval", "exec", "__import__", "importlib.import_module")


def read_sources() -> dict[str, str]:
    sources = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        # A package's own relative imports start from itself, a module's from its package.
        sources[f"{name}.__init__" if parts[-1] == "__init__" else name] = path.read_text(encoding="utf-8")
    return sources


SOURCES = read_sources()


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported_names(module: str, source: str) -> Iterator[str]:
    """Yield every dotted name that a module imports, at any depth, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def run_on_import(module: str, source: str) -> str:
    """Leave out of the package's own ``__init__`` what it loads when it is asked for by name, and no import runs."""
    if module != "tsqp.__init__":
        return source
    body = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return ast.unparse(ast.Module(body=list(body), type_ignores=[]))


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Map each module to the modules that importing it runs; packages are named ``package.__init__``."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imported_names(module, run_on_import(module, source)):
            parts = name.split(".")
            prefixes = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
            graph[module] |= {known for prefix in prefixes for known in (prefix, f"{prefix}.__init__")} & set(sources)
    return graph


def paths_from(graph: Mapping[str, set[str]], start: str) -> dict[str, list[str]]:
    """Return a shortest chain of imports from ``start`` to each module it reaches."""
    chains = {start: [start]}
    queue = [start]
    for module in queue:
        for target in sorted(graph[module] - chains.keys()):
            chains[target] = [*chains[module], target]
            queue.append(target)
    return chains


def violations(sources: Mapping[str, str]) -> list[str]:
    graph = import_graph(sources)
    return [
        " -> ".join(chain)
        for package, banned in FORBIDDEN.items()
        for module in graph
        if inside(module, package)
        for target, chain in paths_from(graph, module).items()
        if any(inside(target, other) for other in banned)
    ]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_uses(module: str, source: str) -> list[str]:
    """List imports, calls and statements that nobody may use."""
    names = set(imported_names(module, source))
    found = [name for name in names if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(f"assert in line {node.lineno}")
        elif isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS:
            found.append(f"{dotted(node.func)} in line {node.lineno}")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not is_false(node.value):
            found.append(f"trust_remote_code in line {node.value.lineno}")
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"trust_remote_code in line {node.lineno}")
    return found


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_the_packages_the_rules_name_exist() -> None:
    assert {f"{package}.__init__" for package in FORBIDDEN} <= SOURCES.keys()


def test_the_import_graph_sees_known_imports() -> None:
    graph = import_graph(SOURCES)
    assert "tsqp.enclave.session" in graph["tsqp.enclave.remote_ops"]
    assert "tsqp.wire.codec" in graph["tsqp.worker.dispatch"]
    assert "tsqp.errors" in paths_from(graph, "tsqp.worker.server")


def test_the_sides_of_the_boundary_do_not_import_each_other() -> None:
    assert violations(SOURCES) == []


def test_no_worker_loads_what_the_package_gives_by_name() -> None:
    """``tsqp.attach`` is loaded by ``tsqp`` itself, but only when it is asked for."""
    program = (
        "import sys, tsqp.worker.server, tsqp.worker.startup; "
        "sys.exit(any(name.startswith(('tsqp.enclave', 'tsqp.decoder')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    imported = {"tsqp.__init__": "from tsqp import enclave"}
    assert violations(EMPTY | imported | {"tsqp.worker.a": "import tsqp.errors", "tsqp.errors": ""}), (
        "an import that does run counts"
    )


def ways(sources: Mapping[str, str], package: str, ends: Callable[[str], bool]) -> list[str]:
    """List how a package's modules come to modules that are told apart by ``ends``."""
    graph = import_graph({name: source for name, source in sources.items() if name != "tsqp.cli.__init__"})
    return [
        " -> ".join(chain)
        for module in graph
        if inside(module, package)
        for target, chain in paths_from(graph, module).items()
        if ends(target)
    ]


def with_pools(sources: Mapping[str, str], package: str) -> list[str]:
    """List how a package's modules come to pools, or to Ray itself."""
    return ways(sources, package, lambda name: inside(name, "tsqp.cluster") or uses_ray(name, sources[name]))


def uses_ray(module: str, source: str) -> bool:
    return any(inside(name, "ray") for name in imported_names(module, source))


@pytest.mark.parametrize("package", WITHOUT_POOLS)
def test_no_enclave_knows_of_pools_and_ray(package: str) -> None:
    assert any(inside(module, package) for module in SOURCES)
    assert with_pools(SOURCES, package) == []


def test_ray_is_imported_by_few() -> None:
    assert tuple(module for module, source in SOURCES.items() if uses_ray(module, source)) == WITH_RAY


def test_pools_that_are_imported_are_found() -> None:
    """The control."""
    assert with_pools(SOURCES, "tsqp.cli.cluster")
    assert with_pools({"tsqp.engine.a": "import tsqp.b", "tsqp.b": "def f():\n    import ray"}, "tsqp.engine")


def shows(sources: Mapping[str, str], package: str) -> list[str]:
    """List how a package's modules come to what shows a worker's view."""
    return ways(sources, package, SHOWING.__contains__)


@pytest.mark.parametrize("package", SERVING)
def test_who_serves_cannot_show_what_a_worker_sees(package: str) -> None:
    assert any(inside(module, package) for module in SOURCES)
    assert shows(SOURCES, package) == []


def test_the_demonstration_can() -> None:
    """The control."""
    assert set(SHOWING) <= SOURCES.keys()
    assert shows(SOURCES, "tsqp.cli.demo")


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_unsafe_is_used(module: str) -> None:
    assert unsafe_uses(module, SOURCES[module]) == []


EMPTY = {f"{package}.__init__": "" for package in ("tsqp", *FORBIDDEN)}


@pytest.mark.parametrize(
    "sources",
    [
        {"tsqp.enclave.a": "import tsqp.worker.b", "tsqp.worker.b": ""},
        {"tsqp.enclave.a": "from tsqp.worker import b", "tsqp.worker.b": ""},
        {"tsqp.enclave.a": "from tsqp import worker"},
        {"tsqp.enclave.a": "from ..worker import b", "tsqp.worker.b": ""},
        {"tsqp.enclave.__init__": "from ..worker import b", "tsqp.worker.b": ""},
        {"tsqp.enclave.a": "def f():\n    from tsqp.worker.b import c", "tsqp.worker.b": ""},
        {"tsqp.worker.a": "import tsqp.shared", "tsqp.shared": "from tsqp.enclave import b", "tsqp.enclave.b": ""},
        {"tsqp.wire.a": "if True:\n    import tsqp.enclave"},
        {"tsqp.worker.a": "import tsqp.prefill", "tsqp.prefill": ""},
        {"tsqp.model.a": "import tsqp.other.deep", "tsqp.other.__init__": "import tsqp.worker", "tsqp.other.deep": ""},
    ],
)
def test_the_check_finds_each_kind_of_violation(sources: dict[str, str]) -> None:
    assert violations(EMPTY | sources)


def test_the_check_accepts_what_is_allowed() -> None:
    sources = {
        "tsqp.bench.a": "import tsqp.enclave, tsqp.worker",
        "tsqp.enclave.a": "from tsqp.wire import b\nfrom . import c",
        "tsqp.enclave.c": "",
        "tsqp.wire.b": "",
        "tsqp.workers": "",
        "tsqp.model.a": "import tsqp.workers",
    }
    assert violations(EMPTY | sources) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import pickle as p",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "f(**{'trust_remote_code': True})",
        "assert True",
        "eval('1')",
        "import importlib\nimportlib.import_module('pickle')",
    ],
)
def test_the_check_finds_each_unsafe_use(source: str) -> None:
    assert unsafe_uses("tsqp.x", source)
