"""Distillation data: the teacher's paths, reduced to what the student's submodules imitate.

A data set is a folder of shards (safetensors, float16) and a ``manifest.json``. Shard s holds samples
``[s * shard_size, (s + 1) * shard_size)``; it is a function of the recipe alone, so on one kind of machine it is the same
whoever writes it and whenever (another processor, or a compiled network, rounds otherwise). The manifest is written once all
shards are there.
"""

import bisect
import contextlib
import dataclasses
import math
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..data.levels import resolutions, supervising_timesteps
from ..errors import InputError, TrainingError
from ..models.saving import build_config
from ..ops import philox_normal
from ..ops.latents import check_latent, latent_numel, project
from ..runtime import launcher
from ..runtime.devices import keep_freed_memory
from ..runtime.files import (
    MANIFEST_LIMIT,
    damaged,
    digest,
    has_own_digest,
    read_json,
    read_tensors,
    require_digest,
    require_regular,
    sha256,
    with_digest,
    write_json,
    write_tensors,
)
from ..runtime.folders import held, locked, require_output_folder, require_space
from ..runtime.neighbours import unconfined
from ..runtime.progress import progress_bar
from ..runtime.ranges import named

FORMAT = "advkd-trajectories-1"
SHARD_KEYS = ("recipe", "start", "count", "digest")
SHAPE = ("image_size", "image_channels", "latent_size", "depth")
SHARED_RECIPE = ".recipe.json"
"""Recipe of a launcher's processes, beside the shards until all are there."""

RECORD_AGAIN = "delete it and run the same 'advkd trajectories' command again"


@dataclass
class TrajectoryConfig:
    """What ``advkd trajectories`` records.

    Attributes:
        sampler: ``ddim`` (paired: x_0 is a function of z's x_T) or ``ddpm`` (unpaired).
        steps: sampler steps (0: 50 for DDIM, all for DDPM).
        num: number of trajectories.
        start: index of the first one among the seed's samples.
        seed: of the noise.
        depth: submodules of the student.
        latent_size: m of the latent's blocks (0: all of x_T up to 32 pixels, 4 above).
        detail_noise: store the Haar pyramid of x_T instead of blocks.
        batch_size: samples that run through the teacher at once; the last batch is padded to it.
        shard_size: samples per shard, a multiple of ``batch_size``.
    """

    sampler: str = "ddim"
    steps: int = 0
    num: int = 2048
    start: int = 0
    seed: int = 0
    depth: int = 12
    latent_size: int = 0
    detail_noise: bool = False
    batch_size: int = 32
    shard_size: int = 128

    def validate(self):
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("num", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shard_size % self.batch_size:
            raise InputError(f"shard_size must be a multiple of batch_size {self.batch_size}, got {self.shard_size}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be in [0, 2^64), got {self.seed}")
        if not 0 <= self.start < 2**62:
            raise InputError(f"start must be in [0, 2^62), got {self.start}")


def record_trajectories(teacher, config, out, progress=True):
    """Run the teacher and store its trajectories under ``out``; finished shards of an earlier, killed run are kept.

    Under ``torchrun`` or ``accelerate launch`` process r of w writes the shards r, r + w, ...; whoever finds all shards
    present writes the manifest. Returns the folder.

    Raises:
        InputError: bad configuration, too little disk, or ``out`` holds shards of another recipe or damaged ones.
    """
    rank, world = launcher.processes()
    config.validate()
    recipe, out = _recipe(teacher, config), require_output_folder(out)
    with _shared(out, recipe) if world > 1 else _alone(out):
        finished = _record(teacher, config, recipe, out, rank, world, progress)
    if world == 1 and not finished:
        raise InputError(f"--out {out} has lost shards while it was written to: run the same command again")
    return out


@contextlib.contextmanager
def _alone(out):
    """Hold ``out`` for one run, whatever recipe earlier ones that wrote nothing had."""
    with locked(out):
        (out / SHARED_RECIPE).unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _shared(out, recipe):
    """Hold ``out`` for the processes of a launcher; another run, of another recipe, is refused before it computes."""
    with locked(out, shared=True):
        write_json(out / SHARED_RECIPE, recipe, once=True)
        try:
            other = read_json(out / SHARED_RECIPE, "recipe")
        except InputError as error:
            if os.path.lexists(out / SHARED_RECIPE):
                raise InputError(f"{error}: remove it if no other process writes there") from error
            other = recipe  # another process has just finished the data set
        if changed := _differences(recipe, other):
            said = f"--out {out} is for trajectories made with another {', '.join(changed)}: name another folder"
            raise InputError(f"{said}, or remove {out / SHARED_RECIPE} if no other process writes there")
        yield


def _record(teacher, config, recipe, out, rank, world, progress):
    """Record the shards of this process that are not there, and the manifest if they were the last; return True if so."""
    _record_missing(teacher, config, recipe, out, rank, world, progress)
    with named("write"):
        return _finish(out, recipe)


def _record_missing(teacher, config, recipe, out, rank, world, progress):
    """Record the shards of this process that are not there."""
    mine = [shard for shard in _missing(out, recipe) if shard % world == rank]
    older = bool(mine) and _is_of_older_version(out)
    shown = progress and rank == 0
    bar = progress_bar(total=len(mine) * config.shard_size, desc="trajectories", unit="sample", shown=shown)
    # One shard is written while the next one is made; no more, to bound memory.
    with bar, ThreadPoolExecutor(1) as writer:
        written = None
        for shard in mine:
            batches = _run_shard(teacher, config, recipe, shard, bar, written)
            _wait(written)
            written = writer.submit(_write_shard, out, config, recipe, shard, batches, older)
        _wait(written)


def _wait(written):
    """Until a shard is written; a failure is raised here."""
    if written is not None:
        with named("write"):
            written.result()


def record_in_processes(source, config, out, processes, progress=True, *, compiled=None, autocast=False):
    """:func:`record_trajectories` by local processes of one thread each, which on CPUs beats one process of as many threads.

    ``source`` is what :meth:`Teacher.from_pretrained` takes, ``compiled`` and ``autocast`` (to bfloat16) are of
    :meth:`Teacher.optimize`. Bad input is refused before they start.

    They are started anew and import the caller's script, so a script calls this under ``if __name__ == "__main__":``.

    Raises:
        InputError: bad input, a script without that guard, or one that cannot be imported (standard input).
        TrainingError: a process failed or was killed; the finished shards are kept.
    """
    if processes < 1:
        raise InputError(f"processes must be at least 1, got {processes}")
    source = (source, compiled, autocast)
    config.validate()
    recipe, out = _recipe(_load(*source), config), require_output_folder(out)
    launcher.hold_standard_streams()
    with _alone(out):
        _missing(out, recipe)
        context = multiprocessing.get_context("spawn")
        workers, reports = [], []
        for rank in range(processes):
            # Pipes, since an interrupt that ends the process at once would leave the semaphores of queues and events.
            receiver, sender = context.Pipe(duplex=False)
            arguments = (source, config, out, rank, processes, progress, os.getpid(), sender)
            workers.append(context.Process(target=_record_as, args=arguments, daemon=True))
            reports.append((receiver, sender))
        try:
            with launcher.deaf_to_interrupts(), unconfined():
                for worker in workers:
                    worker.start()
            for worker in workers:
                worker.join()
        finally:  # a caller who handles an interrupt has no workers left
            for worker in workers:
                if worker.pid is not None:
                    worker.terminate()
                    worker.join()
    said = [message for report in reports for message in _received(*report)]
    if failures := [message for message in said if message]:
        raise InputError(failures[0])
    _require_success(workers, bool(said), out)
    return out


def _received(receiver, sender):
    """Messages through a pipe whose other process has ended."""
    sender.close()
    with contextlib.closing(receiver), contextlib.suppress(EOFError, OSError):
        while True:
            yield receiver.recv()


def _require_success(workers, started, out):
    """Say why recording processes ended early: never ``started``, by an error of their own, or killed."""
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if not codes:
        return
    if not started and min(codes) > 0:
        raise InputError(
            "the recording processes could not import the program that starts them: in a script, call this under "
            "if __name__ == '__main__':, and run it from a file, not from standard input"
        )
    how = "was killed" if min(codes) < 0 else "failed (its error is above)"
    raise TrainingError(f"a recording process {how}; the finished shards are kept in {out}: run the same command again")


def _load(source, compiled, autocast):
    from .teacher import Teacher

    with named("load"):
        return Teacher.from_pretrained(source).optimize(compiled, torch.bfloat16 if autocast else None)


def _record_as(source, config, out, rank, world, progress, parent, report):
    """Record one process' shards into a folder that the ``parent`` holds; ``report`` that it started, and a failure."""
    report.send("")
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a terminated process leaves behind
    keep_freed_memory()
    try:
        with named("trajectories"), held(out):
            teacher = _load(*source)
            _record(teacher, config, _recipe(teacher, config), out, rank, world, progress)
    except (InputError, OSError) as error:
        report.send(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with(parent):
    """End this process when its parent is gone (killed, say): nobody would wait for it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _missing(out, recipe):
    """Numbers of the shards that ``out`` lacks, once those that are there and the free space have been checked."""
    present = {path.name for path in _check_existing(out, recipe)}
    left = max(0, recipe["num"] - len(present) * recipe["shard_size"])
    require_space(out, left * _bytes_per_sample(recipe), "what is left of the trajectories")
    return [s for s in range(_num_shards(recipe)) if _shard_path(out, s).name not in present]


def _finish(out, recipe):
    """Write the manifest and return True if all shards are there."""
    finished = all(_shard_path(out, s).exists() for s in range(_num_shards(recipe)))
    if finished:
        _check_existing(out, recipe)
        path, manifest = Path(out) / "manifest.json", _manifest(out, recipe, _num_shards(recipe))
        if not _is_without_digest(path, manifest):
            write_json(path, manifest)
        (Path(out) / SHARED_RECIPE).unlink(missing_ok=True)
    return finished


def _is_of_older_version(out):
    """True if an earlier version wrote the first shard that is there, or the manifest where all shards are lost.

    Its digests are of tensors alone, and those of shards recorded again are so, too: runs know their data by its bytes.
    """
    for path in sorted(Path(out).glob("shard-*.safetensors"))[:1]:
        tensors, metadata = read_tensors(path, "shard", SHARD_KEYS, RECORD_AGAIN)
        return metadata["digest"] == digest(tensors)
    try:
        manifest = read_json(Path(out) / "manifest.json", "manifest", ("format", "recipe", "shards"), MANIFEST_LIMIT)
        return "digest" not in manifest
    except InputError:  # none, or a damaged one
        return False


def _is_without_digest(path, manifest):
    """True for an earlier version's file of this manifest: it stays, since runs know their data by the file's bytes."""
    try:
        return read_json(path, "manifest", most=MANIFEST_LIMIT) == {k: v for k, v in manifest.items() if k != "digest"}
    except InputError:  # none, or a damaged one
        return False


def _num_shards(recipe):
    return -(-recipe["num"] // recipe["shard_size"])


def _recipe(teacher, config):
    """Everything that the shards' contents depend on."""
    size = teacher.image_size
    sides = resolutions(size, config.depth)
    timesteps = teacher.timesteps(config.sampler, config.steps or None)
    latent_size = config.latent_size or (1 if config.detail_noise else size // 4 if size <= 32 else 4)
    check_latent(size, latent_size, config.detail_noise)
    return {
        **dataclasses.asdict(config),
        "steps": len(timesteps),
        "latent_size": latent_size,
        "teacher": teacher.identity(),
        "image_channels": teacher.image_channels,
        "image_size": size,
        "resolutions": sides,
        "timesteps": supervising_timesteps(config.sampler, config.depth, timesteps, teacher.train_timesteps),
    }


def _bytes_per_sample(recipe):
    channels = recipe["image_channels"]
    pixels = sum(channels * r * r for r in recipe["resolutions"])
    return 2 * (pixels + latent_numel(channels, recipe["image_size"], recipe["latent_size"], recipe["detail_noise"]))


def _run_shard(teacher, config, recipe, shard, bar, written):
    """The shard's batches, on their way to the host; a failure to write the one before (``written``) ends the work at once."""
    start, batches = shard * config.shard_size, []
    for offset in range(0, _shard_count(config, shard), config.batch_size):
        batches.append(_run_batch(teacher, config, recipe, start + offset, bar))
        if written is not None and written.done():
            written.result()
    return batches


def _shard_count(config, shard):
    return min(config.shard_size, config.num - shard * config.shard_size)


def _run_batch(teacher, config, recipe, start, bar):
    # A batch is always whole: the samples past the end pad the last one and are cut off by the caller.
    with named("noise"):
        x_T = teacher.noise(config.batch_size, config.seed, start + config.start)
    tensors = {"z": project(x_T, recipe["latent_size"], recipe["detail_noise"])}
    wanted = list(zip(recipe["timesteps"], recipe["resolutions"]))
    # Levels of one state are averaged from the finest of them: areas nest.
    keep = {t: min(x_T.shape[-1] // side for other, side in wanted if other == t) for t, _ in wanted}
    x_0, kept = teacher.record(x_T, keep, config.sampler, config.steps or None, config.seed, start + config.start)
    for k, (t, side) in enumerate(wanted, 1):
        tensors[f"level_{k:02d}"] = downsample(kept[t], side)
    tensors[f"level_{config.depth:02d}"] = x_0.clamp(-1, 1)
    bar.update(min(config.batch_size, config.num - start))
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


def _write_shard(out, config, recipe, shard, batches, older):
    batches = [batch.result() for batch in batches]
    count = _shard_count(config, shard)
    tensors = {name: torch.cat([batch[name] for batch in batches])[:count] for name in batches[0]}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            said = f"{name} of teacher {recipe['teacher']['name']} is not finite in float16"
            raise InputError(f"{said}: its weights or its schedule are damaged")
    metadata = {"recipe": recipe, "start": shard * config.shard_size, "count": count}
    metadata = {**metadata, "digest": digest(tensors)} if older else with_digest(tensors, metadata)
    write_tensors(_shard_path(out, shard), tensors, metadata)


def downsample(x, side):
    """Psi: area average of ``(N, C, S, S)`` to ``(N, C, side, side)``."""
    factor = x.shape[-1] // side
    return F.avg_pool2d(x, factor) if factor > 1 else x


def _shard_path(out, shard):
    return Path(out) / f"shard-{shard:05d}.safetensors"


def _check_existing(out, recipe):
    """The shards in ``out``, each whole and of this recipe."""
    paths = sorted(Path(out).glob("shard-*.safetensors"))
    for path in paths:
        tensors, metadata = read_tensors(path, "shard", SHARD_KEYS, RECORD_AGAIN)
        if not isinstance(metadata["recipe"], dict):
            raise damaged("shard", path, "it has no recipe", RECORD_AGAIN)
        changed = _differences(recipe, metadata["recipe"])
        if changed:
            raise InputError(f"--out {out} holds trajectories made with another {', '.join(changed)}: name another folder")
        require_digest(f"shard {path}", tensors, metadata, RECORD_AGAIN)
    return paths


def _differences(recipe, other, ignored=()):
    """Sorted keys in which two recipes differ; a teacher's name is not one."""
    differ = {k for k in recipe if k not in ignored and recipe[k] != other.get(k)}
    if "teacher" in differ and isinstance(other.get("teacher"), dict) and same_teacher(recipe["teacher"], other["teacher"]):
        differ.remove("teacher")
    return sorted(differ)


def _manifest(out, recipe, shards):
    """The manifest holds no times and no host: equal recipes give equal bytes."""
    sums, entries = {}, []
    for shard in range(shards):
        path = _shard_path(out, shard)
        tensors, metadata = read_tensors(path, "shard", SHARD_KEYS, RECORD_AGAIN)
        entries.append({"file": path.name, "start": metadata["start"], "count": metadata["count"], "sha256": sha256(path)})
        for name, tensor in tensors.items():
            values = tensor.double()
            moments = torch.stack((values.sum(), values.square().sum(), values.new_tensor(values.numel())))
            sums[name] = sums.get(name, 0) + moments
    deviations = {}
    for name, (total, squares, number) in sums.items():
        deviations[name] = float((squares / number - (total / number) ** 2).clamp_min(0).sqrt())
    levels = [name for name in sorted(sums) if name != "z"]
    manifest = {
        "format": FORMAT,
        "recipe": recipe,
        "standard_deviations": [deviations[name] for name in levels],
        "latent_standard_deviation": deviations["z"],
        "shards": entries,
    }
    return with_digest({}, manifest)


def _is_consistent(manifest):
    """Whether a manifest's parts fit each other: shards that cover the samples, one deviation per level.

    It may come from elsewhere: shards are files of its own folder, and nothing is made that is as large as it says.
    """
    recipe, entries, names = (
        manifest["recipe"],
        manifest["shards"],
        {field.name for field in dataclasses.fields(TrajectoryConfig)},
    )
    try:
        build_config(TrajectoryConfig, {name: recipe[name] for name in names}, "").validate()
        check_latent(recipe["image_size"], recipe["latent_size"], recipe["detail_noise"])
        shards = range(0, recipe["num"], recipe["shard_size"])
        shapes = recipe["resolutions"] == resolutions(recipe["image_size"], recipe["depth"])
        whole = len(entries) == len(shards) and all(
            _are_whole(entry["start"], entry["count"])
            and entry["start"] == start
            and entry["file"] == _shard_path("", i).name
            and entry["count"] == min(recipe["shard_size"], recipe["num"] - start)
            and isinstance(entry["sha256"], str)
            for i, (entry, start) in enumerate(zip(entries, shards))
        )
        deviations = manifest["standard_deviations"]
        levels = len(deviations) == recipe["depth"] == len(recipe["timesteps"]) + 1
        levels &= all(type(value) in (int, float) and 0 <= value < math.inf for value in deviations)
        numbers = _are_whole(*recipe["timesteps"], *recipe["resolutions"], *(recipe[name] for name in SHAPE))
        known = recipe["image_channels"] in (1, 2, 3, 4) and isinstance(recipe["teacher"], dict)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    return shapes and whole and levels and numbers and known


def _are_whole(*values):
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


class Trajectories:
    """Recorded data, memory-mapped; a shard's hash is checked the first time the shard is read.

    Args:
        folders: where ``advkd trajectories`` wrote; several make one data set if only ``num``, ``start`` and ``seed`` differ.
        option: what error messages call it.

    Attributes:
        recipe: how it was made (a dict: :class:`TrajectoryConfig` plus teacher, timesteps, resolutions), of the first folder.
        folders: all of them.
        parts: ``seed``, ``start`` and ``num`` of every folder.
        manifests: SHA-256 of every folder's manifest.
        standard_deviations: one per level, of the first folder.

    Raises:
        InputError: no finished data set there, folders that do not fit each other, or (on reading) a shard that is missing,
            truncated or altered.
    """

    def __init__(self, *folders, option="--trajectories"):
        self.folder, self.folders, self._option = Path(folders[0]), [], option
        self._entries, self._shards, self.parts, self.manifests = [], {}, [], []
        for folder in map(Path, folders):
            self.append(folder)

    def append(self, folder):
        """Add a folder's samples after those that are there."""
        manifest = _read_manifest(Path(folder), self._option)
        recipe = manifest["recipe"]
        if not self.parts:
            self.recipe, self.standard_deviations = recipe, manifest["standard_deviations"]
        changed = _differences(recipe, self.recipe, ignored=("num", "start", "seed"))
        if changed:
            raise InputError(f"{self._option} {folder} and {self.folder} were made with different {', '.join(changed)}")
        part = {key: recipe[key] for key in ("seed", "start", "num")}
        if any(samples_overlap(part, other) for other in self.parts):
            raise InputError(f"{self._option} {folder} repeats samples of another folder: record with another --start")
        first = len(self)
        place = {"folder": folder, "recipe": recipe}
        self._entries += [{**entry, **place, "start": first + entry["start"]} for entry in manifest["shards"]]
        self.parts.append(part)
        self.folders.append(Path(folder))
        self.manifests.append(sha256(Path(folder) / "manifest.json"))

    def __len__(self):
        return sum(part["num"] for part in self.parts)

    @property
    def paired(self):
        """Whether x_0 is a function of z's x_T (DDIM), so that pairs (z, x_0) mean something."""
        return self.recipe["sampler"] == "ddim"

    def verify(self):
        """Check every shard's hash now."""
        for shard in range(len(self._entries)):
            self._load(shard)

    def noise(self, rows):
        """x_T of some rows: ``(len(rows), C, S, S)`` float32 on the CPU, made anew from its counters."""
        side, channels = self.recipe["image_size"], self.recipe["image_channels"]
        pieces = []
        for row in rows:
            part = 0
            while row >= self.parts[part]["num"]:
                row, part = row - self.parts[part]["num"], part + 1
            indices = torch.tensor([self.parts[part]["start"] + row], dtype=torch.int64, device="cpu")
            pieces.append(philox_normal(self.parts[part]["seed"], indices, (channels, side, side), stream="x_T"))
        return torch.cat(pieces)

    def batch(self, rows, levels, latent=None):
        """Rows of the data set.

        Args:
            rows: list of sample numbers.
            levels: list of level numbers k (1-based).
            latent: ``(latent_size, detail_noise)`` of the z that is wanted; by default that of the recording.

        Returns:
            ``(z, {k: (len(rows), C, R_k, R_k)})`` float32 on the CPU, levels as recorded (not standardised).
        """
        recorded = (self.recipe["latent_size"], self.recipe["detail_noise"])
        stored = latent is None or tuple(latent) == recorded
        names = [*(["z"] if stored else []), *(f"level_{k:02d}" for k in levels)]
        places = [self._place(row) for row in rows]
        picked = [torch.stack([self._load(shard)[name][offset] for shard, offset in places]).float() for name in names]
        z = picked.pop(0) if stored else project(self.noise(rows), *latent)
        return z, dict(zip(levels, picked, strict=True))

    def _place(self, row):
        shard = bisect.bisect_right(self._entries, row, key=lambda entry: entry["start"]) - 1
        return shard, row - self._entries[shard]["start"]

    def _load(self, shard):
        if shard not in self._shards:
            entry = self._entries[shard]
            path = entry["folder"] / entry["file"]
            if not path.exists():
                raise InputError(f"shard {path} is missing: run the same 'advkd trajectories' command again")
            require_regular(path, "shard")
            if sha256(path) != entry["sha256"]:
                raise damaged("shard", path, "it is truncated or altered", RECORD_AGAIN)
            tensors, metadata = read_tensors(path, "shard", remedy=RECORD_AGAIN)
            if {name: (t.dtype, t.shape) for name, t in tensors.items()} != self._wanted(entry["count"]):
                raise damaged("shard", path, "it holds other tensors than its recipe says", RECORD_AGAIN)
            if _differences(entry["recipe"], metadata.get("recipe", {})):
                raise InputError(f"shard {path} has another recipe than the manifest beside it: {RECORD_AGAIN}")
            self._shards[shard] = tensors
        return self._shards[shard]

    def _wanted(self, count):
        """dtype and shape of every tensor of a shard of ``count`` samples."""
        recipe = self.recipe
        channels, latent = recipe["image_channels"], (recipe["image_size"], recipe["latent_size"], recipe["detail_noise"])
        shapes = {"z": (count, latent_numel(channels, *latent))}
        shapes |= {f"level_{k:02d}": (count, channels, side, side) for k, side in enumerate(recipe["resolutions"], 1)}
        return {name: (torch.float16, shape) for name, shape in shapes.items()}


def _read_manifest(folder, option):
    if not folder.is_dir():
        raise InputError(f"{option} {folder} is not a folder")
    if not (folder / "manifest.json").exists() and any(folder.glob("shard-*.safetensors")):
        raise InputError(f"{option} {folder} is unfinished: run the same 'advkd trajectories' command again")
    keys = ("format", "recipe", "standard_deviations", "shards")
    manifest = read_json(folder / "manifest.json", "manifest", keys, MANIFEST_LIMIT)
    if manifest["format"] != FORMAT:
        raise InputError(f"{folder / 'manifest.json'} is not a manifest of advkd trajectories")
    as_written = "digest" not in manifest or has_own_digest({}, manifest)  # older ones have none
    if not as_written or not _is_consistent(manifest):
        raise InputError(f"{folder / 'manifest.json'} is damaged: run the same 'advkd trajectories' command again")
    return manifest


def samples_overlap(a, b):
    """Whether two parts (seed, start, num) share a sample."""
    return a["seed"] == b["seed"] and a["start"] < b["start"] + b["num"] and b["start"] < a["start"] + a["num"]


def same_teacher(a, b):
    """Whether two :meth:`Teacher.identity` are of one teacher, whatever it was called."""
    return {**a, "name": None} == {**b, "name": None}
