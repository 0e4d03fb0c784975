"""Names of the public release's linear probe: its modules, its rule for rates, and the flags of its command."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.eval.linear.heads import LEARNING_RATES
from dinov2.eval.selection import SELECTION_METRICS
from dinov2.eval.setup import evaluation_parser

__all__ = ["LinearClassifier", "LinearPostprocessor", "create_linear_input", "get_args_parser", "scale_lr"]

_Blocks = Sequence[tuple[Tensor, Tensor]]
"""(patch tokens [B, N, D], class token [B, D]) of consecutive blocks, the last one last, after the final norm."""


def create_linear_input(x_tokens_list: _Blocks, use_n_blocks: int, use_avgpool: bool) -> Tensor:  # -> float32 [B, W]
    """The input of a classifier of the last `use_n_blocks` blocks: class tokens, oldest first, then the mean patch."""
    blocks = x_tokens_list[-use_n_blocks:]
    parts = [class_token for _, class_token in blocks]
    if use_avgpool:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


class LinearClassifier(nn.Module):
    """The release's classifier: `linear` on the input that `create_linear_input` makes of a list of tokens."""

    def __init__(self, out_dim: int, use_n_blocks: int, use_avgpool: bool, num_classes: int = 1000) -> None:
        super().__init__()
        self.use_n_blocks, self.use_avgpool = use_n_blocks, use_avgpool
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, mean=0.0, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: _Blocks) -> Tensor:  # -> [B, K]
        """Logits."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class LinearPostprocessor(nn.Module):
    """The release's step from tokens and targets to `{"preds", "target"}`, where logits may be mapped to other classes.

    `class_mapping` [C_test] holds the training class of each test class.
    """

    def __init__(self, linear_classifier: nn.Module, class_mapping: object = None) -> None:
        super().__init__()
        self.linear_classifier = linear_classifier
        mapping = None if class_mapping is None else torch.as_tensor(class_mapping, dtype=torch.int64)
        self.register_buffer("class_mapping", mapping)

    def forward(self, samples: _Blocks, targets: Tensor) -> dict[str, Tensor]:
        """Predictions [B, C_test] and the targets as they were given."""
        logits = self.linear_classifier(samples)
        return {"preds": logits if self.class_mapping is None else logits[:, self.class_mapping], "target": targets}


def scale_lr(learning_rates: float, batch_size: int) -> float:
    """The release's rule: the rate for `batch_size` images on each of the processes, from that for 256 in all."""
    return learning_rates * (batch_size * distributed.get_global_size()) / 256.0


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The flags of the release's linear-probe command, with its defaults."""
    parser = evaluation_parser(description, parents, add_help, train="to train on", val="to score")
    add = parser.add_argument
    add("--test-datasets", nargs="+", help="further labelled images to score")
    add("--epochs", type=int, default=10, help="number of epochs, each of --epoch-length iterations")
    add("--epoch-length", type=int, default=1250, help="iterations of an epoch")
    add("--batch-size", type=int, default=128, help="images of a step on each process")
    add("--num-workers", type=int, default=8, help="processes that load images")
    add("--save-checkpoint-frequency", type=int, default=20, help="accepted; the newest is kept")
    add("--eval-period-iterations", type=int, default=1250, help="iterations between two evaluations")
    add("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES), help="rates for a batch of 256")
    add("--no-resume", action="store_true", help="start afresh where a checkpoint exists")
    add("--val-metric-type", default="mean_accuracy", choices=SELECTION_METRICS, help="what heads are chosen by")
    add(
        "--test-metric-types",
        nargs="+",
        choices=SELECTION_METRICS,
        help="accepted, one for each test set; every figure is reported of every set",
    )
    add("--classifier-fpath", help="file of a head to score without training")
    add("--val-class-mapping-fpath", help=".npy file with the training class of each class of the val set")
    add("--test-class-mapping-fpaths", nargs="+", default=[None], help="the same for each test set, or None")
    return parser
