"""How a student is trained: the paper's recipe, stage by stage, and the joint recipe, all levels at once."""

from dataclasses import dataclass, replace

from ..errors import InputError
from ..ops.registry import BACKENDS


@dataclass
class DistillConfig:
    """Every choice of a distillation run (``advkd distill``; each field is an option of the same name).

    Attributes:
        recipe: ``joint`` (one stage, all levels) or ``paper`` (stage k supervises level k).
        updates: student updates per stage; one number serves all stages.
        batch_sizes: global batch per stage; the last number serves all further stages.
        mse: weight of the mean squared error between a submodule's image and its (standardised) target.
        kl: weight of the Kullback-Leibler divergence of N(target, kl_floor^2 I) from N(image, s^2 I), s learned per level.
        kl_floor: standard deviation that a target is given in the divergence.
        wasserstein: weight of the critics' score.
        final_weight: extra weight of the last level's regression (mse and kl).
        regression_levels: levels that mse and kl apply to (empty: every supervised level).
        critic_levels: levels with a critic (empty: every supervised level).
        critic_updates: critic updates per student update.
        critic_channels, critic_max_channels: width of the critics.
        conditional: critics see the latent's 4x4 parts.
        fresh: critics judge the student's images of new latents, as many as pairs, instead of those of the pairs' latents
            (unconditional critics only): the adversarial loss then reaches what the pairs do not cover.
        augment: critics see real and generated images shifted by up to an eighth of their side (differentiable augmentation).
        pairs: only the first so many trajectories are used (0: all).
        grow: trajectories that the teacher adds to the data after every ``grow_every`` updates of a stage (0: none).
        grow_every: see ``grow``.
        gradient_penalty: lambda.
        critic_backend: what differentiates the critics: ``auto`` (hand-written passes on the fastest backend), a backend's
            name, or ``autograd``.
        train_scope: ``all`` trains submodules 1 .. k in stage k, ``last`` only the k-th, the others frozen in eval mode.
        learning_rate, critic_learning_rate: of Adam.
        betas: of Adam.
        final_learning_rate: fraction of the learning rates left at a stage's end (cosine decay; 1 keeps them constant).
        clip_gradients: bound of the gradients' norm (0: none).
        ema: decay of the average that is saved (0: none).
        mixed_precision: ``no`` or ``bf16`` (student only; critics stay in float32).
        seed: of weights and all draws.
        checkpoint_every: student updates between checkpoints.
        log_every: student updates that one row of ``metrics.csv`` averages.
    """

    recipe: str = "joint"
    updates: tuple[int, ...] = (1000,)
    batch_sizes: tuple[int, ...] = (64,)
    mse: float = 1.0
    kl: float = 0.0
    kl_floor: float = 0.05
    wasserstein: float = 0.1
    final_weight: float = 2.0
    regression_levels: tuple[int, ...] = ()
    critic_levels: tuple[int, ...] = ()
    critic_updates: int = 1
    critic_channels: int = 32
    critic_max_channels: int = 128
    conditional: bool = False
    fresh: bool = False
    augment: bool = False
    pairs: int = 0
    grow: int = 0
    grow_every: int = 100
    gradient_penalty: float = 10.0
    critic_backend: str = "auto"
    train_scope: str = "all"
    learning_rate: float = 5e-4
    critic_learning_rate: float = 5e-4
    betas: tuple[float, ...] = (0.0, 0.99)
    final_learning_rate: float = 1.0
    clip_gradients: float = 0.0
    ema: float = 0.99
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 1

    def validate(self, depth, paired, num):
        """Raise :class:`InputError` that names the field that cannot work with a student of ``depth`` submodules and a data
        set of ``num`` samples."""
        _require(self.recipe in ("joint", "paper"), f"recipe must be joint or paper, got {self.recipe!r}")
        for name in ("updates", "batch_sizes"):
            values = getattr(self, name)
            _require(values and min(values) >= 1, f"{name} must hold positive numbers, got {values}")
        for name in ("pairs", "grow"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.pairs <= num, f"pairs must be at most the {num} trajectories, got {self.pairs}")
        num = self.pairs or num
        for name in ("critic_updates", "critic_channels", "critic_max_channels", "grow_every", "checkpoint_every", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mse", "kl", "wasserstein", "final_weight", "gradient_penalty", "clip_gradients"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "critic_learning_rate", "kl_floor"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(min(self.batch_sizes) >= 2, f"batch_sizes must be at least 2 for batch norm, got {self.batch_sizes}")
        _require(max(self.batch_sizes) <= num, f"batch_sizes must be at most the {num} trajectories, got {self.batch_sizes}")
        _require(0 <= self.ema < 1, f"ema must be in [0, 1), got {self.ema}")
        _require(0 <= self.final_learning_rate <= 1, "final_learning_rate must be in [0, 1]")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"betas must be two numbers in [0, 1), got {self.betas}",
        )
        _require(self.train_scope in ("all", "last"), f"train_scope must be all or last, got {self.train_scope!r}")
        _require(self.mixed_precision in ("no", "bf16"), f"mixed_precision must be no or bf16, got {self.mixed_precision!r}")
        known, wish = ("autograd", "auto", *BACKENDS), self.critic_backend
        _require(wish in known, f"critic_backend must be one of {', '.join(known)}, got {wish!r}")
        _require(0 <= self.seed < 2**63, f"seed must be in [0, 2^63), got {self.seed}")
        _require(self.mse or self.kl or self.wasserstein, "one of mse, kl and wasserstein must be positive")
        _require(
            not (self.fresh and self.conditional), "fresh latents have no teacher's image: use fresh or conditional, not both"
        )
        _require(not self.fresh or self.wasserstein, "fresh latents are for the critics: wasserstein must be positive")
        every = self.checkpoint_every % self.log_every
        _require(not every, f"checkpoint_every must be a multiple of log_every {self.log_every}, got {self.checkpoint_every}")
        bad = [k for k in (*self.critic_levels, *self.regression_levels) if not 1 <= k <= depth]
        _require(not bad, f"critic_levels and regression_levels must be between 1 and the student's depth {depth}, got {bad}")
        for stage in self.stages(depth):
            regressed = (self.mse or self.kl) and self.regression_levels_of(stage)
            _require(regressed or stage.critic_levels, f"stage {stage.number} has no loss: see critic_levels, mse and kl")
        if not paired and (self.mse or self.kl or self.conditional):
            raise InputError(
                "the trajectories are unpaired (ancestral DDPM: x_0 is not a function of z), so only the Wasserstein loss with "
                "an unconditional critic is right: use --mse 0 --kl 0 --no-conditional, or record with --sampler ddim"
            )

    def regression_levels_of(self, stage):
        """The stage's levels that mse and kl apply to."""
        return [k for k in stage.levels if not self.regression_levels or k in self.regression_levels]

    def stages(self, depth):
        """The stages of a run for a student of ``depth`` submodules."""
        if self.recipe == "joint":
            return [self._stage(1, tuple(range(1, depth + 1)), depth)]
        return [self._stage(k, (k,), k) for k in range(1, depth + 1)]

    def _stage(self, number, levels, last):
        critics = tuple(k for k in levels if not self.critic_levels or k in self.critic_levels) if self.wasserstein else ()
        first = last if self.train_scope == "last" and self.recipe == "paper" else 1
        batch_size, updates = (v[min(number, len(v)) - 1] for v in (self.batch_sizes, self.updates))
        return Stage(number, levels, critics, range(first, last + 1), batch_size, updates)


@dataclass(frozen=True)
class Stage:
    """One stage: which levels are supervised, which have a critic, which submodules train, batch and budget."""

    number: int
    levels: tuple[int, ...]
    critic_levels: tuple[int, ...]
    trained: range
    batch_size: int
    updates: int


RECIPES = {
    "joint": DistillConfig(),
    # The joint recipe as it made the shipped digits student; for 16,384 trajectories.
    "digits": DistillConfig(
        updates=(5000,),
        batch_sizes=(32,),
        critic_levels=(12,),
        learning_rate=1e-3,
        final_learning_rate=0.02,
        ema=0.998,
        log_every=20,
    ),
    # ADV-KD, section 4: Wasserstein only, batch 64 for submodules 1 to 8, 32 for the ninth, 16 for the rest.
    "paper": DistillConfig(
        recipe="paper",
        updates=(2000,),
        batch_sizes=(64, 64, 64, 64, 64, 64, 64, 64, 32, 16),
        mse=0.0,
        wasserstein=1.0,
        final_weight=0.0,
        critic_updates=5,
        learning_rate=1e-4,
        critic_learning_rate=1e-4,
        betas=(0.0, 0.9),
        ema=0.0,
    ),
}


def recipe(name, **overrides):
    """The recipe ``name`` with some fields changed."""
    if name not in RECIPES:
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return replace(RECIPES[name], **overrides)


def _require(condition, message):
    if not condition:
        raise InputError(message)
