"""The GPU kernels that there are: sources, a digest of them, the tests that run them on a device, and what these last said."""

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from advkd.ops import cupy_modules

from .paths import RESULTS, ROOT

KINDS = {"cuda": "CUDA C++", "triton": "Triton"}


@dataclass(frozen=True)
class Family:
    """The kernels of one source file.

    Attributes:
        kind: of :data:`KINDS`.
        name: of the op.
    """

    kind: str
    name: str

    @property
    def key(self):
        """How results name the family."""
        return f"{self.kind} {self.name}"

    @property
    def source(self):
        """Path below the root."""
        return f"csrc/cuda/{self.name}.cu" if self.kind == "cuda" else f"kernels/{self.name}.py"

    def digest(self):
        """Of the device code: the source with its headers, or the Triton file and those that it imports from beside it."""
        text = cupy_modules.source(self.name) if self.kind == "cuda" else "".join(_triton_sources(self.name))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def tested_by(self, test):
        """Whether a GPU test, as pytest names it, runs these kernels."""
        file = test.partition("::")[0].rpartition("/")[2]
        other = "triton" if self.kind == "cuda" else "cuda"
        if file == f"test_training_{self.kind}.py":
            return self.name in test.partition("::")[2]
        own = f"test_{self.name}"
        if not (file == own + ".py" or file.startswith(own + "_")) or other in file:
            return False
        return self.kind == "cuda" or "gpu_sources" not in file


def families():
    """Every family, from the files that are there."""
    cuda = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu") if not path.stem.startswith("register"))
    triton = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem != "__init__")
    return [*(Family("cuda", name) for name in cuda), *(Family("triton", name) for name in triton)]


def digests():
    """``{family's key: digest}`` of the sources as they are."""
    return {family.key: family.digest() for family in families()}


def _triton_sources(name, seen=None):
    """The text of a kernel file and of those beside it that it imports."""
    seen = set() if seen is None else seen
    path = ROOT / "kernels" / f"{name}.py"
    if name in seen or not path.exists():
        return []
    seen.add(name)
    text, texts = path.read_text(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                texts += _triton_sources(module, seen)
    return [text, *texts]


def last_run(family, folder=RESULTS):
    """What a device last made of the family's tests: ``{device, commit, date, passed, failed, stale}``, or None."""
    found = []
    for path in sorted(Path(folder).glob("*/gpu_tests.json")):
        stored = json.loads(path.read_text())
        own = {t: o["outcome"] for t, o in stored["result"].get("tests", {}).items() if family.tested_by(t)}
        ran = [outcome for outcome in own.values() if outcome != "skipped"]
        if not ran or stored["result"]["gaps"].get(family.kind):
            continue
        where = stored["provenance"]
        found.append(
            {
                "device": where["device"],
                "commit": where["commit"],
                "date": stored["date"],
                "passed": ran.count("passed"),
                "failed": len(ran) - ran.count("passed"),
                "stale": stored["kernels"].get(family.key) != family.digest(),
            }
        )
    return max(found, key=lambda run: run["date"], default=None)
