"""The grid of linear classifiers: rates, inputs, budget, and the names that the release gives them.

The release's rate and number of images seen depend on the number of GPUs; its published figures need 1,024 images a
step. Here the batch is that of all processes together, so that the recipe is the same on any machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dinov2 import distributed
from dinov2.errors import ConfigError
from dinov2.eval.linear.inputs import TokenColumns

__all__ = ["LEARNING_RATES", "PRESETS", "Head", "LinearSettings", "head_table", "scale_lr"]

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""The release's 13 rates, for a batch of 256."""


@dataclass(frozen=True)
class LinearSettings:
    """The protocol of a linear probe; the defaults are the release's on 8 GPUs with 128 images each."""

    learning_rates: tuple[float, ...] = LEARNING_RATES
    """For a batch of 256; scaled in proportion to the batch."""
    n_last_blocks: tuple[int, ...] = (1, 4)
    avgpools: tuple[bool, ...] = (False, True)
    n_iterations: int = 12_500
    batch_size: int = 1024
    """Images of a step, of all processes together."""
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if min(self.n_iterations, self.batch_size) < 1:
            raise ConfigError(
                f"{self.n_iterations} iterations of {self.batch_size} images train nothing; write 1 or more of both"
            )
        if not self.learning_rates or not min(self.learning_rates) > 0:
            raise ConfigError(f"learning rates must be positive, got {list(self.learning_rates)}")


PRESETS: Mapping[str, LinearSettings] = MappingProxyType(
    {
        "release": LinearSettings(),
        "short": LinearSettings(learning_rates=(2e-3, 1e-2, 5e-2, 0.1, 0.2, 0.5), n_iterations=2000, batch_size=256),
    }
)
"""`short` is for a CPU: a 25th of the images, six rates, the larger ones that so few steps need."""


@dataclass(frozen=True)
class Head:
    """One classifier of the grid; its number in the grid is its identity, names are for people."""

    n_blocks: int
    avgpool: bool
    learning_rate: float
    """As written in the settings."""
    rate: float
    """What training starts with."""

    @property
    def name(self) -> str:
        """Such as `blocks=4 avgpool lr=0.01`, with the rate as written."""
        return f"blocks={self.n_blocks}{' avgpool' if self.avgpool else ''} lr={self.learning_rate:g}"

    @property
    def release_name(self) -> str:
        """The release's name; several heads may share one, because it has five decimals of the scaled rate."""
        rate = f"{self.rate:.5f}".replace(".", "_")
        return f"classifier_{self.n_blocks}_blocks_avgpool_{self.avgpool}_lr_{rate}"


def head_table(settings: LinearSettings, columns: TokenColumns) -> tuple[Head, ...]:
    """The heads in the release's order: blocks, pooling, rates.

    A number of blocks above what the features hold becomes that number, and pooling is left out where there is no mean
    patch; what then comes twice is trained once.
    """
    blocks = dict.fromkeys(min(n, columns.n_blocks) for n in settings.n_last_blocks)
    pooling = dict.fromkeys(avgpool and columns.pooled for avgpool in settings.avgpools)
    return tuple(
        Head(n, avgpool, learning_rate, learning_rate * settings.batch_size / 256)
        for n in blocks
        for avgpool in pooling
        for learning_rate in settings.learning_rates
    )


def scale_lr(learning_rates: float, batch_size: int) -> float:
    """The release's rule: the rate for `batch_size` images on each of the processes, from that for 256 in all."""
    return learning_rates * (batch_size * distributed.get_global_size()) / 256.0
