"""The student as it is used: batch norm folded into the convolutions, terminal modules gone, the whole network one engine."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..data.labels import labels_in_turn
from ..engines.base import Engine, Options
from ..engines.cpu import CpuEngine
from ..engines.gpu import GpuEngine
from ..engines.plan import Plan
from ..engines.reference import ReferenceEngine
from ..errors import BackendUnavailableError, InputError
from ..ops import philox_normal, registry
from ..ops.arguments import whole
from ..ops.conv_block import require_finite
from ..ops.latents import latent_numel, latent_parts
from ..ops.layout import require_floating
from ..ops.philox import indices_of
from ..ops.student_forward import require_latents
from ..runtime.devices import to_host
from ..runtime.ranges import named
from .classes import Conditional, Labels, flat_join, require_labels, turns
from .folding import folded, folded_embedding, require_fusable
from .saving import PretrainedModule
from .shape import DTYPES, FusedStudentConfig, StudentConfig, batches, convolutions, gather
from .streaming import fitting, form_of

ENGINES: dict[str, type[Engine]] = {
    "reference": ReferenceEngine,
    "cpu": CpuEngine,
    "cuda": GpuEngine,
    "triton": GpuEngine,
}
"""The engine of each backend."""


def _prepare_loaded(module, incompatible_keys):
    # Pickled modules refer to this function by its name.
    module._prepare()


class FusedStudent(Conditional, PretrainedModule):
    """A student for sampling only. Made by :meth:`Student.fuse`, or loaded by :meth:`from_pretrained`.

    Its dtype is chosen when it is made; ``to(device)``, copies, pickles and ``load_state_dict`` work. Weights are packed then:
    writes into its buffers are not seen, nor later changes of the student (fuse again, or use the pipeline).

    ``fused(z)`` has no gradient. Several threads may call one engine at the same time. On a GPU every batch size that comes is
    planned, packed and captured as a CUDA graph the first time (:meth:`plan`; the last eight graphs are kept).

    Args:
        config: a :class:`FusedStudentConfig`.
        backend: see :func:`advkd.ops.registry.choose`; ``auto`` is decided when the weights come.

    Attributes:
        config: the shape, the dtype and the algorithms.
        backend: name of the backend that computes.
        dtype: of activations and images.
        layers: the :class:`advkd.ops.conv_layer.ConvLayer` of each convolution, in order.
        latent_parts: ``[(channels, side), ...]``, the parts of a flat latent in order.
        latent_numel: elements of one latent z, the noise alone.
        embedding: of a student with classes, ``(classes, class_channels * 16)``.
        engine: the :class:`advkd.engines.base.Engine` that computes.

    Examples:
        >>> from advkd import Student
        >>> fused = Student.from_pretrained("digits").fuse(tune=False)
        >>> fused(fused.latents(4, seed=7)).shape
        torch.Size([4, 1, 32, 32])
    """

    config_class = FusedStudentConfig
    config: FusedStudentConfig
    engine: Engine
    embedding: torch.Tensor
    weight0: torch.Tensor
    tune, mixed = False, True
    """True if plans for GPUs are measured, and if they may take kernels of both GPU backends."""

    def __init__(self, config: FusedStudentConfig, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.backend = backend
        self.dtype = DTYPES[config.dtype]
        self.layers = convolutions(config)
        self.latent_parts = latent_parts(config.image_channels, config.image_size, config.latent_size, config.detail_noise)
        self.latent_numel = latent_numel(config.image_channels, config.image_size, config.latent_size, config.detail_noise)
        # Folded weights come wide; an engine may keep them narrow.
        wide = torch.promote_types(self.dtype, torch.float32)
        for i, layer in enumerate(self.layers):
            self.register_buffer(f"weight{i}", torch.empty(layer.c_out, layer.c_in, 3, 3, dtype=wide))
            self.register_buffer(f"bias{i}", torch.empty(layer.c_out, dtype=wide))
        if config.classes:
            self.register_buffer("embedding", torch.empty(len(config.classes), 16 * config.class_channels, dtype=wide))
        self.register_load_state_dict_post_hook(_prepare_loaded)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def from_student(
        cls, student: Any, backend: str = "auto", dtype: torch.dtype = torch.float32, tune: bool = True
    ) -> "FusedStudent":
        """Fold a :class:`Student`, which is not changed; see :meth:`Student.fuse`.

        Args:
            student: a :class:`Student`, in any mode; the engine is made on its device.
            backend: see :func:`advkd.ops.registry.choose`.
            dtype: of activations and images: float32, bfloat16, float16 or float64.
            tune: choose algorithms and launches by measurements, which are kept on disk; False takes the defaults.

        Returns:
            Engine in eval mode on the student's device.

        Raises:
            InputError: layers that cannot be folded (:func:`advkd.models.batch_norm.fold`), weights that are not finite, an
                unknown backend or dtype.
            BackendUnavailableError: the backend asked for cannot run this student on its device.
        """
        names = {value: name for name, value in DTYPES.items()}
        if dtype not in names:
            raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
        require_fusable(student)
        device, shape = student.head.weight.device, {f.name: getattr(student.config, f.name) for f in fields(StudentConfig)}
        config = FusedStudentConfig(**{**shape, "slope": student.submodules[0].slope}, dtype=names[dtype])
        chosen = _choose(backend, convolutions(config), dtype, device)
        with device:
            module = cls(config, chosen)
        module.tune, module.mixed, module.autoencoder = tune, backend == "auto", student.autoencoder
        for i, (weight, bias) in enumerate(folded(student, module.layers)):
            module._weight(i).copy_(weight)
            module._bias(i).copy_(bias)
        if config.classes:
            module.embedding.copy_(folded_embedding(student))
        if tune:
            config.algorithms = ENGINES[chosen].search(module.layers, dtype)
        return module._prepare()

    @classmethod
    def from_pretrained(cls, source: Any, device: str | torch.device = "cpu", backend: str = "auto") -> "FusedStudent":
        """Load what :meth:`save_pretrained` wrote: folded weights and the algorithms that were chosen.

        Algorithms hold on every processor (weights are packed anew); those of another model may not be the fastest on this one.

        Args:
            source: a folder or a hub id (owner/name).
            device: where the engine computes.
            backend: see :func:`advkd.ops.registry.choose`.

        Returns:
            Engine in eval mode on ``device``, in the dtype that it was saved in.

        Raises:
            InputError: missing, damaged or foreign files; the message names the file. A device that is not there.
            BackendUnavailableError: the backend asked for cannot run this student on ``device``.
        """
        module = super().from_pretrained(source, device)
        chosen, mixed = _choose(backend, module.layers, module.dtype, torch.device(device)), backend == "auto"
        if (chosen, mixed) == (module.backend, module.mixed):
            return module
        module.backend, module.mixed = chosen, mixed
        return module._prepare()

    def _prepare(self):
        """Check the weights; make the engine that computes with them on their device."""
        self.backend = _choose(self.backend, self.layers, self.dtype, self.weight0.device)
        for i in range(len(self.layers)):
            require_finite(**{f"the weight of convolution {i}": self._weight(i), f"the bias of convolution {i}": self._bias(i)})
        if self.config.classes:
            require_finite(**{"the embedding": self.embedding})
        self.engine = self._make_engine(ENGINES[self.backend])
        self.config.algorithms = self.engine.options.algorithms
        for i, (weight, bias) in enumerate(zip(self.engine.weights, self.engine.biases, strict=True)):
            setattr(self, f"weight{i}", weight)
            setattr(self, f"bias{i}", bias)
        return self.eval()

    def _make_engine(self, kind):
        weights, biases = ([part(i) for i in range(len(self.layers))] for part in (self._weight, self._bias))
        options = Options(self.backend, self.tune, self.mixed, self.config.algorithms)
        return kind(self.layers, weights, biases, self.config.slope, self.dtype, options)

    def _apply(self, function, recurse=True):
        """Moves between devices; a new dtype would not be the one that the images are in."""
        if function(self.weight0[:0]).dtype != self.weight0.dtype:
            raise InputError(f"the engine computes in {self.dtype}: choose another dtype by student.fuse(dtype=...)")
        before = self.weight0.device
        super()._apply(function, recurse)
        after = self.weight0.device
        if after.type == "meta":
            # There are shapes alone, which plain operations know.
            self.engine = self._make_engine(ReferenceEngine)
        elif after != before:
            if after.type != before.type:
                self.backend, self.mixed = "auto", True
            self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # An engine is this processor's and this process's.
        return {**super().__getstate__(), "engine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Older versions kept an engine's parts here.
        super().__setstate__({key: value for key, value in state.items() if key not in ("_packed", "_engine")})
        self._prepare()

    def _weight(self, i):
        return getattr(self, f"weight{i}")

    def _bias(self, i):
        return getattr(self, f"bias{i}")

    def latents(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Latents z of images ``start .. start + n - 1``, as :meth:`Student.latents`: a function of (seed, index) alone.

        Args:
            n: number of latents.
            seed: int in [0, 2^64) of the Philox noise.
            start: index of the first image.

        Returns:
            ``(n, latent_numel)`` float32, standard normal, on the engine's device.

        Raises:
            InputError: a number out of its range.
        """
        indices = indices_of(n, start, self.weight0.device)
        return philox_normal(seed, indices, (self.latent_numel,), stream="z")

    @torch.no_grad()
    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images of latents.

        Args:
            z: ``(N, latent_numel)``, any floating-point dtype of the ops, on the engine's device.
            labels: ``(N,)`` int64 class numbers on the engine's device; None: the student has no classes.

        Returns:
            ``(N, C, S, S)`` in [-1, 1], in the engine's dtype, on its device and without a gradient.

        Raises:
            InputError: a ``z`` of another shape, device or kind of dtype, or labels as :meth:`Student.forward` refuses them.
        """
        require_floating("z", z)
        require_labels(labels, self.class_names, z)
        if labels is None:
            return self.engine(z)
        require_latents(z, self.latent_numel, self.weight0.device)
        return self.engine(self._joined(z, labels))

    def stream(
        self,
        n: int,
        seed: int = 0,
        batch_size: int = 64,
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        labels: Labels = None,
    ) -> Iterator[torch.Tensor]:
        """An iterator over the images of :meth:`sample`, about ``batch_size`` at a time; memory does not grow with ``n``.

        On a GPU images come in pinned memory of the host, copied while the next batch is drawn. Where a batch does not fit the
        device's memory it is halved once, with a warning; then ``torch.OutOfMemoryError`` says so.

        Args:
            n: number of images.
            seed: int in [0, 2^64) of the latents.
            batch_size: images that are drawn at a time.
            start: index of the first image.
            dtype: float32: ``(batch, C, S, S)`` in [-1, 1]; uint8: ``(batch, S, S, C)`` in 0 .. 255, as pictures are stored.
            labels: classes that images take in turn by their index, as for :meth:`Student.sample`.

        Returns:
            An iterator over tensors on the CPU.

        Raises:
            InputError: a number out of its range, another dtype, or labels of an unconditional student, at the call.
            torch.OutOfMemoryError: half a batch does not fit either, while images are taken.

        Examples:
            >>> from advkd import Student
            >>> fused = Student.from_pretrained("digits").fuse(tune=False)
            >>> [len(images) for images in fused.stream(10, batch_size=4)]
            [4, 4, 2]
        """
        start = whole("start", start)
        return self.draw(((start + first, count) for first, count in batches(n, batch_size)), seed, dtype, labels)

    def draw(
        self, parts: Iterable[tuple[int, int]], seed: int = 0, dtype: torch.dtype = torch.float32, labels: Labels = None
    ) -> Iterator[torch.Tensor]:
        """:meth:`stream` of chosen images: ``parts`` are ``(first, count)``, drawn one after the other.

        Any iterable does; a part is taken from it when its images are to be drawn, on a GPU one part ahead of them.

        Args:
            parts: pairs of the first image's index and the number of images.
            seed: int in [0, 2^64) of the latents.
            dtype: float32 or uint8, as for :meth:`stream`.
            labels: as for :meth:`stream`.

        Returns:
            An iterator over tensors on the CPU, one for each part (several for a part that had to be halved).

        Raises:
            InputError: another dtype, a seed out of its range or labels of an unconditional student, at the call.
            torch.OutOfMemoryError: as for :meth:`stream`.
        """
        form, seed = form_of(dtype), whole("seed", seed, 0, 2**64)
        device, size = self.weight0.device, self.config.image_size
        numbers = torch.tensor(turns(labels, self.class_names), dtype=torch.int64, device=device)
        what = f"images of {size}x{size} do not fit the memory of {device}"
        drawn = fitting(partial(self._draw, seed, numbers), parts, self._forget, what)
        return to_host((form(self.images(x)) for x in drawn), device)

    def _draw(self, seed, numbers, first, count):
        """A batch of images on the engine's device, which take the class ``numbers`` in turn."""
        with named("latents"):
            z = self.latents(count, seed, first)
        with named("student"):
            labels = labels_in_turn(numbers, first, count)
            # Numbers in turn are known to fit: a look at them would wait for the device.
            return self(z) if labels is None else self.engine(self._joined(z, labels))

    def _joined(self, z, labels):
        return flat_join(z, self.latent_parts, F.embedding(labels, self.embedding))

    def _forget(self):
        """Give a GPU's graphs and cached memory back."""
        self.engine = self._make_engine(ENGINES[self.backend])
        if self.weight0.device.type == "cuda":
            torch.cuda.empty_cache()

    def sample(self, n: int, seed: int = 0, batch_size: int = 64, start: int = 0, labels: Labels = None) -> torch.Tensor:
        """Images of a seed.

        Batches are written straight into the result: beside it this takes one batch of images (two on a GPU) and
        :meth:`memory`. 10,000 images of 256x256 are 7.9 GB; :meth:`stream` takes no more than one batch at a time.

        Args:
            n: number of images.
            seed: int in [0, 2^64) of the latents.
            batch_size: images that are drawn at a time.
            start: index of the first image.
            labels: as for :meth:`stream`.

        Returns:
            ``(n, C, S, S)`` float32 in [-1, 1] on the CPU; image i is that of index ``start + i``.

        Raises:
            InputError: a number out of its range, or labels of an unconditional student.
            torch.OutOfMemoryError: as for :meth:`stream`.
        """
        return gather(self.stream(n, seed, batch_size, start, labels=labels), n, self.image_shape)

    def memory(self, batch_size: int = 1) -> dict[str, int]:
        """Bytes that the engine takes beside latents and images, on a CPU for torch's current number of threads.

        Args:
            batch_size: images of one call.

        Returns:
            Bytes by name. ``folded``: float32 weights, kept for saving; ``weights``: packed ones (on a GPU those of the batch
            sizes planned so far); ``workspace``: activations and each thread's scratch, kept from call to call (one for each
            call at the same time) until an engine is deleted.

        Raises:
            InputError: the backend is ``reference``, whose memory is not known.
        """
        kept = sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())
        return {"folded": kept, **self.engine.memory(batch_size)}

    def plan(self, measured: bool = True, batch_size: int = 1) -> Plan:
        """How every layer is computed, to be printed: an :class:`advkd.engines.plan.CpuPlan`, on a GPU a ``GpuPlan``.

        Args:
            measured: with times of this device: each part is run a few times.
            batch_size: images of a GPU's plan; on a CPU a plan holds for every batch.

        Raises:
            InputError: the backend is ``reference``.
        """
        return self.engine.plan(batch_size, measured)


def _choose(backend, layers, dtype, device):
    """The backend whose engine computes; one that is asked for by name and cannot is an error."""
    chosen = registry.choose_for_dtype("student_forward", dtype, backend, device)
    gap = ENGINES[chosen].gap(layers, dtype, device)
    if gap is None:
        return chosen
    if backend != "auto":
        raise BackendUnavailableError(f"backend {backend!r} cannot run this student on {device}: {gap}")
    return "reference"
