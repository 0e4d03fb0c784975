"""The linear probe: all heads of the release's grid trained at once, one chosen, scored.

`evaluate_linear` goes from features to result rows; `evaluate_head` scores a head that is there already. `train_heads`
takes batches of cached features or of a live loader.
"""

from dinov2.eval.linear.arguments import get_args_parser
from dinov2.eval.linear.evaluation import LiveBatches, evaluate_linear, held_out_rows
from dinov2.eval.linear.given_head import evaluate_head
from dinov2.eval.linear.grid import LEARNING_RATES, PRESETS, Head, LinearSettings, head_table, scale_lr
from dinov2.eval.linear.heads import LinearHeads
from dinov2.eval.linear.inputs import LinearClassifier, LinearPostprocessor, TokenColumns, create_linear_input
from dinov2.eval.linear.training import cached_batches, cosine_decay, train_heads

__all__ = [
    "LEARNING_RATES",
    "PRESETS",
    "Head",
    "LinearClassifier",
    "LinearHeads",
    "LinearPostprocessor",
    "LinearSettings",
    "LiveBatches",
    "TokenColumns",
    "cached_batches",
    "cosine_decay",
    "create_linear_input",
    "evaluate_head",
    "evaluate_linear",
    "get_args_parser",
    "head_table",
    "held_out_rows",
    "scale_lr",
    "train_heads",
]
