"""The part that builds both objects, unless those that are there are of these sources and load."""

import os
import runpy
import sys

import torch

from ..evidence import ROOT
from .part import logged

BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]
REHEARSED = "9.0a"
"""The architecture that a rehearsal builds for."""


def build(part):
    """Objects of these sources that load are used; else both are built, for this card's architecture alone."""
    flag = architecture(torch.cuda.get_device_capability()) if torch.cuda.is_available() else REHEARSED
    stale = stale_objects()
    if not stale and part.run("prebuilt", lambda: _load(part))["state"] == "done":
        return {"prebuilt": True}
    part.items.pop("prebuilt", None)
    # Where no new one can be built, none is better than one whose tests would stand for other sources.
    for path in stale:
        path.unlink(missing_ok=True)
    part.run("compile", lambda: logged(BUILD, part, build_environment(flag)))
    part.run("load", lambda: _load(part))
    return {"prebuilt": False, "architectures": flag}


def build_environment(architectures):
    """Environment in which :data:`BUILD` must build both objects; ``architectures``: as in TORCH_CUDA_ARCH_LIST."""
    return {**os.environ, "ADVKD_CPU": "1", "ADVKD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}


LOADS = """
import sys
from advkd.ops.registry import extension_gap
gaps = [gap for gap in map(extension_gap, sys.argv[1:]) if gap]
print(*gaps, sep="\\n")
sys.exit(bool(gaps))
"""


def _load(part):
    """Load the objects in a fresh process; without a GPU that of the CPU alone."""
    kinds = ("cpu",) if part.rehearse else ("cuda", "cpu")
    return logged([sys.executable, "-c", LOADS, *kinds], part)


def stale_objects(root=ROOT):
    """Paths of the objects that are not there, or were linked from other sources than those that are."""
    identity = runpy.run_path(str(root / "setup.py"), run_name="setup")["source_identity"]
    paths = {kind: root / "advkd" / f"_{kind}.abi3.so" for kind in ("cpu", "cuda")}
    return [path for kind, path in paths.items() if not _is_of(path, identity(kind))]


def _is_of(path, identity):
    return path.exists() and bytes.fromhex(identity) in path.read_bytes()


def architecture(capability):
    """A card's entry of TORCH_CUDA_ARCH_LIST."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if major >= 9 else "")
