"""Features of images, and the cache that keeps them by content."""

import hashlib
import importlib.util
import io
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..data.images import describe_shape, normalize
from ..errors import InputError
from ..models.classifier import Classifier
from ..runtime.files import digest, read_tensors, require_digest, require_regular, why_unreadable, with_digest, write_tensors
from ..runtime.hub import reason
from ..runtime.pickles import require_weights
from .feature_sets import require_enough

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_LIMIT = 2**28
"""Bytes that the file may have; it has 96 million."""

HEADER_LIMIT = 2**16
"""Bytes that a file of kept features may have beside them."""


class Extractor(nn.Module):
    """A module with a ``forward`` from uint8 ``(N, C, H, W)`` to ``(N, num_features)`` float.

    Attributes:
        num_features: length of a feature vector.
        score: name of a Frechet distance in the features.
        shape: of the images that it takes, None for any.
        identity: a hash of the computation.
    """

    num_features: int
    score: str
    shape: tuple[int, ...] | None


class ClassifierFeatures(Extractor):
    """A :class:`Classifier`'s features: the Frechet distance is ``FD-<its name>``, never FID."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        config = classifier.config
        if config.noisy:
            raise InputError(
                f"extractor: the classifier {config.name} is of noisy images; features need one that is trained without --noisy"
            )
        self.classifier = classifier
        self.num_features = config.num_features
        self.score = f"FD-{config.name}"
        self.shape = (config.image_channels, config.image_size, config.image_size)

    @property
    def identity(self) -> str:
        """A hash of the current configuration and weights, which training may change."""
        # A field that is the same for all extractors stays out: hashes in earlier caches and results do not have it.
        values = {name: value for name, value in asdict(self.classifier.config).items() if name != "noisy"}
        shape = json.dumps(values, sort_keys=True)
        return hashlib.sha256(f"{shape} {digest(self.classifier.state_dict())}".encode()).hexdigest()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images."""
        return self.classifier.features(normalize(images))


class InceptionFeatures(Extractor):
    """Inception-v3's 2,048 pooled features (FID's), from a local file with torch-fidelity's conversion of the original weights.

    Gray images are repeated to three channels. The file is read as tensors only; a file of another hash, one that would unpack
    to more than its size, and one with anything else in it raise an :class:`InputError`.
    """

    num_features = 2048
    score = "FID"
    shape = None

    def __init__(self, weights: str | Path):
        super().__init__()
        weights, what = Path(weights), f"--inception-weights {weights}"
        require_regular(weights, f"--inception-weights (torch-fidelity's {INCEPTION_FILE})", INCEPTION_LIMIT)
        data = weights.read_bytes()
        self.identity = hashlib.sha256(data).hexdigest()
        wanted = INCEPTION_FILE.removesuffix(".pth").rpartition("-")[2]
        if not self.identity.startswith(wanted):
            found = ValueError(f"it has SHA-256 {self.identity[: len(wanted)]}..., not {wanted}...")
            raise InputError(f"{what} is not torch-fidelity's {INCEPTION_FILE} ({why_unreadable(weights, found)})")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise InputError("--extractor inception needs torch-fidelity: pip install 'advkd[inception]'")
        # Only eight digits of the hash are known: a file can be forged to have them.
        require_weights(weights, "--inception-weights")
        self.network = _inception(_weights_alone(data, what), what)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images."""
        return self.network(images.expand(-1, 3, -1, -1))


def _weights_alone(data, what):
    """The tensors by name in a file of torch.save; a file with anything else is refused."""
    try:
        with torch.device("cpu"):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files raise nearly any error.
        raise InputError(f"{what} cannot be read as weights ({reason(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in state.items()):
        raise InputError(f"{what} holds something else than tensors by name")
    return dict(state)


def _is_plain(tensor):
    """True for a dense tensor with memory for all its elements: a view could repeat a few bytes without end."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _inception(state, what):
    """torchmetrics' network with these weights, float32 on the CPU whatever torch's defaults are."""
    # torch-fidelity unpickles any file: it gets one with tensors only.
    with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):
        from torchmetrics.image.fid import NoTrainInceptionV3

        torch.save(state, path := Path(folder) / "weights.pth")
        try:
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).float()
            # Loaded once more: another default dtype has rounded them.
            network.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{what} is of another network ({reason(error)})") from error
    return network


def build_extractor(name: str, inception_weights: str | Path | None = None) -> Extractor:
    """The extractor ``digits``, ``glyphs``, ``inception`` or of a folder by ``advkd classifier train``, in eval mode."""
    if name == "inception":
        if inception_weights is None:
            raise InputError(f"--extractor inception needs --inception-weights, a file {INCEPTION_FILE} of torch-fidelity")
        return InceptionFeatures(inception_weights).eval()
    if name not in Classifier.embedded and not Path(name).is_dir():
        raise InputError(f"--extractor must be digits, glyphs, inception or a folder of 'advkd classifier train', got {name!r}")
    return ClassifierFeatures(Classifier.from_pretrained(name)).eval()


def require_fit(extractor: Extractor, images: torch.Tensor, option: str) -> None:
    """Refuse images (uint8 ``(N, C, H, W)``) that the extractor cannot take."""
    if extractor.shape is not None and tuple(images.shape[1:]) != tuple(extractor.shape):
        wanted, found = describe_shape(extractor.shape), describe_shape(images.shape[1:])
        raise InputError(f"{option}: the extractor for {extractor.score} takes {wanted} images, these are {found}")
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise InputError(f"{option}: images must be uint8 with 1 or 3 channels, got {images.dtype} {tuple(images.shape)}")
    require_enough(torch.empty(len(images), extractor.num_features, dtype=torch.float32, device="meta"), option)


@torch.no_grad()
def extract(extractor: Extractor, images: torch.Tensor, batch_size: int = 256, cache: str | Path | None = None) -> torch.Tensor:
    """Features ``(N, D)`` float32, on the CPU, of uint8 images ``(N, C, H, W)``; computed on the extractor's device.

    Args:
        extractor: see the module; one that does not give ``(N, num_features)`` raises an :class:`InputError`.
        images: uint8.
        batch_size: images per pass.
        cache: folder that keeps features under a hash of the images and the extractor; None keeps nothing.
    """
    path = None
    if cache is not None:
        key = hashlib.sha256(f"{digest({'images': images})} {extractor.identity}".encode()).hexdigest()
        path = Path(cache) / f"features-{key[:32]}.safetensors"
        kept = _read_kept(path, key, (len(images), extractor.num_features))
        if kept is not None:
            return kept
    pieces, device = [], next((p.device for p in extractor.parameters()), torch.device("cpu"))
    for part in images.split(batch_size):
        features = extractor(part.to(device))
        if features.shape != (len(part), extractor.num_features):
            shape = f"{tuple(features.shape)} for {len(part)} images"
            raise InputError(f"extractor: it says {extractor.num_features} features and gives {shape}")
        pieces.append(features.float().cpu())
    features = torch.cat(pieces)
    if not features.isfinite().all():
        raise InputError("extractor: its features are not finite")
    if path is not None:
        write_tensors(path, {"features": features}, with_digest({"features": features}, {"of": key}))
    return features


def _read_kept(path, key, shape):
    """Kept features under a key, of this shape; None if any other file is in their place."""
    try:
        require_regular(path, "features", 4 * math.prod(shape) + HEADER_LIMIT)
        tensors, metadata = read_tensors(path, "features", ("digest",))
        require_digest(path, tensors, metadata)
    except InputError:
        return None
    features = tensors.get("features") if metadata.get("of", key) == key else None
    if features is None or features.dtype != torch.float32 or features.shape != shape or not features.isfinite().all():
        return None
    # A copy in memory: later changes of the file do not reach it.
    return features.clone()
