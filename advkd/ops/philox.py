"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A sample's numbers depend on (seed, stream, step, sample index) and nothing else: not on the batch, its split, the number
of processes, the device or the backend. The counter is (block, index low, index high, stream << 24 | step), the key
(seed low, seed high); block j fills elements 4j .. 4j+3 of a sample, in logical (C, H, W) order.
"""

import math
import operator
from collections.abc import Sequence

import torch

from ..errors import InputError
from ..runtime.hub import reason
from ..runtime.sources import STREAMS
from . import registry
from .arguments import device as known_device
from .arguments import require_dense, sizes, whole
from .declaration import declare
from .layout import has_values

_MASK = 0xFFFFFFFF
_MOST = 2**34
"""Numbers of a sample: 2^32 blocks of four are the counter's range."""


def philox_words(
    seed: int, indices: torch.Tensor | range, count: int, *, stream: str, step: int = 0, backend: str = "auto"
) -> torch.Tensor:
    """Random 32-bit words, equal bit for bit on every backend.

    Args:
        seed: int in [0, 2^64), the key of the generator.
        indices: ``(N,)`` int64 tensor or a range: the samples' indices. Those of a range are on the CPU, whatever torch's
            default device is.
        count: words per sample, at most 2^34.
        stream: purpose of the numbers, one of :data:`advkd.runtime.sources.STREAMS`; streams have no counter in common.
        step: int in [0, 2^24) that tells apart the draws of one sample in one stream.
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        ``(N, count)`` int64 tensor with values in [0, 2^32), on the indices' device. Order of differentiability 0 (there is
        nothing to differentiate).

    Raises:
        InputError: an argument of another type or out of its range; it is named.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.

    Examples:
        >>> words = philox_words(7, range(4), 3, stream="z")
        >>> torch.equal(words[2:], philox_words(7, range(2, 4), 3, stream="z"))
        True
    """
    seed, indices, code = validated(seed, indices, stream, step)
    count = whole("count", count, 0, _MOST + 1)
    registry.require_known(backend)
    out = indices.new_empty((indices.shape[0], count))
    WORDS(indices, seed, code, step, backend, out)
    return out


def philox_normal(
    seed: int, indices: torch.Tensor | range, shape: Sequence[int], *, stream: str, step: int = 0, backend: str = "auto"
) -> torch.Tensor:
    """Standard normal numbers, by Box-Muller from :func:`philox_words`.

    u1 = ((w >> 8) + 1) 2^-24, u2 = (w >> 8) 2^-24, angle = float32(2 pi) u2; of four words, (w0, w1) and then (w2, w3) give
    sqrt(-2 ln u1) cos(angle), sqrt(-2 ln u1) sin(angle).

    Args:
        seed: int in [0, 2^64), the key of the generator.
        indices: ``(N,)`` int64 tensor or a range of samples' indices, as :func:`philox_words` takes them.
        shape: shape of one sample, (C, H, W) say, of at most 2^34 numbers.
        stream: purpose of the numbers, one of :data:`advkd.runtime.sources.STREAMS`.
        step: int in [0, 2^24) that tells apart the draws of one sample in one stream.
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        ``(N, *shape)`` float32, contiguous, on the indices' device. Equal bit for bit on one backend whatever the batch; to
        2e-6 absolute between backends. Order of differentiability 0.

    Raises:
        InputError: an argument of another type or out of its range; it is named.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.

    Examples:
        >>> philox_normal(7, range(4), (1, 32, 32), stream="x_T").shape
        torch.Size([4, 1, 32, 32])
    """
    seed, indices, code = validated(seed, indices, stream, step)
    shape = sizes("shape", shape)
    if math.prod(shape) > _MOST:
        raise InputError(f"shape must hold at most 2^34 numbers, got {shape}")
    registry.require_known(backend)
    out = indices.new_empty((indices.shape[0], *shape), dtype=torch.float32)
    NORMAL(indices, seed, code, step, backend, out)
    return out


def philox_uniform(
    seed: int, indices: torch.Tensor | range, *, stream: str, step: int = 0, backend: str = "auto"
) -> torch.Tensor:
    """One uniform number in [0, 1) per sample: (w0 >> 8) 2^-24, with w0 the first of :func:`philox_words`.

    Args:
        seed: int in [0, 2^64), the key of the generator.
        indices: ``(N,)`` int64 tensor or a range of samples' indices, as :func:`philox_words` takes them.
        stream: purpose of the numbers, one of :data:`advkd.runtime.sources.STREAMS`.
        step: int in [0, 2^24) that tells apart the draws of one sample in one stream.
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        ``(N,)`` float32 on the indices' device, equal bit for bit on every backend. Order of differentiability 0.

    Raises:
        InputError: an argument of another type or out of its range; it is named.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.

    Examples:
        >>> philox_uniform(7, range(4), stream="interpolation").shape
        torch.Size([4])
    """
    words = philox_words(seed, indices, 1, stream=stream, step=step, backend=backend)
    return (words[:, 0] >> 8).float() * 2.0**-24


def validated(seed: int, indices: torch.Tensor | range, stream: str, step: int) -> tuple[int, torch.Tensor, int]:
    """The seed as a signed 64-bit integer, the indices as a tensor and the stream's code, or an :class:`InputError`."""
    if isinstance(indices, range):
        indices = _of_range(indices)
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        raise InputError("indices must be a range or a one-dimensional int64 tensor")
    require_dense("indices", indices)
    seed = _integer("seed", seed, 64)
    if not isinstance(stream, str) or stream not in STREAMS:
        raise InputError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    _integer("step", step, 24)
    return seed - 2**64 if seed >= 2**63 else seed, indices.contiguous(), STREAMS[stream]


def _of_range(indices):
    """A range as a tensor on the CPU."""
    if not indices:
        # Its bounds may be any numbers.
        return torch.arange(0, dtype=torch.int64, device="cpu")
    stop = indices[-1] + (1 if indices.step > 0 else -1)
    if not all(-(2**63) <= n < 2**63 for n in (indices.start, stop, indices.step)):
        raise InputError(f"indices must have 64 bits, and so must their step and what follows the last, got {indices}")
    return _arange("indices", indices.start, stop, indices.step, "cpu")


def indices_of(n: int, start: int, device: str | torch.device) -> torch.Tensor:
    """Indices of samples ``start .. start + n - 1`` on ``device``."""
    n, start, device = whole("n", n), whole("start", start), known_device("device", device)
    if start + n >= 2**63:
        raise InputError(f"start + n must be below 2^63, got {start} + {n}")
    return _arange("n or device", start, start + n, 1, device)


def _arange(name, start, stop, step, device):
    try:
        return torch.arange(start, stop, step, dtype=torch.int64, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # it differs between kinds of devices
        count = (stop - start) // step
        raise InputError(f"{name}: no room for {count} indices on {device} ({reason(error)})") from error


def counters(
    name: str, triple: Sequence, samples: int, device: torch.device
) -> tuple[int, torch.Tensor, int, torch.Tensor | None]:
    """A triple (seed, sample indices, step) as seed, indices on ``device``, step, and the step's tensor where it is one.

    ``step`` is an int or an int64 tensor of 1 or ``samples`` elements on ``device``; ``name`` is the argument, for errors.
    """
    if len(triple) != 3:
        raise InputError(f"{name} must be a tensor or (seed, sample indices, step), got {len(triple)} values")
    seed, indices, step = triple
    steps = step if isinstance(step, torch.Tensor) else None
    if steps is not None:
        require_dense(f"{name}'s step", steps)
    try:
        seed, indices, _ = validated(seed, indices, "step", step if steps is None else 0)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if steps is not None:
        if steps.dtype != torch.int64 or steps.numel() not in (1, samples) or steps.device != device:
            raise InputError(f"{name}'s step must be an int or an int64 tensor of 1 or {samples} elements on {device}")
        readable = not torch.compiler.is_compiling() and steps.device.type == "cpu" and steps.numel() and has_values(steps)
        if readable and not 0 <= int(steps.min()) <= int(steps.max()) < 2**24:
            raise InputError(f"{name}'s step must be in [0, 2^24), got {steps.tolist()}")
    if indices.shape[0] != samples:
        raise InputError(f"{name} has {indices.shape[0]} sample indices for {samples} samples")
    indices = indices if indices.device == device else indices.to(device)
    return (seed, indices, step, None) if steps is None else (seed, indices, 0, steps.contiguous())


def _integer(name, value, bits):
    """``value`` as an int of so many bits; numpy's integers are integers too."""
    if isinstance(value, torch.Tensor):
        require_dense(name, value)
    try:
        value = operator.index(value)
    except (TypeError, RuntimeError):
        raise InputError(f"{name} must be an integer, got {value!r}") from None
    if not 0 <= value < 2**bits:
        raise InputError(f"{name} must be in [0, 2^{bits}), got {value}")
    return value


def words_reference(indices: torch.Tensor, seed: int, count: int, stream: int, step: int | torch.Tensor) -> torch.Tensor:
    """The specification of :func:`philox_words`, in integer tensors; ``step`` may be an int64 tensor of 1 or N elements."""
    blocks = (count + 3) // 4
    block = torch.arange(blocks, dtype=torch.int64, device=indices.device)
    c0 = block.expand(len(indices), blocks)
    c1 = (indices & _MASK).unsqueeze(1).expand_as(c0)
    c2 = ((indices >> 32) & _MASK).unsqueeze(1).expand_as(c0)
    word = stream << 24 | step
    c3 = torch.zeros_like(c0) + (word.reshape(-1, 1) if isinstance(word, torch.Tensor) else word)
    words = rounds_reference((c0, c1, c2, c3), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).reshape(len(indices), 4 * blocks)[:, :count].contiguous()


def rounds_reference(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """The ten rounds: four counter words (int64 tensors in [0, 2^32)) and two key words (ints) to four output words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _multiply(a, b):
    # The product wraps modulo 2^64 in int64: its bits are those of the unsigned product.
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def normal_reference(
    indices: torch.Tensor, seed: int, shape: Sequence[int], stream: int, step: int | torch.Tensor
) -> torch.Tensor:
    """The specification of :func:`philox_normal`: uniforms as stated, logarithm, sine and cosine in float64."""
    count = math.prod(shape)
    pairs = (count + 3) // 4 * 2
    words = words_reference(indices, seed, 2 * pairs, stream, step).reshape(len(indices), pairs, 2)
    u1 = ((words[..., 0] >> 8) + 1).double() * 2.0**-24
    turn = torch.tensor(2 * math.pi, dtype=torch.float32, device=indices.device)
    angle = ((words[..., 1] >> 8).float() * 2.0**-24 * turn).double()
    radius = torch.sqrt(-2 * torch.log(u1))
    normals = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).float()
    return normals.reshape(len(indices), 2 * pairs)[:, :count].reshape(len(indices), *shape).contiguous()


def _write_words(indices, seed, stream, step, out):
    out.copy_(words_reference(indices, seed, out.shape[1], stream, step))


def _write_normal(indices, seed, stream, step, out):
    out.copy_(normal_reference(indices, seed, out.shape[1:], stream, step))


def _declared(schema, reference):
    options = {"group": "philox", "dtypes": dict.fromkeys(("cpu", "triton", "cuda"), (torch.int64,))}
    return declare(schema, reference=reference, backends=("cpu", "triton", "cuda"), **options)


WORDS = _declared("philox_words(Tensor indices, int seed, int stream, int step, Tensor(a!) out) -> ()", _write_words)
NORMAL = _declared("philox_normal(Tensor indices, int seed, int stream, int step, Tensor(a!) out) -> ()", _write_normal)
