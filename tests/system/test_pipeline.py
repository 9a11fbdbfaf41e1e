"""The diffusers pipeline around the student."""

import copy
import json
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from advkd import AdvKDPipeline, Student
from advkd.errors import InputError
from advkd.export import pipeline as pipelines
from advkd.export.images import draw_seed
from advkd.export.pipeline import StudentModel
from advkd.models.batch_norm import CannotFoldError
from advkd.models.student import Submodule

from ..conftest import other_default, tiny_student


@pytest.fixture(scope="module")
def pipe():
    return AdvKDPipeline(tiny_student().eval())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_output_types(pipe):
    pictures = pipe(batch_size=4, generator=seeded(0), output_type="pil").images
    arrays = pipe(batch_size=4, generator=seeded(0), output_type="np").images
    tensors = pipe(batch_size=4, generator=seeded(0), output_type="pt", return_dict=False)[0]
    assert len(pictures) == 4 and pictures[0].size == (8, 8) and pictures[0].mode == "L"
    assert arrays.shape == (4, 8, 8, 1) and tensors.shape == (4, 1, 8, 8)
    assert arrays.min() >= 0 and arrays.max() <= 1
    assert np.array_equal(arrays[..., 0], tensors[:, 0].numpy())
    assert np.abs(np.asarray(pictures[2]) - arrays[2, ..., 0] * 255).max() <= 0.51


def test_generators(pipe):
    a = pipe(batch_size=3, generator=seeded(1), output_type="pt").images
    assert torch.equal(a, pipe(batch_size=3, generator=seeded(1), output_type="pt").images)
    assert not torch.equal(a, pipe(batch_size=3, generator=seeded(2), output_type="pt").images)
    # A smaller batch of the same generator has the same first images; a generator per image fixes each image.
    assert torch.allclose(a[:2], pipe(batch_size=2, generator=seeded(1), output_type="pt").images, atol=1e-6)
    b = pipe(batch_size=2, generator=[seeded(7), seeded(8)], output_type="pt").images
    c = pipe(batch_size=1, generator=[seeded(8)], output_type="pt").images
    assert torch.allclose(b[1], c[0], atol=1e-6)
    again = seeded(1)
    first, second = (pipe(generator=again, output_type="pt").images for _ in range(2))
    assert not torch.equal(first, second)


def test_saving_and_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Intended use" in card and "8x8" in card
    again = AdvKDPipeline.from_pretrained(tmp_path)
    images = [p(batch_size=2, generator=seeded(0), output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*images)
    # The subfolder loads as a student, and so does the pipeline's folder.
    assert Student.from_pretrained(tmp_path).config == Student.from_pretrained(tmp_path / "student").config
    student = Student.from_pretrained(tmp_path / "student")
    assert torch.equal(student(student.latents(1)), pipe.student(student.latents(1)))


def drawn(pipe):
    return pipe(batch_size=2, generator=seeded(0), output_type="pt").images


def altered(student, by=0.5):
    """A copy of a student (or its model) with other weights and statistics."""
    other = copy.deepcopy(student)
    with torch.no_grad():
        for tensor in (*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())):
            tensor.mul_(1 + by).add_(0.01)
    return other


def one_step(optimizer):
    def step(model):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters(), lr=0.1, fused=True).step()

    return step


def through_numpy(model):
    model.submodules[0].convolution1.weight.detach().numpy()[...] *= 0.5


def in_inference_mode(model):
    with torch.inference_mode():
        model.submodules[1].norm2.weight.mul_(0.5)


def by_training(model):
    model.train()
    with torch.no_grad():
        model(model.student.latents(4, seed=5))
    model.eval()


def new_slope(model):
    for block in model.submodules:
        block.slope = 0.6


def swallowed_norm(model):
    block = model.submodules[2]
    block.convolution1, block.norm1 = fuse_conv_bn_eval(altered(block.convolution1), block.norm1), torch.nn.Identity()


def new_head(model):
    model.head = altered(model.head)


def new_submodule(model):
    torch.manual_seed(3)
    model.submodules[1] = Submodule(8, 8, True, 0.2).eval()


def new_parameter(model):
    model.submodules[0].norm1.bias = torch.nn.Parameter(torch.linspace(-1, 1, 8))


def new_epsilon(model):
    model.submodules[0].norm1.eps = 0.5


CHANGES = {
    "EMA": lambda model: EMAModel(altered(model).parameters()).copy_to(model.parameters()),
    "data": lambda model: model.head.weight.data.copy_(altered(model).head.weight),
    "replaced data": lambda model: setattr(model.head.weight, "data", model.head.weight.data * 0.5),
    "AdamW": one_step(torch.optim.AdamW),
    "Adam": one_step(torch.optim.Adam),
    "SGD": one_step(torch.optim.SGD),
    "state": lambda model: model.load_state_dict(altered(model).state_dict()),
    "assigned state": lambda model: model.load_state_dict(altered(model).state_dict(), assign=True),
    "assigned state of the student": lambda model: model.student.load_state_dict(altered(model).state_dict(), assign=True),
    "head": new_head,
    "submodule": new_submodule,
    "parameter": new_parameter,
    "numpy": through_numpy,
    "inference mode": in_inference_mode,
    "training": by_training,
    "epsilon": new_epsilon,
    "slope": new_slope,
    "swallowed norm": swallowed_norm,
    "dtype": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CHANGES)
def test_images_are_those_of_the_weights_that_the_model_has(name, layout):
    pipe = AdvKDPipeline(tiny_student().eval().to(memory_format=layout))
    before = drawn(pipe)
    CHANGES[name](pipe.student)
    found = drawn(pipe)
    fresh = pipe.student.student.fuse(dtype=pipe.student.head.weight.dtype)
    wanted = (fresh(fresh.latents(2, draw_seed(seeded(0)))).float() / 2 + 0.5).clamp(0, 1)
    assert torch.equal(found, wanted)
    assert (before - wanted).abs().max() > (0 if name == "dtype" else 1e-3)


def test_an_engine_is_kept_while_nothing_changes(monkeypatch):
    made = []
    fuse = Student.fuse
    monkeypatch.setattr(Student, "fuse", lambda student, **options: made.append(student) or fuse(student, **options))
    pipe = AdvKDPipeline(tiny_student().eval())
    drawn(pipe)
    pipe.student.load_state_dict(pipe.student.state_dict())
    pipe.student.train().eval()
    pipe.student.terminals[0].weight.data.mul_(2)
    drawn(pipe)
    assert len(made) == 1
    pipe.student.head.bias.data[0] = -pipe.student.head.bias.data[0]  # from 0.0 to -0.0: other bits
    drawn(pipe)
    assert len(made) == 2


def test_weights_that_are_not_numbers_are_seen():
    pipe = AdvKDPipeline(tiny_student().eval())
    before = drawn(pipe)
    kept = pipe.student.submodules[0].norm1.running_mean.clone()
    pipe.student.submodules[0].norm1.running_mean.data.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(InputError, match="not finite"):
            drawn(pipe)
    pipe.student.submodules[0].norm1.running_mean.data.copy_(kept)
    assert torch.equal(drawn(pipe), before)


def test_bits_are_compared_as_on_a_gpu(monkeypatch):
    """One flat copy and one comparison, without addresses."""
    monkeypatch.setattr(pipelines, "_MEMCMP", None)
    tensors = [torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last), torch.full((4,), float("nan")), torch.ones(())]
    bits = pipelines._bits(tensors)
    assert bits.dtype == torch.uint8 and bits.numel() == 4 * (54 + 4 + 1)

    class Elsewhere(torch.Tensor):
        is_cpu = False

    bits = bits.as_subclass(Elsewhere)
    assert pipelines._are_bits(tensors, bits)
    tensors[1].data[2] = 0
    assert not pipelines._are_bits(tensors, bits)


def test_a_picture_in_the_middle_of_training_changes_nothing():
    """Neither the modes of the model's layers nor their statistics nor torch's random numbers."""
    model = StudentModel.from_student(tiny_student()).train()
    model.submodules[0].norm1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    wanted = torch.rand(1)
    drawn(AdvKDPipeline(model))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(7)
    AdvKDPipeline(model.student)
    assert torch.equal(torch.rand(1), wanted)


def test_a_models_forward_keeps_the_modes_of_its_layers():
    model = StudentModel.from_student(tiny_student()).train()
    model.submodules[0].norm1.eval()
    before = model.submodules[0].norm1.running_mean.clone()
    model(model.student.latents(3))
    assert not model.submodules[0].norm1.training and torch.equal(model.submodules[0].norm1.running_mean, before)
    assert model.submodules[0].norm2.num_batches_tracked == 1


def test_a_copy_of_a_model_is_a_model_of_its_own():
    model = StudentModel.from_student(tiny_student().eval())
    z = model.student.latents(2)
    wanted = model(z)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(z), wanted) and torch.equal(other.student(z), wanted)
        new_head(other)
        assert torch.equal(other(z), other.student(z)) and not torch.equal(other(z), wanted)
        assert torch.equal(model(z), wanted)


def test_a_converted_model_is_fused():
    pipe = AdvKDPipeline(tiny_student().eval())
    wanted = drawn(pipe)
    other = AdvKDPipeline(torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(pipe.student)))
    assert isinstance(other.student.submodules[0].norm1, torch.nn.SyncBatchNorm)
    assert (drawn(other) - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("called", [False, True], ids=["called outside", "called inside"])
@pytest.mark.parametrize("loaded", [False, True], ids=["loaded outside", "loaded inside"])
def test_inference_mode(tmp_path, loaded, called):
    AdvKDPipeline(tiny_student().eval()).save_pretrained(tmp_path)
    wanted = drawn(AdvKDPipeline.from_pretrained(tmp_path))
    with torch.inference_mode(loaded):
        pipes = [AdvKDPipeline.from_pretrained(tmp_path), AdvKDPipeline(Student.from_pretrained(tmp_path))]
        pipes.append(AdvKDPipeline(tiny_student().eval()))
        engine = pipes[-1].student.student.fuse(tune=False)
    for pipe in pipes:
        for mode in (called, not called, called):
            with torch.inference_mode(mode):
                assert torch.equal(drawn(pipe), wanted)
    # An engine that was made inside can be written to outside.
    engine.load_state_dict(pipes[0].student.student.fuse(tune=False).state_dict())
    assert not engine.weight0.is_inference()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_torchs_defaults_do_not_change_the_images(pipe, default):
    wanted = drawn(pipe), drawn(AdvKDPipeline(pipe.student.student))
    with other_default(default):
        found = drawn(pipe), drawn(AdvKDPipeline(pipe.student.student))
    assert all(ours.dtype == torch.float32 and torch.equal(ours, right) for ours, right in zip(found, wanted, strict=True))


def test_options_of_diffusers_reach_the_student(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    narrow = AdvKDPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
    assert narrow.student.head.weight.dtype == torch.bfloat16
    assert (drawn(narrow) - drawn(pipe)).abs().max() <= 0.05
    own = altered(pipe.student)
    assert AdvKDPipeline.from_pretrained(str(tmp_path), student=own).student is own
    pipe.save_pretrained(tmp_path / "narrow", variant="fp16")
    assert torch.equal(drawn(AdvKDPipeline.from_pretrained(tmp_path / "narrow", variant="fp16")), drawn(pipe))


def test_a_pipeline_comes_from_the_hub(pipe, tmp_path, monkeypatch):
    """Only the files that a student needs are fetched, with the options of the hub's client."""
    import huggingface_hub

    pipe.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda source, **given: asked.append((source, given)) or tmp_path)
    for options in ({}, {"revision": "main", "token": "hf_x"}):
        assert torch.equal(drawn(AdvKDPipeline.from_pretrained("someone/digits", **options)), drawn(pipe))
        source, given = asked.pop()
        assert source == "someone/digits" and {name: given[name] for name in options} == options
        assert not any(name.endswith((".py", ".bin", "*")) for name in given["allow_patterns"])

    def unreachable(source, **given):
        raise OSError("no such revision")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="no such revision"):
        AdvKDPipeline.from_pretrained("someone/digits", revision="main")


LEAVES_A_TRACE = "import pathlib; pathlib.Path({trace!r}).touch()\nStudentModel = AdvKDPipeline = Spy = None\n"


@pytest.mark.parametrize(
    "change",
    [
        {"student": ["advkd_spy", "Spy"]},
        {"student": ["advkd_spy", "StudentModel"]},
        {"student": [None, None]},
        {"student": ["advkd.export.pipeline", "AdvKDPipeline"]},
        {"helper": ["advkd_spy", "Spy"]},
        {"_class_name": ["advkd_spy", "Spy"]},
    ],
    ids=str,
)
def test_an_index_of_anything_else_is_refused_before_it_is_imported(pipe, tmp_path, monkeypatch, change):
    trace, code, folder = tmp_path / "trace", tmp_path / "code", tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    code.mkdir()
    (code / "advkd_spy.py").write_text(LEAVES_A_TRACE.format(trace=str(trace)))
    monkeypatch.syspath_prepend(str(code))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(InputError, match="model_index.json is of another pipeline"):
        AdvKDPipeline.from_pretrained(folder)
    assert not trace.exists() and "advkd_spy" not in sys.modules
    # The trap works: importing it leaves the trace.
    __import__("advkd_spy")
    del sys.modules["advkd_spy"]
    assert trace.exists()


@pytest.mark.parametrize("name", ["None.py", "student/advkd.pipeline.py"])
def test_code_in_a_pipelines_folder_is_not_run(pipe, tmp_path, monkeypatch, name):
    folder, trace = tmp_path / "pipeline", tmp_path / "trace"
    monkeypatch.setenv("DIFFUSERS_TRUST_REMOTE_CODE", "1")
    pipe.save_pretrained(folder)
    (folder / name).write_text(LEAVES_A_TRACE.format(trace=str(trace)))
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(InputError, match="holds no Python files"):
            AdvKDPipeline.from_pretrained(folder, **options)
    assert not trace.exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (self.trace, "w")


def test_pickles_in_the_place_of_weights_are_not_opened(pipe, tmp_path):
    folder, trace = tmp_path / "pipeline", tmp_path / "trace"
    pipe.save_pretrained(folder)
    weights = folder / "student" / "diffusion_pytorch_model.safetensors"
    pickled = pickle.dumps(Trap(str(trace)))
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        weights.unlink(missing_ok=True)
        (folder / "student" / name).write_bytes(pickled)
        for load in (AdvKDPipeline.from_pretrained, lambda path: StudentModel.from_pretrained(path / "student")):
            with pytest.raises(InputError):
                load(folder)
    assert not trace.exists()
    pickle.loads(pickled).close()
    assert trace.exists()


def test_a_configuration_asks_for_nothing_but_a_student(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "student" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(InputError, match="unknown key 'quantization_config'"):
        AdvKDPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../student.safetensors", "/student.safetensors", "student.bin", 3, None])
def test_an_index_of_weights_stays_in_its_folder(pipe, tmp_path, name):
    pipe.student.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = StudentModel.from_pretrained(tmp_path)
    z = pipe.student.student.latents(2)
    assert torch.equal(again(z), pipe.student(z))
    (path,) = tmp_path.glob("*.index.json")
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "head.bias": name}}))
    with pytest.raises(InputError, match="index of weights"):
        StudentModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("change", ["missing", "additional", "of another shape", "whole numbers"])
def test_weights_of_another_model_are_refused(pipe, tmp_path, change, low_cpu_mem_usage):
    """diffusers alone would draw the missing ones at random."""
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "student" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["submodules.1.norm1.weight"]
    elif change == "whole numbers":
        tensors["head.bias"] = tensors["head.bias"].int()
    else:
        tensors["head.bias" if change == "of another shape" else "foot.bias"] = torch.ones(5)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="the weights in|hold head.bias as I32"):
        AdvKDPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_torchs_defaults_do_not_change_what_is_loaded(pipe, tmp_path, default):
    pipe.save_pretrained(tmp_path)
    torch.set_default_device("meta" if default == "meta" else None)
    torch.set_default_dtype(torch.float32 if default == "meta" else default)
    try:
        loaded, wanted = drawn(AdvKDPipeline.from_pretrained(tmp_path)), drawn(pipe)
        assert torch.get_default_dtype() == (torch.float32 if default == "meta" else default)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert loaded.dtype == torch.float32 and torch.equal(loaded, wanted)


def test_a_model_comes_with_its_report_and_options(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    model, report = StudentModel.from_pretrained(tmp_path, subfolder="student", output_loading_info=True)
    z = model.student.latents(2)
    assert torch.equal(model(z), pipe.student(z)) and not report["missing_keys"]


def test_bad_calls_are_named(pipe):
    with pytest.raises(InputError, match="batch_size"):
        pipe(batch_size=0)
    with pytest.raises(InputError, match="output_type"):
        pipe(output_type="jpeg")
    with pytest.raises(InputError, match="generator"):
        pipe(batch_size=2, generator=[seeded(0)])


def plain_images(pipe, seed=0):
    """The images that the student's own modules draw from a pipeline's noise."""
    modes = {module: module.training for module in pipe.student.student.modules()}
    student = pipe.student.student.eval()
    with torch.no_grad():
        images = student(student.latents(2, draw_seed(seeded(seed)))) / 2 + 0.5
    for module, training in modes.items():
        module.training = training
    return images.clamp(0, 1)


class Adapter(torch.nn.Module):
    """A layer and a learned addition; its weight is the layer's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, torch.nn.Conv2d(base.in_channels, base.out_channels, 3, padding=1)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.extra(x)


class Halved(torch.nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / 2, bias)


def convolved_otherwise(student):
    first = student.submodules[0].convolution1
    plain = first._conv_forward
    return lambda: setattr(first, "_conv_forward", lambda x, weight, bias: plain(x, -weight, bias))


def narrowed(student):
    """One channel taken out between the two convolutions of a block."""
    block = student.submodules[0]
    rest = [slice(None), slice(1, None)]
    layers = {
        "convolution1": (torch.nn.Conv2d(block.convolution1.in_channels, 7, 3, padding=1, bias=False), rest[::-1]),
        "norm1": (torch.nn.BatchNorm2d(7), rest[1:]),
        "convolution2": (torch.nn.Conv2d(7, 8, 3, padding=1, bias=False), rest),
    }

    def change():
        for name, (layer, kept) in layers.items():
            layer.load_state_dict({k: v[tuple(kept)] if v.ndim else v for k, v in getattr(block, name).state_dict().items()})
            setattr(block, name, layer)

    return change


def halved(student):
    return lambda: setattr(student.submodules[0].convolution1, "__class__", Halved)


class Called(Submodule):
    def __call__(self, *arguments):
        return -super().__call__(*arguments)


def called(student):
    return lambda: setattr(student.submodules[0], "__class__", Called)


class Wrapper(torch.nn.Module):
    """A block and what follows it, without the block's attributes."""

    def __init__(self, block):
        super().__init__()
        self.block, self.upsample = block, block.upsample

    def forward(self, *arguments):
        return -self.block(*arguments)


def wrapped(student):
    return lambda: student.submodules.__setitem__(0, Wrapper(student.submodules[0]))


def with_another_head(student):
    return lambda: setattr(student, "head", torch.nn.Sequential(student.head, torch.nn.Tanh()))


def without_activations(student):
    return lambda: [setattr(block, "slope", 1.0) for block in student.submodules]


def up_sampled_elsewhere(student):
    up = [block.upsample for block in student.submodules]
    first, second = up.index(True), up.index(False, 1)
    return lambda: [setattr(student.submodules[i], "upsample", not up[i]) for i in (first, second)]


class Tripled(torch.nn.BatchNorm2d):
    def forward(self, x):
        return 3 * super().forward(x)


def pruned(student):
    prune.l1_unstructured(student.submodules[0].convolution1, "weight", 0.5)
    return lambda: student.submodules[0].convolution1.weight_orig.data.mul_(2)


def normed(student):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(student.submodules[0].convolution1)
    return lambda: student.submodules[0].convolution1.weight_g.data.mul_(2)


def hooked(student):
    return lambda: student.head.register_forward_hook(lambda module, arguments, output: -output)


def hooked_whole(student):
    return lambda: student.register_forward_hook(lambda module, arguments, output: -output)


def replaced(student):
    block = student.submodules[1]
    return lambda: setattr(block, "forward", lambda *arguments: -Submodule.forward(block, *arguments))


class Negative(Student):
    def forward(self, z, levels=None):
        return -super().forward(z, levels)


def of_another_class(student):
    return lambda: setattr(student, "__class__", Negative)


def circular(student):
    return lambda: setattr(student.head, "padding_mode", "circular")


def dilated(student):
    head = torch.nn.Conv2d(student.head.in_channels, student.head.out_channels, 3, padding=2, dilation=2)
    head.load_state_dict(student.head.state_dict())
    return lambda: setattr(student, "head", head)


def adapted(student):
    student.head = Adapter(student.head)
    return lambda: student.head.extra.weight.data.mul_(2)


def stacked(student):
    block = student.submodules[0]
    return lambda: setattr(block, "convolution1", torch.nn.Sequential(block.convolution1, torch.nn.Tanh()))


def subclassed(student):
    return lambda: setattr(student.submodules[0], "norm1", Tripled(student.submodules[0].norm1.num_features).eval())


LAYERS = [pruned, normed, hooked, hooked_whole, replaced, of_another_class, circular, dilated, adapted, stacked, subclassed]
LAYERS += [convolved_otherwise, narrowed, halved, called, wrapped, with_another_head, without_activations, up_sampled_elsewhere]


@pytest.mark.filterwarnings("ignore:the pipeline draws with the student's own modules")
@pytest.mark.parametrize("prepare", LAYERS)
def test_layers_that_do_more_than_their_weights_run_as_they_are(prepare, monkeypatch):
    """Pruned or adapted layers cannot be folded: the student's own modules draw, and no engine silently ignores the change."""
    torch.manual_seed(0)
    pipe = AdvKDPipeline(tiny_student().eval())
    change = prepare(pipe.student.student)
    before = pipe(2, generator=seeded(0), output_type="pt").images
    change()
    pipe.student.student.submodules[-1].norm2.train()
    images = pipe(2, generator=seeded(0), output_type="pt").images
    assert torch.equal(images, plain_images(pipe)) and not torch.equal(images, before)
    assert pipe.student.student.submodules[-1].norm2.training
    with pytest.raises(CannotFoldError, match="can be folded, not|cannot be (folded|fused)|must (have|be equal)"):
        pipe.student.student.fuse(tune=False)


@pytest.mark.filterwarnings("ignore:the pipeline draws with the student's own modules")
def test_hooks_of_all_modules_are_run(pipe):
    before = pipe(2, generator=seeded(0), output_type="pt").images
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, arguments, output: -output if isinstance(module, torch.nn.Conv2d) else None
    )
    try:
        images = pipe(2, generator=seeded(0), output_type="pt").images
        assert torch.equal(images, plain_images(pipe)) and not torch.equal(images, before)
    finally:
        handle.remove()
    assert torch.equal(pipe(2, generator=seeded(0), output_type="pt").images, before)


def test_looking_at_a_student_in_training_does_not_change_it():
    """Spectral norm takes a step of its power iteration whenever its weight is read in training mode."""
    pipe = AdvKDPipeline(tiny_student())
    student = pipe.student.student.train()
    torch.nn.utils.parametrizations.spectral_norm(student.submodules[0].convolution1)
    before = copy.deepcopy(student.state_dict())
    images = pipe(2, generator=seeded(0), output_type="pt").images
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(module.training for module in student.modules())
    assert torch.allclose(images, plain_images(pipe), atol=1e-5)


class Merging(torch.nn.Conv2d):
    """An adapter that adds itself to the layer's weight in eval mode, and takes itself out again for training."""

    extra, merged = 0.1, False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.extra if mode else self.extra
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) if self.merged else self._conv_forward(x, self.weight + self.extra, self.bias)


@pytest.mark.filterwarnings("ignore:the pipeline draws with the student's own modules")
def test_several_threads_may_draw_from_a_student_in_training():
    """train() merges adapters and takes them out again; one thread's changes of the modes are invisible to another."""
    pipe = AdvKDPipeline(tiny_student())
    block = pipe.student.student.train().submodules[0]
    block.convolution1.__class__ = Merging
    before = copy.deepcopy(pipe.student.student.state_dict())
    wanted = plain_images(AdvKDPipeline(copy.deepcopy(pipe.student.student)))
    with ThreadPoolExecutor(4) as threads:
        draw = [threads.submit(pipe, 2, generator=seeded(0), output_type="pt") for _ in range(80)]
        assert all(torch.allclose(drawn.result().images, wanted, atol=1e-5) for drawn in draw)
    assert all(module.training for module in pipe.student.student.modules()) and not block.convolution1.merged
    # 80 times in and out round weights below 1 by 2^-25 each: 4.8e-6 at most.
    assert all((before[name] - tensor).abs().max() < 1e-5 for name, tensor in pipe.student.student.state_dict().items())


def test_compiled_and_unwrapped_students_are_fused():
    """Wrappers that compute the same, and attributes that libraries leave behind, do not prevent an engine."""
    student = tiny_student().eval()
    wanted, z = student.fuse(tune=False), student.latents(2)
    student.forward = MethodType(Student.forward, student)
    student.head = torch.compile(student.head, backend="eager")
    student.submodules[0] = torch.compile(student.submodules[0], backend="eager")
    student.submodules[1] = checkpoint_wrapper(student.submodules[1])
    student.submodules[1].convolution1.padding = "same"
    assert torch.equal(student.fuse(tune=False)(z), wanted(z))
    pipe = AdvKDPipeline(student)
    images = pipe(2, generator=seeded(0), output_type="pt").images
    assert torch.allclose(images, plain_images(pipe), atol=1e-5)
    pipe.student.student.submodules[0].register_forward_hook(lambda module, arguments, output: -output)
    with pytest.warns(UserWarning, match="own modules"):
        assert not torch.equal(pipe(2, generator=seeded(0), output_type="pt").images, images)


def test_latents_are_the_students(pipe):
    student = pipe.student.student
    student.latents = lambda *arguments: torch.zeros_like(Student.latents(student, *arguments))
    images = pipe(2, generator=seeded(0), output_type="pt").images
    assert torch.equal(images[0], images[1])


def test_weights_of_more_bytes_than_the_network_has_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with open(tmp_path / "student" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.truncate(2**32)
    with pytest.raises(InputError, match="more than the"):
        AdvKDPipeline.from_pretrained(tmp_path)
