"""The training loop, once for every method: order of the data, draws, optimisers, averages, processes and files.

All draws are functions of (seed, global draw number): a checkpoint's cursor holds them, and processes change only the rounding.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.draws import DataOrder, Draw, HostDraws
from ..data.pictures import save_grid
from ..data.sources import Batch, Source
from ..errors import InputError, TrainingError
from ..methods.base import Method, Stage, Trained
from ..models.batch_norm import evaluating
from ..ops.critic.update import average_gradients
from ..runtime.devices import plain_defaults
from ..runtime.files import restoring
from ..runtime.folders import held, locked
from ..runtime.progress import progress_bar
from ..runtime.ranges import named
from .checkpoint import CHECKPOINT, Running, claim, file_state, read_checkpoint, require_room, write_checkpoint
from .log import Log
from .processes import GROUP, processes_of, require_runnable, share


class Trainer:
    """One run of a method.

    Args:
        method: a :class:`advkd.methods.base.Method`.
        data: a :class:`advkd.data.sources.Source`.
        teacher: whatever has the methods of a teacher that ``method`` calls, or None.
        out: folder of the run: ``checkpoint.safetensors``, ``metrics.csv``, TensorBoard files, sample grids.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process (several processes: what accelerate gives). A process group that accelerate
            starts here serves all later runs of the process and is destroyed at exit; one that exists already is the caller's.
        dtype: of modules and batches: float32, or float64 for tests of exactness.
        progress: show a bar.
        save: called with the result and ``out`` by the main process when all updates are done.
        save_stage: called likewise with the result so far, ``out`` and the stage when a stage ends.
        finished: names of files that ``save`` writes; a folder that holds one is refused.
        what: word for the result.

    Attributes:
        running: modules of the current stage by name, with optimisers and averages.
        needs: what the method asked for before the first stage.
        stages: the method's stages, in order.
        stage_index: place of the current stage in ``stages``; their number when the run is complete.
        update: updates of the current stage so far.
        cursor: global draws so far: samples of all batches over all processes.
        out: the run's folder.

    Raises:
        InputError: data, method, device or folder do not fit each other; nothing was started.

    Examples:
        >>> trained = Trainer(Pairs(PairsConfig(), module), Tensors(z=z, images=x), None, "out").run()
    """

    @plain_defaults()
    def __init__(
        self,
        method: Method,
        data: Source,
        teacher: Any,
        out: str | Path,
        *,
        resume: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
        save: Callable[[nn.Module, Path], None] | None = None,
        save_stage: Callable[[nn.Module, Path, Stage], None] | None = None,
        finished: Sequence[str] = ("config.json",),
        what: str = "student",
    ):
        method.teacher = teacher
        self.method, self.data, self.dtype, self.needs = method, data, dtype, method.needs()
        if self.needs.teacher and teacher is None:
            raise InputError(f"{method.name} needs a teacher: --teacher")
        self.settings, self.stages = method.settings(), method.stages()
        self._require_intervals()
        self.accelerator = processes_of(self.settings.mixed_precision, device)
        require_runnable(self.accelerator, method, self.needs, self.stages)
        self.out = claim(out, resume, finished, what)
        self.checkpoint = self.out / CHECKPOINT
        self._watched = [self.out / name for name in (CHECKPOINT, *finished)]
        self._found = [file_state(path) for path in self._watched]
        self._save, self._save_stage, self._shown, self._what = save, save_stage, progress, what
        self.identity = self._identity()
        self.running: dict[str, Running] = {}
        self.cursor = self.stage_index = self.update = 0
        self._generator: torch.Generator | None = None
        self._order: DataOrder | None = None
        self._start(resume)

    def _require_intervals(self):
        every, rows = self.settings.checkpoint_every, self.settings.log_every
        if every % rows:
            raise InputError(f"checkpoint_every must be a multiple of log_every {rows}, got {every}")
        if any(stage.updates < 1 for stage in self.stages):
            raise InputError(f"every stage must have an update, got {[stage.updates for stage in self.stages]}")

    def _identity(self):
        """Settings and inputs that must not change between a run and its resumption."""
        config = {k: v for k, v in dataclasses.asdict(self.method.config).items() if k not in self.settings.free}
        parts = ({"method": self.method.name}, config, self.method.identity(), self.data.identity())
        identity = {key: value for part in parts for key, value in part.items()}
        assert len(identity) == sum(map(len, parts)), "two parts of the identity have one name"
        return json.loads(json.dumps(identity))

    def _start(self, resume):
        """Build the modules of the run's place, and bring them to the checkpoint's state."""
        tensors = None
        if resume:
            tensors, place = read_checkpoint(self.checkpoint, self.identity, self.stages)
            self.stage_index, self.update, self.cursor = place
        self._build()
        require_room(self.out, [part.part.module for part in self.running.values()], bool(self.method.columns))
        if tensors is not None:
            with restoring("checkpoint", self.checkpoint):
                self._restore(tensors)

    def _restore(self, tensors):
        for name, part in self.running.items():
            part.restore(name, tensors)
        torch.set_rng_state(tensors["rng"].clone())
        if "generator" in tensors:
            self._generator = self.method.generator(self.done)
            self._generator.set_state(tensors["generator"].clone())

    @property
    def stage(self) -> Stage:
        """The current stage; the last one of a finished run."""
        return self.stages[min(self.stage_index, len(self.stages) - 1)]

    @property
    def done(self) -> int:
        """Updates so far."""
        return sum(stage.updates for stage in self.stages[: self.stage_index]) + self.update

    @property
    def result(self) -> nn.Module:
        """The student to keep: its average, where there is one."""
        student = self.running["student"]
        return student.part.module if student.average is None else student.average

    def _build(self):
        """Start the current stage: the method's modules on the device, equal on all processes; fresh optimisers."""
        before, self.running = self.running, {}
        self.method.averages = _averages(before)
        for name, part in self.method.build(self.stage).items():
            self._place(part.module, part.memory_format)
            if self.accelerator.num_processes > 1:
                share(part.module)
            self.running[name] = Running.of(part, before.get(name))
        self.method.averages = _averages(self.running)

    def _place(self, module, memory_format):
        # diffusers' networks warn where they are given a dtype, even their own.
        other = any(t.is_floating_point() and t.dtype != self.dtype for t in module.state_dict().values())
        dtype = {"dtype": self.dtype} if other else {}
        module.to(self.accelerator.device, memory_format=memory_format, **dtype)  # type: ignore[call-overload]

    @plain_defaults()
    def run(self) -> nn.Module:
        """Run all updates that are left.

        Returns:
            The student to keep (``result``), in eval mode, its weights contiguous.

        Raises:
            InputError: another process has written to the folder since this run was set up.
            TrainingError: a loss or gradient is not finite; the last checkpoint is kept.
        """
        GROUP.in_step = False
        main = self.accelerator.is_main_process
        with locked(self.out) if main else held(self.out):
            if main and [file_state(path) for path in self._watched] != self._found:
                raise InputError(f"--out {self.out}: another process has written there since this run was set up")
            total = sum(stage.updates for stage in self.stages)
            log = self._log() if main and self.method.columns else None
            bar = progress_bar(total=total, initial=self.done, desc=self.method.name, shown=self._shown and main)
            with contextlib.closing(log) if log else contextlib.nullcontext(), bar:
                while self.stage_index < len(self.stages):
                    self._run_update(log, bar)
                if log:
                    log.secure()
                if main and self._save:
                    self._save(self.result, self.out)
        self.accelerator.wait_for_everyone()
        GROUP.in_step = True
        result = self.result.eval()
        return result.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _log(self):
        reached = (self.stage.number, self.update)
        if self.stage_index and not self.update:  # the last row before is the end of a stage
            ended = self.stages[self.stage_index - 1]
            reached = (ended.number, ended.updates)
        return Log(self.out, self.method.columns, reached, self.done, self.settings.log_every)

    def _run_update(self, log, bar):
        stage, number, metrics = self.stage, self.update + 1, self.step()
        last = number == stage.updates
        if log:
            log.write(stage.number, number, metrics, last=last)
        shown = {name: f"{metrics[name]:.3f}" for name in ("loss", "critic") if name in metrics}
        bar.set_postfix(stage=stage.number, **shown, refresh=False)
        bar.update()
        if last or number % self.settings.checkpoint_every == 0:
            self._write_checkpoint(log)

    def step(self) -> dict[str, float]:
        """One update, and the beginning of the next stage behind a stage's last one; writes no checkpoint and no metrics.

        Returns:
            Numbers that the method logged, by name, as means over the processes.

        Raises:
            RuntimeError: the run is complete.
            TrainingError: a loss or gradient is not finite.
        """
        if self.stage_index == len(self.stages):
            raise RuntimeError("the run is complete")
        self.data.grow(self.done)
        self._generator = self.method.generator(self.done)
        self._set_learning_rates()
        actions = _Actions(self)
        self.method.update(actions, *actions.next_batch())
        with named("average"):
            self._update_averages()
        self.update += 1
        if self.update == self.stage.updates:
            self._end_stage()
        return actions.means()

    def _end_stage(self):
        if self.accelerator.is_main_process:
            self._draw_samples(self.stage)
            if self._save_stage:
                self._save_stage(self.result, self.out, self.stage)
        self.stage_index, self.update = self.stage_index + 1, 0
        if self.stage_index < len(self.stages):
            self._build()

    def next_batch(self) -> tuple[Batch, Draw]:
        """This process's rows of the next global batch, and their draws."""
        stage, rank, world = self.stage, self.accelerator.process_index, self.accelerator.num_processes
        local, device = stage.batch_size // world, self.accelerator.device
        start = self.cursor + rank * local
        generator = self._generator or self.method.generator(self.done)
        host = HostDraws(generator, stage.batch_size, rank * local, local) if generator else None
        rows = host.integers(len(self.data)).tolist() if host else self.rows(start, local)
        batch = self.data.batch(rows, stage.levels, device, self.dtype)
        self._require_parts(batch)
        self.cursor += stage.batch_size
        return batch, Draw(self.settings.seed, start, local, device, self.dtype, host)

    def _require_parts(self, batch):
        wanted = {"levels": ("z", "levels"), "pairs": ("z", "images"), "images": ("images",), "none": ()}[self.needs.data]
        wanted += ("labels",) if self.needs.labels else ()
        missing = [name for name in wanted if getattr(batch, name) is None or name == "levels" and not batch.levels]
        if missing:
            raise InputError(f"{self.method.name} needs {' and '.join(missing)}, and the data has none")

    def rows(self, start: int, count: int) -> list[int]:
        """Rows of ``count`` global draws from ``start`` on; data that has grown has another order, and empty data has none."""
        if not len(self.data):
            return []
        if self._order is None or self._order.num != len(self.data):
            self._order = DataOrder(len(self.data), self.settings.seed)
        return self._order.rows(start, count)

    def _set_learning_rates(self):
        for part in self.running.values():
            for group in part.optimizer.param_groups if part.optimizer else ():
                group["lr"] = part.part.learning_rate * part.part.schedule(self.update)

    @torch.no_grad()
    def _update_averages(self):
        """Averages of parameters and buffers; their decay warms up within each stage."""
        for part in self.running.values():
            if part.average is None:
                continue
            decay = min(part.part.average, (self.update + 1) / (self.update + 10))
            pairs = zip(part.average.state_dict().values(), part.part.module.state_dict().values(), strict=True)
            floating, others = [], []
            for mean, value in pairs:
                (floating if mean.is_floating_point() else others).append((mean, value))
            torch._foreach_lerp_([mean for mean, _ in floating], [value for _, value in floating], 1 - decay)
            for mean, value in others:
                mean.copy_(value)

    @torch.no_grad()
    def _draw_samples(self, stage):
        with named("student"), evaluating(self.result):
            images = self.method.samples(self.result, stage)
        if images is not None:
            save_grid(images, self.out / f"samples-stage-{stage.number:02d}.png")

    def _write_checkpoint(self, log):
        if self.accelerator.is_main_process:
            if log:
                log.secure()
            place = {"stage": self.stage_index, "update": self.update, "cursor": self.cursor}
            write_checkpoint(self.checkpoint, self.running, place, self.identity, self._generator)
        self.accelerator.wait_for_everyone()

    def move(self, name: str, gradients: list[torch.Tensor]) -> None:
        """Move a module by gradients: their average over the processes, clipped, through the optimiser.

        Args:
            name: of a trained module in ``running``.
            gradients: one per parameter of its optimiser, in their order; their memory is written to.
        """
        part = self.running[name]
        assert isinstance(part.part, Trained) and part.optimizer is not None
        if self.accelerator.num_processes > 1:
            average_gradients(gradients)
        gradients = [_laid_out_as(p, g) for p, g in zip(part.parameters, gradients, strict=True)]
        norm = nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            where = f"stage {self.stage.number}, update {self.update}"
            kept = f"the last checkpoint is kept in {self.out}" if self.checkpoint.exists() else "no checkpoint yet"
            what = f"the {self._what if name == 'student' else name}'s loss or gradient is not finite at {where}"
            raise TrainingError(f"{what}; {kept}: run again with a lower learning rate, in another folder")
        for parameter, gradient in zip(part.parameters, gradients, strict=True):
            parameter.grad = gradient
        if part.part.clip:
            nn.utils.clip_grads_with_norm_(part.parameters, part.part.clip, norm)
        part.optimizer.step()
        part.optimizer.zero_grad(set_to_none=True)

    def means(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means of scalars over the processes, by their names.

        Args:
            values: tensors of one element by name.
        """
        if not values:
            return {}
        stacked = torch.stack([value.detach().double() for value in values.values()])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(values, stacked.tolist(), strict=True))


def _averages(running):
    return {name: part.average for name, part in running.items() if part.average is not None}


def _laid_out_as(parameter, gradient):
    """A gradient in its parameter's memory order, as ``backward`` leaves it: sums over it round in that order."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter, requires_grad=False).copy_(gradient)


class _Actions:
    """The :class:`advkd.methods.base.Step` of one update."""

    def __init__(self, trainer):
        self._trainer, self._logged = trainer, {}

    def __call__(self, name, loss):
        parameters = self._trainer.running[name].parameters
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.gradients(name, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])

    def gradients(self, name, gradients):
        self._trainer.move(name, list(gradients))

    def log(self, **values):
        self._logged |= values

    def next_batch(self):
        with named("data"):
            return self._trainer.next_batch()

    def autocast(self):
        return self._trainer.accelerator.autocast()

    def means(self):
        return self._trainer.means(self._logged)
