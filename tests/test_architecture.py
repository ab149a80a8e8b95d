"""The house: layers, what each may import, and what may happen only in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "giantstep"

# From the highest layer to the lowest; a module may import only from layers below its own, or from its own package.
LAYERS: list[set[str]] = [
    {"cli", "integrations", "testing", "__init__"},
    {"diagnosis", "tiered"},
    {"manager"},
    {"metadata", "async_saving", "difference", "zero", "optimizer", "training_state"},
    {"opening", "saving", "loading", "removal", "materializing", "saver", "recovery", "examining"},
    {"protected_save", "node_load"},
    {"planned_save", "planned_load", "comparison", "keeping", "rewriting"},
    {"filling", "unwrapping", "kept_index", "kept_outlines", "older_steps", "findings"},
    {"reusing", "describing", "requesting", "conditions", "restoring", "sources", "pending", "sharing"},
    {"stored_view"},
    {"codecs", "reports", "phases", "writers", "stored_plans", "targets", "stored_state"},
    {"fused", "experts", "pipeline"},
    {"tiers"},
    {"mapping", "staging", "writing", "reading", "commit", "steps", "foreign_formats"},
    {"words", "held_memory"},
    {"planning", "storage", "group"},
    {"format"},
    {"shards"},
    {"options"},
    {"plan_cache", "collection", "ending", "requirements"},
    {"errors"},
]
PURE = {"shards", "format", "planning"}
PURE_MODULES = {f"pipeline/{name}.py" for name in ("__init__", "language", "layout", "names")}
# To the object codec these are types of values, not ways to files; and threads may share it.
OBJECT_TYPES = {
    "format/codec.py": {"threading"},
    "format/registry.py": {"threading"},
    "format/kinds.py": {"io"},
    "format/kinds_text.py": {"pathlib"},
}
LOCAL_FILES = ("storage/local.py", "storage/local_handles.py")
KNOW_DTENSORS = ("dtensor", "expand", "leaves", "optimizer", "outline", "param_layout", "wrappers")
EFFECTS = {"torch", "os", "io", "time", "threading", "socket", "subprocess", "pathlib", "tempfile", "shutil"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def house_of(path: Path) -> str:
    """Top-level package or module of a file."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer_of(house: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if house in layer)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    house = house_of(path)
    for name in imports_of(path):
        if not name.startswith("giantstep"):
            continue
        other = [*name.split("."), "__init__"][1]
        if other != house:
            assert layer_of(other) > layer_of(house), f"{path} ({house}) imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_effects_happen_where_they_may(path: Path) -> None:
    house, names = house_of(path), imports_of(path)
    relative = str(path.relative_to(SOURCE))
    tops = {name.split(".")[0] for name in names}
    assert not tops & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, "pickle nowhere"
    if house in PURE or relative in PURE_MODULES:
        assert not tops & (EFFECTS - OBJECT_TYPES.get(relative, set())), f"{relative} is pure"
    if any(name.startswith("torch.distributed") for name in names):
        assert house == "group" or relative in (
            # Starts ranks of its own.
            "testing/killed.py",
            *(
                f"mapping/{name}.py"
                for name in (
                    "dtensor",
                    "expand",
                    "leaves",
                    "model_parameter",
                    "optimizer",
                    "outline",
                    "param_layout",
                    "torch_sharded",
                    "wrappers",
                )
            ),
        )
    if "os" in tops:
        allowed = (*LOCAL_FILES, "storage/locate.py", "options.py", "ending.py", "testing/killing.py")
        assert relative in allowed, "files, environment, exit, kill"
    text = path.read_text()
    assert "os.environ" not in text or relative == "options.py"
    assert "torch.load" not in text
    assert "torch.save" not in text
    assert "os.fork" not in text
    if relative not in LOCAL_FILES:
        calls = {
            node.func.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "open" not in calls, f"file calls only in {LOCAL_FILES}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_assert_checks_input_and_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    assert ast.get_docstring(tree)


def test_no_module_is_a_drawer() -> None:
    names = {path.stem for path in modules()}
    assert not names & {"utils", "util", "helpers", "common", "core", "misc"}
    sizes = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: size for name, size in sizes.items() if size > 400} == {}
