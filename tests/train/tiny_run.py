"""A training small enough for a test: a two-block model on the toy pictures."""

from pathlib import Path

from dinov2.configs import Config, load_config

__all__ = ["TINY", "tiny_config"]

TINY = (
    "train.dataset_path=toy:split=TRAIN:n=40",
    "train.batch_size_per_gpu=4",
    "train.OFFICIAL_EPOCH_LENGTH=4",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "train.num_workers=0",
    "train.num_threads=1",
    "train.precision=fp32",
    "train.device=cpu",
    "student.arch=vit_nano",
    "student.embed_dim=64",
    "student.num_heads=1",
    "student.depth=2",
    "dino.head_n_prototypes=32",
    "dino.head_hidden_dim=32",
    "dino.head_bottleneck_dim=16",
    "optim.epochs=3",
    "optim.warmup_epochs=1",
    "evaluation.eval_period_iterations=0",
    "evaluation.knn_train_dataset=",
    "evaluation.knn_val_dataset=",
)


def tiny_config(*overrides: str, folder: Path | None = None) -> Config:
    """Twelve steps of four images, on the tensor backend unless told otherwise."""
    data = [f"train.dataset_path={folder}"] if folder is not None else []
    return load_config(None, [*TINY, *data, *overrides], preset="toy")
