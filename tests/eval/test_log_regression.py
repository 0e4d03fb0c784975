"""Logistic regression against scikit-learn, a Newton iteration written out, and the rules of its evaluation."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features, Scoring
from dinov2.errors import ConfigError, DataError, MissingDependency
from dinov2.eval.log_regression import C_GRID, LogRegModule, evaluate_log_regression, fit_path, get_args_parser
from dinov2.eval.selection import random_split, stratified_split

KINDS = ("round", "two classes", "imbalanced", "collinear", "scaled", "separable", "wide")


class LogisticRegression:
    """`fit_path` for one C with scikit-learn's manners."""

    def __init__(self, C, **options):
        self.C, self.options = C, options

    def fit(self, X, y):
        n_classes = int(y.max()) + 1
        (self.fitted,) = fit_path(X, y, n_classes=n_classes, Cs=[self.C], **self.options)
        weights, intercepts = self.fitted.weights, self.fitted.intercepts
        if n_classes == 2:  # one vector for both
            weights, intercepts = weights[1:] - weights[:1], intercepts[1:] - intercepts[:1]
        self.coef_, self.intercept_ = weights, intercepts
        return self

    def predict_proba(self, X):
        return self.fitted.scores(X).softmax(dim=1)

    def score(self, X, y):
        return float((self.fitted.scores(X).argmax(dim=1) == y).double().mean())


def blobs(n, width, n_classes, *, shares=None, distance=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shares = torch.ones(n_classes) if shares is None else torch.tensor(shares)
    labels = torch.multinomial(shares, n, replacement=True, generator=generator)
    labels[:n_classes] = torch.arange(n_classes)
    centres = distance * torch.randn(n_classes, width, generator=generator)
    return centres[labels] + torch.randn(n, width, generator=generator), labels


def problem(kind):
    match kind:
        case "round":
            return blobs(300, 8, 4)
        case "two classes":
            return blobs(200, 5, 2)
        case "imbalanced":
            return blobs(400, 6, 5, shares=[0.8, 0.1, 0.05, 0.03, 0.02])
        case "collinear":  # doubled, mixed and constant columns
            X, y = blobs(300, 6, 3)
            return torch.cat([X, X[:, :2], X @ torch.ones(6, 3) / 3, torch.full((300, 1), 5.0)], dim=1), y
        case "scaled":  # far from the origin, and axes of very different length
            X, y = blobs(300, 6, 3)
            return X * torch.tensor([0.2, 0.5, 1.0, 1.0, 2.0, 5.0]) + 5, y
        case "separable":
            return blobs(120, 6, 3, distance=6.0)
        case "wide":  # fewer images than features
            return blobs(40, 60, 4)
    raise AssertionError(kind)


def objective(weights, intercepts, X, y, C):
    losses = torch.nn.functional.cross_entropy(X.double() @ weights.T + intercepts, y, reduction="sum")
    return float(0.5 * weights.square().sum() + C * losses)


@pytest.mark.parametrize("C", [1e-4, 0.1, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_and_probabilities_are_those_of_scikit_learn(kind, C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y = problem(kind)
    ours = LogisticRegression(C, tol=1e-6, dtype=torch.float64).fit(X, y)
    theirs = linear_model.LogisticRegression(C=C, tol=1e-9, max_iter=100_000).fit(X.double().numpy(), y.numpy())
    expected = torch.from_numpy(theirs.coef_)
    assert ours.coef_.shape == expected.shape and ours.intercept_.shape == theirs.intercept_.shape
    assert_close(ours.coef_, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    probabilities = torch.from_numpy(theirs.predict_proba(X.double().numpy()))
    assert_close(ours.predict_proba(X.double()), probabilities, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_products_reach_the_same_minimum(kind):
    X, y = problem(kind)
    K = int(y.max()) + 1
    for C in (1e-3, 10.0):
        exact, single = (
            fit_path(X, y, n_classes=K, Cs=[C], tol=1e-5, dtype=d)[0] for d in (torch.float64, torch.float32)
        )
        assert exact.converged and single.converged
        factor = C / 2 if K == 2 else C
        low, found = (objective(fit.weights, fit.intercepts, X, y, factor) for fit in (exact, single))
        assert found - low <= 1e-6 * factor * len(X)


def test_the_gradient_of_the_objective_vanishes_at_the_solution():
    X, y = problem("imbalanced")
    fit = fit_path(X, y, n_classes=5, Cs=[2.0], tol=1e-7, dtype=torch.float64)[0]
    weights, intercepts = fit.weights.clone().requires_grad_(), fit.intercepts.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(X.double() @ weights.T + intercepts, y, reduction="sum")
    (0.5 * weights.square().sum() + 2.0 * losses).backward()
    assert float(weights.grad.norm()) < 1e-3
    assert float(intercepts.grad.norm()) < 1e-3


def test_the_convergence_measure_bounds_what_the_loss_can_still_fall():
    X, y = problem("round")
    best = objective(*fit_path(X, y, n_classes=4, Cs=[1.0], tol=1e-8, dtype=torch.float64)[0][1:3], X, y, 1.0)
    for tol in (1e-1, 1e-2, 1e-3):
        fit = fit_path(X, y, n_classes=4, Cs=[1.0], tol=tol, dtype=torch.float64)[0]
        assert fit.gradient <= tol
        assert (objective(*fit[1:3], X, y, 1.0) - best) / len(X) <= 3 * tol**2


def test_the_whole_grid_at_once_equals_one_c_at_a_time():
    X, y = problem("round")
    grid = C_GRID[::6]
    together = fit_path(X, y, n_classes=4, Cs=grid, tol=1e-6, dtype=torch.float64)
    warm = fit_path(X, y, n_classes=4, Cs=grid, tol=1e-6, dtype=torch.float64, at_once=1)
    descending = fit_path(X, y, n_classes=4, Cs=grid[::-1], tol=1e-6, dtype=torch.float64, at_once=3)[::-1]
    for C, *fits in zip(grid, together, warm, descending, strict=True):
        for fit in fits:
            assert C == fit.C and fit.converged
            assert_close(fit.weights, fits[0].weights, rtol=0, atol=1e-4 * float(fits[0].weights.abs().max()))


def test_a_good_start_saves_iterations():
    X, y = problem("collinear")
    first = fit_path(X[:280], y[:280], n_classes=3, Cs=[10.0])[0]
    cold, warm = (fit_path(X, y, n_classes=3, Cs=[10.0], start=start)[0] for start in (None, first))
    assert warm.n_iterations < cold.n_iterations
    assert_close(warm.weights, cold.weights, rtol=0, atol=2e-3)


def test_fits_are_repeatable_bit_for_bit():
    X, y = problem("round")
    one, two = (fit_path(X, y, n_classes=4, Cs=[0.1, 10.0]) for _ in range(2))
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(one, two, strict=True))


def test_features_without_any_spread_leave_the_shares_of_the_classes():
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    model = LogisticRegression(1.0).fit(torch.full((6, 3), 2.0), y)
    assert_close(
        model.predict_proba(torch.zeros(1, 3, dtype=torch.float64))[0].tolist(),
        [1 / 2, 1 / 6, 1 / 3],
        rtol=1e-3,
        atol=0,
    )


def test_the_releases_module_takes_any_labels_and_says_when_iterations_were_too_few():
    X, y = problem("two classes")
    labels = torch.tensor([7, -3])[y]
    module = LogRegModule(1.0, dtype=torch.float32)
    module.fit(X, labels)
    assert module.classes.tolist() == [-3, 7]
    answers = module(X, labels)
    assert answers["target"] is labels
    expected = LogisticRegression(1.0).fit(X, 1 - y).predict_proba(X)
    assert_close(answers["preds"], expected, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="stopped after 3 iterations short of its tolerance; raise max_iter"):
        LogRegModule(100.0, max_iter=3).fit(*problem("round"))


def test_scikit_learn_can_do_the_fitting():
    pytest.importorskip("sklearn")
    X, y = problem("two classes")
    ours, theirs = (LogisticRegression(0.5, backend=b, tol=1e-6).fit(X, y) for b in ("torch", "sklearn"))
    assert_close(ours.coef_, theirs.coef_, rtol=1e-3, atol=1e-4)
    assert_close(ours.predict_proba(X), theirs.predict_proba(X), rtol=0, atol=1e-4)


def test_a_library_is_not_asked_for_a_class_that_it_does_not_see():
    X, y = problem("two classes")
    with pytest.raises(DataError, match="sklearn fits the classes that it sees, which are 2 of 3"):
        fit_path(X, y, n_classes=3, Cs=[1.0], backend="sklearn")


@pytest.mark.skipif(importlib.util.find_spec("cuml") is not None, reason="cuML is installed")
def test_a_library_that_is_not_installed_is_named():
    X, y = problem("round")
    with pytest.raises(MissingDependency, match="pip install 'cuml-cu12'"):
        LogisticRegression(1.0, backend="cuml").fit(X, y)


# The evaluation.


def sets(n=400, n_val=200, n_classes=4, **kwargs):
    X, y = blobs(n + n_val, 8, n_classes, **kwargs)
    return Features(X[:n], y[:n]), Features(X[n:], y[n:])


def test_c_is_chosen_on_held_out_images_and_the_final_fit_uses_all():
    train, val = sets()
    evaluation = evaluate_log_regression(train, val, Cs=(1e-6, 0.1))
    settings = evaluation.rows[0].settings
    fitted, held_out = stratified_split(train.labels)
    by_hand = []
    for C in (1e-6, 0.1):
        model = LogisticRegression(C).fit(train.features[fitted], train.labels[fitted])
        by_hand.append(100 * model.score(train.features[held_out], train.labels[held_out]))
    assert [point["accuracy"] for point in settings["curve"]] == pytest.approx(by_hand)
    assert settings["C"] == 0.1 and settings["selected_on"] == f"{len(held_out)} of 400 training images"
    final = LogisticRegression(0.1).fit(train.features, train.labels)
    outcome = evaluation.outcomes["C=0.1"]
    assert_close(outcome.probabilities, final.predict_proba(val.features), rtol=0, atol=1e-3)
    assert evaluation.rows[0].value == pytest.approx(100 * final.score(val.features, val.labels), abs=0.5)


def test_rows_hold_the_figures_of_the_outcome():
    train, val = sets(n_classes=7)
    evaluation = evaluate_log_regression(train, val, Cs=(0.1,), provenance={"dataset": "blobs"})
    (outcome,) = evaluation.outcomes.values()
    values = {row.metric: row.value for row in evaluation.rows}
    assert values["top-1"] == pytest.approx(
        100 * float((outcome.probabilities.argmax(1) == val.labels).double().mean())
    )
    five = outcome.probabilities.topk(5, dim=1).indices
    assert values["top-5"] == pytest.approx(100 * float((five == val.labels[:, None]).any(1).double().mean()))
    assert evaluation.rows[0].dataset == "blobs" and evaluation.rows[0].task == "logistic"
    assert evaluation.rows[0].settings["selected_on"] == "nothing: one C was given"
    assert_close(outcome.probabilities.sum(dim=1), torch.ones(200))


def test_any_of_several_labels_counts_in_real_figures():
    train, val = sets()
    moved = Features(train.features, 10 * train.labels)
    (outcome,) = evaluate_log_regression(
        moved, val := Features(val.features, 10 * val.labels), Cs=(0.1,)
    ).outcomes.values()
    best = 10 * outcome.probabilities.argmax(1)
    label_sets = torch.stack([val.labels, best], dim=1)
    label_sets[:50] = -1
    label_sets[50:60] = torch.tensor([7, -1])  # a label that nothing was trained on
    found = evaluate_log_regression(moved, replace(val, scoring=Scoring(label_sets=label_sets)), Cs=(0.1,)).rows
    real = {row.metric: row for row in found}["real top-1"]
    assert (real.n, real.value) == (150, pytest.approx(100 * 140 / 150))


def test_the_smallest_of_equally_good_c_wins():
    X, y = blobs(200, 4, 2, distance=20.0)
    evaluation = evaluate_log_regression(Features(X, y), Features(X, y), Cs=(10.0, 1.0, 100.0))
    assert evaluation.rows[0].settings["C"] == 1.0


def test_choosing_on_the_reported_set_is_noted():
    train, val = sets()
    row = evaluate_log_regression(train, val, Cs=(1e-6, 1.0), select_on="val").rows[0]
    assert row.settings["selected_on"] == "reported set"
    assert any("chosen on the reported set itself" in note for note in row.notes)
    assert max(point["accuracy"] for point in row.settings["curve"]) == pytest.approx(row.value)


def test_a_finetune_set_chooses_and_joins_the_final_fit():
    train, val = sets()
    finetune = val.take(torch.arange(100))
    row = evaluate_log_regression(train, val.take(torch.arange(100, 200)), Cs=(1e-6, 1.0), finetune=finetune).rows[0]
    assert (row.settings["selected_on"], row.settings["n_train"]) == ("finetune set", 500)
    with pytest.raises(ConfigError, match="either on the finetune set or on the validation set"):
        evaluate_log_regression(train, val, finetune=finetune, select_on="val")


def test_the_releases_split_can_be_asked_for():
    train, val = sets()
    row = evaluate_log_regression(train, val, Cs=(1e-6, 1.0), select_on="random-split").rows[0]
    assert row.settings["selected_on"] == "40 of 400 training images"
    torch.manual_seed(0)
    assert torch.equal(random_split(400)[1], torch.randperm(400)[:40])


def test_selecting_per_class_values_rare_classes():
    generator = torch.Generator().manual_seed(1)
    y = (torch.rand(600, generator=generator) < 0.08).long()
    X = 1.2 * y.unsqueeze(1) + torch.randn(600, 3, generator=generator)
    by_image, by_class = (
        evaluate_log_regression(Features(X, y), Features(X, y), metric=metric, select_on="val").rows[0].settings
        for metric in ("mean_accuracy", "mean_per_class_accuracy")
    )
    # Where nothing is learned every image gets the frequent class: mean per class is 50 %.
    assert by_class["curve"][0]["accuracy"] == pytest.approx(50.0)
    assert by_image["curve"][0]["accuracy"] > 90
    assert max(point["accuracy"] for point in by_class["curve"]) > 50


def test_the_split_keeps_the_shares_of_the_classes_and_the_only_image_of_one():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 2 + [3])
    fitted, held_out = stratified_split(labels, seed=3)
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [5, 2, 1, 0]
    assert torch.equal(torch.cat([fitted, held_out]).sort().values, torch.arange(73))
    assert torch.equal(held_out, stratified_split(labels, seed=3)[1])
    assert not torch.equal(held_out, stratified_split(labels, seed=4)[1])
    assert len(stratified_split(torch.zeros(1000, dtype=torch.int64), at_most=7)[1]) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"train": Features(f.features, torch.zeros_like(f.labels))}, "all training images are of one class"),
        (lambda f: {"train": Features(f.features)}, "training images have no labels"),
        (
            lambda f: {"train": Features(f.features * torch.nan, f.labels)},
            "infinite features for 400 of 400 training im",
        ),
        (lambda f: {"val": Features(f.features / 0, f.labels)}, "NaN or infinite .* of 400 validation images"),
        (lambda f: {"train": Features(f.features[:4], torch.arange(4))}, "every class has a single training image"),
    ],
)
def test_unusable_data_is_refused_in_one_sentence(change, message):
    train, val = sets()
    with pytest.raises(DataError, match=message):
        evaluate_log_regression(**({"train": train, "val": val} | change(train)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "f1"}, "no metric is called 'f1'"),
        ({"Cs": (0.0, 1.0)}, "C must be positive"),
        ({"select_on": "train"}, "split, random-split or val"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    train, val = sets(60, 30)
    with pytest.raises(ConfigError, match=message):
        evaluate_log_regression(train, val, **settings)


def test_the_grid_is_the_releases():
    assert len(C_GRID) == 45
    assert_close(torch.tensor(C_GRID, dtype=torch.float64), 10 ** torch.linspace(-6, 5, 45, dtype=torch.float64))


def test_the_releases_flags_and_defaults_are_understood():
    args = get_args_parser().parse_args(
        "--finetune-on-val --metric-type mean_per_class_accuracy --output-dir o".split()
    )
    assert args.finetune_on_val and args.metric_type == "mean_per_class_accuracy"
    assert (args.train_features_device, args.train_dtype, args.max_train_iters) == ("cpu", "float64", 1000)
    assert (args.train_dataset, args.val_dataset, args.finetune_dataset_str) == (
        "ImageNet:split=TRAIN",
        "ImageNet:split=VAL",
        None,
    )
