"""Plain parses of files as they stand, to compare the readers with."""

import inspect
import json

import numpy as np
import torch


class Meaningless(Exception):
    """A file that cannot be understood by a plain parse: it must be refused."""


def parse_json(path):
    """A JSON object, each key of which it holds once."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise Meaningless("a key is there twice")
        return dict(pairs)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Meaningless(error) from error
    if not isinstance(value, dict):
        raise Meaningless("it is no object")
    return value


NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def parse_safetensors(path):
    """Tensors by name: eight bytes of length, a JSON header, and the data of all, without holes."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size].decode()), data[8 + size :]
        header.pop("__metadata__", None)
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), len(body)]:
            raise Meaningless("its tensors leave holes or overlap")
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] == "BF16":
                values = torch.frombuffer(bytearray(body[begin:end]), dtype=torch.bfloat16)
            else:
                values = torch.from_numpy(np.frombuffer(body[begin:end], NUMPY[entry["dtype"]]).copy())
            tensors[name] = values.reshape(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise Meaningless(error) from error


def own_fields(values):
    """The fields of a configuration that are not diffusers' own."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if not key.startswith("_")}


def with_tensors(module, tensors):
    """A module with tensors of a file, all of which it has, real and finite."""
    state = module.state_dict()
    if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in tensors.items()}:
        raise Meaningless("its tensors are others")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise Meaningless(f"{name} is {tensor.dtype}")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise Meaningless(f"{name} is not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise Meaningless(f"{name} is negative")
    module.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return module.eval()


def finite(images):
    """Images, which a student that can be used draws without infinities."""
    if not images.isfinite().all():
        raise Meaningless("its images are not finite")
    return images


def known_fields(kind, values):
    """The fields of a configuration that a class of diffusers has; it passes over the others, with a warning."""
    return {key: value for key, value in values.items() if key in inspect.signature(kind.__init__).parameters}
