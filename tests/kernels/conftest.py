"""The stand-in for CuPy that runs CUDA kernels on the host."""

import contextlib
import sys
import types

import pytest

from advkd.ops import cupy_modules

from .cuda_on_host import HostModule


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture
def cupy_on_host(host_folder, monkeypatch):
    stand_in = types.SimpleNamespace(RawModule=lambda code, options: HostModule(code, options, host_folder))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(cupy_modules, "_current", lambda device: contextlib.nullcontext())
    cupy_modules.compiled.cache_clear()
    yield
    cupy_modules.compiled.cache_clear()
