"""Evaluations of a model's features on labelled images: each protocol as a function with plain arguments.

`datasets` opens and splits images, `extractors` says what is evaluated, `features` extracts once and keeps; `knn`,
`probes` and `released_head` are one protocol each, and `everything` runs all of them for several models.
"""

__all__: list[str] = []
