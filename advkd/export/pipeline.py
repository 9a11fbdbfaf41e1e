"""The student as a diffusers pipeline."""

import contextlib
import copy
import ctypes
import dataclasses
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError, safe_open

from ..config import build_config
from ..data.labels import labels_in_turn
from ..errors import InputError
from ..models.autoencoder import PARTS, require_pixels
from ..models.batch_norm import CannotFoldError, evaluating
from ..models.classes import listed, told, turns
from ..models.folding import read_by_fusing
from ..models.saving import require_plausible
from ..models.shape import StudentConfig
from ..models.student import Student
from ..runtime.devices import plain_defaults
from ..runtime.files import read_json, require_regular, write_bytes
from ..runtime.hub import reason, resolve
from ..runtime.pickles import require_weights
from .images import Generators, draw_seed, pipeline_output, require_call

FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", f"{PARTS[0]}/config.json")
"""Files that a student is loaded from."""

ClassLabels = int | str | Sequence[int | str] | np.ndarray | torch.Tensor | None
"""Numbers or names of classes, one for all images or one for each; None: every class in turn."""

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

MODEL_CARD = """---
library_name: advkd
{tag}
license: apache-2.0
---

# One-step student distilled with advkd

Draws {size}x{size} images with {channels} channel(s) in one network evaluation; {parameters:,} parameters.{classes}

```python
from advkd import AdvKDPipeline  # pip install advkd; diffusers' own DiffusionPipeline does not know the class

images = AdvKDPipeline.from_pretrained(".")({arguments}).images
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
    def __init__(
        self,
        image_size: int = 256,
        image_channels: int = 3,
        channels: Sequence[int] | None = None,
        latent_size: int = 4,
        detail_noise: bool = False,
        slope: float = 0.2,
        classes: Sequence[str] = (),
        class_channels: int = 8,
    ):
        super().__init__()
        channels = tuple(channels) if channels else StudentConfig().channels
        shape = (image_size, image_channels, channels, latent_size, detail_noise, slope, tuple(classes), class_channels)
        self._share(Student(StudentConfig(*shape)))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number; empty for an unconditional student."""
        return self.student.class_names

    @classmethod
    def from_student(cls, student: Student) -> Self:
        """Wrap a copy of a student of pictures, in eval mode."""
        require_pixels(student, "a pipeline")
        with torch.device("meta"):
            model = cls(**dataclasses.asdict(student.config))
        model._share(copy.deepcopy(student))
        return model.eval()

    def _share(self, student):
        """Have the student's modules, under their names; a module that is replaced is replaced in both."""
        # Not registered as a child: its modules are.
        object.__setattr__(self, "student", student)
        self._modules, self.latent_parts = student._modules, student.latent_parts

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self | tuple[Self, dict[str, Any]]:
        """diffusers' ``from_pretrained`` with its options, of a folder or a hub id (owner/name).

        Weights come from safetensors unless ``use_safetensors`` says else, are float32 unless ``torch_dtype`` does, whatever
        torch's default is, and can be trained, in inference mode too.

        Raises:
            InputError: missing, damaged or foreign files.
        """
        part = options.pop("subfolder", None) or ""
        folder = _fetched(pretrained_model_name_or_path, options, [f"{part}/{file}".lstrip("/") for file in FILES]) / part
        _require_student(folder)
        reported = options.pop("output_loading_info", False)
        options |= {"use_safetensors": _safe(options), "output_loading_info": True}
        try:
            with torch.inference_mode(False), plain_defaults():
                model, report = super().from_pretrained(folder, **options)
                require_plausible(model.state_dict())
        except torch.OutOfMemoryError:
            raise
        except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"the weights in {folder} cannot be read ({reason(error)}): restore or fetch a copy") from error
        if wrong := [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]:
            raise InputError(f"the weights in {folder} do not fit the configuration ({len(wrong)} tensors, {wrong[0]} first)")
        return (model, report) if reported else model

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images ``(N, C, S, S)`` in [-1, 1] of latents ``(N, latent_numel)``, with classes of their numbers ``(N,)``."""
        return Student.forward(self, z, labels=labels)


class _Content:
    """The inputs of an engine, bit by bit.

    Versions of tensors would not do: EMA copies, fused optimisers and numpy write without raising them.
    """

    def __init__(self, student):
        self.described, tensors = _described(student)
        self.bits = _bits(tensors)

    def is_that_of(self, student):
        """True if :func:`read_by_fusing` gives the same of a student."""
        described, tensors = _described(student)
        return described == self.described and _are_bits(tensors, self.bits)


def _described(student):
    described, tensors = read_by_fusing(student)
    return (described, [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]), tensors


def _bits(tensors):
    """All tensors, one after the other, as bytes in the order of memory."""
    return torch.cat([_in_memory_order(tensor.detach()).reshape(-1).view(torch.uint8) for tensor in tensors])


def _in_memory_order(tensor):
    """A contiguous view of a dense tensor, a copy of any other."""
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.contiguous()


def _are_bits(tensors, bits):
    """True if tensors are those of which :func:`_bits` made ``bits``."""
    if not bits.is_cpu:
        return torch.equal(_bits(tensors), bits)
    # Half as long as torch.equal takes: a pass over all weights is a fair part of drawing one small image.
    place = bits.data_ptr()
    for tensor in tensors:
        tensor = tensor if tensor.is_contiguous() else _in_memory_order(tensor.detach())
        if _MEMCMP(tensor.data_ptr(), place, tensor.nbytes):
            return False
        place += tensor.nbytes
    return True


_MEMCMP = ctypes.CDLL(None).memcmp
_MEMCMP.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class AdvKDPipeline(DiffusionPipeline):
    """The student as a diffusers pipeline: ``pipe(batch_size=4, generator=..., output_type="pil")`` draws images in one pass.

    It draws with a fused student, which is made anew when the student's weights have changed. A student with classes is told
    them by ``class_labels``, numbers or names: ``pipe(class_labels=["A", "7"])``.

    Args:
        student: a :class:`StudentModel` (or a :class:`Student`, a copy of which is wrapped).

    Examples:
        >>> pipe = AdvKDPipeline(Student.from_pretrained("digits"))
        >>> images = pipe(batch_size=4, generator=torch.Generator().manual_seed(7)).images
        >>> images[0].size
        (32, 32)
    """

    def __init__(self, student: StudentModel | Student):
        super().__init__()
        self.register_modules(student=StudentModel.from_student(student) if isinstance(student, Student) else student)
        self._fused = (None, None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """diffusers' ``from_pretrained`` with its options, of a folder or a hub id (owner/name) that holds a student alone.

        Weights come from safetensors unless ``use_safetensors`` says else; from the hub nothing else is fetched.

        Args:
            pretrained_model_name_or_path: a folder by :meth:`save_pretrained`, or a hub id.
            **options: diffusers' options, such as ``torch_dtype``, ``revision`` or ``cache_dir``.

        Returns:
            The pipeline, its student in eval mode.

        Raises:
            InputError: the index names anything but a :class:`StudentModel`, or Python files lie in the folder: diffusers would
                import the library and might run the files. Missing, damaged or foreign files.
        """
        files = ["model_index.json", *(f"student/{file}" for file in FILES)]
        folder = _fetched(pretrained_model_name_or_path, options, files)
        _require_student_alone(folder)
        return super().from_pretrained(folder, **{**options, "use_safetensors": _safe(options)})

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            batch_size: number of images; None: as many as ``class_labels`` where that is a sequence, else one.
            generator: None, a ``torch.Generator`` (one 64-bit seed is drawn from it; image i has index i) or a list of
                ``batch_size`` generators (one seed is drawn from each, for one image).
            output_type: ``pil`` (a list of Pillow images), ``np`` (``(N, H, W, C)`` in [0, 1]) or ``pt`` (``(N, C, H, W)`` in
                [0, 1], on the student's device); the last two are float32.
            return_dict: False returns a tuple.
            class_labels: number or name of a class, or a sequence of them, one for each image; None: every class of the student
                in turn.

        Returns:
            An ``ImagePipelineOutput`` with the field ``images``, or the tuple ``(images,)``.

        Raises:
            InputError: a batch size below 1, another output type, another number of generators or of classes, an unknown class,
                or classes of an unconditional student.
        """
        student = self.student.student
        numbers, batch_size = _numbers(class_labels, student.class_names, batch_size)
        require_call(batch_size, generator, output_type)
        draw = self._current_fused()
        if isinstance(generator, (list, tuple)):
            z = torch.cat([student.latents(1, draw_seed(g)) for g in generator])
        else:
            z = student.latents(batch_size, draw_seed(generator))
        labels = labels_in_turn(torch.tensor(numbers, dtype=torch.int64, device=z.device), 0, batch_size)
        return pipeline_output(draw(z, **told(labels)).float(), output_type, return_dict)

    def _current_fused(self):
        """The fused student, made anew when anything that it is made of has changed; the student's mode stays as it is.

        Where layers cannot be folded, the student itself.
        """
        student, (content, fused) = self.student.student, self._fused
        try:
            if content is None or not content.is_that_of(student):
                content = _Content(student)
                fused = student.fuse(dtype=student.head.weight.dtype)
                self._fused = (content, fused)
        except CannotFoldError as error:
            warnings.warn(f"the pipeline draws with the student's own modules, more slowly: {error}", stacklevel=3)
            return partial(_drawn_by, student)
        return fused

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write diffusers' folder format by its ``save_pretrained``, and a model card.

        Args:
            save_directory: made where it is not there; its ``README.md`` is overwritten by the card.
            **options: of diffusers' ``save_pretrained``.
        """
        config, names = self.student.config, self.student.class_names
        card = MODEL_CARD.format(
            size=config.image_size,
            channels=config.image_channels,
            parameters=self.student.student.num_parameters(terminals=False),
            tag="tags: [class-conditional-image-generation]" if names else "pipeline_tag: unconditional-image-generation",
            classes=f" It is told one of {len(names)} classes: {listed(names)}." if names else "",
            arguments=f"class_labels=[{names[0]!r}] * 4" if names else "batch_size=4",
        )
        write_bytes(Path(save_directory) / "README.md", card.encode())
        super().save_pretrained(save_directory, **options)


def _drawn_by(student, z, **labels):
    """Images by a student's own modules in eval mode, which each of them has for this alone."""
    with evaluating(student):
        return student(z.to(next(student.parameters()).dtype), **labels)


def _numbers(class_labels, names, batch_size):
    """Class numbers that images take in turn, and the number of images."""
    class_labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    several = isinstance(class_labels, Sequence) and not isinstance(class_labels, str)
    given = class_labels if several else [] if class_labels is None else [class_labels]
    if unknown := [one for one in given if names and isinstance(one, str) and one not in names]:
        raise InputError(f"class_labels: {unknown[0]!r} is not one of {listed(names)}")
    found = [names.index(one) if names and isinstance(one, str) else one for one in given]
    numbers = turns(None if class_labels is None else found, names, "class_labels")
    if batch_size is None:
        return numbers, len(numbers) if several else 1
    if several and len(numbers) != batch_size:
        raise InputError(f"class_labels: {len(numbers)} classes came for batch_size {batch_size}")
    return numbers, batch_size


def _safe(options):
    """The option ``use_safetensors``, True unless the caller says else."""
    return True if options.get("use_safetensors") is None else options["use_safetensors"]


def _fetched(source, options, files):
    """The folder of a model, fetched from the hub where it is none; takes what the hub's client takes out of ``options``."""
    chosen = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    if Path(source).is_dir() or not chosen:
        return resolve(source, {}, "pipeline", files)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=files, **chosen))
    except Exception as error:
        raise InputError(f"pipeline {str(source)!r} cannot be fetched from the hub ({reason(error)})") from error


def _require_student(folder):
    """Refuse files that no student of pictures has, before diffusers reads them."""
    if (folder / PARTS[0]).is_dir():
        raise InputError(f"{folder} is a student that draws latents: advkd.load_student loads it, a pipeline draws pictures")
    values = read_json(folder / "config.json", "StudentModel configuration")
    # diffusers writes null for the channels of a model that was made without any.
    values = {key: value for key, value in values.items() if not key.startswith("_") and value is not None}
    with torch.device("meta"):
        student = Student(build_config(StudentConfig, values, f"{folder / 'config.json'}"))
    wanted = student.state_dict()
    most = 2**20 + 8 * sum(tensor.numel() for tensor in wanted.values())
    for index in folder.glob("*.index.json"):
        suffix = "bin" if index.name.endswith(".bin.index.json") else "safetensors"
        named = read_json(index, "index of weights", ("weight_map",))["weight_map"]
        if not isinstance(named, dict) or not all(re.fullmatch(rf"[\w.-]+\.{suffix}", str(name)) for name in named.values()):
            raise InputError(f"index of weights {index} may name .{suffix} files of its own folder only")
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        require_regular(path, "the student's weights", most)
        if path.suffix == ".bin":
            require_weights(path, "the student's weights")
        else:
            _require_kinds(path, wanted)


def _require_kinds(path, wanted):
    """Refuse whole numbers for weights, which diffusers would convert."""
    with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:  # diffusers says what is wrong
        for name in file.keys() & wanted.keys():
            kind = file.get_slice(name).get_dtype()
            if wanted[name].is_floating_point() != kind.startswith(("F", "BF")):
                raise InputError(f"the student's weights {path} hold {name} as {kind}: restore or fetch a copy of them")


def _require_student_alone(folder):
    index = read_json(folder / "model_index.json", "index of a pipeline", ("_class_name",))
    named = {name: value for name, value in index.items() if not name.startswith("_")}
    expected = {"student": [StudentModel.__module__, StudentModel.__name__]}
    if named != expected or not isinstance(index["_class_name"], str):
        raise InputError(f"{folder / 'model_index.json'} is of another pipeline: it names {named}, not {expected} alone")
    if code := sorted(str(path) for place in (folder, folder / "student") for path in place.glob("*.py")):
        raise InputError(f"a pipeline's folder holds no Python files, which could be run; remove {', '.join(code)}")
