"""Results of earlier runs that stand for the sources as they are: tests, benchmark cases and whole parts to pass over.

Results of other sources, or of another torch or Triton, say nothing. A test's result stands for all code of the package and for
the test's own file; a measurement's for the package and for the benchmark with what it shares with others.
"""

import functools
import hashlib
from pathlib import Path

from advkd.runtime.timing import provenance

from ..evidence import ROOT, module_of
from ..harness import is_green
from .summary import cases_of, read_json

CODE = (".py", ".cu", ".cuh", ".h", ".cpp")


def tree_digest(folders, root=ROOT, tests=True):
    """SHA-256 of all code below the folders, in short; without ``tests`` only what the tests share."""
    sha = hashlib.sha256()
    for folder in folders:
        paths = [root / folder] if (root / folder).is_file() else sorted((root / folder).rglob("*"))
        for path in paths:
            if path.suffix in CODE and (tests or not path.name.startswith("test_")):
                sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:16]


@functools.cache
def _shared_digest():
    return tree_digest(("advkd", "kernels", "csrc", "setup.py", "tests"), tests=False)


@functools.cache
def test_digest(file):
    """SHA-256 of a test file (a path below the root) and of the code that its tests run, in short; None without the file."""
    path = ROOT / file
    return hashlib.sha256(path.read_bytes() + _shared_digest().encode()).hexdigest()[:16] if path.exists() else None


LAUNCHED = {"ncu": ("profiling.cases.conv_block", "profiling.gpu.parts")}
"""Part -> the modules that hold what it measures, beside the one that measures."""


def measured_digest(name):
    """SHA-256 of the code that a part's measurements depend on, in short."""
    modules = (module_of(name), "profiling.harness", "profiling.peers", *LAUNCHED.get(name, ()))
    files = [module.replace(".", "/") + ".py" for module in modules]
    return tree_digest(("advkd", "kernels", "csrc", "setup.py", *(file for file in files if (ROOT / file).exists())))


def known_tests(folder, outcomes=("passed",)):
    """``{test: entry}`` of tests with these outcomes on the sources as they are."""
    found = _stored(folder, "tests")["result"].get("tests", {})
    wanted = {test: entry for test, entry in found.items() if entry["outcome"] in outcomes}
    return {test: entry for test, entry in wanted.items() if entry.get("of") == test_digest(test.partition("::")[0])}


def cases(folder, name):
    """``{case: result}`` of a benchmark's green cases behind a green gate, of the sources as they are."""
    found = _stored(folder, name, measured_digest(name))
    green = found["result"].get("gate", {}).get("state") == "green"
    return {case["case"]: case for case in cases_of(found) if is_green(case)} if green else {}


def whole_part(folder, name):
    """The stored file of a part that has neither tests nor cases and has passed, or None where it must run."""
    found = _stored(folder, name, measured_digest(name)) if name in WHOLE else NOTHING
    return found if found["state"] == "passed" else None


WHOLE = ("rates", "memcheck", "racecheck", "first_image", "ncu")
"""Parts that one result of the sources as they are stands for."""
NOTHING = {"state": None, "result": {}}


def _stored(folder, name, sources=None):
    """The stored result of a part, by these versions (and of these sources)."""
    found, now = read_json(Path(folder) / f"gpu_{name}.json", NOTHING), _versions()
    known = found.get("provenance", {}).get("versions", {})
    same = all(known.get(version, "none") == now[version] for version in ("torch", "triton"))
    return found if same and sources in (None, found.get("sources")) else NOTHING


@functools.cache
def _versions():
    return provenance()["versions"]
