"""The student as a diffusers pipeline."""

import dataclasses
from pathlib import Path

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config

from .errors import InputError
from .files import write_bytes
from .models.student import Student, StudentConfig
from .pictures import to_pil

MODEL_CARD = """---
library_name: advkd
pipeline_tag: unconditional-image-generation
license: apache-2.0
---

# One-step student distilled with advkd

Draws {size}x{size} images with {channels} channel(s) in one network evaluation; {parameters:,} parameters.

```python
from advkd import AdvKDPipeline  # pip install advkd; diffusers' own DiffusionPipeline does not know the class

images = AdvKDPipeline.from_pretrained(".")(batch_size=4).images
```

**Intended use.** Research on fast sampling of diffusion models, and drawing images of the kind its teacher was trained on.
It imitates the teacher, with less diversity and more deformed images, and inherits the biases of the teacher's data.
**Out of scope.** Images of real people presented as photographs, and any use that the teacher's or its data's licence excludes.

**Method.** Adversarial knowledge distillation (Mekonnen, Dall'Asen and Rota, "ADV-KD: Adversarial Knowledge Distillation for
Faster Diffusion Sampling"): twelve submodules, each supervised by a state of the teacher's sampling path.
"""


class StudentModel(ModelMixin, ConfigMixin):
    """diffusers' view of a :class:`Student`: the same weights under the same names, in the same folder format."""

    @register_to_config
    def __init__(self, image_size=256, image_channels=3, channels=None, latent_size=4, detail_noise=False, slope=0.2):
        super().__init__()
        channels = tuple(channels) if channels else StudentConfig().channels
        student = Student(StudentConfig(image_size, image_channels, channels, latent_size, detail_noise, slope))
        for name, child in student.named_children():
            self.add_module(name, child)
        # Not registered as a child: its modules are, under the names they have in the student.
        object.__setattr__(self, "student", student)

    @classmethod
    def from_student(cls, student):
        """Wrap a copy of a student's weights."""
        model = cls(**dataclasses.asdict(student.config)).to(student.head.weight.device)
        model.load_state_dict(student.state_dict())
        return model.eval()

    def forward(self, z):
        """Images ``(N, C, S, S)`` in [-1, 1] of latents ``(N, latent_numel)``."""
        return self.student.train(self.training)(z)


class AdvKDPipeline(DiffusionPipeline):
    """``pipe(batch_size=4, generator=..., output_type="pil")``: images in one pass.

    Args:
        student: a :class:`StudentModel` (or a :class:`Student`, which is wrapped).
    """

    def __init__(self, student):
        super().__init__()
        self.register_modules(student=StudentModel.from_student(student) if isinstance(student, Student) else student)
        self._fused = (None, None)

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, output_type="pil", return_dict=True):
        """Draw images.

        Args:
            batch_size: number of images.
            generator: None, a ``torch.Generator`` (one 64-bit seed is drawn from it; image i has index i) or a list of
                ``batch_size`` generators (one seed is drawn from each, for one image).
            output_type: ``pil``, ``np`` (``(N, H, W, C)`` in [0, 1]) or ``pt`` (``(N, C, H, W)`` in [0, 1]).
            return_dict: False returns a tuple.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if output_type not in ("pil", "np", "pt"):
            raise InputError(f"output_type must be pil, np or pt, got {output_type!r}")
        student = self._current_fused()
        if isinstance(generator, (list, tuple)):
            if len(generator) != batch_size:
                raise InputError(f"generator: {len(generator)} generators came for batch_size {batch_size}")
            z = torch.cat([student.latents(1, _draw_seed(g)) for g in generator])
        else:
            z = student.latents(batch_size, _draw_seed(generator))
        images = student(z).float()
        if output_type == "pil":
            images = to_pil(images)
        else:
            images = (images / 2 + 0.5).clamp(0, 1)
            images = images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _current_fused(self):
        """The fused student, made anew when the weights have changed or moved."""
        student = self.student.student.eval()
        weight = student.head.weight
        state = (weight.device, weight.dtype, [tensor._version for tensor in student.state_dict().values()])
        if self._fused[0] != state:
            self._fused = (state, student.fuse(dtype=weight.dtype))
        return self._fused[1]

    def save_pretrained(self, save_directory, **options):
        """diffusers' ``save_pretrained``, and a model card."""
        config = self.student.config
        card = MODEL_CARD.format(
            size=config.image_size,
            channels=config.image_channels,
            parameters=self.student.student.num_parameters(terminals=False),
        )
        write_bytes(Path(save_directory) / "README.md", card.encode())
        super().save_pretrained(save_directory, **options)


def _draw_seed(generator):
    device = generator.device if generator is not None else "cpu"
    high, low = torch.randint(2**32, (2,), generator=generator, device=device).tolist()
    return high << 32 | low
