"""The one-pass student: 12 submodules, each a denoising step of the teacher (ADV-KD, section 3, eq. 6 and 7)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.labels import labels_in_turn
from ..data.levels import resolutions
from ..errors import InputError
from ..ops import philox_normal
from ..ops.arguments import whole
from ..ops.latents import latent_numel, latent_parts, project
from ..ops.layout import require_floating
from ..ops.philox import indices_of
from ..runtime.hub import PRETRAINED
from .batch_norm import BatchNorm2d, normalize
from .classes import Conditional, Labels, join_class, require_labels, told, turns
from .fused_student import FusedStudent
from .saving import PretrainedModule
from .shape import PRESETS, StudentConfig, batches, gather


class Submodule(nn.Module):
    """Two convolutions, each followed by batch norm and LeakyReLU; the input is up-sampled first where asked."""

    folded_forward = True

    def __init__(self, in_channels: int, out_channels: int, upsample: bool, slope: float):
        super().__init__()
        self.upsample = upsample
        self.slope = slope
        self.convolution1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = BatchNorm2d(out_channels)
        self.convolution2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor, upsampled: bool = False, upsample: bool = False) -> torch.Tensor:
        """``(N, in, H, W)`` to ``(N, out, H, W)``, or twice the side where it up-samples.

        ``upsampled``: the submodule before has up-sampled the input; ``upsample``: do so for the one after.
        """
        if self.upsample and not upsampled:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = normalize(self.norm1, self.convolution1(x), self.slope)
        return normalize(self.norm2, self.convolution2(x), self.slope, upsample)


class Student(Conditional, PretrainedModule):
    """Network that makes an image of low-dimensional noise in one pass.

    ``student(z)`` gives images, ``student.levels(z)`` all intermediate images through the terminal modules, which exist for
    training only: :meth:`fuse` drops them. A student with classes is told one for each latent, by its number, and has their
    embedding. ``Student.from_pretrained`` loads a student in eval mode, by an embedded name
    (``digits``, ``glyphs``), from a folder or from the hub; ``save_pretrained`` writes one. A student made by its constructor
    or :meth:`from_preset` is in training mode: its batch norm takes the statistics of each batch until ``eval()``.

    Args:
        config: a :class:`StudentConfig`.

    Attributes:
        config: the student's shape.
        resolutions: side of each submodule's image in pixels, R_1 .. R_depth.
        latent_parts: ``[(channels, side), ...]``, the parts of a flat latent in order.
        embedding: of a student with classes, an ``nn.Embedding`` of ``class_channels`` maps of 4x4 a class.

    Examples:
        >>> student = Student.from_pretrained("digits")
        >>> student.fuse(tune=False).sample(4, seed=7).shape
        torch.Size([4, 1, 32, 32])
    """

    config_class = StudentConfig
    embedded = {name: PRETRAINED / name for name in ("digits", "glyphs")}
    training_keys = ("samples", "runs")
    folded_forward = True
    config: StudentConfig
    embedding: nn.Embedding

    @staticmethod
    def is_record(record: dict[str, Any]) -> bool:
        """Check a training record's values when a student is loaded.

        Args:
            record: the contents of ``training.json``, with the keys ``samples`` and ``runs``.

        Returns:
            True if ``samples`` are named by seed, start and number, and ``runs`` is a list.
        """
        samples, runs = record["samples"], record["runs"]
        if not isinstance(samples, list) or not isinstance(runs, list):
            return False
        return all(
            isinstance(part, dict) and all(type(part.get(key)) is int for key in ("seed", "start", "num")) for part in samples
        )

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config
        sides = resolutions(config.image_size, len(config.channels))
        self.resolutions = sides
        self.latent_parts = latent_parts(config.image_channels, config.image_size, config.latent_size, config.detail_noise)
        detail = dict(zip((side for _, side in self.latent_parts[1:]), (c for c, _ in self.latent_parts[1:])))
        blocks, features, previous = [], self.latent_parts[0][0] + config.class_features, 4
        for out_channels, side in zip(config.channels, sides, strict=True):
            upsample = side > previous
            features += detail.get(previous, 0) if upsample else 0
            blocks.append(Submodule(features, out_channels, upsample, config.slope))
            features, previous = out_channels, side
        self.submodules = nn.ModuleList(blocks)
        terminals = [nn.Conv2d(c, config.image_channels, 3, padding=1) for c in config.channels[:-1]]
        self.terminals = nn.ModuleList(terminals)
        self.head = nn.Conv2d(features, config.image_channels, 3, padding=1)
        if config.classes:
            # Numbers come with the others': the module's own would be drawn before them.
            weight = torch.empty(len(config.classes), 16 * config.class_channels)
            self.embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        self._initialize()

    @classmethod
    def from_preset(cls, name: str) -> "Student":
        """A student of a known shape with fresh weights.

        Args:
            name: ``paper-256``, ``pyramid-256``, ``digits``, ``latent`` or ``glyphs``, none of them with classes.

        Returns:
            Student in training mode, in torch's default dtype and on its default device; its weights are drawn from torch's
            global random state.

        Raises:
            InputError: another name.
        """
        if name not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(PRESETS[name])

    @property
    def depth(self) -> int:
        """Number of submodules."""
        return len(self.submodules)

    @property
    def latent_numel(self) -> int:
        """Elements of one latent z, the noise alone."""
        config = self.config
        return latent_numel(config.image_channels, config.image_size, config.latent_size, config.detail_noise)

    def num_parameters(self, terminals: bool = True) -> int:
        """Number of parameters.

        Args:
            terminals: count the terminal modules too, which exist for training only.
        """
        kept = [self.submodules, self.head, *([self.terminals] if terminals else [])]
        kept += [self.embedding] if self.num_classes else []
        return sum(p.numel() for module in kept for p in module.parameters())

    def latents(self, n: int, seed: int = 0, start: int = 0, device: str | torch.device | None = None) -> torch.Tensor:
        """Latents z of images ``start .. start + n - 1``, a function of (seed, index) alone.

        Args:
            n: number of latents.
            seed: int in [0, 2^64) of the Philox noise.
            start: index of the first image.
            device: where they are drawn; None: on the student's device.

        Returns:
            ``(n, latent_numel)`` float32, standard normal.

        Raises:
            InputError: a number out of its range, or a device that is none.
        """
        device = next(self.parameters()).device if device is None else device
        indices = indices_of(n, start, device)
        return philox_normal(seed, indices, (self.latent_numel,), stream="z")

    def project(self, x_T: torch.Tensor) -> torch.Tensor:
        """Latents z of the teacher's start states, for pairs and side-by-side pictures: an orthonormal projection.

        Args:
            x_T: ``(N, C, S, S)``, a floating-point tensor of 16 bits or more.

        Returns:
            ``(N, latent_numel)`` in ``x_T``'s dtype.

        Raises:
            InputError: a tensor of another shape or dtype.
        """
        return project(x_T, self.config.latent_size, self.config.detail_noise)

    def forward(self, z: torch.Tensor, levels: Iterable[int] | None = None, labels: torch.Tensor | None = None) -> Any:
        """Images of latents.

        Differentiable any number of times in eval mode, once in training mode (:func:`advkd.ops.norm_act`).

        Args:
            z: ``(N, latent_numel)`` in the weights' dtype, on the student's device.
            levels: a collection of k in 1 .. depth, the submodules whose images are wanted; None: the last one's alone.
            labels: ``(N,)`` int64 class numbers on the student's device; None: the student has no classes.

        Returns:
            ``(N, C, S, S)`` in [-1, 1]. With ``levels`` a dict ``{k: image of submodule k}``, ``(N, C, R_k, R_k)`` each; images
            before the last are standardised levels of the teacher, not clipped. Submodules after the last level asked for do
            not run.

        Raises:
            InputError: a ``z`` of another shape, on another device or without a floating-point dtype; labels of an
                unconditional student, none of a conditional one, or such as are no class numbers of these latents.
        """
        require_floating("z", z)
        # Any layer may have been replaced by a module of another kind.
        device = next(self.parameters()).device
        if z.device != device:
            raise InputError(f"z must be on {device} like the student, got {z.device}")
        depth = len(self.submodules)
        wanted = {depth} if levels is None else set(levels)
        require_labels(labels, self.class_names, z)
        details = join_class(z, self.latent_parts, None if labels is None else self.embedding(labels))
        outputs, x, upsampled = {}, details.pop(0), False
        blocks = self.submodules[: max(wanted)]
        for k, block in enumerate(blocks, 1):
            if block.upsample and details:
                x = torch.cat((x, details.pop(0)), dim=1)
            # Up-sampling comes with the activation before it, where nobody else needs that at the lower resolution.
            upsample = k not in wanted and bool(blocks[k].upsample) and not details
            x, upsampled = block(x, upsampled, upsample), upsample
            if k in wanted:
                outputs[k] = torch.tanh(self.head(x)) if k == depth else self.terminals[k - 1](x)
        return outputs[depth] if levels is None else outputs

    def levels(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Images of all submodules.

        Args:
            z: ``(N, latent_numel)`` in the weights' dtype, on the student's device.
            labels: as for :meth:`forward`.

        Returns:
            List of ``(N, C, R_k, R_k)`` for k = 1 .. depth, as :meth:`forward` gives them.
        """
        outputs = self(z, levels=range(1, self.depth + 1), **told(labels))
        return [outputs[k] for k in sorted(outputs)]

    def fuse(self, backend: str = "auto", dtype: torch.dtype = torch.float32, tune: bool = True) -> FusedStudent:
        """A :class:`FusedStudent` for fast sampling: batch norm folded, terminal modules dropped.

        Args:
            backend: see :func:`advkd.ops.registry.choose`.
            dtype: of activations and images: float32, bfloat16, float16 or float64 (``cpu`` has the first two).
            tune: on the ``cpu`` backend, choose each layer's algorithm by a measurement of a second or so, kept in the user's
                cache folder (``ADVKD_CACHE``) by layer and processor; False takes the defaults. Plans differ in rounding:
                where bits must not depend on a measurement, take the defaults or load a saved engine. On a GPU each batch
                size's launches are measured when it first comes, and the times are kept there too.

        Returns:
            Engine on the student's device, in eval mode, with weights of its own: the student stays as it is.

        Raises:
            InputError: an unknown backend or dtype, weights that are not finite, or layers that cannot be folded (modules of
                other classes, with hooks or with code of their own).
            BackendUnavailableError: the backend asked for cannot run this student here.
        """
        return FusedStudent.from_student(self, backend, dtype, tune)

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, batch_size: int = 64, start: int = 0, labels: Labels = None) -> torch.Tensor:
        """Images of a seed by the student's own modules; :meth:`fuse` draws faster.

        In eval mode no image depends on ``batch_size``. In training mode batch norm takes each batch's statistics and moves its
        running ones: call ``eval()`` first.

        Args:
            n: number of images.
            seed: int in [0, 2^64) of the latents.
            batch_size: images that are drawn at a time.
            start: index of the first image; image i of a seed is always the same.
            labels: number of a class, or a sequence that images take in turn by their index: image i of K numbers has
                ``labels[i % K]``. None: every class of the student in turn.

        Returns:
            ``(n, C, S, S)`` float32 in [-1, 1] on the CPU.

        Raises:
            InputError: a number out of its range, or labels of an unconditional student.
        """
        seed = whole("seed", seed, 0, 2**64)
        parts, dtype, start = batches(n, batch_size), next(self.parameters()).dtype, whole("start", start)
        numbers = torch.tensor(turns(labels, self.class_names), dtype=torch.int64, device=next(self.parameters()).device)

        def draw(first, count):
            z = self.latents(count, seed, first).to(dtype)
            return self.images(self(z, **told(labels_in_turn(numbers, first, count))))

        return gather((draw(start + first, count).cpu() for first, count in parts), n, self.image_shape)

    def _initialize(self):
        if self.head.weight.is_meta:
            # Weights are to come; torch would import its compiler to draw numbers into no memory.
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=self.config.slope)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for terminal in (*self.terminals, self.head):
            nn.init.normal_(terminal.weight, std=1 / math.sqrt(9 * terminal.in_channels))
        if self.num_classes:
            nn.init.normal_(self.embedding.weight)
