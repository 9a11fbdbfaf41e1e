"""The fused student in use: plans that are searched, kept, printed and saved; streaming; a quick start."""

import copy
import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from advkd import FusedStudent, Student
from advkd.engines import cpu as planning
from advkd.engines import gpu_search, kept
from advkd.engines.cpu import CpuEngine
from advkd.engines.gpu import GpuEngine
from advkd.engines.reference import ReferenceEngine
from advkd.errors import BackendUnavailableError, InputError
from advkd.ops.conv_layer import ALGORITHMS
from advkd.runtime.extension import extension_gap

from ..conftest import fork, process_environment, tiny_student

CPU = pytest.mark.skipif(extension_gap("cpu") is not None, reason="the cpu extension is not built")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


DEEP = "[" * 300 + "]" * 300
DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "\udcff\udcfe",
    "version https://git-lfs.github.com/spec/v1\n",
    "[" * 100_000,
    '{"version": ' + "9" * 5000 + "}",
    '{"version": {"version": 1}, "algorithms": {"a": 1}, "torch": [], "triton": 0, "seconds": {"a": 1.0}}',
]
"""Damaged cache files: empty, no JSON, no object, no text, a pointer, deeply nested, endless numbers, other types."""


def stored(cache):
    (path,) = (cache / "plans").iterdir()
    return path, json.loads(path.read_text())


@CPU
def test_a_search_is_kept_by_layer_and_processor(cache, monkeypatch):
    measured = []
    fastest = planning._fastest
    monkeypatch.setattr(planning, "_fastest", lambda layer, dtype: measured.append(layer) or fastest(layer, dtype))
    first = tiny_student().fuse("cpu")
    path, kept = stored(cache)
    distinct = {layer for layer in first.layers if len(layer.algorithms()) > 1}
    assert set(measured) == distinct and len(measured) == len(kept["algorithms"]) == len(distinct)
    isa = torch.ops.advkd_cpu.isa()
    assert all(key.endswith(f"float32, {isa}") for key in kept["algorithms"])
    # The second time nothing is measured, nor with another number of threads; bfloat16 has entries of its own.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert tiny_student().fuse("cpu").config.algorithms == first.config.algorithms
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == len(distinct)
    tiny_student().fuse("cpu", torch.bfloat16)
    assert len(measured) == 2 * len(distinct) and len(stored(cache)[1]["algorithms"]) == 2 * len(distinct)
    # Kept choices are used; an invalid one is measured anew.
    key = planning._key(first.layers[2], torch.float32)
    for word, expected in (("direct", "direct"), ("winograd9", None), (["direct"], None)):
        path.write_text(json.dumps({**kept, "algorithms": {**kept["algorithms"], key: word}}))
        algorithm = tiny_student().fuse("cpu").config.algorithms[2]
        assert algorithm == expected or expected is None and algorithm in ALGORITHMS


@CPU
@pytest.mark.parametrize(
    "content",
    [
        *DAMAGED,
        '{"version": 0, "algorithms": {}}',
        '{"version": 1, "algorithms": 3}',
        '{"version": 1, "algorithms": {"b": 1e400, "c": "winograd9", "d": null, "e": true, "a": ' + DEEP + "}}",
    ],
)
def test_a_damaged_cache_is_measured_anew(cache, content):
    tiny_student().fuse("cpu")
    path, kept = stored(cache)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    fused = tiny_student().fuse("cpu")
    assert set(stored(cache)[1]["algorithms"]) == set(kept["algorithms"])
    assert all(name in layer.algorithms() for name, layer in zip(fused.config.algorithms, fused.layers, strict=True))


@CPU
def test_a_pipe_in_the_place_of_the_cache_is_not_read(cache):
    """Reading it would block forever."""
    fused = tiny_student().fuse("cpu")
    path, _ = stored(cache)
    path.unlink()
    os.mkfifo(path)
    assert len(tiny_student().fuse("cpu").config.algorithms) == len(fused.layers)


@CPU
@pytest.mark.parametrize("name", ["write_json", "cache_folder"])
def test_a_cache_that_refuses_does_not_stop_a_run(monkeypatch, caplog, cache, name):
    """A read-only file system, or a folder that belongs to another user."""

    def refuse(*arguments):
        raise OSError(30, "Read-only file system") if name == "write_json" else InputError("others may write to it")

    monkeypatch.setattr(kept, name, refuse)
    with caplog.at_level(logging.WARNING):
        fused = tiny_student().fuse("cpu")
    assert len(fused.config.algorithms) == len(fused.layers) and "kept" in caplog.text and not cache.exists()


TIMES = {"conv, tf32, batch 1: 3": 1e-5, "pair, tf32, batch 1: 3": 2.5e-6}


@pytest.fixture
def kept_times(cache, monkeypatch):
    """A device's file of measured times, and a way to read it."""
    monkeypatch.setattr(gpu_search, "step_seconds", lambda engine, step, n: 1e-3)
    times = kept.kept_times(torch.device("cpu"))
    for key, seconds in TIMES.items():
        times.add(key, seconds)
    times.keep()
    return times.path, lambda: kept.kept_times(torch.device("cpu"))


def test_a_gpus_times_are_kept(kept_times):
    path, read = kept_times
    assert path.exists() and read().known == TIMES


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_times_are_measured_anew(kept_times, content):
    path, read = kept_times
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    times = read()
    assert times.known == {}
    assert gpu_search.known_seconds(times, "conv", None, None, 1) == 1e-3
    times.keep()
    assert read().known == {"conv": 1e-3}


@pytest.mark.parametrize("value", ["1e400", "1e308", "-1e-5", "0.0", "NaN", "true", "7", '"1e-9"', "null", "[1e-9]", DEEP])
def test_a_time_that_was_not_measured_is_left_out(kept_times, value):
    path, read = kept_times
    text = path.read_text()
    assert "1e-05" in text
    path.write_text(text.replace("1e-05", value))
    times = read()
    assert times.known == {name: seconds for name, seconds in TIMES.items() if seconds == 2.5e-6}
    # Times that were left out are not written back.
    gpu_search.known_seconds(times, "conv", None, None, 1)
    times.keep()
    assert set(json.loads(path.read_text())["seconds"]) == {"conv", "pair, tf32, batch 1: 3"}


@pytest.mark.parametrize("name", ["write_json", "kept_file"])
def test_times_that_cannot_be_kept_do_not_stop_a_run(kept_times, monkeypatch, caplog, name):
    def refuse(*arguments):
        if name == "write_json":
            raise OSError(30, "Read-only file system")

    monkeypatch.setattr(kept, name, refuse)
    with caplog.at_level(logging.WARNING):
        times = kept.kept_times(torch.device("cpu"))
        assert gpu_search.known_seconds(times, "conv", None, None, 1) == 1e-3
        times.keep()
    assert ("not kept" if name == "write_json" else "in memory") in caplog.text


@CPU
def test_without_a_cache_folder_the_plan_is_still_used(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        fused = tiny_student().fuse("cpu")
    assert len(fused.config.algorithms) == len(fused.layers) and "not kept" in caplog.text


@CPU
def test_defaults_measure_nothing(cache, monkeypatch):
    monkeypatch.setattr(planning, "_fastest", None)
    fused = tiny_student().fuse("cpu", tune=False)
    assert fused.config.algorithms == tuple(layer.default(torch.float32) for layer in fused.layers) and not cache.exists()


@CPU
def test_the_plan_shows_every_layer(cache):
    fused = Student.from_pretrained("digits").fuse("cpu")
    plan = fused.plan()
    assert [row.algorithm for row in plan.rows] == list(fused.config.algorithms)
    for row in plan.rows:
        layer = row.layer
        pixels = layer.height * layer.width * (4 if layer.upsample else 1)
        assert row.direct_products == 9 * layer.c_in * layer.c_out * pixels
        tiles = {"winograd2": 16 / 4, "winograd4": 36 / 16, "winograd6": 64 / 36, "direct": 9, "dot": 9}
        phases = {"winograd2": 9 / 4, "winograd4": 25 / 16, "winograd6": 49 / 36, "direct": 4}
        share = (phases if layer.upsample else tiles)[row.algorithm]
        whole = row.algorithm != "winograd6"
        assert row.products == share * layer.c_in * layer.c_out * pixels if whole else row.products < row.direct_products
        assert 0 < row.predicted and 0 < row.measured
    text = str(plan)
    assert len(text.splitlines()) == len(plan.rows) + 3 and "64 -> 96 at 4x4" in text and "16 -> 1 at 32x32" in text
    assert text.splitlines()[-1].split()[0] == "all" and torch.ops.advkd_cpu.isa() in text
    assert "-" in str(fused.plan(measured=False)).splitlines()[-1]
    with pytest.raises(InputError, match="backends cpu, cuda and triton, not 'reference'"):
        tiny_student().fuse("reference").plan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_engine_is_saved_and_loaded(tmp_path, dtype):
    fused = tiny_student().to(torch.promote_types(dtype, torch.float32)).fuse(dtype=dtype)
    fused.save_pretrained(tmp_path / "engine")
    assert sorted(p.name for p in (tmp_path / "engine").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = FusedStudent.from_pretrained(tmp_path / "engine")
    z = fused.latents(3)
    assert again.config == fused.config and again.backend == fused.backend and torch.equal(again(z), fused(z))
    with pytest.raises(InputError, match="holds a FusedStudent, not a Student"):
        Student.from_pretrained(tmp_path / "engine")
    path = tmp_path / "engine" / "config.json"
    config = json.loads(path.read_text())
    for key, value, message in (
        ("algorithms", ["fast"], "algorithms must name one"),
        ("dtype", "int8", "dtype must be one of"),
    ):
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=message):
            FusedStudent.from_pretrained(tmp_path / "engine")
    path.write_text(json.dumps(config))
    if dtype == torch.float64:
        with pytest.raises(InputError, match="dtype must be float32 or bfloat16"):
            FusedStudent.from_pretrained(tmp_path / "engine", backend="cpu")
    with pytest.raises(BackendUnavailableError):
        FusedStudent.from_pretrained(tmp_path / "engine", backend="cuda")


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=CPU)])
def test_a_pickle_of_an_older_version(backend):
    """Such a pickle has an engine's parts in place of the engine."""
    fused = tiny_student().fuse(backend, tune=False)
    state = {**fused.__getstate__(), "_packed": [], "_engine": None}
    del state["engine"]
    again = FusedStudent.__new__(FusedStudent)
    again.__setstate__(state)
    assert torch.equal(again.sample(2), fused.sample(2)) and not {"_packed", "_engine"} & set(vars(again))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=CPU)])
def test_a_fused_student_without_memory(backend):
    """On meta it computes shapes only; back on a device its weights are loaded again."""
    fused = tiny_student().fuse(backend, tune=False)
    wanted, state = fused.sample(2), copy.deepcopy(fused.state_dict())
    z = fused.latents(2)
    images = fused.to("meta")(z.to("meta"))
    assert images.is_meta and images.shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match="z must be on meta like the weights, got cpu"):
        fused(z)
    fused.load_state_dict(state, assign=True)
    assert torch.equal(fused.sample(2), wanted)


@CPU
def test_an_engines_gap_is_the_reason(monkeypatch):
    """A backend asked for by name runs or raises; auto takes the reference."""
    student, cpu = tiny_student(), torch.device("cpu")
    layers = student.fuse("reference").layers
    assert ReferenceEngine.gap(layers, torch.float64, cpu) is CpuEngine.gap(layers, torch.bfloat16, cpu) is None
    assert CpuEngine.gap(layers, torch.float16, cpu) == "computes in float32 or bfloat16, not in torch.float16"
    assert "runs on CPU tensors" in CpuEngine.gap(layers, torch.float32, torch.device("meta"))
    assert GpuEngine.gap(layers, torch.float32, cpu)
    monkeypatch.setattr(CpuEngine, "gap", staticmethod(lambda layers, dtype, device: "no such layers"))
    with pytest.raises(BackendUnavailableError, match="'cpu' cannot run this student on cpu: no such layers"):
        student.fuse("cpu")
    assert student.fuse().backend == "reference"


@CPU
def test_the_backend_can_be_steered(monkeypatch):
    assert tiny_student().fuse(tune=False).backend == "cpu"
    monkeypatch.setenv("ADVKD_BACKEND", "reference")
    assert tiny_student().fuse().backend == "reference" and tiny_student().fuse("cpu").backend == "cpu"
    monkeypatch.delenv("ADVKD_BACKEND")
    assert tiny_student().fuse(dtype=torch.float16).backend == "reference"


def test_streaming_is_sampling():
    fused = tiny_student().fuse()
    whole = fused.sample(10, seed=5, batch_size=4, start=2)
    pieces = list(fused.stream(10, seed=5, batch_size=3, start=2))
    assert [len(piece) for piece in pieces] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(pieces), whole) or fused.backend == "reference"
    for wrong, message in (({"n": 1, "batch_size": 0}, "^batch_size must be at least 1"), ({"n": -1}, "^n must be at least 0")):
        for draw in (fused.stream, fused.sample, tiny_student().sample):
            with pytest.raises(InputError, match=message):
                draw(**wrong)


def test_parts_are_taken_when_they_are_drawn():
    """Parts come from an endless iterator, one at a time."""
    fused, asked = tiny_student().fuse(tune=False), []

    def parts():
        first = 0
        while True:
            asked.append(first)
            yield first, 2
            first += 5

    pieces = fused.draw(parts(), seed=5)
    assert asked == []
    for i in range(3):
        assert torch.equal(next(pieces), fused.sample(2, seed=5, start=5 * i)) and len(asked) == i + 1
    assert len(next(fused.stream(10**15, batch_size=3))) == 3
    assert [len(piece) for piece in fused.draw([(0, 1), (4, 0), (2, 3)])] == [1, 0, 3]
    with pytest.raises(InputError, match="dtype must be"):
        fused.draw(iter([]), dtype=torch.float16)


def test_a_batch_that_does_not_fit_is_halved_once(monkeypatch):
    fused = tiny_student().fuse(tune=False)
    draw, tried, most = fused._draw, [], 4

    def attempt(seed, labels, first, count):
        tried.append((first, count))
        if count > most:
            raise torch.OutOfMemoryError
        return draw(seed, labels, first, count)

    monkeypatch.setattr(fused, "_draw", attempt)
    with pytest.warns(UserWarning, match="out of memory with batches of 7 images: going on with 4"):
        pieces = list(fused.draw(iter([(0, 3), (3, 7), (10, 5)]), seed=5))
    assert tried == [(0, 3), (3, 7), (3, 4), (7, 3), (10, 4), (14, 1)]
    assert (torch.cat(pieces) - fused.sample(15, seed=5, batch_size=4)).abs().max() <= 1e-5
    most = 1
    with pytest.warns(UserWarning, match="going on with 2"), pytest.raises(torch.OutOfMemoryError, match="2 images of 8x8"):
        list(fused.draw([(0, 4)]))


@CPU
def test_streaming_takes_bounded_memory():
    """Eighty megabytes of images in a process of their own: it grows by the allocator's slack, not by the images."""
    code = (
        "import re, advkd\n"
        "config = advkd.StudentConfig(image_size=64, image_channels=3, channels=(4,) * 10, latent_size=2)\n"
        "fused = advkd.Student(config).eval().fuse('cpu', tune=False)\n"
        # Not getrusage's peak: a child begins with its parent's.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "print(sum(len(i) for i in fused.stream(128, batch_size=16)), peak())\n"
        "print(sum(len(i) for i in fused.stream(1700, batch_size=16)), peak())"
    )
    done = fork("-c", code).finish(200)
    few, before, many, after = map(int, done.stdout.split())
    assert (few, many) == (128, 1700) and after - before <= 20, done.stderr


@CPU
def test_bfloat16_keeps_the_digits():
    """The images have at least 40 dB against float32."""
    student = Student.from_pretrained("digits")
    single, narrow = student.fuse("cpu"), student.fuse("cpu", torch.bfloat16)
    z = single.latents(64, seed=1)
    error = single(z).double() - narrow(z).double()
    assert 10 * torch.log10(4 / error.square().mean()) >= 40


def test_a_first_image_needs_no_search_and_no_compiler():
    """Counted from the import: nothing is imported or started that the image does not need."""
    code = (
        "import sys, torch; import advkd; f = advkd.Student.from_pretrained('digits').fuse(tune=False); f.sample(1);"
        "print([m for m in sys.modules if m.startswith(('torch._inductor', 'torch._dynamo', 'diffusers'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
