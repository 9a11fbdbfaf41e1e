"""The diffusion teacher: loading, noise, and the sampling paths that the student imitates."""

import hashlib
import json
import math
import os
import re
import zipfile

import torch
from safetensors import safe_open

from ..errors import InputError
from ..ops import philox_normal
from ..runtime.devices import require_device
from ..runtime.files import damaged, digest, read_json, require_regular, why_unreadable
from ..runtime.hub import PRETRAINED, reason, resolve
from ..runtime.pickles import require_weights
from ..runtime.progress import can_be_shown
from .coefficients import VARIANCES, ddim_coefficients, ddpm_coefficients
from .loop import SamplingLoop, network_of

EMBEDDED = {"digits": PRETRAINED / "digits-teacher"}
SAMPLERS = ("ddim", "ddpm")
MOST_BLOCKS, MOST_LAYERS, MOST_TIMESTEPS, LARGEST_CLIP = 32, 64, 10**6, 1e30
"""Limits for configurations that come from elsewhere."""


class Teacher:
    """An unconditional pixel-space diffusion model with its noise schedule.

    Args:
        unet: diffusers ``UNet2DModel`` in eval mode.
        scheduler: diffusers ``DDPMScheduler`` or ``DDIMScheduler``; its noise schedule, prediction type and clipping are used.
        name: what the data set's manifest calls it.
    """

    def __init__(self, unet, scheduler, name="teacher"):
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.scheduler = scheduler
        self.name = name
        self.alpha_bars = scheduler.alphas_cumprod.double()
        self.prediction = scheduler.config.prediction_type
        config = scheduler.config
        self.clip = float(config.clip_sample_range) if config.clip_sample else math.inf
        self.optimize()

    @classmethod
    def from_pretrained(cls, source="digits", device="cpu", dtype=torch.float32):
        """Load a teacher in diffusers' format.

        Args:
            source: ``"digits"`` (embedded), a folder (a pipeline with ``model_index.json``, or a bare UNet folder with a
                scheduler beside it) or a hub id such as ``google/ddpm-celebahq-256``.
            device: torch device.
            dtype: dtype of the network.

        Raises:
            InputError: missing or damaged files, or a teacher that is conditional, works on latents, learns its variance, or
                whose scheduler is neither DDPM nor DDIM.
        """
        device = require_device(device)
        # An unfit repository of the hub is refused before its weights are fetched.
        folder = resolve(source, EMBEDDED, "teacher", ["*.json", "*/*.json"])
        _refuse_unfit_pipeline(folder)
        # Whatever torch's default device and the mode of autograd are.
        with torch.inference_mode(False), torch.device("cpu"):
            scheduler = _load_scheduler(folder)
            unet = _load_unet(source, folder, dtype)
        return cls(unet.to(device), scheduler, str(source))

    @property
    def image_channels(self):
        """Channels of the images."""
        return self.unet.config.in_channels

    @property
    def image_size(self):
        """Side of the (square) images in pixels."""
        return self.unet.config.sample_size

    @property
    def train_timesteps(self):
        """T, the number of timesteps the teacher was trained with."""
        return len(self.alpha_bars)

    @property
    def device(self):
        """The network's device."""
        return next(self.unet.parameters()).device

    def identity(self):
        """What its paths depend on, for a data set's manifest: weights, network, schedule, prediction, clipping."""
        network = {k: v for k, v in sorted(self.unet.config.items()) if not k.startswith("_")}
        return {
            "name": self.name,
            "parameters": self.num_parameters(),
            "weights_sha256": digest(self.unet.state_dict()),
            "network_sha256": hashlib.sha256(json.dumps(network, sort_keys=True).encode()).hexdigest(),
            "schedule_sha256": digest({"alpha_bars": self.alpha_bars}),
            "prediction": self.prediction,
            "clip": self.clip if math.isfinite(self.clip) else None,
            "variance": str(self.scheduler.config.get("variance_type")),
            **({"autocast": str(self._autocast)} if self._autocast else {}),
        }

    def num_parameters(self):
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.unet.parameters())

    def noise(self, n, seed=0, start=0):
        """x_T of samples ``start .. start + n - 1``: ``(n, C, H, W)`` float32, a function of (seed, index) alone."""
        indices = torch.arange(start, start + n, device=self.device)
        return philox_normal(seed, indices, self._shape, stream="x_T")

    def timesteps(self, sampler="ddim", steps=None):
        """Timesteps of a run, descending: DDIM-``steps`` (default 50) in leading spacing with offset 0, or all T of DDPM."""
        if sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        total = self.train_timesteps
        steps = steps or (min(50, total) if sampler == "ddim" else total)
        if not 1 <= steps <= total:
            raise InputError(f"steps must be between 1 and the teacher's {total} timesteps, got {steps}")
        spacing = total // steps
        return [spacing * i for i in reversed(range(steps))]

    def optimize(self, compiled=None, autocast=None):
        """Choose how the network runs in :meth:`record` and :meth:`sample`; returns the teacher.

        Args:
            compiled: through ``torch.compile`` (a minute or more the first time, kept on disk; every batch size anew); None:
                for recordings on GPUs. On a GPU the whole step is replayed as a captured CUDA graph, compiled or not.
            autocast: ``torch.bfloat16`` for mixed precision (the paths are then others, and a recording says so), or None.
        """
        if autocast not in (None, torch.bfloat16):
            raise InputError(f"autocast must be None or torch.bfloat16, got {autocast}")
        self._compiled, self._autocast, self._loop = compiled, autocast, None
        return self

    def match(self, identity):
        """Take the precision of a recording, given by the :meth:`identity` that it names; returns the teacher."""
        return self.optimize(self._compiled, torch.bfloat16 if identity.get("autocast") else None)

    @torch.no_grad()
    def path(self, x_T, sampler="ddim", steps=None, seed=0, start=0):
        """Yield ``(t, x)`` after every step of a run, x being the state after the step taken at t; the last x is x_0.

        Args:
            x_T: ``(N, C, H, W)`` start states.
            sampler: ``ddim`` (deterministic) or ``ddpm`` (ancestral; step noise is a function of seed, index and step).
            steps: number of steps; see :meth:`timesteps`.
            seed, start: seed and first index of the samples, for the step noise.
        """
        # A loop of its own: several paths may be walked at the same time.
        loop = self._make_loop(network_of(self.unet, self._autocast), len(x_T), sampler, steps, seed, capture=False)
        loop.start(x_T, start)
        for t in self.timesteps(sampler, steps):
            loop.step()
            yield t, loop.x.clone(memory_format=torch.contiguous_format)

    def record(self, x_T, keep, sampler="ddim", steps=None, seed=0, start=0):
        """A run that keeps area averages of some states, made within the steps.

        Args:
            keep: ``{t: r}``: keep the r x r average of the state after the step taken at t.
            x_T, sampler, steps, seed, start: as in :meth:`path`.

        Returns:
            ``(x_0, {t: (N, C, H / r, W / r)})`` float32 on the teacher's device. Order of differentiability 0: no gradient
            flows to ``x_T``.

        Raises:
            InputError: before work starts, an ``x_T`` of another shape, a t that is not of the run, an r that does not divide.
        """
        timesteps = self.timesteps(sampler, steps)
        for t, r in keep.items():
            if t not in timesteps:
                raise InputError(f"keep: there is no timestep {t} in this run (see Teacher.timesteps)")
            if r < 1 or self.image_size % r:
                raise InputError(f"keep: an average over {r} x {r} pixels does not divide images of {self.image_size}")
        compiled = self.device.type == "cuda" if self._compiled is None else self._compiled
        return self._run(x_T, keep, sampler, steps, seed, start, compiled)

    @torch.no_grad()
    def _run(self, x_T, keep, sampler, steps, seed, start, compiled):
        loop = self._kept_loop(len(x_T), sampler, steps, seed, compiled)
        loop.start(x_T, start)
        kept = {}
        for t in self.timesteps(sampler, steps):
            pooled = loop.step(keep.get(t))
            if pooled is not None:
                kept[t] = pooled.clone(memory_format=torch.contiguous_format)
        return loop.x.clone(memory_format=torch.contiguous_format), kept

    def sample(self, n, seed=0, sampler="ddim", steps=None, start=0):
        """Images of samples ``start .. start + n - 1``: ``(n, C, H, W)`` float32 in [-1, 1]."""
        # Compiled only where that was asked for: every n would be compiled anew.
        x_0, _ = self._run(self.noise(n, seed, start), {}, sampler, steps, seed, start, bool(self._compiled))
        return x_0.clamp_(-1, 1)

    def _kept_loop(self, n, sampler, steps, seed, compiled):
        # The last one is kept: a recorder asks for the same again and again, and graphs hold memory. What a captured graph
        # reads is in its key: moved or replaced weights, another schedule.
        tensors = (*self.unet.parameters(), *self.unet.buffers())
        parameters = tuple((t.data_ptr(), t.dtype, t.device) for t in tensors)
        table = tuple(self._table(sampler, steps))
        key = (n, sampler, steps, seed, compiled, self.unet, parameters, table)
        if self._loop is None or self._loop[0] != key:
            self._loop = None
            network = network_of(self.unet, self._autocast, compiled)
            self._loop = (key, self._make_loop(network, n, sampler, steps, seed, capture=self.device.type == "cuda"))
        return self._loop[1]

    def _make_loop(self, network, n, sampler, steps, seed, capture):
        timesteps, table = self.timesteps(sampler, steps), self._table(sampler, steps)
        return SamplingLoop(network, (n, *self._shape), timesteps, table, seed, self.device, capture)

    def _table(self, sampler, steps):
        """The coefficients of a run's steps."""
        timesteps = self.timesteps(sampler, steps)
        return [self.coefficients(t, s, sampler) for t, s in zip(timesteps, [*timesteps[1:], None])]

    def __getstate__(self):
        # A copy makes its own loop.
        return {**self.__dict__, "_loop": None}

    def coefficients(self, t, following, sampler):
        """Coefficients of the step from timestep ``t`` to ``following`` (None: to alpha_bar = 1).

        DDIM with eta = 0, or DDPM with the scheduler's fixed variance: see :mod:`advkd.coefficients`.
        """
        a_t = float(self.alpha_bars[t])
        a_s = float(self.alpha_bars[following]) if following is not None else 1.0
        try:
            if sampler == "ddim":
                return ddim_coefficients(a_t, a_s, self.prediction, clip=self.clip)
            variance = self.scheduler.config.get("variance_type") or "fixed_small"
            return ddpm_coefficients(a_t, a_s, self.prediction, variance, self.clip, noisy=t > 0)
        except InputError as error:
            raise InputError(f"teacher {self.name}: {error}") from error

    @property
    def _shape(self):
        return (self.image_channels, self.image_size, self.image_size)


def _part(folder, name):
    # The first repositories of the hub keep the network and the scheduler beside model_index.json.
    return folder / name if (folder / name).is_dir() else folder


def _refuse_unfit_pipeline(folder):
    index = folder / "model_index.json"
    parts = read_json(index, "pipeline index") if os.path.lexists(index) else {}
    for part in ("vae", "vqvae", "movq"):
        if part in parts:
            raise InputError(f"teacher {folder} works on latents (it has a {part}); advkd distils pixel-space teachers")
    for part in ("text_encoder", "image_encoder"):
        if part in parts:
            raise InputError(f"teacher {folder} is conditional (it has a {part}); advkd distils unconditional teachers")
    config = read_json(_part(folder, "unet") / "config.json", "teacher configuration")
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise InputError(f"teacher {folder} has a {kind}; only unconditional UNet2DModel teachers can be distilled")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise InputError(f"teacher {folder} is class-conditional; advkd distils unconditional teachers")
    if config.get("out_channels") != config.get("in_channels"):
        shapes = f"{config.get('in_channels')} channels in, {config.get('out_channels')} out"
        raise InputError(f"teacher {folder} has {shapes}: a learned variance is not supported")
    if config.get("time_embedding_type") == "fourier":
        raise InputError(f"teacher {folder} is told the noise's level (Fourier embedding), not a timestep: it is not supported")
    size = config.get("sample_size")
    if not isinstance(size, int) or size < 8 or size & (size - 1):
        raise InputError(f"teacher {folder} has sample_size {size}; a student needs square images of side 4 * 2^k")
    if config.get("quantization_config") is not None:
        raise InputError(f"teacher {folder} is quantized; save it with plain weights")
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"teacher {folder}: {name} must be finite, got {value}")
    for name in ("norm_eps", "mid_block_scale_factor"):
        if isinstance(value := config.get(name, 1), (int, float)) and value <= 0:
            raise InputError(f"teacher {folder}: {name} must be positive, got {value}")
    # Before a network of so many parts is built: a file of a few bytes can ask for any number.
    channels, layers = config.get("block_out_channels", ()), config.get("layers_per_block", 1)
    if not isinstance(channels, list) or len(channels) > MOST_BLOCKS or not isinstance(layers, int) or layers > MOST_LAYERS:
        limits = f"at most {MOST_BLOCKS} block_out_channels and {MOST_LAYERS} layers_per_block"
        raise InputError(f"teacher {folder}: the network's configuration may have {limits}")


def _load_unet(source, folder, dtype):
    """Safetensors where there are any; else diffusers' older ``.bin`` files, read as weights only, never as code."""
    from diffusers import UNet2DModel
    from diffusers.utils import logging

    place = "unet/" if (folder / "unet").is_dir() else ""
    for suffix in ("safetensors", "bin"):
        weights = f"{place}diffusion_pytorch_model*.{suffix}"
        folder = resolve(source, EMBEDDED, "teacher", ["*.json", "*/*.json", weights])
        if any(folder.glob(weights)):
            break
    else:
        raise InputError(f"teacher {folder}: there is no {place}diffusion_pytorch_model.safetensors")
    if not can_be_shown():
        logging.disable_progress_bar()
    part = _part(folder, "unet")
    paths = _weight_files(sorted(folder.glob(weights)), part, suffix)
    size = sum(path.stat().st_size for path in paths)
    options = {"torch_dtype": dtype, "use_safetensors": suffix == "safetensors"}
    options |= {"low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        # A network without memory, and a pass through it: configurations can be such that only that fails.
        with torch.device("meta"), torch.no_grad():
            network = UNet2DModel.from_config(UNet2DModel.load_config(part))
            x = torch.empty(1, network.config.in_channels, network.config.sample_size, network.config.sample_size)
            if network(x, torch.zeros(1, dtype=torch.int64)).sample.shape != x.shape:
                raise InputError("its network gives images of another shape than it takes")
        parameters = sum(p.numel() for p in network.parameters())
        if parameters > size:
            raise InputError(f"the configuration asks for {parameters:,} parameters, the weights have {size:,} bytes")
        unet, report = UNet2DModel.from_pretrained(part, **options)
    except Exception as error:
        why = why_unreadable(paths[0], error)
        raise InputError(f"teacher {folder}: the weights cannot be read ({why}): restore or fetch a copy of them") from error
    wrong = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if wrong:
        raise InputError(f"teacher {folder}: the weights do not fit the configuration ({len(wrong)} tensors, {wrong[0]} first)")
    if not all(p.is_floating_point() and p.isfinite().all() for p in unet.parameters()):
        raise InputError(f"teacher {folder}: its weights are not finite real numbers: restore or fetch a copy of them")
    return unet


def _is_schedule(alpha_bars, steps):
    """True if the noise grows from step to step, and is never more than all of a state."""
    if alpha_bars.shape != (steps,) or not alpha_bars.isfinite().all():
        return False
    return bool(((alpha_bars >= 0) & (alpha_bars <= 1)).all() and (alpha_bars.diff() <= 0).all())


def _weight_files(paths, folder, suffix):
    """A network's files of weights, ``paths`` and what an index names; all are of the kind ``suffix`` and of this folder."""
    indexes = {}
    for index in folder.glob(f"diffusion_pytorch_model.{suffix}.index.json"):
        named = read_json(index, "index of weights", ("weight_map",))["weight_map"]
        files = list(named.values()) if isinstance(named, dict) else [None]
        if not all(isinstance(name, str) and re.fullmatch(rf"[\w.-]+\.{suffix}", name) for name in files):
            raise InputError(f"index of weights {index} may name .{suffix} files of its own folder only")
        paths += [folder / name for name in sorted(set(files)) if folder / name not in paths]
        indexes[index] = named
    for path in paths:
        require_regular(path, "the teacher's weights")
        if suffix == "bin":
            require_weights(path, "the teacher's weights")
    for index, named in indexes.items():
        _require_named(index, named)
    return paths


def _require_named(index, named):
    """Refuse files without the tensors that their index says: diffusers believes it, and leaves others as they were drawn."""
    for path in {index.parent / file for file in named.values()}:
        try:
            missing = {name for name, file in named.items() if file == path.name} - _names(path)
        except Exception as error:  # damaged files raise about anything
            raise damaged("the teacher's weights", path, error, "restore or fetch a copy of it") from error
        if missing:
            said = f"the teacher's weights {path} lack {min(missing)}, which {index.name} says they hold"
            raise InputError(f"{said}: restore or fetch a copy of both")


def _names(path):
    """Names of a file's tensors."""
    if path.suffix == ".bin":
        mapped = zipfile.is_zipfile(path)  # older files are no archives, and only those can be mapped
        return set(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _load_scheduler(folder):
    import diffusers

    config = read_json(_part(folder, "scheduler") / "scheduler_config.json", "scheduler configuration")
    kind = config.get("_class_name", "DDPMScheduler")
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise InputError(f"teacher {folder} has a {kind}; a DDPMScheduler or DDIMScheduler configuration is needed")
    if not isinstance(steps := config.get("num_train_timesteps", 1000), int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise InputError(f"teacher {folder}: num_train_timesteps must be in [1, {MOST_TIMESTEPS:,}], got {steps!r}")
    clip = config.get("clip_sample_range", 1.0)
    if type(clip) not in (int, float) or not 0 <= clip < LARGEST_CLIP:
        raise InputError(f"teacher {folder}: clip_sample_range must be in [0, {LARGEST_CLIP:g}), got {clip!r}")
    try:
        scheduler = getattr(diffusers, kind).from_config(config)
    except Exception as error:
        raise InputError(f"teacher {folder}: the scheduler configuration cannot be used ({reason(error)})") from error
    if not _is_schedule(scheduler.alphas_cumprod, steps):
        raise InputError(f"teacher {folder}: its betas make no noise schedule: alpha_bar must fall within [0, 1]")
    if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise InputError(f"teacher {folder}: prediction_type {scheduler.config.prediction_type!r} is not supported")
    if scheduler.config.thresholding:
        raise InputError(f"teacher {folder}: dynamic thresholding is not supported")
    variance = scheduler.config.get("variance_type") or VARIANCES[0]
    if variance not in VARIANCES:
        raise InputError(f"teacher {folder}: variance_type {variance!r} is not supported (known: {', '.join(VARIANCES)})")
    return scheduler
