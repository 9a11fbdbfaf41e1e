"""The teacher's samples of an evaluation, recorded once and kept in the cache."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..data.dataset_info import TrajectoryConfig, same_teacher
from ..data.trajectories import Trajectories
from ..diffusion.guidance import ALL, joined
from ..diffusion.recorder import record_in_processes, record_trajectories
from ..diffusion.teacher import Teacher
from ..errors import InputError
from .kept_images import Condition

TOLD = ("classes", "guidance")
"""Fields of a recording that were none when the first caches were filled."""


def recording_of(teacher: Teacher, num: int, seed: int, classes: Sequence[str], guidance: float) -> TrajectoryConfig:
    """The recording of the teacher's samples beside a student's.

    Args:
        teacher: the teacher.
        num: number of samples.
        seed: of their noise.
        classes: names of the classes that the student's images take in turn; empty of an unconditional student.
        guidance: weight w of guidance towards them.

    Returns:
        A recording of these classes, or of no class by an unconditional teacher.

    Raises:
        InputError: classes or a weight that the teacher cannot be told, or guidance where there are no classes.
    """
    names = tuple(classes) if teacher.num_classes else ()
    if guidance and not names:
        raise InputError("--guidance is towards classes, which student and teacher must have: leave it out")
    told = ALL if names and names == tuple(teacher.class_names) and ALL not in names else joined(names)
    Condition.of(teacher, told, guidance)
    return TrajectoryConfig(num=num, seed=seed, classes=told, guidance=guidance)


def kept_recording(
    source: str | Path, teacher: Teacher, recording: TrajectoryConfig, cache: Path, processes: int, progress: bool
) -> Path:
    """The recording, from the cache or drawn now; the folder's name is a hash of all that it depends on.

    Args:
        source: what ``teacher`` was loaded from.
        teacher: the teacher.
        recording: see :func:`recording_of`.
        cache: folder that the recording's folder is in.
        processes: local processes that draw.
        progress: show a bar.

    Returns:
        Its folder.

    Raises:
        InputError: the cache's folder holds something else.
    """
    values = {name: value for name, value in asdict(recording).items() if recording.classes or name not in TOLD}
    depends = json.dumps([{**teacher.identity(), "name": None}, values], sort_keys=True)
    folder = cache / f"teacher-{hashlib.sha256(depends.encode()).hexdigest()[:32]}"
    if (folder / "manifest.json").exists():
        info = Trajectories(folder, option="the cache's").info
        same = all(getattr(info, key) == getattr(recording, key) for key in ("solver", "num", "start", "seed", "depth", *TOLD))
        if not same or not same_teacher(info.teacher, teacher.identity()):
            raise InputError(f"the cache's {folder} holds other samples than its name says: delete it")
        return folder
    if processes > 1:
        return record_in_processes(source, recording, folder, processes, progress)
    return record_trajectories(teacher, recording, folder, progress)
