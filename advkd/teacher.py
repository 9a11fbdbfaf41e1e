"""The diffusion teacher: loading, noise, and the sampling paths that the student imitates."""

import hashlib
import json
import math

import torch

from .errors import InputError
from .files import digest, read_json
from .hub import PRETRAINED, reason, resolve
from .ops import StepCoefficients, philox_normal, sampler_step

EMBEDDED = {"digits": PRETRAINED / "digits-teacher"}
SAMPLERS = ("ddim", "ddpm")


class Teacher:
    """An unconditional pixel-space diffusion model with its noise schedule.

    Args:
        unet: diffusers ``UNet2DModel`` in eval mode.
        scheduler: diffusers ``DDPMScheduler`` or ``DDIMScheduler``; its noise schedule, prediction type and clipping are used.
        name: what the data set's manifest calls it.
    """

    def __init__(self, unet, scheduler, name="teacher"):
        self.unet = unet.eval().requires_grad_(False)
        self.scheduler = scheduler
        self.name = name
        self.alpha_bars = scheduler.alphas_cumprod.double()
        self.prediction = scheduler.config.prediction_type
        config = scheduler.config
        self.clip = float(config.clip_sample_range) if config.clip_sample else math.inf

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
        # An unfit repository of the hub is refused before its weights are fetched.
        folder = resolve(source, EMBEDDED, "teacher", ["*.json", "*/*.json"])
        _refuse_unfit_pipeline(folder)
        scheduler = _load_scheduler(folder)
        return cls(_load_unet(source, folder, dtype).to(device), scheduler, str(source))

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

    @torch.no_grad()
    def path(self, x_T, sampler="ddim", steps=None, seed=0, start=0):
        """Yield ``(t, x)`` after every step of a run, x being the state after the step taken at t; the last x is x_0.

        Args:
            x_T: ``(N, C, H, W)`` start states.
            sampler: ``ddim`` (deterministic) or ``ddpm`` (ancestral; step noise is a function of seed, index and step).
            steps: number of steps; see :meth:`timesteps`.
            seed, start: seed and first index of the samples, for the step noise.
        """
        timesteps = self.timesteps(sampler, steps)
        x = x_T.to(self.device, torch.float32)
        indices = torch.arange(start, start + len(x), device=self.device)
        dtype = next(self.unet.parameters()).dtype
        for i, t in enumerate(timesteps):
            following = timesteps[i + 1] if i + 1 < len(timesteps) else None
            coefficients = self.coefficients(t, following, sampler)
            noise = philox_normal(seed, indices, self._shape, stream="step", step=i) if coefficients.c_z else None
            output = self.unet(x.to(dtype), t).sample.float()
            x, _, _ = sampler_step(x, output, coefficients, noise=noise, return_x0=False)
            yield t, x

    def sample(self, n, seed=0, sampler="ddim", steps=None, start=0):
        """Images of samples ``start .. start + n - 1``: ``(n, C, H, W)`` float32 in [-1, 1]."""
        for _, x in self.path(self.noise(n, seed, start), sampler, steps, seed, start):
            pass
        return x.clamp(-1, 1)

    def coefficients(self, t, following, sampler):
        """Coefficients of the step from timestep ``t`` to ``following`` (None: to alpha_bar = 1).

        DDIM: Song et al. 2020, eq. 12, eta = 0. DDPM: Ho et al. 2020, eq. 6 and 7, with the scheduler's fixed variance.
        The noise that DDIM re-uses is the network's, before clipping, as in diffusers.
        """
        a_t = float(self.alpha_bars[t])
        a_s = float(self.alpha_bars[following]) if following is not None else 1.0
        signal, noise = math.sqrt(a_t), math.sqrt(1 - a_t)
        if self.prediction == "epsilon":
            if a_t == 0:
                raise InputError("an epsilon-predicting teacher cannot start from alpha_bar = 0 (zero terminal SNR)")
            (k_x, k_m), (e_x, e_m) = (1 / signal, -noise / signal), (0.0, 1.0)
        elif self.prediction == "v_prediction":
            (k_x, k_m), (e_x, e_m) = (signal, -noise), (noise, signal)
        else:
            (k_x, k_m), (e_x, e_m) = (0.0, 1.0), (1 / noise, -signal / noise)
        if sampler == "ddim":
            direction = math.sqrt(1 - a_s)
            return StepCoefficients(k_x, k_m, math.sqrt(a_s), direction * e_x, direction * e_m, clip=self.clip)
        ratio = a_t / a_s
        c_0, c_x = math.sqrt(a_s) * (1 - ratio) / (1 - a_t), math.sqrt(ratio) * (1 - a_s) / (1 - a_t)
        small = (1 - a_s) / (1 - a_t) * (1 - ratio)
        variance = 1 - ratio if self.scheduler.config.get("variance_type") == "fixed_large" else max(small, 1e-20)
        return StepCoefficients(k_x, k_m, c_0, c_x, c_z=math.sqrt(variance) if t > 0 else 0.0, clip=self.clip)

    @property
    def _shape(self):
        return (self.image_channels, self.image_size, self.image_size)


def _part(folder, name):
    # The first repositories of the hub keep the network and the scheduler beside model_index.json.
    return folder / name if (folder / name).is_dir() else folder


def _refuse_unfit_pipeline(folder):
    index = folder / "model_index.json"
    parts = read_json(index, "pipeline index") if index.exists() else {}
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
    size = config.get("sample_size")
    if not isinstance(size, int) or size < 8 or size & (size - 1):
        raise InputError(f"teacher {folder} has sample_size {size}; a student needs square images of side 4 * 2^k")


def _load_unet(source, folder, dtype):
    """Safetensors where there are any; else diffusers' older ``.bin`` files, read as weights only, never as code."""
    from diffusers import UNet2DModel

    place = "unet/" if (folder / "unet").is_dir() else ""
    for suffix in ("safetensors", "bin"):
        weights = f"{place}diffusion_pytorch_model*.{suffix}"
        folder = resolve(source, EMBEDDED, "teacher", ["*.json", "*/*.json", weights])
        if any(folder.glob(weights)):
            break
    else:
        raise InputError(f"teacher {folder}: there is no {place}diffusion_pytorch_model.safetensors")
    options = {"torch_dtype": dtype, "use_safetensors": suffix == "safetensors"}
    options |= {"low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        unet, report = UNet2DModel.from_pretrained(_part(folder, "unet"), **options)
    except Exception as error:
        raise InputError(f"teacher {folder}: the weights cannot be read ({reason(error)})") from error
    wrong = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if wrong:
        raise InputError(f"teacher {folder}: the weights do not fit the configuration ({len(wrong)} tensors, {wrong[0]} first)")
    return unet


def _load_scheduler(folder):
    import diffusers

    config = read_json(_part(folder, "scheduler") / "scheduler_config.json", "scheduler configuration")
    kind = config.get("_class_name", "DDPMScheduler")
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise InputError(f"teacher {folder} has a {kind}; a DDPMScheduler or DDIMScheduler configuration is needed")
    try:
        scheduler = getattr(diffusers, kind).from_config(config)
    except Exception as error:
        raise InputError(f"teacher {folder}: the scheduler configuration cannot be used ({reason(error)})") from error
    if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise InputError(f"teacher {folder}: prediction_type {scheduler.config.prediction_type!r} is not supported")
    if scheduler.config.thresholding:
        raise InputError(f"teacher {folder}: dynamic thresholding is not supported")
    if str(scheduler.config.get("variance_type", "")).startswith("learned"):
        raise InputError(f"teacher {folder}: a learned variance is not supported")
    return scheduler
