"""Other engines on an NVIDIA GPU in their best configuration, for a network ``module(x) -> tensor`` of one fixed input shape.

``dtype`` is that of weights, activations and input: bfloat16, float16 or float32 (TensorFloat-32 as torch's switches say).
Tensors are channels_last and cuDNN times all of its algorithms for every shape.
"""

import torch

from .gpu_timing import Replay
from .peers import many_networks


def prepared(module, x, dtype):
    """Module and input in the dtype on the input's device; cuDNN's search on."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 0
    module = module.to(device=x.device, dtype=dtype, memory_format=torch.channels_last)
    return module, x.to(dtype).contiguous(memory_format=torch.channels_last)


def eager(module, x, dtype):
    """PyTorch eager: cuDNN's convolutions, launched one by one."""
    module, x = prepared(module, x, dtype)

    def call():
        with torch.inference_mode():
            return module(x)

    call()
    return call


def graphed(module, x, dtype):
    """The same launches as one CUDA graph."""
    module, x = prepared(module, x, dtype)
    return Replay(lambda i: module(x))


def compiled(module, x, dtype, mode="reduce-overhead"):
    """torch.compile, in a mode that captures CUDA graphs: ``reduce-overhead`` or ``max-autotune``."""
    module, x = prepared(module, x, dtype)
    with many_networks():
        function = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
        # Compiled, warmed up, captured; then replayed.
        for _ in range(3):
            with torch.no_grad():
                function(x)

    def call():
        with torch.no_grad():
            return function(x)

    return call


def compiled_graph(module, x, dtype, mode="default"):
    """What torch.compile makes as a CUDA graph of ours, replayed without its checks of what it was compiled for."""
    module, x = prepared(module, x, dtype)
    with many_networks():
        function = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
        return Replay(lambda i: function(x))


def tensorrt(module, x, dtype):
    """TensorRT, strongly typed, its optimiser at its highest level, as one CUDA graph; through torch_tensorrt where that is."""
    module, x = prepared(module, x, dtype)
    try:
        import torch_tensorrt
    except ImportError:
        run = _tensorrt_engine(module, x)
        return Replay(lambda i: run())
    options = {"use_explicit_typing": True, "optimization_level": 5, "min_block_size": 1}
    with torch.no_grad():
        function = torch_tensorrt.compile(module, ir="dynamo", inputs=[x], **options)
    return Replay(lambda i: function(x))


def _tensorrt_engine(module, x):
    """The module through ONNX as a TensorRT engine; a function that starts it on torch's stream and gives its output."""
    import io

    import tensorrt

    buffer = io.BytesIO()
    torch.onnx.export(module, (x,), buffer, input_names=["x"], output_names=["y"], opset_version=17, dynamo=False)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    # Newer versions know no other networks.
    strong = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(buffer.getvalue()):
        raise RuntimeError(f"TensorRT does not read the network ({parser.get_error(0)})")
    config = builder.create_builder_config()
    config.builder_optimization_level = 5
    if not torch.backends.cudnn.allow_tf32:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    context = engine.create_execution_context()
    given = x.contiguous()
    with torch.no_grad():
        found = torch.empty_like(module(x), memory_format=torch.contiguous_format)
    context.set_tensor_address("x", given.data_ptr())
    context.set_tensor_address("y", found.data_ptr())

    def run():
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        # The engine reads and writes memory of these tensors, and belongs to its runtime.
        return found if given is not None and engine is not None else None

    return run
