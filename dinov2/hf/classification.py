"""The loss of a classifier for the three kinds of labels, and the sentence about a head that was never trained."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["classification_loss", "problem_of", "warn_about_fresh_head"]


def problem_of(labels: Tensor, num_labels: int, problem_type: str | None) -> str:
    """`problem_type`, or what labels of this type and a head of this width suggest; nothing is written anywhere."""
    if problem_type is not None:
        return problem_type
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(
    logits: Tensor,  # [B, C]
    labels: Tensor,  # see `problem_of`
    *,
    problem_type: str | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:  # []
    """Mean squared error, cross entropy or binary cross entropy, the mean of it or the sum over `num_items`.

    Raises `ValueError` for an unknown problem type, or labels whose number does not fit the logits.
    """
    labels = labels.to(logits.device)
    num_labels = logits.shape[-1]
    problem = problem_of(labels, num_labels, problem_type)
    reduction = "mean" if num_items is None else "sum"
    if problem == "regression":
        flat = num_labels == 1
        predicted, wanted = (logits.flatten(), labels.flatten()) if flat else (logits, labels)
        _check(predicted, wanted, labels)
        loss = F.mse_loss(predicted, wanted.to(logits.dtype), reduction=reduction)
    elif problem == "single_label_classification":
        predicted, wanted = logits.reshape(-1, num_labels), labels.flatten().long()
        if len(predicted) != len(wanted):
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit logits {list(logits.shape)}; give one class number "
                "an image, or 0 and 1 for every class with problem_type='multi_label_classification'"
            )
        loss = F.cross_entropy(predicted, wanted, reduction=reduction)
    elif problem == "multi_label_classification":
        _check(logits, labels, labels)
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)
    else:
        raise ValueError(
            f"config.problem_type is {problem!r}; choose regression, single_label_classification, "
            "multi_label_classification, or None to tell by the labels"
        )
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, torch.Tensor) else num_items)


def warn_about_fresh_head(source: Any, missing: Iterable[str]) -> None:
    """Warns when a checkpoint had no classifier, and names the repository that has one."""
    if not any(key.startswith("classifier.") for key in missing):
        return
    name = "the given state dict" if source is None else str(source).rstrip("/")
    known = name.startswith("facebook/dinov2") and "imagenet1k" not in name
    way_out = (
        f"{name}-imagenet1k-1-layer has one for the classes of ImageNet"
        if known
        else "the released ones are in the repositories called facebook/dinov2-...-imagenet1k-1-layer"
    )
    warnings.warn(
        f"{name} holds a backbone and no classifier, so the classifier has random weights and its answers mean nothing "
        f"before it is trained; {way_out}",
        UserWarning,
        stacklevel=3,
    )


def _check(predicted: Tensor, wanted: Tensor, labels: Tensor) -> None:
    if predicted.shape != wanted.shape:
        raise ValueError(
            f"labels of shape {list(labels.shape)} do not fit predictions of shape {list(predicted.shape)}; "
            "give one number for every prediction"
        )
