"""Other engines in their best configuration for a network ``module(x) -> tensor`` of one fixed input shape.

``dtype`` is float32 or bfloat16, of weights and activations; PyTorch takes its input in it, the other engines take float32.
"""

import contextlib
import io
import os
import tempfile
import warnings

import torch


def eager(module, x, dtype=torch.float32):
    """PyTorch eager, channels_last."""
    module, x = _prepared(module, x, dtype)

    def call():
        with torch.inference_mode():
            return module(x)

    return call


def compiled(module, x, dtype=torch.float32):
    """torch.compile with freezing: constants folded, weights pre-packed."""
    import torch._inductor.config as inductor

    module, x = _prepared(module, x, dtype)
    with inductor.patch(freezing=True), many_networks():
        function = torch.compile(module, fullgraph=True, dynamic=False)
        with torch.no_grad():
            function(x)

    def call():
        with torch.no_grad():
            return function(x)

    return call


def many_networks():
    """Every network of a benchmark shares one ``forward``: none may be refused for the number of those before it."""
    import torch._dynamo.config as dynamo

    return dynamo.patch(recompile_limit=1000, accumulated_recompile_limit=1000)


def onnx_runtime(module, x):
    """ONNX Runtime with all graph optimisations, as many threads as torch."""
    import onnx  # noqa: F401
    import onnxruntime

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter of traced modules says that it is the older one; its graph is the one measured.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(module, (x,), buffer, input_names=["x"], opset_version=17, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino(module, x, dtype=torch.float32):
    """OpenVINO with the latency hint, as many threads as torch."""
    import openvino as ov

    with warnings.catch_warnings():
        # Tracing warns about every Python condition that becomes a constant; the shape is fixed here.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        network = ov.convert_model(module, example_input=x)
    network.reshape(list(x.shape))
    precision = "f32" if dtype == torch.float32 else "bf16"
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.compile_model(network, "CPU", hints).create_infer_request()
    feed = x.numpy()
    return lambda: request.infer([feed], share_inputs=True, share_outputs=True)[0]


def ncnn(module, x, dtype=torch.float32):
    """ncnn with Winograd, as many threads as torch; it takes one image at a time. ``bfloat16`` is its storage type."""
    import ncnn
    import pnnx

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_winograd_convolution = True
    net.opt.use_bf16_storage = dtype == torch.bfloat16
    # The converter writes a dozen files into the working folder, and talks.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), _quiet():
        pnnx.export(module, "network.pt", (x[:1],), fp16=False)
        net.load_param("network.ncnn.param")
        net.load_model("network.ncnn.bin")
    images, found = [ncnn.Mat(image.numpy()).clone() for image in x], []

    def call():
        found.clear()
        for image in images:
            extractor = net.create_extractor()
            extractor.input("in0", image)
            found.append(extractor.extract("out0")[1])
        # Views of ncnn's memory; parity alone makes one tensor of them.
        return found[0].numpy()[None] if len(found) == 1 else [image.numpy() for image in found]

    return call


@contextlib.contextmanager
def _quiet():
    """Nothing on standard output and error, from other programs neither."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "w") as nothing:
        for number, _ in kept:
            os.dup2(nothing.fileno(), number)
    try:
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


def _prepared(module, x, dtype):
    module = module.to(dtype=dtype, memory_format=torch.channels_last)
    return module, x.to(dtype=dtype).contiguous(memory_format=torch.channels_last)
