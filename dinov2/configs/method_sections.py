"""Configuration sections of the method: starting weights, precision of the modules, heads, student, teacher.

The sentence under each field is its documentation; `dinov2.configs.describe` reads it from this source. Sections are
values: checks run when one is made, and nothing is written back later.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from dinov2.configs.checks import at_least, at_most, check_positive, increasing_fractions, one_of, unit_interval
from dinov2.errors import ConfigError

__all__ = [
    "ComputePrecisionConfig",
    "DinoConfig",
    "FfnLayer",
    "IbotConfig",
    "MixedPrecisionConfig",
    "ModelConfig",
    "NetworkPrecisionConfig",
    "PartPrecisionConfig",
    "Precision",
    "Sharding",
    "StudentConfig",
    "TeacherConfig",
]

Precision = Literal["fp32", "fp16", "bf16"]
Sharding = Literal["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD"]
FfnLayer = Literal["mlp", "swiglu", "swiglufused", "identity"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`MODEL`: what a run starts from."""

    WEIGHTS: str = ""
    """Weights of student and teacher to start from when there is nothing to resume; the run still begins at step 0."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionConfig:
    """Number formats of one part; they count when `train.precision` is `parts`."""

    param_dtype: Precision = "fp16"
    """Number format in which this part computes when `train.precision` is `parts`."""

    reduce_dtype: Precision = "fp16"
    """Number format in which this part's gradients are summed over processes."""

    buffer_dtype: Precision = "fp32"
    """Number format of this part's buffers."""


@dataclass(frozen=True, kw_only=True)
class PartPrecisionConfig:
    """Sharding and number formats of one part (backbone or head)."""

    sharding_strategy: Sharding = "SHARD_GRAD_OP"
    """Sharding of this module's parameters over several processes; without effect in one process."""

    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()


# The release sums the gradients of the student's heads in full precision and all others in half precision.
_HEAD_WITH_FP32_GRADIENTS = PartPrecisionConfig(mixed_precision=MixedPrecisionConfig(reduce_dtype="fp32"))


@dataclass(frozen=True, kw_only=True)
class NetworkPrecisionConfig:
    """The three parts of a network; the defaults are the teacher's, whose gradients do not exist."""

    backbone: PartPrecisionConfig = PartPrecisionConfig()
    dino_head: PartPrecisionConfig = PartPrecisionConfig()
    ibot_head: PartPrecisionConfig = PartPrecisionConfig()


@dataclass(frozen=True, kw_only=True)
class ComputePrecisionConfig:
    """`compute_precision`: the release's table of number formats.

    Training uses it with `train.precision=parts`, the release's evaluation commands for the teacher's backbone.
    """

    grad_scaler: bool = True
    """Scale the loss so that small gradients survive in fp16; without effect in the other number formats."""

    teacher: NetworkPrecisionConfig = NetworkPrecisionConfig()
    student: NetworkPrecisionConfig = NetworkPrecisionConfig(
        dino_head=_HEAD_WITH_FP32_GRADIENTS, ibot_head=_HEAD_WITH_FP32_GRADIENTS
    )

    def __post_init__(self) -> None:
        for name, network in (("teacher", self.teacher), ("student", self.student)):
            for part in ("backbone", "dino_head", "ibot_head"):
                key, value = f"compute_precision.{name}.{part}", getattr(network, part)
                one_of(f"{key}.sharding_strategy", value.sharding_strategy, get_args(Sharding))
                for dtype in ("param_dtype", "reduce_dtype", "buffer_dtype"):
                    given = getattr(value.mixed_precision, dtype)
                    one_of(f"{key}.mixed_precision.{dtype}", given, get_args(Precision))


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """`dino`: the loss between whole crops, and its head."""

    loss_weight: float = 1.0
    """Weight of the DINO loss between class tokens of different crops; 0 switches it off."""

    head_n_prototypes: int = 65536
    """Prototypes (outputs) of the DINO head."""

    head_bottleneck_dim: int = 256
    """Width of the normalised bottleneck before the DINO head's last layer."""

    head_nlayers: int = 3
    """Layers of the DINO head's MLP, the one that ends in the bottleneck included."""

    head_hidden_dim: int = 2048
    """Width of the hidden layers of the DINO head."""

    koleo_loss_weight: float = 0.1
    """Weight of KoLeo, which spreads the class tokens of a batch; 0 switches it off."""

    def __post_init__(self) -> None:
        at_least("dino.loss_weight", self.loss_weight, 0, meaning="0 switches the loss off")
        at_least("dino.koleo_loss_weight", self.koleo_loss_weight, 0, meaning="0 switches the loss off")
        _check_head("dino", self)


@dataclass(frozen=True, kw_only=True)
class IbotConfig:
    """`ibot`: the loss on masked patches, its masks and its head."""

    loss_weight: float = 1.0
    """Weight of the iBOT loss on masked patches; 0 switches it off. Crops are masked all the same, as below."""

    mask_sample_probability: float = 0.5
    """Share of the global crops that are masked."""

    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of masked patches in a masked crop."""

    separate_head: bool = False
    """Give patches a head of their own instead of sending them through the DINO head."""

    head_n_prototypes: int = 65536
    """Prototypes (outputs) of the iBOT head; without effect while the head is shared."""

    head_bottleneck_dim: int = 256
    """Width of the bottleneck of the iBOT head; without effect while the head is shared."""

    head_nlayers: int = 3
    """Layers of the iBOT head's MLP; without effect while the head is shared."""

    head_hidden_dim: int = 2048
    """Width of the hidden layers of the iBOT head; without effect while the head is shared."""

    def __post_init__(self) -> None:
        at_least("ibot.loss_weight", self.loss_weight, 0, meaning="0 switches the loss off")
        unit_interval("ibot.mask_sample_probability", self.mask_sample_probability)
        increasing_fractions("ibot.mask_ratio_min_max", self.mask_ratio_min_max, zero=True)
        _check_head("ibot", self)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """`student`: the backbone that is trained; the teacher is its running average."""

    arch: str = "vit_large"
    """Name of the architecture, such as vit_small, vit_base, vit_large, vit_giant2 or, for small machines, vit_nano."""

    patch_size: int = 16
    """Side of a patch in pixels."""

    drop_path_rate: float = 0.3
    """Share of residual branches that stochastic depth drops in the student."""

    layerscale: float = field(default=1.0e-05, metadata={"null": 0.0})
    """Start value of LayerScale; 0 builds the backbone without it."""

    drop_path_uniform: bool = True
    """Drop at the same rate in every block instead of growing linearly from 0 with depth."""

    pretrained_weights: str = ""
    """Weight file from which the student's backbone starts: a release, an exported teacher or a run's checkpoint."""

    ffn_layer: FfnLayer = "mlp"
    """Feed-forward layer of the blocks; swiglu and swiglufused are the same here."""

    block_chunks: int = 0
    """Group the blocks into this many chunks, which only changes the names of the weights; 0 keeps a flat list."""

    qkv_bias: bool = True
    """Give the query, key and value projections a bias."""

    proj_bias: bool = True
    """Give the output projection of attention a bias."""

    ffn_bias: bool = True
    """Give the feed-forward layers a bias."""

    num_register_tokens: int = 0
    """Register tokens, extra tokens that belong to no patch; the releases with registers have 4."""

    interpolate_antialias: bool = False
    """Resize position embeddings with antialiasing, as the releases with registers do."""

    interpolate_offset: float = 0.1
    """Offset in the scale factor when position embeddings are resized; 0 aims at the exact size, as with registers."""

    in_chans: int = 3
    """Channels of the images, from decoding to the backbone."""

    embed_dim: int | None = None
    """Width of the tokens; null takes the architecture's."""

    depth: int | None = None
    """Number of blocks; null takes the architecture's."""

    num_heads: int | None = None
    """Attention heads; null takes the architecture's."""

    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers as a multiple of the token width."""

    drop_path_per_sample: bool = False
    """Drop residual branches sample by sample instead of computing each on a random subset of the batch."""

    def __post_init__(self) -> None:
        if not self.arch:
            raise ConfigError("student.arch is empty; write an architecture such as vit_small")
        one_of("student.ffn_layer", self.ffn_layer, get_args(FfnLayer))
        at_least("student.patch_size", self.patch_size, 1)
        at_least("student.in_chans", self.in_chans, 1)
        at_least("student.layerscale", self.layerscale, 0, meaning="0 for none")
        at_least("student.block_chunks", self.block_chunks, 0, meaning="0 for a flat list")
        at_least("student.num_register_tokens", self.num_register_tokens, 0)
        at_least("student.interpolate_offset", self.interpolate_offset, 0)
        check_positive("student.mlp_ratio", self.mlp_ratio)
        # Far beyond any published model; what is larger would be built for minutes before memory is asked for.
        at_most("student.depth", self.depth or 0, 1000)
        at_most("student.embed_dim", self.embed_dim or 0, 1 << 17)
        at_most("student.mlp_ratio", self.mlp_ratio, 1000)
        if not 0 <= self.drop_path_rate < 1:
            raise ConfigError(f"student.drop_path_rate is {self.drop_path_rate}; write a number from 0 to below 1")
        for name in ("embed_dim", "depth", "num_heads"):
            if getattr(self, name) is not None:
                at_least(f"student.{name}", getattr(self, name), 1, meaning="null takes the architecture's")
        self._check_divisions()

    def _check_divisions(self) -> None:
        if self.embed_dim is not None and self.num_heads is not None and self.embed_dim % self.num_heads:
            raise ConfigError(
                f"student.embed_dim is {self.embed_dim}, which {self.num_heads} heads (student.num_heads) do not share "
                f"evenly; write a multiple of {self.num_heads}"
            )
        # The depth of a named architecture is known to `models` alone, which checks it when it builds.
        if self.depth is not None and self.block_chunks and self.depth % self.block_chunks:
            raise ConfigError(
                f"student.block_chunks is {self.block_chunks}, which does not divide the {self.depth} blocks of "
                "student.depth; write a divisor, or 0 for a flat list"
            )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """`teacher`: how fast it follows the student and how sharp its assignments are."""

    momentum_teacher: float = 0.992
    """Teacher momentum at the first step: the share of the old teacher that a step keeps."""

    final_momentum_teacher: float = 1.0
    """Teacher momentum at the last step, reached along a cosine."""

    warmup_teacher_temp: float = 0.04
    """Temperature of the teacher's assignments at the first step."""

    teacher_temp: float = 0.07
    """Temperature of the teacher's assignments after the warm-up."""

    warmup_teacher_temp_epochs: int = 30
    """Epochs in which the teacher's temperature goes from its first value to the last, linearly."""

    def __post_init__(self) -> None:
        unit_interval("teacher.momentum_teacher", self.momentum_teacher)
        unit_interval("teacher.final_momentum_teacher", self.final_momentum_teacher)
        check_positive("teacher.warmup_teacher_temp", self.warmup_teacher_temp)
        check_positive("teacher.teacher_temp", self.teacher_temp)
        at_least("teacher.warmup_teacher_temp_epochs", self.warmup_teacher_temp_epochs, 0, meaning="0 for no warm-up")


def _check_head(section: str, head: DinoConfig | IbotConfig) -> None:
    at_least(f"{section}.head_n_prototypes", head.head_n_prototypes, 2)
    at_least(f"{section}.head_bottleneck_dim", head.head_bottleneck_dim, 1)
    at_least(f"{section}.head_nlayers", head.head_nlayers, 1)
    at_least(f"{section}.head_hidden_dim", head.head_hidden_dim, 1)
