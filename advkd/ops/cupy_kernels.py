"""The CUDA sources through CuPy: backend ``cuda`` where there is a GPU and no compiled extension.

CuPy compiles a source with NVRTC on first use and keeps the binary in its cache on disk. The launchers have the signatures of
the extension's, ``torch.ops.advkd_cuda``. One difference: CuPy always asks for ``-ftz=true``, float32 subnormals count as zero.
"""

import contextlib
import functools
import importlib.util
import logging
import re
from pathlib import Path

import numpy
import torch

OPTIONS = ("--std=c++17",)
THREADS = 256
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

PHILOX = numpy.dtype([("key0", "u4"), ("key1", "u4"), ("stream_step", "u4"), ("count", "i8")], align=True)
"""``PhiloxParameters`` of ``csrc/common/philox.h``."""

_POINTERS = ("x", "m", "table", "previous_x0", "noise", "indices", "steps", "out", "x0", "pooled", "flags")
_PLAN = ("column_tiles", "channel_tiles", "tile_channels", "outputs", "lanes", "rows", "strips")
STEP = numpy.dtype(
    [(name, "u8") for name in _POINTERS]
    + [("samples", "i8"), ("length", "i8"), ("channels", "i4"), ("width", "i4"), ("pool", "i4"), ("tiles", "i8")]
    + [(name, "i4") for name in _PLAN]
    + [("key0", "u4"), ("key1", "u4"), ("stream_step", "u4"), ("row_stride", "i4"), ("step_stride", "i4"), ("vectors", "i4")],
    align=True,
)
"""``StepParameters`` of ``csrc/cuda/sampler_step.h``."""


@functools.cache
def gap():
    """The reason why CuPy cannot compile the sources here, or None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'advkd[cupy]')"
    if folder() is None:
        return "the CUDA sources are not installed"
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # whatever a CuPy that does not fit the machine's CUDA raises
        return f"CuPy does not load NVRTC ({error})"
    return None


def philox_words(indices, seed, count, stream, step):
    out = torch.empty((len(indices), count), dtype=torch.int64, device=indices.device)
    return _draw("advkd_philox_words", indices, seed, count, stream, step, out)


def philox_normal(indices, seed, shape, stream, step):
    out = torch.empty((len(indices), *shape), dtype=torch.float32, device=indices.device)
    return _draw("advkd_philox_normal", indices, seed, out[:1].numel(), stream, step, out)


def sampler_step(x, m, table, previous_x0, noise, indices, seed, step, steps, pool, out, x0, pooled, flags):
    tensors = dict(zip(_POINTERS, (x, m, table, previous_x0, noise, indices, steps, out, x0, pooled, flags)))
    parameters = step_parameters(tensors, seed, step, pool)
    pair = SUFFIXES[x.dtype], SUFFIXES[m.dtype]
    kernel = f"advkd_step_{'pool' if pool else 'flat'}_{'tensor' if indices is None else 'draw'}_{pair[0]}_{pair[1]}"
    # A program per pair of dtypes: all nine take six seconds to compile.
    module = _module("sampler_step", f"-DADVKD_STEP_DTYPES(EACH)=EACH({pair[0]}, {pair[1]})")
    _run(module, kernel, int(parameters["tiles"]), (parameters,), x.device)


def step_parameters(tensors, seed, step, pool):
    """What the kernel takes, as an array of one :data:`STEP`."""
    x, table, steps = tensors["x"], tensors["table"], tensors["steps"]
    # Memory order serves every layout, but drawn normals and pooled pixels belong to channels.
    split = not x.is_contiguous() and (pool > 0 or tensors["indices"] is not None)
    channels = x.shape[1] if split else 1
    length = x.numel() // (len(x) * channels)
    width = x.shape[-1] if pool else 0
    group = 4 if pool or x.dtype == torch.float32 else 8
    pointers = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    aligned = not any(pointers[name] % 16 for name in ("x", "m", "previous_x0", "noise", "out", "x0"))
    fields = {
        **pointers,
        **dict(samples=len(x), length=length, channels=channels, width=width, pool=pool),
        **step_plan(len(x), length, channels, width, pool, group),
        **_key(seed),
        "stream_step": 1 << 24 | (step if steps is None else 0),
        "row_stride": 8 if len(table) > 1 else 0,
        "step_stride": int(steps is not None and steps.numel() > 1),
        "vectors": aligned and channels == 1 and (width if pool else length) % group == 0,
    }
    return numpy.array(tuple(fields[name] for name in STEP.names), STEP)


def step_plan(samples, length, channels, width, pool, group):
    """``step_plan`` of ``csrc/cuda/sampler_step.h``: how many blocks, and for ``pool`` what one of them does."""
    if not pool:
        return {"tiles": _cover(samples * channels * _cover(length, group), THREADS), **dict.fromkeys(_PLAN, 0)}
    all_outputs = width // pool
    tile_channels = _clamp(THREADS // _cover(pool, group), channels)
    outputs = _clamp(THREADS // tile_channels * group // pool, all_outputs)
    if group <= outputs < all_outputs:
        outputs -= outputs % group
    lanes = _clamp(_cover(outputs * pool, group) * tile_channels, THREADS)
    rows = _clamp(THREADS // lanes, pool)
    strips = THREADS // (lanes * rows)
    plan = dict(
        zip(_PLAN, (_cover(all_outputs, outputs), _cover(channels, tile_channels), tile_channels, outputs, lanes, rows))
    )
    tiles = _cover(samples * (length // width // pool), strips) * plan["column_tiles"] * plan["channel_tiles"]
    return {"tiles": tiles, **plan, "strips": strips}


def folder():
    """Where the sources are: inside an installed package, beside the package in a checkout; None if nowhere."""
    package = Path(__file__).parent.parent
    return next(
        (path for path in (package / "csrc", package.parent / "csrc") if (path / "cuda/sampler_step.cu").is_file()), None
    )


def source(name):
    """``csrc/cuda/<name>.cu`` with our headers written out: CuPy's cache knows a program by its text alone."""
    seen = set()

    def expand(match):
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _include(match[1])

    def _include(path):
        return re.sub(r'^#include "([^"]+)"$', expand, (folder() / path).read_text().replace("#pragma once\n", ""), flags=re.M)

    return _include(f"cuda/{name}.cu")


@functools.cache
def _module(name, *options):
    import cupy

    logging.getLogger(__name__).warning(
        "CuPy compiles %s (seconds, once: its cache keeps the binary)", " ".join((name, *options))
    )
    return cupy.RawModule(code=source(name), options=(*OPTIONS, *options))


def _run(module, kernel, blocks, arguments, device):
    with _current(device):
        module.get_function(kernel)((blocks,), (THREADS,), arguments)


@contextlib.contextmanager
def _current(device):
    """``device``, and torch's stream on it as CuPy's."""
    import cupy

    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if hasattr(cupy.cuda.Stream, "from_external"):
            external = cupy.cuda.Stream.from_external(_Stream(stream))
        else:  # before CuPy 14
            external = cupy.cuda.ExternalStream(stream)
        with external:
            yield


class _Stream:
    """A stream's handle in the form of the CUDA stream protocol."""

    def __init__(self, handle):
        self._handle = handle

    def __cuda_stream__(self):
        return 0, self._handle


def _draw(kernel, indices, seed, count, stream, step, out):
    items = len(indices) * _cover(count, 4)
    if items:
        fields = {**_key(seed), "stream_step": stream << 24 | step, "count": count}
        parameters = numpy.array(tuple(fields[name] for name in PHILOX.names), PHILOX)
        arguments = (indices.data_ptr(), len(indices), parameters, out.data_ptr())
        _run(_module("philox"), kernel, min(_cover(items, THREADS), 1 << 20), arguments, indices.device)
    return out


def _key(seed):
    return {"key0": seed & 0xFFFFFFFF, "key1": seed >> 32 & 0xFFFFFFFF}


def _cover(n, part):
    return -(-n // part)


def _clamp(n, most):
    return max(1, min(n, most))
