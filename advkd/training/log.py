"""A run's metrics: ``metrics.csv`` and TensorBoard's file."""

import contextlib
import csv
import itertools
import os
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from ..data.pictures import METRICS_LIMIT
from ..runtime.files import require_regular, require_there, restoring, synchronize, write_bytes
from ..runtime.folders import writing


class Log:
    """Metrics of a run: a row averages ``every`` updates of a stage (the last row of a stage those that are left).

    Args:
        out: folder of the run.
        columns: names of the metrics.
        reached: (stage, update) of the checkpoint that the run goes on from; rows after it are dropped, torn ones too.
        done: updates before it.
        every: updates in a row.
    """

    def __init__(self, out: Path, columns: Sequence[str], reached: tuple[int, int], done: int, every: int):
        self.columns = ["stage", "update", *columns]
        self.path, self.every = out / "metrics.csv", every
        self.pending: list[dict[str, float]] = []
        kept = [",".join(self.columns)]
        if os.path.lexists(self.path):
            require_regular(self.path, "metrics", METRICS_LIMIT)
            with restoring("metrics", self.path, "move it away"):
                with open(self.path, encoding="utf-8") as file:
                    if file.readline().strip() != kept[0]:
                        raise ValueError("its columns are others")
                    kept += _rows_until(reached, file, len(self.columns))
        write_bytes(self.path, ("\n".join(kept) + "\n").encode())
        self.updates = done
        self.file = open(self.path, "a", newline="")
        self.writer = csv.DictWriter(self.file, self.columns, restval="", lineterminator="\n")
        self.board = Board(out / "tensorboard", self.updates)

    def write(self, stage: int, update: int, metrics: dict[str, float], last: bool = False) -> None:
        """Add an update's metrics; ``last``: of its stage."""
        self.pending.append(metrics)
        self.updates += 1
        if not last and update % self.every:
            return
        names = dict.fromkeys(name for row in self.pending for name in row)
        means = {name: statistics.fmean(row[name] for row in self.pending if name in row) for name in names}
        self.pending = []
        with writing(self.path):
            self.writer.writerow({"stage": stage, "update": update} | {k: f"{v:.9g}" for k, v in means.items()})
            self.file.flush()
        self.board.write(means, self.updates - 1)

    def secure(self) -> None:
        """Bring the rows to the disk before a checkpoint says that they are there; refuse to go on where the file has gone."""
        require_there(self.file, self.path)
        with writing(self.path):
            synchronize(self.file.fileno())

    def close(self) -> None:
        """Write what is left."""
        with contextlib.closing(self.board), writing(self.path):
            self.file.close()


def _open_first(paths):
    """The first of some paths where no file lies yet, opened: two runs of one second have a file each."""
    for path in paths:
        with contextlib.suppress(FileExistsError):
            return path, open(path, "xb")


class Board:
    """TensorBoard's file of a run's scalars; those of updates from ``first`` on in earlier files are void.

    torch's writer does the same in a thread of its own, which meets a full disk with a traceback.
    """

    def __init__(self, folder: Path, first: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        start = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        with writing(folder / start):
            folder.mkdir(exist_ok=True)
            self.path, self.file = _open_first(folder / f"{start}.{i}" for i in itertools.count())
        self.records = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"), first)
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first)

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Add numbers by name."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(Event(summary=Summary(value=values)), step)

    def _add(self, event, step):
        event.step, event.wall_time = step, time.time()
        with writing(self.path):
            self.records.write(event.SerializeToString())
            self.file.flush()

    def close(self) -> None:
        """Write what is left."""
        with writing(self.path):
            self.file.close()


def _rows_until(reached, lines, columns):
    """Yield a table's rows up to a (stage, update); ``ValueError`` where one of them is torn or they are not in order."""
    before = ()
    for line in lines:
        if not line.endswith("\n"):
            return
        cells = line.split(",")
        place = tuple(map(int, cells[:2])) if len(cells) > 2 and all(cell.isdecimal() for cell in cells[:2]) else ()
        if not place or len(cells) != columns:
            if before < reached and place <= reached:
                raise ValueError("a row is torn")
            continue
        if place <= before:
            raise ValueError("its rows are not in order")
        before = place
        if place <= reached:
            yield line[:-1]
