"""What a run is about to do, in a few lines before its first step."""

from dinov2.configs import Config
from dinov2.distributed import get_global_size
from dinov2.train.setup import Training

__all__ = ["summary"]

_GIB = 2**30


def summary(training: Training) -> str:
    """Model, data, batch, steps, what an epoch means here, precision and where things are written."""
    cfg = training.cfg
    parts = training.objective.trained_parts()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    parameters = sizes["backbone"]
    heads = sum(sizes.values()) - parameters
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    precision = (
        "float32" if training.precision is None else f"{str(training.precision).removeprefix('torch.')} autocast"
    )
    lines = [
        f"model      {cfg.student.arch}, patch {cfg.student.patch_size}, {parameters / 1e6:.1f} M parameters, "
        f"{cfg.student.num_register_tokens} registers; heads {heads / 1e6:.1f} M, "
        f"{cfg.dino.head_n_prototypes} prototypes",
        f"data       {len(training.dataset):,} images from {cfg.train.dataset_path}",
        f"crops      2 of {cfg.crops.global_crops_size} px, {cfg.crops.local_crops_number} of "
        f"{cfg.crops.local_crops_size} px",
        f"batch      {training.global_batch} images a step{_processes()}",
        f"steps      {training.total:,} = {cfg.optim.epochs} epochs of {epoch:,} steps (an epoch is a fixed number of "
        f"steps, not a pass over the data); {training.passes:,.1f} passes over the images in all",
        f"objective  {_objective(cfg)}",
        f"precision  {precision} on {training.device}",
        f"memory     about {training.memory / _GIB:.1f} GiB, estimated from the architecture"
        + (f"; {training.free_memory / _GIB:.1f} GiB are free" if training.free_memory is not None else ""),
        f"output     {training.run.path}",
    ]
    if training.first:
        lines.append(f"resuming   from step {training.first:,}")
    if training.last < training.total:
        lines.append(f"stopping   after step {training.last:,}, as asked; schedules run to {training.total:,}")
    return "\n".join(lines)


def _processes() -> str:
    return f" on {get_global_size()} processes" if get_global_size() > 1 else ""


def _objective(cfg: Config) -> str:
    weights = {"DINO": cfg.dino.loss_weight, "iBOT": cfg.ibot.loss_weight, "KoLeo": cfg.dino.koleo_loss_weight}
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight) + f", {cfg.train.centering}"
