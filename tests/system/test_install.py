"""Import and installation of the package."""

import subprocess
import sys

import pytest

from ..conftest import ROOT, process_environment


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options).stdout.split()


def test_import_and_sampling_are_light():
    code = (
        "import sys, advkd; advkd.Student.from_pretrained('digits').fuse().sample(2);"
        "print([m for m in ('diffusers', 'accelerate', 'torchmetrics', 'matplotlib', 'triton', 'torch._dynamo', 'sklearn',"
        "'transformers', 'tensorboard') if m in sys.modules])"
    )
    assert python(code, env=process_environment()) == ["[]"]


def test_rooms_are_there_after_the_import():
    rooms = sorted(path.parent.name for path in (ROOT / "advkd").glob("*/__init__.py"))
    code = f"import sys, advkd; print('torch' in sys.modules, *(getattr(advkd, name).__name__ for name in {rooms}))"
    light, *names = python(code, env=process_environment())
    assert light == "False" and names == [f"advkd.{name}" for name in rooms] and "methods" in rooms


def test_public_names_exist():
    import advkd

    assert all(callable(getattr(advkd, name)) for name in advkd.__all__)
    # A name that is also a submodule would depend on the order of imports.
    assert not [name for name in advkd.__all__ if (ROOT / "advkd" / f"{name}.py").exists()]
    with pytest.raises(AttributeError, match="no_such_name"):
        advkd.no_such_name


def test_kernels_are_mapped_in_a_bare_checkout(tmp_path):
    for name in ("advkd", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = "import advkd.kernels.philox; print(advkd.kernels.philox.__name__)"
    environment = process_environment({"PYTHONPATH": str(tmp_path)})
    assert python(code, env=environment, cwd=tmp_path)[0] == "advkd.kernels.philox"


def test_without_the_extension_the_reference_remains(tmp_path):
    (tmp_path / "advkd").mkdir()
    for path in (ROOT / "advkd").iterdir():
        if path.suffix != ".so":
            (tmp_path / "advkd" / path.name).symlink_to(path)
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    code = (
        "import torch; from advkd.ops import registry as b; d = torch.device('cpu');"
        "print(b.choose('philox', 'auto', d)); print(b.gap('philox', 'cpu', d).replace(' ', '_'))"
    )
    # The folder's entries are links: only the modules' own folder must be bare.
    chosen, gap = python(code, env=process_environment({"PYTHONPATH": str(tmp_path)}), cwd=tmp_path)
    assert (chosen, gap) == ("reference", "the_cpu_extension_is_not_built_(python_setup.py_build_ext_--inplace)")
