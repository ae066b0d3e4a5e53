"""The code keeps to the floors that docs/architecture.md draws, and starts quickly."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "qwen_scope"


def floors() -> dict[str, int]:
    """Room -> floor, read out of the table in the document."""
    rows = re.findall(r"^\| (\d) \| (.+) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    return {room: int(floor) for floor, names in rows for room in re.findall(r"`(\w+)/?`", names)}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms imported when the module is, or when its functions run; not those for type checkers only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "qwen_scope":
            names = [f"qwen_scope.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("qwen_scope.")}
    return rooms


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def test_every_room_is_in_the_picture_and_the_picture_has_no_others():
    assert {room_of(path) for path in MODULES} == set(floors())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_do_not_go_up(path: Path):
    at = floors()
    room = room_of(path)
    upwards = {other for other in imported_rooms(path) - {room} if at[other] > at[room]}
    assert not upwards, f"{path.name} on floor {at[room]} imports {upwards}"


def test_there_are_no_circles():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(room_of(path), set()).update(imported_rooms(path) - {room_of(path)})
    done: set[str] = set()

    def visit(room: str, above: tuple[str, ...]) -> None:
        assert room not in above, f"circle: {' -> '.join([*above, room])}"
        if room not in done:
            for other in graph[room]:
                visit(other, (*above, room))
            done.add(room)

    for room in graph:
        visit(room, ())


@pytest.mark.parametrize("code", ["import qwen_scope", "import qwen_scope.cli.commands"])
def test_importing_loads_nothing_heavy(code: str):
    heavy = "{'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(sorted({heavy}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import qwen_scope

    for name in qwen_scope.__all__:
        assert getattr(qwen_scope, name).__name__ == name
    with pytest.raises(AttributeError):
        qwen_scope.no_such_name  # noqa: B018
