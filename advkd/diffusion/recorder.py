"""Distillation data: the teacher's paths, reduced to what the student's submodules imitate.

A data set is a folder of shards (safetensors, float16) and a ``manifest.json``, which is written once all shards are there.
A latent teacher's levels are averages of latents, and its autoencoder lies beside the shards, in ``vqvae``.
Shard s holds samples ``[s * shard_size, (s + 1) * shard_size)``; it depends on the data set's description alone, so that on
one kind of machine every run writes the same bytes (another processor, or a compiled network, rounds differently).
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..data.dataset_info import DatasetInfo, TrajectoryConfig, differences
from ..data.labels import labels_in_turn
from ..data.levels import downsample, resolutions, supervising_timesteps
from ..data.shards import SHARED_INFO, finish, is_of_older_version, missing_shards
from ..data.trajectories import shard_path
from ..errors import InputError
from ..models.autoencoder import PARTS
from ..ops.latents import check_latent, project
from ..runtime import launcher
from ..runtime.files import digest, read_json, with_digest, write_json, write_tensors
from ..runtime.folders import locked, require_output_folder
from ..runtime.progress import progress_bar
from ..runtime.ranges import named
from ..runtime.workers import run_in_processes
from .guidance import ALL, class_numbers, classes_of, joined
from .solvers import Solver
from .teacher import Teacher


def record_trajectories(teacher: Teacher, config: TrajectoryConfig, out: str | Path, progress: bool = True) -> Path:
    """Run the teacher and store its trajectories under ``out``; finished shards of an earlier, killed run are kept.

    Args:
        teacher: the :class:`Teacher`, in the precision that :meth:`Teacher.optimize` gave it; the data set's manifest names it.
        config: a :class:`TrajectoryConfig`.
        out: the data set's folder, made where it is missing.
        progress: show a bar that counts samples (of process 0).

    Returns:
        The folder. Under ``torchrun`` or ``accelerate launch`` process r of w writes the shards r, r + w, ...; the one that
        finds all shards present writes the manifest, and the others may return before that.

    Raises:
        InputError: bad configuration, too little disk, or ``out`` holds shards of another data set or damaged ones.
    """
    rank, world = launcher.processes()
    config.validate()
    info, out = _describe(teacher, config), require_output_folder(out)
    with _shared(out, info) if world > 1 else _alone(out):
        finished = _record(teacher, info, out, rank, world, progress)
    if world == 1 and not finished:
        raise InputError(f"--out {out} has lost shards while it was written to: run the same command again")
    return out


@contextlib.contextmanager
def _alone(out):
    """Hold ``out`` for one run, whatever earlier ones that wrote nothing were to record."""
    with locked(out):
        (out / SHARED_INFO).unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _shared(out, info):
    """Hold ``out`` for the processes of a launcher; a run for another data set is refused before it computes."""
    with locked(out, shared=True):
        write_json(out / SHARED_INFO, info.to_json(), once=True)
        try:
            other = read_json(out / SHARED_INFO, "recipe")
        except InputError as error:
            if os.path.lexists(out / SHARED_INFO):
                raise InputError(f"{error}: remove it if no other process writes there") from error
            other = info.to_json()  # another process has just finished the data set
        if changed := differences(info.to_json(), other):
            said = f"--out {out} is for trajectories made with another {', '.join(changed)}: name another folder"
            raise InputError(f"{said}, or remove {out / SHARED_INFO} if no other process writes there")
        yield


def _record(teacher, info, out, rank, world, progress):
    """Record the shards of this process that are not there, and the manifest if they were the last; return True if so."""
    _record_missing(teacher, info, out, rank, world, progress)
    with named("write"):
        return finish(out, info)


def _record_missing(teacher, info, out, rank, world, progress):
    """Record the shards of this process that are not there."""
    mine = [shard for shard in missing_shards(out, info) if shard % world == rank]
    if teacher.autoencoder is not None and rank == 0:
        teacher.autoencoder.save_pretrained(out / PARTS[0])
    older = bool(mine) and is_of_older_version(out)
    bar = progress_bar(total=len(mine) * info.shard_size, desc="trajectories", unit="sample", shown=progress and rank == 0)
    # One shard is written while the next one is made; no more, to bound memory.
    with bar, ThreadPoolExecutor(1) as writer:
        written = None
        for shard in mine:
            batches = _run_shard(teacher, info, shard, bar, written)
            _wait(written)
            written = writer.submit(_write_shard, out, info, shard, batches, older)
        _wait(written)


def _wait(written):
    """Wait until a shard is written; raise its failure here."""
    if written is not None:
        with named("write"):
            written.result()


def record_in_processes(
    source: str | Path,
    config: TrajectoryConfig,
    out: str | Path,
    processes: int,
    progress: bool = True,
    *,
    compiled: bool | None = None,
    autocast: bool = False,
) -> Path:
    """:func:`record_trajectories` by local processes of one thread each, which on CPUs beats one process of as many threads.

    ``source`` is for :meth:`Teacher.from_pretrained`, ``compiled`` and ``autocast`` (bfloat16) for :meth:`Teacher.optimize`.
    Bad input is refused before processes start; they import the caller's script: call it under ``if __name__ == "__main__":``.

    Raises:
        InputError: bad input, a script without that guard, or one that cannot be imported (standard input).
        TrainingError: a process failed or was killed; the finished shards are kept.
    """
    if processes < 1:
        raise InputError(f"processes must be at least 1, got {processes}")
    loading = (source, compiled, autocast)
    config.validate()
    info, out = _describe(_load(*loading), config), require_output_folder(out)
    with _alone(out):
        missing_shards(out, info)
        arguments = [(loading, config, out, rank, processes, progress) for rank in range(processes)]
        run_in_processes(_record_as, arguments, out, "recording", "the finished shards are kept")
    return out


def _load(source, compiled, autocast):
    with named("load"):
        return Teacher.from_pretrained(source).optimize(compiled, torch.bfloat16 if autocast else None)


def _record_as(source, config, out, rank, world, progress):
    """Record one process' shards."""
    with named("trajectories"):
        teacher = _load(*source)
        _record(teacher, _describe(teacher, config), out, rank, world, progress)


def _describe(teacher, config):
    """:class:`DatasetInfo` of what a teacher and a configuration give."""
    channels, size = teacher.shape[:2]
    sides = resolutions(size, config.depth)
    solver = Solver(config.solver, config.spacing)
    timesteps = teacher.timesteps(solver, config.steps or None)
    latent_size = config.latent_size or (1 if config.detail_noise else size // 4 if size <= 32 else 4)
    check_latent(size, latent_size, config.detail_noise)
    chosen = {"solver": solver.name, "steps": len(timesteps), "latent_size": latent_size, **_classes(teacher, config)}
    return DatasetInfo(
        **{**vars(config), **chosen},
        paired=not (solver.stochastic or teacher.latent),
        teacher=teacher.identity(solver),
        image_channels=channels,
        image_size=size,
        resolutions=sides,
        timesteps=supervising_timesteps(solver.name, config.depth, timesteps, teacher.train_timesteps),
    )


def _classes(teacher, config):
    """Fields of :class:`DatasetInfo` about classes: equal ones for equal classes, however they were named."""
    numbers, guidance = class_numbers(teacher, teacher.class_names, config.classes or None), float(config.guidance)
    classes_of(teacher, len(numbers), numbers or None, guidance, None)
    names = [teacher.class_names[number] for number in numbers]
    every = numbers == list(range(teacher.num_classes)) and ALL not in names
    classes = ALL if numbers and every else joined(names)
    return {"classes": classes, "guidance": guidance, "class_numbers": numbers, "class_names": names}


def _run_shard(teacher, info, shard, bar, written):
    """The shard's batches, on their way to the host; a failure to write the one before (``written``) ends the work at once."""
    start, batches = shard * info.shard_size, []
    for offset in range(0, info.shard_count(shard), info.batch_size):
        batches.append(_run_batch(teacher, info, start + offset, bar))
        if written is not None and written.done():
            written.result()
    return batches


def _run_batch(teacher, info, start, bar):
    # A batch is always whole: the samples past the end pad the last one and are cut off by the caller.
    first, solver = start + info.start, Solver(info.solver, info.spacing)
    with named("noise"):
        x_T = teacher.noise(info.batch_size, info.seed, first)
    tensors = {"z": project(x_T, info.latent_size, info.detail_noise)}
    wanted = list(zip(info.timesteps, info.resolutions))
    # Levels of one state are averaged from the finest of them: areas nest.
    keep = {t: min(x_T.shape[-1] // side for other, side in wanted if other == t) for t, _ in wanted}
    condition = {"labels": labels_in_turn(info.class_numbers, first, info.batch_size), "guidance": info.guidance}
    x_0, kept = teacher.record(x_T, keep, solver, info.steps, info.seed, first, **condition)
    for k, (t, side) in enumerate(wanted, 1):
        tensors[f"level_{k:02d}"] = downsample(kept[t], side)
    tensors[f"level_{info.depth:02d}"] = x_0 if info.latents else x_0.clamp(-1, 1)
    bar.update(min(info.batch_size, info.num - start))
    return _ToHost({name: tensor.half() for name, tensor in tensors.items()})


class _ToHost:
    """Tensors copied to the host while their device goes on; :meth:`result` waits for them."""

    def __init__(self, tensors):
        device = next(iter(tensors.values())).device
        if device.type != "cuda":
            self._tensors, self._copied = {name: tensor.cpu() for name, tensor in tensors.items()}, None
            return
        copies = torch.cuda.Stream(device)
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            self._tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
            self._copied = copies.record_event()
        for tensor in tensors.values():
            tensor.record_stream(copies)

    def result(self):
        """The tensors on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors


def _write_shard(out, info, shard, batches, older):
    batches = [batch.result() for batch in batches]
    count = info.shard_count(shard)
    tensors = {name: torch.cat([batch[name] for batch in batches])[:count] for name in batches[0]}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            said = f"{name} of teacher {info.teacher['name']} is not finite in float16"
            raise InputError(f"{said}: its weights or its schedule are damaged")
    start = shard * info.shard_size
    if info.classes:
        tensors["labels"] = labels_in_turn(info.class_numbers, info.start + start, count)
    metadata = {"recipe": info.to_json(), "start": start, "count": count}
    metadata = {**metadata, "digest": digest(tensors)} if older else with_digest(tensors, metadata)
    write_tensors(shard_path(out, shard), tensors, metadata)
