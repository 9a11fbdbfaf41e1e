"""Damaged files of every kind that is read: refused by name, or read as they stand; never a traceback, never a loss.

``python -m profiling.limits.damaged_files --count 12000``. Case i is a function of the seed and i alone: the kind, the mutation
and its draws, which are repeated until the file says something else. Cases run in forked processes, each with a limit of time
and of memory.
"""

import hashlib
import random
import shutil
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from tqdm import tqdm

from advkd.errors import InputError

from .damage import OTHERS, damage, mutations
from .file_kinds import KINDS
from .file_readers import Anything
from .record import judge_in_processes, main
from .samples import Refused, make_samples

BATCH, SECONDS, MEMORY = 50, 20, 2**31
"""Cases of a process, and the seconds and the further bytes of memory that one may take."""


ROUND = [name for name, kind in KINDS.items() for _ in range(1 if kind.costly else 6)]
"""The kinds of successive cases, again and again."""


class Workplace:
    """The undamaged samples below a folder, the result of each kind's reader on them, and the room for one case.

    Samples are made where cases are laid out: paths that a sample holds are the same in its cases.
    """

    def __init__(self, folder):
        # Threads of the parent are not there behind a fork.
        tqdm.monitor_interval = 0
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_num_threads(1)
        self.samples, self.case = folder / "samples", folder / "case"
        self.case.mkdir()
        make_samples(self.case)
        self.case.rename(self.samples)
        self.whole = {name: self._read_whole(name) for name, kind in KINDS.items() if kind.readable}

    def _read_whole(self, name):
        self.lay_out(KINDS[name])
        found = canonical(KINDS[name].read(self.case))
        if found is None:
            raise RuntimeError(f"the reader of {name} returns nothing to compare")
        expected = KINDS[name].expected
        if expected and not same(found, canonical(expected(self.samples))):
            raise RuntimeError(f"the reader of {name} finds something else than was written, though nothing is damaged")
        return found

    def lay_out(self, kind):
        """A fresh copy of all that a kind's reader needs."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        for name in {kind.folder, *kind.beside}:
            shutil.copytree(self.samples / name, self.case / name)


def case_of(seed, number):
    """Kind, mutation and generator of a case."""
    turn, place = divmod(number, len(ROUND))
    name = ROUND[place]
    kind, earlier = KINDS[name], turn * ROUND.count(name) + ROUND[:place].count(name)
    choice = mutations(kind.form, kind.has_other)
    # No number of mutations has the divisor 13, and neighbours begin with different ones: a round tries all of them.
    return name, choice[(13 * earlier + list(KINDS).index(name)) % len(choice)], random.Random(f"{seed} {number}")


def judge(place, seed, number):
    """``(kind, outcome, detail)`` of a case."""
    name, mutation, draw = case_of(seed, number)
    kind = KINDS[name]
    place.lay_out(kind)
    file = place.case / kind.file
    strange = KINDS[draw.choice([other for other in KINDS if KINDS[other].form != kind.form])]
    others = [(place.samples / other).read_bytes() for other in (kind.other or kind.file, strange.file)]
    mutation, data = damage(draw, file.read_bytes(), kind.form, mutation, others)
    file.write_bytes(data)
    (place.case / "damaged").write_bytes(data)
    before = contents(place.case)
    try:
        outcome, detail = _outcome(place, name, mutation)
    except Exception:
        outcome, detail = "crashed", traceback.format_exc(limit=-6)
    spared = kind.written if outcome == "right" else ()
    after = contents(place.case)
    if lost := [path for path in before if after.get(path) != before[path] and not path.startswith(spared or ("\0",))]:
        outcome, detail = "lost", f"{', '.join(lost)}: {outcome} {detail}"
    return name, outcome, f"{mutation}: {detail}"


def _outcome(place, name, mutation):
    kind = KINDS[name]
    try:
        found = kind.read(place.case)
    except (Refused, InputError) as error:
        return _refusal(kind, error, place)
    if found is not None and same(canonical(found), place.whole.get(name)):
        return "right", "as it was"
    # Pictures have an end, too: half of one is none.
    sealed = kind.sealed or (kind.form == "image" and mutation == "truncated")
    if kind.meaning is None or (sealed and mutation != OTHERS[0]):
        return "wrong", "something else than was written is read"
    try:
        meant = kind.meaning(place.case)
    except Exception as error:
        return "wrong", f"it is read, and means nothing ({type(error).__name__}: {error})"
    if isinstance(meant, Anything) or same(canonical(found), canonical(meant)):
        return "right", "as it stands"
    return "wrong", "something else than it says is read"


def _refusal(kind, error, place):
    """A refusal is one line of the command line, exit code 2, and names the file, or what else its kind allows."""
    text = str(error)
    if isinstance(error, Refused):
        text = text.splitlines()[-1] if text else ""
        if error.code != 2 or not text.startswith("advkd: ") or "Traceback" in str(error):
            return "crashed", f"exit code {error.code}: {error}"
    folders = {"case": place.case, "folder": (place.case / kind.file).parent}
    if not any(name in text for name in (kind.file, *(name.format(**folders) for name in kind.named))):
        return "crashed", f"a refusal that does not name the file: {text}"
    return "refused", text


def canonical(value):
    """A value as something that can be compared, bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: canonical(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(part) for part in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value.hex()
    return value


def same(found, wanted):
    """True if two values are alike; numbers of a file may be whole or not."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in found)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(found, bool) != isinstance(wanted, bool):
        return False
    return wanted == found


def contents(folder):
    """Digests of all files below a folder, but for locks."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in paths}


def run(campaign, cases):
    """Run cases in processes of their own and add their outcomes."""
    with tempfile.TemporaryDirectory(prefix="damaged-") as folder:
        run_in(Workplace(Path(folder)), campaign, cases)


def run_in(place, campaign, cases):
    """:func:`run` in a workplace that is there."""

    def judged(number):
        name, mutation, _ = case_of(campaign.seed, number)
        yield {"kind": name, "detail": f"{mutation}:"}
        _, outcome, detail = judge(place, campaign.seed, number)
        yield {"kind": name, "outcome": outcome, "detail": detail}

    judge_in_processes(campaign, cases, judged, BATCH, SECONDS, MEMORY)


if __name__ == "__main__":
    main("damaged-files", __doc__.splitlines()[0], run, 12_000)
