"""The public API, what importing it costs, and which way the arrows point."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_tune

PACKAGE = Path(mlx_tune.__file__).parent

#: The rooms from the ground up. A module may import from rooms below its own, and from its own.
FLOORS = [
    ["errors", "substitution", "pareto", "version"],
    ["units", "upstream", "trees", "interrupts", "garbage"],
    ["files"],
    ["presentation", "progress", "reach"],
    ["devices"],
    ["memory", "state"],
    ["machines"],
    ["graphs", "wiring"],
    ["measuring"],
    ["checkpointing"],
    ["losses"],
    ["batching", "quantization"],
    ["fitting", "diagnosis"],
    ["bench"],
    ["lm"],
    ["cli"],
]
#: Rooms in a room that know nothing of each other.
SIDE_BY_SIDE = {"mlx_tune.graphs.tracing", "mlx_tune.graphs.simulating"}
#: Rooms in quantization, from the ground up; the files beside them stand on all.
QUANTIZATION = [["formats"], ["models"], ["planning"], ["learning", "judging"], ["sizing"]]
QUANTIZATION_FLOOR_OF = {room: number for number, floor in enumerate(QUANTIZATION) for room in floor}
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}

#: The names that users rely on. The table in `mlx_tune/__init__.py` may hold more (result types, errors), never fewer.
PUBLIC = [
    "track_memory",
    "memory_limit",
    "memory_budget",
    "parse_bytes",
    "format_bytes",
    "estimate_memory",
    "tightest_limit",
    "checkpoint",
    "uncheckpoint",
    "is_checkpointed",
    "is_recomputing",
    "is_tracing",
    "checkpoint_blocks",
    "plan_checkpoints",
    "verify_checkpoint",
    "keep",
    "tile",
    "untile",
    "autobatch",
    "autobatch_by_length",
    "quantize_model",
    "plan_quantization",
    "quantization_report",
    "quantization_config",
    "wired_limit",
    "autofit",
    "diagnose",
    "explain",
    "lm",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_importable_from_the_top(name):
    assert getattr(mlx_tune, name) is not None
    assert name in mlx_tune.__all__
    assert name in dir(mlx_tune)


def test_every_name_in_the_table_has_a_home_and_a_docstring():
    for name, home in mlx_tune._HOMES.items():
        value = getattr(importlib.import_module(f"mlx_tune.{home}"), name)
        assert getattr(mlx_tune, name) is value
        assert value.__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        mlx_tune.quantise


def test_the_type_checker_sees_every_name_of_the_table():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.asname: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"mlx_tune.{home}" for name, home in mlx_tune._HOMES.items()}


def in_a_child(code):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_importing_brings_nothing_heavy_and_touches_no_device():
    heavy = ["mlx_lm", "transformers", "rich", "numpy", "psutil", "matplotlib", "mlx.core"]
    code = f"import sys, mlx_tune; print(*[name for name in {heavy} if name in sys.modules])"
    assert in_a_child(code) == []


def test_the_whole_library_but_the_bridge_is_independent_of_mlx_lm():
    rooms = [room for floor in FLOORS for room in floor if room not in {"lm", "cli"}]
    imports = "; ".join(f"import mlx_tune.{room}" for room in rooms)
    code = f"import sys; {imports}; print(*[n for n in ('mlx_lm', 'transformers', 'rich') if n in sys.modules])"
    assert in_a_child(code) == []


def modules():
    """Every source file and its dotted name."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), file


def imported(file):
    """Every mlx_tune module and every other package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module == "mlx_tune":
                yield from (f"mlx_tune.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize(("name", "file"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_arrows_point_down(name, file):
    room = name.split(".")[1] if "." in name else None
    if room in {None, "__main__"}:
        return  # the table of the API, and the door to the command line
    assert room in FLOOR_OF, f"{name} lies in a room that has no floor yet"
    for target in imported(file):
        if target.split(".")[0] == "mlx_lm":
            assert room == "lm" or name == "mlx_tune.cli.lora", f"{name} imports mlx_lm: only the bridge may"
        if not target.startswith("mlx_tune."):
            continue
        other = target.split(".")[1]
        if other.startswith("__"):
            continue  # the version
        allowed = other == room or FLOOR_OF[other] < FLOOR_OF[room]
        assert allowed, f"{name} imports {target}, which is not below it"
        pair = {".".join(module.split(".")[:3]) for module in (name, target)}
        assert pair != SIDE_BY_SIDE, f"{name} imports {target}, which lies beside it"


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name, file in modules() if name.startswith("mlx_tune.quantization.")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrows_in_quantization_point_down(name, file):
    room, top = name.split(".")[2], len(QUANTIZATION)
    own = QUANTIZATION_FLOOR_OF.get(room, top)
    for target in imported(file):
        if target.startswith("mlx_tune.quantization."):
            other = target.split(".")[2]
            below = QUANTIZATION_FLOOR_OF.get(other, top) < own
            assert other == room or below or own == top, f"{name} imports {target}, which is not below it"


@pytest.mark.parametrize(("name", "file"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_is_one_job(name, file):
    assert len(file.read_text().splitlines()) <= 420, f"{name}: two jobs?"
