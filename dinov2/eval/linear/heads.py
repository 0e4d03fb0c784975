"""The grid of linear classifiers: its settings, the inputs of its heads, and all heads as one model.

Heads read class tokens of the last blocks and, pooled, the patches of the last one. All inputs are neighbouring columns
of the widest one, so that features are kept once:

    class token of block -n ... class token of the last block | mean of its patch tokens

The release's rate and number of images seen depend on the number of GPUs; its published figures need 1,024 images a
step. Here the batch is that of all processes together, so that the recipe is the same on any machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.errors import ConfigError

__all__ = ["LEARNING_RATES", "PRESETS", "Head", "LinearHeads", "LinearSettings", "TokenColumns", "head_table"]

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
class TokenColumns:
    """Layout of feature rows [W]: class tokens of `n_blocks` blocks of width `embed_dim`, then the mean patch."""

    embed_dim: int
    n_blocks: int = 4
    pooled: bool = True
    """Whether the mean of the patch tokens follows."""

    @property
    def width(self) -> int:
        """W."""
        return (self.n_blocks + self.pooled) * self.embed_dim

    def part(self, n_blocks: int, avgpool: bool) -> slice:
        """The columns of the input of the last `n_blocks` blocks. Raises `ConfigError` where the rows lack it."""
        if not 1 <= n_blocks <= self.n_blocks or (avgpool and not self.pooled):
            pooled = "and the mean patch" if self.pooled else "without the mean patch"
            raise ConfigError(
                f"a classifier of {n_blocks} blocks{' with pooling' if avgpool else ''} was asked for, but the "
                f"features hold {self.n_blocks} class tokens {pooled}; extract more of them, or ask for less"
            )
        return slice((self.n_blocks - n_blocks) * self.embed_dim, (self.n_blocks + avgpool) * self.embed_dim)

    def check(self, rows: Tensor) -> Tensor:  # [B, W]
        """The rows themselves. Raises `ConfigError` for rows of another width."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ConfigError(
                f"features are {list(rows.shape)}, but {self.n_blocks} blocks of width {self.embed_dim}"
                f"{' and the mean patch' if self.pooled else ''} make [B, {self.width}]; extract them once more, "
                "or say what they are made of"
            )
        return rows


@dataclass(frozen=True)
class Head:
    """One classifier of the grid; its number in the grid is its identity, names are for people."""

    n_blocks: int
    avgpool: bool
    learning_rate: float
    """As written in the settings."""
    rate: float
    """Starting values of training."""

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


class LinearHeads:
    """The classifiers of `table` for `n_classes` classes, on `device`, with weights drawn from N(0, 0.01^2).

    Heads that read the same input share one product. Training is stochastic gradient descent with momentum on the sum
    of their losses; heads do not influence each other, so each ends where it would have ended alone. Gradients of a
    softmax are written out: what is summed over processes is one flat tensor, and nothing is recorded.

    The draw is made on the CPU, in the order of the table, from a generator of its own.
    """

    def __init__(
        self,
        table: Sequence[Head],
        columns: TokenColumns,
        *,
        n_classes: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.table, self.columns, self.n_classes = tuple(table), columns, n_classes
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        by_input: dict[tuple[int, bool], list[int]] = {}
        for number, head in enumerate(self.table):
            by_input.setdefault((head.n_blocks, head.avgpool), []).append(number)
        self._groups = []
        for (n_blocks, avgpool), numbers in by_input.items():
            part = columns.part(n_blocks, avgpool)
            shape = (len(numbers), n_classes, part.stop - part.start)
            weights = 0.01 * torch.randn(shape, generator=generator)
            rates = torch.tensor([self.table[number].rate for number in numbers])
            self._groups.append(_Group(numbers, part, weights.to(self.device), rates.to(self.device)))

    @torch.no_grad()
    def step(self, rows: Tensor, classes: Tensor, *, decay: float, momentum: float = 0.9) -> Tensor:  # -> [heads]
        """One step of every head at `decay` times its rate; returns their losses before it, of all processes' images.

        Args:
            rows: [B, W] of this process's share of the batch, which may be empty.
            classes: int64 [B], 0 .. K - 1.
        """
        rows, classes = rows.to(self.device, torch.float32), classes.to(self.device)
        n_images = int(distributed.all_reduce_sum(torch.tensor([len(rows)], device=self.device)))
        losses, gradients = [], []
        for group in self._groups:
            logits = group.logits(rows)
            target = classes.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
            errors = logits.log_softmax(dim=2)  # [B, H, K]
            losses.append(-errors.gather(2, target).sum(dim=(0, 2)))
            errors = errors.exp_().scatter_add_(2, target, torch.full_like(target, -1, dtype=errors.dtype))
            gradients.append((errors.flatten(1).T @ rows[:, group.part]).view_as(group.weights))
            gradients.append(errors.sum(dim=0))
        if distributed.get_global_size() > 1:
            # One message; heads of one process never pay for the copy.
            flat = distributed.all_reduce_sum(torch.cat([part.flatten() for part in (*losses, *gradients)]))
            parts = flat.split([part.numel() for part in (*losses, *gradients)])
            losses = list(parts[: len(losses)])
            gradients = [part.view_as(old) for part, old in zip(parts[len(losses) :], gradients, strict=True)]
        for group, weight_gradient, bias_gradient in zip(self._groups, gradients[::2], gradients[1::2], strict=True):
            rates = -decay * group.rates
            group.weight_momenta.mul_(momentum).add_(weight_gradient, alpha=1 / n_images)
            group.bias_momenta.mul_(momentum).add_(bias_gradient, alpha=1 / n_images)
            group.weights.addcmul_(group.weight_momenta, rates.view(-1, 1, 1))
            group.biases.addcmul_(group.bias_momenta, rates.view(-1, 1))
        return self._in_order(losses) / n_images

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:  # [B, W] -> [heads, B, K]
        """Logits of every head, in the order of the table."""
        rows = rows.to(self.device, torch.float32)
        return self._in_order([group.logits(rows).transpose(0, 1) for group in self._groups])

    def head(self, number: int) -> tuple[Tensor, Tensor]:  # -> [K, d], [K]
        """Weight and bias of one head, copied to the CPU."""
        for group in self._groups:
            if number in group.heads:
                row = group.heads.index(number)
                return group.weights[row].clone().cpu(), group.biases[row].clone().cpu()
        raise IndexError(f"there are {len(self.table)} heads, and none has the number {number}")

    def head_logits(self, number: int, rows: Tensor) -> Tensor:  # [B, W] -> [B, K]
        """Logits of one head, on the CPU."""
        weight, bias = (part.to(self.device) for part in self.head(number))
        head = self.table[number]
        part = self.columns.part(head.n_blocks, head.avgpool)
        # In blocks: the features of a large test set need not fit on the device.
        return torch.cat([(block[:, part].to(self.device) @ weight.T + bias).cpu() for block in rows.split(8192)])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Weights, biases and momenta of each input, by reference."""
        names = ("weights", "biases", "weight_momenta", "bias_momenta")
        return {str(i): {name: getattr(group, name) for name in names} for i, group in enumerate(self._groups)}

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        order = torch.tensor([number for group in self._groups for number in group.heads], device=self.device)
        return torch.cat(parts)[order.argsort()]


class _Group:
    """The heads of one input."""

    def __init__(self, heads: list[int], part: slice, weights: Tensor, rates: Tensor) -> None:
        self.heads, self.part = heads, part
        self.weights = weights  # [H, K, d]
        self.biases = torch.zeros_like(weights[..., 0])  # [H, K]
        self.weight_momenta, self.bias_momenta = torch.zeros_like(self.weights), torch.zeros_like(self.biases)
        self.rates = rates  # [H]

    def logits(self, rows: Tensor) -> Tensor:  # [B, W] -> [B, H, K]
        n_heads, n_classes, width = self.weights.shape
        flat = rows[:, self.part] @ self.weights.view(n_heads * n_classes, width).T
        return flat.view(len(rows), n_heads, n_classes) + self.biases
