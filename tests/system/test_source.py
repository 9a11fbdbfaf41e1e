"""The source text: public names are annotated and documented."""

import ast

import pytest

from ..conftest import ROOT
from ..seeded_faults import FAULTS, Fault


def is_public(name):
    return not name.startswith("_") or name.startswith("__")


def decorators(function):
    return [ast.unparse(node.func if isinstance(node, ast.Call) else node) for node in function.decorator_list]


def is_command(function):
    """True for a command of the command line, whose arguments click passes by its options' names."""
    return any(name.startswith("click.") or name.endswith((".command", ".group")) for name in decorators(function))


def is_device_code(function):
    return "triton.jit" in decorators(function)


def without_annotation(function):
    """Names of a function's arguments that have none, and ``return``; a constructor's result needs none."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    yield from (a.arg for a in arguments if a and a.annotation is None and a.arg not in ("self", "cls"))
    if function.returns is None and function.name != "__init__":
        yield "return"


def faults(body, prefix):
    """Public functions and classes of a module or a class, and theirs, that lack a docstring or an annotation."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or not is_public(node.name):
            continue
        name = f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from faults(node.body, f"{name}.")
        elif is_device_code(node):
            continue
        elif not is_command(node):
            yield from (f"{name}: {missing} has no annotation" for missing in without_annotation(node))
        if not node.name.startswith("__") and ast.get_docstring(node) is None:
            yield f"{name} has no docstring"


def violations(root):
    paths = sorted([*(root / "advkd").rglob("*.py"), *(root / "kernels").rglob("*.py")])
    return [f"{p.relative_to(root)}: {fault}" for p in paths for fault in faults(ast.parse(p.read_text()).body, "")]


def test_public_names_are_annotated_and_documented():
    found = violations(ROOT)
    assert not found, "\n".join(["", *found])


PLANTED = '''
def plain(x, *rest: int, key=1, **options) -> int:
    """Documented."""

def undocumented(x: int) -> int:
    def inner(y): ...

def _private(x): ...

@triton.jit
def kernel(x): ...

@main.command()
@click.option("--out")
def command(out):
    """A command's arguments come from its options."""

class Undocumented:
    def __init__(self, x): ...
    def __len__(self): ...
    def _own(self, x): ...
    @classmethod
    def of(cls) -> int: ...

class _Private:
    def method(self, x): ...
'''


def test_violations_are_found(tmp_path):
    for name, text in (("advkd", PLANTED), ("kernels", '"""A module."""\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "planted.py").write_text(text)
    assert violations(tmp_path) == [
        f"advkd/planted.py: {fault}"
        for fault in (
            "plain: x has no annotation",
            "plain: key has no annotation",
            "plain: options has no annotation",
            "undocumented has no docstring",
            "Undocumented.__init__: x has no annotation",
            "Undocumented.__len__: return has no annotation",
            "Undocumented.of has no docstring",
            "Undocumented has no docstring",
        )
    ]


def test_every_fault_of_the_list_can_be_seeded():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 42
    for fault in FAULTS:
        file, text = fault.seeded(ROOT)
        assert text != file.read_text() and all((ROOT / tests).exists() for tests in fault.files), fault.name


@pytest.mark.parametrize("old", ["import torch", "no such text"])
def test_a_fault_without_one_place_is_an_error(old):
    with pytest.raises(LookupError, match="a fault: its text is found [^1] times in kernels"):
        Fault("a fault", "kernels", old, "", "").seeded(ROOT)
