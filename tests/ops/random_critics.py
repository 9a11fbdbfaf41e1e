"""Critics of random shape for the gradient penalty's tests, and comparisons of gradients."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn


class Residual(nn.Module):
    """x + act(conv(x)), its activation before the sum or after it."""

    def __init__(self, channels, groups, slope, after):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding="same", groups=groups, bias=not after)
        self.slope, self.after = slope, after

    def forward(self, x):
        if self.after:
            return F.leaky_relu(self.convolution(x) + x, self.slope)
        return x + 0.5 * self.convolution(F.leaky_relu(x, self.slope))


class Twice(nn.Module):
    """One convolution that is used twice: its gradients add up."""

    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.convolution(F.relu(self.convolution(x)))


class RandomCritic(nn.Module):
    """Drawn layers, where a condition of four numbers may join, and a head: linear maps, or a convolution (a map of scores)."""

    def __init__(self, layers, channels, side, conditional, linear):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.scale, self.shift = (nn.Linear(4, channels) if conditional else None for _ in range(2))
        self.embedding = nn.Linear(4, 3 * side[0] * side[1]) if conditional else None
        channels += 3 * conditional
        if linear:
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(channels * side[0] * side[1], 5), nn.ReLU(), nn.Linear(5, 1))
        else:
            self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x, condition=None):
        x = self.body(x)
        if condition is not None:
            # Sums over channels, before and after an activation whose input another layer reads too; then a concatenation.
            shifted = x + self.shift(condition).unsqueeze(-1).unsqueeze(-1)
            x = F.leaky_relu(shifted, 0.2) + F.relu(self.scale(condition)).view(x.size(0), -1, 1, 1) + x
            embedded = F.leaky_relu(self.embedding(condition), 0.1)
            x = torch.cat((x, embedded.view(x.size(0), 3, *self.embedded_side)), dim=1)
        return self.head(x)


@st.composite
def critics(draw):
    """(critic, shape of an image, True if it is conditional), float64."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    channels, side = draw(st.integers(1, 3)), [draw(st.integers(6, 9)), draw(st.integers(6, 9))]
    image, layers = (channels, *side), []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["convolution", "convolution", "residual", "twice", "pool", "upsample"]))
        slope = draw(st.sampled_from([0.0, 0.2, 1.0]))
        if kind == "convolution":
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
            wider, kernel, dilation = groups * draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
            stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 2))
            after = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in side]
            if min(after) < 1:
                continue
            bias = draw(st.booleans())
            layers += [nn.Conv2d(channels, wider, kernel, stride, padding, dilation, groups, bias), nn.LeakyReLU(slope)]
            channels, side = wider, after
        elif kind == "residual":
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
            layers.append(Residual(channels, groups, slope, draw(st.booleans())))
        elif kind == "twice":
            layers.append(Twice(channels))
        elif kind == "pool" and min(side) > 1:
            layers.append(nn.AvgPool2d(2, ceil_mode=draw(st.booleans())))
            side = [math.ceil(s / 2) if layers[-1].ceil_mode else s // 2 for s in side]
        elif kind == "upsample" and max(side) < 10:
            layers.append(nn.Upsample(scale_factor=2))
            side = [2 * s for s in side]
    conditional = draw(st.booleans())
    critic = RandomCritic(layers, channels, side, conditional, draw(st.booleans()))
    critic.embedded_side = tuple(side)
    return critic.double(), image, conditional


def relative(ours, theirs):
    """|ours - theirs| / |theirs| of two lists of gradients, None for zero."""
    ours, theirs = ([g if g is None else g.detach() for g in gradients] for gradients in (ours, theirs))
    pairs = [(torch.zeros_like(b) if a is None else a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    assert all(a is None or not a.any() for a, b in zip(ours, theirs) if b is None)
    if not pairs:
        return 0.0
    difference, size = (math.sqrt(sum(float(v.double().square().sum()) for v in values)) for values in zip(*split(pairs)))
    return difference / size if size else difference


def split(pairs):
    return [(a.double() - b.double(), b) for a, b in pairs]
