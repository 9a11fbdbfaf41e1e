"""Parity of every backend of Philox with the published known answers and the float64 reference."""

import os

import numpy
import pytest
import torch

from advkd.errors import InputError
from advkd.ops import philox_normal, philox_uniform, philox_words, registry
from advkd.ops.philox import counters, rounds_reference
from advkd.runtime.sources import STREAMS

from ..conftest import DEFAULTS, fork, other_default

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Elements per sample: one, not a multiple of four, one tile of the C++ kernel (256) and its neighbours, several tiles.
SHAPES = [(1,), (3, 5, 7), (255,), (256,), (257,), (3, 32, 32)]
SEEDS = [0, 1, 2**32 + 5, 2**64 - 1]
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def fast_backends(device):
    return [b for b in ("cpu", "triton", "cuda") if registry.gap("philox", b, torch.device(device)) is None]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(counter, key, answer):
    words = rounds_reference([torch.tensor([c]) for c in counter], key)
    assert " ".join(f"{int(w):08x}" for w in words) == answer


def test_counter_is_block_index_stream_and_step():
    index, seed, step = 2**35 + 3, 2**40 + 9, 2**24 - 1
    words = philox_words(seed, torch.tensor([index]), 12, stream="order", step=step, backend="reference")
    counter = (2, index & 0xFFFFFFFF, index >> 32, STREAMS["order"] << 24 | step)
    expected = rounds_reference([torch.tensor([c]) for c in counter], (seed & 0xFFFFFFFF, seed >> 32))
    assert words[0, 8:].tolist() == [int(w) for w in expected]


def test_compiled_backend_is_there():
    # The tests run on a built checkout; a missing extension must not pass as "nothing to compare".
    assert "cpu" in fast_backends("cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, seed, device):
    indices = torch.tensor([0, 5, 2**33 + 1], device=device)
    count = torch.Size(shape).numel()
    words = philox_words(seed, indices, count, stream="z", step=7, backend="reference")
    normals = philox_normal(seed, indices, shape, stream="z", step=7, backend="reference")
    for backend in fast_backends(device):
        for _ in range(2):
            assert torch.equal(philox_words(seed, indices, count, stream="z", step=7, backend=backend), words)
        first = philox_normal(seed, indices, shape, stream="z", step=7, backend=backend)
        again = philox_normal(seed, indices, shape, stream="z", step=7, backend=backend)
        assert first.shape == (3, *shape) and torch.equal(first, again)
        assert (first - normals).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_normals_do_not_depend_on_the_batch(backend):
    whole = philox_normal(3, range(40), (3, 9, 9), stream="x_T", backend=backend)
    pieces = [philox_normal(3, range(a, b), (3, 9, 9), stream="x_T", backend=backend) for a, b in [(0, 1), (1, 17), (17, 40)]]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole[7], philox_normal(3, torch.tensor([7]), (3, 9, 9), stream="x_T", backend=backend)[0])


def test_normals_are_normal():
    x = philox_normal(11, range(1000), (1000,), stream="z").double()
    # Standard errors at a million samples: mean 1e-3, variance 1.4e-3, fourth moment 9.8e-3; five of each.
    assert abs(x.mean()) < 5e-3
    assert abs(x.var() - 1) < 7e-3
    assert abs((x**4).mean() - 3) < 5e-2
    assert abs((x[:, 0::2] * x[:, 1::2]).mean()) < 7.1e-3


def test_extreme_words_give_finite_normals():
    # u1 = 2^-24 is the smallest uniform: radius sqrt(48 ln 2) = 5.768.
    x = philox_normal(0, range(2**14), (1024,), stream="x_T", backend=fast_backends("cpu")[0])
    assert torch.isfinite(x).all() and x.abs().max() < 5.77


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(level):
    code = (
        "import hashlib; from advkd.ops import philox_normal as f;"
        "print(hashlib.sha256(f(9, range(50), (3, 33, 7), stream='z', backend='cpu').numpy().tobytes()).hexdigest())"
    )
    result = fork("-c", code, environment={"ADVKD_ISA": level}).finish(60)
    import hashlib

    ours = philox_normal(9, range(50), (3, 33, 7), stream="z", backend="cpu").numpy().tobytes()
    assert result.stdout.strip() == hashlib.sha256(ours).hexdigest()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_bits(threads):
    expected = philox_normal(9, range(64), (3, 64, 64), stream="z", backend="cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(philox_normal(9, range(64), (3, 64, 64), stream="z", backend="cpu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_empty(shape):
    for backend in ("reference", "cpu"):
        assert philox_normal(0, range(3), shape, stream="z", backend=backend).shape == (3, *shape)
        assert philox_normal(0, range(0), (2, 2), stream="z", backend=backend).shape == (0, 2, 2)


def test_uniform_is_the_first_word():
    u = philox_uniform(5, range(1000), stream="interpolation", step=3)
    words = philox_words(5, range(1000), 1, stream="interpolation", step=3)
    assert torch.equal(u, (words[:, 0] >> 8).float() * 2.0**-24)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.05


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    indices = torch.tensor([1, 2])
    words, normals = torch.empty(2, 5, dtype=torch.int64), torch.empty(2, 2, 3)
    torch.library.opcheck(torch.ops.advkd.philox_words.default, (indices, 1, 0, 0, backend, words))
    torch.library.opcheck(torch.ops.advkd.philox_normal.default, (indices, 1, 0, 0, backend, normals))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"indices": torch.zeros(2)}, "indices"),
        ({"stream": "noise"}, "stream"),
        ({"step": 2**24}, "step"),
        ({"shape": (-1,)}, "shape"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, name):
    arguments = {"seed": 0, "indices": range(2), "shape": (2,), "stream": "z", **changes}
    with pytest.raises(InputError, match=name):
        philox_normal(**arguments)


@pytest.mark.parametrize("other", DEFAULTS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_torch_defaults_change_nothing(backend, other):
    """Draws for a range are on the CPU; those for a tensor are on its device."""
    given, options = torch.tensor([3, 2**33]), {"stream": "z", "step": 2, "backend": backend}

    def draws(indices):
        words, normals = philox_words(1, indices, 6, **options), philox_normal(1, indices, (2, 3), **options)
        return words, normals, philox_uniform(1, indices, **options)

    for indices in (range(5), given):
        before = draws(indices)
        with other_default(other):
            after = draws(indices)
            if indices is given:
                assert counters("noise", (1, range(2), 0), 2, torch.device("cpu"))[1].device.type == "cpu"
        for a, b in zip(before, after, strict=True):
            assert b.device.type == "cpu" and b.dtype == a.dtype and torch.equal(a, b)


def test_numpy_integers_are_integers():
    expected = philox_words(3, range(2), 4, stream="z", step=2)
    assert torch.equal(philox_words(numpy.int64(3), range(2), 4, stream="z", step=numpy.int32(2)), expected)
    for name, values in (("seed", {"seed": 1.5}), ("step", {"step": "a"})):
        with pytest.raises(InputError, match=f"{name} must be an integer"):
            philox_words(**{"seed": 0, "indices": range(2), "count": 4, "stream": "z", **values})


def test_backend_variable_steers_auto_only():
    code = (
        "import torch; from advkd.ops import registry as b; d = torch.device('cpu');"
        "print(b.choose('philox', 'auto', d), b.choose('philox', 'cpu', d))"
    )
    result = fork("-c", code, environment={"ADVKD_BACKEND": "reference"}).finish(60)
    assert result.stdout.split() == ["reference", "cpu"]
    assert os.environ.get("ADVKD_BACKEND") is None and registry.choose("philox", "auto", torch.device("cpu")) == "cpu"
