"""``advkd toy``: a process for each data set with all rows in turn, each kept when it is done, and the page."""

import functools
import hashlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...runtime.devices import plain_defaults, threads
from ...runtime.files import read_tensors, restoring, write_bytes, write_json, write_tensors
from ...runtime.folders import locked, remove_leftovers, require_output_folder
from ...runtime.progress import progress_bar
from ...runtime.timing import processor_identity, provenance
from ...runtime.workers import run_in_processes
from ..html_page import provenance_of, self_contained
from .data import DATA
from .laboratory import Laboratory, Outcome
from .methods import ROWS
from .page import Section, left_out, numbers_of
from .solvers import exact_teacher, solvers

PAGE, NUMBERS = "toy.html", "toy.json"
"""Files of the page and of its numbers, in the output folder."""
BOTH = "both"
"""Name of all data sets together."""
ALWAYS: dict[str, Callable[[Laboratory], Outcome]] = {"teacher": exact_teacher, "solvers": solvers}
"""Rows without a student."""
PARTS = ("samples", "paths", "weights")
"""Tensors of an outcome."""
FEWEST = 1000
"""Least number of samples: so many points of the data itself keep all modes in 199 of 200 runs."""


@dataclass
class ToyConfig:
    """Options of ``advkd toy``.

    Attributes:
        data: 25-gaussians, two-moons or both.
        methods: rows of the page, separated by commas, or ``all``; rows that they begin with are shown, too.
        updates_scale: factor of every method's number of updates.
        samples: points that every picture is measured with.
        seed: of weights and draws.
    """

    data: str = BOTH
    methods: str = "all"
    updates_scale: float = 1.0
    samples: int = 4000
    seed: int = 0

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        if self.data not in (*DATA, BOTH):
            raise InputError(f"data must be {', '.join(DATA)} or {BOTH}, got {self.data!r}")
        unknown = [name for name in self.methods.split(",") if name not in ROWS] if self.methods != "all" else []
        if unknown:
            raise InputError(f"methods must be all, or some of {', '.join(ROWS)}, got {unknown[0]!r}")
        for name, holds, wanted in (
            ("updates_scale", 0 < self.updates_scale < math.inf, "positive and finite"),
            ("samples", FEWEST <= self.samples <= 10**6, f"from {FEWEST:,} to 1,000,000"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def rows(self) -> list[str]:
        """Rows that were chosen and those that they begin with, in the page's order."""
        if self.methods == "all":
            return list(ROWS)
        wanted = set(self.methods.split(","))
        for name in reversed(ROWS):
            wanted |= set(ROWS[name].after) if name in wanted else set()
        return [name for name in ROWS if name in wanted]


@plain_defaults()
def write_toy(config: ToyConfig, out: str | Path, progress: bool = True) -> Path:
    """Run every row that is not kept yet, and write ``toy.html`` and ``toy.json``; a killed run goes on.

    Args:
        config: what is shown.
        out: folder for the page, its pictures, and the rows' results.
        progress: show a bar.

    Returns:
        The page.

    Raises:
        InputError: a configuration or a folder that cannot be, or a script that does not call this under
            ``if __name__ == "__main__":``, where both data sets have a process of their own; nothing was started.
        TrainingError: a data set's process failed or was killed; finished rows are kept.

    Examples:
        >>> write_toy(ToyConfig(data="two-moons", methods="pairs,reflow"), "toy")
    """
    config.validate()
    out = require_output_folder(out)
    names = list(DATA) if config.data == BOTH else [config.data]
    side_by_side = torch.get_num_threads() > 1 and not multiprocessing.current_process().daemon
    with locked(out), threads(1):
        remove_leftovers(out / "kept")
        missing = [name for name in names if not all(path.exists() for path in _paths(name, config, out).values())]
        if side_by_side and len(missing) > 1:
            arguments = [(name, config, out, progress and name == missing[0]) for name in missing]
            run_in_processes(_keep_rows, arguments, out, "data set's", "finished rows are kept")
            missing = []
        sections = [Section(_keep_rows(name, config, out, progress and name in missing), out / "pictures") for name in names]
        with progress_bar(total=len(names), desc="toy: pictures", shown=progress) as bar:
            body = [part for section in sections for part in _told(section, bar)]
        result: dict[str, Any] = {"config": vars(config), "provenance": provenance()}
        body += [left_out(config.rows()), "<h2>Where this was measured</h2>", provenance_of(result)]
        write_json(out / NUMBERS, {"data": {section.data.name: numbers_of(section) for section in sections}, **result})
        write_bytes(out / PAGE, self_contained("Every method and every solver on a plane", body).encode())
    return out / PAGE


def _paths(name, config, out):
    """Where the rows of a data set are kept."""
    return {row: out / "kept" / f"{name}-{row}-{_key(name, row, config)}.safetensors" for row in (*ALWAYS, *config.rows())}


def _keep_rows(name, config, out, shown):
    """All rows of a data set: read, or run and kept."""
    lab, paths = Laboratory(DATA[name](), config.samples, config.seed, config.updates_scale), _paths(name, config, out)
    with progress_bar(total=len(paths), desc=f"toy: {name}", shown=shown) as bar:
        for row, path in paths.items():
            bar.set_postfix_str(row)
            if not path.exists():
                _run(lab, row, path)
            lab.outcomes[row] = _read(path)  # a page of kept rows is that of fresh ones
            bar.update()
    return lab


def _told(section, bar):
    body = section.body()
    bar.update()
    return body


def _run(lab, row, path):
    start = time.perf_counter()
    outcome = (ALWAYS[row] if row in ALWAYS else ROWS[row].run)(lab)
    tensors = {f"{part}/{title}": tensor for part in PARTS for title, tensor in getattr(outcome, part).items()}
    order = {part: list(getattr(outcome, part)) for part in PARTS}
    facts = {"evaluations": outcome.evaluations, "numbers": outcome.numbers, "cost": outcome.cost, "order": order}
    facts["seconds"] = time.perf_counter() - start
    write_tensors(path, tensors, facts)


def _read(path):
    """A kept outcome; its titles in their first order, as headers are sorted."""
    what, remedy = "kept row", "delete it and run again"
    tensors, facts = read_tensors(path, what, ("evaluations", "numbers", "cost", "seconds", "order"), remedy)
    with restoring(what, path, remedy):
        parts = {part: {title: tensors[f"{part}/{title}"] for title in facts["order"][part]} for part in PARTS}
        values = {name: facts[name] for name in ("evaluations", "numbers", "seconds")}
        return Outcome(**parts, **values, cost=tuple(facts["cost"]))


def _key(name, row, config):
    """Digest of all that a row's result depends on: the configuration, the code, and what computes."""
    computing = [source_digest(), torch.__version__, processor_identity(), torch.backends.cpu.get_cpu_capability()]
    values = [name, row, config.updates_scale, config.samples, config.seed, *computing]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@functools.cache
def source_digest() -> str:
    """Hexadecimal SHA-256 of the package's Python files and extensions, the code's version."""
    package = Path(__file__).resolve().parents[2]
    state = hashlib.sha256()
    for path in sorted((*package.rglob("*.py"), *package.glob("*.so"))):
        state.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()
