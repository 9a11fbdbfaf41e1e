"""The fused student as its users meet it: plans that are searched, kept, printed and saved; streaming; a quick start."""

import json
import logging
import subprocess
import sys

import pytest
import torch

from advkd import FusedStudent, Student
from advkd import plan as planning
from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import backends
from advkd.ops.conv_block import ALGORITHMS

from ..conftest import process_environment, tiny_student

CPU = pytest.mark.skipif(backends.extension_gap("cpu") is not None, reason="the cpu extension is not built")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADVKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    # The second time nothing is measured, by another number of threads neither; bfloat16 has layers of its own.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert tiny_student().fuse("cpu").config.algorithms == first.config.algorithms
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == len(distinct)
    tiny_student().fuse("cpu", torch.bfloat16)
    assert len(measured) == 2 * len(distinct) and len(stored(cache)[1]["algorithms"]) == 2 * len(distinct)
    # Kept choices are what is used, a senseless one is measured anew.
    key = planning._key(first.layers[2], torch.float32)
    for word, expected in (("direct", "direct"), ("winograd9", None), (["direct"], None)):
        path.write_text(json.dumps({**kept, "algorithms": {**kept["algorithms"], key: word}}))
        algorithm = tiny_student().fuse("cpu").config.algorithms[2]
        assert algorithm == expected or expected is None and algorithm in ALGORITHMS


@CPU
@pytest.mark.parametrize("content", ["{", "[]", '{"version": 0, "algorithms": {}}', '{"version": 1, "algorithms": 3}'])
def test_a_damaged_cache_is_measured_anew(cache, content):
    tiny_student().fuse("cpu")
    path, kept = stored(cache)
    path.write_text(content)
    tiny_student().fuse("cpu")
    assert set(stored(cache)[1]["algorithms"]) == set(kept["algorithms"])


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
    for wrong in ({"n": 1, "batch_size": 0}, {"n": -1}):
        for draw in (fused.stream, fused.sample, tiny_student().sample):
            with pytest.raises(InputError, match="batch_size"):
                draw(**wrong)


@CPU
def test_streaming_takes_bounded_memory():
    """Ten thousand digits in a process of their own: it grows by some slack of the allocator, not by 41 MB of images."""
    code = (
        "import re, advkd\n"
        "fused = advkd.Student.from_pretrained('digits').fuse('cpu', tune=False)\n"
        # Not getrusage's peak: a child begins with its parent's.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "print(sum(len(i) for i in fused.stream(512, batch_size=256)), peak())\n"
        "print(sum(len(i) for i in fused.stream(10_000, batch_size=256)), peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True, check=True)
    few, before, many, after = map(int, done.stdout.split())
    assert (few, many) == (512, 10_000) and after - before <= 20


@CPU
def test_bfloat16_keeps_the_digits():
    """At least 40 dB against float32."""
    student = Student.from_pretrained("digits")
    single, narrow = student.fuse("cpu"), student.fuse("cpu", torch.bfloat16)
    z = single.latents(64, seed=1)
    error = single(z).double() - narrow(z).double()
    assert 10 * torch.log10(4 / error.square().mean()) >= 40


def test_a_first_image_needs_no_search_and_no_compiler():
    """From the import on: nothing that the image does not need is imported or started."""
    code = (
        "import sys, torch; import advkd; f = advkd.Student.from_pretrained('digits').fuse(tune=False); f.sample(1);"
        "print([m for m in sys.modules if m.startswith(('torch._inductor', 'torch._dynamo', 'diffusers'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
