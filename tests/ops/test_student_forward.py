"""The whole student as one op against float64, for every backend, dtype and algorithm."""

import copy
import itertools
import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from advkd.errors import InputError
from advkd.models.shape import StudentConfig
from advkd.models.student import Student
from advkd.ops import student_forward
from advkd.ops.conv_layer import ConvLayer, decode, encode, pack
from advkd.runtime.extension import extension_gap

from ..conftest import fork, process_environment

CPU = pytest.mark.skipif(extension_gap("cpu") is not None, reason="the cpu extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=CPU)]
# 64x64: the last layers go image by image; detail noise: latents enter at several layers; 12 and 20 channels: no vector's
# multiple; 4 features: as few as an image's channels, but not an image; classes: 1 + 4 channels of the first layer, and
# detail noise behind them in the latent.
CONFIGS = {
    "small": StudentConfig(32, 1, channels=(24, 20, 20, 12, 12, 12, 4, 12), latent_size=2),
    "large": StudentConfig(64, 3, channels=(16, 32, 32, 24, 24, 16, 16, 16), latent_size=1),
    "detail": StudentConfig(64, 3, channels=(16, 32, 32, 24, 24, 16, 16, 16), latent_size=1, detail_noise=True),
    "classes": StudentConfig(
        32, 1, (24, 20, 20, 12, 12, 12, 4, 12), latent_size=1, detail_noise=True, classes=("A", "b", "7"), class_channels=4
    ),
}


def a_student(name):
    """Weights like trained ones: batch-norm statistics come from the student's own activations."""
    torch.manual_seed(0)
    student = Student(CONFIGS[name]).train()
    with torch.no_grad():
        for seed in range(3):
            z = student.latents(8, seed)
            student(z, **labels_of(student, z))
    return student.eval()


def labels_of(student, z):
    """A call's labels, which differ between neighbours and between batches; none without classes."""
    return {"labels": (torch.arange(len(z)) ** 2 + 1) % 3} if student.num_classes else {}


@torch.no_grad()
def exact(student, z):
    return copy.deepcopy(student).double()(z.double(), **labels_of(student, z))


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors are full of NaN, which exposes an image that is only partly written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_new_memory_is_poisoned():
    assert torch.empty(100).isnan().all()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend, name):
    """float32 is within 1e-4 of the range whatever the plan (F(6x6) everywhere is the worst).

    bfloat16 keeps 35 dB on random weights, as eager bfloat16 does to within a few decibels (trained digits keep 40:
    tests/system/test_fused_student.py).
    """
    student = a_student(name)
    z = student.latents(5, seed=1)
    wanted = exact(student, z)
    for dtype in (torch.float32, torch.bfloat16):
        fused = student.fuse(backend, dtype, tune=False)
        plans = [fused.config.algorithms]
        if backend == "cpu":
            plans += [tuple(at.algorithms()[min(i, len(at.algorithms()) - 1)] for at in fused.layers) for i in range(4)]
        for algorithms in plans:
            fused.config.algorithms = algorithms
            images = fused._prepare()(z, **labels_of(student, z))
            assert images.dtype == dtype and images.is_contiguous()
            error = images.double() - wanted
            if dtype == torch.float32:
                assert error.abs().max() <= 1e-4 * (wanted.max() - wanted.min()), algorithms
            else:
                assert 10 * torch.log10(4 / error.square().mean()) >= 35, algorithms


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_depend_on_neither_batch_nor_threads(name, dtype):
    fused = a_student(name).fuse("cpu", dtype, tune=False)
    z, threads = fused.latents(33, seed=2), torch.get_num_threads()
    labels, found = labels_of(fused, z).get("labels"), []

    def drawn(size):
        told = labels.split(size) if labels is not None else itertools.repeat(None)
        return torch.cat([fused(part, labels) for part, labels in zip(z.split(size), told)])

    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found += [drawn(size) for size in (33, 7, 1)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(images, found[0]) for images in found)


@CPU
def test_threads_may_share_an_engine():
    """Four threads, two engines, different batch sizes: each gets the images that a single thread gets."""
    engines = [a_student(name).fuse("cpu", tune=False) for name in ("large", "small")]
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
    small, large = (a_student(name).fuse("cpu", tune=False) for name in ("small", "detail"))
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
    packed = fused.engine.packed if backend == "cpu" else []
    arguments = (z, weights, biases, packed, numbers, [], 0.2, backend)
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
    count = range(len(fused.layers))
    weights, biases = ([getattr(fused, f"{kind}{i}") for i in count] for kind in ("weight", "bias"))
    options = {"slope": 0.2, "dtype": torch.float32, "backend": "cpu"}
    # Plain weights are packed on the fly.
    z = fused.latents(2)
    assert torch.equal(student_forward(z, weights, biases, fused.layers, **options), fused(z))
    with pytest.raises(InputError, match="as many algorithms and packed weights"):
        student_forward(z, weights, biases, fused.layers, **options, algorithms=["direct"])
    with pytest.raises(InputError, match="weights and biases 0 must be"):
        student_forward(z, weights[::-1], biases, fused.layers, **options)
    for i, detail in ((0, 3), (2, -1), (2, 24)):
        layers = [replace(layer, detail=detail) if i == k else layer for k, layer in enumerate(fused.layers)]
        with pytest.raises(InputError, match=f"layer {i}: detail"):
            student_forward(z, weights, biases, layers, **options)
    with pytest.raises(InputError, match="algorithms must name one for each of the 17"):
        replace(fused.config, algorithms=("direct",))
    with pytest.raises(InputError, match="convolution 0 takes direct, winograd2, winograd4, not 'winograd6'"):
        replace(fused.config, algorithms=("winograd6",) * 17)
    # The op's own launcher, which is called without the public function's checks.
    numbers, own = encode(fused.layers, torch.float32, fused.config.algorithms), fused.engine.packed
    op = torch.ops.advkd_cpu.student_forward
    z = fused.latents(1)
    for packed, layers in (
        (own[:-1], numbers),
        (own[::-1], numbers),
        (own, numbers[:-1]),
        (own[:-1], numbers[:-9]),
        (own, [*numbers[:9], 7, *numbers[10:]]),
        (own, [*numbers[:7], 9, *numbers[8:]]),
        (own, [0, *numbers[1:]]),
        (own, [*numbers[:8], 3, *numbers[9:]]),
        (own, [*numbers[:17], -4, *numbers[18:]]),
        ([own[0] + 1, *own[1:]], numbers),
    ):
        with pytest.raises(RuntimeError):
            op(z, packed, layers, 0.2)
    with pytest.raises(RuntimeError):
        op(z[:, 1:], own, numbers, 0.2)


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["paper-256", "pyramid-256"])
def test_memory_is_bounded(name, dtype, two_threads):
    """On two threads the workspace at batch 1 is within 1.5 times the two largest activations, and does not grow with n."""
    fused = Student.from_preset(name).fuse("cpu", dtype, tune=False)
    two = 2 * dtype.itemsize * 256 * 256 * fused.config.channels[-1]
    assert fused.memory(1)["workspace"] <= 1.5 * two
    assert fused.memory(10_000) == fused.memory(1000)
    assert fused.memory(1000)["workspace"] <= 1.5 * two + 12 * 2**20


@CPU
def test_memory_is_what_a_process_takes(two_threads):
    """A first image's peak above the loaded engine, as the system counts it, is little more than the workspace."""
    code = """
import re, torch, advkd
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(2)
fused = advkd.Student.from_preset("pyramid-256").eval().fuse("cpu", tune=False)
small = advkd.Student.from_preset("digits").eval().fuse("cpu", tune=False)
small.sample(1)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
fused.sample(1)
print(memory("VmHWM") - before, fused.memory(1)["workspace"])
"""
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True, check=True)
    taken, said = map(int, done.stdout.split())
    # The image, its float32 copy and the latent; the other engine's workspace existed before.
    assert 0.5 * said <= taken <= said + 6 * 2**20


@CPU
def test_an_engine_can_be_copied_moved_and_loaded():
    fused = a_student("small").fuse("cpu", tune=False)
    z = fused.latents(3)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused).to("cpu").float()):
        assert torch.equal(again(z), fused(z))
    other = a_student("small")
    with torch.no_grad():
        other.head.bias += 1
    again.load_state_dict(other.fuse("cpu", tune=False).state_dict())
    assert torch.equal(again(z), other.fuse("cpu", tune=False)(z)) and not torch.equal(again(z), fused(z))
    with pytest.raises(InputError, match="choose another dtype by student.fuse"):
        fused.half()
    with pytest.raises(InputError, match="not finite"):
        again.load_state_dict({name: value * float("nan") for name, value in fused.state_dict().items()})


@pytest.mark.gpu
def test_an_engine_moves_to_a_gpu_and_back():
    fused = a_student("small").fuse(tune=False)
    z = fused.latents(3)
    moved = copy.deepcopy(fused).to("cuda")
    assert (moved(z.cuda()).cpu() - fused(z)).abs().max() < 1e-4
    assert torch.equal(moved.to("cpu")(z), fused(z))
    assert (a_student("small").cuda().fuse(tune=False)(z.cuda()).cpu() - fused(z)).abs().max() < 1e-4


@CPU
def test_weights_packed_for_another_processor_are_refused(tmp_path):
    """Sixteen channels take as many bytes on every instruction set: only the header distinguishes them."""
    layer = ConvLayer(16, 16, 8, 8)
    weight, bias = torch.randn(16, 16, 3, 3), torch.zeros(16)
    save_file({"packed": pack(weight, bias, layer, torch.float32, "winograd2")}, tmp_path / "packed.safetensors")
    code = (
        "import sys, torch; from advkd.runtime.extension import extension_gap; extension_gap('cpu');"
        "from safetensors.torch import load_file; packed = load_file(sys.argv[1])['packed'];"
        "numbers = [16, 16, 8, 8, 0, 1, 0, 2, 0]; print(torch.ops.advkd_cpu.isa());"
        "torch.ops.advkd_cpu.conv_block(torch.zeros(1, 16, 8, 8), packed, numbers, 0.2)"
    )
    command = ["-c", code, tmp_path / "packed.safetensors"]
    isa = torch.ops.advkd_cpu.isa()
    other = "avx2" if isa == "baseline" else "baseline"
    for name in (isa, other):
        done = fork(*command, environment={"ADVKD_ISA": name}).finish(60)
        # A processor that lacks the other set takes its own.
        works = done.stdout.split() == [isa]
        assert works or name == other, done.stderr
        assert (done.returncode == 0) == works and (works or "of another processor" in done.stderr)
    done = fork(*command, environment={"ADVKD_ISA": "avx-2"}).finish(60)
    assert done.returncode != 0 and "ADVKD_ISA must be baseline" in done.stderr
