"""The house keeps its shape: imports point downwards, ops stay free of Flax, files stay short."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the ground up; a file may import its own floor and those before it.
FLOORS = [
    "pallas_kernels",
    "research.axes",
    "research.config",
    "research.ops",
    "research.sharding",
    "research.layers",
    "research.models",
    "research.data",
    "research.training",
    "research.inference",
    "research.interop",
    "configs",
    "experiments",
]
LONG = {"pallas_kernels"}  # kernels may be
FILES = sorted(
    path
    for package in ("research", "pallas_kernels", "experiments", "configs")
    for path in ROOT.glob(f"{package}/**/*.py")
)


def floor_of(module: str) -> int | None:
    for index, floor in enumerate(FLOORS):
        if module == floor or module.startswith(f"{floor}."):
            return index
    return None


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} uses a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path):
    own = floor_of(module_of(path))
    if own is None:
        assert module_of(path) == "research", f"{path} stands on no floor"
        return
    for name in imports_of(path):
        floor = floor_of(name)
        assert floor is None or floor <= own, f"{module_of(path)} imports {name}, from a floor above it"
        if floor is not None and FLOORS[own] == "research.ops":
            assert not name.startswith("flax")
        if FLOORS[own] == "pallas_kernels":
            assert not name.startswith(("research", "flax"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_stay_short(path):
    if module_of(path).split(".")[0] not in LONG:
        assert len(path.read_text().splitlines()) <= 420


def test_ops_import_without_flax():
    assert not (ROOT / "research/__init__.py").read_text().strip()
    assert not (ROOT / "research/ops/__init__.py").read_text().strip()
    for path in (ROOT / "research/ops").glob("**/*.py"):
        assert not any(name.startswith("flax") for name in imports_of(path))
