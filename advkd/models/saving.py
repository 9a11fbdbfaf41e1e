"""diffusers' folder format (``config.json`` + ``diffusion_pytorch_model.safetensors``) without importing diffusers."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..config import build_config
from ..errors import InputError
from ..runtime.devices import require_device
from ..runtime.files import digest, read_json, require_regular, why_unreadable, write_bytes, write_json
from ..runtime.hub import resolve
from .autoencoder import PARTS, Autoencoder, load_autoencoder, sha256_of
from .weights import WEIGHTS

TRAINING = "training.json"
SAMPLER = "sampler.json"
"""File by which the folder of a denoiser student is known: a network of a teacher's kind, and how it draws."""
DIGEST = re.compile("[0-9a-f]{64}", re.IGNORECASE)
LARGEST_WEIGHT = 1e12
"""Largest magnitude of a weight that is read."""


class PretrainedModule(nn.Module):
    """Base of a module whose only constructor argument is ``config``, the dataclass ``config_class``."""

    config_class: ClassVar[type]
    embedded: ClassVar[Mapping[str, Path]] = {}
    training_keys: ClassVar[tuple[str, ...]] = ()
    config: Any
    autoencoder: Autoencoder | None = None
    training_record: dict[str, Any] | None = None
    """The record of a loaded module's training (``training.json``), if that is known."""

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load from an embedded name, a folder by :meth:`save_pretrained` (or a pipeline's folder) or a hub id.

        Args:
            source: an embedded name (``digits`` for ``Student`` and ``Classifier``), a folder, or a hub id (owner/name).
            device: where the module is put, whatever torch's default device is.

        Returns:
            The module in eval mode; its weights can be trained. ``training_record`` is that of the folder, where there is one.

        Raises:
            InputError: missing, damaged or foreign files; the message names the file. A device that is not there.
        """
        device = require_device(device)
        part = cls.__name__.lower()
        files = ["config.json", WEIGHTS, TRAINING, SAMPLER, "model_index.json", f"{part}/*", f"{PARTS[0]}/*"]
        folder = resolve(source, cls.embedded, cls.__name__, files)
        if os.path.lexists(folder / SAMPLER):
            raise InputError(f"{source} is a denoiser student, not a {cls.__name__}: advkd.load_student loads it")
        if not (folder / "config.json").exists() and (folder / "model_index.json").exists():
            folder = folder / part
        values = read_json(folder / "config.json", f"{cls.__name__} configuration")
        kind = values.pop("_class_name", cls.__name__)
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        if kind not in (cls.__name__, f"{cls.__name__}Model"):
            raise InputError(f"{folder} holds a {kind}, not a {cls.__name__}")
        config: Any = build_config(cls.config_class, values, f"{folder / 'config.json'}")
        require_regular(folder / WEIGHTS, f"the weights of {cls.__name__}")
        # Whatever torch's default device and the mode of autograd are: weights on the CPU that can be trained.
        with torch.inference_mode(False), torch.device("cpu"):
            module = cls._with_weights(config, folder / WEIGHTS)
            if (folder / PARTS[0]).is_dir():
                autoencoder = load_autoencoder(folder, PARTS[0], lambda _: folder)
                module.autoencoder = autoencoder.require_latents(module.shape, f"{part} {source}")
        if os.path.lexists(folder / TRAINING):
            module.training_record = read_json(folder / TRAINING, "training record", cls.training_keys)
            if not cls.is_record(module.training_record):
                raise InputError(f"training record {folder / TRAINING} is damaged: restore or fetch a copy of it")
        return module.to(device).eval()

    @staticmethod
    def is_record(record: dict[str, Any]) -> bool:
        """Check a training record's values when a module is loaded.

        Args:
            record: the contents of ``training.json``; the class's ``training_keys`` are there.

        Returns:
            True if the values are such as can be read.
        """
        return True

    @classmethod
    def _with_weights(cls, config, path):
        """A module with a file's weights. It has no memory before they come: a configuration alone can ask for any amount."""
        try:
            with torch.device("meta"):
                module = cls(config)
            wide = torch.promote_types(getattr(module, "dtype", torch.float32), torch.float32)
            tensors = {name: _own(tensor, wide) for name, tensor in _read_weights(path).items()}
            require_plausible(tensors)
            wanted = module.state_dict()
            for name, tensor in tensors.items():
                if name in wanted and tensor.is_floating_point() != wanted[name].is_floating_point():
                    raise ValueError(f"{name} holds {tensor.dtype}")
            module.load_state_dict(tensors, assign=True)
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            why = why_unreadable(path, error)
            raise InputError(f"{path} is damaged or of another model ({why}): restore or fetch a copy of it") from error
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, the weights (safetensors) and, where there is one, the training record to ``folder``.

        Each file is whole or absent; ``config.json``, by which a folder is taken for a finished one, comes last.

        Args:
            folder: made where it is not there.

        Raises:
            InputError: ``folder`` is a file or no path, or holds a denoiser student, or another model's autoencoder.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise InputError(f"folder must be a path, got {folder!r}")
        folder = Path(folder)
        if folder.is_file():
            raise InputError(f"{folder} is a file; name a folder")
        if os.path.lexists(folder / SAMPLER):
            raise InputError(f"{folder} holds a denoiser student: name another folder")
        self._require_own(folder)
        if self.autoencoder is not None:
            shape: Any = self.shape
            self.autoencoder.require_latents(shape, type(self).__name__.lower()).save_pretrained(folder / PARTS[0])
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_bytes(folder / WEIGHTS, _in_order(save(tensors, {"format": "pt", "digest": digest(tensors)})))
        if self.training_record is not None:
            write_json(folder / TRAINING, self.training_record)
        write_json(folder / "config.json", {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)})

    def _require_own(self, folder):
        """Refuse a folder with another model's autoencoder, or with a model of pixels where this one has an autoencoder."""
        ours, theirs = sha256_of(self.autoencoder), None
        if os.path.lexists(folder / PARTS[0] / "config.json"):
            theirs = Autoencoder.from_pretrained(folder / PARTS[0]).sha256
        elif not os.path.lexists(folder / "config.json"):
            return
        if ours != theirs:
            raise InputError(f"{folder} holds a model with another autoencoder, or without one: name another folder")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload advkd model",
    ) -> str:
        """Create the repository on the hub if needed and upload what :meth:`save_pretrained` writes.

        Args:
            repo_id: owner/name, or a name of the token's user.
            private: of a new repository; None: the hub's default for its owner.
            token: the hub's; None or True: the one that is stored on this machine, False: none.
            commit_message: first line of the commit.

        Returns:
            The commit's URL.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)


def _in_order(data):
    """A safetensors file with its metadata sorted: the library writes them in any order, and equal tensors give equal bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :]


def _read_weights(path):
    """Tensors by name, those that were written where the file says so: other programs' files, and older ones, do not."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    known = metadata.get("digest")
    for name, value in metadata.items():
        if name != "digest" and DIGEST.fullmatch(value):  # a damaged name would leave the file without a digest
            raise ValueError(f"its header has the unknown entry {name!r}, which may be a damaged digest")
    if known is not None and known != digest(tensors):
        raise ValueError("it is altered")
    return tensors


def require_plausible(tensors: Mapping[str, torch.Tensor]) -> None:
    """``ValueError`` for weights that no training gives: images of them would not be finite."""
    for name, tensor in tensors.items():
        least, most = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else (0, 0)
        if not -LARGEST_WEIGHT <= least <= most <= LARGEST_WEIGHT:
            raise ValueError(f"{name} holds numbers that are not finite, or larger than {LARGEST_WEIGHT:g}")
        if name.endswith("running_var") and least < 0:
            raise ValueError(f"{name} holds negative variances")


def _own(tensor, dtype):
    """A copy in memory that no file is mapped to."""
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
