"""Model folders as Hugging Face and timm write them: the weight files, and what the JSON files say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dinov2.checkpoints.adapters.huggingface import read_huggingface_config, read_normalisation
from dinov2.checkpoints.files import read_file, read_json_object
from dinov2.errors import WeightsError, short_repr
from dinov2.models.config import BackboneConfig

__all__ = ["FolderFacts", "facts_beside", "read_folder"]

_CONFIG = "config.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin", "backbone.safetensors")


@dataclass(frozen=True)
class FolderFacts:
    """Values of a `BackboneConfig` that the JSON files of a folder state."""

    where: str
    claims: dict[str, object] = field(default_factory=dict)
    """Values that the tensors must agree with."""
    known: dict[str, object] = field(default_factory=dict)
    """Values that no tensor tells."""

    def config(self, state: Mapping[str, Tensor], *, source: str) -> BackboneConfig:
        """The architecture of the tensors in the folder; raises `WeightsError` where the two disagree."""
        size = {"img_size": self.claims["img_size"]} if "img_size" in self.claims else {}
        config = BackboneConfig.from_state_dict(state, source=source, **size, **self.known)
        table = config.table()
        for key, claim in self.claims.items():
            if table[key] != claim:
                text = claim if isinstance(claim, str) else short_repr(claim)
                raise WeightsError(
                    f"{self.where} and the tensors beside it disagree: {key} is {text} in the one and {table[key]} in "
                    "the other; take both from the same model"
                )
        height, width = (side // config.patch_size for side in config.img_size)
        patches = state["pos_embed"].shape[1] - 1
        if height * width != patches:
            raise WeightsError(
                f"{self.where} and the tensors beside it disagree: image_size makes a grid of {height}x{width} patches "
                f"and the positions are {patches}; take both from the same model"
            )
        return config


def read_folder(folder: Path) -> tuple[dict[str, object], tuple[Path, ...], FolderFacts | None]:
    """The tensors in a folder, the files read, and the facts of its configuration (None without one).

    Raises `WeightsError` when weights or a shard of them are missing, or the configuration is of another model.
    """
    config_file = folder / _CONFIG
    config = read_json_object(config_file) if config_file.exists() else None
    facts = None if config is None else _facts(config, folder)
    content, weights = _weights(folder, config is not None)
    read = (config_file, *weights) if config is not None else weights
    return content, read, facts


def facts_beside(file: Path) -> FolderFacts | None:
    """Facts of the configuration beside a weight file that has the name of a folder's weights."""
    config = file.parent / _CONFIG
    return _facts(read_json_object(config), file.parent) if file.name in _WHOLE and config.exists() else None


def _facts(config: dict[str, object], folder: Path) -> FolderFacts:
    where = str(folder / _CONFIG)
    if "architecture" in config and "model_type" not in config:  # timm's
        cfg = config.get("pretrained_cfg")
        statistics = {"image_mean": cfg.get("mean"), "image_std": cfg.get("std")} if isinstance(cfg, dict) else {}
        arguments = config.get("model_args")
        heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
        known = {} if heads is None else {"num_heads": heads}
        return FolderFacts(where, known={**known, **read_normalisation(statistics)})
    facts = read_huggingface_config(config, source=where)
    told = ("num_heads", "interpolate_offset", "interpolate_antialias")
    known = {key: facts.pop(key) for key in told if key in facts}
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        known |= read_normalisation(read_json_object(preprocessor))
    return FolderFacts(where, facts, known)


def _weights(folder: Path, has_config: bool) -> tuple[dict[str, object], tuple[Path, ...]]:
    for name in _WHOLE:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _shards(index)
        if (folder / name).exists():
            return read_file(folder / name), (folder / name,)
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    except OSError as error:
        raise WeightsError(f"the folder {folder} cannot be read ({error.strerror}); check its permissions") from error
    if len(found) == 1 and not has_config:
        return read_file(found[0]), (found[0],)
    if found and not has_config:
        names = ", ".join(path.name for path in found[:3])
        raise WeightsError(f"{folder} holds several weight files ({names}); give one of them")
    beside = f" beside its {_CONFIG}" if has_config else ""
    raise WeightsError(f"{folder} holds no weights{beside}; a model folder has a model.safetensors in it")


def _shards(index: Path) -> tuple[dict[str, object], tuple[Path, ...]]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise WeightsError(f"{index} names no files; download or copy it again")
    content: dict[str, object] = {}
    shards = [index.parent / name for name in dict.fromkeys(places.values())]
    for shard in shards:
        if shard.parent != index.parent or shard.name in ("", "..", "."):
            raise WeightsError(f"{index} names {short_repr(shard.name)} outside of its folder, which is refused")
        if not _exists(shard):
            raise WeightsError(
                f"{str(shard)[:300]} is missing, one of the {len(shards)} files of this model; copy it as well"
            )
    for shard in shards:
        content |= read_file(shard)
    if absent := [key for key in places if key not in content]:
        raise WeightsError(f"{absent[0][:200]} is in none of the files that {index.name} names; copy them again")
    return content, (index, *shards)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False
