"""The gradient penalty with its gradients, and a critic's whole update: hand-written passes, autograd, torch.func compiled.

python -m profiling.cases.gradient_penalty [--device cuda] [--only update] [--out FOLDER]    # scaling: --only scaling

Every contestant gives the gradients by all parameters; tensors are channels_last, autograd's also contiguous. Freed memory is
kept by the process (advkd.runtime.devices), for all. Beside each case stands its work bound: multiply-adds of autograd's
convolutions by those of ours. LeakyReLU as a product with slopes that autograd takes for constants saves it the zeros of a
second derivative, and has our count of multiply-adds: that is a contestant of its own. On a GPU every contestant is there
twice, as a call and as a captured CUDA graph, and everyone computes in full float32 unless the case's name says TF32.
"""

import copy
import functools
import itertools

import torch
from torch import nn
from torch.func import functional_call

from advkd.data.plots import panels
from advkd.models.critic import Critic, CriticConfig
from advkd.ops import gradient_penalty
from advkd.ops.critic.update import LOSS_FORMULAS, critic_gradients
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.timing import measure, percentiles

from ..harness import CAPTURED, Case, Contestant, Sweep, captures, main, set_tf32, with_captured
from ..sweep import apart, curves, forget_peak, medians, memory
from .tables import TABLES

WIDTHS = {"narrow": {"channels": 32, "max_channels": 128}, "dcgan": {"channels": 64, "max_channels": 512}}
"""The distillation's default critic, and DCGAN's own widths (Radford et al. 2016)."""
PARITY_TESTS = ["tests/ops/test_gradient_penalty.py", "tests/system/test_critic_update.py"]
WEIGHT, TOLERANCE = 10.0, 1e-5
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def problem(width, size, batch, device="cpu", layout="channels_last", dtype=torch.float32):
    """A critic, real and generated samples, and the interpolation's weights."""
    torch.manual_seed(0)
    critic = Critic(CriticConfig(size, 3, **WIDTHS[width])).to(device, dtype, memory_format=LAYOUTS[layout])
    real, fake = (torch.randn(batch, 3, size, size).to(device, dtype, memory_format=LAYOUTS[layout]) for _ in range(2))
    return critic, real, fake, torch.rand(batch).to(device)


class ConstantSlopes(nn.LeakyReLU):
    """LeakyReLU as a product with slopes that are constants to autograd."""

    def forward(self, x):
        with torch.no_grad():
            slopes = torch.where(x > 0, 1.0, self.negative_slope)
        return x * slopes


def constant_signs(critic):
    """A critic with the same weights, its activations written as :class:`ConstantSlopes`."""
    other = copy.deepcopy(critic)
    for part in (other.trunk, other.tail):
        for i, layer in enumerate(part):
            if isinstance(layer, nn.LeakyReLU):
                part[i] = ConstantSlopes(layer.negative_slope)
    return other


def flat(gradients, scale):
    """All gradients that there are as one vector, by the oracle's norm."""
    return torch.cat([g.flatten() for g in gradients if g is not None]) / scale


def penalty_only(critic, x):
    """Weights alone: the penalty has no gradient by biases."""
    weights = [p for p in critic.parameters() if p.ndim > 1]
    return lambda backend: torch.autograd.grad(gradient_penalty(critic, x, weight=WEIGHT, backend=backend), weights)


def penalties(backend, critic, real, fake, a):
    """A call of the penalty with its gradients."""
    call = penalty_only(critic, interpolated(real, fake, a))
    return lambda: call(backend)


def updates(backend, critic, real, fake, a):
    """A call of the whole update."""
    a = a.to(real.dtype)
    return lambda: critic_gradients(critic, real, fake, a=a, weight=WEIGHT, backend=backend).gradients


def interpolated(real, fake, a):
    a = a.to(real.dtype)[:, None, None, None]
    return a * real + (1 - a) * fake


def compiled_penalty(critic, x):
    weights = [p for p in critic.parameters() if p.ndim > 1]
    penalty = torch.compile(lambda x: gradient_penalty(critic, x, weight=WEIGHT), fullgraph=True, dynamic=False)
    return lambda: torch.autograd.grad(penalty(x), weights)


def compiled_update(critic, real, fake, a):
    update = torch.compile(lambda *given: updates("auto", critic, *given)(), fullgraph=True, dynamic=False)
    return lambda: update(real, fake, a)


def compiled_functional(critic, *given):
    """The best that torch.func and a compiler make of the penalty at x or, of real, fake and a, of the update.

    The inner gradient is torch.func's too, so that it compiles.
    """
    parameters, update = {name: p.detach() for name, p in critic.named_parameters()}, len(given) == 3

    def loss(parameters, *given):
        x = interpolated(*given) if update else given[0]
        g = torch.func.grad(lambda x: functional_call(critic, parameters, (x,)).sum())(x)
        penalty = WEIGHT * (g.flatten(1).norm(dim=1) - 1).square().mean()
        scores = [functional_call(critic, parameters, (x,)) for x in given[:2]] if update else ()
        return penalty + LOSS_FORMULAS["wasserstein"](*scores) if update else penalty

    gradient = torch.compile(torch.func.grad(loss), dynamic=False)
    return lambda: [g for g in gradient(parameters, *given).values() if update or g.ndim > 1]


def multiply_adds(critic, size):
    """Per sample and layer, from the image on: convolutions and the last linear map."""
    counts, side = [], size
    for layer in (*critic.trunk, *critic.tail):
        if isinstance(layer, nn.Conv2d):
            side = (side + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
            counts.append(layer.weight.numel() * side * side)
        elif isinstance(layer, nn.Linear):
            counts.append(layer.weight.numel())
    return counts


def work(critic, size, update):
    """Multiply-adds per sample, ours and autograd's.

    Autograd differentiates LeakyReLU's second derivative too, which is zero: its zeros go through every convolution again, but
    for the first one's input. A loss needs no gradient by the image.
    """
    first, *others = multiply_adds(critic, size)
    rest = sum(others)
    ours, theirs = 4 * (first + rest), 5 * first + 6 * rest
    if update:
        ours, theirs = ours + 4 * first + 6 * rest, theirs + 4 * first + 6 * rest
    return ours, theirs


def case(update, width, size, batch, device, tf32=False):
    """One case: penalty or whole update; ``tf32``: everyone may round to TensorFloat-32."""
    set_tf32(tf32)
    # Past a number of compilations torch.compile runs a function as it is, without failing: a peer in its slow configuration.
    torch._dynamo.reset()
    exact = problem(width, size, batch, device, dtype=torch.float64)
    ours, theirs = work(exact[0], size, update)
    name = f"{'update' if update else 'penalty'}, {width} critic, {size}x{size}, batch {batch}{TF32 if tf32 else ''}"
    contestants = _contestants(update, width, size, batch, device)
    # The oracle: autograd in float64, as a unit vector.
    vector = flat((updates if update else penalties)("autograd", *exact)(), 1.0)
    scale = float(vector.norm())
    for contestant in contestants:
        contestant.prepare = _scaled(contestant.prepare, scale)
    # Rounding turns the sign of some of millions of activations: every float32 contestant then differs from float64.
    plain = [float((c.prepare()().double() - vector / scale).abs().max()) for c in contestants if c.kind == "baseline"]
    tolerance = max(TOLERANCE, 2 * max(plain))
    notes = {"work_bound": theirs / ours, "keeps_freed_memory": True, "tf32": tf32}
    repeats = 5 if batch * size * size > 2**19 else 11
    contestants = with_captured(contestants, device, grad=True)
    for contestant in contestants:
        contestant.costly = contestant.name.removesuffix(CAPTURED) == FUNCTIONAL
    figures = {"flop": 2 * batch * ours, "repeats": repeats, "device": device, "notes": notes}
    return Case(name, lambda: vector / scale, tolerance, contestants, batch, **figures)


TF32 = ", TF32"
"""Ends the names of cases in which everyone may round to TensorFloat-32."""


def _scaled(prepare, scale):
    def prepared():
        call = prepare()
        return lambda: flat(call(), scale)

    return prepared


def _contestants(update, width, size, batch, device):
    """Autograd in both layouts, everyone else in the last one."""
    eager, found = updates if update else penalties, []
    for layout in LAYOUTS:
        given = problem(width, size, batch, device, layout)
        found.append(Contestant(f"autograd, {layout}", lambda g=given: eager("autograd", *g), "baseline"))
    signs, (critic, *samples) = constant_signs(given[0]), given
    arguments = given if update else (critic, interpolated(*samples))
    return [
        *found,
        Contestant(SIGNS, lambda: eager("autograd", signs, *samples)),
        Contestant(FUNCTIONAL, lambda: compiled_functional(*arguments)),
        Contestant("advkd", lambda: eager("auto", *given), "ours"),
        Contestant("advkd compiled", lambda: (compiled_update if update else compiled_penalty)(*arguments), "ours"),
    ]


SIGNS, FUNCTIONAL = "autograd, LeakyReLU's slopes as constants", "torch.compile of torch.func.grad"
"""The other peers; the second takes the compiler longest."""
SIZES = [("narrow", 64, 16), ("narrow", 64, 64), ("narrow", 128, 16), ("dcgan", 64, 16), ("narrow", 128, 64)]


def cases(device):
    """Every size, penalty and update; on a GPU again with TensorFloat-32."""
    found = {}
    for tf32 in (False, True) if captures(device) else (False,):
        for update, shape in itertools.product((False, True), SIZES):
            name = ", ".join(("update" if update else "penalty", *map(str, shape)))
            found[name + (TF32 if tf32 else "")] = functools.partial(case, update, *shape, device, tf32)
    return found


BATCHES, RESOLUTIONS, DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128), (8, 16, 32, 64, 128), (1, 2, 3, 4, 6, 8, 12)
BACKENDS = {"advkd": "auto", "autograd": "autograd"}
PROCESSES = 3


def critic_of(size):
    return Critic(CriticConfig(size, 3)).to(memory_format=torch.channels_last)


def chain(depth):
    """A critic of so many convolutions of one size."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.LeakyReLU(0.2)]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AvgPool2d(32), nn.Flatten(), nn.Linear(32, 1)).to(memory_format=torch.channels_last)


def seconds(critic, batch, size):
    """Seconds of the penalty with its gradients by method."""
    torch.manual_seed(0)
    call = penalty_only(critic, torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last))
    return measure({name: lambda b=backend: call(b) for name, backend in BACKENDS.items()}, repeats=9, warmup=2)


def peaks():
    """Bytes that a penalty with its gradients adds to the peak of a process, by case and method."""
    found = []
    for width, size, batch in SIZES:
        row = {"case": f"{width} critic, {size}x{size}, batch {batch}", "bytes": {}}
        for name, backend in BACKENDS.items():
            row["bytes"][name] = percentiles([apart(peak, width, size, batch, backend) for _ in range(PROCESSES)])
        found.append(row)
    return found


def peak(width, size, batch, backend):
    """Bytes that one call adds to this process's peak; a small one before it has loaded what is needed."""
    critic, real, _, _ = problem(width, size, batch)
    penalty_only(critic, real[:1])(backend)
    forget_peak()
    before = memory("VmRSS")
    gradients = penalty_only(critic, real)(backend)
    assert all(torch.isfinite(g).all() for g in gradients)
    return memory("VmHWM") - before


def scaling():
    """Growth of the penalty's cost with batch, resolution and depth, and its peak memory."""
    return {
        "batch": [{"batch": n, "seconds": seconds(critic_of(64), n, 64)} for n in BATCHES],
        "resolution": [{"resolution": s, "seconds": seconds(critic_of(s), 16, s)} for s in RESOLUTIONS],
        "depth": [{"depth": d, "seconds": seconds(chain(d), 16, 32)} for d in DEPTHS],
        "peaks": peaks(),
    }


def plot(result, path):
    """Three panels: milliseconds by batch, resolution and depth."""
    titles = {
        "batch": "critic of 64x64, by batch",
        "resolution": "critic, batch 16, by resolution",
        "depth": "chain of convolutions, by depth",
    }
    with panels(path, 3.4, columns=3) as found:
        for panel, (axis, title) in zip(found, titles.items(), strict=True):
            rows = result[axis]
            times = {name: medians(rows, "seconds", name) for name in BACKENDS}
            words = {"xlabel": axis, "ylabel": "ms, penalty and gradients", "title": title}
            curves(panel, [row[axis] for row in rows], times, **words)


SWEEPS = {"scaling": Sweep("penalty_scaling", scaling, PARITY_TESTS, [TABLES["penalty_memory"]], plot)}

if __name__ == "__main__":
    keep_freed_memory()
    main(SWEEPS, "bench_gradient_penalty", cases, PARITY_TESTS)
