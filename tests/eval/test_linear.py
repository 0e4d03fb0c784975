"""The linear probe against golden figures, torch's own optimiser, a direct fit, and a run that was never stopped."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError, DataError
from dinov2.eval.linear import (
    LinearClassifier,
    LinearHeads,
    LinearPostprocessor,
    LinearSettings,
    TokenColumns,
    create_linear_input,
    head_table,
    scale_lr,
)
from dinov2.eval.linear.heads import LEARNING_RATES
from dinov2.eval.linear.training import cached_batches, cosine_decay, train_heads
from dinov2.eval.log_regression import fit_path
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.loading import golden_json, golden_tensors
from tests.golden.recipe import fill, images

GOLDEN, FIGURES = golden_tensors("linear"), golden_json("linear")
INPUTS = [(1, False), (1, True), (4, False), (4, True)]
COLUMNS = TokenColumns(embed_dim=3, n_blocks=2)
SMALL = LinearSettings(learning_rates=(0.05, 0.5), n_last_blocks=(1, 2), n_iterations=12, batch_size=20)


@pytest.fixture(scope="module")
def tokens():
    arguments = golden_json("backbone_tiny")["constructor"]["plain_mlp"]
    model = fill(DinoVisionTransformer(**arguments)).eval()
    with torch.no_grad():
        return model.get_intermediate_layers(images(3, 98, 112), n=4, return_class_token=True)


def classifier(n_blocks, avgpool):
    return fill(LinearClassifier(64 * (n_blocks + avgpool), n_blocks, avgpool, num_classes=20))


@pytest.mark.parametrize(("n_blocks", "avgpool"), INPUTS)
def test_inputs_and_logits_equal_the_reference(tokens, n_blocks, avgpool):
    name = f"n{n_blocks}.avgpool_{avgpool}"
    made = create_linear_input(tokens, n_blocks, avgpool)
    assert_close(made, GOLDEN[f"input.{name}"], atol=2e-5, rtol=0)
    with torch.no_grad():
        assert_close(classifier(n_blocks, avgpool)(tokens), GOLDEN[f"logits.{name}"], atol=2e-5, rtol=0)
    # The columns of the widest input hold all others side by side.
    columns = TokenColumns(64)
    assert torch.equal(create_linear_input(tokens, 4, True)[:, columns.part(n_blocks, avgpool)], made)


def test_mapped_logits_equal_the_reference(tokens):
    mapped = LinearPostprocessor(classifier(4, True), class_mapping=[3, 1, 19, 0, 7])
    with torch.no_grad():
        found = mapped(tokens, torch.arange(3))
    assert_close(found["preds"], GOLDEN["logits.mapped"], atol=2e-5, rtol=0)
    assert found["target"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 128), (8, 128), (2, 32)])
def test_names_and_rates_of_the_grid_equal_the_reference(world_size, batch_size):
    expected = FIGURES[f"world{world_size}_batch{batch_size}"]
    table = head_table(LinearSettings(batch_size=world_size * batch_size), TokenColumns(64))
    assert [head.rate for head in table] == pytest.approx(expected["lr"], rel=1e-9)
    assert list(dict.fromkeys(head.release_name for head in table)) == expected["names"]
    # The reference loses the heads that share a name; here all 52 are trained.
    assert len(table) == 52 and len(expected["names"]) == expected["kept"]
    assert len({head.name for head in table}) == 52


def test_the_releases_rule_of_rates():
    assert [scale_lr(rate, 128) for rate in LEARNING_RATES] == pytest.approx(
        FIGURES["world1_batch128"]["lr"][:13], rel=1e-9
    )


def test_three_steps_of_training_equal_the_reference():
    training, columns = FIGURES["training"], TokenColumns(64)
    settings = LinearSettings(learning_rates=(0.05,), n_last_blocks=(4,), avgpools=(True,), batch_size=256)
    heads = LinearHeads(head_table(settings, columns), columns, n_classes=20)
    reference = classifier(4, True).linear
    state = heads.state_dict()["0"]
    state["weights"].copy_(reference.weight.detach())
    state["biases"].copy_(reference.bias.detach())
    rows, targets = GOLDEN["input.n4.avgpool_True"], torch.tensor(training["targets"])
    for number, step in enumerate(training["steps"]):
        decay = cosine_decay(number, training["max_iter"])
        assert 0.05 * decay == pytest.approx(step["lr"], rel=1e-9)
        loss = heads.step(rows, targets, decay=decay, momentum=training["momentum"])
        weight, bias = heads.head(0)
        assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
        assert weight.norm().item() == pytest.approx(step["weight_l2"], rel=1e-5)
        assert weight.sum().item() == pytest.approx(step["weight_sum"], abs=1e-4)
        assert_close(bias, torch.tensor(step["bias"]), atol=1e-6, rtol=1e-4)


def problem(n=200, n_classes=3, columns=COLUMNS, seed=0, distance=1.0):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(n) % n_classes
    centres = distance * torch.randn(n_classes, columns.width, generator=generator)
    return centres[classes] + torch.randn(n, columns.width, generator=generator), classes


def test_all_heads_at_once_are_what_torch_trains_one_by_one():
    rows, classes = problem()
    table = head_table(SMALL, COLUMNS)
    heads = LinearHeads(table, COLUMNS, n_classes=3, seed=5)
    starts = [heads.head(i) for i in range(len(table))]
    batches = cached_batches(rows, classes, batch_size=20)
    losses = []
    train_heads(heads, batches, n_iterations=12, after=lambda done, loss: losses.append(loss))
    for i, head in enumerate(table):
        linear = torch.nn.Linear(starts[i][0].shape[1], 3)
        with torch.no_grad():
            linear.weight.copy_(starts[i][0])
            linear.bias.copy_(starts[i][1])
        optimizer = torch.optim.SGD(linear.parameters(), lr=head.rate, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=0)
        for number, (batch, targets) in zip(range(12), batches(0), strict=False):
            loss = cross_entropy(linear(batch[:, COLUMNS.part(head.n_blocks, head.avgpool)]), targets)
            assert_close(losses[number][i], loss.detach(), rtol=1e-4, atol=1e-6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        weight, bias = heads.head(i)
        assert_close(weight, linear.weight.detach(), rtol=0, atol=1e-5)
        assert_close(bias, linear.bias.detach(), rtol=0, atol=1e-5)
        assert_close(heads.head_logits(i, rows), linear(rows[:, COLUMNS.part(head.n_blocks, head.avgpool)]).detach())


def test_the_probe_reaches_the_minimum_that_a_direct_fit_finds():
    columns = TokenColumns(6, 1, pooled=False)
    rows, classes = problem(300, 4, columns, distance=0.7)
    settings = LinearSettings(learning_rates=(0.1, 1.0), n_last_blocks=(1,), avgpools=(False,), n_iterations=600)
    heads = LinearHeads(head_table(settings, columns), columns, n_classes=4)
    train_heads(heads, cached_batches(rows, classes, batch_size=300), n_iterations=600)
    direct = fit_path(rows, classes, n_classes=4, Cs=[1e6], tol=1e-6)[0].scores(rows)
    lowest = cross_entropy(direct, classes).item()
    assert lowest > 0.1  # the classes overlap, so that there is a minimum
    best = min(cross_entropy(heads.head_logits(i, rows), classes).item() for i in range(2))
    assert lowest - 1e-4 <= best <= lowest + 1e-3
    agree = (heads.head_logits(1, rows).argmax(1) == direct.argmax(1)).double().mean()
    assert agree >= 0.99


def test_a_run_that_stopped_ends_bit_for_bit_as_one_that_did_not(tmp_path):
    rows, classes = problem()
    batches = cached_batches(rows, classes, batch_size=20)

    def run(checkpoints, **kwargs):
        heads = LinearHeads(head_table(SMALL, COLUMNS), COLUMNS, n_classes=3)
        began = train_heads(heads, batches, n_iterations=12, checkpoints=checkpoints, save_every=4, **kwargs)
        return heads, began

    whole, _ = run(None)
    store = CheckpointStore(tmp_path / "probe")
    _, began = run(store, until=7)
    assert (began, store.steps()) == (0, [4, 7])
    continued, began = run(store)
    assert began == 7
    # Finished: loaded, and not trained any further.
    again, began = run(store)
    assert began == 12 and store.latest() == 12
    for heads in (continued, again):
        for name, group in whole.state_dict().items():
            for key, tensor in group.items():
                assert torch.equal(tensor, heads.state_dict()[name][key])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    rows, classes = problem()
    store = CheckpointStore(tmp_path / "probe")

    def run(settings=SMALL, **identity):
        heads = LinearHeads(head_table(settings, COLUMNS), COLUMNS, n_classes=3)
        batches = cached_batches(rows, classes, batch_size=20)
        return train_heads(heads, batches, n_iterations=4, checkpoints=store, identity=identity)

    run(model="a")
    with pytest.raises(ConfigError, match="differs in model; give another output folder"):
        run(model="b")
    with pytest.raises(ConfigError, match="differs in grid"):
        run(LinearSettings(learning_rates=(0.05, 0.4), n_last_blocks=(1, 2), batch_size=20), model="a")


def test_batches_see_every_image_once_an_epoch_from_any_iteration_on():
    rows, classes = torch.arange(30.0).unsqueeze(1), torch.arange(30)
    batches = cached_batches(rows, classes, batch_size=6, seed=1)
    taken = [batch for _, batch in zip(range(10), batches(0), strict=False)]
    first, second = (torch.cat([labels for _, labels in taken[e : e + 5]]) for e in (0, 5))
    assert torch.equal(first.sort().values, classes) and torch.equal(second.sort().values, classes)
    assert not torch.equal(first, second)
    assert torch.equal(next(iter(batches(7)))[1], taken[7][1])
    assert torch.equal(taken[7][0].squeeze(1).long(), taken[7][1])


def test_batches_that_end_early_are_an_error():
    rows, classes = problem(20)
    heads = LinearHeads(head_table(SMALL, COLUMNS), COLUMNS, n_classes=3)
    with pytest.raises(DataError, match="ended after 2 of 5 iterations"):
        train_heads(heads, lambda first: [(rows, classes)] * 2, n_iterations=5)
