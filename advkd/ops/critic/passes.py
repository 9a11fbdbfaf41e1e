"""The passes of a gradient penalty through a critic of piecewise-linear layers.

For convolutions and linear maps W_l with biases b_l and LeakyReLU (masks M_l: 1 where the pre-activation is positive, else the
slope) they are
    forward:  p_l = W_l a_{l-1} + b_l, a_l = M_l p_l      backward: d_{l-1} = M_{l-1} (W_l^T d_l)
    tangent:  u_l = M_l (W_l u_{l-1})                     weights:  dP/dW_l = weight gradient of layer l from (u_{l-1}, d_l)
Between them stand linear maps without parameters (reshaping, pooling, up-sampling, sums, concatenation), which have an adjoint.
Nothing is differentiated twice, and what the penalty keeps of an activation is its sign.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InputError
from ..conv_bias_act_mask import bias_act_mask
from ..layout import channels_last, dense, memory_format
from ..mask_mul import mask_mul
from .layers import ADVICE, CONDITION, IMAGE, Plan
from .maps import BATCH_DIMS, MAPS, convolution, narrow_image_gradient, transposed_convolution

aten = torch.ops.aten


class Passes:
    """The passes of one batch. Everything is per layer or per value of ``plan``.

    Args:
        plan: a :class:`advkd.ops.critic.layers.Plan`.
        options: :func:`advkd.ops.critic.maps.layer_options` of it.
        weights: per layer (weight, bias), None where it has none, in the dtype of the passes.
        trained: per layer, True for the weight and for the bias whose gradient is wanted.
        backend: of the kernels between the convolutions.

    Attributes:
        values: results of the layers in the forward pass; None once they are no longer needed.
        masks: signs of the pre-activations, of the layers that are activations.
        gradients: d, the score's gradient by a layer's result, of the layers whose weights are trained.
    """

    def __init__(
        self,
        plan: Plan,
        options: Sequence[tuple],
        weights: Sequence[tuple],
        trained: Sequence[tuple[bool, bool]],
        backend: str,
    ):
        self.plan, self.options, self.weights, self.trained, self.backend = plan, options, weights, trained, backend
        count = len(plan.layers)
        self.values: list[Any] = [None] * (count + 2)
        self.shapes: list[Any] = [None] * (count + 2)
        self.formats: list[Any] = [None] * (count + 2)
        self.masks: list[Any] = [None] * count
        self.gradients: list[Any] = [None] * count
        self.above = _trained_above(plan, trained)
        self.below = _trained_below(plan, trained)
        # A compiler copies a tensor that a call both reads and writes; with a separate output it copies nothing.
        self.in_place = not torch.compiler.is_compiling()
        self.weight_inputs = {layer.inputs[0] for layer, own in zip(plan.layers, trained) if own[0]}
        self.activated = {layer.inputs[0] for layer in plan.layers if layer.kind == "activation"}
        self.image_beside = _image_beside(plan, self.above)

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None, keep: bool) -> torch.Tensor:
        """The critic's scores. ``keep``: the inputs of trained layers stay in ``values``."""
        # oneDNN needs no reordering in channels_last; on a GPU the layout is the caller's.
        x = channels_last(x) if x.device.type == "cpu" else dense(x)
        values, left = self.values, list(self.plan.uses)
        values[IMAGE], values[CONDITION] = x, condition
        self._note(IMAGE, x)
        if condition is not None:
            self._note(CONDITION, condition)
        for i, layer in enumerate(self.plan.layers):
            inputs = [values[n] for n in layer.inputs]
            self._check(i, layer, inputs)
            y = self._forward(i, layer, inputs)
            if y.shape[:1] != x.shape[:1]:
                raise InputError(f"{layer.name} makes {tuple(y.shape)} of {x.shape[0]} samples: {ADVICE}")
            values[i + 2] = y
            self._note(i + 2, y)
            for n in layer.inputs:
                left[n] -= 1
                if left[n] == 0 and not (keep and n in self.weight_inputs):
                    values[n] = None
        scores, values[self.plan.output] = values[self.plan.output], None
        return scores

    def _note(self, n, value):
        self.shapes[n], self.formats[n] = value.shape[1:], memory_format(value)

    @staticmethod
    def _check_joined(layer, shapes):
        """Refuse values that do not fit each other, one of which may be made of the condition."""
        found = " and ".join(str(tuple(shape)) for shape in shapes)
        if len({len(shape) for shape in shapes}) > 1:
            raise InputError(f"{layer.name} joins {found}, of different numbers of dimensions: {ADVICE}")
        if layer.kind == "sum":
            fit = all(len({*along} - {1}) < 2 for along in zip(*shapes))
        else:
            fit = len({(shape[0], *shape[2:]) for shape in shapes}) == 1
        if not fit:
            raise InputError(f"{layer.name} joins {found}, which do not fit each other: give an image and condition that do")

    @staticmethod
    def _check_sides(layer, sides, kernel, stride, padding, dilation):
        reach = [q * (k - 1) + 1 - 2 * p for k, p, q in zip(kernel, padding, dilation)]
        if any(side < least for side, least in zip(sides, reach)):
            raise InputError(f"{layer.name} has a kernel of {tuple(kernel)} pixels, got {tuple(sides)} of them")

    def _check(self, i, layer, inputs):
        """Refuse shapes that do not fit a layer, and dimensions of a map that are the batch's."""
        x = inputs[0]
        if layer.kind in ("convolution", "linear"):
            axis, groups = (1, self.options[i][3]) if layer.kind == "convolution" else (-1, 1)
            wanted = self.weights[i][0].shape[1] * groups
            if x.ndim < 2 or x.shape[axis] != wanted:
                raise InputError(f"{layer.name} takes {wanted} channels or features, got a tensor of shape {tuple(x.shape)}")
        if layer.kind == "convolution":
            self._check_sides(layer, x.shape[2:], self.weights[i][0].shape[2:], *self.options[i][:3])
        if layer.kind in ("sum", "concatenation"):
            self._check_joined(layer, [t.shape for t in inputs])
        if layer.kind == "reshape" and -1 not in self.options[i][0]:
            wanted, found = math.prod(self.options[i][0]), x.shape[1:].numel()
            if wanted != found:
                raise InputError(f"{layer.name} makes samples of {wanted} numbers from {found}, so it joins some: {ADVICE}")
        if layer.kind in BATCH_DIMS:
            dims, ndim = BATCH_DIMS[layer.kind](*self.options[i]), x.ndim + (layer.kind == "unsqueeze")
            if any(dim % ndim == 0 for dim in dims):
                raise InputError(f"{layer.name} joins samples (it works on dimension 0): {ADVICE}")

    def _forward(self, i, layer, inputs):
        if layer.kind == "convolution":
            weight, bias = self.weights[i]
            # oneDNN adds the bias in its own epilogue; cuDNN would make a pass of it, so there the activation's kernel does.
            bias = None if self._bias_waits(i + 2, inputs[0]) else bias
            return convolution(inputs[0], weight, bias, self.options[i])
        if layer.kind == "linear":
            return F.linear(inputs[0], *self.weights[i])
        if layer.kind == "activation":
            n = layer.inputs[0]
            bias = self.weights[n - 2][1] if self._bias_waits(n, inputs[0]) else None
            fresh = self._is_ours_alone(n)
            y, self.masks[i] = bias_act_mask(inputs[0], bias, self.options[i][0], fresh=fresh, backend=self.backend)
            return y
        return self._linear(i, layer, inputs, inputs[0].shape[0])

    def _bias_waits(self, n, x):
        """True if value ``n`` is a convolution without its bias, which the activation, its only reader, adds."""
        if x.device.type == "cpu" or n <= CONDITION or self.plan.layers[n - 2].kind != "convolution":
            return False
        return n in self.activated and self.plan.uses[n] == 1

    def _is_ours_alone(self, n):
        """True if a value may be overwritten: a layer has just made it, for one other layer."""
        made = n > CONDITION and self.plan.layers[n - 2].kind in ("convolution", "linear", "sum", "concatenation")
        return self.in_place and made and self.plan.uses[n] == 1

    def _linear(self, i, layer, inputs, rows):
        """A map without parameters, of values or of tangents."""
        if layer.kind == "sum":
            return inputs[0] + inputs[1]
        if layer.kind == "concatenation":
            return torch.cat(inputs, dim=1)
        return MAPS[layer.kind][0](inputs[0], rows, *self.options[i])

    def backward(self, seed: torch.Tensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Fill ``gradients`` and return the gradient by the image.

        Args:
            seed: the gradient by the scores.
            rows: ``(first, last)`` of the samples whose image's gradient is wanted; None: all. (Layers above every trained one
                compute these alone.)
        """
        if rows is not None and not self.above[self.plan.output]:
            seed = seed[rows[0] : rows[1]]
        found = {self.plan.output: (seed, True)}
        for i in reversed(range(len(self.plan.layers))):
            layer, (d, owned) = self.plan.layers[i], found.pop(i + 2, (None, False))
            if d is None:
                continue
            if any(self.trained[i]):
                self.gradients[i] = d
            for position, n in enumerate(layer.inputs):
                if not (self.above[n] or self._is_moved(n)):
                    continue
                part = d
                if rows is not None and self.above[i + 2] and not self.above[n]:
                    part = d[rows[0] : rows[1]]
                alone = self.in_place and owned and len(layer.inputs) == 1 and not any(self.trained[i])
                # Above every trained layer nothing is left but the wanted rows.
                kept = None if self.above[i + 2] else rows
                if layer.kind == "convolution" and n in self.image_beside and self.options[i][3] == 1:
                    n = IMAGE  # the others' share of the gradient is not wanted
                gradient, fresh = self._adjoint(i, layer, n, position, part, alone, kept)
                found[n] = (found[n][0] + gradient, True) if n in found else (gradient, fresh)
        return found[IMAGE][0]

    def _is_moved(self, n):
        """True if the image flows through value ``n``."""
        return n == IMAGE or (n != CONDITION and self.plan.layers[n - 2].moved)

    def _adjoint(self, i, layer, n, position, d, owned, rows):
        """The gradient by value ``n``, a layer's input, from that by its result, and True if it may be overwritten."""
        shape = (d.shape[0], *self.shapes[n])
        if layer.kind == "convolution":
            weight, alone = self.weights[i][0], n == layer.inputs[position]
            thin = n == IMAGE and d.device.type == "cpu" and self.backend != "reference"
            adjoint = narrow_image_gradient if thin else transposed_convolution
            return adjoint(d, weight if alone else weight[:, : shape[1]].contiguous(), shape, self.options[i]), True
        if layer.kind == "linear":
            return (d @ self.weights[i][0]).reshape(shape), True
        if layer.kind == "activation":
            d = d.contiguous(memory_format=self.formats[i + 2]) if self.formats[i + 2] != memory_format(d) else d
            return self._mask(i, d, d if owned else None, rows), True
        if layer.kind == "sum":
            return d.sum_to_size(shape), False
        if layer.kind == "concatenation":
            first = sum(self.shapes[m][0] for m in layer.inputs[:position])
            return d[:, first : first + shape[1]], False
        return MAPS[layer.kind][1](d, shape, *self.options[i]), owned

    def _mask(self, i, x, out, rows=None):
        mask = self.masks[i] if rows is None else self.masks[i][rows[0] : rows[1]]
        return mask_mul(x, mask, self.options[i][0], out=out, backend=self.backend)

    def tangent(
        self,
        v: torch.Tensor,
        weight_gradient: Callable[[int, torch.Tensor], None],
        rows: tuple[int, int] | None = None,
        place: Callable[[int], torch.Tensor | None] | None = None,
    ) -> None:
        """Carry the tangent of the image through the layers.

        Args:
            v: the image's tangent.
            weight_gradient: called with (layer's number, tangent of its input) at each layer whose weight is trained.
            rows: ``(first, last)`` of the samples in the masks that the tangent belongs to; None: all.
            place: maps a value's number to the tensor that receives an activation's tangent, or None.
        """
        tangents: dict[int, Any] = {IMAGE: v}
        left, made = list(self.plan.uses), set()
        for i, layer in enumerate(self.plan.layers):
            inputs: list[Any] = [tangents.get(n) for n in layer.inputs]
            if layer.moved and self.trained[i][0]:
                weight_gradient(i, inputs[0])
            if layer.moved and self.below[i + 2]:
                tangents[i + 2] = self._tangent(i, layer, inputs, v.shape[0], rows, place, layer.inputs[0] in made)
                # It has no other holder, unless it is another value's tangent unchanged.
                if self._is_ours_alone(i + 2) and all(u is not None for u in inputs):
                    made.add(i + 2)
            for n in layer.inputs:
                left[n] -= 1
                if left[n] == 0:
                    tangents.pop(n, None)

    def _tangent(self, i, layer, inputs, count, rows, place, alone):
        if layer.kind == "convolution":
            return convolution(inputs[0], self.weights[i][0], None, self.options[i])
        if layer.kind == "linear":
            return F.linear(inputs[0], self.weights[i][0])
        if layer.kind == "activation":
            u = inputs[0].contiguous(memory_format=self.formats[i + 2])
            out = None if place is None else place(i + 2)
            return self._mask(i, u, u if out is None and alone else out, rows)
        if layer.kind == "sum" and any(u is None for u in inputs):
            return next(u for u in inputs if u is not None).expand(count, *self.shapes[i + 2])
        if layer.kind == "concatenation":
            like = next(u for u in inputs if u is not None)
            filled = zip(inputs, layer.inputs)
            inputs = [like.new_zeros((count, *self.shapes[n])) if u is None else u for u, n in filled]
        return self._linear(i, layer, inputs, count)

    def weight_gradient(self, i: int, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """The gradient by layer ``i``'s weight from its input and the gradient by its result."""
        weight = self.weights[i][0]
        if self.plan.layers[i].kind == "linear":
            return d.flatten(0, -2).T @ x.flatten(0, -2)
        stride, padding, dilation, groups = self.options[i]
        options = (stride, padding, dilation, False, [0, 0], groups, [False, True, False])
        return aten.convolution_backward(d, x, weight, None, *options)[1]


def _image_beside(plan, above):
    """Concatenations of the image, first, with values that need no gradient."""
    return {
        i + 2
        for i, layer in enumerate(plan.layers)
        if layer.kind == "concatenation" and layer.inputs[0] == IMAGE and plan.uses[i + 2] == 1
        if not any(n == IMAGE or above[n] or (n > CONDITION and plan.layers[n - 2].moved) for n in layer.inputs[1:])
    }


def _trained_above(plan, trained):
    """True for each value that a trained layer has contributed to."""
    above = [False, False]
    for layer, own in zip(plan.layers, trained):
        above.append(any(own) or any(above[n] for n in layer.inputs))
    return above


def _trained_below(plan, trained):
    """True for each value whose tangent reaches a layer with a trained weight."""
    below = [False] * (len(plan.layers) + 2)
    for i in reversed(range(len(plan.layers))):
        if trained[i][0] or below[i + 2]:
            for n in plan.layers[i].inputs:
                below[n] = True
    return below
