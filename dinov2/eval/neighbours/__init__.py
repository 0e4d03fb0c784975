"""Exact nearest neighbours by dot product with bounded memory, and the soft vote of a k-NN classifier.

`search.py` streams training rows past the queries, `scans.py` multiplies them in the number format that the processor
is fast in and bounds what its rounding can hide, `shortlist.py` keeps what may still be among the best and settles it
in float64, `shares.py` spreads a search over several processes, `faiss_index.py` hands it to FAISS on request.
"""

from dinov2.eval.neighbours.search import nearest_neighbours
from dinov2.eval.neighbours.shares import neighbours_of_own_queries, neighbours_of_shared_rows, own_share
from dinov2.eval.neighbours.shortlist import merge_neighbours
from dinov2.eval.neighbours.vote import soft_vote

__all__ = [
    "merge_neighbours",
    "nearest_neighbours",
    "neighbours_of_own_queries",
    "neighbours_of_shared_rows",
    "own_share",
    "soft_vote",
]
