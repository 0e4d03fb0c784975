"""All protocols that fit, for one model or several: one JSON document and the values of a page that compares them."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import torch

from dinov2.analysis.health import feature_health
from dinov2.apps.evaluation.context import EvalConfig, EvalContext, open_evaluation
from dinov2.apps.evaluation.datasets import EvaluationSets
from dinov2.apps.evaluation.features import Extraction, FeatureExtractor, display_name, feature_extractor
from dinov2.apps.evaluation.protocols import PROTOCOLS, Protocol
from dinov2.checkpoints.locate import locate_checkpoint
from dinov2.distributed import is_main_process
from dinov2.encode.external_models import is_external_model
from dinov2.engine.progress import peak_memory
from dinov2.errors import ConfigError
from dinov2.eval.figures import Comparison, SampleRecords, classification_figures, compare
from dinov2.eval.metrics import Estimate, holm
from dinov2.eval.outcome import EvaluationOutcome, class_recalls
from dinov2.eval.result import SCHEMA, Result, environment, now
from dinov2.eval.retrieval import evaluate_retrieval, truth_by_class
from dinov2.whole_files import write_json

__all__ = [
    "ACCURACIES",
    "CALIBRATION",
    "RESULTS_FILE",
    "ComparisonReport",
    "MethodResult",
    "ModelPair",
    "compare_models",
    "measure_cost",
]

RESULTS_FILE = "results_eval_all.json"

ACCURACIES = ("top-1", "top-5", "mean-per-class")
"""Figures in percent."""

CALIBRATION = ("ece", "ece-equal-mass", "log-loss", "brier", "aurc")
"""Figures of the probabilities; fractions, the log-loss in nats."""

_T = TypeVar("_T")
_RETRIEVAL = "retrieval"  # it gives no answers to compare, only figures
_MOST_QUERIES = 2000
_CURVE_RESAMPLES = 300  # a calibration error takes a pass over the images for each


@dataclass(frozen=True)
class MethodResult:
    """One protocol on one model."""

    protocol: Protocol
    extractor: FeatureExtractor
    rows: list[Result]
    setting: str
    """The setting that the model is compared with, such as `k=20`."""
    outcome: EvaluationOutcome
    """The answers with that setting."""
    records: SampleRecords
    figures: dict[str, Estimate]
    """Accuracies and calibration with that setting."""
    seconds: float
    """Of the protocol, features not counted."""
    peak_bytes: int | None
    """Most memory at a time: of the accelerator's tensors, or of this whole process; None where nothing tells."""

    @property
    def model(self) -> str:
        """Display name of the model."""
        return self.extractor.name


@dataclass(frozen=True)
class ModelPair:
    """Two models by one protocol."""

    protocol: Protocol
    first: str
    second: str
    comparison: Comparison
    p_holm: float
    """McNemar's p, corrected for all comparisons of the report."""


@dataclass
class ComparisonReport:
    """Results of a comparison; dictionaries are by model."""

    sets: EvaluationSets
    folder: Path
    results: list[MethodResult] = field(default_factory=list)
    pairs: list[ModelPair] = field(default_factory=list)
    extractions: dict[str, dict[str, Extraction]] = field(default_factory=dict)
    """By data set."""
    unreadable: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """(path, reason) of every image that was left out."""
    retrieval: dict[str, list[Result]] = field(default_factory=dict)
    """Scored images that look for the others of their class; empty where it was not asked for."""
    health: dict[str, dict[str, float]] = field(default_factory=dict)
    """Label-free measures of the class tokens of the scored images."""

    def document(self) -> dict[str, object]:
        """The report as plain values: one entry for each model and protocol, comparisons, and all rows."""
        rows = [result.rows for result in self.results] + list(self.retrieval.values())
        return {
            "schema": SCHEMA,
            "date": now(),
            "train_dataset": self.sets.train.name,
            "val_dataset": self.sets.val.name,
            "split": self.sets.split,
            "evaluations": [_entry(result, self.extractions[result.model]) for result in self.results],
            "comparisons": [_pair_entry(pair) for pair in self.pairs],
            "retrieval": {
                name: {row.metric: {"value": row.value, "ci": row.ci, "n": row.n} for row in of_model}
                for name, of_model in self.retrieval.items()
            },
            "health": self.health,
            "unreadable": self.unreadable,
            "rows": [asdict(row) for part in rows for row in part],
            "versions": environment(),
        }


def compare_models(
    models: Sequence[str | os.PathLike[str]], config: EvalConfig, *, methods: Sequence[str] = ()
) -> ComparisonReport:
    """Measure every model with every protocol (all, unless some are named) and write `results_eval_all.json`.

    Models are taken one after the other, so that the memory is that of the largest. Raises `ConfigError` for a model
    that is named twice or an unknown method, and what `open_evaluation` raises, before features are extracted.
    """
    protocols = _protocols(methods)
    _locate_all(models, config)
    report: ComparisonReport | None = None
    for number, model in enumerate(models):
        with open_evaluation(
            replace(config, model=model), task="all", sets=None if report is None else report.sets
        ) as context:
            if report is None:
                report = ComparisonReport(context.sets, context.folder)
                config = replace(config, output_dir=context.folder)
            name = display_name(context.loaded)
            if name in report.extractions:
                name = f"{name} ({number + 1})"
            extractor = feature_extractor(context.loaded, name=name)
            results = _measure(context, extractor, protocols)
            report.retrieval[name] = _retrieve(context, extractor) if not methods or _RETRIEVAL in methods else []
            if not results:
                raise ConfigError(f"{name} brings no classifier for these classes; name another method besides head")
            report.results += results
            report.health[name] = feature_health(context.features(extractor)[1].features)
            report.extractions[name] = dict(context.cache.extractions)
            report.unreadable[name] = context.unreadable(extractor)
            context.cache.forget()
    assert report is not None  # `_locate_all` refuses no models
    report.pairs = _pairs(report.results)
    if is_main_process():
        write_json(report.folder / RESULTS_FILE, report.document())
    return report


def _entry(result: MethodResult, extractions: dict[str, Extraction]) -> dict[str, object]:
    first, figures, extractor = result.rows[0], result.figures, result.extractor
    accuracies = {
        name: {"value": 100 * figures[name].value, "ci": [100 * bound for bound in figures[name][1:]]}
        for name in ACCURACIES
        if name in figures
    }
    # What the test set asks for besides, such as the accuracy by several right labels.
    others = {
        row.metric: {"value": row.value, "ci": row.ci}
        for row in result.rows
        if row.k == first.k and row.metric not in ACCURACIES
    }
    return {
        "schema": SCHEMA,
        "task": result.protocol.key,
        "dataset": first.dataset,
        "split": first.split,
        "n": len(result.outcome),
        "metrics": accuracies | others,
        "selection": {
            "set": first.settings.get("selected_on"),
            "grid": first.settings.get("curve" if result.protocol.key == "log-regression" else "grid"),
            "winner": result.setting,
        },
        "setting": result.setting,
        "settings": dict(first.settings),
        "model": {
            "name": result.model,
            "digest": extractor.described.get("sha256"),
            "config": dict(extractor.described),
        },
        "transform": extractor.transform.describe(),
        "precision": extractor.precision,
        "seeds": sorted({row.seed for row in result.rows if row.seed is not None}),
        "timing": {
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_bytes,
            "features": {name: asdict(extraction) for name, extraction in extractions.items()},
        },
        "calibration": {name: {"value": figures[name].value, "ci": figures[name][1:]} for name in CALIBRATION},
        "classes": [recall._asdict() for recall in class_recalls(result.outcome)],
        "notes": list(first.notes),
        "hardware": {"device": extractor.device.type, "accelerator": first.versions.get("accelerator")},
        "versions": dict(first.versions),
    }


def _pair_entry(pair: ModelPair) -> dict[str, object]:
    comparison = pair.comparison
    return {
        "task": pair.protocol.key,
        "metric": "top-1",
        "first": pair.first,
        "second": pair.second,
        "n": comparison.n,
        "difference": 100 * comparison.difference.value,
        "ci": [100 * comparison.difference.low, 100 * comparison.difference.high],
        "only_first": comparison.only_first,
        "only_second": comparison.only_second,
        "p_value": comparison.p_value,
        "p_holm": pair.p_holm,
    }


def _measure(context: EvalContext, extractor: FeatureExtractor, protocols: Sequence[Protocol]) -> list[MethodResult]:
    results = []
    # Asked for together, so that of a set too large for all parts the images are decoded once nevertheless.
    read = {part for protocol in protocols for part in protocol.parts_of(extractor)}
    context.features(extractor, parts=[part for part in extractor.parts if part in read])
    for protocol in protocols:
        context.features(extractor, parts=protocol.parts_of(extractor))  # not counted
        evaluation, seconds, peak_bytes = measure_cost(extractor.device, partial(protocol.evaluate, context, extractor))
        if evaluation is None:
            continue
        setting, outcome = next(iter(evaluation.outcomes.items()))
        records = outcome.records()
        figures = classification_figures(records, n_curve_resamples=_CURVE_RESAMPLES)
        result = MethodResult(
            protocol, extractor, evaluation.rows, setting, outcome, records, figures, seconds, peak_bytes
        )
        results.append(result)
        top1, low, high = (100 * bound for bound in figures["top-1"])
        interval = f"({low:.2f} to {high:.2f})"
        context.say(f"{extractor.name}: {protocol.name} {setting}: top-1 {top1:.2f} % {interval}, {seconds:.1f} s")
    return results


def measure_cost(device: torch.device, work: Callable[[], _T]) -> tuple[_T, float, int | None]:
    """The result of `work`, its seconds, and the most memory that was held: tensors of a GPU, else the whole process.

    The memory is None where nothing tells.
    """
    begins_anew = device.type == "cuda"
    if begins_anew:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins anew
            begins_anew = True
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started, peak_memory(device) if begins_anew else None


def _retrieve(context: EvalContext, extractor: FeatureExtractor) -> list[Result]:
    """Scored images, at most some thousands of them evenly chosen, look for the others of their class."""
    val = context.features(extractor)[1]
    assert val.labels is not None
    n_queries = min(len(val), _MOST_QUERIES)
    chosen = torch.arange(n_queries) * len(val) // n_queries
    truth = truth_by_class(val.labels[chosen], val.labels, same_image=chosen)
    if not any(len(query.positives) for query in truth):
        context.say(f"{extractor.name}: no retrieval, because no two of the scored images share a class")
        return []
    rows = evaluate_retrieval(
        val.features[chosen],
        val.features,
        truth,
        ks=(1, 5),
        device=extractor.device,
        provenance=extractor.provenance(context.sets.val.name, split="the others of the same set"),
    )
    context.say(f"{extractor.name}: retrieval among the scored images: mAP {rows[0].value:.2f} %")
    return rows


def _pairs(results: Sequence[MethodResult]) -> list[ModelPair]:
    pairs = [
        (first.protocol, first.model, second.model, compare(first.records, second.records))
        for protocol in dict.fromkeys(result.protocol for result in results)
        for first, second in combinations([result for result in results if result.protocol == protocol], 2)
    ]
    corrected = holm([comparison.p_value for *_, comparison in pairs])
    return [ModelPair(*pair, p_holm) for pair, p_holm in zip(pairs, corrected, strict=True)]


def _protocols(names: Sequence[str]) -> list[Protocol]:
    known = [*(protocol.key for protocol in PROTOCOLS), _RETRIEVAL]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"no method is called {unknown[0]!r}; choose from {', '.join(known)}")
    if list(names) == [_RETRIEVAL]:
        raise ConfigError("retrieval alone compares no answers; name another method besides, or use eval retrieval")
    return [protocol for protocol in PROTOCOLS if not names or protocol.key in names]


def _locate_all(models: Sequence[str | os.PathLike[str]], config: EvalConfig) -> None:
    """Find, and where necessary fetch, every model, so that a wrong name of the last is known before the first."""
    if not models:
        raise ConfigError("no model was named; give --model once for each model")
    texts = [str(model) for model in models]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ConfigError(f"the model {twice[0]} was named twice; name each model once")
    for model in models:
        if not is_external_model(str(model)) or Path(model).exists():
            locate_checkpoint(model, progress=config.progress)
