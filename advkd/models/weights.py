"""Networks in diffusers' folder format, of any class of diffusers: weights are read as data, and checked."""

import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import InputError
from ..runtime.files import damaged, read_json, require_regular, why_unreadable
from ..runtime.pickles import require_weights
from ..runtime.progress import can_be_shown

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""File of a network's weights."""

MOST_BLOCKS, MOST_LAYERS = 32, 64
"""Limits for configurations that come from elsewhere."""


def require_ordinary(config: Mapping[str, Any], name: str) -> None:
    """Refuse a configuration that no network can have, before a network of so many parts is built.

    Args:
        config: the configuration: a file of a few bytes can ask for any number.
        name: of the model, for errors.

    Raises:
        InputError: a quantised network, numbers that are not finite or not positive, or too many blocks or layers.
    """
    if config.get("quantization_config") is not None:
        raise InputError(f"{name} is quantized; save it with plain weights")
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}: {key} must be finite, got {value}")
    for key in ("norm_eps", "mid_block_scale_factor"):
        if isinstance(value := config.get(key, 1), (int, float)) and value <= 0:
            raise InputError(f"{name}: {key} must be positive, got {value}")
    channels, layers = config.get("block_out_channels", ()), config.get("layers_per_block", 1)
    if not isinstance(channels, list) or len(channels) > MOST_BLOCKS or not isinstance(layers, int) or layers > MOST_LAYERS:
        limits = f"at most {MOST_BLOCKS} block_out_channels and {MOST_LAYERS} layers_per_block"
        raise InputError(f"{name}: the network's configuration may have {limits}")


def load_network(
    kind: type[torch.nn.Module],
    fetch: Callable[[str], Path],
    part: str,
    what: str,
    dtype: torch.dtype,
    run: Callable[[Any], None],
) -> Any:
    """Safetensors where there are any; else diffusers' older ``.bin`` files, read as weights only, never as code.

    Args:
        kind: class of diffusers, whose configuration has been looked at.
        fetch: function of a pattern of files that gives the folder with those of them that there are.
        part: folder of the network in there; empty: the folder itself.
        what: kind of model, for errors.
        dtype: dtype of the weights.
        run: function of the network without memory that runs it, and raises :class:`InputError` for shapes that do not fit.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        InputError: weights that are missing or damaged, that do not fit the configuration, or are not finite.
    """
    from diffusers.utils import logging

    place = f"{part}/" if part else ""
    for suffix in ("safetensors", "bin"):
        weights = f"{place}diffusion_pytorch_model*.{suffix}"
        folder = fetch(weights)
        if any(folder.glob(weights)):
            break
    else:
        raise InputError(f"{what} {folder}: there is no {place}diffusion_pytorch_model.safetensors")
    if not can_be_shown():
        logging.disable_progress_bar()
    paths = _weight_files(sorted(folder.glob(weights)), folder / part, suffix, what)
    size = sum(path.stat().st_size for path in paths)
    options = {"torch_dtype": dtype, "use_safetensors": suffix == "safetensors"}
    options |= {"low_cpu_mem_usage": False, "output_loading_info": True}
    diffusers: Any = kind
    try:
        # A pass through the network on the meta device, which takes no memory: with some configurations only that fails.
        with torch.device("meta"), torch.no_grad():
            network = diffusers.from_config(diffusers.load_config(folder / part))
            run(network)
        parameters = sum(p.numel() for p in network.parameters())
        if parameters > size:
            raise InputError(f"the configuration asks for {parameters:,} parameters, the weights have {size:,} bytes")
        network, report = diffusers.from_pretrained(folder / part, **options)
    except Exception as error:
        why = why_unreadable(paths[0], error)
        raise InputError(f"{what} {folder}: the weights cannot be read ({why}): restore or fetch a copy of them") from error
    wrong = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if wrong:
        raise InputError(f"{what} {folder}: the weights do not fit the configuration ({len(wrong)} tensors, {wrong[0]} first)")
    if not all(p.is_floating_point() and p.isfinite().all() for p in network.parameters()):
        raise InputError(f"{what} {folder}: its weights are not finite real numbers: restore or fetch a copy of them")
    return network


def _weight_files(paths, folder, suffix, what):
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
        require_regular(path, f"the {what}'s weights")
        if suffix == "bin":
            require_weights(path, f"the {what}'s weights")
    for index, named in indexes.items():
        _require_named(index, named, what)
    return paths


def _require_named(index, named, what):
    """Refuse files without the tensors that their index says: diffusers believes it, and leaves others as they were drawn."""
    for path in {index.parent / file for file in named.values()}:
        try:
            missing = {name for name, file in named.items() if file == path.name} - _names(path)
        except Exception as error:  # damaged files raise about anything
            raise damaged(f"the {what}'s weights", path, error, "restore or fetch a copy of it") from error
        if missing:
            said = f"the {what}'s weights {path} lack {min(missing)}, which {index.name} says they hold"
            raise InputError(f"{said}: restore or fetch a copy of both")


def _names(path):
    """Names of a file's tensors."""
    if path.suffix == ".bin":
        mapped = zipfile.is_zipfile(path)  # older files are no archives, and only those can be mapped
        return set(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    with safe_open(path, framework="pt") as file:
        return set(file.keys())
