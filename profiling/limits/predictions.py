"""Least cost of the student's convolutions on a GPU, and predicted times of its kernels.

python -m profiling.limits.predictions            # writes profiling/limits/predictions.json, for every preset, batch and dtype

A launch is predicted as LAUNCH + RAMP + the larger of its arithmetic and its traffic; the plan of a network is the chain of
launches whose predictions add up to the least, from the candidates that the engine has (advkd.engines.gpu_search). Every
assumption is a constant here.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from advkd.engines.gpu_search import Limits, all_steps, cheapest
from advkd.models.shape import PRESETS, convolutions
from advkd.ops.gpu_storage import input_channels, padded
from advkd.ops.student_steps import Step
from advkd.runtime.files import write_json

PREDICTIONS = Path(__file__).parent / "predictions.json"
BATCHES = {"paper-256": (1, 8, 64), "pyramid-256": (1, 8, 64), "digits": (1, 64)}
PRODUCTS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float32 with TF32": "tf32"}
"""Arithmetic of a case's dtype; the last is float32 where torch's switches allow TensorFloat-32."""

LAUNCH, RAMP = 1e-6, 2e-6
"""Seconds: of one more node in a CUDA graph, and of a kernel's first loads and last stores, which nothing hides."""
MMA_SYNC = 0.62
"""Share of the Hopper tensor cores' rate that ``mma.sync`` reaches at best; the whole rate is ``wgmma``'s alone."""
KERNEL, TRAFFIC = 0.54, 0.85
"""Share of those rates that our loops keep: of arithmetic, with eight warps a multiprocessor and nothing beside the epilogue,
and of a copy's bytes per second."""
DESCRIPTOR, CUDNN = 0.60, 0.70
"""Share of the whole rate that loops of ``wgmma`` keep: Triton's descriptor variant, and cuDNN's fused graphs."""
CALL = 2.4e-5
"""Seconds of the host for one call of an op in Python."""
PAIR_TILE = 16
"""Side of the tiles of ``conv_pair``: its first convolution is made for 18 x 18 pixels of each 16 x 16."""
CLOCK = 1.7e9
STEM_WEIGHTS, STEM_RECEIVED, STEM_LAYER = 48 * CLOCK, 16 * CLOCK, 900 / CLOCK
"""``student_stem``: bytes per second of weights that a block reads from L2 and of pixels that it gets from the others of its
cluster, and seconds of a barrier with what latency is left in each layer (the assumptions of csrc/cuda/student_stem.cu)."""


@dataclass(frozen=True)
class Device:
    """Rates of a card.

    Attributes:
        name, architecture: as the driver and the compiler name it.
        limits: what plans ask of it.
        flops: dense floating-point operations per second per product.
        bandwidth: bytes per second of a copy, reading and writing.
        source: where the rates come from.
    """

    name: str
    architecture: str
    limits: Limits
    flops: dict
    bandwidth: float
    source: str

    def measured(self, flops, bandwidth):
        """The same card with rates measured on it; ``flops`` per product, those missing stay."""
        return replace(self, flops={**self.flops, **flops}, bandwidth=bandwidth, source="measured on this card")


H200 = Device(
    "NVIDIA H200",
    "sm_90a",
    Limits(132, 227 * 1024, (9, 0)),
    # float32 in full is three products of TensorFloat-32.
    {"bf16": 788e12, "f16": 788e12, "tf32": 394e12, "f32": 394e12 / 3},
    4.3e12,
    "read on such a card: bf16 8192^3 product 788 TFLOP/s, copy 4.3 TB/s; float16 taken as bf16, TF32 as half of it",
)


def itemsize(product):
    """Bytes of a stored element."""
    return 2 if product in ("bf16", "f16") else 4


def pixels(layer):
    """Output pixels of one image."""
    return layer.height * layer.width * (4 if layer.upsample else 1)


def flop(layer, phases=True):
    """Floating-point operations per image; up-sampled convolutions as four phases of 2x2 taps, or as they are defined."""
    taps = 4 if layer.upsample and phases else 9
    return 2 * taps * layer.c_in * layer.c_out * pixels(layer)


def made_flop(layer, image):
    """Those that the kernels make, on channels in whole units; an image's nine taps are columns of one product."""
    columns = padded(9 * layer.c_out) if image else (4 if layer.upsample else 9) * padded(layer.c_out)
    return 2 * input_channels(layer) * columns * pixels(layer)


def weight_bytes(layer, product):
    """Bytes of a layer's weights as its kernels keep them: four phases of four taps, or nine taps."""
    taps = 16 if layer.upsample else 9
    return taps * layer.c_in * layer.c_out * itemsize(product)


def moved_bytes(first, last, product, batch):
    """Bytes of activations that a launch over layers ``first .. last`` must read and write."""
    read = first.height * first.width * first.c_in
    return batch * (read + pixels(last) * last.c_out) * itemsize(product)


def floor(layers, product, batch, device):
    """No engine is faster: seconds of the phase count at the peak rate, or of latents, weights and images at a copy's speed."""
    work = batch * sum(map(flop, layers))
    moved = moved_bytes(layers[0], layers[-1], product, batch) + sum(weight_bytes(i, product) for i in layers)
    return {
        "flop": work,
        "bytes": moved,
        "seconds": max(work / device.flops[product], moved / device.bandwidth),
        "peak_flops": device.flops[product],
        "bandwidth": device.bandwidth,
        "rates": device.source,
    }


def layer_roofline(layer, product, batch, device):
    """Seconds of one layer alone at the card's rates: its arithmetic, or its activations and weights through memory."""
    moved = moved_bytes(layer, layer, product, batch) + weight_bytes(layer, product)
    return max(batch * flop(layer) / device.flops[product], moved / device.bandwidth)


def predict_step(step, layers, product, batch, device):
    """Seconds that a launch is predicted to take (see the constants of this module)."""
    own = layers[step.first : step.first + step.count]
    if step.kernel == "stem":
        return LAUNCH + RAMP + _stem(step, own, product, batch, device)
    if step.kernel == "triton_descriptor":
        return _bound(_descriptor(step, own[0], product, batch, device), own, product, batch, device)
    images = [step.first + i == len(layers) - 1 for i in range(step.count)]
    work = [made_flop(*pair) for pair in zip(own, images)]
    if step.kernel == "pair":
        tile = min(PAIR_TILE, own[1].height)
        work[0] *= ((tile + 2) / tile) ** 2
    rate = device.flops[product] * KERNEL * _instruction(device) * _filled(own[-1], batch, device)
    return _bound(batch * sum(work) / rate, own, product, batch, device)


def _bound(arithmetic, own, product, batch, device):
    """Seconds of a launch over layers whose products take so long."""
    moved = moved_bytes(own[0], own[-1], product, batch) + sum(weight_bytes(i, product) for i in own)
    return LAUNCH + RAMP + max(arithmetic, moved / (device.bandwidth * TRAFFIC))


def _descriptor(step, layer, product, batch, device):
    """Seconds of the descriptor variant's products: whole tiles, in whole rounds of one tile a multiprocessor."""
    rows, columns, channels = step.config[:3]
    tiles = batch * -(-layer.height // rows) * -(-layer.width // columns) * -(-padded(layer.c_out) // channels)
    phases, taps = (4, 4) if layer.upsample else (1, 9)
    rounds = -(-phases * tiles // device.limits.multiprocessors)
    work = 2 * taps * input_channels(layer) * rows * columns * channels
    return rounds * work * device.limits.multiprocessors / (device.flops[product] * DESCRIPTOR)


def cudnn_graphs(layers, product, batch, device):
    """Microseconds of a network as one fused graph of cuDNN a layer, up-sampling folded by hand; None for float32."""
    if itemsize(product) != 2:
        return None
    shares = (device.flops[product] * CUDNN * _filled(layer, batch, device) for layer in layers)
    seconds = sum(_bound(batch * flop(i) / share, [i], product, batch, device) for i, share in zip(layers, shares))
    return _short(1e6 * seconds)


STEP_CASES = {
    "deterministic, float32": 3 * 4,
    "deterministic, bfloat16": 3 * 2,
    "with noise, float32": 3 * 4,
    "pooled by 4, float32": 3 * 4 + 4 / 16,
}
"""Cases of the sampler's step with the bytes of an element that a call must move."""
STEP_ELEMENTS = 64 * 3 * 256 * 256


def predict_step_of_the_sampler(bytes_of_element, device=H200):
    """Microseconds of a captured step, of a call of Python, and of a copy that moves as many bytes."""
    moved = STEP_ELEMENTS * bytes_of_element
    captured = LAUNCH + RAMP + moved / (device.bandwidth * TRAFFIC)
    figures = {"captured": captured, "call": max(CALL, captured), "floor": moved / device.bandwidth}
    return {name: _short(1e6 * seconds) for name, seconds in figures.items()}


def _instruction(device):
    return MMA_SYNC if device.limits.capability >= (9, 0) else 1.0


def _filled(layer, batch, device):
    """Share of the multiprocessors that work: blocks of 128 pixels x 64 channels, in whole rounds."""
    blocks = -(-batch * pixels(layer) // 128) * -(-padded(layer.c_out) // 64)
    rounds = -(-blocks // device.limits.multiprocessors)
    return blocks / (rounds * device.limits.multiprocessors)


def _stem(step, own, product, batch, device):
    """Clusters of so many blocks take so many images each, as the step's configuration says; a layer ends in a barrier."""
    blocks, images = step.config
    clusters = -(-batch // images)
    rounds = -(-clusters * blocks // device.limits.multiprocessors)
    rate = device.flops[product] * KERNEL * _instruction(device) * blocks / device.limits.multiprocessors
    seconds = 0.0
    for layer in own:
        # A block owns whole units of 16 output channels: the largest share is what the others wait for.
        share = -(-padded(layer.c_out) // 16 // blocks) * 16 / padded(layer.c_out)
        arithmetic = images * made_flop(layer, False) * share * blocks / rate
        received = images * layer.height * layer.width * layer.c_in * itemsize(product) * (blocks - 1) / blocks
        seconds += max(arithmetic, weight_bytes(layer, product) * share / STEM_WEIGHTS) + received / STEM_RECEIVED + STEM_LAYER
    return rounds * seconds


def planned(layers, product, batch, device, descriptors=False):
    """The chain of launches with the least prediction, from the engine's kernels in CUDA C++, or also Triton's descriptors."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(product, torch.float32)
    engine = SimpleNamespace(layers=layers, product=product, dtype=dtype, limits=device.limits, backend="cuda")
    candidates = all_steps(engine, batch, ("cuda", "triton") if descriptors else ("cuda",), tune=True)
    candidates = [step for step in candidates if step.kernel == "triton_descriptor" or not step.kernel.startswith("triton")]
    return cheapest(len(layers), candidates, lambda step: predict_step(step, layers, product, batch, device))


def predict(preset, batch, dtype, device=H200, steps=None):
    """A network's prediction, as JSON values; ``steps``: a plan that is there (default: the best by this model)."""
    layers, product = convolutions(PRESETS[preset]), PRODUCTS[dtype]
    steps = steps or planned(layers, product, batch, device)
    rows = []
    for step in steps:
        own = layers[step.first : step.first + step.count]
        seconds = predict_step(step, layers, product, batch, device)
        moved = moved_bytes(own[0], own[-1], product, batch) + sum(weight_bytes(i, product) for i in own)
        work = batch * sum(map(flop, own))
        least = max(work / device.flops[product], moved / device.bandwidth)
        figures = {"intensity": work / moved, "microseconds": 1e6 * seconds, "of_roofline": least / seconds}
        rows.append(
            {
                **asdict(step),
                "config": list(step.config),
                "flop": work,
                "bytes": moved,
                **{k: _short(value) for k, value in figures.items()},
            }
        )
    return {
        "preset": preset,
        "batch": batch,
        "dtype": dtype,
        "launches": len(rows),
        "microseconds": _short(sum(row["microseconds"] for row in rows)),
        "cudnn_graph_microseconds": cudnn_graphs(layers, product, batch, device),
        "floor": floor(layers, product, batch, device),
        "roofline_microseconds": _short(1e6 * sum(layer_roofline(i, product, batch, device) for i in layers)),
        "steps": rows,
    }


def _short(value):
    """A prediction has no more digits."""
    return float(f"{value:.4g}")


def layer_name(layer):
    """A layer in a few words."""
    side = f"up to {2 * layer.height}" if layer.upsample else f"at {layer.height}"
    return f"{layer.c_in} to {layer.c_out}, {side}"


def stored_steps(prediction):
    """The plan of a stored prediction."""
    return [Step(row["kernel"], row["first"], row["count"], tuple(row["config"])) for row in prediction["steps"]]


def assumptions(device=H200):
    """Assumptions of the predictions, for their JSON."""
    names = (
        "LAUNCH",
        "RAMP",
        "MMA_SYNC",
        "KERNEL",
        "DESCRIPTOR",
        "CUDNN",
        "CALL",
        "TRAFFIC",
        "PAIR_TILE",
        "CLOCK",
        "STEM_WEIGHTS",
        "STEM_RECEIVED",
        "STEM_LAYER",
    )
    constants = {name.lower(): globals()[name] for name in names}
    flops = dict(device.flops)
    return {"device": device.name, "flops": flops, "bandwidth": device.bandwidth, "rates": device.source, **constants}


def read_predictions(path=PREDICTIONS, kind="predictions"):
    """The stored predictions by ``preset, batch N, dtype``; none where there is no file.

    ``kind``: ``predictions``, of the kernels in CUDA C++, or ``descriptors``, with Triton's descriptor variant among them.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())[kind]
    return {case_name(p["preset"], p["batch"], p["dtype"]): p for p in found}


def predicted_microseconds(preset, batch, dtype):
    """The stored prediction of a case or None; float16 is predicted as bfloat16."""
    known = read_predictions().get(case_name(preset, batch, "bfloat16" if dtype == "float16" else dtype))
    return known and known["microseconds"]


def case_name(preset, batch, dtype):
    """Name of a student's case, the same everywhere."""
    return f"{preset}, batch {batch}, {dtype}"


def main():
    dtypes = [dtype for dtype in PRODUCTS if dtype != "float16"]
    cases = [(p, n, dtype) for p, batches in BATCHES.items() for n in batches for dtype in dtypes]
    found = {"assumptions": assumptions(), "kind": "prediction, not a measurement"}
    found["predictions"] = [predict(*case) for case in cases]
    found["descriptors"] = [_with_descriptors(*case) for case in cases if case[2] == "bfloat16"]
    found["sampler_step"] = {name: predict_step_of_the_sampler(element) for name, element in STEP_CASES.items()}
    write_json(PREDICTIONS, found)
    for kind in ("predictions", "descriptors"):
        for name, p in read_predictions(kind=kind).items():
            print(f"{kind:12} {name:40} {p['launches']:3} launches {p['microseconds']:10.1f} us")


def _with_descriptors(preset, batch, dtype, device=H200):
    steps = planned(convolutions(PRESETS[preset]), PRODUCTS[dtype], batch, device, descriptors=True)
    return predict(preset, batch, dtype, device, steps)


if __name__ == "__main__":
    main()
