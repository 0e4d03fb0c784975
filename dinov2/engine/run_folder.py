"""The folder of a training run: what lies where, and whether a run may go on in it.

config.yaml                  the whole configuration
logs/log.txt                 what the console showed
training_metrics.json        one JSON object a line
checkpoints/step_*           to resume from
eval/training_<it>/          teacher_checkpoint.pth (the release's layout) and backbone.safetensors
eval/manual_<steps>/         the same, exported from a checkpoint on request
unreadable_images.json       images that could not be read, with reasons
.train.lock                  while a training is at work here
skipped_steps.json           steps whose loss or gradient was not finite, one JSON object a line
"""

import json
import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path

from dinov2.configs import Config, differing_keys, load_config, to_yaml
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError, DataError
from dinov2.file_lock import lock_folder
from dinov2.whole_files import read_json, write_text

__all__ = ["RunFolder"]

_LOG = logging.getLogger("dinov2")

# What a resumed run may change: nothing here alters a number that training computes.
_FREE_KEYS = {
    "train.output_dir",
    "train.dataset_path",  # the data set's fingerprint decides
    "train.saveckp_freq",
    "train.num_workers",
    "train.cache_dataset",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.device",
    "train.max_skipped_steps",
    "train.allow_data_change",
    "train.num_threads",
    "train.batch_size_per_gpu",  # the global batch decides
    "optim.lr",
}


class RunFolder:
    """Paths and rules of one run's folder."""

    def __init__(self, path: str | os.PathLike[str], *, keep_checkpoints: int = 3) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "training_metrics.json"
        self.unreadable = self.path / "unreadable_images.json"
        self.skipped = self.path / "skipped_steps.json"
        self.checkpoints = CheckpointStore(self.path / "checkpoints", keep=keep_checkpoints)

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other trainings out of the folder; raises `ConfigError` when one is there."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"the output folder {self.path} is a file; choose another path")
        return lock_folder(self.path, "train")

    def teacher_file(self, iteration: int) -> Path:
        """File of the teacher that is exported after the given 0-based iteration."""
        return self.path / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"

    def first_step(self, cfg: Config, *, resume: bool, fingerprint: str, global_batch: int) -> int:
        """The step to begin with: that of the newest checkpoint, or 0 in a folder without one.

        Raises `ConfigError` when the folder belongs to another run, or when going on would change what the run
        computes; nothing is written before that is certain.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"the output folder {self.path} is a file; choose another path")
        latest = self.checkpoints.latest()
        if not resume:
            if latest is not None or self.metrics.exists():
                raise ConfigError(
                    f"{self.path} already holds a run, and --no-resume would overwrite it; choose another --output-dir"
                )
            return 0
        self._refuse_another_run(cfg, started=latest is not None or self.metrics.exists())
        if latest is None:
            return 0
        facts = self.checkpoints.read_meta(latest)
        if missing := {"global_batch", "fingerprint"} - facts.keys():
            raise self.checkpoints.damaged(latest, f"meta.json lacks {', '.join(sorted(missing))}")
        if facts["global_batch"] != global_batch:
            raise ConfigError(
                f"the run in {self.path} uses {facts['global_batch']} images a step and this one would use "
                f"{global_batch}; set train.batch_size_per_gpu so that the product with the processes stays the same"
            )
        if facts["fingerprint"] != fingerprint and not cfg.train.allow_data_change:
            raise ConfigError(
                f"the images of the run in {self.path} have changed since it was saved (train.dataset_path="
                f"{cfg.train.dataset_path}); add train.allow_data_change=true to go on all the same"
            )
        return latest

    def _refuse_another_run(self, cfg: Config, *, started: bool) -> None:
        if not self.config.exists():
            if started:
                raise ConfigError(f"{self.path} holds a run without its config.yaml; choose another --output-dir")
            return
        saved = load_config(str(self.config))
        changed = [
            key for key in differing_keys(saved, cfg) if key not in _FREE_KEYS and not key.startswith("evaluation.")
        ]
        if changed and started:
            raise ConfigError(
                f"{self.path} holds a run with other settings ({_shown(saved, cfg, changed)}); "
                "restore them to resume it, or choose another --output-dir"
            )

    def open(self, cfg: Config) -> None:
        """Creates the folder and writes the configuration."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, to_yaml(cfg))
        except OSError as error:
            raise ConfigError(
                f"the output folder {self.path} cannot be written to ({error.strerror}); choose another --output-dir"
            ) from error

    def note_unreadable(self, failures: dict[str, str]) -> None:
        """Rewrites the list of images that could not be read."""
        rows = [{"path": path, "reason": reason} for path, reason in sorted(failures.items())]
        write_text(self.unreadable, json.dumps({"count": len(rows), "images": rows}, indent=1) + "\n")

    def read_unreadable(self) -> dict[str, str]:
        """The images noted so far, path to reason; none, with a warning, when the list is damaged."""
        if not self.unreadable.exists():
            return {}
        try:
            images = read_json(self.unreadable, dict)["images"]
            return {str(image["path"]): str(image["reason"]) for image in images}
        except (DataError, LookupError, TypeError) as error:
            _LOG.warning(f"the list of unreadable images is begun anew: {self.unreadable} is damaged ({error})")
            return {}


def _shown(saved: Config, wanted: Config, keys: list[str]) -> str:
    def value(cfg: Config, key: str) -> object:
        section: object = cfg
        for name in key.split("."):
            section = getattr(section, name)
        return section

    shown = [f"{key} was {value(saved, key)!r}, now {value(wanted, key)!r}" for key in keys[:3]]
    return "; ".join(shown) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
