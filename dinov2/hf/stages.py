"""Which stages a backbone gives out: names and indices brought into line, by the rules of transformers.

A model of L blocks has L + 1 stages: `stem` (the embeddings), `stage1` ... `stageL` (the output of each block).
"""

from collections.abc import Sequence

__all__ = ["aligned_stages", "stage_names_of"]


def stage_names_of(depth: int) -> list[str]:
    """`["stem", "stage1", ..., "stage<depth>"]`."""
    return ["stem", *(f"stage{index}" for index in range(1, depth + 1))]


def aligned_stages(
    names: Sequence[str],
    out_features: Sequence[str] | None,
    out_indices: Sequence[int] | None,
) -> tuple[list[str], list[int]]:
    """Both spellings of the chosen stages of `names`: what is not given follows from the other, nothing is the last.

    Negative indices stay as they are given. Raises `ValueError` for stages that do not exist, are named twice, out of
    order, or differently in the two spellings.
    """
    features = None if out_features is None else _checked_names(names, out_features)
    indices = None if out_indices is None else _checked_indices(names, out_indices)
    if features is None and indices is None:
        return [names[-1]], [len(names) - 1]
    if indices is None:
        assert features is not None
        return features, [names.index(name) for name in features]
    if features is None:
        return [names[index] for index in indices], indices
    if len(features) != len(indices):
        raise ValueError(
            f"out_features and out_indices should have the same length, got {len(features)} and {len(indices)}; "
            "give one of them, the other follows"
        )
    if features != [names[index] for index in indices]:
        raise ValueError(
            f"out_features {features} and out_indices {indices} should correspond to the same stages; give one of "
            "them, the other follows"
        )
    return features, indices


def _checked_names(names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    if isinstance(chosen, str) or not isinstance(chosen, (list, tuple)):
        raise ValueError(f'out_features must be a list such as ["stage1"], got {chosen!r}')
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(f"out_features must be a subset of stage_names, {unknown} are not among {list(names)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"out_features must not contain any duplicates, got {list(chosen)}")
    in_order = [name for name in names if name in chosen]
    if list(chosen) != in_order:
        raise ValueError(
            f"out_features must be in the same order as stage_names, expected {in_order} got {list(chosen)}"
        )
    return list(chosen)


def _checked_indices(names: Sequence[str], chosen: Sequence[int]) -> list[int]:
    if not isinstance(chosen, (list, tuple)):
        raise ValueError(f"out_indices must be a list such as [-1], got {chosen!r}")
    n_stages = len(names)
    beyond = [index for index in chosen if not -n_stages <= index < n_stages]
    if beyond:
        raise ValueError(
            f"out_indices must be valid indices for stage_names, {beyond} are not among the {n_stages} stages "
            f"{list(names)}"
        )
    places = [index % n_stages for index in chosen]
    if len(set(places)) < len(places):
        raise ValueError(f"out_indices must not contain any duplicates, got {list(chosen)}, which are {places}")
    if places != sorted(places):
        in_order = [index for _, index in sorted(zip(places, chosen, strict=True))]
        raise ValueError(
            f"out_indices must be in the same order as stage_names, expected {in_order} got {list(chosen)}"
        )
    return list(chosen)
