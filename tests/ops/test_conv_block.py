"""The student's convolution: every backend and algorithm against float64, and its refusals."""

import functools

import pytest
import torch
import torch.nn.functional as F

from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import conv_block
from advkd.ops.conv_block import conv_block_cpu
from advkd.ops.conv_layer import ALGORITHMS, ConvLayer
from advkd.runtime.extension import extension_gap

from ..conftest import fork
from ..kernels.cases import Case, compare, convolve, draw, oracle, phase_filters, sizes

CPU = pytest.mark.skipif(extension_gap("cpu") is not None, reason="the cpu extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=CPU)]
ACTIVATIONS = ["leaky_relu", "tanh", "none"]
# 1x1 and 3x5: all border; 4x4: the student's start; 9x6 and 13x17: whole and partial tiles of each size; odd channels: no
# multiple of a vector; 50 and 112 channels: panels of three and of two vectors; 300 pixels: several blocks per thread.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 3, 5), (2, 48, 16, 4, 4), (1, 7, 3, 9, 6), (3, 33, 50, 13, 17), (1, 20, 112, 8, 300)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors are full of NaN, which exposes an output that is only partly written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(100).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def arguments(n, c_in, c_out, height, width, dtype=torch.float32):
    x, weights, biases = draw(Case(n, height, width, (c_in, c_out), product="f32"))
    return x.to(dtype), weights[0].to(dtype), biases[0].to(dtype)


def winograd_matrices(m):
    """A, B, G of F(m, 3) from its points alone (Toom and Cook), independent of the C++ code."""
    pairs = {2: (1.0,), 4: (0.75, 1.5), 6: (1.0, 2.0, 0.5)}[m]
    points, n = [0.0, *(s * p for p in pairs for s in (1, -1))], m + 2
    a, b, g = (torch.zeros(shape, dtype=torch.float64) for shape in ((m, n), (n, n), (n, 3)))
    for i, point in enumerate(points):
        others = [q for q in points if q != point]
        b[i, : len(others) + 1] = polynomial(others)
        a[:, i] = torch.tensor([point**k for k in range(m)])
        g[i] = torch.tensor([1, point, point**2]) / torch.tensor([point - q for q in others], dtype=torch.float64).prod()
    b[n - 1] = polynomial(points)
    a[m - 1, n - 1] = g[n - 1, 2] = 1
    return a, b, g


def polynomial(roots):
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


def transformed_sizes(x, weight, m):
    """Winograd's sums with every number, matrices included, made positive."""
    a, b, g = (matrix.abs() for matrix in winograd_matrices(m))
    n, _, height, width = x.shape
    down, across = -(-height // m), -(-width // m)
    padded = F.pad(x.double().abs(), (1, across * m - width + 1, 1, down * m - height + 1))
    tiles = padded.unfold(2, m + 2, m).unfold(3, m + 2, m)
    u = torch.einsum("ip,ocpq,jq->ocij", g, weight.double().abs(), g)
    v = torch.einsum("ip,ncyxpq,jq->ncyxij", b, tiles, b)
    products = torch.einsum("ocij,ncyxij->noyxij", u, v)
    y = torch.einsum("ki,noyxij,lj->noyxkl", a, products, a)
    return y.permute(0, 1, 2, 4, 3, 5).reshape(n, -1, down * m, across * m)[:, :, :height, :width]


def bound(x, weight, bias, upsample, algorithm, wanted):
    """Largest error that rounding allows, element by element.

    float32: one rounding per term of a sum (3 m + 12 for the transforms of input, weights and output). bfloat16: one for the
    output, and one for each factor that is rounded before it is multiplied (folded or transformed weights, transformed inputs).
    """
    m = int(algorithm[-1]) if algorithm.startswith("winograd") else 0
    single = (9 * x.shape[1] + 3 * m + 12) * 2.0**-24
    size = sizes(x, weight, upsample, *([functools.partial(transformed_sizes, m=m)] if m else []))
    size = size + bias.double().abs()[None, :, None, None]
    if x.dtype == torch.float32:
        # tanh adds its own error.
        return single * size + 2**-21
    narrow = algorithm in ("direct", "winograd2")
    roundings = (1 if narrow and (m or upsample) else 0) + (1 if narrow and m else 0)
    return (single + roundings * 2**-9) * size + 2**-8 * wanted.abs() + 2**-20


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend, dtype, shape, upsample, activation):
    x, weight, bias = arguments(*shape, dtype)
    y = conv_block(x, weight, bias, slope=0.1, upsample=upsample, activation=activation, backend=backend)
    assert y.dtype == dtype and y.is_contiguous()
    wanted = oracle(x, weight, bias, 0.1, upsample, activation)
    algorithm = "direct"
    if backend == "cpu":
        algorithm = ConvLayer(shape[1], shape[2], *shape[3:], upsample, activation).default(dtype)
    allowed = bound(x, weight, bias, upsample, algorithm, wanted)
    if backend == "reference" and dtype == torch.bfloat16:
        # oneDNN rounds between bias and activation.
        allowed = allowed + 2**-8 * (oracle(x, weight, bias, 0.1, upsample, "none").abs() + 1)
    compare(y, wanted, allowed)
    for strided in (x.to(memory_format=torch.channels_last), x.repeat_interleave(2, dim=3)[..., ::2]):
        z = conv_block(strided, weight, bias, slope=0.1, upsample=upsample, activation=activation, backend=backend)
        assert torch.equal(z, y) if backend == "cpu" else ((z - y).abs() <= 2 * allowed).all()


def gpu_bound(x, weight, bias, upsample, wanted):
    """:func:`bound` of the GPU's kernels.

    float32 products are three of TensorFloat-32, each factor kept to 22 bits; 16-bit storage rounds phases' weights once and
    results once.
    """
    terms = 9 * x.shape[1] + 12
    if x.dtype == torch.float32:
        return bound(x, weight, bias, upsample, "direct", wanted) * (1 + 3 * 2.0**-22 / (terms * 2.0**-24))
    unit = torch.finfo(x.dtype).eps / 2
    size = convolve(x.abs(), weight.abs(), upsample) + bias.double().abs()[None, :, None, None]
    # Numbers below float16's smallest normal one are rounded to a step of 2^-24.
    return (terms * 2.0**-24 + (unit if upsample else 0)) * size + 2 * unit * wanted.abs() + 2**-20


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 64, 3, 20, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_parity_on_a_gpu(backend, dtype, shape, upsample, activation):
    x, weight, bias = arguments(*shape, dtype)
    tensors = [tensor.cuda() for tensor in (x, weight, bias)]
    options = {"slope": 0.1, "upsample": upsample, "activation": activation, "backend": backend}
    y = conv_block(*tensors, **options)
    assert y.dtype == dtype and y.is_contiguous() and torch.equal(y, conv_block(*tensors, **options))
    wanted = oracle(x, weight, bias, 0.1, upsample, activation)
    compare(y.cpu(), wanted, gpu_bound(x, weight, bias, upsample, wanted))
    strided = tensors[0].repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(conv_block(strided, *tensors[1:], **options), y)


@CPU
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_algorithm(dtype, algorithm, upsample):
    if algorithm == "dot" and upsample:
        pytest.skip("dot does not up-sample")
    for n, c_in, c_out, height, width in SHAPES:
        x, weight, bias = arguments(n, c_in, min(c_out, 4) if algorithm == "dot" else c_out, height, width, dtype)
        wanted = oracle(x, weight, bias, 0.3, upsample, "leaky_relu")
        y = conv_block_cpu(x, weight, bias, 0.3, upsample, "leaky_relu", algorithm)
        compare(y, wanted, bound(x, weight, bias, upsample, algorithm, wanted))
        assert torch.equal(y, conv_block_cpu(x, weight, bias, 0.3, upsample, "leaky_relu", algorithm))


@CPU
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_neither_batch_nor_threads(dtype, algorithm):
    for height, width in ((7, 9), (40, 40)):
        x, weight, bias = arguments(5, 19, 3 if algorithm == "dot" else 70, height, width, dtype)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(conv_block_cpu(x, weight, bias, 0.1, False, "none", algorithm))
                found.append(torch.cat([conv_block_cpu(i, weight, bias, 0.1, False, "none", algorithm) for i in x.split(2)]))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(y, found[0]) for y in found)


@CPU
def test_larger_tiles_cost_accuracy_within_reason():
    """The plan's defaults rest on this: F(4x4) within 8 times the direct sum's error, F(6x6) within 64, F(2x2) within 3."""
    x, weight, bias = arguments(1, 128, 64, 32, 32)
    wanted = oracle(x, weight, bias, 0.1, False, "none")
    error = {
        a: (conv_block_cpu(x, weight, bias, 0.1, False, "none", a) - wanted).square().mean().sqrt() for a in ALGORITHMS[1:]
    }
    assert error["winograd2"] < 3 * error["direct"]
    assert error["winograd4"] < 8 * error["direct"]
    assert error["winograd6"] < 64 * error["direct"]
    assert error["winograd4"] < error["winograd6"], "the plan prefers the smaller tile at equal speed"


OTHERS = [
    isa for isa in ("baseline", "avx2", "avx512", "avx512bf16") if extension_gap("cpu") or isa != torch.ops.advkd_cpu.isa()
]
"""Instruction sets that this process does not use."""


@CPU
@pytest.mark.parametrize("isa", OTHERS)
def test_every_instruction_set(isa):
    """The algorithms' tests again in a process that may use no more than this instruction set."""
    environment = {"ADVKD_ISA": isa}
    load = "from advkd.runtime.extension import extension_gap; extension_gap('cpu')"
    code = f"import torch; torch.ones(1); {load}; print(torch.ops.advkd_cpu.isa())"
    if fork("-c", code, environment=environment).finish(60).stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}")
    command = ["-m", "pytest", "-q", "-x", "-n0", "-k", "every_algorithm or depend_on_neither", __file__]
    done = fork(*command, environment=environment).finish(200)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]


def test_up_sampling_folds_into_four_phases():
    """The identity behind the kernels: W0 and W1 + W2 for phase 0, W0 + W1 and W2 for phase 1, per axis."""
    x, weight, bias = (tensor.double() for tensor in arguments(2, 3, 4, 5, 6))
    expected = oracle(x, weight, bias, 0.2, True, "none")
    y = torch.empty_like(expected)
    for (a, b), filters in phase_filters(weight).items():
        y[:, :, a::2, b::2] = F.conv2d(x, filters, bias, padding=1)
    assert (y - expected).abs().max() < 1e-12


@pytest.mark.parametrize("m", [2, 4, 6])
def test_a_phase_needs_one_point_less(m):
    """Phase 0 vanishes at infinity and phase 1 at zero: (m + 1)^2 of the (m + 2)^2 products remain for each phase."""
    _, _, g = winograd_matrices(m)
    for (a, b), filters in phase_filters(torch.randn(2, 3, 3, 3)).items():
        values = torch.einsum("ip,ocpq,jq->ocij", g, filters, g)
        rows = values[:, :, -1 if a == 0 else 0]
        columns = values[..., -1 if b == 0 else 0]
        assert (rows == 0).all() and (columns == 0).all() and (values != 0).sum() == 6 * (m + 1) ** 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, weight, bias = arguments(0, 3, 5, 4, 4)
    assert conv_block(x, weight, bias, upsample=True, backend=backend).shape == (0, 5, 8, 8)


@CPU
def test_extreme_values():
    """tanh saturates exactly; a NaN in x stays a NaN; bfloat16 rounds to even and overflows to infinity."""
    weight, zero = torch.zeros(1, 1, 3, 3), torch.zeros(1)
    weight[0, 0, 1, 1] = 1

    def one_pixel(values, activation):
        x = torch.as_tensor(values).reshape(-1, 1, 1, 1)
        return conv_block_cpu(x, weight, zero, 0.1, False, activation, "direct").flatten()

    x = torch.cat((torch.tensor([-1e30, -9.1, -1e-8, 0.0, 9.1, 1e30, 3e38]), torch.linspace(-1.5, 1.5, 1000)))
    y = one_pixel(x, "tanh")
    assert ((y - x.double().tanh()).abs() <= 2**-22).all()
    assert (y.abs() <= 1).all() and torch.equal(y[:7].abs() == 1, x[:7].abs() > 9) and y[3] == 0 and y[2] == x[2]
    infinite = one_pixel([float("inf"), -float("inf"), float("nan")], "tanh")
    assert infinite[:2].tolist() == [1, -1] and infinite[2].isnan()
    assert one_pixel([float("nan")], "leaky_relu").isnan().all()
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.39e38, float("nan")])
    bias = values.clone()
    narrow = conv_block_cpu(
        torch.zeros(1, 1, 2, 2).bfloat16(), torch.zeros(4, 1, 3, 3).bfloat16(), bias, 0.1, False, "none", "direct"
    )
    assert torch.equal(narrow[0, :3, 0, 0], values[:3].bfloat16()) and narrow[0, 3].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = arguments(2, 3, 5, 4, 4, dtype)
        torch.library.opcheck(torch.ops.advkd.conv_block.default, (x, weight, bias, 0.2, True, "leaky_relu", backend))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"weight": torch.zeros(5, 3, 5, 5)}, "weight"),
        ({"weight": torch.zeros(5, 4, 3, 3)}, "weight"),
        ({"weight": torch.full((5, 3, 3, 3), float("inf"))}, "weight holds numbers that are not finite"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"bias": torch.full((5,), float("nan"))}, "bias holds numbers that are not finite"),
        ({"bias": torch.zeros(5).half()}, "dtype"),
        ({"x": torch.zeros(1, 3, 0, 4)}, "empty"),
        ({"x": torch.zeros(3, 4, 4)}, "x must have shape"),
        ({"x": torch.zeros(1, 3, 4, 4, device="meta")}, "one device"),
        ({"slope": float("nan")}, "slope"),
        ({"activation": "relu"}, "activation"),
        ({"backend": "cpp"}, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, name):
    x, weight, bias = arguments(1, 3, 5, 4, 4)
    with pytest.raises(InputError, match=name):
        conv_block(**{"x": x, "weight": weight, "bias": bias, **changes})


def test_dtypes():
    """float16 and float64 run on the reference; the C++ kernels, when named, refuse them."""
    for dtype in (torch.float16, torch.float64):
        x, weight, bias = arguments(1, 3, 5, 4, 4, dtype)
        assert conv_block(x, weight, bias).dtype == dtype
        with pytest.raises(InputError, match="dtype must be float32 or bfloat16"):
            conv_block(x, weight, bias, backend="cpu")
    with pytest.raises(InputError, match="floating-point"):
        conv_block(x.long(), weight.long(), bias.long())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient(backend):
    x, weight, bias = arguments(1, 3, 5, 4, 4)
    with pytest.raises(RuntimeError, match="no gradient"):
        conv_block(x, weight.requires_grad_(), bias, backend=backend)
    # Around the public function the op itself raises, both ways.
    y = torch.ops.advkd.conv_block(x, weight, bias, 0.2, False, "none", backend)
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.autograd.grad(y.sum(), [weight])


def test_another_backend_is_not_there():
    x, weight, bias = arguments(1, 3, 5, 4, 4)
    with pytest.raises(BackendUnavailableError, match="backend 'cuda' cannot run conv_block on cpu: "):
        conv_block(x, weight, bias, backend="cuda")
