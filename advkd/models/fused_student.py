"""The student as it is used: batch norm folded into the convolutions, terminal modules gone, the whole network one op."""

import math
import warnings
import weakref
from dataclasses import dataclass, fields

import torch
from torch import nn

from ..data.levels import resolutions
from ..data.pictures import to_uint8
from ..engines.cpu import Plan, choose_algorithms
from ..engines.gpu import GpuEngine
from ..engines.gpu_search import GpuPlan
from ..errors import InputError
from ..ops import philox_normal, registry
from ..ops.arguments import whole
from ..ops.conv_block import ConvLayer, require_finite
from ..ops.latents import latent_numel, latent_parts
from ..ops.layout import require_floating
from ..ops.student_forward import encode, pack, student_forward
from ..runtime.devices import to_host
from ..runtime.ranges import named
from .batch_norm import CannotFoldError, fold, geometry, has_own_code, read_by_fold, require_foldable, unwrapped
from .saving import PretrainedModule
from .student import Student, StudentConfig, Submodule, batches, gather, indices_of

GPU_BACKENDS = ("cuda", "triton")
GEOMETRIES = tuple(((3, 3), (1, 1), padding, (1, 1), 1, "zeros") for padding in ((1, 1), "same"))
"""The form of every convolution of an engine, as :func:`advkd.models.batch_norm.geometry` gives it."""
NO_NORM = nn.Identity()
STREAMED = {torch.float32: torch.Tensor.float, torch.uint8: to_uint8}
"""How :meth:`FusedStudent.stream` hands images out."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class FusedStudentConfig(StudentConfig):
    """A student's shape and how it is computed.

    Attributes:
        dtype: of activations and images: float32, bfloat16, float16 or float64.
        algorithms: one of :data:`advkd.ops.conv_block.ALGORITHMS` per convolution for the ``cpu`` backend; empty: the defaults.
    """

    dtype: str = "float32"
    algorithms: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        layers = convolutions(self)
        if self.algorithms and len(self.algorithms) != len(layers):
            raise InputError(f"algorithms must name one for each of the {len(layers)} convolutions, got {len(self.algorithms)}")
        for i, (layer, algorithm) in enumerate(zip(layers, self.algorithms)):
            if algorithm not in layer.algorithms():
                raise InputError(f"algorithms: convolution {i} takes {', '.join(layer.algorithms())}, not {algorithm!r}")


def convolutions(config):
    """The :class:`ConvLayer` of every convolution of a student, in order."""
    parts = latent_parts(config.image_channels, config.image_size, config.latent_size, config.detail_noise)
    details = {side: channels for channels, side in parts[1:]}
    layers, features, previous = [], parts[0][0], 4
    for channels, side in zip(config.channels, resolutions(config.image_size, len(config.channels)), strict=True):
        upsample = side > previous
        detail = details.get(previous, 0) if upsample else 0
        layers.append(ConvLayer(features + detail, channels, previous, previous, upsample, detail=detail))
        layers.append(ConvLayer(channels, channels, side, side))
        features, previous = channels, side
    return [*layers, ConvLayer(features, config.image_channels, previous, previous, activation="tanh")]


def _prepare_loaded(module, incompatible_keys):
    module._prepare()


def _stages(student):
    """A student's convolutions, each with the norm behind it; that behind the head changes nothing."""
    blocks = [unwrapped(block) for block in student.submodules]
    stages = [stage for b in blocks for stage in ((b.convolution1, b.norm1), (b.convolution2, b.norm2))]
    return [(unwrapped(convolution), unwrapped(norm)) for convolution, norm in (*stages, (student.head, NO_NORM))]


def _require_fusable(student):
    """A student's stages; one that computes something else than its tensors say, or than an engine can, is refused.

    Raises:
        CannotFoldError: naming the part.
    """
    parts = ((student, Student), *((unwrapped(block), Submodule) for block in student.submodules))
    if any(has_own_code(part, kind) for part, kind in parts):
        raise CannotFoldError("a student with hooks or with a forward of its own cannot be fused: take them off")
    slopes = {block.slope for block in student.submodules}
    if len(slopes) > 1 or not 0 <= max(slopes) < 1:
        found = ", ".join(map(str, sorted(slopes)))
        raise CannotFoldError(f"the submodules' slopes must be equal in an engine, and in [0, 1), got {found}")
    stages = _stages(student)
    for i, (convolution, norm) in enumerate(stages):
        require_foldable(convolution, norm)
        if geometry(vars(convolution)) not in GEOMETRIES:
            raise CannotFoldError(f"convolution {i} must have 3x3 pixels and a border of one zero, got {convolution}")
    return stages


def read_by_fusing(student):
    """The inputs of :meth:`FusedStudent.from_student`: a tuple of what is no tensor, and a list of the tensors.

    Raises:
        CannotFoldError: there is no such engine.
    """
    stages = _require_fusable(student)
    described, tensors = [*vars(student.config).values(), student.submodules[0].slope], []
    described += [block.upsample for block in student.submodules]
    for stage in stages:
        own, parts = read_by_fold(*stage)
        described.append(own)
        tensors += parts
    return tuple(described), tensors


class FusedStudent(PretrainedModule, nn.Module):
    """A student for sampling only. Made by :meth:`Student.fuse`, or loaded by :meth:`from_pretrained`.

    Its dtype is chosen when it is made; ``to(device)``, copies, pickles and ``load_state_dict`` work. Weights are packed then:
    writes into its buffers are not seen, nor later changes of the student (fuse again, or use the pipeline).

    Args:
        config: a :class:`FusedStudentConfig`.
        backend: see :func:`advkd.ops.registry.choose`; ``auto`` is decided when the weights come.

    ``fused(z)`` has no gradient. Several threads may call one engine at the same time. On a GPU every batch size that comes is
    planned, packed and captured as a CUDA graph the first time (:meth:`plan`; the last eight graphs are kept).
    """

    config_class = FusedStudentConfig
    tune, mixed = False, True
    """Whether plans for GPUs are measured, and may then take kernels of both GPU backends."""

    def __init__(self, config, backend="auto"):
        super().__init__()
        self.config = config
        self.backend = backend
        self.dtype = DTYPES[config.dtype]
        self.layers = convolutions(config)
        self.latent_parts = latent_parts(config.image_channels, config.image_size, config.latent_size, config.detail_noise)
        self.latent_numel = latent_numel(config.image_channels, config.image_size, config.latent_size, config.detail_noise)
        # Folded weights come wide; the cpu backend keeps them so, the others narrow them.
        wide = torch.promote_types(self.dtype, torch.float32)
        for i, layer in enumerate(self.layers):
            self.register_buffer(f"weight{i}", torch.empty(layer.c_out, layer.c_in, 3, 3, dtype=wide))
            self.register_buffer(f"bias{i}", torch.empty(layer.c_out, dtype=wide))
        self._packed, self._engine = [], None
        self.register_load_state_dict_post_hook(_prepare_loaded)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def from_student(cls, student, backend="auto", dtype=torch.float32, tune=True):
        """Fold a :class:`Student`, which is not changed; see :meth:`Student.fuse`.

        Raises:
            InputError: layers that cannot be folded (:func:`advkd.models.batch_norm.fold`), weights that are not finite.
        """
        names = {value: name for name, value in DTYPES.items()}
        if dtype not in names:
            raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
        _require_fusable(student)
        device = student.head.weight.device
        wished, backend = backend, registry.choose_for_dtype("student_forward", dtype, backend, device)
        shape = {field.name: getattr(student.config, field.name) for field in fields(StudentConfig)}
        shape["slope"] = student.submodules[0].slope
        with device:
            module = cls(FusedStudentConfig(**shape, dtype=names[dtype]), backend)
        module.tune, module.mixed = tune, wished == "auto"
        module._fill(student)
        if backend == "cpu" and tune:
            module.config.algorithms = choose_algorithms(module.layers, dtype)
        return module._prepare()

    @classmethod
    def from_pretrained(cls, source, device="cpu", backend="auto"):
        """Load what :meth:`save_pretrained` wrote: folded weights and the algorithms that were chosen.

        The algorithms hold on every processor (their weights are packed anew here); those of another model of processor may
        not be its fastest.
        """
        module = super().from_pretrained(source, device)
        wished, backend = backend, registry.choose_for_dtype("student_forward", module.dtype, backend, torch.device(device))
        if (backend, wished == "auto") == (module.backend, module.mixed):
            return module
        module.backend, module.mixed = backend, wished == "auto"
        return module._prepare()

    def _fill(self, student):
        if [block.upsample for block in student.submodules] != [layer.upsample for layer in self.layers[:-1:2]]:
            raise CannotFoldError("the student's submodules do not up-sample where its configuration says, and cannot be fused")
        folded = [fold(*stage) for stage in _stages(student)]
        for i, (weight, bias) in enumerate(folded):
            if weight.shape != self._weight(i).shape:
                raise CannotFoldError(
                    f"convolution {i} must have weights {tuple(self._weight(i).shape)}, got {tuple(weight.shape)}"
                )
            self._weight(i).copy_(weight)
            self._bias(i).copy_(bias)

    def _prepare(self):
        """Check the weights; bring them into the form that the backend reads on their device."""
        self.backend = registry.choose_for_dtype("student_forward", self.dtype, self.backend, self.weight0.device)
        for i in range(len(self.layers)):
            require_finite(**{f"the weight of convolution {i}": self._weight(i), f"the bias of convolution {i}": self._bias(i)})
        self._packed, self._engine = [], None
        if self.backend == "cpu":
            if not self.config.algorithms:
                self.config.algorithms = tuple(layer.default(self.dtype) for layer in self.layers)
            plan = zip(range(len(self.layers)), self.layers, self.config.algorithms, strict=True)
            self._packed = [pack(self._weight(i), self._bias(i), layer, self.dtype, name) for i, layer, name in plan]
            # Idle workspaces go with the engine; one that is still in use elsewhere makes its own anew.
            weakref.finalize(self, torch.ops.advkd_cpu.clear_workspaces).atexit = False
            return self.eval()
        if self.backend == "reference":
            for name, buffer in list(self.named_buffers()):
                form = torch.channels_last if buffer.ndim == 4 else torch.contiguous_format
                setattr(self, name, buffer.to(self.dtype, memory_format=form))
        else:
            self._engine = self._gpu_engine()
        return self.eval()

    def _gpu_engine(self):
        device, count = self.weight0.device, range(len(self.layers))
        able = tuple(b for b in GPU_BACKENDS if self.mixed and registry.gap("student_forward", b, device) is None)
        folded = ([self._weight(i) for i in count], [self._bias(i) for i in count])
        return GpuEngine(self.layers, *folded, self.config.slope, self.dtype, self.backend, self.tune, able)

    def _apply(self, function, recurse=True):
        """Moves between devices; a new dtype would not be the one that the images are in."""
        if function(self.weight0[:0]).dtype != self.weight0.dtype:
            raise InputError(f"the engine computes in {self.dtype}: choose another dtype by student.fuse(dtype=...)")
        before = self.weight0.device
        super()._apply(function, recurse)
        after = self.weight0.device
        if after != before and after.type != "meta":
            if after.type != before.type:
                self.backend, self.mixed = "auto", True
            self._prepare()
        return self

    def __getstate__(self):
        # Packed weights are this processor's, graphs this process'.
        return {**super().__getstate__(), "_packed": [], "_engine": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.backend != "reference":
            self._prepare()

    def _weight(self, i):
        return getattr(self, f"weight{i}")

    def _bias(self, i):
        return getattr(self, f"bias{i}")

    def latents(self, n, seed=0, start=0):
        """z of images ``start .. start + n - 1``, as :meth:`Student.latents`."""
        indices = indices_of(n, start, self.weight0.device)
        return philox_normal(seed, indices, (self.latent_numel,), stream="z")

    @torch.no_grad()
    def forward(self, z):
        """Images ``(N, C, S, S)`` in [-1, 1], in the engine's dtype, of latents ``(N, latent_numel)``."""
        require_floating("z", z)
        if self.backend in GPU_BACKENDS:
            if z.ndim != 2 or z.shape[1] != self.latent_numel:
                raise InputError(f"z must have shape (N, {self.latent_numel}), got {tuple(z.shape)}")
            if z.device != self.weight0.device:
                raise InputError(f"z must be on {self.weight0.device}, got {z.device}")
            return self._engine(z)
        count = range(len(self.layers))
        return student_forward(
            z,
            [self._weight(i) for i in count],
            [self._bias(i) for i in count],
            self.layers,
            slope=self.config.slope,
            dtype=self.dtype,
            packed=self._packed,
            algorithms=self.config.algorithms if self._packed else (),
            backend=self.backend,
        )

    def stream(self, n, seed=0, batch_size=64, start=0, dtype=torch.float32):
        """An iterator over the images of :meth:`sample`, about ``batch_size`` at a time; memory does not grow with ``n``.

        Args:
            dtype: float32: ``(batch, C, S, S)`` in [-1, 1]; uint8: ``(batch, S, S, C)`` in 0 .. 255, as pictures are stored.

        On a GPU images come in pinned memory of the host, copied while the next batch is drawn. Where a batch does not fit the
        device's memory it is halved once, with a warning; then ``torch.OutOfMemoryError`` says so.
        """
        start = whole("start", start)
        return self.draw(((start + first, count) for first, count in batches(n, batch_size)), seed, dtype)

    def draw(self, parts, seed=0, dtype=torch.float32):
        """:meth:`stream` of chosen images: ``parts`` are ``(first, count)``, drawn one after the other.

        Any iterable does; a part is taken from it when its images are to be drawn, on a GPU one part ahead of them.
        """
        if not isinstance(dtype, torch.dtype) or dtype not in STREAMED:
            raise InputError(f"dtype must be one of {', '.join(map(str, STREAMED))}, got {dtype}")
        seed = whole("seed", seed, 0, 2**64)
        pieces = (STREAMED[dtype](images) for images in self._drawn(parts, seed))
        return to_host(pieces, self.weight0.device)

    def _drawn(self, parts, seed):
        """Batches of images on the engine's device."""
        most = math.inf
        for first, count in parts:
            last = first + count
            while True:
                taken = min(last - first, most)
                images = self._try(taken, seed, first)
                if images is None:
                    most = self._halved(taken, most)
                    continue
                yield images
                first += taken
                if first == last:
                    break

    def _halved(self, count, most):
        """How many images a batch may have, as ``count`` do not fit; an error where they have been halved (``most``) before."""
        if most < math.inf or count == 1:
            text = f"{count} images of {self.config.image_size}x{self.config.image_size} do not fit the memory of"
            raise torch.OutOfMemoryError(f"out of memory: {text} {self.weight0.device}: lower batch_size")
        half = -(-count // 2)
        warnings.warn(f"out of memory with batches of {count} images: going on with {half}", stacklevel=3)
        self._forget()
        return half

    def _try(self, count, seed, first):
        """Images, or None where they do not fit: then nothing of the attempt keeps memory, its traceback neither."""
        try:
            with named("latents"):
                z = self.latents(count, seed, first)
            with named("student"):
                return self(z)
        except torch.OutOfMemoryError:
            return None

    def _forget(self):
        """Give a GPU's graphs and cached memory back."""
        if self._engine is not None:
            self._engine = self._gpu_engine()
        if self.weight0.device.type == "cuda":
            torch.cuda.empty_cache()

    def sample(self, n, seed=0, batch_size=64, start=0):
        """Images of seed ``seed``, ``(n, C, S, S)`` float32 in [-1, 1] on the CPU; image i is that of index ``start + i``.

        Batches are written straight into the result: beside it this takes one batch of images (two on a GPU) and
        :meth:`memory`. 10,000 images of 256x256 are 7.9 GB; :meth:`stream` takes no more than one batch at a time.
        """
        return gather(self.stream(n, seed, batch_size, start), n, self.config)

    def memory(self, batch_size=1):
        """Bytes that the engine takes beside latents and images, on a CPU for torch's current number of threads.

        ``folded``: float32 weights, kept for saving; ``weights``: packed ones (on a GPU those of the batch sizes planned so
        far); ``workspace``: activations and each thread's scratch, kept from call to call (one for each call at the same time)
        until an engine is deleted. Not known for ``reference``.
        """
        folded = sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())
        if self.backend == "cpu":
            numbers = encode(self.layers, self.dtype, self.config.algorithms)
            workspace = torch.ops.advkd_cpu.workspace_bytes(numbers, batch_size)
            return {"folded": folded, "weights": sum(packed.numel() for packed in self._packed), "workspace": workspace}
        if self.backend not in GPU_BACKENDS:
            raise InputError(f"memory is known for the backends cpu, cuda and triton, not {self.backend!r}")
        workspace = self._engine.workspace_bytes(batch_size)
        return {"folded": folded, "weights": self._engine.packed_bytes(), "workspace": workspace}

    def plan(self, measured=True, batch_size=1):
        """How every layer is computed: a :class:`advkd.engines.cpu.Plan`, on a GPU a :class:`advkd.engines.gpu_search.GpuPlan`; to be printed.

        ``measured``: with times of this device, ``batch_size``: of a GPU's plan.
        """
        if self.backend in GPU_BACKENDS:
            return GpuPlan.of(self._engine, batch_size, measured)
        if self.backend != "cpu":
            raise InputError(f"a plan exists for the backends cpu, cuda and triton, not {self.backend!r}")
        return Plan.of(self.layers, self.config.algorithms, self.dtype, self._packed, measured)
