"""Figures of two gloo processes with unequal, overlapping shares are those of one process and of torchmetrics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2.features.metrics import classification_figures, gather_records, sample_records
from tests.eval.two_processes import on_two_processes

N, C = 103, 7
FIRST = 41  # of 103: neither half


def everything() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(N, C, generator=generator)).softmax(dim=1)
    return probabilities, torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def figures_of(probabilities: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> dict[str, object]:
    records = gather_records(sample_records(probabilities[rows], targets[rows], indices=rows))
    return dict(classification_figures(records, n_resamples=200, n_curve_resamples=20))


def work(rank: int, folder: Path) -> dict[str, Any]:
    probabilities, targets = everything()
    own = torch.arange(FIRST) if rank == 0 else torch.arange(FIRST, N)
    # As a padding sampler deals them out: alternately, and the first image once more to fill up.
    dealt = torch.arange(rank, N + 1, 2) % N
    # One process that has no image at all.
    lonely = torch.arange(N) if rank else torch.empty(0, dtype=torch.int64)
    return {
        "contiguous": figures_of(probabilities, targets, own),
        "padded": figures_of(probabilities, targets, dealt),
        "lonely": records_of_nothing_and_all(probabilities, targets, lonely),
    }


def records_of_nothing_and_all(probabilities: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> list[int]:
    all_rows = sample_records(probabilities, targets)
    return gather_records(all_rows.take(rows)).indices.tolist()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(work, tmp_path_factory.mktemp("metrics"))


@pytest.mark.parametrize("shares", ["contiguous", "padded"])
def test_both_processes_have_the_figures_of_one(found: list[dict[str, Any]], shares: str) -> None:
    alone = figures_of(*everything(), torch.arange(N))
    assert found[0][shares] == alone
    assert found[1][shares] == alone


def test_they_are_the_figures_of_torchmetrics(found: list[dict[str, Any]]) -> None:
    # Imported here, because the processes import this module too and the library takes seconds.
    torchmetrics = pytest.importorskip("torchmetrics.classification")

    theirs = {
        "top-1": torchmetrics.MulticlassAccuracy(C, average="micro"),
        "top-5": torchmetrics.MulticlassAccuracy(C, average="micro", top_k=5),
        "mean-per-class": torchmetrics.MulticlassAccuracy(C, average="macro"),
        "ece": torchmetrics.MulticlassCalibrationError(C, n_bins=15),
    }
    for own in found:
        for name, metric in theirs.items():
            expected = metric(*everything()).item()
            assert own["padded"][name].value == pytest.approx(expected, abs=1e-6)


def test_a_process_may_bring_no_image(found: list[dict[str, Any]]) -> None:
    assert found[0]["lonely"] == found[1]["lonely"] == list(range(N))
