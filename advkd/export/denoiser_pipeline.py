"""Denoiser students as a diffusers pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from ..diffusion.denoiser_student import DenoiserStudent, Sampler
from ..diffusion.loading import Classes
from ..diffusion.teacher import LatentTeacher, Teacher
from ..errors import InputError
from ..models.autoencoder import Autoencoder
from .images import Generators, draw_seed, pipeline_output, require_call

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DModel


class DenoiserPipeline(DiffusionPipeline):
    """A denoiser student as a diffusers pipeline, which draws in the student's own steps.

    A folder without conditions runs in diffusers' own ``DDIMPipeline``, too, and one of latents in ``LDMPipeline``; a student
    of solver ``ddim`` and the trailing spacing draws the same images there of the same noise, in numbers of steps that divide
    the schedule's.

    Args:
        unet: the network.
        scheduler: its noise schedule, of v prediction.
        sampler: how it draws; None: one step of DDIM.
        classes: of a conditional network.
        autoencoder: of a network that draws latents.

    Raises:
        InputError: as for :class:`DenoiserStudent`.

    Examples:
        >>> pipe = DenoiserPipeline.from_pretrained("pd/4")
        >>> images = pipe(batch_size=4, generator=torch.Generator().manual_seed(7)).images
    """

    def __init__(
        self,
        unet: "UNet2DModel",
        scheduler: "DDIMScheduler",
        sampler: Sampler | None = None,
        classes: Classes | None = None,
        autoencoder: Autoencoder | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        model = Teacher(unet, scheduler, "student", classes)
        if autoencoder is not None:
            model = LatentTeacher(unet, scheduler, autoencoder, "student", classes)
        self.student = DenoiserStudent(model, sampler or Sampler())

    @classmethod
    def from_student(cls, student: DenoiserStudent) -> Self:
        """A pipeline around a student, which shares its network.

        Args:
            student: the student.

        Returns:
            Pipeline.
        """
        model = student.model
        pipeline = cls(model.unet, model.scheduler, student.sampler, model.classes, model.autoencoder)
        pipeline.student.training_record = student.training_record
        return pipeline

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, torch_dtype: torch.dtype = torch.float32
    ) -> Self:
        """A pipeline from a student's folder.

        Args:
            pretrained_model_name_or_path: a folder of ``advkd distill`` or :meth:`save_pretrained`, or a hub id (owner/name).
            torch_dtype: dtype of the network's weights; states stay float32.

        Returns:
            The pipeline on the CPU.

        Raises:
            InputError: as for :meth:`DenoiserStudent.from_pretrained`.
        """
        return cls.from_student(DenoiserStudent.from_pretrained(pretrained_model_name_or_path, dtype=torch_dtype))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        class_labels: torch.Tensor | Sequence[int] | int | None = None,
        guidance: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            batch_size: number of images.
            generator: None, a ``torch.Generator`` (one 64-bit seed is drawn from it; image i has index i) or a list of
                ``batch_size`` generators (one seed is drawn from each, for one image).
            num_inference_steps: number of steps; None: the student's own.
            class_labels: ``(batch_size,)`` classes, or one for all; None: no class.
            guidance: weight w of guidance towards the classes, diffusers' ``guidance_scale`` less 1; None: the student's own.
            output_type: ``pil`` (a list of Pillow images), ``np`` (``(N, H, W, C)`` in [0, 1]) or ``pt`` (``(N, C, H, W)`` in
                [0, 1], on the network's device); the last two are float32.
            return_dict: False returns a tuple.

        Returns:
            An ``ImagePipelineOutput`` with the field ``images``, or the tuple of it.

        Raises:
            InputError: a batch size below 1, another output type, another number of generators, or steps, classes or a weight
                that the student cannot take.
        """
        require_call(batch_size, generator, output_type)
        student, seed = self.student, 0
        if isinstance(generator, (list, tuple)):
            if student.sampler.solver.stochastic:
                raise InputError("generator: a sampler that adds noise takes one generator for all images, not a list")
            x_T = torch.cat([student.latents(1, draw_seed(one)) for one in generator])
        else:
            seed = draw_seed(generator)
            x_T = student.latents(batch_size, seed)
        images = student.draw(x_T, num_inference_steps, seed, labels=class_labels, guidance=guidance)
        return pipeline_output(images, output_type, return_dict)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write the student's folder, as :meth:`DenoiserStudent.save_pretrained` does.

        Args:
            save_directory: made where it is missing.
        """
        self.student.save_pretrained(save_directory)
