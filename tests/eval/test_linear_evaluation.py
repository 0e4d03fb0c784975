"""Choosing and scoring a head of the linear probe, on features of any kind, and the heads that others have trained."""

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features, Scoring
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError, DataError
from dinov2.eval.linear import (
    PRESETS,
    LinearHeads,
    LinearSettings,
    LiveBatches,
    TokenColumns,
    create_linear_input,
    evaluate_head,
    evaluate_linear,
    get_args_parser,
    head_table,
)
from dinov2.eval.linear.evaluate import held_out_rows
from dinov2.eval.linear.heads import LEARNING_RATES
from dinov2.eval.linear.training import cached_batches, train_heads
from dinov2.models.heads import LinearHead
from tests.eval.test_linear import COLUMNS, GOLDEN, SMALL, classifier, problem, tokens

__all__ = ["tokens"]  # a fixture


def sets(n=300, n_val=90, seed=0, **kwargs):
    rows, classes = problem(n + n_val, seed=seed, **kwargs)
    return Features(rows[:n], classes[:n]), Features(rows[n:], classes[n:])


def probe(train, val, **kwargs):
    return evaluate_linear(train, val, **({"columns": COLUMNS, "settings": SMALL} | kwargs))


def test_the_head_is_chosen_on_held_out_images_and_scored_on_the_others():
    train, val = sets()
    evaluation = probe(train, val)
    settings = evaluation.rows[0].settings
    held_out = held_out_rows(train.labels)
    fitted = torch.tensor([i for i in range(300) if i not in set(held_out.tolist())])
    heads = LinearHeads(head_table(SMALL, COLUMNS), COLUMNS, n_classes=3)
    train_heads(heads, cached_batches(train.features[fitted], train.labels[fitted], batch_size=20), n_iterations=12)

    def accuracy(i, data):
        return 100 * (heads.head_logits(i, data.features).argmax(1) == data.labels).double().mean().item()

    on_held_out = [accuracy(i, train.take(held_out)) for i in range(8)]
    assert [head["selection"] for head in settings["grid"]] == pytest.approx(on_held_out, abs=1e-4)
    best = on_held_out.index(max(on_held_out))
    assert settings["head"] == heads.table[best].name
    assert evaluation.rows[0].value == pytest.approx(accuracy(best, val), abs=1e-4)
    (outcome,) = evaluation.outcomes.values()
    assert_close(outcome.probabilities, heads.head_logits(best, val.features).softmax(1), rtol=0, atol=1e-6)
    assert settings["selected_on"] == "30 of 300 training images" and settings["n_train"] == 270
    assert max(head["reported"] for head in settings["grid"]) == settings["best_of_grid_on_reported"]
    # The trained heads come back, the chosen one by its number.
    assert evaluation.chosen == best and evaluation.heads.table == heads.table
    for number in range(8):
        assert torch.equal(evaluation.heads.head(number)[0], heads.head(number)[0])


def test_the_releases_choice_on_the_reported_set_is_noted():
    train, val = sets()
    row = probe(train, val, select_on="val").rows[0]
    assert row.value == pytest.approx(row.settings["best_of_grid_on_reported"])
    assert row.settings["n_train"] == 300
    assert any("chosen on the reported set itself" in note for note in row.notes)


@pytest.mark.slow
def test_what_the_short_preset_leaves_out_is_said():
    settings = PRESETS["short"]
    assert settings.n_iterations * settings.batch_size * 25 == PRESETS["release"].n_iterations * 1024
    train, val = sets(60, 30)
    notes = " ".join(evaluate_linear(train, val, columns=COLUMNS, preset="short").rows[0].notes)
    assert (
        "preset short: 2000 iterations of 256 images and 6 rates, where the release has 12500 of 1024 and 13" in notes
    )
    assert "not augmented anew" in notes and "heads of 4 blocks read the 2 that there are" in notes


def test_a_head_that_diverged_is_never_chosen():
    train, val = sets()
    settings = LinearSettings(learning_rates=(1e40, 0.05), n_last_blocks=(1,), n_iterations=8, batch_size=20)
    row = probe(train, val, settings=settings).rows[0]
    assert row.settings["head"].endswith("lr=0.05")
    assert row.settings["grid"][0]["selection"] == 0


def test_features_without_tokens_are_one_input():
    train, val = sets()
    row = evaluate_linear(train, val, settings=SMALL).rows[0]
    assert [head["name"] for head in row.settings["grid"]] == ["blocks=1 lr=0.05", "blocks=1 lr=0.5"]
    assert "there are no patch tokens, so heads read class tokens alone" in row.notes


def test_labels_may_be_any_numbers():
    train, val = sets()
    moved = [Features(f.features, 7 * f.labels + 50) for f in (train, val)]
    assert [row.value for row in probe(train, val).rows] == [row.value for row in probe(*moved).rows]


def test_live_batches_train_and_the_cached_rows_choose():
    train, val = sets()
    cached = probe(train, val)
    held_out = set(held_out_rows(train.labels).tolist())
    fitted = torch.tensor([i for i in range(300) if i not in held_out])
    live = LiveBatches(
        cached_batches(train.features[fitted], train.labels[fitted], batch_size=20), {"loader": "a"}, note="augmented"
    )
    found = probe(train, val, live=live)
    assert [row.value for row in found.rows] == [row.value for row in cached.rows]
    assert "augmented" in found.rows[0].notes and not any("not augmented" in note for note in found.rows[0].notes)


def test_live_batches_bring_the_images_that_heads_are_chosen_on():
    train, val = sets()
    cached = probe(train, val)
    held_out = held_out_rows(train.labels)
    fitted = torch.ones(300, dtype=torch.bool)
    fitted[held_out] = False
    live = LiveBatches(
        cached_batches(train.features[fitted], train.labels[fitted], batch_size=20),
        {"loader": "a"},
        n_images=270,
        held_out=train.take(held_out),
    )
    one_of_each_class = Features(torch.zeros(3, COLUMNS.width), torch.arange(3))
    found = probe(one_of_each_class, val, live=live)
    assert [row.value for row in found.rows] == [row.value for row in cached.rows]
    names = ("head", "grid", "selected_on", "best_of_grid_on_reported", "n_train")
    assert [found.rows[0].settings[name] for name in names] == [cached.rows[0].settings[name] for name in names]
    assert not any("reported set" in note for note in found.rows[0].notes)


def test_evaluations_continue_from_checkpoints_and_show_their_curve(tmp_path):
    train, val = sets()
    store = CheckpointStore(tmp_path / "probe")
    steps = []
    first = probe(train, val, checkpoints=store, evaluate_every=5, on_step=lambda done, n: steps.append((done, n)))
    assert steps[-1] == (12, 12)
    curve = first.rows[0].settings["curve"]
    assert curve["iterations"] == [5, 10] and len(curve["selection"]) == 2
    second = probe(train, val, checkpoints=store)
    assert [row.value for row in second.rows] == [row.value for row in first.rows]
    assert "training continued from iteration 12" in second.rows[0].notes
    with pytest.raises(ConfigError, match="differs in features"):
        probe(Features(train.features + 1, train.labels), val, checkpoints=store)


# Other test sets, mappings, several labels, given heads.


def given_head(n_classes=20):
    head = LinearHead(64, layers=4, num_classes=n_classes)
    filled = classifier(4, True).linear
    head.load_state_dict({"weight": filled.weight[:n_classes], "bias": filled.bias[:n_classes]})
    return head


def test_a_given_head_is_scored_without_training(tokens):
    val = Features(create_linear_input(tokens, 4, True), torch.tensor([3, 1, 19]))
    evaluation = evaluate_head(given_head(), val, provenance={"dataset": "three images"})
    (outcome,) = evaluation.outcomes.values()
    expected = GOLDEN["logits.n4.avgpool_True"]
    assert_close(outcome.probabilities, expected.softmax(1), atol=1e-5, rtol=0)
    hits = (expected.argmax(1) == val.labels).double().mean().item()
    assert {row.metric: row.value for row in evaluation.rows}["top-1"] == pytest.approx(100 * hits)
    assert evaluation.rows[0].dataset == "three images"


def test_a_class_mapping_restricts_the_scores_as_the_reference_does(tokens):
    mapping = torch.tensor([3, 1, 19, 0, 7])
    val = Features(
        create_linear_input(tokens, 4, True),
        torch.tensor([0, 4, 2]),
        class_names=tuple("abcde"),
        scoring=Scoring(class_mapping=mapping),
    )
    evaluation = evaluate_head(given_head(), val)
    (outcome,) = evaluation.outcomes.values()
    assert_close(outcome.probabilities, GOLDEN["logits.mapped"].softmax(1), atol=1e-5, rtol=0)
    assert outcome.class_names == tuple("abcde")
    assert (evaluation.rows[0].settings["n_classes"], evaluation.rows[0].settings["n_answers"]) == (20, 5)
    assert "answers are chosen among the 5 classes of the validation set, not among all 20" in evaluation.rows[0].notes


def test_classes_of_a_given_head_are_matched_by_name(tokens):
    names = tuple("abcdefghijklmnopqrst")
    rows = create_linear_input(tokens, 4, True)
    by_number = evaluate_head(given_head(), Features(rows, torch.tensor([3, 1, 19])))
    by_name = evaluate_head(
        given_head(), Features(rows, torch.tensor([1, 0, 2]), class_names=("b", "d", "t")), class_names=names
    )
    assert [row.value for row in by_name.rows] == [row.value for row in by_number.rows]


def test_any_of_several_labels_counts_in_real_figures(tokens):
    logits = GOLDEN["logits.n4.avgpool_True"]
    best, worst = logits.argmax(1), logits.argmin(1)
    rows = create_linear_input(tokens, 4, True)
    label_sets = torch.stack(
        [torch.stack([worst[0], best[0]]), torch.tensor([-1, -1]), torch.stack([worst[2], worst[2]])]
    )
    val = Features(rows, torch.zeros(3, dtype=torch.int64), scoring=Scoring(label_sets=label_sets))
    found = evaluate_head(given_head(), val)
    real = {row.metric: row for row in found.rows if row.metric.startswith("real")}
    assert (real["real top-1"].value, real["real top-1"].n) == (50.0, 2)
    assert real["real top-5"].value == 50.0


def test_further_sets_are_scored_with_the_chosen_head():
    train, val = sets()
    mapping = Scoring(class_mapping=torch.tensor([2, 0]))
    mapped = Features(val.features, (val.labels == 0).long(), scoring=mapping)
    evaluation = probe(train, val, tests=(("two classes", mapped), ("once more", val)))
    rows = {(row.dataset, row.metric): row.value for row in evaluation.rows}
    assert rows["", "top-1"] == rows["once more", "top-1"]
    outcomes = list(evaluation.outcomes.values())
    expected = outcomes[0].probabilities[:, [2, 0]]
    expected = expected / expected.sum(1, keepdim=True)
    assert_close(outcomes[1].probabilities, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"preset": "quick"}, ConfigError, "no preset of the linear probe is called 'quick'"),
        ({"metric": "f1"}, ConfigError, "no metric is called 'f1'"),
        ({"select_on": "train"}, ConfigError, "on split or val"),
        ({"columns": TokenColumns(4, 2)}, ConfigError, r"make \[B, 12\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        probe(*sets(60, 30), **kwargs)


def test_a_head_can_be_chosen_on_a_set_that_is_scored_among_its_own_classes():
    train, val = sets()
    few = (val.labels > 0).nonzero().squeeze(1)
    mapped = Features(val.features[few], val.labels[few] - 1, scoring=Scoring(class_mapping=torch.tensor([1, 2])))
    row = probe(train, mapped, select_on="val").rows[0]
    assert row.value == pytest.approx(row.settings["best_of_grid_on_reported"])
    assert row.value >= probe(train, val.take(few), select_on="val").rows[0].value


def test_test_images_that_are_not_finite_are_refused_by_their_name():
    train, val = sets(60, 30)
    with pytest.raises(DataError, match="for 30 of 30 images of sketches"):
        probe(train, val, tests=(("sketches", Features(val.features * torch.nan, val.labels)),))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda f: Features(f.features, torch.zeros_like(f.labels)), "all training images are of one class"),
        (lambda f: Features(f.features), "training images have no labels"),
        (lambda f: Features(f.features * torch.inf, f.labels), "for 60 of 60 training images"),
    ],
)
def test_unusable_features_are_refused(train, message):
    good, val = sets(60, 30)
    with pytest.raises(DataError, match=message):
        probe(train(good), val)


def test_a_head_of_other_features_or_classes_is_refused(tokens):
    rows = create_linear_input(tokens, 4, True)
    with pytest.raises(DataError, match=r"reads 320 features, but the images have \[64\]"):
        evaluate_head(given_head(), Features(rows[:, :64], torch.arange(3)))
    with pytest.raises(DataError, match="there is a label 25, but the head has 20 classes"):
        evaluate_head(given_head(), Features(rows, torch.tensor([1, 2, 25])))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"n_iterations": 0}, "0 iterations of 1024 images"), ({"learning_rates": (0.0,)}, "must be positive")],
)
def test_budgets_that_train_nothing_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        LinearSettings(**kwargs)


def test_the_releases_flags_and_defaults_are_understood():
    command = "--test-datasets A B --test-class-mapping-fpaths None b.npy --learning-rates 0.1 --no-resume --epochs 2"
    args = get_args_parser().parse_args(command.split())
    assert (args.test_datasets, args.test_class_mapping_fpaths) == (["A", "B"], ["None", "b.npy"])
    assert (args.learning_rates, args.no_resume, args.epochs) == ([0.1], True, 2)
    defaults = get_args_parser().parse_args([])
    assert (defaults.epochs, defaults.epoch_length, defaults.batch_size, defaults.num_workers) == (10, 1250, 128, 8)
    assert tuple(defaults.learning_rates) == LEARNING_RATES
    assert (defaults.save_checkpoint_frequency, defaults.eval_period_iterations) == (20, 1250)
    assert (defaults.val_metric_type, defaults.test_class_mapping_fpaths) == ("mean_accuracy", [None])
