"""Distillation into denoiser students, by any method that trains one."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.trajectories import Trajectories
from ..diffusion.denoiser_student import DenoiserStudent
from ..diffusion.latent import around
from ..diffusion.saving import INDEX
from ..diffusion.teacher import Teacher
from ..errors import InputError
from ..methods import method_class
from ..methods.base import Stage
from ..methods.denoiser_method import require_unused
from ..models.denoiser import DenoiserNetwork
from ..models.saving import SAMPLER
from ..runtime.devices import plain_defaults
from ..runtime.files import digest
from .cost import run_cost, unpaid
from .denoiser_data import learnt_from, require_alike, require_callable, source_of
from .trainer import Trainer


def distill_denoiser(
    method: str,
    config: Any,
    student: DenoiserStudent,
    out: str | Path,
    *,
    teacher: Teacher | None = None,
    data: "str | Path | torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None" = None,
    trajectories: "str | Path | Sequence[str | Path] | Trajectories | None" = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> DenoiserStudent:
    """Train a denoiser student and save it under ``out``, or the student of every round under a folder of its own.

    Args:
        method: name of the method (:data:`advkd.methods.METHODS`).
        config: its configuration.
        student: where training begins; its network may be trained in place: load another one to compare with.
        out: folder for the student, ``checkpoint.safetensors``, ``metrics.csv`` and TensorBoard files.
        teacher: of methods that call one, of the student's schedule.
        data: images of methods that need them: ``digits``, ``glyphs``, a folder, or ``(N, C, H, W)`` in [-1, 1]; with labels a
            folder of one folder a class, or a pair of images and ``(N,)`` classes.
        trajectories: folder of ``advkd trajectories``, several of them, or a :class:`Trajectories`, of methods that need pairs.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process (several processes: what accelerate gives).
        progress: show a bar (on the main process).

    Returns:
        The student of the last stage, in eval mode.

    Raises:
        InputError: student, teacher, data, configuration or folder do not fit each other; nothing was started.
        TrainingError: a loss is not finite; the last good checkpoint is kept.

    Examples:
        >>> start = DenoiserStudent.from_teacher(teacher)
        >>> distill_denoiser("reparametrize", ReparametrizeConfig(), start, "v", teacher=teacher, data="digits")
    """
    if isinstance(trajectories, (str, Path)):
        trajectories = [trajectories]
    if trajectories is not None and not isinstance(trajectories, Trajectories):
        trajectories = Trajectories(*trajectories)
    run = DenoiserDistiller(
        method, config, student, out, teacher, data, trajectories, resume=resume, device=device, progress=progress
    )
    run.run()
    return run.last()


class DenoiserDistiller(Trainer):
    """One run; see :func:`distill_denoiser`. ``dtype`` is float32, or float64 for tests of exactness.

    Args:
        method: name of the method.
        config: its configuration.
        student: where training begins.
        out: folder of the run.
        teacher: a :class:`Teacher`, or None.
        data: images, or None.
        trajectories: a :class:`Trajectories`, or None.
        resume: go on from ``out``'s checkpoint.
        device: torch device of a single process.
        dtype: of the networks and the batches.
        progress: show a bar.

    Raises:
        InputError: what does not fit; nothing was started.
    """

    @plain_defaults()
    def __init__(
        self,
        method: str,
        config: Any,
        student: DenoiserStudent,
        out: str | Path,
        teacher: Teacher | None = None,
        data: "str | Path | torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None" = None,
        trajectories: Trajectories | None = None,
        *,
        resume: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
    ):
        kind: Any = method_class(method)
        if "denoiser" not in kind.students:
            raise InputError(f"{method} trains a {kind.students[0]}, not a denoiser student")
        if not isinstance(config, kind.Config):
            raise InputError(f"config of {method} must be a {kind.Config.__name__}, got {type(config).__name__}")
        if not isinstance(student, DenoiserStudent):
            raise InputError(
                f"{method} trains a denoiser student here, got a {type(student).__name__}: begin with one by --init"
            )
        _require_plain(kind, config, student, teacher, device)
        student = kind.begin(config, student)
        self._start_student, self._recorded, self._last = student, trajectories, None
        model = student.model
        run = kind(config, DenoiserNetwork(model.unet), model.schedule)
        run.teacher, run.clip, run.autoencoder, run.shape = teacher, model.clip, model.autoencoder, tuple(model.shape)
        run.num_classes, run.null_class, run.low = model.num_classes, model.null_class, model.low
        if run.null_class is None and hasattr(config, "drop"):
            require_unused(config, True, "a student that has a null class (--init)", "drop")
        run.given = "pairs" if trajectories is not None else "images" if data is not None else "none"
        needs = run.needs()
        if needs.teacher and teacher is None:
            raise InputError(f"{method} needs a teacher: name it by --teacher")
        if teacher is not None:
            require_alike(student, teacher)
        taught = {} if teacher is None else {"teacher": {**teacher.identity(), "name": None}}
        run.origin = {"init": digest(student.model.unet.state_dict()), **taught}
        source = source_of(run, needs, student, data, trajectories, progress)
        for stage in run.stages():
            sampler = run.sampler(stage)
            model.program(sampler.solver, sampler.steps)
        super().__init__(
            run,
            source,
            teacher,
            out,
            resume=resume,
            device=device,
            dtype=dtype,
            progress=progress,
            save_stage=self._keep,
            finished=(
                "config.json",
                *(str(Path(run.folder(stage)) / name) for stage in run.stages() for name in (INDEX, SAMPLER)),
            ),
        )

    def kept(self, network: torch.nn.Module, stage: Stage) -> DenoiserStudent:
        """The student of a stage.

        Args:
            network: the result of the stage, a :class:`~advkd.models.denoiser.DenoiserNetwork`.
            stage: the stage.

        Returns:
            Student with a copy of the network, the stage's sampler and the record of all training so far.
        """
        start = self._start_student.model
        assert isinstance(network, DenoiserNetwork)
        unet = copy.deepcopy(network.unet).to(memory_format=torch.contiguous_format)
        model = around(unet, start, start.scheduler, "student")
        method: Any = self.method
        return DenoiserStudent(model, method.sampler(stage), self._record(stage, method.measured(model, stage)))

    def run(self) -> torch.nn.Module:
        """Run all updates that are left; a complete run saves its last student again, whose files may have gone.

        Returns:
            The network to keep, in eval mode.
        """
        complete = self.stage_index == len(self.stages)
        network = super().run()
        if complete and self.accelerator.is_main_process:
            self._keep(network, self.out, self.stages[-1])
        return network

    def last(self) -> DenoiserStudent:
        """The student of a complete run.

        Returns:
            The one that was saved, on the process that saved it.
        """
        return self._last or self.kept(self.result, self.stages[-1])

    def _keep(self, network, out, stage):
        self._last = self.kept(network, stage)
        self._last.save_pretrained(out / self.method.folder(stage))  # type: ignore[attr-defined]

    def _record(self, stage, measured):
        """Record of training up to a stage's end; evaluation refuses reference samples that are among its ``samples``."""
        before = self._start_student.training_record or {"samples": [], "runs": []}
        recorded, stages = self._recorded, self.stages[: stage.number]
        parts, info = (recorded.parts, recorded.info) if recorded is not None else ([], None)
        manifests = recorded.manifests if recorded is not None else []
        new = [part for part in parts if part not in before["samples"]]
        run: dict[str, Any] = {
            "method": self.method.name,
            "config": dataclasses.asdict(self.method.config),
            "stage": stage.number,
            "cost": run_cost(self.method, stages, info, unpaid(before, manifests, parts)),
            **learnt_from(self.method, self.data),
            **measured,
            "version": __version__,
        }
        if info is not None:
            run |= {"sampler": info.solver, "steps": info.steps, "samples": parts, "trajectories": manifests}
            run["recorded_by"] = info.teacher
        if self.method.teacher is not None:
            run["teacher"] = self.method.teacher.identity()
        return {"runs": [*before["runs"], run], "samples": before["samples"] + new}


def _require_plain(kind, config, student, teacher, device):
    """Refuse a teacher that is not called or elsewhere, and networks that take what the method does not give."""
    if teacher is not None and not kind.calls_teacher(config):
        raise InputError(f"{kind.name} does not call a teacher with these options: leave --teacher out")
    if teacher is not None:
        require_callable(teacher, device, kind.takes_low_images)
    for told, name, takes, owner in (
        (student.model.most_guidance, "guidance weight", kind.takes_weights, "guided"),
        (student.model.latent, "latent", kind.takes_latents, "ddgan"),
        (student.model.low, "low image", kind.takes_low_images, "consistency"),
    ):
        if told and not takes:
            raise InputError(f"--init: the student takes a {name}, which {kind.name} does not give: continue it by {owner}")
