"""Arrows go one way, and `import jaxalign` stays quick."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jaxalign

PACKAGE = pathlib.Path(jaxalign.__file__).parent
HOSTS = {"runtime", "interop", "services", "cli"}
ROOMS_OF_HOSTS = HOSTS | {"__main__.py"}
WORLD = {
    "orbax", "sqlite3", "sqlalchemy", "subprocess", "logging", "requests", "fastapi", "uvicorn", "socket",
    "multiprocessing", "threading", "matplotlib", "tyro", "rich", "os", "pathlib", "tensorboardX",
}  # fmt: skip


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            found.add(node.module or "")
    return found


def test_pure_code_touches_neither_hosts_nor_the_world():
    pure = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in ROOMS_OF_HOSTS]
    assert len(pure) > 10
    for path in pure:
        for module in imports(path):
            parts = module.split(".")
            assert parts[0] not in WORLD, f"{path} imports {module}"
            assert not (parts[0] == "jaxalign" and len(parts) > 1 and parts[1] in HOSTS), f"{path} imports {module}"


def test_only_networks_import_a_module_system():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "networks":
            assert not {m for m in imports(path) if m.startswith("flax.linen")}, path


def test_hosts_below_the_command_line_do_not_import_it():
    for room in HOSTS - {"cli"}:
        for path in (PACKAGE / room).rglob("*.py"):
            assert not {m for m in imports(path) if m.startswith("jaxalign.cli")}, path


def test_importing_the_package_loads_no_domain():
    code = (
        "import sys, jaxalign; "
        "heavy = ('distrax', 'orbax', 'matplotlib', 'tokenizers', 'gguf', 'torch', 'tyro', 'tensorboardX'); "
        "domains = [f'jaxalign.{d}' for d in jaxalign.DOMAINS]; "
        "print([m for m in (*heavy, *domains) if m in sys.modules]); "
        "jaxalign.statistics; print('jaxalign.statistics' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.split("\n")[:2] == ["[]", "True"]


def test_unknown_attributes_name_the_domains():
    with pytest.raises(AttributeError, match="preferences"):
        jaxalign.nothing  # noqa: B018
