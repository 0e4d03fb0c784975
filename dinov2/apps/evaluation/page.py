"""The page of a study: what was measured, brought into the words of `dinov2.report.evaluation`."""

import os
from collections.abc import Sequence
from pathlib import Path

from dinov2.apps.evaluation.datasets import NamedSet
from dinov2.apps.evaluation.everything import ACCURACIES, CALIBRATION, Measured, Study
from dinov2.errors import DataError
from dinov2.eval.comparison import Estimate
from dinov2.eval.mistakes import Mistake, class_recalls, confused_pairs, confusion, worst_mistakes
from dinov2.eval.outcome import Outcome
from dinov2.features.metrics import Figure, confidence_bins
from dinov2.features.results import environment
from dinov2.report.evaluation.page import evaluation_page
from dinov2.report.evaluation.record import EvaluationRecord, MethodRecord, ModelRecord, PairRecord, PicturedMistake
from dinov2.report.neighbour_page import thumbnail
from dinov2.whole_files import replacing

__all__ = ["PAGE_FILE", "record_of", "write_evaluation_page"]

PAGE_FILE = "report.html"

_MOST_MISTAKES = 16
_LARGEST_MATRIX = 40  # classes


def write_evaluation_page(study: Study) -> Path:
    """Writes `report.html` into the folder of the study and returns its path."""
    path = study.folder / PAGE_FILE
    page = evaluation_page(record_of(study))
    with replacing(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def record_of(study: Study) -> EvaluationRecord:
    """The study as the page shows it; images of mistakes are read again for it."""
    first = study.measured[0]
    outcome = first.outcome
    names = list(dict.fromkeys(one.model for one in study.measured))
    val = _last_part(study.sets.val.name)
    train = "a part of the same images" if study.sets.split is not None else _last_part(study.sets.train.name)
    facts = [("images scored", f"{len(outcome):,}"), ("classes", f"{len(outcome.class_names):,}")]
    facts += [("learned from", train), ("models", f"{len(names)}")]
    notes = dict.fromkeys(note for one in study.measured for row in one.evaluation.rows for note in row.notes)
    n_unreadable = max(len(failures) for failures in study.unreadable.values())
    left_out = [f"{n_unreadable} images could not be read and were left out"] if n_unreadable else []
    return EvaluationRecord(
        title=f"{names[0]} on {val}" if len(names) == 1 else f"{len(names)} models on {val}",
        facts=facts,
        models=[_model(study, name) for name in names],
        methods=[_method(study, one) for one in study.measured],
        pairs=[
            PairRecord(pair.method.name, pair.first, pair.second, pair.comparison, pair.p_holm) for pair in study.pairs
        ],
        notes=[*notes, *left_out],
        environment={key: str(value) for key, value in environment().items()},
    )


def _model(study: Study, name: str) -> ModelRecord:
    one = next(found for found in study.measured if found.model == name)
    described = one.subject.described
    transform = one.subject.transform
    facts = {
        "weights (SHA-256)": str(described.get("sha256", "–"))[:16],
        "width, blocks": f"{described.get('embed_dim', '–')}, {described.get('depth') or '–'}",
        "patch, registers": f"{described.get('patch_size', '–')}, {described.get('num_register_tokens', '–')}",
        "image size": f"{transform.crop_size}, resized to {transform.describe().get('resize')}",
        "precision": f"{one.subject.precision} on {one.subject.device.type}",
    }
    health = study.health[name]
    facts["effective rank (RankMe)"] = f"{health['rank_me']:.1f}"
    facts["participation ratio"] = f"{health['participation_ratio']:.1f}"
    for row in study.retrieval[name][:1]:
        interval = "" if row.ci is None else f" ({row.ci[0]:.1f}–{row.ci[1]:.1f})"
        facts["retrieval among the scored images"] = f"{row.metric} {row.value:.1f} %{interval}"
    for dataset, taken in study.extractions[name].items():
        how = "from the cache" if taken.from_cache else f"{taken.images / max(taken.seconds, 1e-9):,.0f} images/s"
        facts[f"features of {_last_part(dataset)}"] = f"{taken.seconds:,.1f} s, {how}"
    for found in study.measured:
        if found.model == name:
            peak = found.cost.peak_bytes
            memory = "" if peak is None else f", {peak / 2**30:.1f} GiB"
            facts[found.method.name] = f"{found.cost.seconds:,.1f} s{memory}"
    return ModelRecord(name, facts)


def _method(study: Study, one: Measured) -> MethodRecord:
    outcome = one.outcome
    shown = len(outcome.class_names) <= _LARGEST_MATRIX
    others = [other for other in study.measured if other.method == one.method and other.model != one.model]
    return MethodRecord(
        method=one.method.name,
        model=one.model,
        setting=one.setting,
        figures={name: _estimate(one.figures[name]) for name in ACCURACIES if name in one.figures},
        recalls=class_recalls(outcome),
        confusion=confusion(outcome).tolist() if shown else (),
        class_names=outcome.class_names if shown else (),
        pairs=confused_pairs(outcome),
        bins=confidence_bins(one.records.confidences.clamp_max(1.0), one.records.hits()),
        calibration={name: _estimate(one.figures[name]) for name in CALIBRATION},
        mistakes=[
            _pictured(mistake, study.sets.val, others) for mistake in worst_mistakes(outcome, most=_MOST_MISTAKES)
        ],
        seconds=one.cost.seconds,
    )


def _pictured(mistake: Mistake, val: NamedSet, others: Sequence[Measured]) -> PicturedMistake:
    try:
        jpeg = thumbnail(val.images.get_image(mistake.image))
    except (DataError, OSError):
        jpeg = None
    says = tuple((other.model, _answer(other.outcome, mistake.image)) for other in others)
    return PicturedMistake(mistake, jpeg, os.path.basename(val.images.path_of(mistake.image)), says)


def _answer(outcome: Outcome, index: int) -> str:
    """What another model says of the image."""
    rows = (outcome.indices == index).nonzero()
    if not len(rows):
        return "–"
    probabilities = outcome.probabilities[int(rows[0])]
    best = int(probabilities.argmax())
    return outcome.class_names[best] if float(probabilities[best]) > 0 else "–"


def _estimate(figure: Figure) -> Estimate:
    return Estimate(figure.value, *figure.ci)


def _last_part(dataset: str) -> str:
    """A data set without the folders that it lies in, which are nobody's business."""
    return "/".join(dataset.rstrip("/").split("/")[-2:]) if dataset.startswith(("/", "~", ".")) else dataset
