"""The linear probe: all heads of the release's grid trained at once, one chosen, scored.

`evaluate_linear` goes from features to result rows and the trained heads; `evaluate_head` scores a head that is there
already. `release.py` has the names of the public release.
"""

from dinov2.eval.linear.evaluate import LinearEvaluation, LiveBatches, evaluate_head, evaluate_linear
from dinov2.eval.linear.heads import PRESETS, LinearHeads, LinearSettings, TokenColumns, head_table
from dinov2.eval.linear.release import (
    LinearClassifier,
    LinearPostprocessor,
    create_linear_input,
    get_args_parser,
    scale_lr,
)

__all__ = [
    "PRESETS",
    "LinearClassifier",
    "LinearEvaluation",
    "LinearHeads",
    "LinearPostprocessor",
    "LinearSettings",
    "LiveBatches",
    "TokenColumns",
    "create_linear_input",
    "evaluate_head",
    "evaluate_linear",
    "get_args_parser",
    "head_table",
    "scale_lr",
]
