"""Random calls of the public functions: the reference's answer, or a refusal that names an argument.

    python -m profiling.limits.calls --count 100000 --seed 0

Case i draws a function, arguments in odd layouts (in seven cases of ten all fit, in the others one or more need not), and a way
to call it. An answer is right if dtype, shape and every number are those of code of its own, to what rounding allows, if
``out`` is the tensor that was given, and if nothing else was written. Arguments that fit are refused only where a backend or a
derivative is missing, others by an error that names them. Cases run in forked processes, so that one that ends its process or
hangs is a finding and not the end.
"""

import contextlib
import functools
import math
import os
import re
import sys
import tempfile
import traceback
import warnings
from copy import deepcopy
from pathlib import Path

import torch

from advkd.data.images import load_images
from advkd.errors import BackendUnavailableError, InputError

from . import call_measures, call_ops, call_oracles, call_steps, call_students, call_systems
from .call import Wrong, equal_bits, flat, mapped, narrow, plain_number
from .call_modes import MODES, QUOTAS, SHARES, has_meaning
from .draw import Draw, spoiled
from .record import GOOD, judge_in_processes, main

CALLS = {
    call_ops.mask_mul: 2.0,
    call_ops.conv_bias_act_mask: 2.0,
    call_ops.conv_block: 2.0,
    call_ops.interpolate: 2.0,
    call_ops.penalty_reduce: 2.0,
    call_ops.norm_act: 2.5,
    call_ops.image_gradient: 1.5,
    call_ops.gradient_penalty: 1.0,
    call_steps.philox_words: 1.0,
    call_steps.philox_normal: 1.0,
    call_steps.philox_uniform: 0.5,
    call_steps.sampler_step: 3.0,
    call_steps.coefficient_table: 0.3,
    call_steps.step_coefficients: 0.3,
    call_students.fused_student: 2.0,
    call_students.forward_of_student: 0.7,
    call_students.latents_of_student: 0.7,
    call_students.sample_of_student: 0.5,
    call_students.stream_of_student: 0.4,
    call_students.save_and_load: 0.2,
    call_systems.project: 0.7,
    call_systems.sample_again: 0.7,
    call_systems.scheduler_step: 3.0,
    call_measures.measure: 1.0,
    call_systems.images: 0.05,
    call_systems.in_place: 0.3,
}
"""How to draw a call -> how often."""

BATCH = 2000
"""Cases of a process."""
PATIENCE = 90
"""Seconds until a case hangs."""
MEMORY = 6 * 2**30
"""Bytes that a case may take: expanded tensors have billions of elements, and none may be copied."""
TORCH_REFUSES = (
    r"has no gradient",
    r"Batching rule not implemented for advkd::\w+",
    r"In order to use an autograd.Function with functorch transforms",
    r"must implement the jvp function for custom autograd.Function",
    r"^vmap: ",
    r"inside of vmap",
    r"Inference tensors cannot be saved for backward",
    r"aten\.nonzero",
    r"aten\._local_scalar_dense",
)
"""Refusals of a derivative or a transform that does not exist: our own words, and torch's where it is asked first."""
TRANSFORMS = ("gradient", "func.grad", "func.jvp", "forward mode", "vmap", "fake")
NO_MEMORY = r"DefaultCPUAllocator: can't allocate memory|aten::new_empty"
"""The words of torch for more numbers than any memory holds."""
DIFFUSERS_REFUSES = r"^Passing integer indices .* as timesteps"
"""The one refusal that is diffusers' own."""


def case(seed, number):
    """Case ``number``: ``(call, mode, name of the spoilt argument or None, draw)``."""
    draw = Draw(seed, number)
    if mode := next((mode for mode, every in QUOTAS.items() if number % every == every - 1), None):
        return _with_meaning(draw, mode), mode, None, draw
    call, name = _call(draw), None
    if draw.chance(0.25) and "whole" not in call.options:
        name = draw.choice(list(call.arguments))
        _spoil(draw, call, name)
    drawn = name is None or draw.chance(0.2)
    mode = draw.choices(list(MODES), [SHARES.get(mode, 1.0) for mode in MODES])[0] if drawn else "plain"
    return call, mode, name, draw


def _call(draw):
    return draw.choices(list(CALLS), list(CALLS.values()))[0](draw)


def _with_meaning(draw, mode):
    """A call of which every argument fits, and for which a mode has a meaning."""
    while True:
        call = _call(draw)
        if not call.spoilt and has_meaning(mode, call) and call.arguments.get("backend") not in ("cuda", "triton"):
            return call


def _spoil(draw, call, name):
    call.spoil(name).arguments[name] = spoiled(draw, call.arguments[name])
    if name == "denoiser" and callable(call.arguments[name]):
        call.arguments[name] = None
    if call.name == "norm_act" and name == "training":
        call.written = ("running_mean", "running_var")


def judge(call, mode, draw):
    """``(outcome, detail, mode)`` of a call; a mode that has no meaning for it is the plain one."""
    mode = mode if has_meaning(mode, call) else "plain"
    before = {name: mapped(_kept, value) for name, value in call.arguments.items()}
    try:
        found = MODES[mode](call, draw)
    except Wrong as error:
        return "wrong", str(error), mode
    except Exception as error:
        return *_refusal(call, mode, error), mode
    return *_answer(call, before, found, call.options.get(mode, 1)), mode


def _kept(tensor):
    """A copy; of a tensor that is far larger than its memory, itself."""
    return tensor if tensor.numel() > 2**24 or tensor.is_meta else tensor.detach().clone()


def _refusal(call, mode, error):
    text = str(error)
    if _is_clear(call, mode, error, text):
        return "refused", text
    first = text.splitlines()[0] if text else ""
    if isinstance(error, (InputError, BackendUnavailableError)):
        fault = "a refusal that names no argument that is wrong" if call.spoilt else "a valid call is refused"
        return "wrong", f"{fault}: {first}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "crashed", f"{type(error).__name__} in {Path(last.filename).name}, {last.name}: {first}"


def _is_clear(call, mode, error, text):
    """True for a refusal that is due, and that names what it is about."""
    if mode in TRANSFORMS and any(re.search(words, text) for words in TORCH_REFUSES):
        return True
    if isinstance(error, BackendUnavailableError):
        wish = call.arguments.get("backend")
        on_meta = " on meta: " in text and (mode in ("meta", "fake") or call.spoilt)
        return bool(wish in ("cuda", "triton") or on_meta or "backend" in call.spoilt)
    if not call.spoilt:
        return False
    if isinstance(error, InputError):
        return any(_names(call, name, text) for spoilt in call.spoilt for name in call.may_be_named(spoilt))
    # Numbers without an end have no memory anywhere.
    return bool(re.search(NO_MEMORY, text)) or isinstance(error, ValueError) and bool(re.search(DIFFUSERS_REFUSES, text))


_BEFORE = r"(?:^|^the |^--|['\"`]|\b(?:and|or|for|like|of|noise's) |, )"
_SINGLE = r"(?='s|[:,'\"`]| \(| (?:must|is|has|holds|and|or|are)\b|$)"
"""The words behind a name of one letter, which may be an article elsewhere."""


def _names(call, name, text):
    """True if a message names an argument: at its beginning, quoted or in a list, not anywhere."""
    # A critic's layers are named, too; messages on a folder name the command line's option.
    if call.name == "gradient_penalty" and name == "critic" and text.startswith(("layer ", "the critic")):
        return True
    if name == "source" and text.startswith(call.options.get("option", "source")):
        return True
    behind = _SINGLE if len(name) == 1 else r"\b"
    return bool(re.search(f"{_BEFORE}{re.escape(name)}{behind}", text))


def _answer(call, before, found, loose):
    for name, value in call.arguments.items():
        if name not in call.written and not _aliased(call, name) and not _same_bits(value, before[name]):
            return "wrong", f"{name} was written"
    try:
        with torch.no_grad():
            wide, wanted, same, bounds = _expected(call, before)
    except Exception as error:
        return "wrong", f"an answer where the reference has none: {error!r}"[:500]
    found = flat(found)
    if [(t.shape, t.dtype, t.device) for t in found] != [(t.shape, t.dtype, t.device) for t in same]:
        return "wrong", f"{[(t.shape, t.dtype) for t in found]} instead of {[(t.shape, t.dtype) for t in same]}"
    if any(t.is_meta for t in found):
        return "right", ""
    for ours, right, alike, bound in zip(found, wanted, same, bounds, strict=True):
        if detail := _off(ours, right, alike, bound if bound is None else loose * bound, call.same is not None):
            return "wrong", detail
    detail = _not_received(call, found) or _not_moved(call, wide)
    if detail is None and call.check and loose == 1:
        detail = call.check(found, wide, wanted, same)
    return ("wrong", detail) if detail else ("right", "")


def _not_received(call, found):
    """The fault of results that were to go into ``out`` and are not there, or None."""
    out = call.arguments.get("out")
    tensors = out if type(out) in (list, tuple) else (out,)
    for tensor, place in zip(tensors, call.received):
        if tensor is not None and found[place] is not tensor:
            return "a result is not in out"
    return None


def _not_moved(call, wide):
    """The fault of what was to be written into arguments, or None."""
    if call.after is None:
        return None
    for name, (wanted, bound) in call.after(wide).items():
        found = call.arguments[name]
        if detail := _off(found, wanted, wanted, bound + 4 * narrow(found.dtype) * wanted.abs(), True):
            return f"{name} afterwards: {detail}"
    return None


def _aliased(call, name):
    """True if an argument lies in the memory of one that is written."""
    value = call.arguments[name]
    written = (call.arguments.get(other) for other in call.written)
    receivers = [t for other in written for t in (other if type(other) in (list, tuple) else (other,))]
    tensors = (t for t in receivers if isinstance(t, torch.Tensor))
    return isinstance(value, torch.Tensor) and any(_storage(value) == _storage(tensor) for tensor in tensors)


def _storage(tensor):
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


def _same_bits(value, before):
    if type(value) in (list, tuple):
        return all(map(_same_bits, value, before))
    if not isinstance(value, torch.Tensor) or value is before or value.layout != torch.strided or value.is_meta:
        return True
    return value.is_nested or value.is_quantized or bool(equal_bits(value, before).all())


def _expected(call, before):
    """Arguments in float64, their results, those of the arguments as they are, and how far off ours may be (None: bits)."""
    before = {name: value if name == "seed" else plain_number(value) for name, value in before.items()}
    wide = {name: mapped(lambda t: t.double() if t.is_floating_point() else t, value) for name, value in before.items()}
    if call.name == "gradient_penalty":
        wide["critic"] = deepcopy(before["critic"]).double()
    reference = call_ops.norm_act_reference if call.name == "norm_act" else call.reference
    same = flat((call.same or reference)(before))
    if call.bound is None:
        return wide, same, same, [None] * len(same)
    with contextlib.nullcontext() if call.name != "gradient_penalty" else torch.enable_grad():
        wanted = flat((call.oracle or reference)(wide))
    wanted = [t.detach().double() for t in wanted]
    return wide, wanted, same, call.bound(wide, wanted, same)


def _off(ours, right, alike, bound, is_independent):
    """The fault of a result, or None; ``is_independent``: ``alike`` comes from other code than the one under test."""
    if bound is None:
        equal = equal_bits(ours, alike)
        return None if bool(equal.all()) else f"other bits than the reference: {_sample(ours, alike, ~equal)}"
    dtype, ours, alike, bound = ours.dtype, ours.detach().double(), alike.double(), bound.double()
    # The dtype may overflow where float64 does not.
    equal = equal_bits(ours, right) | equal_bits(ours, right.to(dtype).double())
    allowed = bound
    if is_independent:
        equal |= equal_bits(ours, alike)
        allowed = bound + (alike - right).abs().nan_to_num(nan=math.inf)
    # A bound that is not finite says that anything may come.
    fine = equal | ((ours - right).abs() <= allowed) | ~bound.isfinite()
    return (
        None
        if bool(fine.all())
        else f"off by more than rounding: {_sample(ours, right, ~fine)}, bound {bound[~fine][:3].tolist()}"
    )


def _sample(ours, right, where):
    places = where.nonzero()[:3].tolist()
    return f"{ours[where][:3].tolist()} instead of {right[where][:3].tolist()} at {places} of {list(where.shape)}"


def run(campaign, cases):
    """Judge the cases in forked processes, a batch in each."""
    warnings.filterwarnings("ignore")
    _warm()
    # Here, as a process that dies removes nothing. Names of folders that cases draw may be anything.
    with tempfile.TemporaryDirectory(prefix="advkd-calls-", ignore_cleanup_errors=True) as folder:
        judged = functools.partial(_judged, campaign.seed, folder)
        judge_in_processes(campaign, cases, judged, BATCH, PATIENCE, MEMORY, threaded=True)


def _warm():
    """Import modules and build engines, so that no process must do so itself."""
    from torchmetrics.image.kid import poly_mmd  # noqa: F401

    load_images("digits")
    call_oracles.table_of_digits()
    for i in range(len(call_students.CONFIGS)):
        call_students.exact(i)
        for backend, dtype in call_students.ENGINES:
            call_students.engine(i, backend, dtype)


def _judged(seed, folder, number):
    """What is known of a case, in a process that has no error output and works in a folder of the campaign's."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    tempfile.tempdir = folder
    os.chdir(folder)
    yield {"kind": "a draw", "mode": "plain"}
    call, mode, _, draw = case(seed, number)
    yield {"kind": call.name, "mode": mode}
    outcome, detail, mode = judge(call, mode, draw)
    spoilt = f", {' and '.join(call.spoilt)} spoilt" if call.spoilt else ""
    detail = f"{mode}{spoilt}: {detail}" if outcome not in GOOD else ""
    yield {"kind": call.name, "mode": mode, "outcome": outcome, "detail": detail}


if __name__ == "__main__":
    sys.exit(main("calls", __doc__.split("\n")[0], run, 100_000))
