"""The rooms of the package: imports go down only, modules form no circle, private names stay private, files stay short.

Every import counts: those inside functions, too, and ``importlib.import_module("advkd....")``.
"""

import ast

from ..conftest import ROOT

ORDER = "roof cli export evaluation training methods diffusion models engines data ops kernels runtime ground".split()
"""Rooms from top to bottom."""

SPECIAL = {"advkd": "roof", "exact": "roof", "config": "ground", "errors": "ground"}
"""Rooms of modules outside the folders. ``advkd/__init__.py`` and programs (``__main__.py``) are the roof."""

KERNELS = {"ops", "kernels"}, {"kernels", "runtime"}
"""Rooms that import Triton's kernels, and rooms that those import."""

LONGEST = 400
"""Most lines that a file of the package may have."""


def modules(root):
    """``{name: (file, package that relative imports begin from)}``."""
    found = {}
    for path in sorted([*(root / "advkd").rglob("*.py"), *(root / "kernels").rglob("*.py")]):
        *package, name = path.relative_to(root).with_suffix("").parts
        package = ".".join(package if package[0] == "advkd" else ["advkd", *package])
        found[package if name == "__init__" else f"{package}.{name}"] = path, package
    return found


def room(module):
    name = "advkd" if module.endswith("__main__") else module.removeprefix("advkd.").split(".")[0]
    return SPECIAL.get(name, name)


def imports(tree, package, known):
    """``(line, module, name taken from it, local name of the whole module)`` of every import, one of the names empty."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "", alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join(filter(None, [*above, node.module]))
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                local = (whole, "", alias.asname or alias.name)
                yield node.lineno, *(local if whole in known else (source, alias.name, ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, text.value, "", "") for text in node.args if isinstance(text, ast.Constant))


def private_attributes(tree, taken):
    """``(line, expression)`` of private names that are read off an imported module."""
    names = {local for *_, local in taken}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in names:
            yield node.lineno, ast.unparse(node)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def faults(module, text, tree, taken):
    """Messages about one module's violations."""
    if room(module) not in ORDER:
        yield f"{module}: the room {room(module)} has no place in the order"
        return
    if len(text.splitlines()) > LONGEST:
        yield f"{module}: {len(text.splitlines())} lines, more than {LONGEST}"
    for line, other, name, _ in taken:
        if room(other) in ORDER[: ORDER.index(room(module))] and name != "__version__":
            yield f"{module}, line {line}: an arrow up, to {other}"
        elif room(other) == "kernels" and room(module) not in KERNELS[0]:
            yield f"{module}, line {line}: kernels are imported by ops alone"
        elif room(module) == "kernels" and room(other) not in KERNELS[1]:
            yield f"{module}, line {line}: kernels do not import {other}"
        if is_private(name):
            yield f"{module}, line {line}: the private name {name} of {other}"
    yield from (f"{module}, line {line}: the private name {found}" for line, found in private_attributes(tree, taken))


def circles(arrows):
    """Groups of modules that can reach each other."""
    reached = {module: set(others) for module, others in arrows.items()}
    for middle in reached:
        for others in reached.values():
            others |= reached[middle] if middle in others else set()
    groups = {tuple(sorted(n for n in reached[m] if m in reached.get(n, ()))) for m in reached if m in reached[m]}
    return [f"circle: {', '.join(group)}" for group in sorted(groups)]


def violations(root):
    known, found, arrows = modules(root), [], {}
    for module, (path, package) in known.items():
        tree = ast.parse(text := path.read_text())
        taken = [row for row in imports(tree, package, known) if row[1].split(".")[0] == "advkd"]
        found += faults(module, text, tree, taken)
        arrows[module] = {other for _, other, name, _ in taken if name != "__version__" and other != module}
    return found + circles(arrows)


def test_rooms():
    found = violations(ROOT)
    assert not found, "\n".join(["", *found])


PLANTED = {
    "advkd/__init__.py": "__version__ = '1'\n",
    "advkd/__main__.py": "from .cli import main\n",
    "advkd/cli/main.py": "from .. import __version__\nfrom ..ops import mask\nfrom ..errors import Bad\n",
    "advkd/engines/gpu.py": "from advkd.kernels import mask\n",
    "advkd/errors.py": "def f():\n    from .runtime import files\n",
    "advkd/ops/mask.py": "import advkd.kernels.mask as kernel\nkernel._tile\nkernel.__name__\n",
    "advkd/ops/registry.py": "def f():\n    import importlib\n    importlib.import_module('advkd.cli.main')\n",
    "advkd/runtime/files.py": "from .locks import _held, hold\nfrom advkd import Student\n" + "#\n" * 399,
    "advkd/runtime/locks.py": "def f():\n    import advkd.runtime.files\n    advkd.runtime.files._move()\n",
    "advkd/shed/tools.py": "",
    "kernels/mask.py": "from ..ops import mask as reference\nimport torch\nreference._pack, torch._C\n",
    "kernels/tiles.py": "from ..errors import Bad\nfrom ..runtime import locks\nfrom .mask import tile\n" + "#\n" * 398,
}


def test_violations_are_found(tmp_path):
    for name, text in PLANTED.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == [
        "advkd.engines.gpu, line 1: kernels are imported by ops alone",
        "advkd.errors, line 2: an arrow up, to advkd.runtime.files",
        "advkd.ops.mask, line 2: the private name kernel._tile",
        "advkd.ops.registry, line 3: an arrow up, to advkd.cli.main",
        "advkd.runtime.files: 401 lines, more than 400",
        "advkd.runtime.files, line 1: the private name _held of advkd.runtime.locks",
        "advkd.runtime.files, line 2: an arrow up, to advkd",
        "advkd.runtime.locks, line 3: the private name advkd.runtime.files._move",
        "advkd.shed.tools: the room shed has no place in the order",
        "advkd.kernels.mask, line 1: an arrow up, to advkd.ops.mask",
        "advkd.kernels.mask, line 3: the private name reference._pack",
        "advkd.kernels.tiles: 401 lines, more than 400",
        "advkd.kernels.tiles, line 1: kernels do not import advkd.errors",
        "circle: advkd.kernels.mask, advkd.ops.mask",
        "circle: advkd.runtime.files, advkd.runtime.locks",
    ]
