"""What linear classifiers read: class tokens of the last blocks and, pooled, the patches of the last one.

All inputs of the grid are neighbouring columns of the widest one, so that features are kept once:

    class token of block -n ... class token of the last block | mean of its patch tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError

__all__ = ["Blocks", "LinearClassifier", "LinearPostprocessor", "TokenColumns", "create_linear_input"]

Blocks = Sequence[tuple[Tensor, Tensor]]
"""(patch tokens [B, N, D], class token [B, D]) of consecutive blocks, the last one last, after the final norm."""


def create_linear_input(x_tokens_list: Blocks, use_n_blocks: int, use_avgpool: bool) -> Tensor:  # -> float32 [B, W]
    """The input of a classifier of the last `use_n_blocks` blocks: class tokens, oldest first, then the mean patch."""
    blocks = x_tokens_list[-use_n_blocks:]
    parts = [class_token for _, class_token in blocks]
    if use_avgpool:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


@dataclass(frozen=True)
class TokenColumns:
    """How feature rows [W] are made up: class tokens of `n_blocks` blocks of width `embed_dim`, then the mean patch."""

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

    def rows(self, batch: Tensor | Blocks) -> Tensor:  # -> [B, W]
        """The rows of a batch: as they are, or from the tokens of `n_blocks` blocks."""
        rows = batch if isinstance(batch, Tensor) else create_linear_input(batch, self.n_blocks, self.pooled)
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ConfigError(
                f"features are {list(rows.shape)}, but {self.n_blocks} blocks of width {self.embed_dim}"
                f"{' and the mean patch' if self.pooled else ''} make [B, {self.width}]; extract them once more, "
                "or say what they are made of"
            )
        return rows


class LinearClassifier(nn.Module):
    """The release's classifier: `linear` on the input that `create_linear_input` makes of a list of tokens."""

    def __init__(self, out_dim: int, use_n_blocks: int, use_avgpool: bool, num_classes: int = 1000) -> None:
        super().__init__()
        self.use_n_blocks, self.use_avgpool = use_n_blocks, use_avgpool
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, mean=0.0, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: Blocks) -> Tensor:  # -> [B, K]
        """Logits."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class LinearPostprocessor(nn.Module):
    """The release's step from tokens and targets to `{"preds", "target"}`, where logits may be mapped to other classes.

    `class_mapping` [C_test] holds the training class of each test class.
    """

    def __init__(self, linear_classifier: nn.Module, class_mapping: Any = None) -> None:
        super().__init__()
        self.linear_classifier = linear_classifier
        mapping = None if class_mapping is None else torch.as_tensor(class_mapping, dtype=torch.int64)
        self.register_buffer("class_mapping", mapping)

    def forward(self, samples: Blocks, targets: Tensor) -> dict[str, Tensor]:
        """Predictions [B, C_test] and the targets as they were given."""
        logits = self.linear_classifier(samples)
        return {"preds": logits if self.class_mapping is None else logits[:, self.class_mapping], "target": targets}
