"""The protocols of `dinov2 eval`: how each goes from features to an evaluation, in one table.

A single command runs a row of the table with the settings of its command line, `dinov2 eval all` runs all rows with
their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dinov2.apps.evaluation.context import EvalConfig, EvalContext, EvaluationReport, open_evaluation
from dinov2.apps.evaluation.datasets import LabelledDataset, labelled
from dinov2.apps.evaluation.features import PARTS, FeatureExtractor, raw_pixels, untrained_extractor
from dinov2.apps.evaluation.heads import head_parts, knows_classes_of, score_head
from dinov2.checkpoints.locate import ShowProgress
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.eval_transform import EvalTransform
from dinov2.distributed import is_main_process
from dinov2.encode.stream import extract_features
from dinov2.engine.parallel import choose_device, choose_precision
from dinov2.errors import ConfigError
from dinov2.eval.knn.evaluate import KnnSettings, evaluate_knn, evaluate_knn_outcome
from dinov2.eval.knn.release import write_knn_results
from dinov2.eval.linear import TokenColumns, evaluate_linear
from dinov2.eval.log_regression import C_GRID, DEFAULT_MAX_ITER, evaluate_log_regression
from dinov2.eval.log_regression.estimator import SolverBackend
from dinov2.eval.log_regression.evaluate import SelectOn
from dinov2.eval.outcome import Evaluation
from dinov2.eval.result import Result, write_results

__all__ = ["PROTOCOLS", "Protocol", "knn", "knn_of_backbone", "log_regression", "token_columns"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Protocol:
    """One way to classify by frozen features."""

    key: str
    """Its name on the command line."""
    name: str
    """Its name in the report."""
    evaluate: Callable[[EvalContext, FeatureExtractor], Evaluation | None]
    """With the protocol's own settings; None where the model brings no classifier for these classes."""
    parts: tuple[str, ...] = ("cls",)
    """Parts of the columns that it reads; those that a model does not have are left out."""

    def parts_of(self, extractor: FeatureExtractor) -> tuple[str, ...]:
        """The parts that it reads of an extractor's columns."""
        return tuple(part for part in self.parts if part in extractor.parts)


def _knn(context: EvalContext, extractor: FeatureExtractor, settings: KnnSettings | None = None) -> Evaluation:
    """With `settings` their rows; without, the protocol of comparisons, whose outcome is that of 20 neighbours."""
    train, val = context.features(extractor)
    provenance = context.provenance(extractor)
    if settings is None:
        return evaluate_knn_outcome(train, val, device=extractor.device, provenance=provenance)
    return Evaluation(evaluate_knn(train, val, device=extractor.device, provenance=provenance, **vars(settings)))


def _log_regression(
    context: EvalContext,
    extractor: FeatureExtractor,
    finetune: LabelledDataset | None = None,
    *,
    select_on: SelectOn = "split",
    metric: str = "mean_accuracy",
    Cs: Sequence[float] = C_GRID,
    max_iter: int = DEFAULT_MAX_ITER,
    dtype: str = "float32",
    device: torch.device | None = None,
    backend: SolverBackend = "torch",
) -> Evaluation:
    train, val = context.features(extractor)
    return evaluate_log_regression(
        train,
        val,
        finetune=None if finetune is None else context.cache.features(extractor, finetune),
        select_on=select_on,
        metric=metric,
        Cs=Cs,
        max_iter=max_iter,
        dtype=_DTYPES[dtype],
        device=device or extractor.device,
        backend=backend,
        provenance=context.provenance(extractor),
    )


def _own_head(context: EvalContext, extractor: FeatureExtractor) -> Evaluation | None:
    """The classifier that a model brings along, where it knows the classes of the images; nothing is trained."""
    head = context.loaded.head
    if head is None or not knows_classes_of(head, context.features(extractor)[1]):
        return None
    val = context.features(extractor, parts=head_parts(head, extractor))[1]
    return score_head(head, val, provenance=context.provenance(extractor))


def _linear(context: EvalContext, extractor: FeatureExtractor) -> Evaluation:
    columns, parts = token_columns(extractor)
    train, val = context.features(extractor, parts=parts)
    return evaluate_linear(
        train,
        val,
        columns=columns,
        preset="short",
        device=extractor.device,
        provenance=context.provenance(extractor),
        on_step=context.config.progress(f"{extractor.name}: linear classifiers"),
    )


PROTOCOLS = (
    Protocol("knn", "k-NN", _knn),
    Protocol("log-regression", "logistic regression", _log_regression),
    Protocol("head", "own classifier", _own_head),
    Protocol("linear", "linear probe", _linear, parts=PARTS),
)
"""In the order in which they run and are shown."""


def token_columns(extractor: FeatureExtractor) -> tuple[TokenColumns, tuple[str, ...]]:
    """The composition of an extractor's rows, and the parts that they are."""
    parts = tuple(part for part in PARTS if part in extractor.parts)
    return TokenColumns(extractor.parts["cls"], extractor.blocks, pooled="mean" in parts), parts


def knn(config: EvalConfig, settings: KnnSettings | None = None, *, baselines: bool = False) -> EvaluationReport:
    """Classify by nearest neighbours and write `results_eval_knn.json`, with `baselines` for them too.

    Started by torchrun, the processes share the work, and the main one writes. Raises `DataError` when a data set has
    no labels, `WeightsError` when the weights do not fit.
    """
    settings = KnnSettings() if settings is None else settings
    settings.require_search()
    with open_evaluation(config, task="knn") as context:
        extractors = {"trained": context.extractor()}
        if baselines:
            extractors |= {"untrained": untrained_extractor(context.loaded), "raw_pixels": raw_pixels(context.loaded)}
        rows: dict[str, list[Result]] = {}
        unreadable: list[tuple[str, str]] = []
        for name, extractor in extractors.items():
            rows[name] = context.with_split(_knn(context, extractor, settings).rows)
            if name == "trained":
                unreadable = context.unreadable(extractor)
            context.cache.forget()
        report = EvaluationReport(rows.pop("trained"), context.folder, unreadable, rows)
        write_knn_results(context.folder, report.rows, baselines=[row for of_one in rows.values() for row in of_one])
    return report


def log_regression(
    config: EvalConfig,
    *,
    finetune_dataset: str | None = None,
    select_on: SelectOn = "split",
    metric: str = "mean_accuracy",
    Cs: Sequence[float] = C_GRID,
    max_iter: int = DEFAULT_MAX_ITER,
    dtype: str = "float32",
    fit_device: str | None = None,
    backend: SolverBackend = "torch",
) -> EvaluationReport:
    """Fit class tokens and write `results_eval_log_regression.json`, the whole curve of C with it.

    `finetune_dataset` is what C is chosen on, `fit_device` where the fits run (None: where the model runs); all else
    is as in `dinov2.eval.log_regression.evaluate_log_regression`. Raises what that raises, before it where possible.
    """
    if max_iter < 1:
        raise ConfigError(f"the number of iterations is {max_iter}; write 1 or more")
    if not Cs or min(Cs) <= 0:
        raise ConfigError(f"C must be positive, got {list(Cs)}; write values such as 0.1 1 10")
    if dtype not in _DTYPES:
        raise ConfigError(f"features are fitted in {' or '.join(_DTYPES)}, not in {dtype!r}")
    if finetune_dataset and select_on == "val":
        raise ConfigError("C is chosen either on the finetune set or on the validation set; leave one of them out")
    device = None if fit_device is None else choose_device(fit_device)
    with open_evaluation(config, task="log-regression") as context:
        finetune = LabelledDataset(finetune_dataset, labelled(finetune_dataset)) if finetune_dataset else None
        extractor = context.extractor()
        evaluation = _log_regression(
            context,
            extractor,
            finetune,
            select_on=select_on,
            metric=metric,
            Cs=Cs,
            max_iter=max_iter,
            dtype=dtype,
            device=device,
            backend=backend,
        )
        report = EvaluationReport(context.with_split(evaluation.rows), context.folder, context.unreadable(extractor))
        if is_main_process():
            write_results(context.folder / "results_eval_log_regression.json", report.rows)
        return report


def knn_of_backbone(
    backbone: torch.nn.Module,
    train: ImageDataset,
    val: ImageDataset,
    transform: EvalTransform,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
    nb_knn: Sequence[int] = (20,),
    label: str = "model",
    progress: ShowProgress = lambda label: None,
) -> tuple[list[Result], list[tuple[str, str]]]:
    """k-NN rows of a module `[B, C, H, W] -> [B, D]`, and the images that could not be read; nothing is kept.

    Images have the number of channels of the backbone, 3 where it does not say.
    """
    where = choose_device(device)
    autocast_dtype = choose_precision(precision, where)
    channels = int(getattr(getattr(backbone, "patch_embed", None), "in_chans", 3))
    features = [
        extract_features(
            backbone.to(where),
            dataset,
            transform=transform,
            channels=channels,
            batch_size=batch_size,
            num_workers=num_workers,
            device=where,
            autocast_dtype=autocast_dtype,
            progress=progress(f"{label}: {which} features"),
        )
        for which, dataset in (("train", train), ("val", val))
    ]
    precision_name = str(autocast_dtype or torch.float32).removeprefix("torch.")
    rows = evaluate_knn(*features, nb_knn=nb_knn, device=where, provenance={"precision": precision_name})
    return rows, [failure for part in features for failure in part.unreadable]
