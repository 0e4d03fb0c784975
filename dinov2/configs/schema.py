"""The root of the config tree, and what must hold between its sections.

`Config` is a frozen tree of typed values with the release's keys and defaults; YAML is only its spelling. The sections
live in `method_sections` (what is learned) and `run_sections` (how). Each checks what it can check alone.
"""

from dataclasses import dataclass, field

from dinov2.configs.checks import at_most, equal_length, nearest_multiples
from dinov2.configs.method_sections import (
    ComputePrecisionConfig,
    DinoConfig,
    IbotConfig,
    ModelConfig,
    StudentConfig,
    TeacherConfig,
)
from dinov2.configs.run_sections import CropsConfig, EvaluationConfig, OptimConfig, TrainConfig
from dinov2.errors import ConfigError

__all__ = ["Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a run, with the release's section names: `cfg.optim.base_lr`, `cfg.MODEL.WEIGHTS`.

    `Config()` is the default. Values never change after construction; use `dinov2.configs.apply_overrides` or
    `dataclasses.replace` for a changed copy. Raises ConfigError, naming the key, when values do not fit together.
    """

    MODEL: ModelConfig = field(default_factory=ModelConfig)
    compute_precision: ComputePrecisionConfig = field(default_factory=ComputePrecisionConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        self._check_crop_size("global_crops_size")
        equal_length("crops.mean", self.crops.mean, self.student.in_chans, of="student.in_chans")
        equal_length("crops.std", self.crops.std, self.student.in_chans, of="student.in_chans")

    def check_training(self) -> None:
        """Refuse what only a training stumbles over; an evaluation may leave these keys as they are."""
        if self.crops.local_crops_number:
            self._check_crop_size("local_crops_size")
        self._check_losses()
        # Schedules hold a number for every step.
        steps = self.optim.epochs * self.train.OFFICIAL_EPOCH_LENGTH
        at_most("optim.epochs * train.OFFICIAL_EPOCH_LENGTH", steps, 10**8)

    def _check_crop_size(self, name: str) -> None:
        size, patch_size = getattr(self.crops, name), self.student.patch_size
        if size % patch_size:
            nearest = " or ".join(str(valid) for valid in nearest_multiples(size, patch_size))
            raise ConfigError(
                f"crops.{name} is {size}, which is not a multiple of student.patch_size = {patch_size}; write {nearest}"
            )

    def _check_losses(self) -> None:
        if not (self.dino.loss_weight or self.ibot.loss_weight or self.dino.koleo_loss_weight):
            raise ConfigError(
                "dino.loss_weight, ibot.loss_weight and dino.koleo_loss_weight are all 0, so nothing is learned; "
                "write a weight above 0 for at least one"
            )
        if self.dino.koleo_loss_weight and self.train.batch_size_per_gpu == 1:
            raise ConfigError(
                "train.batch_size_per_gpu is 1, but KoLeo spreads the images of a batch and needs two; "
                "write 2 or more, or dino.koleo_loss_weight=0"
            )
