"""ADV-KD: a student imitates a teacher's states, submodule by submodule, by regression and critics (section 3).

A stage's update: critic updates on (teacher's levels, student's levels), then one student update on J = mse + kl + wasserstein
over the stage's levels. The paper's recipe goes stage by stage, the joint recipe trains all levels at once.
"""

import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..data.draws import Draw, shift, training_latents
from ..data.sources import Batch
from ..errors import InputError
from ..models.critic import Critic, CriticConfig
from ..models.student import Student
from ..ops.critic.update import critic_gradients
from ..ops.registry import BACKENDS
from ..runtime.ranges import named
from .base import Kept, Method, Needs, Settings, Stage, Step, Trained, cosine
from .distances import Scales, kl_divergence
from .generator import condition_channels, condition_planes, preview, previewed

Images = dict[int, torch.Tensor]
"""Images by level."""


@dataclass
class DistillConfig:
    """Every choice of a distillation run (``advkd distill``; each field is an option of the same name).

    Attributes:
        recipe: ``joint`` (one stage, all levels) or ``paper`` (stage k supervises level k).
        targets: what levels before the last learn: ``states`` (the teacher's, standardised) or ``image`` (area averages of the
            teacher's final image).
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
        critic_channels: features after a critic's first convolution; they double with each further one.
        critic_max_channels: upper bound of the critics' features.
        conditional: critics see the latent's 4x4 parts. Those of a student with classes are told the class in any case.
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
        learning_rate: of the student's Adam.
        critic_learning_rate: of the critics' Adam.
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
    targets: str = "states"
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
    betas: tuple[float, float] = (0.0, 0.99)
    final_learning_rate: float = 1.0
    clip_gradients: float = 0.0
    ema: float = 0.99
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 1

    def validate(self, depth: int, paired: bool, num: int) -> None:
        """Raise :class:`InputError` for fields that cannot work, alone or with the student or the data.

        Args:
            depth: submodules of the student.
            paired: True if x_0 is a function of z in the data.
            num: number of trajectories in the data.
        """
        _require(self.recipe in ("joint", "paper"), f"recipe must be joint or paper, got {self.recipe!r}")
        _require(self.targets in ("states", "image"), f"targets must be states or image, got {self.targets!r}")
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
        bad = [k for k in (*self.critic_levels, *self.regression_levels) if not 1 <= k <= depth]
        _require(not bad, f"critic_levels and regression_levels must be between 1 and the student's depth {depth}, got {bad}")
        for stage in self.stages(depth):
            regressed = (self.mse or self.kl) and self.regression_levels_of(stage)
            _require(regressed or stage.critic_levels, f"stage {stage.number} has no loss: see critic_levels, mse and kl")
        if not paired and (self.mse or self.kl or self.conditional):
            raise InputError(
                "the trajectories are unpaired (ancestral DDPM: x_0 is not a function of z), so only the Wasserstein loss with "
                "an unconditional critic is right: use --mse 0 --kl 0 --no-conditional, or record with --solver ddim"
            )

    def regression_levels_of(self, stage: Stage) -> list[int]:
        """The levels of ``stage`` that mse and kl apply to."""
        return [k for k in stage.levels if not self.regression_levels or k in self.regression_levels]

    def stages(self, depth: int) -> list["SubmoduleStage"]:
        """The stages of a run for a student of ``depth`` submodules: one (``joint``), or one per submodule (``paper``)."""
        if self.recipe == "joint":
            return [self._stage(1, tuple(range(1, depth + 1)), depth)]
        return [self._stage(k, (k,), k) for k in range(1, depth + 1)]

    def _stage(self, number, levels, last):
        critics = tuple(k for k in levels if not self.critic_levels or k in self.critic_levels) if self.wasserstein else ()
        first = last if self.train_scope == "last" and self.recipe == "paper" else 1
        batch_size, updates = (v[min(number, len(v)) - 1] for v in (self.batch_sizes, self.updates))
        return SubmoduleStage(number, updates, batch_size, levels, critics, range(first, last + 1))


@dataclass(frozen=True)
class SubmoduleStage(Stage):
    """A stage that trains the submodules ``trained`` of a student, with critics on the levels ``critic_levels``."""

    critic_levels: tuple[int, ...] = ()
    trained: range = range(0)


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


def recipe(name: str, **overrides: Any) -> DistillConfig:
    """A named recipe with some fields changed, such as ``recipe("digits", updates=(2000,))``.

    Args:
        name: ``joint``, ``digits`` or ``paper``; another one is an :class:`InputError`.
        overrides: fields of :class:`DistillConfig` and their values; another name is a ``TypeError``.

    Returns:
        A new configuration, which is not validated.
    """
    if name not in RECIPES:
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return replace(RECIPES[name], **overrides)


def _require(condition, message):
    if not condition:
        raise InputError(message)


class AdvKD(Method):
    """Adversarial distillation of a teacher's states into the submodules of a student."""

    name = "adv-kd"
    reference = "ADV-KD: adversarial knowledge distillation for faster diffusion sampling, sections 3 and 4"
    Config = DistillConfig
    recipes = RECIPES

    def __init__(self, config: DistillConfig, student: Student):
        self.config, self.student = config, student
        self.scales, self.critics = Scales(student.depth), nn.ModuleDict()
        self.columns = ("loss", "wasserstein", "critic", "penalty", *(f"mse_{k:02d}" for k in range(1, student.depth + 1)))

    def check(self, data: Any) -> None:
        """Refuse trajectories that the configuration cannot be trained on."""
        self.config.validate(self.student.depth, data.paired, len(data))

    def needs(self) -> Needs:
        """Recorded levels; pairs where a distance compares with the teacher's image of the same noise."""
        config = self.config
        paired, labels = bool(config.mse or config.kl or config.conditional), bool(self.student.num_classes)
        averaged, backend = config.targets == "image", config.critic_backend if config.wasserstein else "autograd"
        needs = Needs("levels", paired, labels=labels, averaged=averaged, critic_backend=backend)
        return replace(needs, limit=config.pairs, grow=config.grow, grow_every=config.grow_every)

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        config, free = self.config, ("checkpoint_every", "critic_backend")
        return Settings(config.seed, config.checkpoint_every, config.log_every, config.mixed_precision, free)

    def identity(self) -> dict:
        """Shape of the student, and what it was trained on before."""
        trained_on = (self.student.training_record or {}).get("samples")
        return {"student": dataclasses.asdict(self.student.config), "init": trained_on}

    def stages(self) -> list[SubmoduleStage]:
        """One stage, or one per submodule."""
        return self.config.stages(self.student.depth)

    def evaluations(self, stage: Stage) -> tuple[int, int]:
        """The student draws in every critic update, the last of which shares its images; fresh latents are a second image."""
        assert isinstance(stage, SubmoduleStage)
        images = 2 if self.config.fresh and stage.critic_levels else 1
        return images * (self.config.critic_updates if stage.critic_levels else 1), images

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """The student itself, no copy, with the stage's submodules in training, and fresh critics."""
        assert isinstance(stage, SubmoduleStage)
        config, student = self.config, self.student
        self.stage = stage
        student.requires_grad_(False)
        student.eval()
        trained = [student.submodules[k - 1] for k in stage.trained]
        trained += [student.head if k == student.depth else student.terminals[k - 1] for k in stage.levels]
        trained += [student.embedding] if student.num_classes and 1 in stage.trained else []
        for module in trained:
            module.requires_grad_(True).train()
        parameters = [p for p in student.parameters() if p.requires_grad] + ([self.scales.log_s] if config.kl else [])
        trained_by = partial(Trained, betas=config.betas, schedule=self._schedule, clip=config.clip_gradients)
        parts: dict[str, Trained | Kept] = {"scales": Kept(self.scales)}
        rate, layout = config.learning_rate, torch.channels_last
        parts["student"] = trained_by(student, rate, average=config.ema, parameters=parameters, memory_format=layout)
        self.critics = nn.ModuleDict({str(k): self._critic(stage, k) for k in stage.critic_levels})
        if self.critics:
            parts["critic"] = trained_by(self.critics, config.critic_learning_rate)
        return parts

    def _schedule(self, update):
        return cosine(update, self.stage.updates, self.config.final_learning_rate)

    def _critic(self, stage, k):
        config, student = self.config, self.student
        shape = CriticConfig(
            image_size=student.resolutions[k - 1],
            image_channels=student.config.image_channels,
            channels=config.critic_channels,
            max_channels=config.critic_max_channels,
            condition_channels=condition_channels(student, config.conditional),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((config.seed * 2**16 + stage.number * 2**8 + k) % 2**63)
            return Critic(shape)

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """Critic updates, each on a batch of its own but the last, which shares the student's; then the student."""
        rounds = self.config.critic_updates if self.critics else 1
        for i in range(rounds):
            if i:
                batch, draw = step.next_batch()
            images, judged = self._forward(step, batch, draw, trained=i + 1 == rounds)
            if self.critics:
                with named("critic update"):
                    self.update_critics(step, batch, draw, judged)
        with named("student update"):
            self.update_student(step, batch, draw, images, judged)

    def _forward(self, step, batch, draw, trained):
        """Images of the batch's latents by level, and those that the critics judge: of fresh latents where there are any."""
        z, n = batch.z, len(batch.z)
        latents, labels = z, batch.labels
        if self.config.fresh and self.critics:
            fresh = training_latents(draw.seed, draw.start, n, z.shape[1], z.device)
            latents, labels = torch.cat((z, fresh.to(z.dtype))), None if labels is None else labels.repeat(2)
        with named("student forward"), torch.set_grad_enabled(trained), step.autocast():
            images = self.student(latents, levels=self.stage.levels, labels=labels)
        images = {k: image.to(z.dtype) for k, image in images.items()}
        judged = {k: images[k][-n:] for k in self.stage.critic_levels}
        return {k: image[:n] for k, image in images.items()}, judged

    def update_critics(self, step: Step, batch: Batch, draw: Draw, judged: Images) -> None:
        """One update of the critics on the batch's levels and the judged images."""
        # L(D) = E[D(fake)] - E[D(real)] + penalty (eq. 9 with the sign of a minimisation), one critic per level.
        config, condition, updates = self.config, self._condition(batch), []
        for k in self.stage.critic_levels:
            real = self._seen(batch.levels[k], draw, k, 1)
            fake = self._seen(judged[k].detach(), draw, k, 2)
            options = {"a": (config.seed, draw.indices, k), "condition": condition, "weight": config.gradient_penalty}
            options |= {"backend": config.critic_backend, "check_finite": False}
            updates.append(critic_gradients(self.critics[str(k)], real, fake, **options))
        step.gradients("critic", (gradient for update in updates for gradient in update.gradients))
        step.log(
            critic=torch.stack([update.loss for update in updates]).mean(),
            penalty=torch.stack([update.penalty for update in updates]).mean(),
        )

    def update_student(self, step: Step, batch: Batch, draw: Draw, images: Images, judged: Images) -> None:
        """One update of the student by the distances of its images and the critics' scores."""
        config, depth = self.config, self.student.depth
        metrics, terms = {}, []
        regressed = config.regression_levels_of(self.stage)
        for k, image in images.items():
            weight = 1 / len(images) + (config.final_weight if k == depth else 0.0)
            squared = (image - batch.levels[k]).square().mean()
            metrics[f"mse_{k:02d}"] = squared.detach()
            if config.mse and k in regressed:
                terms.append(weight * config.mse * squared)
            if config.kl and k in regressed:
                terms.append(weight * config.kl * kl_divergence(squared, self.scales.log_s[k - 1], config.kl_floor))
        if self.critics:
            condition = self._condition(batch)
            arguments = () if condition is None else (condition,)
            seen = {k: self._seen(judged[k], draw, k, 2) for k in self.stage.critic_levels}
            scores = [-self.critics[str(k)](image, *arguments).mean() for k, image in seen.items()]
            metrics["wasserstein"] = torch.stack(scores).mean().detach()
            terms.append(config.wasserstein * torch.stack(scores).mean())
        loss = torch.stack(terms).sum()
        step("student", loss)
        step.log(loss=loss.detach(), **metrics)

    def _seen(self, image, draw, level, kind):
        """An image as a critic sees it."""
        return shift(image, draw.seed, draw.start, level, kind) if self.config.augment else image

    def _condition(self, batch):
        return condition_planes(self.student, batch.z, batch.labels, self.config.conditional)

    def samples(self, student: Any, stage: Stage) -> torch.Tensor | None:
        """Images of the stage's last level, all classes in turn; standardised states are shown at a third of their contrast.

        Levels of latents before the last one are no pictures, and are not shown.
        """
        k = stage.levels[-1]
        if student.autoencoder is not None:
            return previewed(student, self.config.seed) if k == student.depth else None
        z, labels = preview(student, self.config.seed)
        standardised = k < self.student.depth and self.config.targets == "states"
        return student(z, levels=(k,), labels=labels)[k] / (3.0 if standardised else 1.0)
