"""Other engines in their best configuration for a network ``module(x) -> tensor`` of one fixed input shape, in float32."""

import io
import warnings

import torch


def eager(module, x):
    """PyTorch eager, channels_last."""
    module, x = _channels_last(module, x)

    def call():
        with torch.inference_mode():
            return module(x)

    return call


def compiled(module, x):
    """torch.compile with freezing: constants folded, weights pre-packed."""
    import torch._inductor.config as inductor

    module, x = _channels_last(module, x)
    with inductor.patch(freezing=True):
        function = torch.compile(module, fullgraph=True, dynamic=False)
        with torch.no_grad():
            function(x)

    def call():
        with torch.no_grad():
            return function(x)

    return call


def onnx_runtime(module, x):
    """ONNX Runtime with all graph optimisations, as many threads as torch."""
    import onnx  # noqa: F401
    import onnxruntime

    buffer = io.BytesIO()
    torch.onnx.export(module, (x,), buffer, input_names=["x"], opset_version=17, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino(module, x):
    """OpenVINO in float32 with the latency hint, as many threads as torch."""
    import openvino as ov

    with warnings.catch_warnings():
        # Tracing warns about every Python condition that becomes a constant; the shape is fixed here.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        network = ov.convert_model(module, example_input=x)
    network.reshape(list(x.shape))
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.compile_model(network, "CPU", hints).create_infer_request()
    feed = x.numpy()
    return lambda: request.infer([feed])[0].copy()


def _channels_last(module, x):
    return module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
