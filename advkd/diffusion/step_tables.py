"""Tables of a schedule's coefficients, and evidence that their sources, or tensors of a run, have not changed."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..errors import InputError
from ..ops import StepCoefficients, coefficient_table

VARIANTS = 16
"""Tables that a scheduler keeps at once: DDIM has one per eta."""


class Table:
    """The steps of a schedule by key: :class:`StepCoefficients`, or the reason why there are none."""

    def __init__(self, keys: Sequence[Hashable], coefficients: Callable[[Hashable], StepCoefficients]):
        self.steps = [or_reason(coefficients, key) for key in keys]
        self.positions = {key: position for position, key in enumerate(keys)}
        self._rows: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, ...]] = {}

    def __getitem__(self, key: Hashable) -> StepCoefficients | str:
        return self.steps[self.positions[key]]

    def row(self, key: Hashable, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The step's row on ``device``; the first call for a device copies the whole table there."""
        rows = self._rows.get((device, dtype))
        if rows is None:
            steps = [StepCoefficients(0.0, 0.0, 0.0) if isinstance(step, str) else step for step in self.steps]
            # The first step may run in inference mode, a later one outside of it.
            with torch.inference_mode(False):
                rows = coefficient_table(steps, device, dtype).unbind(0)
            if all(type(row) is torch.Tensor for row in rows):  # not what a tracer makes
                self._rows[device, dtype] = rows
        return rows[self.positions[key]]


def or_reason(coefficients: Callable[[Hashable], StepCoefficients], key: Hashable) -> StepCoefficients | str:
    """The coefficients of one step, or the reason why there are none."""
    try:
        return coefficients(key)
    except InputError as error:
        return str(error)


def remembered(source: object) -> object:
    """Evidence of a later change of ``source``: a copy of a CPU tensor; another tensor and its count of changes; itself."""
    if not isinstance(source, torch.Tensor):
        return source
    if source.device.type == "cpu":
        return source.detach().clone()
    return source, _version(source)


def unchanged(kept: object, source: object) -> bool:
    """True if ``source`` is as it was when :func:`remembered` gave ``kept``."""
    if not isinstance(source, torch.Tensor):
        return kept is source
    if source.device.type != "cpu":
        return isinstance(kept, tuple) and kept[0] is source and kept[1] == _version(source)
    return isinstance(kept, torch.Tensor) and kept.dtype == source.dtype and torch.equal(kept, source)


class Handed:
    """A tensor that the caller holds, too, and evidence of the caller's writes to it.

    Writes that PyTorch does not count (through ``.data`` or a numpy view) are not seen. Tensors made in inference mode have no
    count: they are never taken for untouched. :func:`handed_in` copies them, and :func:`counted` makes others.

    Attributes:
        tensor: the tensor; None in a copy of one that was written to.
    """

    def __init__(self, tensor: torch.Tensor | None):
        self.tensor = tensor
        self._version = None if tensor is None else _version(tensor)

    def untouched(self) -> bool:
        """True if nothing was written to the tensor."""
        return self._version is not None and self._version == _version(self.tensor)

    def is_still(self, tensor: torch.Tensor) -> bool:
        """True if ``tensor`` is this very tensor, and nothing was written to it."""
        return tensor is self.tensor and self.untouched()

    def __reduce__(self) -> tuple:
        # A copy of a tensor counts its writes anew.
        return type(self), (self.tensor if self.untouched() else None,)


def handed_in(tensor: torch.Tensor) -> Handed:
    """A tensor that the caller made; a copy of it where it does not count writes."""
    with counted():
        return Handed(tensor.clone() if tensor.is_inference() else tensor)


@contextmanager
def counted() -> Iterator[None]:
    """Tensors made within count writes to them, in inference mode, too."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _version(tensor):
    return None if tensor.is_inference() else tensor._version
