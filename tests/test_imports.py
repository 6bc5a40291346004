"""Who may import what: modules for re-use stand alone, and arrows between rooms go down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import sys
import optax
from absl import flags

before = set(flags.FLAGS)  # absl's own, and those of optax's dependencies
import conet_jax.{module}

heavy = ("orbax", "polars", "rich", "ml_collections", "flax")
loaded = sorted(name for name in sys.modules if name.split(".")[0] in heavy)
assert not loaded, loaded
ours = sorted(name for name in sys.modules if name.startswith("conet_jax"))
assert ours == ["conet_jax", "conet_jax.{module}"], ours
assert set(flags.FLAGS) == before, set(flags.FLAGS) - before
"""
LIFTED = ("losses", "metrics", "optimizers", "row_adam")


@pytest.mark.parametrize("module", LIFTED)
def test_module_for_reuse_loads_nothing_heavy_and_defines_no_flag(module):
    code = _CODE.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What our files import, read from their text: by module, ours and others', inside functions too.

ROOT = Path(__file__).resolve().parent.parent


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name_of(path): path for path in (ROOT / "conet_jax").rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """The modules that a module of ours imports anywhere but for types alone."""
    tree, found = ast.parse(FILES[module].read_text()), set()
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else node.module)
    return found


IMPORTS = {module: imports_of(module) for module in FILES}


def room_of(module: str) -> str:
    """The folder that a module is in, or the module itself where it is in none."""
    _, *rest = module.split(".")
    return rest[0] if rest else ""


# From the bottom up. A room imports itself and what stands before it.
ROOMS = ("data", "devices", "models", "train", "run", "studies", "serve")
# Besides, everyone may import these, which import no room.
GROUND = ("", "console", "errors", "files", "published", "streams", "variants", *LIFTED)
# The config asks the models to check their own fields; no model knows the config.
CONFIG = {"config": ("models",), "cli": ("config", "run")}
SYSTEM = ("os", "pathlib", "json", "subprocess", "polars", "absl")
# The rooms to lift out, and what they may import of others.
TO_LIFT = ("devices", "models", "train")
TYPES_OF_DATA = "conet_jax.data.types"


def ours(module: str) -> set[str]:
    return {name for name in IMPORTS[module] if name in FILES}


def test_every_import_between_rooms_goes_down():
    wrong = []
    for module in FILES:
        room = room_of(module)
        if room in ROOMS:
            allowed = {*GROUND, *ROOMS[: ROOMS.index(room) + 1]}
            if room in ("run", "studies", "serve"):
                allowed.add("config")
        elif room in GROUND:
            allowed = {*GROUND}
        elif room in CONFIG:
            allowed = {*GROUND, *CONFIG[room]}
        else:
            continue  # what stands above all rooms
        wrong += [f"{module} -> {x}" for x in sorted(ours(module)) if room_of(x) not in allowed]
    assert {room_of(module) for module in FILES} >= {*ROOMS, *GROUND, *CONFIG}
    assert not wrong, wrong


def test_no_import_runs_in_a_circle():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(ours(module)):
            visit(other)
        done.add(path.pop())

    for module in sorted(FILES):
        visit(module)
    assert done == set(FILES)


@pytest.mark.parametrize("room", [*TO_LIFT, *LIFTED])
def test_a_room_to_lift_knows_no_system_no_polars_and_no_flag(room):
    """But for ``devices.processes``, which no other module of these rooms imports."""
    own = [
        name for name in FILES if room_of(name) == room and name != "conet_jax.devices.processes"
    ]
    assert own
    for module in own:
        roots = {name.split(".")[0] for name in IMPORTS[module]}
        assert not roots & set(SYSTEM), (module, roots & set(SYSTEM))
        if room in LIFTED:
            assert not ours(module), (module, ours(module))
            continue
        for other in ours(module):
            assert room_of(other) in (*TO_LIFT, *LIFTED, "errors") or other == TYPES_OF_DATA, (
                f"{module} -> {other}"
            )
            assert other != "conet_jax.devices.processes", module


def test_the_types_of_data_and_the_errors_know_no_files():
    for module in (TYPES_OF_DATA, "conet_jax.errors"):
        roots = {name.split(".")[0] for name in IMPORTS[module]}
        assert not roots & {"os", "pathlib", "subprocess", "polars", "absl"}, (module, roots)
        assert ours(module) <= {"conet_jax.errors"}
