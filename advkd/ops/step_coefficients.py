"""The coefficients of sampler steps: a step's scalars, and the tables that :mod:`advkd.ops.sampler_step` reads."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from .arguments import device as known_device
from .arguments import flag, real

COEFFICIENTS = ("k_x", "k_m", "clip", "c_0", "c_x", "c_m", "c_h", "c_z")
"""Columns of a table of plain steps."""
EXTENDED_COEFFICIENTS = (*COEFFICIENTS, "c_g", "s_0", "s_x", "s_m")
"""Columns of a table with steps that have a second history or another stored output."""


@dataclass(frozen=True)
class StepCoefficients:
    """The scalars of one step (float64 values; the kernels round them to float32).

    x0 = clamp(k_x x + k_m m, -clip, clip); x_next = c_0 x0 + c_x x + c_m m + c_h x0_prev + c_g history + c_z z;
    stored = s_0 x0 + s_x x + s_m m, with m the network's output, x0_prev and history tensors that earlier steps stored, and z
    standard normal noise. Numbers of other types are kept as floats.

    Attributes:
        k_x: weight of the state in x0.
        k_m: weight of the network's output in x0.
        c_0: weight of the clamped x0 in the next state.
        c_x: weight of the state in the next state.
        c_m: weight of the network's output in the next state.
        c_h: weight of ``previous_x0`` in the next state (multistep samplers).
        c_z: weight of the noise in the next state: its standard deviation.
        clip: x0 is clamped to [-clip, clip]; infinity for no clipping.
        c_g: weight of ``history`` in the next state (multistep samplers of the third order, correctors).
        s_0: weight of the clamped x0 in what is stored.
        s_x: weight of the state in what is stored; with ``s_m`` for samplers whose history is eps, or x0 before it is clamped.
        s_m: weight of the network's output in what is stored.

    Raises:
        InputError: a value that is no number, a tensor by which a derivative is wanted, or a negative ``clip``.

    Examples:
        >>> StepCoefficients(k_x=2.0, k_m=-1.0, c_0=0.5, c_x=0.5, clip=1.0).c_z
        0.0
    """

    k_x: float
    k_m: float
    c_0: float
    c_x: float = 0.0
    c_m: float = 0.0
    c_h: float = 0.0
    c_z: float = 0.0
    clip: float = math.inf
    c_g: float = 0.0
    s_0: float = 1.0
    s_x: float = 0.0
    s_m: float = 0.0

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if type(value) is not float:
                object.__setattr__(self, name, real(name, value))
        if not self.clip >= 0:
            raise InputError(f"clip must not be negative, got {self.clip}")

    @property
    def extended(self) -> bool:
        """True if the step has a second history or stores something else than x0; its row then has 12 columns, else 8."""
        return self.c_g != 0 or (self.s_0, self.s_x, self.s_m) != (1, 0, 0)

    def row(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The table of this step alone on ``device``, kept: a loop over the same steps copies nothing the second time.

        Args:
            device: where the table lies.
            dtype: of the table: float32, or float64 for float64 states.

        Returns:
            ``(1, 8)``, columns :data:`COEFFICIENTS`, or ``(1, 12)``, :data:`EXTENDED_COEFFICIENTS`, of an extended step; later
            calls return the same tensor, which is not to be written to.
        """
        rows = self.__dict__.setdefault("_rows", {})
        row = rows.get((device, dtype))
        if row is None:
            with torch.inference_mode(False):
                row = coefficient_table((self,), device, dtype)
            if type(row) is torch.Tensor:  # a tracer makes others
                rows[device, dtype] = row
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}


def coefficient_table(
    steps: Iterable[StepCoefficients],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    extended: bool | None = None,
) -> torch.Tensor:
    """Table of the coefficients of several steps, a row each.

    A loop on a GPU passes a row of it (``table[i]``) to :func:`~advkd.ops.sampler_step`, and a captured CUDA graph must:
    nothing is then copied to the device.

    Args:
        steps: a :class:`StepCoefficients` for each row.
        device: where the table is to lie: the states' device.
        dtype: floating-point; :func:`~advkd.ops.sampler_step` takes float32, or float64 for float64 states.
        extended: whether rows have the 12 columns :data:`EXTENDED_COEFFICIENTS` rather than the 8 of :data:`COEFFICIENTS`; None
            for 12 where a step is extended. With 8 columns the kernels load and compute less.

    Returns:
        ``(len(steps), 8)`` or ``(len(steps), 12)`` in ``dtype`` on ``device``.

    Raises:
        InputError: ``steps`` that are none, a dtype that is not floating-point, an unknown device, or an ``extended`` that is
            no flag, or is False though a step is extended.

    Examples:
        >>> coefficient_table([StepCoefficients(k_x=1.0, k_m=-0.5, c_0=1.0)]).tolist()
        [[1.0, -0.5, inf, 1.0, 0.0, 0.0, 0.0, 0.0]]
    """
    try:
        steps = tuple(steps)
    except TypeError:
        raise InputError(f"steps must be a sequence of StepCoefficients, got {steps!r}") from None
    if not all(isinstance(step, StepCoefficients) for step in steps):
        raise InputError(f"steps must be a sequence of StepCoefficients, got {steps!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point dtype, got {dtype!r}")
    device = known_device("device", device)
    names = _columns(steps, extended)
    rows = [[getattr(step, name) for name in names] for step in steps]
    return torch.tensor(rows, dtype=dtype, device="cpu").reshape(len(rows), len(names)).to(device)


def _columns(steps, extended):
    """The names of a table's columns."""
    needed = next((i for i, step in enumerate(steps) if step.extended), None)
    wide = needed is not None if extended is None else flag("extended", extended)
    if needed is not None and not wide:
        raise InputError(f"extended must not be False: step {needed} has a second history or stores something else than x0")
    return EXTENDED_COEFFICIENTS if wide else COEFFICIENTS
