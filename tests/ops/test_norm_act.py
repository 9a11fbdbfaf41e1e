"""Batch norm, LeakyReLU and up-sampling: parity of values and gradients, statistics, saved tensors, and refusals."""

import functools
import hashlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from advkd.errors import InputError
from advkd.models.batch_norm import BatchNorm2d, fold, read_by_fold
from advkd.models.batch_norm import normalize as norm_layer
from advkd.ops import gradient_penalty, norm_act
from advkd.ops.norm_act import BACKWARD, MOMENTS, NORMALIZE, SUMS, moments

from ..conftest import fork
from .each_backend import DEVICES, DTYPES, fast_backends, threads
from .training_cases import BF16, CASES, F16, UNIT, Case, check

EPS, SLOPE = 1e-5, 0.2
LAUNCH = {op.name: op.launchers for op in (MOMENTS, NORMALIZE, SUMS, BACKWARD)}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Sizes that the CPU's kernels cut: planes of several runs, rows longer than a run and shorter than a vector, several pieces
# of work; channels that no vector divides, more of them than are repeated side by side, and more than a run has elements.
RUNS = [
    Case((3, 5, 64, 74)),
    Case((3, 24, 48, 33), last=True),
    Case((2, 150, 20, 21), F16, last=True),
    Case((1, 1, 11, 1500)),
    Case((40, 130, 3, 3)),
    Case((2, 2500, 1, 3), BF16, last=True),
    Case((2, 7, 3, 2100), last=True),
]


def changed(case, **changes):
    return Case(**{**case.__dict__, **changes})


def all_cases():
    for name, known in CASES.items():
        if not name.startswith("norm_act"):
            continue
        upsamplings = (False,) if name == "norm_act_moments" else (False, True)
        own = [changed(case, upsample=upsample) for case in RUNS for upsample in upsamplings]
        if name == "norm_act_sums":
            own = [changed(case, kept=case.upsample) for case in own]
        yield name, [*known, *own]


@pytest.mark.parametrize(("name", "cases"), list(all_cases()))
def test_kernels_of_the_cpu(name, cases):
    assert "cpu" in fast_backends("norm_act", "cpu"), "the extension is not built"
    for case in cases:
        check(name, case, LAUNCH[name]["cpu"])


def make(shape, dtype=torch.float32, layout=torch.contiguous_format, device="cpu", mean=0.5, seed=0):
    """x and the weights; gamma has both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) + mean).to(device, dtype).contiguous(memory_format=layout)
    gamma, beta = (torch.randn(shape[1], generator=generator).to(device) for _ in range(2))
    return x, gamma, beta


def running(channels, device="cpu", dtype=torch.float32):
    return torch.linspace(-0.5, 0.7, channels, dtype=dtype, device=device), torch.linspace(
        0.4, 1.5, channels, dtype=dtype, device=device
    )


def torch_ops(x, gamma, beta, mean, variance, training=True, upsample=False, momentum=0.1):
    """torch's three ops; in float64 the oracle."""
    y = F.leaky_relu(F.batch_norm(x, mean, variance, gamma, beta, training, momentum, EPS), SLOPE)
    return F.interpolate(y, scale_factor=2, mode="nearest") if upsample else y


def with_gradients(function, tensors, gradient):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y.dtype))]


def floors(x, gamma, beta, mean, variance, training, gradient):
    """Rounding bounds of y, dx, dgamma and dbeta: a few units of the terms, 64 units of a sum's terms."""
    deviation = (variance + EPS).sqrt()
    if training:
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        deviation = (variance + EPS).sqrt()
    normalized = (x - mean[:, None, None]) / deviation[:, None, None]
    terms = (gamma[:, None, None] * normalized).abs() + beta.abs()[:, None, None]
    before = gamma[:, None, None] * normalized + beta[:, None, None]
    assert (before.abs() > 32 * UNIT * terms).all(), "choose another seed: the sign of a value hangs on rounding"
    d = F.avg_pool2d(gradient, 2) * 4 if gradient.shape != x.shape else gradient
    d = torch.where(before > 0, d, SLOPE * d).abs()
    sums = (d * normalized.abs()).sum((0, 2, 3)), d.sum((0, 2, 3))
    count = x.numel() / x.shape[1]
    d_terms = d + (normalized.abs() * sums[0][:, None, None] + sums[1][:, None, None]) / count
    dx = (gamma.abs() / deviation)[:, None, None] * d_terms
    return [32 * UNIT * terms.max(), 64 * UNIT * dx.max(), 64 * UNIT * sums[0], 64 * UNIT * sums[1]]


# One vector and less; odd sides; 17 channels, which no vector divides; 64, which are whole vectors.
SHAPES = [(4, 1, 3, 5), (2, 3, 5, 7), (3, 17, 8, 6), (2, 64, 9, 16)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("upsample", [False, True], ids=["same", "up"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, layout, upsample, training, device):
    for dtype, seed in itertools.product(DTYPES, range(2)):
        tensors = make(shape, dtype, layout, device, seed=seed)
        sides = [2 * side if upsample else side for side in shape[2:]]
        gradient = torch.randn(*shape[:2], *sides, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        options = {"training": training, "upsample": upsample}
        wide = [t.double() for t in tensors]
        statistics = running(shape[1], device, torch.float64)
        wanted = with_gradients(lambda *t: torch_ops(*t, *running(shape[1], device, torch.float64), **options), wide, gradient)
        eager = with_gradients(lambda *t: torch_ops(*t, *running(shape[1], device), **options), tensors, gradient)
        floor = floors(*wide, *statistics, training, gradient.double())
        for backend in ("reference", *fast_backends("norm_act", device)):

            def ours(*t, backend=backend):
                return norm_act(*t, *running(shape[1], device), slope=SLOPE, eps=EPS, backend=backend, **options)

            found = with_gradients(ours, tensors, gradient)
            again = with_gradients(ours, tensors, gradient)
            assert found[0].is_contiguous(memory_format=layout)
            for value, twice, same, right, least in zip(found, again, eager, wanted, floor, strict=True):
                assert torch.equal(value, twice) and value.dtype == same.dtype
                # Storage adds a rounding to the floor.
                narrow = torch.finfo(value.dtype).eps / 2 * right.abs() if value.dtype != torch.float32 else 0
                bound = torch.maximum(2 * (same.double() - right).abs().max(), least + narrow)
                assert ((value.double() - right).abs() <= bound).all(), (backend, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics(momentum, device):
    x, gamma, beta = make((3, 5, 4, 6), device=device)
    for backend in ("reference", *fast_backends("norm_act", device)):
        ours, theirs = running(5, device), running(5, device, torch.float64)
        for step in range(2):
            y = norm_act(x + step, gamma, beta, *ours, slope=SLOPE, momentum=momentum, backend=backend)
            torch_ops(x.double() + step, gamma.double(), beta.double(), *theirs, momentum=momentum)
            for found, wanted in zip(ours, theirs, strict=True):
                assert (found - wanted).abs().max() <= 8 * UNIT * 2
        # Without running statistics the result is the same.
        assert torch.equal(norm_act(x + 1, gamma, beta, None, None, slope=SLOPE, backend=backend), y)
        before = [t.clone() for t in ours]
        norm_act(x, gamma, beta, *ours, training=False, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(ours, before))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_a_mean_far_from_zero(layout, device):
    """Mean 1e4, deviation 1; also where a piece's first values are not representative of the rest."""
    x, _, _ = make((4, 6, 40, 48), layout=layout, device=device, mean=1e4)
    jump = x.clone()
    jump[:, :, :2] = 0
    for backend, values in itertools.product(("reference", *fast_backends("norm_act", device)), (x, jump)):
        variance, mean = torch.var_mean(values.double(), dim=(0, 2, 3), correction=0)
        found = moments(values, backend)
        assert ((found[0] - mean).abs() <= 16 * UNIT * mean).all()
        # Differences from the mean carry the mean's error; sums have 64 roundings.
        assert ((found[1] - variance).abs() <= 64 * UNIT * variance + (16 * UNIT * mean) * variance.sqrt()).all()


def test_stores_past_the_caches_change_nothing():
    """Results of more than 4 MB, aligned and not, against those of single samples."""
    for (shape, offset), layout in itertools.product(
        [((5, 16, 128, 131), 0), ((5, 16, 128, 131), 1), ((3, 24, 128, 128), 0)], LAYOUTS
    ):
        x, gamma, beta = make(shape, layout=layout)
        gradient = torch.empty(x.numel() + offset)[offset:].as_strided(x.shape, x.stride()).copy_(x.flip(0))
        weights, statistics, means = torch.stack((gamma, beta)), moments(x, "cpu"), torch.randn(2, shape[1])
        launch = {name: pieces["cpu"] for name, pieces in LAUNCH.items()}

        def results(x, gradient, upsample):
            """y; d; dx from the gradient and from d."""
            sides = [side * (2 if upsample else 1) for side in x.shape[2:]]
            incoming = F.interpolate(gradient, scale_factor=2, mode="nearest") if upsample else gradient
            y = torch.full((*x.shape[:2], *sides), torch.nan).contiguous(memory_format=layout)
            y = torch.empty(y.numel() + offset)[offset:].as_strided(y.shape, y.stride()).fill_(torch.nan)
            kept, dx, same = (torch.full_like(gradient, torch.nan) for _ in range(3))
            launch["norm_act"](x, weights, statistics, EPS, SLOPE, upsample, y)
            launch["norm_act_sums"](incoming, x, weights, statistics, EPS, SLOPE, upsample, kept, torch.empty(2, shape[1]))
            launch["norm_act_backward"](incoming, x, weights, statistics, means, EPS, SLOPE, upsample, False, dx)
            launch["norm_act_backward"](kept, x, weights, statistics, means, EPS, SLOPE, upsample, True, same)
            assert torch.equal(dx, same)
            return y, kept, dx

        for upsample in (False, True):
            whole = results(x, gradient, upsample)
            single = [results(x[i : i + 1], gradient[i : i + 1], upsample) for i in range(len(x))]
            for found, wanted in zip(whole, map(torch.cat, zip(*single)), strict=True):
                assert torch.equal(found, wanted)


def results():
    """Results of the CPU's kernels for some shapes, in all dtypes and layouts."""
    for shape, dtype, layout, upsample in itertools.product([(3, 17, 45, 50), (2, 64, 40, 48)], DTYPES, LAYOUTS, (False, True)):
        tensors = make(shape, dtype, layout)
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(*shape[:2], *(side * (1 + upsample) for side in shape[2:]), generator=generator)
        statistics = running(shape[1])
        options = {"slope": SLOPE, "upsample": upsample, "backend": "cpu"}
        yield from with_gradients(functools.partial(normalize, statistics=statistics, **options), tensors, gradient)
        yield from statistics


def normalize(*tensors, statistics, **options):
    return norm_act(*tensors, *statistics, **options)


def digest():
    sha = hashlib.sha256()
    for tensor in results():
        sha.update(tensor.float().contiguous().numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("number", [1, 3])
def test_threads_do_not_change_bits(number):
    expected = list(results())
    with threads(number):
        assert all(torch.equal(found, wanted) for found, wanted in zip(results(), expected, strict=True))


def test_every_instruction_set_gives_the_same_bits():
    code = "from tests.ops.test_norm_act import digest; print(digest())"
    processes = [fork("-c", code, environment={"ADVKD_ISA": isa}) for isa in ("baseline", "avx2", "avx512")]
    assert [process.finish(60).stdout.strip() for process in processes] == [digest()] * 3


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("upsample", [False, True], ids=["same", "up"])
def test_gradcheck(upsample, training):
    tensors = [t.double().requires_grad_() for t in make((2, 3, 3, 4))]

    def function(*t):
        return norm_act(*t, *running(3, dtype=torch.float64), slope=SLOPE, upsample=upsample, training=training)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("upsample", [False, True], ids=["same", "up"])
def test_only_the_gradients_asked_for(upsample, training, device):
    """Each gradient alone equals the one computed with all others; strided inputs and gradients are read correctly."""
    tensors = make((2, 3, 6, 5), device=device)
    for backend in ("reference", *fast_backends("norm_act", device)):

        def gradients(wanted, x_of=lambda x: x, of=lambda y: y.square().sum(), backend=backend):
            leaves = [t.clone().requires_grad_(name in wanted) for t, name in zip(tensors, "xgb", strict=True)]
            options = {"upsample": upsample, "training": training, "backend": backend}
            y = norm_act(x_of(leaves[0]), *leaves[1:], *running(3, device), **options)
            return dict(zip(wanted, torch.autograd.grad(of(y), [t for t in leaves if t.requires_grad]), strict=True))

        together = gradients("xgb")
        for wanted in ("x", "g", "b", "gb"):
            assert all(torch.equal(value, together[name]) for name, value in gradients(wanted).items())
        strided = gradients("xgb", lambda x: torch.stack((x, x), -1)[..., 0])
        assert all(torch.equal(strided[name], together[name]) for name in "xgb")
        # The gradient of a sum is an expanded scalar.
        ones = gradients("xgb", of=lambda y: y.sum()), gradients("xgb", of=lambda y: (y * torch.ones_like(y)).sum())
        assert all(torch.equal(ones[0][name], ones[1][name]) for name in "xgb")


@pytest.mark.parametrize("place", ["before", "inside", "after"])
def test_double_backward_raises(place):
    """Holds for weights before the op, its own, and those after it; via ``backward()`` and via ``torch.autograd.grad``."""
    for backend in ("reference", "cpu"):
        x, gamma, beta = make((2, 3, 4, 4))
        x.requires_grad_()
        weights = {"before": torch.ones(3, 3, 1, 1), "inside": gamma, "after": torch.ones(2, 3, 1, 1)}
        weight = weights[place].requires_grad_()

        def loss():
            h = F.conv2d(x, weights["before"])
            y = norm_act(h, weights["inside"], beta, None, None, upsample=True, backend=backend)
            (gradient,) = torch.autograd.grad(F.conv2d(y, weights["after"]).square().sum(), x, create_graph=True)
            return gradient.square().sum()

        with pytest.raises(RuntimeError, match="norm_act is differentiable once"):
            loss().backward()
        with pytest.raises(RuntimeError, match="norm_act is differentiable once"):
            torch.autograd.grad(loss(), [weight])


def test_a_gradient_penalty_through_the_op_raises():
    norm = BatchNorm2d(4)
    critic = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 1))
    x = torch.randn(3, 1, 8, 8)

    def penalty():
        return gradient_penalty(lambda x: critic(x).squeeze(1), x, backend="autograd")

    with pytest.raises(RuntimeError, match="norm_act is differentiable once"):
        penalty().backward()
    for weight in (critic[0].weight, norm.weight, critic[3].weight):
        with pytest.raises(RuntimeError, match="norm_act is differentiable once"):
            torch.autograd.grad(penalty(), [weight])


@pytest.mark.parametrize("upsample", [False, True], ids=["same", "up"])
def test_eval_mode_is_torchs_own_whatever_the_grad_mode(upsample):
    """The same bits with and without gradients, and derivatives of every order."""
    norm = BatchNorm2d(4).double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    norm(x)
    norm.eval()
    y = norm(x, 0.2, upsample)
    with torch.no_grad():
        assert torch.equal(norm(x, 0.2, upsample), y)
    wanted = F.leaky_relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps), 0.2)
    assert torch.equal(y, F.interpolate(wanted, scale_factor=2, mode="nearest") if upsample else wanted)
    assert torch.autograd.gradgradcheck(lambda x: norm(x, 0.2, upsample), x)


@pytest.mark.parametrize("upsample", [False, True], ids=["same", "up"])
def test_saves_x_the_statistics_and_the_weights(upsample):
    def saved(function):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function()
        assert y.requires_grad
        return sum(kept.values())

    x, gamma, beta = (t.requires_grad_() for t in make((2, 64, 16, 16)))
    ours = saved(lambda: norm_act(x, gamma, beta, None, None, upsample=upsample))
    assert ours == 4 * (x.numel() + 2 * 64 + 2 * 64)

    def eager():
        y = F.leaky_relu(F.batch_norm(x, None, None, gamma, beta, True), SLOPE, inplace=True)
        return F.interpolate(y, scale_factor=2, mode="nearest") if upsample else y

    assert 2 * ours <= saved(eager) + 8 * 64 * 4


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    x, gamma, beta = make((2, 3, 4, 5))
    weights, statistics, sums, dx = torch.stack((gamma, beta)), torch.ones(2, 3), torch.zeros(2, 3), torch.empty_like(x)
    ops, y = torch.ops.advkd, torch.zeros(2, 3, 8, 10)
    torch.library.opcheck(ops.norm_act_moments.default, (x, backend, statistics.clone()))
    torch.library.opcheck(ops.norm_act.default, (x, weights, statistics, EPS, SLOPE, True, backend, y.clone()))
    torch.library.opcheck(ops.norm_act_sums.default, (y, x, weights, statistics, EPS, SLOPE, True, backend, dx, sums))
    torch.library.opcheck(ops.norm_act_sums.default, (x, x, weights, statistics, EPS, SLOPE, False, backend, None, sums))
    arguments = (y, x, weights, statistics, sums, EPS, SLOPE, True, False, backend, dx)
    torch.library.opcheck(ops.norm_act_backward.default, arguments)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_whole(training):
    tensors, gradient = make((2, 3, 4, 5), layout=torch.channels_last), torch.randn(2, 3, 8, 10)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        statistics = running(3)

        def function(x, gamma, beta, mean, variance):
            return 2 * norm_act(2 * x, gamma, beta, mean, variance, slope=SLOPE, upsample=True, training=training)

        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        found.append([*with_gradients(lambda *t: call(*t, *statistics), tensors, gradient), *statistics])
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(*found, strict=True))


WORKER = """
import sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from tests.ops.test_norm_act import share
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
found = share(slice(0, 3) if rank == 0 else slice(3, 4), True)
tensors = {f"{i} {j}": t.contiguous() for i, group in enumerate(found) for j, t in enumerate(group)}
save_file(tensors, f"{folder}/{rank}.safetensors")
dist.destroy_process_group()
"""


def share(rows, synchronize):
    """Values, gradients and running statistics of some samples of a batch of four, in two layers, for every backend."""
    found = []
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        x, gamma, beta = (t.to(dtype) for t in make((4, 3, 5, 6)))
        weight = torch.randn(4, 3, 10, 12, dtype=dtype, generator=torch.Generator().manual_seed(3))
        x, leaves, statistics = (
            x[rows].clone().requires_grad_(),
            (gamma.requires_grad_(), beta.requires_grad_()),
            running(3, dtype=dtype),
        )
        options = {"slope": SLOPE, "synchronize": synchronize, "backend": backend}
        y = norm_act(norm_act(x, *leaves, *statistics, **options), *leaves, *statistics, upsample=True, **options)
        gradients = torch.autograd.grad((y * weight[rows]).sum(), (x, *leaves))
        found.append((y.detach(), *gradients, *statistics))
    return found


def test_two_processes_with_unequal_batches_are_one_with_the_whole(tmp_path):
    processes = [fork("-c", WORKER, rank, tmp_path) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for n, whole in enumerate(share(slice(None), False)):
        first, second = ([part[f"{n} {i}"] for i in range(len(whole))] for part in parts)
        unit = torch.finfo(whole[0].dtype).eps
        for i, wanted in enumerate(whole):
            if i < 2:
                found = torch.cat((first[i], second[i]))
            elif i < 4:
                found = first[i] + second[i]
            else:
                assert torch.equal(first[i], second[i])
                found = first[i]
            # Through two normalisations, whose gradients are differences of sums over 120 and 480 values.
            assert (found - wanted).abs().max() <= 256 * unit * max(1, wanted.abs().max())


def test_the_module_is_torchs():
    """State, batch count and values equal those of ``nn.BatchNorm2d``, with and without gradients."""
    ours, theirs = BatchNorm2d(5), nn.BatchNorm2d(5)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.linspace(-1, 2, 5))
            module.bias.copy_(torch.linspace(1, -1, 5))
    x = torch.randn(3, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    for training in (True, True, False):
        for module in (ours, theirs):
            module.train(training)
        assert (ours(x) - theirs(x)).abs().max() <= 32 * UNIT
    assert ours.num_batches_tracked == 2 and list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert (ours.state_dict()[name] - value).abs().max() <= 8 * UNIT
    with_graph = ours(x, SLOPE, True)
    with torch.no_grad():
        assert (ours(x, SLOPE, True) - with_graph).abs().max() <= 32 * UNIT and with_graph.requires_grad


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None, "affine": False},
    ],
    ids=str,
)
def test_the_modules_options_are_torchs(options, grad):
    """Cumulative average, no weights, no running statistics: values, gradients and state equal ``nn.BatchNorm2d``'s."""
    ours, theirs = BatchNorm2d(5, **options), nn.BatchNorm2d(5, **options)
    generator = torch.Generator().manual_seed(0)
    # After five batches a cumulative average is far from one with a fixed weight.
    for training in (True, True, False, True, True, True, False):
        x = 1 + torch.randn(3, 5, 6, 4, generator=generator)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        with torch.set_grad_enabled(grad):
            found, wanted = (module.train(training)(leaf) for module, leaf in zip((ours, theirs), leaves, strict=True))
        assert (found - wanted).abs().max() <= 64 * UNIT
        if grad:
            gradients = [torch.autograd.grad(y.sin().sum(), leaf)[0] for y, leaf in zip((found, wanted), leaves, strict=True)]
            assert (gradients[0] - gradients[1]).abs().max() <= 64 * UNIT
    for name, value in theirs.state_dict().items():
        assert (ours.state_dict()[name] - value).abs().max() <= 16 * UNIT, name
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_statistics_that_are_not_tracked_do_not_move():
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    for module in (ours, theirs):
        module.track_running_stats = False
        module(x)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.Identity(), nn.GroupNorm(2, 4), BatchNorm2d(4)])
def test_normalize_takes_any_module(norm):
    x = torch.randn(2, 4, 3, 5)
    for training, upsample in itertools.product((False, True), (False, True)):
        y = F.leaky_relu(nn.Sequential(norm.train(training))(x), SLOPE)
        wanted = F.interpolate(y, scale_factor=2, mode="nearest") if upsample else y
        kept = x.clone()
        assert (norm_layer(norm, x, SLOPE, upsample) - wanted).abs().max() <= 32 * UNIT
        assert torch.equal(x, kept)


def test_folding_is_normalising():
    """Checked in float64, with and without a bias of the convolution and weights of the norm."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for bias, affine, kind in itertools.product((False, True), (False, True), (BatchNorm2d, nn.SyncBatchNorm)):
        convolution, norm = nn.Conv2d(3, 4, 3, bias=bias).double(), kind(4, affine=affine, eps=0.1).double().eval()
        for number, tensor in enumerate(norm.state_dict().values()):
            if tensor.is_floating_point():
                tensor.copy_(torch.linspace(0.5, 1 + number, 4))
        weight, shift = fold(convolution, norm)
        assert (F.conv2d(x, weight, shift) - norm(convolution(x))).abs().max() <= 1e-12
        same = fold(convolution, nn.Identity())
        assert torch.equal(F.conv2d(x, *same), convolution(x)) and not any(t.requires_grad for t in (*same, weight, shift))


def test_what_folding_reads():
    """Folding reads exactly the tensors that determine the folded weights, and the norm's kind and options."""
    convolution, norm = nn.Conv2d(3, 4, 3), BatchNorm2d(4)
    described, tensors = read_by_fold(convolution, norm)
    state = {**convolution.state_dict(prefix="c."), **norm.state_dict(prefix="n.")}
    read = {t.data_ptr() for t in tensors}
    names = {name for name, t in state.items() if t.data_ptr() in read}
    assert names == {"c.weight", "c.bias", "n.weight", "n.bias", "n.running_mean", "n.running_var"} and len(tensors) == 6
    assert read_by_fold(convolution, norm)[0] == described
    norm.eps = 0.1
    assert read_by_fold(convolution, norm)[0] != described
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, bias=False))
    _, (weight,) = read_by_fold(parametrized, nn.Identity())
    assert torch.equal(weight, parametrized.weight) and weight.shape == (4, 3, 3, 3)


def test_a_chain_compiles_for_every_shape():
    """Two in a row, whose options torch.compile takes as numbers that may change."""
    torch._dynamo.reset()
    _, gamma, beta = make((1, 3, 1, 1))
    gamma.requires_grad_()

    def chain(x):
        y = norm_act(x, gamma, beta, None, None, slope=SLOPE, upsample=True)
        return norm_act(y, gamma, beta, None, None, slope=SLOPE)

    compiled = torch.compile(chain, dynamic=True, fullgraph=True, backend="aot_eager")
    for shape in ((4, 3, 4, 6), (7, 3, 5, 3)):
        x, _, _ = make(shape)
        found, wanted = compiled(x), chain(x)
        assert torch.equal(found, wanted)
        gradients = [torch.autograd.grad(y.sin().sum(), gamma)[0] for y in (found, wanted)]
        assert torch.equal(*gradients)


def test_a_bfloat16_autocast_gives_bfloat16():
    x, norm = torch.randn(2, 3, 8, 8), BatchNorm2d(4)
    convolution = nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(convolution(x), SLOPE)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32 and norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_smallest(device):
    empty, one = torch.zeros(0, 3, 4, 4, device=device), torch.ones(1, 2, 1, 1, device=device)
    for backend in ("reference", *fast_backends("norm_act", device)):
        _, gamma, beta = make((1, 3, 1, 1), device=device)
        y = norm_act(empty, gamma, beta, *running(3, device), upsample=True, training=False, backend=backend)
        assert y.shape == (0, 3, 8, 8)
        y = norm_act(one, gamma[:2], beta[:2], *running(2, device), training=False, slope=1.0, backend=backend)
        mean, variance = running(2, device, torch.float64)
        wanted = gamma[:2] * (1 - mean) / (variance + EPS).sqrt() + beta[:2]
        assert (y.flatten() - wanted).abs().max() <= 8 * UNIT * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [1.0]}, "x must be"),
        ({"x": torch.zeros(2, 3, 4, 4).int()}, "x must be"),
        ({"x": torch.zeros(2, 3, 4)}, "x must have shape"),
        ({"x": torch.zeros(0, 3, 4, 4)}, "at least two values"),
        ({"x": torch.zeros(1, 3, 1, 1)}, "at least two values"),
        ({"x": torch.zeros(2, 3, 4, 4).double(), "backend": "cpu"}, "float32, bfloat16 and float16"),
        ({"gamma": torch.ones(4)}, "gamma must have shape"),
        ({"gamma": torch.ones(3).int()}, "gamma must be"),
        ({"gamma": None}, "gamma must be"),
        ({"beta": torch.ones(3, 1)}, "beta must have shape"),
        ({"running_mean": None}, "both be given"),
        ({"running_var": torch.ones(2)}, "running_var must have shape"),
        ({"running_mean": None, "running_var": None, "training": False}, "needed where training is False"),
        ({"synchronize": True}, "synchronize needs an initialised"),
        ({"momentum": None}, "momentum must be a number"),
        ({"backend": "gpu"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    values = {"x": torch.zeros(2, 3, 4, 4), "gamma": torch.ones(3), "beta": torch.zeros(3), **changes}
    statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with pytest.raises(InputError, match=message):
        norm_act(**{**statistics, **values})
