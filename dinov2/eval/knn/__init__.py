"""k-nearest-neighbour classification of frozen features: no training, no knob that matters much.

`evaluate_knn` goes from two sets of features to result rows, `search.py` finds the neighbours, and `KnnModule` has the
call surface of the public release.
"""

from dinov2.eval.knn.evaluate import evaluate_knn
from dinov2.eval.knn.release import KnnModule, get_args_parser

__all__ = ["KnnModule", "evaluate_knn", "get_args_parser"]
