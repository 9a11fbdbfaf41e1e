"""Every GPU test is entered without a GPU, and no test or profiler reads a name of the project that does not exist."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import types

import pytest

from ..conftest import ROOT, process_environment


def dry_run(*arguments):
    """pytest's finished process on the stand-in for a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-p", "tests.gpu_dry_run", "--gpu-dry"]
    environment = process_environment({"OMP_NUM_THREADS": "1"})
    command += ["-m", "gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_every_gpu_test_is_entered():
    """One case of each function, chosen as on a GPU."""
    pytest.importorskip("triton")
    done = dry_run("-p", "profiling.gpu.tests", "--gpu-most=1", "--tb=short", "tests")
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:]
    entered = sum(int(n) for n in re.findall(r"^gpu dry run: (\d+) started a kernel", done.stdout, re.M))
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    # The others have nothing to launch, or stop at a tensor of gigabytes.
    assert entered >= 0.85 * passed > 0


PLANTED = """
import pytest
import torch
from advkd import ops
from advkd.ops.mask_mul import mask_mul, pack

pytestmark = pytest.mark.gpu


def product(**options):
    x = torch.randn(2, 8, device="cuda")
    return mask_mul(x, pack(x > 0), 0.2, **options)


def test_good():
    for backend in ("cuda", "triton", "reference"):
        product(backend=backend).cpu().numpy()


def test_wrong_number_behind_a_kernel():
    pytest.fail(str(product(backend="cuda").sum().item()))


def test_captured():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product(backend="cuda")
    graph.replay()


def test_missing_attribute():
    ops.mask_mull(torch.zeros(2, device="cuda"))


def test_missing_import():
    from advkd.ops.mask_mul import nothing


def test_wrong_keyword():
    product(slop=0.1)


def test_wrong_number():
    assert torch.ones(2, device="cuda").sum() == 3


def test_missing_attribute_behind_a_kernel():
    product(backend="triton").nothing()


def test_two_devices():
    product() + torch.ones(2, 8)


def test_generator_of_the_cpu():
    torch.randn(2, device="cuda", generator=torch.Generator())


def test_array_of_a_device():
    product().numpy()


def test_wrong_arguments_of_a_launcher():
    product()
    torch.ops.advkd_cuda.mask_mul(torch.zeros(2, 8, device="cuda"), 0.2)


def test_host_waits_inside_a_capture():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        product().sum().item()


def test_captured_twice():
    test_captured.graph = graph = torch.cuda.CUDAGraph()
    for _ in range(2):
        with torch.cuda.graph(graph):
            product()
"""


def test_planted_faults_are_found(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "test_planted.py"
    path.write_text(PLANTED)
    done = dry_run("-rA", "--tb=line", "-c", ROOT / "pyproject.toml", f"--rootdir={tmp_path}", path)
    found = dict(reversed(line) for line in re.findall(r"^(PASSED|FAILED) \S*::(\w+)", done.stdout, re.M))
    names = re.findall(r"^def (test_\w+)", PLANTED, re.M)
    good = ("test_good", "test_wrong_number_behind_a_kernel", "test_captured")
    assert found == {name: "PASSED" if name in good else "FAILED" for name in names}, done.stdout


PROJECT = ("advkd", "kernels", "profiling", "tests")


class Reads(ast.NodeVisitor):
    """Finds names that a file reads from the project's modules and that do not exist.

    Follows imports, also inside functions, assignments, and functions of the file that return a module.
    """

    def __init__(self, package):
        self.package, self.scopes, self.missing = package, [{}], []

    def visit_Import(self, node):
        for alias in node.names:
            known = alias.name.partition(".")[0] in PROJECT
            module = self.module(alias.name, node) if known else None
            top = alias.name.partition(".")[0]
            self.scopes[-1][alias.asname or top] = module if alias.asname or not known else importlib.import_module(top)

    def visit_ImportFrom(self, node):
        name = importlib.util.resolve_name("." * node.level + (node.module or ""), self.package)
        module = self.module(name, node) if name.partition(".")[0] in PROJECT else None
        for alias in node.names:
            self.scopes[-1][alias.asname or alias.name] = module and self.attribute(module, alias.name, node)

    def module(self, name, node):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] in PROJECT:
                self.missing.append(f"line {node.lineno}: {name}")

    def attribute(self, module, name, node):
        """A module's attribute or submodule; only modules are followed further."""
        whole = f"{module.__name__}.{name}"
        if not hasattr(module, name) and hasattr(module, "__path__") and importlib.util.find_spec(whole):
            importlib.import_module(whole)
        if not hasattr(module, name):
            self.missing.append(f"line {node.lineno}: {whole}")
        found = getattr(module, name, None)
        return found if isinstance(found, types.ModuleType) else None

    def resolve(self, node):
        """The module, or the function of this file, that an expression is."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Call) and isinstance(function := self.resolve(node.func), ast.FunctionDef):
            inside = Reads(self.package)
            inside.scopes = [*self.scopes[:1], {}]
            for statement in function.body:
                inside.visit(statement)
            found = {inside.resolve(n.value) for n in ast.walk(function) if isinstance(n, ast.Return) and n.value}
            return found.pop() if len(found) == 1 else None
        if isinstance(node, ast.Attribute) and isinstance(module := self.resolve(node.value), types.ModuleType):
            project = module.__name__.partition(".")[0] in PROJECT
            return self.attribute(module, node.attr, node) if project else None
        return None

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            self.resolve(node)
        self.generic_visit(node)

    def visit_With(self, node):
        before = len(self.missing)
        self.generic_visit(node)
        # Names that are expected to be missing.
        if any(re.match(r"pytest\.raises\((AttributeError|ImportError)", ast.unparse(item)) for item in node.items):
            del self.missing[before:]

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.scopes[-1][target.id] = self.resolve(node.value)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.scopes[-1][node.id] = None

    def visit_FunctionDef(self, node):
        self.scopes[-1][node.name] = node
        arguments = [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)]
        self.scopes.append(dict.fromkeys(arguments))
        for statement in [*node.args.defaults, *node.decorator_list, *node.body]:
            self.visit(statement)
        self.scopes.pop()

    def visit_Lambda(self, node):
        self.scopes.append(dict.fromkeys(a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)))
        self.generic_visit(node)
        self.scopes.pop()


def missing(text, package):
    reads = Reads(package)
    reads.visit(ast.parse(text))
    return list(dict.fromkeys(reads.missing))


FILES = sorted(path for folder in ("tests", "profiling") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_exist(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert missing(path.read_text(), package) == []


FAULTY = """
import advkd.ops.gpu_storage as layers
from advkd.ops import registry, nothing
from .training_cases import check


def launchers():
    from advkd.kernels import conv_block

    return conv_block


def test(kernels):
    kernels.anything()
    kernels = launchers()
    kernels.launch_layer(layers.UNIT, registry.gap)
    kernels.shared_memory("cuda")
    from advkd import no_module
    with pytest.raises(AttributeError, match="layers"):
        layers.nowhere
    return launchers().nowhere, layers.padding
"""


def test_missing_names_are_found():
    pytest.importorskip("triton")
    assert missing(FAULTY, "tests.ops") == [
        "line 3: advkd.ops.nothing",
        "line 17: advkd.kernels.conv_block.shared_memory",
        "line 18: advkd.no_module",
        "line 21: advkd.kernels.conv_block.nowhere",
        "line 21: advkd.ops.gpu_storage.padding",
    ]
