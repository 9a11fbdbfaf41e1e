"""The fused student on a GPU's engine: plans that are measured and kept, streaming, memory that runs out, graphs.

Without a GPU its kernels are plain PyTorch (the fixture ``on_gpu_kernels``); what needs a device is marked.
"""

import copy
import json
import logging
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from advkd import FusedStudent, Student
from advkd.data.pictures import to_pil, to_uint8
from advkd.engines import gpu_search
from advkd.engines.base import Options
from advkd.engines.gpu import GRAPHS, GpuEngine
from advkd.engines.gpu_search import Limits
from advkd.engines.reference import ReferenceEngine
from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import registry
from advkd.runtime import extension

from ..conftest import ROOT, conditional_student, process_environment, run_cli, tiny_student
from .test_student_gpu import launchers  # noqa: F401

GPU = pytest.mark.gpu
ENGINES = [pytest.param(b, d, marks=GPU, id=f"{b}-{d}") for b in ("cuda", "triton") for d in (torch.float32, torch.bfloat16)]


@pytest.fixture
def on_gpu_kernels(launchers, monkeypatch):  # noqa: F811
    """Both GPU backends "can run" on the CPU, one launch per layer; yields the launchers' record."""
    gap = registry.gap
    monkeypatch.setattr(registry, "gap", lambda name, b, device: None if name == "student_forward" else gap(name, b, device))
    monkeypatch.setattr(gpu_search, "_triton_configs", lambda engine, layer, n, tune: [(1,), (2,)] if tune else [(1,)])
    monkeypatch.setattr(
        gpu_search, "_pair_fits", lambda engine, i: not any(engine.layers[i + 1].__dict__[k] for k in ("upsample", "detail"))
    )
    monkeypatch.setattr(gpu_search, "_stems", lambda engine, n: [])
    registry._choose.cache_clear()
    yield launchers
    registry._choose.cache_clear()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_images_of_an_engine(backend, on_gpu_kernels):
    student = tiny_student()
    fused = student.fuse(backend, tune=False)
    wanted = student.eval().sample(5, seed=3)
    assert fused.backend == backend and (fused.sample(5, seed=3, batch_size=2) - wanted).abs().max() < 1e-2
    kinds = {name.split()[0] for name in on_gpu_kernels.started}
    assert kinds == ({"triton_conv", "triton_image"} if backend == "triton" else {"pair", "conv", "image"} & kinds) and kinds
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(fused.latents(2)), fused(fused.latents(2)))
    with pytest.raises(InputError, match=r"z must have shape \(N, "):
        fused(torch.zeros(2, 3))
    assert fused(torch.zeros(0, fused.latent_numel)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_images_of_classes(backend, on_gpu_kernels):
    """The class and the detail noise together, against float64; batches, streams and copies are told the same classes."""
    student = conditional_student()
    fused, z, labels = student.fuse(backend, tune=False), student.latents(5, seed=3), torch.tensor([2, 0, 0, 1, 2])
    wanted = copy.deepcopy(student).double()(z.double(), labels=labels)
    images = fused(z, labels)
    assert fused.backend == backend and on_gpu_kernels.started and (images - wanted).abs().max() < 1e-2
    assert torch.equal(pickle.loads(pickle.dumps(fused))(z, labels), images)
    whole = student.sample(5, seed=3, start=4, labels=[0, 2])
    assert (fused.sample(5, seed=3, start=4, batch_size=2, labels=[0, 2]) - whole).abs().max() < 1e-2
    with pytest.raises(InputError, match=r"z must have shape \(N, 768\)"):
        fused(torch.zeros(2, 3), labels[:2])
    assert fused(z[:0], labels[:0]).shape == (0, 3, 16, 16)


INTERPRETED = """
import torch
from tests.conftest import conditional_student, tiny_student
student = tiny_student().eval()
wanted = student.sample(3, seed=1)
for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
    fused = student.fuse("triton", dtype)
    print(fused.backend, dtype, bool((fused.sample(3, seed=1) - wanted).abs().max() < bound))
    print(str(fused.plan()).splitlines()[-1].split()[0])
student = conditional_student()
fused = student.fuse("triton")
print(fused.backend, bool((fused.sample(3, seed=1) - student.sample(3, seed=1)).abs().max() < 1e-5))
"""


def test_students_in_tritons_interpreter():
    environment = process_environment({"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, cwd=ROOT, capture_output=True, text=True)
    names = ("float32", "float16", "bfloat16")
    wanted = [line for n in names for line in (f"triton torch.{n} True", "all")]
    assert done.stdout.splitlines() == [*wanted, "triton True"], done.stderr[-2000:]


def test_saved_engines_load_on_gpu_kernels(on_gpu_kernels, tmp_path):
    fused = tiny_student().fuse("reference")
    fused.save_pretrained(tmp_path)
    loaded = FusedStudent.from_pretrained(tmp_path, backend="triton")
    assert loaded.backend == "triton" and loaded.engine.candidates == ("triton",)
    assert (loaded.sample(2) - fused.sample(2)).abs().max() < 1e-2
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16 or float16 for backend 'cuda'"):
        tiny_student().fuse("cuda", torch.float64)


def test_an_engine_belongs_to_its_weights(on_gpu_kernels, monkeypatch):
    """New weights or another backend replace the engine or drop it."""
    fused = tiny_student().fuse("cuda", tune=False)
    before = fused.sample(2)
    fused.load_state_dict(tiny_student(1).fuse("cuda", tune=False).state_dict())
    assert not torch.equal(fused.sample(2), before)
    fused.backend = "reference"
    assert isinstance(fused._prepare().engine, ReferenceEngine)
    with pytest.raises(InputError, match="not 'reference'"):
        fused.plan()
    fused = tiny_student().fuse("cuda", tune=False)
    with pytest.raises(InputError, match="z must be a float32, bfloat16, float16 or float64 tensor, got torch.int64"):
        fused(torch.zeros(2, fused.latent_numel, dtype=torch.int64))
    with pytest.raises(InputError, match="z must be on cpu, got meta"):
        fused(torch.zeros(2, fused.latent_numel, device="meta"))


def test_what_is_left_of_a_run_takes_the_larger_batchs_graph(on_gpu_kernels):
    engine = tiny_student().fuse("cuda", tune=False).engine
    assert engine.batch_of(5) == 5
    engine._graphs |= {64: None, 16: None}
    assert (engine.batch_of(5), engine.batch_of(5), engine.batch_of(64), engine.batch_of(65)) == (16, 5, 64, 65)


def test_float32_follows_torchs_switch(on_gpu_kernels, monkeypatch):
    for allowed, precision in ((True, "tf32"), (False, "tf32x3")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        on_gpu_kernels.started.clear()
        tiny_student().fuse("triton", tune=False).sample(1)
        assert on_gpu_kernels.started and all(name.endswith(precision) for name in on_gpu_kernels.started)


def test_streams_of_pictures():
    fused = tiny_student().fuse("reference")
    images = fused.sample(5, seed=1)
    pictures = list(fused.stream(5, seed=1, batch_size=2, dtype=torch.uint8))
    assert [len(p) for p in pictures] == [2, 2, 1] and pictures[0].shape[1:] == (8, 8, 1)
    assert torch.equal(torch.cat(pictures), to_uint8(images))
    assert to_pil(pictures[2])[0].tobytes() == to_pil(images[4:])[0].tobytes()
    with pytest.raises(InputError, match="dtype must be one of torch.float32, torch.uint8"):
        fused.stream(1, dtype=torch.int32)


class Small:
    """A device with memory for ``most`` images."""

    def __init__(self, fused, most):
        self.fused, self.most, self.asked = fused, most, []

    def __call__(self, z):
        self.asked.append(len(z))
        if len(z) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return FusedStudent.forward(self.fused, z)


def test_a_batch_too_large_is_halved_once(monkeypatch):
    fused = tiny_student().fuse("reference")
    wanted = fused.sample(11, seed=2)
    monkeypatch.setattr(fused, "forward", small := Small(fused, 4))
    with pytest.warns(UserWarning, match="out of memory with batches of 7 images: going on with 4"):
        assert torch.equal(fused.sample(11, seed=2, batch_size=7), wanted)
    assert small.asked == [7, 4, 3, 4]
    small.asked.clear()
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match="5 images of 8x8 do not fit.*lower batch_size"):
        fused.sample(11, batch_size=10)
    assert small.asked == [10, 5]
    small.most = 0
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError, match="1 images of 8x8 do not fit"):
        warnings.simplefilter("error")
        fused.sample(11, batch_size=1)


def measured(monkeypatch, costs):
    """Replace a device's times by ``costs`` per kernel; returns the list of measured steps."""
    asked = []

    def seconds(engine, step, n):
        asked.append((step, n))
        return costs[gpu_search._named(step)] * step.count

    monkeypatch.setattr(gpu_search, "step_seconds", seconds)
    return asked


COSTS = {
    **{"conv": 4e-6, "image": 2e-6, "pair": 5e-6},
    **{"triton_conv 1": 3e-6, "triton_conv 2": 6e-6, "triton_image 1": 9e-6, "triton_image 2": 9e-6},
}


def plan_of(fused, n):
    return gpu_search.measured_steps(fused.engine, n)


def test_a_measured_plan_mixes_backends_and_is_kept(on_gpu_kernels, monkeypatch, cache, caplog):
    asked = measured(monkeypatch, COSTS)
    fused = tiny_student().fuse("auto")
    assert fused.backend == "cuda"
    assert fused.engine.candidates == ("cuda", "triton")
    with caplog.at_level(logging.WARNING):
        steps = plan_of(fused, 4)
    assert [s.kernel for s in steps] == ["triton_conv"] * 8 + ["image"] and {s.config for s in steps[:-1]} == {(1,)}
    assert len(caplog.records) == 1 and str(cache) in caplog.text
    (path,) = (cache / "plans").iterdir()
    kept = json.loads(path.read_text())
    keys = {gpu_search._key(fused.engine, step, n) for step, n in asked}
    assert set(kept["seconds"]) == keys and len(asked) == len(keys), "equal layers are measured once"
    count = len(asked)
    assert plan_of(tiny_student(1).fuse("cuda"), 4) and len(asked) == count, "other weights, the same shapes"
    plan_of(fused, 5)
    assert len(asked) == 2 * count, "another batch"
    # A file that is damaged or of another version is measured anew; one that cannot be written costs a warning.
    for text in (
        "{",
        json.dumps({**kept, "version": 0}),
        json.dumps({**kept, "torch": "1"}),
        json.dumps({**kept, "seconds": 3}),
    ):
        path.write_text(text)
        asked.clear()
        plan_of(fused, 4)
        assert len(asked) == count
    plans = cache / "plans"
    for file in plans.iterdir():
        file.unlink()
    plans.rmdir()
    plans.touch()
    with caplog.at_level(logging.WARNING):
        assert plan_of(fused, 4) == steps and "not kept" in caplog.text


def test_a_kernel_that_does_not_run_is_passed_over(on_gpu_kernels, monkeypatch, cache, caplog):
    measured(monkeypatch, {**COSTS, "pair": 1e-6})
    seconds = gpu_search.step_seconds

    def failing(engine, step, n):
        if step.kernel == "pair":
            raise RuntimeError("out of resource: shared memory")
        return seconds(engine, step, n)

    monkeypatch.setattr(gpu_search, "step_seconds", failing)
    fused = tiny_student().fuse("cuda")
    with caplog.at_level(logging.WARNING):
        steps = plan_of(fused, 4)
    assert {s.kernel for s in steps} == {"conv", "image"} and "is passed over: " in caplog.text
    (path,) = (cache / "plans").iterdir()
    assert not [key for key in json.loads(path.read_text())["seconds"] if key.startswith("pair")]


def test_plans_are_shown(on_gpu_kernels):
    fused = tiny_student().fuse("cuda", tune=False)
    plan = fused.plan(batch_size=3)
    text = str(plan)
    fused.sample(3)
    assert plan.batch_size == 3 and "batch 3" in text and "pair" in text and text.count("\n") == len(plan.rows) + 2
    by_hand = 3 * sum((16 if i.upsample else 9) * i.c_in * i.c_out * i.height * i.width for i in fused.layers)
    assert sum(row.products for row in plan.rows) == by_hand
    memory = fused.memory(3)
    assert memory["weights"] > 0 and memory["workspace"] > 0 and memory["folded"] > 0


@pytest.mark.parametrize("preset", ["paper-256", "pyramid-256", "digits"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("n", [1, 64])
def test_fixed_plans_of_the_presets(preset, capability, n, monkeypatch):
    """The kernels' own predicates leave a way through every preset, with a stem first where there are clusters."""
    limits = Limits(132 if capability == (9, 0) else 108, (227 if capability == (9, 0) else 163) * 1024, capability)
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: limits))
    student = Student.from_preset(preset).eval()
    for dtype in (torch.bfloat16, torch.float32):
        fused = student.fuse("reference", dtype)
        engine = GpuEngine(fused.layers, fused.engine.weights, fused.engine.biases, 0.2, dtype, Options("cuda"))
        steps = engine.steps(n)
        covered = [i for s in steps for i in range(s.first, s.first + s.count)]
        assert covered == list(range(len(fused.layers)))
        if capability == (9, 0):
            assert steps[0].kernel == "stem" and steps[0].count >= (6 if dtype == torch.bfloat16 else 2)
        else:
            assert all(s.config[0] == 1 for s in steps if s.kernel == "stem"), "clusters need compute capability 9.0"


def test_reasons_for_gaps(monkeypatch):
    """An old GPU, a machine without nvcc, an object for other GPUs: the reason is in the error and in 'advkd info'."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setitem(registry._MISSING, "cuda", lambda device: None)
    assert registry.gap("student_forward", "cuda", device) == "needs compute capability 8.0, this GPU has 7.5"
    assert registry.gap("sampler_step", "cuda", device) is None
    registry._choose.cache_clear()
    with pytest.raises(BackendUnavailableError, match="needs compute capability 8.0, this GPU has 7.5"):
        registry.choose("conv_block", "cuda", device)
    registry._choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension.Path, "glob", lambda self, pattern: [])
    monkeypatch.setattr(extension.shutil, "which", lambda name: None)
    assert "nvcc is not on PATH" in extension.extension_gap.__wrapped__("cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(extension, "_code_error", lambda device: 209)
    assert "built for other GPUs than this one: TORCH_CUDA_ARCH_LIST=7.5" in extension._foreign_code("_cuda.abi3.so")


def test_warmup(tmp_path):
    environment = {"ADVKD_CACHE": str(tmp_path)}
    done = run_cli("warmup", "--batch-sizes", "1,2", "--dtypes", "float32,bfloat16", environment=environment)
    assert done.returncode == 0 and [line.split(":")[0] for line in done.stdout.splitlines()[:4]] == [
        "float32, batch 1",
        "float32, batch 2",
        "bfloat16, batch 1",
        "bfloat16, batch 2",
    ]
    for options, message in (
        (("--batch-sizes", "0"), "--batch-sizes must be in [1, 2^20], got 0"),
        (("--dtypes", "int8"), "--dtypes must be of float32"),
        (("--student", "nothing-here"), "nothing-here"),
    ):
        done = run_cli("warmup", *options, environment=environment)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@GPU
@pytest.mark.parametrize("backend, dtype", ENGINES)
def test_graphs_give_what_launches_give(backend, dtype):
    """One graph per batch size, the oldest of more than eight given up; images are copies, whoever calls next."""
    student = tiny_student().cuda().eval()
    fused = student.fuse(backend, dtype, tune=False)
    z = fused.latents(40, seed=1)
    parts = [z[:n] for n in range(1, GRAPHS + 3)]
    images = [fused(part) for part in parts]
    assert len(fused.engine._graphs) == GRAPHS
    for part, found in zip(parts, images):
        assert torch.equal(found, fused.engine.run(part)) and torch.equal(found, fused(part))
    wanted = copy.deepcopy(student).double()(z.double())
    plain = student.to(dtype)(z.to(dtype))
    # Batch norm is folded before it is rounded: at most twice PyTorch's own error.
    assert (fused(z) - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-5


@GPU
def test_threads_and_streams_share_an_engine():
    """Four threads, other batch sizes, so that one captures while another copies to pinned memory."""
    fused = Student.from_pretrained("digits", "cuda").fuse(tune=False)
    wanted = fused.sample(6, seed=3)

    def work(batch_size):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [fused.sample(6, seed=3, batch_size=batch_size) for _ in range(20)]
        return max((images - wanted).abs().max().item() for images in found)

    with ThreadPoolExecutor(4) as threads:
        assert max(threads.map(work, range(1, 5))) <= 1e-2


@GPU
def test_modes_and_captures_of_the_caller():
    """The first call under inference_mode, the next outside; a caller's own graph only of what has been drawn before.

    A refusal leaves torch's stream and the engine as they were.
    """
    fused = tiny_student().cuda().fuse(tune=False)
    z = fused.latents(5, seed=1)
    with torch.inference_mode():
        first = fused(z).clone()
    assert torch.equal(fused(z), first)
    assert torch.equal(captured(lambda: fused(z)), first)
    before = torch.cuda.current_stream()
    with pytest.raises(InputError, match="draw a batch of 3 images before capturing it"):
        # Something to capture: an empty graph is a warning.
        captured(lambda: (z + 1, fused(z[:3]))[1])
    assert torch.cuda.current_stream() == before and not torch.cuda.is_current_stream_capturing()
    assert torch.equal(fused(z), first)
    # The rest of a run takes the larger batch's graph once, then has its own.
    few = [fused(z[:3]) for _ in range(2)]
    assert torch.equal(captured(lambda: fused(z[:3])), few[1])


@GPU
@pytest.mark.parametrize("backend, dtype", ENGINES)
def test_classes_on_a_gpu(backend, dtype):
    """Streams, calls and a caller's own graph, whose labels may be written to between replays."""
    student = conditional_student().cuda()
    fused, z = student.fuse(backend, dtype, tune=False), student.latents(7, seed=1)
    labels = torch.arange(7, device="cuda") % 3
    wanted = copy.deepcopy(student).double()(z.double(), labels=labels)
    plain = copy.deepcopy(student).to(dtype)(z.to(dtype), labels=labels)
    images = fused(z, labels)
    assert (images - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-5
    assert torch.equal(fused.sample(7, seed=1, batch_size=7), images.float().cpu())
    told, graph = labels.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused(z, told)
    told.copy_(labels.flip(0))
    graph.replay()
    assert torch.equal(found, fused(z, labels.flip(0)))
    with pytest.raises(InputError, match="labels must be in .0, 3., got 0 to 3"):
        fused(z, labels + (labels == 2))


def captured(function):
    """A function's result from the replay of a new graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    graph.replay()
    return result


@GPU
def test_measuring_leaves_the_weights_alone(cache):
    """A tuned engine gives what a fixed plan gives, to rounding."""
    student = tiny_student().cuda().eval()
    z = student.latents(7, seed=1)
    assert (student.fuse(tune=True)(z) - student.fuse(tune=False)(z)).abs().max() < 1e-2


@GPU
@pytest.mark.parametrize("dtype, decibels", [(torch.float32, 60), (torch.float16, 45), (torch.bfloat16, 40)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_digits_on_a_gpu_are_the_digits(backend, dtype, decibels):
    student = Student.from_pretrained("digits")
    wanted = student.fuse("reference").sample(64, seed=5)
    images = student.to("cuda").fuse(backend, dtype, tune=False).sample(64, seed=5)
    assert images.isfinite().all() and 10 * torch.log10(4 / (images - wanted).square().mean()) >= decibels
