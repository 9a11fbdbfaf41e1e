"""Other engines in their best configuration for a network ``module(x) -> tensor`` of one fixed input shape.

On a CPU ``x`` may be a tuple, the network's several inputs: floating-point ones, and whole numbers, which keep their dtype.
On a CPU ``dtype`` is float32 or bfloat16, of weights and activations; PyTorch takes its input in it, the other engines take
float32. On a GPU it is that of weights, activations and input: bfloat16, float16 or float32 (TensorFloat-32 as torch's switches
say), and cuDNN times all of its algorithms for every shape.
"""

import contextlib
import functools
import io
import os
import tempfile
import warnings

import torch
import torch.nn.functional as F

from .harness import Replay, measure_events


def prepared(module, x, dtype):
    """Module and inputs, as a tuple, in the dtype on the inputs' device, channels_last; cuDNN's search on."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 0
    inputs = inputs_of(x)
    module = module.to(device=inputs[0].device, dtype=dtype, memory_format=torch.channels_last)
    return module, tuple(_placed(one, dtype) for one in inputs)


def inputs_of(x):
    """A network's inputs as a tuple."""
    return x if isinstance(x, tuple) else (x,)


def _placed(x, dtype):
    x = x.to(dtype) if x.is_floating_point() else x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def eager(module, x, dtype=torch.float32):
    """PyTorch eager; on a GPU cuDNN's convolutions, launched one by one."""
    module, inputs = prepared(module, x, dtype)

    def call():
        with torch.inference_mode():
            return module(*inputs)

    call()
    return call


def compiled(module, x, dtype=torch.float32, mode="reduce-overhead"):
    """torch.compile: on a CPU with freezing (constants folded, weights pre-packed), on a GPU in a mode that captures graphs."""
    import torch._inductor.config as inductor

    module, inputs = prepared(module, x, dtype)
    words = {"mode": mode} if inputs[0].device.type == "cuda" else {}
    with inductor.patch(freezing=not words), many_networks():
        function = torch.compile(module, fullgraph=True, dynamic=False, **words)
        # On a GPU compiled, warmed up, captured; then replayed.
        for _ in range(3 if words else 1):
            with torch.no_grad():
                function(*inputs)

    def call():
        with torch.no_grad():
            return function(*inputs)

    return call


def many_networks():
    """Every network of a benchmark shares one ``forward``: none may be refused for the number of those before it."""
    import torch._dynamo.config as dynamo

    return dynamo.patch(recompile_limit=1000, accumulated_recompile_limit=1000)


def onnx_runtime(module, x, dtype=torch.float32):
    """ONNX Runtime with all graph optimisations, as many threads as torch."""
    import onnx  # noqa: F401
    import onnxruntime

    buffer, inputs = io.BytesIO(), {f"x{i}": one for i, one in enumerate(inputs_of(x))}
    with warnings.catch_warnings():
        # The exporter of traced modules says that it is the older one; its graph is the one measured.
        warnings.simplefilter("ignore", DeprecationWarning)
        names = {"input_names": list(inputs)}
        torch.onnx.export(module, tuple(inputs.values()), buffer, **names, opset_version=17, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {name: one.numpy() for name, one in inputs.items()}
    return lambda: session.run(None, feed)[0]


def openvino(module, x, dtype=torch.float32):
    """OpenVINO with the latency hint, as many threads as torch."""
    import openvino as ov

    with warnings.catch_warnings():
        # Tracing warns about every Python condition that becomes a constant; the shape is fixed here.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        network = ov.convert_model(module, example_input=x)
    network.reshape({i: list(one.shape) for i, one in enumerate(inputs_of(x))})
    precision = "f32" if dtype == torch.float32 else "bf16"
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.compile_model(network, "CPU", hints).create_infer_request()
    feed = [one.numpy() for one in inputs_of(x)]
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


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
        pnnx.export(module, "network.pt", tuple(one[:1] for one in inputs_of(x)), fp16=False)
        net.load_param("network.ncnn.param")
        net.load_model("network.ncnn.bin")
    images, found = [[_mat(ncnn, one) for one in image] for image in zip(*inputs_of(x))], []

    def call():
        found.clear()
        for image in images:
            extractor = net.create_extractor()
            for i, one in enumerate(image):
                extractor.input(f"in{i}", one)
            found.append(extractor.extract("out0")[1])
        # Views of ncnn's memory; parity alone makes one tensor of them.
        return found[0].numpy()[None] if len(found) == 1 else [image.numpy() for image in found]

    return call


def _mat(ncnn, x):
    """One image's input as ncnn's; whole numbers have 32 bits there."""
    # Named, as a Mat does not keep the memory that it is made of.
    array = (x if x.is_floating_point() else x.int().reshape(1)).numpy()
    return ncnn.Mat(array).clone()


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


def graphed(module, x, dtype, mode=None, more=()):
    """The same launches as one CUDA graph, on x and more inputs in turn; with a mode, torch.compile's without its guards."""
    module, (x,) = prepared(module, x, dtype)
    inputs = [x, *(other.to(dtype).contiguous(memory_format=torch.channels_last) for other in more)]
    with many_networks():
        function = torch.compile(module, fullgraph=True, dynamic=False, mode=mode) if mode else module
        return Replay(lambda i: function(inputs[i]), len(inputs))


def cudnn_graph(module, x, dtype):
    """cuDNN's graph API (package nvidia-cudnn-frontend): every convolution, its bias and its activation one fused kernel.

    Up-sampling that is folded by hand is a fused backward-data convolution of stride 2; otherwise torch interpolates. Each
    layer takes its fastest plan, see :class:`CudnnLayer`. The whole is one CUDA graph.

    Args:
        module: a :class:`profiling.cases.student.Folded` network.
        x: its input.
        dtype: as above.

    Raises:
        ImportError: the package is not installed.
        RuntimeError: cuDNN has no plan for a layer, or none without TensorFloat-32 where that is off.
    """
    import cudnn  # noqa: F401

    module, (x,) = prepared(module, x, dtype)
    last, steps, known, given = len(module.convolutions) - 1, [], {}, x
    for i, convolution in enumerate(module.convolutions):
        if module.ups[i] and not module.transposed:
            steps.append(functools.partial(F.interpolate, scale_factor=2.0, mode="nearest"))
            given = steps[-1](given)
        slope = None if i == last and module.tanh else module.slope
        # Equal layers have one plan.
        kind = (type(convolution), convolution.weight.shape, given.shape, slope)
        steps.append(CudnnLayer(convolution, given, slope, known.get(kind)))
        known[kind] = steps[-1].plan
        given = steps[-1](given)

    def run(i):
        y = x
        for step in steps:
            y = step(y)
        return y

    return Replay(run)


PLANS = 3
"""Plans of a layer that are compiled and timed, in the order of cuDNN's heuristics; each takes about a second."""


class CudnnLayer:
    """A convolution with bias and activation as one graph of cuDNN's, over tensors with channels last.

    Args:
        convolution: ``Conv2d``, or ``ConvTranspose2d`` as :class:`profiling.cases.student.Folded` makes it.
        x: an input; its shape is the layer's.
        slope: of LeakyReLU; None: tanh.
        plan: index of the plan to take; None: the fastest of the first :data:`PLANS` that can be built.
    """

    def __init__(self, convolution, x, slope, plan=None):
        side = 2 if isinstance(convolution, torch.nn.ConvTranspose2d) else 1
        self.shape = (len(x), len(convolution.bias), side * x.shape[2], side * x.shape[3])
        self.weight, self.bias, self.device, self.dtype = convolution.weight, convolution.bias, x.device, x.dtype
        self.handle = _cudnn_handle(x.device)
        self.graph, self.tensors = _cudnn_layer(self.handle, x, self.weight, self.shape, slope, side == 2)
        self.plan = self._fastest(x) if plan is None else self._built(plan)
        self.workspace = self._workspace(self.plan)

    def __call__(self, x, plan=None, workspace=None):
        import cudnn

        y = torch.empty(self.shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        given = dict(zip(self.tensors, (x, self.weight, self.bias, y), strict=True))
        cudnn.set_stream(handle=self.handle, stream=_stream(self.device))
        workspace = self.workspace if workspace is None else workspace
        self.graph.execute_plan_at_index(given, workspace, self.plan if plan is None else plan, handle=self.handle)
        return y

    def _built(self, plan):
        self.graph.build_plan_at_index(plan)
        return plan

    def _workspace(self, plan):
        size = self.graph.get_workspace_size_plan_at_index(plan)
        return torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)

    def _fastest(self, x):
        calls, error = {}, None
        for plan in range(self.graph.get_execution_plan_count()):
            try:
                self._built(plan)
            except Exception as reason:  # a plan that is left out or cannot be compiled raises cuDNN's own kinds
                error = reason
                continue
            calls[plan] = functools.partial(self, x, plan, self._workspace(plan))
            if len(calls) == PLANS:
                break
        if not calls:
            raise RuntimeError(f"cuDNN builds no plan for {tuple(self.weight.shape)} at {tuple(x.shape)}: {error}")
        if len(calls) == 1:
            return next(iter(calls))
        times = measure_events(calls, repeats=5, device=x.device)
        return min(times, key=lambda plan: times[plan]["median"])


def _cudnn_layer(handle, x, weight, shape, slope, transposed):
    """A layer's graph with its plans, and the graph's x, weight, bias and y."""
    import cudnn

    kinds = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}
    kind, wide = getattr(cudnn.data_type, kinds[x.dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=handle)
    channels = (1, shape[1], 1, 1)
    named = {"x": x.shape, "weight": weight.shape, "bias": channels}
    inputs = [graph.tensor(dim=list(s), stride=_last(s), data_type=kind, name=name) for name, s in named.items()]
    options = {"padding": [1, 1], "stride": [1 + transposed] * 2, "dilation": [1, 1]}
    made = graph.conv_dgrad(*inputs[:2], **options) if transposed else graph.conv_fprop(*inputs[:2], **options)
    # The size that a backward-data convolution of stride 2 makes does not follow from its input's.
    made.set_dim(list(shape))
    biased = graph.bias(made, inputs[2])
    y = graph.tanh(biased) if slope is None else graph.leaky_relu(biased, slope)
    y.set_output(True).set_data_type(kind).set_dim(list(shape)).set_stride(_last(shape))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    if x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        notes = cudnn.numerical_note
        graph.deselect_numeric_notes([notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS])
    graph.check_support()
    return graph, [*inputs, y]


def _last(shape):
    """Strides of (N, C, H, W) with channels last."""
    _, channels, height, width = shape
    return [channels * height * width, 1, channels * width, channels]


@functools.cache
def _cudnn_handle(device):
    """cuDNN's handle of a device, one for the process."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


def _stream(device):
    return torch.cuda.current_stream(device).cuda_stream


def tensorrt(module, x, dtype):
    """TensorRT, strongly typed, its optimiser at its highest level, through ONNX, as one CUDA graph."""
    import tensorrt

    module, (x,) = prepared(module, x, dtype)
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

    def run(i):
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        # The engine reads and writes memory of these tensors, and belongs to its runtime.
        return found if given is not None and engine is not None else None

    return Replay(run)
