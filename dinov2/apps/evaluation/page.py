"""The pages of a comparison and of a retrieval, from their reports to the records of `dinov2.report.evaluation`."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dinov2.apps.evaluation.comparison import ACCURACIES, CALIBRATION, ComparisonReport, MethodResult
from dinov2.apps.evaluation.comparison import RESULTS_FILE as EVALUATION_FILE
from dinov2.apps.evaluation.datasets import LabelledDataset
from dinov2.apps.evaluation.features import FeatureExtractor
from dinov2.apps.evaluation.retrieval import RETRIEVAL_RESULTS_FILE, SHOWN_PROTOCOL, Ranked, RetrievalReport
from dinov2.encode.stream import Features
from dinov2.errors import DataError
from dinov2.eval.figures import confidence_bins
from dinov2.eval.knn.search import nearest_neighbours
from dinov2.eval.metrics import Estimate
from dinov2.eval.outcome import EvaluationOutcome, Mistake, class_recalls, confused_pairs, confusion, worst_mistakes
from dinov2.eval.result import environment
from dinov2.eval.retrieval import Ranking, average_precision, rank_gallery
from dinov2.report.evaluation import (
    EvaluationRecord,
    MethodRecord,
    ModelRecord,
    PairRecord,
    PicturedMistake,
    evaluation_page,
)
from dinov2.report.neighbours import Shot, ShotRow, thumbnail
from dinov2.report.retrieval import QueryGroup, RetrievalRecord, retrieval_page
from dinov2.whole_files import write_text

__all__ = [
    "write_evaluation_page",
    "write_retrieval_page",
]

_PAGE_FILE = Path(EVALUATION_FILE).with_suffix(".html").name

_RETRIEVAL_PAGE_FILE = Path(RETRIEVAL_RESULTS_FILE).with_suffix(".html").name

_MOST_MISTAKES = 16
_LARGEST_MATRIX = 40  # classes

_SHOWN, _FIRST = 10, 10  # queries of a group, images of a query
_MOST_LOOKED_AT, _SIMILARITIES = 500, 100_000_000  # queries; what ranking them may take of a large gallery


def write_evaluation_page(report: ComparisonReport) -> Path:
    """Writes `results_eval_all.html` into the folder of the report and returns its path."""
    return write_text(report.folder / _PAGE_FILE, evaluation_page(_record_of(report)))


def write_retrieval_page(report: RetrievalReport) -> Path:
    """Writes `results_eval_retrieval.html` beside the results and returns its path."""
    return write_text(report.output_dir / _RETRIEVAL_PAGE_FILE, retrieval_page(_retrieval_record_of(report)))


def _record_of(report: ComparisonReport) -> EvaluationRecord:
    """The report as the page shows it; images of mistakes are read again for it."""
    first = report.results[0]
    outcome = first.outcome
    names = list(dict.fromkeys(one.model for one in report.results))
    val = _last_part(report.sets.val.name)
    train = "a part of the same images" if report.sets.split is not None else _last_part(report.sets.train.name)
    facts = [("images scored", f"{len(outcome):,}"), ("classes", f"{len(outcome.class_names):,}")]
    facts += [("learned from", train), ("models", f"{len(names)}")]
    notes = dict.fromkeys(note for one in report.results for row in one.rows for note in row.notes)
    left_out = _left_out(max(len(failures) for failures in report.unreadable.values()))
    return EvaluationRecord(
        title=f"{names[0]} on {val}" if len(names) == 1 else f"{len(names)} models on {val}",
        facts=facts,
        models=[_model(report, name) for name in names],
        methods=[_method(report, one) for one in report.results],
        pairs=[
            PairRecord(pair.protocol.name, pair.first, pair.second, pair.comparison, pair.p_holm)
            for pair in report.pairs
        ],
        notes=[*notes, *left_out],
        environment={key: str(value) for key, value in environment().items()},
    )


def _retrieval_record_of(report: RetrievalReport) -> RetrievalRecord:
    """The retrieval as its page shows it: some queries over the whole set, and the hardest of those looked at."""
    ranked, settings = report.ranked, report.rows[0].settings
    figures: dict[str, dict[str, Estimate]] = {}
    for row in report.rows:
        low, high = (math.nan, math.nan) if row.ci is None else row.ci
        figures.setdefault(row.settings.get("protocol", ""), {})[row.metric] = Estimate(
            row.value / 100, low / 100, high / 100
        )
    looked_at, rankings = _looked_at(ranked)
    precisions = [average_precision(one.ranks, precision=settings["average_precision"]) for one in rankings]
    sample = list(range(len(looked_at)))
    if len(sample) > 2 * _SHOWN:
        sample = [number * len(looked_at) // _SHOWN for number in range(_SHOWN)]
    hardest = sorted(set(range(len(looked_at))) - set(sample), key=precisions.__getitem__)[:_SHOWN]
    rows = _query_rows(ranked, looked_at, rankings, precisions, [*sample, *hardest])
    what = "the same class" if ranked.by_class else f"right by the protocol {SHOWN_PROTOCOL}"
    lead = f"On the left the query, then the images ranked first, with their cosine similarity. Green is {what}"
    lead += ", red another." if ranked.by_class else ", red is not; images that the protocol ignores are left out."
    groups = [QueryGroup("Some queries" if hardest else "Queries", lead, rows[: len(sample)])]
    if hardest:
        chosen = f"Those with the lowest average precision of {len(looked_at):,} queries, evenly chosen."
        groups.append(QueryGroup("Hardest queries", chosen, rows[len(sample) :]))
    name, gallery = ranked.extractor.name, _last_part(ranked.gallery.name)
    facts = [("queries", f"{settings['n_queries']:,}"), ("gallery", f"{settings['n_gallery']:,} images")]
    if ranked.by_class and ranked.gallery_features.labels is not None:
        facts.append(("classes", f"{len(ranked.gallery_features.labels.unique()):,}"))
    left_out = _left_out(len(report.unreadable))
    return RetrievalRecord(
        title=f"{name} on {gallery}",
        facts=facts,
        figures=figures,
        precisions=precisions,
        groups=[group for group in groups if group.rows],
        measured={
            "model": name,
            **_model_facts(ranked.extractor),
            "queries": _last_part(ranked.queries.name),
            "gallery": report.rows[0].split or gallery,
            "average precision": settings["average_precision"],
        },
        notes=[*dict.fromkeys(note for row in report.rows for note in row.notes), *left_out],
        environment={key: str(value) for key, value in environment().items()},
    )


def _looked_at(ranked: Ranked) -> tuple[list[int], list[Ranking]]:
    """Rows of queries that have something to find, evenly chosen, and where they found it."""
    gallery = ranked.gallery_features.features
    askable = [row for row, one in enumerate(ranked.truth) if len(one.positives)]
    n = min(len(askable), _MOST_LOOKED_AT, max(2 * _SHOWN, _SIMILARITIES // len(gallery)))
    rows = [askable[number * len(askable) // n] for number in range(n)]
    queries, truth = ranked.query_features.features[rows], [ranked.truth[row] for row in rows]
    return rows, rank_gallery(queries, gallery, truth, device=ranked.extractor.device) if rows else []


def _query_rows(
    ranked: Ranked, rows: Sequence[int], rankings: Sequence[Ranking], precisions: Sequence[float], shown: Sequence[int]
) -> list[ShotRow]:
    """The shown of the rankings as pictures."""
    gallery = ranked.gallery_features.features
    chosen = [rows[number] for number in shown]
    if not chosen:
        return []
    most_ignored = max(len(ranked.truth[row].ignored) for row in chosen)
    similarities, neighbours = nearest_neighbours(
        ranked.query_features.features[chosen],
        gallery,
        k=min(len(gallery), _FIRST + most_ignored),
        cosine=True,
        device=ranked.extractor.device,
    )
    found = []
    for place, number in enumerate(shown):
        row, ranking = rows[number], rankings[number]
        truth = ranked.truth[row]
        kept = (~torch.isin(neighbours[place], truth.ignored)).nonzero().squeeze(1)[:_FIRST]
        shots = [_shot(ranked.queries, ranked.query_features, row, note="query", kind="query")]
        for column in kept.tolist():
            one = int(neighbours[place, column])
            kind = "right" if bool((truth.positives == one).any()) else "wrong"
            note = f"{float(similarities[place, column]):.2f}"
            shots.append(_shot(ranked.gallery, ranked.gallery_features, one, note=note, kind=kind))
        n_right, first = len(ranking.ranks), int(ranking.ranks[0]) + 1
        where = f"the first of {n_right:,} right images" if n_right > 1 else "the one right image"
        remark = f"Average precision {100 * precisions[number]:.0f} %, {where} at place {first:,}."
        found.append(ShotRow(tuple(shots), remark))
    return found


def _shot(images: LabelledDataset, features: Features, row: int, *, note: str, kind: str) -> Shot:
    index = row if features.indices is None else int(features.indices[row])
    jpeg, title = _picture(images, index)
    name = title
    if features.labels is not None and int(features.labels[row]) >= 0:
        label = int(features.labels[row])
        name = str(label) if features.class_names is None else features.class_names[label]
    return Shot(jpeg, name, note, title, kind)


def _model(report: ComparisonReport, name: str) -> ModelRecord:
    one = next(found for found in report.results if found.model == name)
    facts = _model_facts(one.extractor)
    health = report.health[name]
    facts["effective rank (RankMe)"] = f"{health['rank_me']:.1f}"
    facts["participation ratio"] = f"{health['participation_ratio']:.1f}"
    for row in report.retrieval[name][:1]:
        interval = "" if row.ci is None else f" ({row.ci[0]:.1f}–{row.ci[1]:.1f})"
        facts["retrieval among the scored images"] = f"{row.metric} {row.value:.1f} %{interval}"
    for dataset, taken in report.extractions[name].items():
        how = "from the cache" if taken.from_cache else f"{taken.images / max(taken.seconds, 1e-9):,.0f} images/s"
        facts[f"features of {_last_part(dataset)}"] = f"{taken.seconds:,.1f} s, {how}"
    for found in report.results:
        if found.model == name:
            peak = found.peak_bytes
            memory = "" if peak is None else f", {peak / 2**30:.1f} GiB"
            facts[found.protocol.name] = f"{found.seconds:,.1f} s{memory}"
    return ModelRecord(name, facts)


def _model_facts(extractor: FeatureExtractor) -> dict[str, str]:
    described, transform = extractor.described, extractor.transform
    return {
        "weights (SHA-256)": str(described.get("sha256", "–"))[:16],
        "width, blocks": f"{described.get('embed_dim', '–')}, {described.get('depth') or '–'}",
        "patch, registers": f"{described.get('patch_size', '–')}, {described.get('num_register_tokens', '–')}",
        "image size": f"{transform.crop_size}, resized to {transform.describe().get('resize')}",
        "precision": f"{extractor.precision} on {extractor.device.type}",
    }


def _method(report: ComparisonReport, one: MethodResult) -> MethodRecord:
    outcome = one.outcome
    shown = len(outcome.class_names) <= _LARGEST_MATRIX
    others = [other for other in report.results if other.protocol == one.protocol and other.model != one.model]
    return MethodRecord(
        method=one.protocol.name,
        model=one.model,
        setting=one.setting,
        figures={name: one.figures[name] for name in ACCURACIES if name in one.figures},
        recalls=class_recalls(outcome),
        confusion=confusion(outcome).tolist() if shown else (),
        class_names=outcome.class_names if shown else (),
        pairs=confused_pairs(outcome),
        bins=confidence_bins(one.records.confidences.clamp_max(1.0), one.records.hits()),
        calibration={name: one.figures[name] for name in CALIBRATION},
        mistakes=[
            _pictured(mistake, report.sets.val, others) for mistake in worst_mistakes(outcome, most=_MOST_MISTAKES)
        ],
    )


def _pictured(mistake: Mistake, val: LabelledDataset, others: Sequence[MethodResult]) -> PicturedMistake:
    jpeg, title = _picture(val, mistake.image)
    says = tuple((other.model, _answer(other.outcome, mistake.image)) for other in others)
    return PicturedMistake(mistake, jpeg, title, says)


def _picture(images: LabelledDataset, index: int) -> tuple[bytes | None, str]:
    """A small picture of an image, None where it can no longer be read, and the name of its file."""
    try:
        jpeg = thumbnail(images.images.get_image(index))
    except (DataError, OSError):
        jpeg = None
    return jpeg, os.path.basename(images.images.path_of(index))


def _answer(outcome: EvaluationOutcome, index: int) -> str:
    """Prediction of another model for the image."""
    rows = (outcome.indices == index).nonzero()
    if not len(rows):
        return "–"
    probabilities = outcome.probabilities[int(rows[0])]
    best = int(probabilities.argmax())
    return outcome.class_names[best] if float(probabilities[best]) > 0 else "–"


def _left_out(n_unreadable: int) -> list[str]:
    if n_unreadable == 1:
        return ["1 image could not be read and was left out"]
    return [f"{n_unreadable:,} images could not be read and were left out"] if n_unreadable else []


def _last_part(dataset: str) -> str:
    """A data set without the folders that it lies in, which are nobody's business."""
    return "/".join(dataset.rstrip("/").split("/")[-2:]) if dataset.startswith(("/", "~", ".")) else dataset
