"""Solvers' programs run by plain arithmetic, without the loop and its kernels, and the problems that tests run them on."""

import math

import numpy as np
import torch

from advkd.diffusion.exact import ExactTeacher
from advkd.diffusion.program import registers
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import METHODS

DETERMINISTIC = [name for name, method in METHODS.items() if method.order]
STOCHASTIC = [name for name, method in METHODS.items() if not method.order]


def log_snr_schedule(low, high, timesteps=1000):
    """A schedule whose log-SNR falls from ``high`` at timestep 0 to ``low``, linearly."""
    return Schedule(torch.sigmoid(2 * torch.linspace(high, low, timesteps, dtype=torch.float64)))


class Hierarchy(ExactTeacher):
    """x0 given c is N(c, v), and c is N(0, s2): class 0 is c = 0, and the null class leaves c open."""

    def __init__(self, v, s2, schedule):
        super().__init__((1,), schedule, num_classes=1)
        self.v, self.s2 = v, s2

    def x0(self, x, alpha, noise, labels=None):
        variance = torch.full((len(x), 1), self.v + self.s2, dtype=torch.float64)
        if labels is not None:
            variance = torch.where((labels == 0)[:, None], self.v, variance)
        return alpha * variance / (alpha**2 * variance + noise**2) * x


def walk(program, x, network, memory=None, draw=None):
    """The state after every evaluation of a program.

    Args:
        program: evaluations, of networks that predict the sample.
        x: first state; tensors of any shape that ``network`` takes.
        network: function of the state and its level.
        memory: ``{register: tensor}`` at the start.
        draw: function that gives the next standard normal numbers.
    """
    held = {0: x, **(memory or {})}
    for e in program:
        s, state = e.step, held[e.x]
        output = network(state, e.level) if e.network else state
        clean = s.k_x * state + s.k_m * output
        following = s.c_0 * clean + s.c_x * state + s.c_m * output
        for register, weight in ((e.previous, s.c_h), (e.history, s.c_g), (e.third, s.c_z)):
            if register is not None:
                following = following + weight * held[register]
        if e.draws:
            following = following + s.c_z * draw()
        if e.stored is not None:
            held[e.stored] = s.s_0 * clean + s.s_x * state + s.s_m * output
        held[e.out] = following
        yield following


def end(*arguments, **options):
    """The last state of :func:`walk`."""
    *_, last = walk(*arguments, **options)
    return last


def exact_network(teacher, labels=None):
    """The network of an exact teacher as :func:`walk` takes it."""
    return lambda x, level: teacher.x0(x, double(level.alpha), double(level.noise), labels)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def remembered(program):
    """Registers of a multistep program's memory."""
    return registers(program) - 1


def fitted_order(counts, errors):
    """The least-squares slope of -log error by log count."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def fine_flow(teacher, x, sigma, sigma_next):
    """The probability flow dy / d log sigma = y - D in y = x / alpha by Runge and Kutta's fourth order, steps of 0.006."""
    tau, length = math.log(sigma), math.log(sigma_next) - math.log(sigma)
    steps = math.ceil(abs(length) / 0.006)
    h = length / steps

    def slope(y, tau):
        scale = math.hypot(1, math.exp(tau))
        return y - teacher.x0(y / scale, double(1 / scale), double(math.exp(tau) / scale))

    y = x * math.hypot(1, sigma)
    for i in range(steps):
        t = tau + i * h
        k_1 = slope(y, t)
        k_2 = slope(y + h / 2 * k_1, t + h / 2)
        k_3 = slope(y + h / 2 * k_2, t + h / 2)
        k_4 = slope(y + h * k_3, t + h)
        y = y + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return y / math.hypot(1, sigma_next)
