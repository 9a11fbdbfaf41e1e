"""What an earlier run has said of the sources as they are: tests, benchmark cases and whole parts that need not run again.

Results of other sources, or of another torch or Triton, say nothing. A test's result stands for all code of the package and for
the test's own file; a measurement's for the kernels that it measures.
"""

import functools
import hashlib
import json
from pathlib import Path

from advkd.timing import provenance

from . import kernel_digests
from .gpu_kernels import digests
from .paths import ROOT

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
    """What a test's result depends on: the file (a path below the root) and the code that it runs."""
    path = ROOT / file
    return hashlib.sha256(path.read_bytes() + _shared_digest().encode()).hexdigest()[:16] if path.exists() else None


def passed_tests(folder):
    """``{test: entry}`` of tests that passed on the sources as they are."""
    stored = _stored(folder, "tests")
    found = stored["result"].get("tests", {}) if stored and _same_versions(stored) else {}
    passed = {test: entry for test, entry in found.items() if entry["outcome"] == "passed"}
    return {test: entry for test, entry in passed.items() if entry.get("of") == test_digest(test.partition("::")[0])}


def cases(folder, name):
    """``{case: result}`` of a benchmark's cases whose kernels are as they were."""
    stored = _stored(folder, name)
    if not stored or not _same_versions(stored) or kernel_digests.changed(f"gpu_{name}", stored):
        return {}
    return {case["case"]: case for case in stored["result"].get("cases", [])}


def whole_part(folder, name):
    """The stored result of a part that has neither tests nor cases, or None where it must run."""
    stored = _stored(folder, name)
    if name in ("build", "tests", "first_tests", "warm") or name.startswith("bench_") or not stored:
        return None
    same = stored["state"] == "passed" and stored["kernels"] == digests() and _same_versions(stored)
    return stored if same else None


def _same_versions(stored):
    known, now = stored["provenance"]["versions"], _versions()
    return all(known.get(name) == now[name] for name in ("torch", "triton"))


@functools.cache
def _versions():
    return provenance()["versions"]


def _stored(folder, name):
    path = Path(folder) / f"gpu_{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
