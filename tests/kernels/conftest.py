"""The stand-in for CuPy that runs CUDA kernels on the host."""

import contextlib
import sys
import types

import pytest

from advkd.ops import cuda
from advkd.runtime.extension import extension_gap

from .cuda_on_host import HostModule


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory, request):
    """Libraries of the session; the workers of pytest-xdist share them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "cuda"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def cupy_on_host(host_folder, monkeypatch):
    assert extension_gap("cpu") is None, "the CPU object plans the launches"
    stand_in = types.SimpleNamespace(RawModule=lambda code, options: HostModule(code, options, host_folder))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(cuda, "limits", lambda device: [108, 227 * 1024, 9])
    monkeypatch.setattr(cuda, "_current", lambda device: contextlib.nullcontext())
    cuda.compiled.cache_clear()
    yield
    cuda.compiled.cache_clear()
