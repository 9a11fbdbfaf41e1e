"""The student's convolutions in Triton: in its interpreter, compiled ahead of time, seen by torch's compilers, on a GPU."""

import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from advkd.kernels import conv_tiles

from advkd.errors import BackendUnavailableError, InputError
from advkd.models.shape import PRESETS, convolutions
from advkd.ops.conv_layer import ACTIVATIONS
from advkd.ops.gpu_storage import device_limits, pad_layer, padded

from ..conftest import ROOT, process_environment
from .cases import BF16, F16, F32, UP, Case, after, case_of, check, check_captured, compare, draw

LAYERS = [
    # One pixel: one of the nine taps, or of the four, lies in the image.
    Case(1, 1, 1, (5, 3), activation="none", product="tf32x3", tile=(16, 16, 16, 1, 2)),
    Case(1, 1, 1, (5, 3), UP, product="f16", tile=(16, 16, 16, 1, 2)),
    # Two images smaller than a tile, which ends beyond the last one; fewer channels than a block has columns.
    Case(2, 3, 5, (16, 16), activation="tanh", product="tf32x3", tile=(64, 32, 16, 4, 3)),
    Case(2, 3, 5, (16, 16), UP, activation="tanh", product="bf16", tile=(64, 32, 16, 4, 3)),
    # Tiles that begin and end within lines and images; channels that fill neither their last step nor their last block of
    # columns; a result among other channels.
    Case(3, 5, 7, (40, 44), product="tf32x3", more=16, tile=(64, 32, 32, 4, 3)),
    Case(3, 5, 7, (40, 44), UP, product="f16", more=16, tile=(64, 32, 32, 4, 3)),
    # Lines longer than a tile, two lines; one column.
    Case(1, 2, 19, (16, 16), product="bf16", tile=(16, 16, 16, 1, 4)),
    Case(1, 2, 19, (16, 16), UP, product="bf16", more=32, tile=(16, 16, 16, 1, 4)),
    Case(2, 11, 1, (16, 16), product="f16", tile=(16, 16, 16, 1, 4)),
    # Whole blocks: several steps, several blocks of columns, channels of the latent after those of the layer before.
    Case(1, 4, 4, (68, 32), UP, product="ieee", detail=4, tile=(16, 16, 32, 2, 3)),
    Case(2, 4, 4, (32, 64), product="ieee", tile=(32, 32, 16, 2, 3)),
    Case(2, 4, 4, (32, 64), UP, product="truncated", tile=(32, 32, 16, 2, 3)),
    Case(2, 4, 4, (32, 64), product="truncated", tile=(32, 32, 16, 2, 3)),
]
DESCRIPTORS = [
    # One pixel: boxes hold more of the border than of the image.
    Case(1, 1, 1, (5, 3), activation="none", product="f16", tile=(4, 4, 16, 16, 4, 2)),
    Case(1, 1, 1, (5, 3), UP, product="f16", tile=(4, 4, 64, 16, 4, 2)),
    # Two images smaller than a tile; fewer channels than a block has columns, which are rows of the product from 64 on.
    Case(2, 3, 5, (16, 16), activation="tanh", product="f16", tile=(4, 8, 32, 16, 4, 3)),
    Case(2, 3, 5, (16, 16), UP, activation="tanh", product="bf16", tile=(4, 8, 64, 16, 4, 3)),
    # Tiles that overhang below and on the right; channels that fill neither their last step nor their last block of columns;
    # a result among other channels.
    Case(3, 5, 7, (40, 44), product="f16", more=16, tile=(2, 8, 32, 32, 4, 3)),
    Case(3, 5, 7, (40, 84), UP, product="f16", more=16, tile=(2, 8, 64, 32, 4, 3)),
    Case(3, 5, 7, (40, 84), product="bf16", more=32, tile=(4, 4, 64, 64, 8, 3)),
    # Tiles of one row, one column and two; one image beside the next.
    Case(1, 2, 19, (16, 16), product="bf16", tile=(1, 16, 16, 16, 4, 4)),
    Case(1, 2, 19, (16, 16), UP, product="bf16", more=32, tile=(1, 32, 16, 16, 4, 4)),
    Case(2, 11, 1, (16, 16), product="f16", tile=(16, 1, 16, 16, 4, 4)),
    # Whole blocks: several steps, several blocks of columns, channels of the latent after those of the layer before.
    Case(1, 4, 4, (68, 32), UP, product="f16", detail=4, tile=(2, 8, 16, 32, 4, 3)),
    Case(2, 4, 8, (32, 128), product="f16", tile=(4, 8, 64, 16, 8, 3)),
    Case(2, 4, 8, (32, 128), UP, activation="none", product="f16", tile=(2, 8, 64, 16, 4, 3)),
]
IMAGES = [
    # One pixel; tiles that overhang below and on the right; tiles that do not, and whose interior meets no border.
    Case(1, 1, 1, (5, 1), activation="tanh", product="tf32x3", image=True, tile=(4, 8, 16, 2)),
    Case(2, 5, 11, (40, 3), activation="tanh", product="tf32x3", image=True, tile=(4, 8, 32, 2)),
    Case(1, 9, 12, (16, 4), product="f16", image=True, tile=(4, 4, 16, 1)),
    Case(1, 3, 11, (16, 3), activation="tanh", product="bf16", image=True, tile=(2, 8, 16, 1)),
    Case(1, 8, 8, (32, 2), activation="none", product="ieee", image=True, tile=(4, 8, 16, 2)),
    Case(1, 8, 8, (32, 3), activation="tanh", product="truncated", image=True, tile=(4, 8, 16, 2)),
]


PRODUCTS = {"bf16": (BF16, "tf32"), "f16": (F16, "tf32"), "truncated": (F32, "tf32")}
PRODUCTS |= {precision: (F32, precision) for precision in ("ieee", "tf32x3")}
"""Dtype and precision, as the kernels' tables of tiles take them, by a case's product."""


def launchers():
    from advkd.ops import triton_conv

    return triton_conv


def pack(case, weights, biases):
    """The layer's weights and bias as the kernels take them."""
    taps, bias = pad_layer(weights[0], biases[0], case.layers[0])
    return [launchers().pack_weights(taps, *PRODUCTS[case.product])], [bias]


def start(case, x, weights, biases, out):
    """Start the kernel that a case's tile is for."""
    kernels, code = launchers(), ACTIVATIONS.index(case.activation)
    options = (code, case.slope, PRODUCTS[case.product][1], case.tile)
    if case.image:
        kernels.conv_image(x, *weights, *biases, out, *options)
    else:
        launch = kernels.conv_descriptor if len(case.tile) == 6 else kernels.conv_layer
        launch(x, *weights, *biases, out, case.upsample, *options)


def require(case, device):
    """The interpreter has one order, a GPU repeats its bits."""
    check(case, start, device, 1 if device == "cpu" else 2, pack, truncates=device == "cpu")


def check_conv_block(device):
    """Ordinary tensors of any strides and channels, both kernels, through the ops."""
    kernels = launchers()
    for case in (
        Case(2, 3, 2, (7, 3), activation="tanh", product="tf32x3"),
        Case(2, 3, 2, (7, 3), UP, "tanh", "f16"),
        Case(2, 3, 2, (7, 20), UP, "leaky_relu", "bf16"),
        Case(2, 3, 2, (7, 20), activation="none", product="tf32x3"),
    ):
        x, (weight,), (bias,) = draw(case)
        x, weight, bias = (tensor.to(case.dtype) for tensor in (x, weight, bias))
        on_device = (weight.to(device), bias.to(device), case.slope, case.upsample, case.activation, "tf32x3")
        found = kernels.conv_block(x.to(device), *on_device)
        assert found.is_contiguous() and found.dtype == case.dtype
        compare(found.cpu(), *after(case, case.layers[0], x, weight, bias, truncates=device == "cpu"))
        for strided in (x.to(memory_format=torch.channels_last), x.repeat_interleave(2, dim=3)[..., ::2]):
            assert torch.equal(kernels.conv_block(strided.to(device), *on_device), found)
        assert kernels.conv_block(x[:0].to(device), *on_device).shape == (0, *found.shape[1:])


def check_values(device):
    """tanh over its range, sign and saturation; LeakyReLU of zero; a NaN spoils its neighbours and nothing else."""
    kernels = launchers()
    values = torch.cat((torch.linspace(-12, 12, 1001), torch.tensor([0.0, 1e-8, -1e-8, 1e30, -1e30, 0, torch.nan])))
    x = torch.zeros(1, 1, len(values), 16)
    x[..., 0] = values
    weights, bias = torch.zeros(1, 9, 16, 16), torch.zeros(16)
    weights[0, 4, 0, 0] = 1
    for activation, expected in ((1, torch.where(values > 0, values, 0.25 * values)), (2, values.double().tanh())):
        out = torch.empty(1, 1, 1, len(values), device=device)
        tile = (1, 256, 16, 4)
        arguments = [tensor.to(device) for tensor in (x, weights, bias)]
        kernels.conv_image(*arguments, out, activation, 0.25, "ieee", tile)
        found = out.flatten().cpu()
        # Worst at a value of 0.25: two units each of exp and of a quotient, three times as much of their difference.
        assert ((found - expected).abs() <= 2.0**-20 * expected.abs())[:-2].all()
        assert found[-2:].isnan().all()


def interpret():
    for case in (*LAYERS, *DESCRIPTORS, *IMAGES):
        require(case, "cpu")
    check_values("cpu")
    check_conv_block("cpu")


def traced():
    """Check the ops under torch's compilers; in the interpreter they stay whole."""
    kernels = launchers()
    weights = kernels.pack_weights(torch.randn(4, 4, 16, 16), F32, "tf32x3")
    x, bias = torch.randn(2, 3, 3, 16), torch.randn(16)
    image = torch.randn(1, 9, 16, 16)
    torch.library.opcheck(kernels.conv_layer_triton, (x, weights, bias, True, 1, 0.2, "tf32x3", [16, 16, 16, 1, 2]))
    torch.library.opcheck(kernels.conv_image_triton, (x, image, bias, 3, 2, 0.2, "ieee", [4, 8, 16, 1]))
    whole, arguments = Pair(), (torch.randn(1, 16, 2, 3), torch.randn(16, 16, 3, 3), bias)
    expected = whole(*arguments)
    for backend in ("eager", "aot_eager"):
        with torch.no_grad():
            assert torch.equal(torch.compile(whole, fullgraph=True, backend=backend)(*arguments), expected)
        torch._dynamo.reset()
    exported = torch.export.export(whole, arguments)
    assert torch.equal(exported.module()(*arguments), expected)
    export_with_any_batch()


def export_with_any_batch():
    """Check that an exported program keeps the ops and takes any number of images."""
    arguments = (torch.randn(2, 3, 3, 16), torch.randn(4, 4, 16, 16), torch.randn(1, 9, 16, 16), torch.randn(16))
    sizes = {"x": {0: torch.export.Dim("images", min=1, max=2**24)}, "layer": None, "image": None, "bias": None}
    exported = torch.export.export(Ops(), arguments, dynamic_shapes=sizes)
    ops = [str(node.target) for node in exported.graph.nodes if "advkd" in str(node.target)]
    assert ops == ["advkd.conv_layer_triton.default", "advkd.conv_image_triton.default"]
    return exported


class Pair(torch.nn.Module):
    def forward(self, x, weight, bias):
        kernels = launchers()
        y = kernels.conv_block(x, weight, bias, 0.2, True, "leaky_relu", "tf32x3")
        return kernels.conv_block(y, weight[:3], bias[:3], 0.2, False, "tanh", "tf32x3")


class Ops(torch.nn.Module):
    def forward(self, x, layer, image, bias):
        kernels = launchers()
        y = kernels.conv_layer_triton(x, layer, bias, True, 1, 0.2, "tf32x3", [16, 16, 16, 1, 2])
        return kernels.conv_image_triton(y, image, bias, 3, 2, 0.2, "tf32x3", [4, 8, 16, 1])


def see_through():
    """Check the graph that Inductor would get: the kernels themselves, of whose tensors only the results are written."""
    import triton
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    graphs = []

    def keep(graph, arguments):
        graphs.append(graph)
        raise NotImplementedError("kept")

    arguments = (torch.randn(2, 3, 3, 16), torch.randn(4, 4, 16, 16), torch.randn(1, 9, 16, 16), torch.randn(16))
    with pytest.raises(Exception, match="kept"), torch.no_grad():
        torch.compile(Ops(), fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*arguments)
    nodes = [node for node in graphs[0].graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]
    assert len(nodes) == 2 and not [node for node in graphs[0].graph.nodes if "advkd" in str(node.target)]
    assert all(node.kwargs["tensors_to_clone"] == ["out"] for node in nodes)
    export_with_any_batch()


class Recorder:
    """Stand-in for a kernel: keeps the arguments of a launch."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: setattr(self, "call", (arguments, constants))


def recorded(config, dtype, precision, c_in, c_out, upsample):
    """A kernel, and the arguments and compile-time constants with which its launcher starts it."""
    from advkd.kernels import conv_block as kernels

    taps = torch.empty(*((4, 4) if upsample else (1, 9)), c_in, padded(c_out))
    weights = launchers().pack_weights(taps, dtype, precision).to("meta")
    x, bias = torch.empty(2, 8, 8, c_in, dtype=dtype, device="meta"), torch.empty(padded(c_out), device="meta")
    recorder, last = Recorder(), (precision, config)
    if isinstance(config, conv_tiles.ImageConfig):
        out = x.new_empty(2, c_out, 8, 8)
        kernels.launch_image(recorder, x, weights, bias, out, 2, 0.2, *last)
        return kernels.image_kernel, *recorder.call
    out = x.new_empty(2, 16 if upsample else 8, 16 if upsample else 8, padded(c_out))
    if isinstance(config, conv_tiles.DescriptorConfig):
        kernels.launch_descriptor(recorder, x, weights, bias, out, upsample, 1, 0.2, config)
        return kernels.descriptor_kernel, *recorder.call
    kernels.launch_layer(recorder, x, weights, bias, out, upsample, 1, 0.2, *last)
    return kernels.conv_kernel, *recorder.call


def jobs(architecture, part):
    """(configuration, dtype, precision, channels in, channels out, phases) to compile: ``whole``, or a ``part`` of it."""
    kinds = [(BF16, "tf32"), (F16, "tf32"), (F32, "tf32"), (F32, "tf32x3"), (F32, "ieee")]
    layers, images, boxes = [], [], []
    narrow = [] if conv_tiles.descriptor_gap(BF16, (architecture // 10, 0)) else kinds[:2]
    for kind, channels, upsample in itertools.product(narrow, (128, 144), (False, True)):
        boxes += [(config, *kind, channels, channels, upsample) for config in conv_tiles.descriptor_table(channels)]
    for dtype, precision in kinds:
        # Channels that fill whole blocks, and ones that do not.
        for channels, upsample in itertools.product((128, 144), (False, True)):
            for config in conv_tiles.table(dtype, precision, channels):
                layers.append((config, dtype, precision, channels, channels, upsample))
        for channels in (128, 16):
            images += [
                (config, dtype, precision, channels, 3, False) for config in conv_tiles.image_table(dtype, precision, channels)
            ]
    if part == "whole":
        return list(dict.fromkeys(layers)) + images + list(dict.fromkeys(boxes))
    # On one architecture every tile, in the most important dtype; else the largest tiles, which need most registers.
    usual = [job for job in layers if job[1] == BF16 and job[3] == 128 and not job[5]]
    large = [next(job for job in layers if job[1:3] == kind and job[5]) for kind in kinds[2:]]
    tiles = conv_tiles.DESCRIPTOR[:: 1 if architecture == 90 else 7]
    boxes = [job for job in boxes if job[0] in tiles and job[1] == BF16 and job[3] == 128]
    return [*(usual if architecture == 90 else usual[:1]), *large, images[0], *boxes]


def compile_ahead(architecture, part):
    """Compile variants and print, for each, the figures that the test checks."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    architecture, names = int(architecture), {F32: "fp32", BF16: "bf16", F16: "fp16"}
    for job in jobs(architecture, part):
        config, dtype, precision, *channels, upsample = job
        kernel, arguments, constants = recorded(config, dtype, precision, *channels, upsample)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
        signature, aligned = dict.fromkeys(kernel.arg_names, "constexpr"), {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, arguments)):
            tensor = isinstance(value, torch.Tensor)
            # The types for which the launcher's arguments would be compiled; numbers may exceed the present ones.
            signature[name] = "i32" if isinstance(value, int) else mangle_type(value)
            if tensor or name == "pitch":
                aligned[i,] = [["tt.divisibility", 16]]
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
        ptx = compiled.asm["ptx"]
        units = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in ptx]
        spare = None if isinstance(config, conv_tiles.ImageConfig) else config.shared(dtype)
        copies = [name for name in ("cp.async.cg", "cp.async.bulk.tensor") if name in ptx]
        row = [str(config), config._asdict(), names[dtype], precision, *channels, upsample]
        print("KERNEL " + json.dumps([*row, compiled.metadata.shared, spare, units, copies]), flush=True)


def output_of(call, folder, **environment):
    """Output of a function of this file in a process of its own: Triton's compiler and its interpreter exclude each other.

    ``call``: its name and arguments, with spaces between.
    """
    pytest.importorskip("triton")
    code = "import sys; from tests.kernels import test_conv_block_triton as t; name, *arguments = sys.argv[1:]; "
    code += "getattr(t, name)(*arguments); print('END')"
    environment = {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", "ADVKD_CACHE": str(folder), **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", code, *call.split()]
    text = subprocess.run(command, env=process_environment(environment), cwd=ROOT, **streams).stdout
    assert text.endswith("END\n"), text
    return text


ARCHITECTURES = [80, 90, 100]


@pytest.mark.parametrize("call", ["interpret", "traced"])
def test_in_the_interpreter(call, tmp_path):
    output_of(call, tmp_path, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore::RuntimeWarning")


def test_torchs_compilers_see_through(tmp_path):
    output_of("see_through", tmp_path)


# Shared memory of a block.
LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def require_compiled(output, architecture):
    """Whole blocks of channels spill nothing, shared memory is as estimated, tensor cores are used where intended."""
    rows = [json.loads(line) for line in re.findall(r"^KERNEL (.*)$", output, re.M)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", output)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    assert len(registers) == len(rows) == len(spills) // 2 and rows
    for row, spilled in zip(rows, spills[::2]):
        name, config, dtype, precision, c_in, c_out, upsample, shared, estimated, units, copies = row
        box = "channels" in config
        # Where masks take a few more registers, ptxas may spill as many to fit one more block on a multiprocessor.
        assert spilled <= (16 if c_in == 144 and not box else 0), (row, spilled)
        assert shared <= LIMITS[architecture], row
        if box:
            assert units == {90: ["wgmma.mma_async"], 100: ["tcgen05.mma"]}[architecture], row
        elif precision == "ieee" and dtype == "fp32":
            assert not units, row
        elif architecture == 90 and estimated is not None and config["pixels"] >= 64 and config["warps"] % 4 == 0:
            assert units == ["wgmma.mma_async"], row
        else:
            assert units, row
        if estimated is not None:
            # Reordering the result for memory may take a little more than a small pipeline.
            assert copies == ["cp.async.bulk.tensor" if box else "cp.async.cg"], row
            assert shared <= max(estimated + 1024, 48 * 1024), row
    return list(zip(registers, rows))


def compiled(architecture, part, folder):
    return output_of(f"compile_ahead {architecture} {part}", folder, TRITON_DUMP_PTXAS_LOG="1")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_ahead(architecture, tmp_path):
    require_compiled(compiled(architecture, "part", tmp_path), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_compiled_ahead(architecture, tmp_path):
    require_compiled(compiled(architecture, "whole", tmp_path), architecture)


def preset_layers():
    return list(dict.fromkeys(layer for config in PRESETS.values() for layer in convolutions(config)))


@pytest.mark.parametrize(
    ("dtype", "precision"), [(BF16, "tf32"), (F16, "tf32"), *((F32, p) for p in ("ieee", "tf32", "tf32x3"))]
)
def test_configurations_of_the_presets(dtype, precision):
    """Every layer has a few, which all fit the device; the default is one of them and fits every device."""
    pytest.importorskip("triton")
    kernels = launchers()
    for layer, batch in itertools.product(preset_layers(), (1, 8, 64)):
        default = kernels.default(layer, batch, dtype, precision)
        for shared in (99 * 1024, 163 * 1024, 227 * 1024):
            candidates = kernels.configs(layer, batch, dtype, precision, shared)
            assert 3 <= len(candidates) <= 8 and len(set(map(str, candidates))) == len(candidates)
            if not kernels.has_few_channels(layer):
                assert all(config.shared(dtype) < shared for config in candidates)
        assert default == kernels.configs(layer, batch, dtype, precision)[0]
        if not kernels.has_few_channels(layer) and batch * layer.height * layer.width <= 16:
            assert default.pixels == 16, "few pixels: as many programs as there are"
        if not kernels.has_few_channels(layer) and batch * layer.height * layer.width >= 2**20 and layer.c_out == 128:
            assert default.pixels * default.columns >= 128 * 64, "many pixels: tiles that read little"


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_descriptor_configurations_of_the_presets(dtype):
    """Every layer with an image as large as a tile has a few, which fit the device; without descriptors there are none."""
    pytest.importorskip("triton")
    kernels = launchers()
    for layer, batch, shared in itertools.product(preset_layers(), (1, 8, 64), (99 * 1024, 227 * 1024)):
        candidates = kernels.descriptor_configs(layer, batch, dtype, (9, 0), shared)
        assert len(candidates) <= 4 and len(set(candidates)) == len(candidates)
        assert bool(candidates) == (not kernels.has_few_channels(layer) and layer.height >= 8), layer
        assert all(config.shared(dtype) < shared and config.rows <= layer.height for config in candidates)
        assert not kernels.descriptor_configs(layer, batch, dtype, (8, 9), shared)
        assert not kernels.descriptor_configs(layer, batch, F32, (9, 0), shared)
        if candidates and batch * layer.height * layer.width >= 2**20 and layer.c_out == 128 and shared > 2**17:
            assert candidates[0].rows * candidates[0].columns * candidates[0].channels == 256 * 128, "tiles that read little"
    assert conv_tiles.descriptor_gap(dtype, (9, 0)) is None is conv_tiles.descriptor_gap(dtype, (12, 0))
    assert "need compute capability 9.0, this device has 8.6" in conv_tiles.descriptor_gap(dtype, (8, 6))


def test_packed_weights():
    """Every layout holds the same numbers; TensorFloat-32 is rounded to nearest, where a tensor core would truncate."""
    pytest.importorskip("triton")
    pack, taps = launchers().pack_weights, torch.randn(4, 4, 32, 16)
    assert torch.equal(pack(taps, F16, "tf32"), taps.half()) and pack(taps, BF16, "ieee").is_contiguous()
    assert torch.equal(pack(taps, F32, "ieee"), taps) and pack(taps, F32, "ieee").is_contiguous()
    for precision, error in (("tf32x3", 0.0), ("tf32", 2.0**-11)):
        packed = pack(taps, F32, precision)
        assert ((packed - taps).abs() <= error * taps.abs()).all() and packed.transpose(2, 3).is_contiguous()
    assert not (pack(taps, F32, "tf32").view(torch.int32) & 0x1FFF).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 4, 4, 24)}, "x must be contiguous"),
        ({"x": torch.zeros(1, 4, 16, 4).transpose(2, 3)}, "x must be contiguous"),
        ({"x": torch.zeros(1, 4, 4, 16, dtype=torch.float64)}, "dtype"),
        ({"weights": torch.zeros(4, 4, 16, 32)}, "weights must be"),
        ({"weights": torch.zeros(1, 9, 32, 32)}, "weights must be"),
        ({"weights": torch.zeros(1, 9, 32, 32)[:, :, :16]}, "weights must be contiguous"),
        ({"weights": torch.zeros(1, 9, 16, 32).half()}, "weights must be torch.float32"),
        ({"bias": torch.zeros(16)}, "bias"),
        ({"bias": torch.zeros(32).half()}, "bias"),
        ({"out": torch.zeros(1, 8, 8, 32)}, "out must be"),
        ({"out": torch.zeros(1, 4, 4, 16)}, "out has 16 channels"),
        ({"out": torch.zeros(1, 4, 4, 32).half()}, "out must be"),
        ({"precision": "fast"}, "precision"),
    ],
)
def test_launchers_refuse(changes, message):
    pytest.importorskip("triton")
    arguments = {"x": torch.zeros(1, 4, 4, 16), "weights": torch.zeros(1, 9, 16, 32), "bias": torch.zeros(32)}
    arguments |= {"out": torch.zeros(1, 4, 4, 32), "precision": "ieee", "upsample": False, "activation": 0, "slope": 0.2}
    with pytest.raises(InputError, match=message):
        launchers().conv_layer(**{**arguments, **changes}, config=(16, 16, 16, 1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 4, 4, 24).half()}, "x must be contiguous"),
        (
            {"x": torch.zeros(1, 4, 4, 16), "weights": torch.zeros(1, 9, 16, 32), "out": torch.zeros(1, 4, 4, 32)},
            "16-bit storage",
        ),
        ({"x": torch.zeros(257).half()[1:].view(1, 4, 4, 16)}, "x must begin on a multiple of 16 bytes"),
        ({"weights": torch.zeros(4609).half()[1:].view(1, 9, 16, 32)}, "weights must begin on a multiple of 16 bytes"),
        ({"weights": torch.zeros(1, 9, 32, 16).half().transpose(2, 3)}, "weights must be contiguous, got"),
        ({"weights": torch.zeros(4, 4, 16, 32).half()}, "weights must be"),
        ({"out": torch.zeros(1, 8, 8, 32).half()}, "out must be"),
        ({"out": torch.zeros(1, 4, 4, 16).half()}, "out has 16 channels"),
    ],
)
def test_the_descriptor_launcher_refuses(changes, message):
    pytest.importorskip("triton")
    arguments = {"x": torch.zeros(1, 4, 4, 16).half(), "weights": torch.zeros(1, 9, 16, 32).half(), "bias": torch.zeros(32)}
    arguments |= {"out": torch.zeros(1, 4, 4, 32).half(), "precision": "tf32", "upsample": False, "activation": 0, "slope": 0.2}
    with pytest.raises(InputError, match=message):
        launchers().conv_descriptor(**{**arguments, **changes}, config=(4, 4, 16, 16, 4, 2))


def test_descriptors_are_refused_on_older_gpus(monkeypatch):
    """A plan from another card is refused before Triton replaces the descriptors by slow pointers."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    x = SimpleNamespace(is_cuda=True, device="cuda", dtype=BF16)
    with pytest.raises(BackendUnavailableError, match="compute capability 9.0, this device has 8.0"):
        launchers()._check_descriptors(x, None)


def test_the_image_launcher_refuses():
    pytest.importorskip("triton")
    x, bias, rest = torch.zeros(1, 4, 4, 16), torch.zeros(32), (0, 0.2, "ieee", (4, 4, 16, 1))
    with pytest.raises(InputError, match="at most 16 channels"):
        launchers().conv_image(x, torch.zeros(1, 9, 16, 32), bias, torch.zeros(1, 3, 4, 4), *rest)
    with pytest.raises(InputError, match="out must be"):
        launchers().conv_image(x, torch.zeros(1, 9, 16, 16), bias[:16], torch.zeros(1, 3, 4, 5), *rest)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*LAYERS, *IMAGES], ids=str)
def test_layers_on_a_gpu(case):
    pytest.importorskip("triton")
    require(case, "cuda")


def require_descriptors():
    """Skip where the device has no tensor descriptors, after checking that the launcher refuses them, too."""
    pytest.importorskip("triton")
    reason = launchers().descriptor_gap(BF16, torch.cuda.get_device_capability())
    if reason:
        with pytest.raises(BackendUnavailableError, match="compute capability"):
            require(DESCRIPTORS[0], "cuda")
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DESCRIPTORS, ids=str)
def test_descriptors_on_a_gpu(case):
    require_descriptors()
    require(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("ups", [(), UP], ids=["plain", "phases"])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("product", ["bf16", "f16"])
def test_every_descriptor_configuration_on_a_gpu(product, warps, ups):
    """Where a compiler is wrong for a number of warps or stages, it shows here; for whole blocks of channels, and others."""
    require_descriptors()
    _, limit = device_limits("cuda")
    for channels in (128, 72):
        for config in dict.fromkeys(tile._replace(warps=warps) for tile in conv_tiles.descriptor_table(padded(channels))):
            # Tiles of eight warps whose sums would not be in the registers of four are tried with eight alone.
            sums = config.rows * config.columns * config.channels // (32 * warps)
            if config.shared(PRODUCTS[product][0]) + 1024 <= limit and sums <= 128:
                require(Case(3, 13, 17, (channels, channels), ups, product=product, tile=config), "cuda")


@pytest.mark.gpu
def test_descriptors_in_a_graph_on_a_gpu():
    """A graph keeps its own copy of the descriptors: it reads what its tensors hold later."""
    require_descriptors()
    check_captured(DESCRIPTORS[-2], start, pack)


@pytest.mark.gpu
def test_values_and_public_layout_on_a_gpu():
    pytest.importorskip("triton")
    check_values("cuda")
    check_conv_block("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [128, 72])
@pytest.mark.parametrize("ups", [(), UP], ids=["plain", "phases"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_configuration_on_a_gpu(product, ups, channels):
    """Where a compiler is wrong for a number of warps or stages, it shows here; for whole blocks of channels, and others."""
    pytest.importorskip("triton")
    dtype, precision = PRODUCTS[product]
    _, limit = device_limits("cuda")
    for config in conv_tiles.table(dtype, precision, padded(channels)):
        if config.shared(dtype) + 1024 <= limit:
            require(Case(3, 13, 17, (channels, channels), ups, product=product, tile=config), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_configuration_of_images_on_a_gpu(product):
    pytest.importorskip("triton")
    dtype, precision = PRODUCTS[product]
    for config in conv_tiles.image_table(dtype, precision, 128):
        require(Case(3, 21, 43, (128, 3), activation="tanh", product=product, image=True, tile=config), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("product", ["bf16", "tf32x3"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_a_gpu(preset, product):
    """Every layer of a student with its default configuration, at its own size."""
    pytest.importorskip("triton")
    kernels = launchers()
    for layer in convolutions(PRESETS[preset]):
        tile = kernels.default(layer, 2, *PRODUCTS[product])
        require(case_of([layer], 2, product=product, image=kernels.has_few_channels(layer), tile=tile), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("launcher", ["conv_layer", "conv_descriptor", "conv_image"])
def test_beyond_32_bits_on_a_gpu(launcher, forty_gigabytes):
    """Tensors of more than 2^31 elements: the end of every kernel's result, from an input that is zero but there."""
    pytest.importorskip("triton")
    if launcher == "conv_descriptor":
        require_descriptors()
    image = launcher == "conv_image"
    tile = {"conv_layer": (128, 64, 64, 8, 3), "conv_descriptor": (8, 16, 64, 64, 4, 4), "conv_image": (8, 16, 64, 4)}[launcher]
    x = torch.zeros(1, 4100, 8200, 64, dtype=BF16, device="cuda")
    for upsample in [False] if image else [False, True]:
        case = Case(1, 8, 8, (64, 3 if image else 64), (upsample,), "none", image=image, tile=tile)
        small, weights, biases = draw(case)
        # Around the corner there are zeros, as around an image.
        x[0, -8:, -8:] = small[0].permute(1, 2, 0).cuda()
        scale = 2 if upsample else 1
        sides = (scale * 4100, scale * 8200)
        out = torch.empty((1, 3, *sides) if image else (1, *sides, 64), dtype=BF16, device="cuda")
        start(case, x, *([tensor.cuda() for tensor in part] for part in pack(case, weights, biases)), out)
        found = (out if image else out.permute(0, 3, 1, 2))[:, :, -8 * scale :, -8 * scale :]
        compare(found.cpu(), *after(case, case.layers[0], small, weights[0], biases[0]))
        del out, found
