"""The linear probe and logistic regression over two gloo processes give what one process gives."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.eval.linear import LinearHeads, LinearSettings, TokenColumns, head_table
from dinov2.eval.linear.training import cached_batches, train_heads
from dinov2.eval.log_regression import evaluate_log_regression, fit_path
from tests.eval.two_processes import on_two_processes

COLUMNS = TokenColumns(embed_dim=3, n_blocks=2)
# 21 images a step and 201 rows in all do not divide by two.
SETTINGS = LinearSettings(learning_rates=(0.05, 0.5), n_last_blocks=(1, 2), n_iterations=15, batch_size=21)


def data():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(201) % 3
    return torch.randn(3, 9, generator=generator)[classes] + torch.randn(201, 9, generator=generator), classes


def probed(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of two heads of a run that stops in the middle and continues."""
    rows, classes = data()
    batches = cached_batches(rows, classes, batch_size=21)
    losses: list[torch.Tensor] = []
    for until in (8, None):
        heads = LinearHeads(head_table(SETTINGS, COLUMNS), COLUMNS, n_classes=3)
        train_heads(
            heads,
            batches,
            n_iterations=15,
            checkpoints=CheckpointStore(folder),
            until=until,
            after=lambda done, loss: losses.append(loss),
        )
    return {"first": heads.head(0)[0], "last": heads.head(7)[0], "losses": torch.stack(losses)}


def regressed() -> dict[str, torch.Tensor]:
    rows, classes = data()
    fit = fit_path(rows, classes, n_classes=3, Cs=[0.1, 10.0], tol=1e-6, dtype=torch.float64)[1]
    train, val = Features(rows[:150], classes[:150]), Features(rows[150:], classes[150:])
    evaluation = evaluate_log_regression(train, val, Cs=(0.01, 1.0))
    values = torch.tensor([row.value for row in evaluation.rows])
    return {"weights": fit.weights, "values": values}


def work(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    return {**probed(folder / "probe"), **regressed()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(work, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_both_processes_have_the_same_heads_bit_for_bit(ranks):
    for key, value in ranks[0].items():
        assert torch.equal(value, ranks[1][key]), key


@pytest.mark.slow
def test_heads_and_losses_are_those_of_one_process(ranks, tmp_path):
    alone = probed(tmp_path / "probe")
    for key, value in alone.items():
        assert_close(ranks[0][key], value, rtol=0, atol=1e-5, msg=key)


@pytest.mark.slow
def test_logistic_regression_is_that_of_one_process(ranks):
    alone = regressed()
    assert_close(ranks[0]["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert_close(ranks[0]["values"], alone["values"])
