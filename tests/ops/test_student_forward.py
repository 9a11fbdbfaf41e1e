"""The whole student as one op against float64, for every backend, dtype and algorithm."""

import threading
from dataclasses import replace

import pytest
import torch

from advkd.errors import InputError
from advkd.models.fused_student import FusedStudent
from advkd.models.student import Student, StudentConfig
from advkd.ops import backends, student_forward
from advkd.ops.student_forward import decode, encode

CPU = pytest.mark.skipif(backends.extension_gap("cpu") is not None, reason="the cpu extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=CPU)]
# 64x64: the last layers go image by image; detail noise: latents enter at several layers; 12 and 20 channels: no vector's
# multiple; 4 features: as few as an image's channels, but not an image.
CONFIGS = {
    "small": StudentConfig(32, 1, channels=(24, 20, 20, 12, 12, 12, 4, 12), latent_size=2),
    "large": StudentConfig(64, 3, channels=(16, 32, 32, 24, 24, 16, 16, 16), latent_size=1),
    "detail": StudentConfig(64, 3, channels=(16, 32, 32, 24, 24, 16, 16, 16), latent_size=1, detail_noise=True),
}


def a_student(name):
    """Weights as trained ones are: batch-norm statistics of what the student sees."""
    torch.manual_seed(0)
    student = Student(CONFIGS[name]).train()
    with torch.no_grad():
        for seed in range(3):
            student(student.latents(8, seed))
    return student.eval()


@torch.no_grad()
def exact(student, z):
    import copy

    return copy.deepcopy(student).double()(z.double())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend, name):
    """float32 within 1e-4 of the range whatever the plan (F(6x6) everywhere is the worst); bfloat16 within 40 dB and 0.2."""
    student = a_student(name)
    z = student.latents(5, seed=1)
    wanted = exact(student, z)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        fused = student.fuse(backend, dtype, tune=False)
        plans = [fused.config.algorithms]
        if backend == "cpu":
            plans += [tuple(at.algorithms()[min(i, len(at.algorithms()) - 1)] for at in fused.layers) for i in range(4)]
        for algorithms in plans:
            fused.config.algorithms = algorithms
            images = fused._prepare(torch.device("cpu"))(z)
            assert images.dtype == dtype and images.is_contiguous()
            error = images.double() - wanted
            assert error.abs().max() <= allowed * (wanted.max() - wanted.min()), algorithms
            if dtype == torch.bfloat16:
                assert 10 * torch.log10(4 / error.square().mean()) >= 35, algorithms


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_depend_on_neither_batch_nor_threads(name, dtype):
    fused = a_student(name).fuse("cpu", dtype)
    z, threads = fused.latents(33, seed=2), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found += [torch.cat([fused(part) for part in z.split(size)]) for size in (33, 7, 1)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(images, found[0]) for images in found)


@CPU
def test_threads_may_share_an_engine():
    """Four threads, two engines, other batch sizes: everyone gets the images that one thread alone gets."""
    engines = [a_student("large").fuse("cpu"), a_student("small").fuse("cpu")]
    wanted = [engine.sample(6, seed=3) for engine in engines]
    wrong = []

    def work(engine, images, batch_size):
        for _ in range(20):
            if not torch.equal(engine.sample(6, seed=3, batch_size=batch_size), images):
                wrong.append(batch_size)

    threads = [threading.Thread(target=work, args=(engines[i % 2], wanted[i % 2], 1 + i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@CPU
def test_dirty_memory_does_not_reach_the_image():
    """The pooled workspace holds an earlier call's numbers, NaN among them: an engine of another shape must not see them."""
    small, large = a_student("small").fuse("cpu"), a_student("detail").fuse("cpu")
    z = small.latents(4, seed=1)
    torch.ops.advkd_cpu.clear_workspaces()
    wanted = small(z)
    assert large(torch.full((3, large.latent_numel), float("nan"))).isnan().all()
    assert torch.equal(small(z), wanted)
    assert torch.ops.advkd_cpu.clear_workspaces() > 0 == torch.ops.advkd_cpu.clear_workspaces()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    fused = a_student("small").fuse(backend, dtype, tune=False)
    count = range(len(fused.layers))
    weights, biases = ([getattr(fused, f"{kind}{i}") for i in count] for kind in ("weight", "bias"))
    numbers = encode(fused.layers, dtype if backend == "cpu" else torch.float32, fused.config.algorithms)
    z = fused.latents(2).to(torch.float32 if backend == "cpu" else dtype)
    arguments = (z, weights, biases, list(fused._packed), numbers, 0.2, backend)
    torch.library.opcheck(torch.ops.advkd.student_forward.default, arguments)
    assert decode(numbers) == fused.layers
    narrow = torch.ops.advkd.student_forward(z.requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.autograd.grad(narrow.sum(), [z])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    fused = a_student("small").fuse(backend, tune=False)
    assert fused(fused.latents(0)).shape == (0, 1, 32, 32)


def test_bad_arguments_are_named():
    student = a_student("small")
    fused = student.fuse("reference")
    with pytest.raises(InputError, match=r"z must have shape \(N, 64\), got \(2, 63\)"):
        fused(torch.zeros(2, 63))
    weights = [getattr(fused, f"weight{i}") for i in range(len(fused.layers))]
    with pytest.raises(InputError, match="as many weights"):
        student_forward(fused.latents(1), weights[:-1], weights[:-1], fused.layers, slope=0.2, dtype=torch.float32)
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16"):
        student.fuse("cpu", torch.float16)
    with torch.no_grad():
        student.submodules[1].convolution2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="the weight of convolution 3 holds numbers that are not finite"):
        student.fuse()


@CPU
def test_bad_plans_are_named():
    fused = a_student("small").fuse("cpu", tune=False)
    with pytest.raises(InputError, match="packed weights and an algorithm"):
        count = range(len(fused.layers))
        weights, biases = ([getattr(fused, f"{kind}{i}") for i in count] for kind in ("weight", "bias"))
        student_forward(fused.latents(1), weights, biases, fused.layers, slope=0.2, dtype=torch.float32, backend="cpu")
    with pytest.raises(InputError, match="algorithms must name one for each of the 17"):
        replace(fused.config, algorithms=("direct",))
    with pytest.raises(InputError, match="convolution 0 takes direct, winograd2, winograd4, not 'winograd6'"):
        replace(fused.config, algorithms=("winograd6",) * 17)
    # The op's own launcher, which no public function protects.
    numbers = encode(fused.layers, torch.float32, fused.config.algorithms)
    op = torch.ops.advkd_cpu.student_forward
    z = fused.latents(1)
    for packed, layers in (
        (fused._packed[:-1], numbers),
        (fused._packed[::-1], numbers),
        (fused._packed, numbers[:-1]),
        (fused._packed[:-1], numbers[:-9]),
        (fused._packed, [*numbers[:9], 7, *numbers[10:]]),
        (fused._packed, [*numbers[:7], 9, *numbers[8:]]),
        (fused._packed, [0, *numbers[1:]]),
    ):
        with pytest.raises(RuntimeError):
            op(z, packed, layers, 0.2)
    with pytest.raises(RuntimeError):
        op(z[:, 1:], fused._packed, numbers, 0.2)


@CPU
def test_memory_is_bounded():
    """Workspace at batch 1 within 1.5 times the two largest activations, and no larger for many images than for a group."""
    for name in ("paper-256", "pyramid-256"):
        fused = Student.from_preset(name).fuse("cpu", tune=False)
        two = 2 * 4 * 256 * 256 * fused.config.channels[-1]
        assert fused.memory(1)["workspace"] <= 1.5 * two
        assert fused.memory(10_000) == fused.memory(1000)
        assert fused.memory(1000)["workspace"] <= 1.5 * two + 12 * 2**20
    assert isinstance(fused, FusedStudent)
