"""Features of images, and the cache that keeps them by content.

An extractor is a module with ``num_features``, ``score`` (what a Frechet distance in its features is called), ``identity`` (a
hash of what it computes), ``shape`` (the images it takes, or None) and a ``forward`` from uint8 ``(N, C, H, W)`` to
``(N, num_features)`` float.
"""

import hashlib
import importlib.util
import io
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from .data import describe_shape, normalize
from .errors import InputError
from .files import digest, read_tensors, require_digest, write_tensors
from .metrics import require_enough
from .models.classifier import Classifier

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class ClassifierFeatures(nn.Module):
    """A :class:`Classifier`'s features: the Frechet distance is ``FD-<its name>``, never FID."""

    def __init__(self, classifier):
        super().__init__()
        config = classifier.config
        self.classifier = classifier
        self.num_features = config.num_features
        self.score = f"FD-{config.name}"
        self.shape = (config.image_channels, config.image_size, config.image_size)
        shape = json.dumps(asdict(config), sort_keys=True)
        self.identity = hashlib.sha256(f"{shape} {digest(classifier.state_dict())}".encode()).hexdigest()

    def forward(self, images):
        return self.classifier.features(normalize(images))


class InceptionFeatures(nn.Module):
    """Inception-v3's 2,048 pooled features (FID's), from a local file with torch-fidelity's conversion of the original weights.

    Gray images are repeated to three channels.
    """

    num_features = 2048
    score = "FID"
    shape = None

    def __init__(self, weights):
        super().__init__()
        weights = Path(weights)
        if not weights.is_file():
            raise InputError(f"--inception-weights {weights} does not exist; it is torch-fidelity's {INCEPTION_FILE}")
        data = weights.read_bytes()
        self.identity = hashlib.sha256(data).hexdigest()
        wanted = INCEPTION_FILE.removesuffix(".pth").rpartition("-")[2]
        if not self.identity.startswith(wanted):
            found = self.identity[: len(wanted)]
            raise InputError(f"--inception-weights {weights} has SHA-256 {found}..., not {wanted}... of {INCEPTION_FILE}")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise InputError("--extractor inception needs torch-fidelity: pip install 'advkd[inception]'")
        from torchmetrics.image.fid import NoTrainInceptionV3

        # torch-fidelity unpickles whatever it is given: it gets a copy that was read as tensors only.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(torch.load(io.BytesIO(data), weights_only=True), Path(folder) / "weights.pth")
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(Path(folder) / "weights.pth"))

    def forward(self, images):
        return self.network(images.expand(-1, 3, -1, -1))


def build_extractor(name, inception_weights=None):
    """The extractor ``digits``, ``inception`` or of a folder by ``advkd classifier train``, in eval mode."""
    if name == "inception":
        if inception_weights is None:
            raise InputError(f"--extractor inception needs --inception-weights, a file {INCEPTION_FILE} of torch-fidelity")
        return InceptionFeatures(inception_weights).eval()
    if name != "digits" and not Path(name).is_dir():
        raise InputError(f"--extractor must be digits, inception or a folder of 'advkd classifier train', got {name!r}")
    return ClassifierFeatures(Classifier.from_pretrained(name)).eval()


def require_fit(extractor, images, option):
    """Refuse images (uint8 ``(N, C, H, W)``) that the extractor cannot take."""
    if extractor.shape is not None and tuple(images.shape[1:]) != tuple(extractor.shape):
        wanted, found = describe_shape(extractor.shape), describe_shape(images.shape[1:])
        raise InputError(f"{option}: the extractor for {extractor.score} takes {wanted} images, these are {found}")
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise InputError(f"{option}: images must be uint8 with 1 or 3 channels, got {images.dtype} {tuple(images.shape)}")
    require_enough(torch.empty(1).expand(len(images), extractor.num_features), option)


@torch.no_grad()
def extract(extractor, images, batch_size=256, cache=None):
    """Features ``(N, D)`` float32, on the CPU, of uint8 images ``(N, C, H, W)``; computed on the extractor's device.

    Args:
        extractor: see the module; one that does not give ``(N, num_features)`` is an :class:`InputError`.
        images: uint8.
        batch_size: images per pass.
        cache: folder that keeps features under a hash of the images and the extractor; None keeps nothing.
    """
    path = None
    if cache is not None:
        key = hashlib.sha256(f"{digest({'images': images})} {extractor.identity}".encode()).hexdigest()
        path = Path(cache) / f"features-{key[:32]}.safetensors"
        kept = _read_kept(path)
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
        write_tensors(path, {"features": features}, {"digest": digest({"features": features})})
    return features


def _read_kept(path):
    """Kept features; a damaged file is as good as none."""
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path, "features", ("digest",))
        require_digest(path, tensors, metadata)
    except InputError:
        return None
    return tensors["features"]
