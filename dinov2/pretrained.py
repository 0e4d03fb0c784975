"""`dinov2.load`: a model by name, file or run, ready to use, with preprocessing, head and precision.

    model = dinov2.load("dinov2_vits14_reg")
    features = model.features("photo.jpg")  # .cls [D], .registers [R, D], .patches [h, w, D]

`load` takes the name of a release, a weight file, a run's folder, a Hugging Face folder or id, a URL, and models of
other libraries (`dinov2.encode.external_models`). Weights load strictly; `model.report` says what was done.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov2.checkpoints.files import read_file, state_digest
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.load import LoadReport, load_into
from dinov2.checkpoints.locate import CheckpointLocation, ShowProgress, locate_checkpoint
from dinov2.checkpoints.open import open_checkpoint
from dinov2.configs import Config
from dinov2.data.eval_transform import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, EvalTransform, Fit, pad_to_multiple
from dinov2.encode.external_models import ExternalModel, is_external_model, load_external_model
from dinov2.encode.image_inputs import as_list, to_model_input
from dinov2.encode.tokens import (
    ImageFeatures,
    Tokens,
    as_float32_on_cpu,
    backbone_tokens,
    packed_tokens,
    require_finite,
)
from dinov2.engine.parallel import autocast, choose_device, choose_precision
from dinov2.errors import ConfigError
from dinov2.models import build_model_from_cfg
from dinov2.models.config import BackboneConfig
from dinov2.models.heads import LinearHead, classifier_input
from dinov2.models.inference import optimize_for_inference
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["Pretrained", "digest_of_files", "load"]


@dataclass
class Pretrained:
    """A backbone in eval mode with its transform, on a device and in a precision, and where it comes from."""

    backbone: nn.Module
    transform: EvalTransform
    table: dict[str, Any]
    """The architecture in plain values; for models of other libraries only what is known of it."""
    name: str
    source: str
    """The file or folder that was read, or the name of a model of another library."""
    digest: str
    """SHA-256 of the tensors and of what they do not tell of the model; the same whatever file holds them."""
    report: LoadReport | None
    head: LinearHead | None = None
    """The linear classifier on top, where there is one."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast_dtype: torch.dtype | None = None
    """Number format of products; None is float32."""
    files: tuple[Path, ...] = ()
    """Every file that was read."""
    head_layers: int = 1
    """Blocks whose class tokens a head reads that does not say so itself, as `LinearHead.layers` does."""
    _engine: Any = field(default=None, init=False, repr=False)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.table["patch_size"])

    @property
    def in_chans(self) -> int:
        """Channels C of an image."""
        return int(self.table.get("in_chans", 3))

    @property
    def embed_dim(self) -> int:
        """Width D of a token."""
        return int(self.table["embed_dim"])

    @property
    def num_register_tokens(self) -> int:
        """Registers R."""
        return int(self.table.get("num_register_tokens", 0))

    @property
    def n_blocks(self) -> int:
        """Blocks of the transformer; raises `ConfigError` for a model that has none."""
        if not self.table.get("depth"):
            raise ConfigError(f"{self.name} does not say how many blocks it has")
        return int(self.table["depth"])

    def to(self, device: str | torch.device) -> "Pretrained":
        """Moves the model; the precision stays."""
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.backbone.to(self.device)
        self._engine = None
        if self.head is not None:
            self.head.to(self.device)
        return self

    @property
    def stride(self) -> int:
        """Distance between patches in pixels; less than `patch_size` for overlapping ones."""
        if isinstance(self.backbone, DinoVisionTransformer):
            # A wrapper in the place of the projection need not say its stride.
            stride = getattr(self.backbone.patch_embed.proj, "stride", self.patch_size)
            return int(stride[0] if isinstance(stride, tuple) else stride)
        return self.patch_size

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image whose sides are multiples of the patch."""
        rows, columns = ((side - self.patch_size) // self.stride + 1 for side in (height, width))
        return rows, columns

    def transform_with(
        self, *, size: int | None = None, fit: Fit | None = None, max_tokens: int | None = None
    ) -> EvalTransform:
        """The model's transform with other settings; `max_tokens` counts overlapping patches too."""
        if max_tokens is not None:
            max_tokens = max(max_tokens * self.stride**2 // self.patch_size**2, 1)
        return self.transform.with_(crop_size=size, fit=fit, patch_size=self.patch_size, max_tokens=max_tokens)

    def has_digest(self, digest: str) -> bool:
        """Whether a stored digest is that of this model, also one of its files, as manifests had until version 0.1."""
        return digest == self.digest or (bool(self.files) and digest == digest_of_files(self.files))

    def untrained(self, *, seed: int = 0) -> nn.Module:
        """A backbone of the same architecture with fresh weights, for comparison."""
        if not isinstance(self.backbone, DinoVisionTransformer):
            raise ConfigError(f"{self.name} is a model of another library, of which no untrained twin can be made")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return BackboneConfig.from_table(self.table).build().eval()

    def encode(self, images: Tensor, *, layers: Sequence[int] = ()) -> Tokens:
        """Tokens, float32 on the model's device, of normalised images `[B, C, H, W]`; no gradients.

        `layers` are indices of blocks whose tokens are wanted too, negative ones counted from the end. Sides that are
        no multiple of the patch are filled up with zeros (`dinov2.data.eval_transform`). Raises `DataError` for tokens
        that are NaN or infinite.
        """
        images = pad_to_multiple(images.to(self.device, torch.float32, non_blocking=True), self.patch_size)
        with torch.inference_mode():
            if isinstance(self.backbone, ExternalModel):
                with autocast(self.device, self.autocast_dtype):
                    tokens = self.backbone.tokens(images, layers).map(Tensor.float)
            else:
                tokens = backbone_tokens(self._prepared(), images, layers)
        self._require_finite(tokens)
        # Tensors of inference mode cannot enter a graph; their copies can, as the input of a head that is trained.
        return tokens.map(torch.clone)

    def features(
        self,
        images: Any,
        *,
        layers: Sequence[int] = (),
        fit: Fit | None = None,
        max_tokens: int | None = None,
        batch_size: int = 32,
    ) -> Any:
        """`ImageFeatures` of one image, or a list of them for several.

        An image is a path, a PIL image, a uint8 array or tensor of pixels, all of which go through `transform` (with
        another `fit` when asked for: `crop`, `aspect` or `pad`), or a float tensor `[C, H, W]` that is normalised
        already. Several are a list or a batch `[B, C, H, W]`; images of different sizes share one packed pass.
        `max_tokens` is the largest number of patches of one image (None: `dinov2.data.eval_transform.MAX_TOKENS`).
        Raises `DataError` for what is no image, and when a token is NaN or infinite.
        """
        items, single = as_list(images)
        transform = self.transform
        if fit is not None or max_tokens is not None:
            transform = self.transform_with(fit=fit, max_tokens=max_tokens)
        found: list[ImageFeatures] = []
        for start in range(0, len(items), max(batch_size, 1)):
            inputs = [
                to_model_input(item, transform, patch_size=self.patch_size, channels=self.in_chans)
                for item in items[start : start + max(batch_size, 1)]
            ]
            found += self._features_of(inputs, layers)
        return found[0] if single else found

    def classify(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]`, float32, of normalised images `[B, C, H, W]`, by the linear head.

        Raises `ConfigError` when the model has none, `DataError` for logits that are NaN or infinite.
        """
        if self.head is None:
            raise ConfigError(f"{self.name} has no classifier; load one such as dinov2_vits14_lc, or give a head file")
        # Only what is read is asked for: not every model shows its blocks.
        earlier = list(range(-getattr(self.head, "layers", self.head_layers), -1))
        tokens = self.encode(images, layers=earlier)
        class_tokens = [*(tokens.layers[index].cls for index in earlier), tokens.cls]
        read = classifier_input(class_tokens, tokens.patches.flatten(1, 2))
        with torch.no_grad():
            logits: Tensor = self.head(read)
        require_finite(logits, model=self.name, what="logits")
        return logits

    def _require_finite(self, tokens: Tokens) -> None:
        for part in tokens[:3]:
            require_finite(part, model=self.name)

    def _prepared(self) -> Any:
        """The backbone as it computes: itself, or a copy whose weights are kept in the lower precision."""
        if self.autocast_dtype is None:
            return self.backbone
        if self._engine is None:
            self._engine = optimize_for_inference(cast(DinoVisionTransformer, self.backbone), self.autocast_dtype)
        return self._engine

    def _features_of(self, inputs: list[Tensor], layers: Sequence[int]) -> list[ImageFeatures]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(inputs):
            groups.setdefault(tuple(image.shape), []).append(position)
        batches = [torch.stack([inputs[position] for position in rows]) for rows in groups.values()]
        if len(batches) > 1 and not layers and isinstance(self.backbone, DinoVisionTransformer):
            with torch.inference_mode():
                tokens = packed_tokens(self._prepared(), [batch.to(self.device) for batch in batches])
            for part in tokens:
                self._require_finite(part)
        else:
            tokens = [self.encode(batch, layers=layers) for batch in batches]
        features: dict[int, ImageFeatures] = {}
        for rows, batch, part in zip(groups.values(), batches, tokens, strict=True):
            kept = as_float32_on_cpu(part)
            height, width = (-(-side // self.patch_size) * self.patch_size for side in batch.shape[-2:])
            for row, position in enumerate(rows):
                features[position] = ImageFeatures.of(kept, row, (height, width))
        return [features[position] for position in range(len(inputs))]


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    cfg: Config | None = None,
    layers: int = 4,
    stride: int | None = None,
    progress: ShowProgress | None = None,
) -> Pretrained:
    """Loads a model strictly, with its preprocessing, ready to use.

    Args:
        source: a release (`dinov2 releases` lists them), a weight file, a run's folder (its newest exported teacher), a
            Hugging Face folder or id, a URL, or a model of another library (`timm:NAME`, `hf:ID`, `module:function`).
        device: `auto` (CUDA, else MPS, else CPU) or a device.
        precision: `auto` is bfloat16 where the hardware computes it fast, else float32; or `fp32`, `bf16`, `fp16`.
        cfg: the configuration that the architecture is taken from, instead of the file's own table or its tensors.
        layers: which head a classifier's name (`dinov2_vits14_lc`) means: on 1 or 4 blocks, as `torch.hub` has it.
        stride: pixels between patches, a divisor of the patch size; None is the patch size. Less gives overlapping
            patches, hence denser features at the cost of more tokens.
        progress: where a download shows how far it is (`dinov2.checkpoints.locate.ShowProgress`).

    Raises:
        WeightsError: there is no such model, or the files do not hold exactly that backbone.
        ConfigError: the device, precision or stride does not exist, or `cfg` describes no model.
    """
    where = device if isinstance(device, torch.device) else choose_device(device)
    dtype = choose_precision(precision, where)
    if is_external_model(str(source)) and not Path(source).exists():
        model = _load_external(str(source))
    else:
        model = _load_ours(locate_checkpoint(source, layers=layers, progress=progress), cfg)
    model.autocast_dtype = dtype
    if stride is not None and stride != model.patch_size:
        _set_stride(model, stride)
    return model.to(where)


def _set_stride(model: Pretrained, stride: int) -> None:
    if not isinstance(model.backbone, DinoVisionTransformer):
        raise ConfigError(f"{model.name} is a model of another library, whose patches are fixed; leave the stride out")
    try:
        model.backbone.set_stride(stride)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model.transform = model.transform_with(max_tokens=model.transform.max_tokens)
    # Other features: caches and files begun with another stride are not taken for these.
    model.digest = hashlib.sha256(f"{model.digest}, stride {stride}".encode()).hexdigest()
    model.files = ()


def _load_external(source: str) -> Pretrained:
    peer = load_external_model(source)
    with torch.inference_mode():
        # What other libraries call their sizes differs; what comes out does not.
        probe = torch.zeros(1, 3, *[peer.transform.crop_size] * 2)
        tokens = peer.tokens(probe)
    table = {
        "patch_size": peer.patch_size,
        "in_chans": 3,
        "embed_dim": tokens.cls.shape[-1],
        "depth": peer.n_blocks,
        "num_register_tokens": tokens.registers.shape[1],
        "img_size": [peer.transform.crop_size] * 2,
    }
    return Pretrained(peer, peer.transform, table, source, source, state_digest(peer.state_dict()), None)


def _load_ours(location: CheckpointLocation, cfg: Config | None) -> Pretrained:
    checkpoint = open_checkpoint(location.path)
    if cfg is not None:
        config = _config_of(cfg)
    else:
        config = checkpoint.config or location.config or checkpoint.architecture()
    with torch.device("meta"):  # compared with the tensors before any memory is taken
        backbone = config.build().eval()
    report = load_into(backbone, checkpoint)
    head, head_source = checkpoint.head, location.path
    if location.head is not None:
        head, head_source = read_file(location.head), location.head
    classifier = None if head is None else head_from_state(head, embed_dim=backbone.embed_dim, source=str(head_source))
    return Pretrained(
        backbone,
        _transform_for(config),
        config.table(),
        location.name,
        str(location.path),
        _identity(checkpoint.state, config, classifier),
        report._replace(dropped=checkpoint.dropped),
        classifier,
        head_layers=1 if classifier is None else classifier.layers,
        files=(*checkpoint.files, *([location.head] if location.head else [])),
    )


def _identity(state: Mapping[str, Tensor], config: BackboneConfig, head: LinearHead | None) -> str:
    in_no_tensor = [config.num_heads, config.interpolate_offset, config.interpolate_antialias]
    of_head = state_digest({} if head is None else head.state_dict())
    parts = [state_digest(state), json.dumps(in_no_tensor), of_head]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _config_of(cfg: Config) -> BackboneConfig:
    """The architecture in a configuration; where it and the tensors disagree, loading fails."""
    try:
        with torch.device("meta"):
            backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return BackboneConfig.from_model(backbone, mean=cfg.crops.mean, std=cfg.crops.std)


def _transform_for(config: BackboneConfig) -> EvalTransform:
    mean, std = config.mean, config.std
    if not mean and not std and config.in_chans != 3:
        # Nothing is known of such images; values about -1 to 1 are what models of any kind start from.
        mean = std = (0.5,) * config.in_chans
    # Weights trained at 518 pixels are evaluated at 224, as published; others at the size they were trained at.
    size = min(config.img_size[0], 224)
    patch = config.patch_size
    return EvalTransform(
        crop_size=max(size // patch, 1) * patch,
        patch_size=patch,
        mean=mean or IMAGENET_DEFAULT_MEAN,
        std=std or IMAGENET_DEFAULT_STD,
    )


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several files that of their digests, in order."""
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
