"""The rooms of the package: imports point down only, no folder goes in a circle, none is a corridor, and the page shows it so.

Everything is read from the files: nothing of the package is imported, so that these tests take a second.
"""

from __future__ import annotations

import graphlib
import importlib.util
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, BENCHMARKS = ROOT / "lightning_wdefense", ROOT / "benchmarks"
MOST_FILES = 12
"""In one folder of the package, of any kind."""

_spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
architecture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architecture)


def imports_up(graph: dict[str, set[str]], layers: tuple[str, ...]) -> list[str]:
    """Imports of a room that stands above the importer's."""
    rank = {layer: place for place, layer in enumerate(layers)}
    return [
        f"{file} imports {other}"
        for file, others in graph.items()
        for other in sorted(others)
        if rank[architecture.room(other)] < rank[architecture.room(file)]
    ]


def imports_of_the_own_folder(graph: dict[str, set[str]]) -> list[str]:
    """Files that import the ``__init__`` of a folder that they stand in, at any depth."""
    return [
        f"{file} imports {other}"
        for file, others in graph.items()
        for other in sorted(others)
        if Path(other).name == "__init__.py" and Path(other).parent in Path(file).parents
    ]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Folders whose children, files and folders, import each other in a circle: one circle of each."""
    children: dict[Path, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file, others in graph.items():
        for other in others:
            for folder in Path(file).parents:
                if folder in Path(other).parents:
                    one, two = (Path(each).relative_to(folder).parts[0] for each in (file, other))
                    if one != two:
                        children[folder][one].add(two)
    found = []
    for folder, inside in sorted(children.items()):
        try:
            graphlib.TopologicalSorter(inside).prepare()
        except graphlib.CycleError as error:
            found.append(f"{folder}: {' <- '.join(error.args[1])}")
    return found


def folders(root: Path) -> list[Path]:
    """A folder and all below it that hold something."""
    below = [path for path in sorted(root.rglob("*")) if path.is_dir() and "__pycache__" not in path.parts]
    return [path for path in [root, *below] if any(path.iterdir())]


def corridors(root: Path) -> list[str]:
    """Folders with more files than one can take in."""
    sizes = {path: sum(each.is_file() for each in path.iterdir()) for path in folders(root)}
    return [f"{path.relative_to(root.parent)}: {size} files" for path, size in sizes.items() if size > MOST_FILES]


def shared_prefixes(root: Path) -> list[str]:
    """Prefixes that are folders that were not made: ``critic_plot.py`` beside ``critic_report.py``, ``critic.py`` or ``critic/``.

    A prefix is the first word of a name of two or more. Python files are looked at, and folders that hold some; an underscore in front
    only says that a file is private.
    """
    found = []
    for folder in folders(root):
        names = [path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
        names += [path.name for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))]
        words = [name.strip("_").split("_") for name in names]
        for prefix in sorted({first for first, *rest in words if rest}):
            if sum(first == prefix for first, *_ in words) > 1:
                found.append(f"{folder.relative_to(root.parent)}: {prefix}_")
    return found


GRAPH = architecture.imports(PACKAGE)


def test_every_file_of_the_package_is_seen_with_its_imports():
    assert len(GRAPH) > 100
    assert {"attacks/base.py", "attacks/gradient/pgd.py"} < GRAPH["attacks/__init__.py"]
    assert "transport/entropic/__init__.py" in GRAPH["transport/__init__.py"]


def test_every_room_has_a_layer():
    assert {architecture.room(file) for file in GRAPH} == set(architecture.LAYERS)


def test_imports_point_down():
    assert not imports_up(GRAPH, architecture.LAYERS)


def test_no_file_imports_the_init_of_its_own_folder():
    assert not imports_of_the_own_folder(GRAPH)


def test_no_folder_goes_in_a_circle():
    assert not circles(GRAPH)


def test_no_folder_is_a_corridor():
    assert not corridors(PACKAGE)


@pytest.mark.parametrize("root", [PACKAGE, BENCHMARKS], ids=lambda root: root.name)
def test_no_files_are_told_apart_by_prefixes(root):
    assert not shared_prefixes(root)


def test_the_page_is_what_the_script_makes():
    text = architecture.PAGE.read_text()
    advice = "run `python docs/architecture.py`"
    assert architecture.picture() == architecture.PICTURE.read_text(), advice
    assert architecture.page(text) == text, advice


# What each check finds in a small house with one fault.

LAYERS = ("__init__.py", "callbacks", "attacks", "_*.py")


@pytest.fixture
def house(tmp_path):
    """Makes a package of three rooms, with files changed or added."""

    def build(**files: str) -> Path:
        root = tmp_path / "house"
        plain = {
            "__init__": "from house.callbacks.monitor import watch",
            "callbacks/__init__": "",
            "callbacks/monitor": "import torch\nfrom house.attacks import pgd\ndef watch():\n    from house import _seeds",
            "attacks/__init__": "from .pgd import attack",
            "attacks/pgd": "import house.attacks.losses as losses\nfrom house._seeds import seed",
            "attacks/losses": "",
            "_seeds": "import random",
        }
        for name, text in {**plain, **files}.items():
            path = root / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    return build


def test_imports_of_every_form_are_read(house):
    assert architecture.imports(house()) == {
        "__init__.py": {"callbacks/monitor.py"},
        "callbacks/__init__.py": set(),
        "callbacks/monitor.py": {"attacks/pgd.py", "_seeds.py"},
        "attacks/__init__.py": {"attacks/pgd.py"},
        "attacks/pgd.py": {"attacks/losses.py", "_seeds.py"},
        "attacks/losses.py": set(),
        "_seeds.py": set(),
    }


def test_a_sound_house_passes(house):
    graph = architecture.imports(root := house())
    assert not imports_up(graph, LAYERS) + imports_of_the_own_folder(graph) + circles(graph)
    assert not corridors(root) + shared_prefixes(root)


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        (
            "attacks/losses",
            "from house.callbacks.monitor import watch",
            "attacks/losses.py imports callbacks/monitor.py",
        ),
        ("attacks/losses", "def f():\n    import house.callbacks", "attacks/losses.py imports callbacks/__init__.py"),
        ("callbacks/monitor", "from house import __version__", "callbacks/monitor.py imports __init__.py"),
        ("_seeds", "from .attacks.losses import ce", "_seeds.py imports attacks/losses.py"),
    ],
)
def test_an_import_up_is_found(house, file, text, found):
    assert imports_up(architecture.imports(house(**{file: text})), LAYERS) == [found]


def test_a_room_without_a_layer_is_found(house):
    with pytest.raises(KeyError, match="audit"):
        imports_up(architecture.imports(house(**{"audit/report": "from house import callbacks"})), LAYERS)


@pytest.mark.parametrize(
    ("file", "text", "folder", "members"),
    [
        ("attacks/losses", "from . import pgd", "attacks", {"losses.py", "pgd.py"}),
        ("attacks/losses", "def f():\n    from house.attacks.pgd import attack", "attacks", {"losses.py", "pgd.py"}),
        ("_seeds", "import house.attacks.losses", ".", {"_seeds.py", "attacks"}),
        # No circle of files, but one of folders.
        ("attacks/losses", "import house.callbacks.hooks", ".", {"attacks", "callbacks"}),
    ],
)
def test_a_circle_is_found(house, file, text, folder, members):
    (found,) = circles(architecture.imports(house(**{file: text, "callbacks/hooks": ""})))
    place, circle = found.split(": ")
    assert (place, set(circle.split(" <- "))) == (folder, members)


@pytest.mark.parametrize("text", ["from house.attacks import attack", "from . import attack", "import house.attacks"])
def test_an_import_of_the_own_folder_is_found(house, text):
    found = imports_of_the_own_folder(architecture.imports(house(**{"attacks/losses": text})))
    assert found == ["attacks/losses.py imports attacks/__init__.py"]


def test_a_corridor_is_found(house):
    root = house(**dict.fromkeys((f"attacks/kind{i}" for i in range(9)), ""))
    assert not corridors(root)
    (root / "attacks" / "notes.txt").touch()
    assert corridors(root) == ["house/attacks: 13 files"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (("critic_plot", "critic_report"), ["house: critic_"]),
        (("critic_plot", "critic"), ["house: critic_"]),
        (("critic_plot", "critic/report"), ["house: critic_"]),
        (("attacks/_soft_ball", "attacks/soft_max"), ["house/attacks: soft_"]),
        (("report_critic", "plot_critic"), []),
        (("critic", "critics"), []),
    ],
)
def test_a_shared_prefix_is_found(house, files, found):
    assert shared_prefixes(house(**dict.fromkeys(files, ""))) == found
