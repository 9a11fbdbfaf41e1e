"""Distil a teacher's trajectories into a student (ADV-KD, section 3).

A run is a list of stages; a stage's update is: critic updates on (teacher's levels, student's levels), then one student
update on J = mse + kl + wasserstein over the stage's levels. All random draws are functions of (seed, global draw number),
so a checkpoint's cursor says all of them, and the number of processes changes nothing but rounding.
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import gc
import itertools
import json
import math
import os
import socket
import statistics
import sys
import time
import traceback
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from .. import __version__
from ..data.draws import DataOrder, shift, training_latents
from ..data.pictures import METRICS_LIMIT, save_grid
from ..diffusion.recorder import Trajectories, TrajectoryConfig, record_trajectories, same_teacher
from ..errors import InputError, TrainingError
from ..methods.adv_kd import DistillConfig
from ..models.batch_norm import evaluating
from ..models.critic import Critic, CriticConfig
from ..ops.critic.update import average_gradients, critic_gradients
from ..ops.latents import split_latent
from ..runtime import launcher
from ..runtime.devices import plain_defaults, require_device
from ..runtime.files import (
    pack_optimizer,
    read_tensors,
    require_digest,
    require_regular,
    require_there,
    restoring,
    synchronize,
    unpack_optimizer,
    with_digest,
    write_bytes,
    write_tensors,
)
from ..runtime.folders import held, locked, require_output_folder, require_space, writing
from ..runtime.hub import reason
from ..runtime.progress import progress_bar
from ..runtime.ranges import named

__all__ = ["DistillConfig", "Distiller", "distill"]

CHECKPOINT = "checkpoint.safetensors"


def distill(trajectories, student, config, out, resume=False, device="cpu", progress=True, teacher=None):
    """Train ``student`` on recorded trajectories and save it (its average, where ``config.ema`` is positive) under ``out``.

    Args:
        trajectories: folder of ``advkd trajectories``, several of them, or a :class:`Trajectories`.
        student: a :class:`Student`, fresh or loaded; it is trained in place.
        config: a :class:`DistillConfig`.
        out: folder for the student, ``checkpoint.safetensors``, ``training.json`` (what it was trained on), ``metrics.csv``,
            TensorBoard files and sample grids.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process (several processes: what accelerate gives). A process group that accelerate
            starts here serves all later runs of the process and is destroyed at exit; one that exists already is the caller's.
        teacher: the :class:`Teacher` of the trajectories, where ``config.grow`` adds some while training.

    Returns:
        The :class:`Student` that was saved, in eval mode.

    Raises:
        InputError: data, student, configuration or folder do not fit each other; nothing was started.
        TrainingError: a loss is not finite; the last good checkpoint is kept.
    """
    if not isinstance(trajectories, Trajectories):
        folders = [trajectories] if isinstance(trajectories, (str, Path)) else trajectories
        trajectories = Trajectories(*folders)
    return Distiller(trajectories, student, config, out, resume, device, progress=progress, teacher=teacher).run()


class Distiller:
    """One distillation run; see :func:`distill`. ``dtype`` is float32, or float64 for tests of exactness."""

    @plain_defaults()
    def __init__(
        self, data, student, config, out, resume=False, device="cpu", dtype=torch.float32, progress=True, teacher=None
    ):
        config.validate(student.depth, data.paired, len(data))
        _require_fit(data, student, config, teacher)
        self.stages = config.stages(student.depth)
        self.accelerator = _accelerator(config.mixed_precision, device)
        world = self.accelerator.num_processes
        if any(stage.batch_size % world for stage in self.stages):
            raise InputError(f"batch_sizes {config.batch_sizes} must be divisible by the {world} processes")
        data = Trajectories(*data.folders)
        data.verify()
        self.teacher = teacher
        self.latent = (student.config.latent_size, student.config.detail_noise)
        self.out = _claim(out, resume, 40 * sum(p.numel() for p in student.parameters()) + 2**26)
        self.checkpoint = self.out / CHECKPOINT
        self._state_found = _file_state(self.checkpoint)
        self.data, self.config, self.dtype, self.progress = data, config, dtype, progress
        self.recorded, self.folders = len(data), len(data.parts)
        self.student = student.to(self.accelerator.device, dtype, memory_format=torch.channels_last)
        self._share_weights()
        self.average = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.log_s = torch.nn.Parameter(torch.zeros(student.depth, device=self.accelerator.device, dtype=dtype))
        self.order = DataOrder(config.pairs or len(data), config.seed)
        self.identity = self._identity()
        self.cursor, self.stage_index, self.update = 0, 0, 0
        self._restored = self._read_checkpoint() if self.checkpoint.exists() else None

    @plain_defaults()
    def run(self):
        """Run all stages that are left; returns the saved student."""
        _GROUP.in_step = False
        main = self.accelerator.is_main_process
        with locked(self.out) if main else held(self.out):
            if main and _file_state(self.checkpoint) != self._state_found:
                raise InputError(f"--out {self.out}: another process has written there since this run was set up")
            done = sum(stage.updates for stage in self.stages[: self.stage_index]) + self.update
            reached = (self.stage_index + 1, self.update)
            if self.stage_index and not self.update:  # the last row before is the end of a stage
                reached = (self.stage_index, self.stages[self.stage_index - 1].updates)
            total = sum(stage.updates for stage in self.stages)
            log = _Log(self.out, self.student.depth, reached, done, self.config.log_every) if main else None
            bar = progress_bar(total=total, initial=done, desc="distil", shown=self.progress and main)
            with contextlib.closing(log) if main else contextlib.nullcontext(), bar:
                for self.stage_index in range(self.stage_index, len(self.stages)):
                    self._run_stage(self.stages[self.stage_index], log, bar)
                    self.update = 0
                if main:
                    log.secure()
                    self.result.training_record = self._provenance()
                    self.result.save_pretrained(self.out)
        self.accelerator.wait_for_everyone()
        _GROUP.in_step = True
        return self.result.to(memory_format=torch.contiguous_format).eval()

    def _share_weights(self):
        """Every process starts from the main process's weights."""
        if self.accelerator.num_processes > 1:
            for tensor in self.student.state_dict().values():
                dist.broadcast(tensor, 0)

    @property
    def result(self):
        """The student to keep: the average where there is one."""
        return self.average if self.config.ema else self.student

    def _run_stage(self, stage, log, bar):
        self._start_stage(stage)
        while self.update < stage.updates:
            self._grow(stage)
            metrics = self._train_update(stage)
            self.update += 1
            if log:
                log.write(stage.number, self.update, metrics, last=self.update == stage.updates)
            shown = {k: f"{metrics[k]:.3f}" for k in ("loss", "critic") if k in metrics}
            bar.set_postfix(stage=stage.number, **shown, refresh=False)
            bar.update()
            if self.update % self.config.checkpoint_every == 0 and self.update < stage.updates:
                self._write_checkpoint(log, self.stage_index, self.update)
        if self.accelerator.is_main_process:
            self._draw_samples(stage)
        self._write_checkpoint(log, self.stage_index + 1, 0)

    def _start_stage(self, stage):
        """Fresh critics and optimisers, or the checkpoint's where the run stopped inside this stage."""
        config = self.config
        depth = self.student.depth
        self.student.requires_grad_(False)
        self.student.eval()
        trained = [self.student.submodules[k - 1] for k in stage.trained]
        trained += [self.student.head if k == depth else self.student.terminals[k - 1] for k in stage.levels]
        for module in trained:
            module.requires_grad_(True).train()
        parameters = [p for p in self.student.parameters() if p.requires_grad] + ([self.log_s] if config.kl else [])
        self.optimizer = torch.optim.Adam(parameters, config.learning_rate, betas=config.betas)
        self.critics = self._build_critics(stage)
        if self.critics:
            self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), config.critic_learning_rate, betas=config.betas)
        if self._restored is not None:
            self._restore_stage(self._restored)
            self._restored = None

    def _build_critics(self, stage):
        data, config, critics = self.data.recipe, self.config, {}
        condition = sum(channels for channels, side in self.student.latent_parts if side == 4)
        with torch.random.fork_rng(devices=[]):
            for k in stage.critic_levels:
                torch.manual_seed((config.seed * 2**16 + stage.number * 2**8 + k) % 2**63)
                shape = CriticConfig(
                    image_size=data["resolutions"][k - 1],
                    image_channels=data["image_channels"],
                    channels=config.critic_channels,
                    max_channels=config.critic_max_channels,
                    condition_channels=condition if config.conditional else 0,
                )
                critics[str(k)] = Critic(shape).to(self.accelerator.device, self.dtype)
        return torch.nn.ModuleDict(critics)

    def _grow(self, stage):
        """Pairs made while training: the data as it is to be at this update, recorded where it is not there yet."""
        if not self.config.grow:
            return
        updates = sum(earlier.updates for earlier in self.stages[: self.stage_index]) + self.update
        base = self.config.pairs or self.recorded
        first = max(part["start"] + part["num"] for part in self.data.parts[: self.folders])
        for i in range(len(self.data.parts) - self.folders, updates // self.config.grow_every):
            folder = self.out / "trajectories" / f"{i + 1:04d}"
            names = {field.name for field in dataclasses.fields(TrajectoryConfig)}
            values = {name: value for name, value in self.data.recipe.items() if name in names}
            values |= {"start": first + i * self.config.grow, "num": self.config.grow}
            record_trajectories(self.teacher, TrajectoryConfig(**values), folder, progress=False)
            self.accelerator.wait_for_everyone()
            self.data.append(folder)
            self.order = DataOrder(base + (i + 1) * self.config.grow, self.config.seed)

    def _train_update(self, stage):
        self._set_learning_rates(stage)
        metrics = {}
        # Critic updates before the last see their own batches; the last one shares the student's.
        for i in range(self.config.critic_updates if self.critics else 1):
            last = i + 1 == self.config.critic_updates or not self.critics
            with named("data"):
                start, z, targets = self._next_batch(stage)
            latents = z
            if self.config.fresh and self.critics:
                fresh = training_latents(self.config.seed, start, len(z), z.shape[1], z.device)
                latents = torch.cat((z, fresh.to(self.dtype)))
            with named("student forward"), torch.set_grad_enabled(last), self.accelerator.autocast():
                images = self.student(latents, levels=stage.levels)
            images = {k: image.to(self.dtype) for k, image in images.items()}
            # What critics judge: the images of the fresh latents where there are any, else those of the pairs.
            judged = {k: images[k][-len(z) :] for k in stage.critic_levels}
            images = {k: image[: len(z)] for k, image in images.items()}
            if self.critics:
                with named("critic update"):
                    metrics |= self._update_critics(stage, start, z, targets, judged)
        with named("student update"):
            metrics |= self._update_student(start, stage, z, targets, images, judged)
        with named("average"):
            self._update_average()
        return metrics

    def _set_learning_rates(self, stage):
        final = self.config.final_learning_rate
        rate = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * self.update / stage.updates))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        if self.critics:
            for group in self.critic_optimizer.param_groups:
                group["lr"] = self.config.critic_learning_rate * rate

    def _next_batch(self, stage):
        """This process's rows of the next global batch: first global draw, z, standardised targets."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        local = stage.batch_size // world
        start = self.cursor + rank * local
        z, levels = self.data.batch(self._rows(start, local), stage.levels, self.latent)
        self.cursor += stage.batch_size
        place = {"device": self.accelerator.device, "dtype": self.dtype}
        targets = {k: self._standardise(k, level.to(**place)) for k, level in levels.items()}
        return start, z.to(**place), targets

    def _rows(self, start, count):
        """Data-set rows of the global draws; with ``pairs``, the rows between them and the grown ones are skipped."""
        rows = self.order.rows(start, count)
        skipped = self.recorded - (self.config.pairs or self.recorded)
        return [row + skipped if row >= self.recorded - skipped else row for row in rows]

    def _standardise(self, k, level):
        # The last level is the image itself, in [-1, 1].
        return level if k == self.student.depth else level / max(self.data.standard_deviations[k - 1], 1e-6)

    def _condition(self, z):
        if not self.config.conditional:
            return None
        parts = zip(split_latent(z, self.student.latent_parts), self.student.latent_parts, strict=True)
        return torch.cat([piece for piece, (_, side) in parts if side == 4], dim=1)

    def _seen(self, image, start, level, kind):
        """What a critic is shown of an image."""
        return shift(image, self.config.seed, start, level, kind) if self.config.augment else image

    def _update_critics(self, stage, start, z, targets, judged):
        # L(D) = E[D(fake)] - E[D(real)] + penalty (eq. 9 with the sign of a minimisation), one critic per level.
        config, condition, updates = self.config, self._condition(z), []
        indices = torch.arange(start, start + len(z), device=z.device)
        for k in stage.critic_levels:
            real = self._seen(targets[k], start, k, 1)
            fake = self._seen(judged[k].detach(), start, k, 2)
            options = {"a": (config.seed, indices, k), "condition": condition, "weight": config.gradient_penalty}
            options |= {"backend": config.critic_backend, "check_finite": False}
            updates.append(critic_gradients(self.critics[str(k)], real, fake, **options))
        gradients = [gradient for update in updates for gradient in update.gradients]
        self._step(self.critic_optimizer, list(self.critics.parameters()), gradients, "critic")
        return self._means(
            critic=torch.stack([update.loss for update in updates]).mean(),
            penalty=torch.stack([update.penalty for update in updates]).mean(),
        )

    def _update_student(self, start, stage, z, targets, images, judged):
        config, depth = self.config, self.student.depth
        metrics, terms = {}, []
        regressed = config.regression_levels_of(stage)
        for k, image in images.items():
            weight = 1 / len(images) + (config.final_weight if k == depth else 0.0)
            squared = (image - targets[k]).square().mean()
            metrics[f"mse_{k:02d}"] = squared.detach()
            if config.mse and k in regressed:
                terms.append(weight * config.mse * squared)
            if config.kl and k in regressed:
                terms.append(weight * config.kl * _kl(squared, self.log_s[k - 1], config.kl_floor))
        if self.critics:
            condition = self._condition(z)
            arguments = () if condition is None else (condition,)
            seen = {k: self._seen(judged[k], start, k, 2) for k in stage.critic_levels}
            scores = [-self.critics[str(k)](image, *arguments).mean() for k, image in seen.items()]
            metrics["wasserstein"] = torch.stack(scores).mean().detach()
            terms.append(config.wasserstein * torch.stack(scores).mean())
        loss = torch.stack(terms).sum()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        self._step(self.optimizer, parameters, gradients, "student")
        return self._means(loss=loss.detach(), **metrics)

    def _step(self, optimizer, parameters, gradients, name):
        """One averaging of all gradients over the processes, clipping, optimiser step."""
        if self.accelerator.num_processes > 1:
            average_gradients(gradients)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        if not math.isfinite(float(norm)):
            where = f"stage {self.stages[self.stage_index].number}, update {self.update}"
            kept = f"the last checkpoint is kept in {self.out}" if self.checkpoint.exists() else "no checkpoint yet"
            raise TrainingError(f"the {name}'s loss or gradient is not finite at {where}; {kept}: lower the learning rate")
        scale = self.config.clip_gradients / max(float(norm), self.config.clip_gradients) if self.config.clip_gradients else 1.0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * scale if scale != 1.0 else gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _means(self, **values):
        """Means over the processes, as floats."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(values, stacked.tolist(), strict=True))

    @torch.no_grad()
    def _update_average(self):
        """EMA of parameters and batch-norm buffers; the decay warms up within each stage."""
        decay = min(self.config.ema, (self.update + 1) / (self.update + 10))
        for mean, value in zip(self.average.state_dict().values(), self.student.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    @torch.no_grad()
    def _draw_samples(self, stage):
        k = stage.levels[-1]
        z = self.result.latents(36, seed=self.config.seed).to(self.dtype)
        with named("student"), evaluating(self.result):
            images = self.result(z, levels=(k,))[k]
        scale = 1.0 if k == self.student.depth else 3.0
        save_grid(images / scale, self.out / f"samples-stage-{stage.number:02d}.png")

    def _write_checkpoint(self, log, stage_index, update):
        if self.accelerator.is_main_process:
            log.secure()
            tensors = {f"student/{k}": v for k, v in self.student.state_dict().items()}
            tensors |= {f"average/{k}": v for k, v in self.average.state_dict().items()}
            tensors |= {"log_s": self.log_s, "rng": torch.get_rng_state()} | pack_optimizer("optimizer", self.optimizer)
            if self.critics:
                tensors |= {f"critics/{k}": v for k, v in self.critics.state_dict().items()}
                tensors |= pack_optimizer("critic_optimizer", self.critic_optimizer)
            cursor = {"stage": stage_index, "update": update, "cursor": self.cursor}
            write_tensors(self.checkpoint, tensors, with_digest(tensors, {**cursor, "run": self.identity}))
        self.accelerator.wait_for_everyone()

    def _identity(self):
        """The settings and inputs that must not change between a run and its resumption."""
        free = ("checkpoint_every", "critic_backend")
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in free}
        identity = {**config, "student": dataclasses.asdict(self.student.config), "trajectories": self.data.manifests}
        identity["init"] = (self.student.training_record or {}).get("samples")
        return json.loads(json.dumps(identity))

    def _provenance(self):
        """What the student was trained on and how; evaluation refuses reference samples that are among ``samples``."""
        recipe, before = self.data.recipe, self.student.training_record or {"samples": [], "runs": []}
        # A finished run that is resumed has not opened the folders that it grew.
        grown = [Trajectories(path.parent).parts[0] for path in sorted(self.out.glob("trajectories/*/manifest.json"))]
        parts = self.data.parts + [part for part in grown if part not in self.data.parts]
        run = {"config": dataclasses.asdict(self.config), "samples": parts, "version": __version__}
        run |= {name: recipe[name] for name in ("sampler", "steps", "teacher")}
        samples = before["samples"] + [part for part in parts if part not in before["samples"]]
        return {"runs": [*before["runs"], run], "samples": samples}

    def _read_checkpoint(self):
        tensors, metadata = read_tensors(self.checkpoint, "checkpoint", ("stage", "update", "cursor", "run", "digest"))
        require_digest(self.checkpoint, tensors, metadata)
        identity = self.identity
        with restoring("checkpoint", self.checkpoint):
            changed = sorted(k for k in identity if metadata["run"].get(k) != identity[k])
        if changed:
            raise InputError(
                f"{self.out} holds a run with another {', '.join(changed)}: repeat its options or name another folder"
            )
        with restoring("checkpoint", self.checkpoint):
            self.student.load_state_dict(_part(tensors, "student"))
            self.average.load_state_dict(_part(tensors, "average"))
            self.log_s.data.copy_(tensors["log_s"])
            torch.set_rng_state(tensors["rng"].clone())
            self.stage_index, self.update, self.cursor = self._position(metadata)
        return tensors if self.update else None

    def _position(self, metadata):
        """Stage, update and cursor of a checkpoint; ``ValueError`` where the run has no such place."""
        stage, update, cursor = place = tuple(metadata[name] for name in ("stage", "update", "cursor"))
        updates = self.stages[stage].updates if type(stage) is int and 0 <= stage < len(self.stages) else 0
        whole = all(type(number) is int for number in place) and 0 <= stage <= len(self.stages)
        if not whole or not 0 <= update <= updates or not 0 <= cursor < 2**62:
            raise ValueError(f"the run has no stage {stage}, update {update}, draw {cursor}")
        return place

    def _restore_stage(self, tensors):
        with restoring("checkpoint", self.checkpoint):
            unpack_optimizer("optimizer", self.optimizer, tensors)
            if self.critics:
                self.critics.load_state_dict(_part(tensors, "critics"))
                unpack_optimizer("critic_optimizer", self.critic_optimizer, tensors)


def _part(tensors, name):
    return {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + "/")}


def _kl(squared, log_s, floor):
    """KL(N(x', floor^2 I) || N(y, s^2 I)) per dimension; with s learned its minimum is s^2 = floor^2 + mse."""
    variance = torch.exp(2 * log_s)
    return log_s - math.log(floor) + (floor * floor + squared) / (2 * variance) - 0.5


def _accelerator(mixed_precision, device):
    from accelerate import Accelerator

    launcher.processes()  # refuses variables that accelerate would stumble over
    device = require_device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        with launcher.without_empty_variables(), _GROUP.started_here():
            return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    except ValueError as error:
        # accelerate keeps one precision and one device per process.
        raise InputError(f"mixed_precision {mixed_precision} on {device}: {reason(error)}") from error


class _OwnGroup:
    """The process group that accelerate starts for our runs, destroyed before the interpreter finalizes, on every way out.

    gloo's threads take the GIL to release tensors that Python knows, which in a finalizing interpreter ends the process by
    SIGABRT; destroying the group joins them. This happens at exit and not at the end of a run, because accelerate keeps the
    group for the next run, and a second group would read the addresses of the first from the launcher's store.
    """

    def __init__(self):
        self._group = None
        self.in_step = False

    @contextlib.contextmanager
    def started_here(self):
        """A group that is new after the block is ours to end."""
        self.in_step = False
        before = _process_group()
        if dist.is_available():
            # The default arguments of its functions are the group there is at import: imported later, they would keep ours.
            from torch.distributed.nn import functional  # noqa: F401
        try:
            yield
        finally:
            group = _process_group()
            if before is None and group is not None:
                # A strong reference would keep the destroyed group's threads alive.
                self._group = weakref.ref(group)
                atexit.register(self._end)

    def _end(self):
        if self._group() is None or self._group() is not _process_group():
            return
        if not self.in_step:
            # After an error the other processes may never come: aborting, unlike NCCL's shutdown, does not wait for them.
            self._group().abort()
        dist.destroy_process_group()
        if self._group() is not None:
            _clear_frames(getattr(sys, "last_value", None))
            gc.collect()


_GROUP = _OwnGroup()


def _process_group():
    """The default process group, or None."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _clear_frames(error):
    """Release the local variables of an uncaught error's frames: in a failed collective they include the process group."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _file_state(path):
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def _claim(out, resume, needed):
    """The output folder, with room for the run; one that holds a student or an unfinished run is not overwritten."""
    out = require_output_folder(out)
    if (out / CHECKPOINT).exists():
        if not resume:
            raise InputError(f"--out {out} holds a run already: add --resume, or name another folder")
    elif resume:
        raise InputError(f"--resume: --out {out} holds no checkpoint yet: run without --resume")
    elif (out / "config.json").exists():
        raise InputError(f"--out {out} holds a student already: name another folder")
    require_space(out, needed, "the run")
    return out


def _require_fit(data, student, config, teacher):
    if teacher is not None:
        teacher.match(data.recipe["teacher"])
    if config.grow and (teacher is None or not same_teacher(teacher.identity(), data.recipe["teacher"])):
        raise InputError(f"grow {config.grow} needs the teacher of the trajectories: --teacher")
    recipe, shape = data.recipe, student.config
    wanted = {
        "image_size": (recipe["image_size"], shape.image_size),
        "image_channels": (recipe["image_channels"], shape.image_channels),
        "depth": (recipe["depth"], len(shape.channels)),
    }
    for name, (theirs, ours) in wanted.items():
        if theirs != ours:
            raise InputError(
                f"the trajectories have {name} {theirs}, the student {ours}: choose another preset or record again"
            )


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


class _Log:
    """metrics.csv and TensorBoard: one row averages ``every`` updates of a stage (the last row of a stage what is left).

    Rows after ``reached``, a checkpoint's (stage, update), are dropped, torn ones too; ``done`` updates were before it.
    """

    def __init__(self, out, depth, reached, done, every):
        levels = [f"mse_{k:02d}" for k in range(1, depth + 1)]
        self.columns = ["stage", "update", "loss", "wasserstein", "critic", "penalty", *levels]
        self.path, self.every, self.pending = out / "metrics.csv", every, []
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
        self.board = _Board(out / "tensorboard", self.updates)

    def write(self, stage, update, metrics, last=False):
        self.pending.append(metrics)
        self.updates += 1
        if not last and update % self.every:
            return
        means = {name: statistics.fmean(row[name] for row in self.pending) for name in metrics}
        self.pending = []
        with writing(self.path):
            self.writer.writerow({"stage": stage, "update": update} | {k: f"{v:.9g}" for k, v in means.items()})
            self.file.flush()
        self.board.write(means, self.updates - 1)

    def secure(self):
        """Bring the rows to the disk before a checkpoint says that they are there; refuse to go on where the file has gone."""
        require_there(self.file, self.path)
        with writing(self.path):
            synchronize(self.file.fileno())

    def close(self):
        with contextlib.closing(self.board), writing(self.path):
            self.file.close()


def _open_first(paths):
    """The first of some paths where no file lies yet, opened: two runs of one second have a file each."""
    for path in paths:
        with contextlib.suppress(FileExistsError):
            return path, open(path, "xb")


class _Board:
    """TensorBoard's file of a run's scalars; those of updates from ``first`` on in earlier files are void.

    torch's writer does the same in a thread of its own, which meets a full disk with a traceback.
    """

    def __init__(self, folder, first):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        start = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        with writing(folder / start):
            folder.mkdir(exist_ok=True)
            self.path, self.file = _open_first(folder / f"{start}.{i}" for i in itertools.count())
        self.records = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"), first)
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first)

    def write(self, scalars, step):
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

    def close(self):
        with writing(self.path):
            self.file.close()
