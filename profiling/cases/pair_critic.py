"""Updates of DDGAN's critic, which is told a second image: hand-written passes against autograd, with R1 and without.

python -m profiling.cases.pair_critic [--device cuda] [--out FOLDER]

The critic sees a state and, beside it at full resolution, the state before it and planes for the step. One update in fifteen
has the penalty on real states (``--r1-every``). Tensors are channels_last, autograd's also contiguous; freed memory is kept.
"""

import functools

import torch

from advkd.methods.ddgan import DDGANConfig
from advkd.models.critic import Critic, CriticConfig
from advkd.ops.critic.update import critic_gradients
from advkd.runtime.devices import keep_freed_memory

from ..harness import Case, Contestant, main, set_tf32, with_captured
from .gradient_penalty import LAYOUTS, TOLERANCE, flat

PARITY_TESTS = ["tests/system/test_critic_update.py", "tests/methods/test_ddgan.py"]
SIZE, STEPS = 32, 4
SHAPES = {"default": (32, 128, 32), "wide": (64, 256, 32)}
"""Name -> channels, most channels, and batch: of the command's defaults, and of the students of two and four steps."""


def problem(channels, most, batch, device="cpu", layout="channels_last", dtype=torch.float32):
    """A critic, real and generated states, and what it is told beside them."""
    torch.manual_seed(0)
    critic = Critic(CriticConfig(SIZE, 1, channels, most, 1 + STEPS, SIZE))
    shapes = [(batch, 1, SIZE, SIZE)] * 2 + [(batch, 1 + STEPS, SIZE, SIZE)]
    made = (critic, *(torch.randn(shape) for shape in shapes))
    return [one.to(device, dtype, memory_format=LAYOUTS[layout]) for one in made]


def update(backend, weight, critic, real, fake, told):
    """A call of the update; ``weight``: of R1, 0 for none."""
    options = {"loss": "softplus", "mode": "r1", "weight": weight, "backend": backend, "check_finite": False}
    return lambda: critic_gradients(critic, real, fake, condition=told, **options).gradients


def case(name, penalised, device):
    """One case."""
    set_tf32(False)
    config, shape = DDGANConfig(), SHAPES[name]
    weight = config.r1 * config.r1_every * penalised
    vector = flat(update("autograd", weight, *problem(*shape, device, dtype=torch.float64))(), 1.0)
    scale = float(vector.norm())

    def contestant(title, backend, kind, layout="channels_last"):
        def prepare():
            call = update(backend, weight, *problem(*shape, device, layout))
            return lambda: flat(call(), scale)

        return Contestant(title, prepare, kind)

    contestants = [contestant(f"autograd, {layout}", "autograd", "baseline", layout) for layout in LAYOUTS]
    contestants.append(contestant("advkd", "auto", "ours"))
    plain = [float((c.prepare()().double() - vector / scale).abs().max()) for c in contestants if c.kind == "baseline"]
    title = f"{name} critic of pairs, batch {shape[-1]}, {'with' if penalised else 'without'} R1"
    figures = {"repeats": 21, "device": device, "notes": {"keeps_freed_memory": True}}
    tolerance = max(TOLERANCE, 2 * max(plain))
    return Case(title, lambda: vector / scale, tolerance, with_captured(contestants, device, grad=True), shape[-1], **figures)


def cases(device):
    """Every shape, with the penalty and without."""
    return {
        f"{name}, {'r1' if penalised else 'plain'}": functools.partial(case, name, penalised, device)
        for name in SHAPES
        for penalised in (True, False)
    }


if __name__ == "__main__":
    keep_freed_memory()
    main({}, "bench_pair_critic", cases, PARITY_TESTS)
