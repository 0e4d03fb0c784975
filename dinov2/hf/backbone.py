"""`Dinov2Backbone` and `Dinov2WithRegistersBackbone`: feature maps of chosen stages for detectors and dense heads."""

import enum
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor
from transformers.modeling_outputs import BackboneOutput

from dinov2.hf.arguments import UNSET, merged, refuse_unknown
from dinov2.hf.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2.hf.embeddings import Dinov2Embeddings, Dinov2WithRegistersEmbeddings
from dinov2.hf.encoder import Dinov2Encoder, Dinov2WithRegistersEncoder, state_indices
from dinov2.hf.pretrained import Dinov2PreTrainedModel, Dinov2WithRegistersPreTrainedModel, Trunk
from dinov2.hf.stages import aligned_stages

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneMixin

__all__ = ["Dinov2Backbone", "Dinov2WithRegistersBackbone"]

_KNOWN = ("attention_mask", "head_mask", "output_attentions", "output_hidden_states", "return_dict")


class _Backbone(Trunk):
    """Images -> feature maps of the stages in `out_features`; blocks behind the last of them are not run."""

    has_attentions = True
    use_timm_backbone = False
    _signatures: ClassVar[Sequence[Sequence[str]]] = (
        ("attention_mask",),
        ("output_hidden_states",),
        ("output_hidden_states", "output_attentions", "return_dict"),
    )

    def forward(
        self: Any,
        pixel_values: Tensor,
        *values: Any,
        attention_mask: Any = UNSET,
        head_mask: Any = UNSET,
        output_attentions: Any = UNSET,
        output_hidden_states: Any = UNSET,
        return_dict: Any = UNSET,
        **kwargs: Any,
    ) -> Any:
        """Feature maps of images `[B, C, H, W]`, in the order of the stages.

        Each is `[B, D, h, w]`, or with `reshape_hidden_states=False` all tokens `[B, T, D]` (class token, registers,
        patches; without the registers when `config.drop_register_tokens` is set, as heads for models without registers
        expect); after the final norm when `apply_layernorm` is set. The other arguments are those of the model.
        """
        if kwargs:
            refuse_unknown(kwargs, _KNOWN, what=type(self).__name__)
        given = {
            "attention_mask": attention_mask,
            "head_mask": head_mask,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        pixel_values = self.required(pixel_values)
        if values:
            told = merged(values, given, self._signatures, self.fits(pixel_values), what=type(self).__name__)
        else:
            told = {name: value for name, value in given.items() if value is not UNSET}
        as_dict = self.wants_dict(told.pop("return_dict", None))
        options = self.encoder_options(told)
        stages = self._stage_indices()
        n_blocks = len(self.encoder.layer)
        states_asked = state_indices(options.pop("output_hidden_states", None), n_blocks + 1)
        depth = max(stages, default=0)
        if depth < n_blocks and not states_asked and "output_attentions" not in options:
            options["depth"] = depth
        collected = sorted(states_asked.union(stages))
        encoded = self.encoder(self.embeddings(pixel_values), output_hidden_states=collected, **options)
        states = encoded.hidden_states or ()
        asked = tuple(state if index in states_asked else None for index, state in enumerate(states))
        output = BackboneOutput(
            feature_maps=tuple(self._feature_map(states[stage], pixel_values) for stage in stages),
            hidden_states=cast(Any, asked) if states_asked else None,
            attentions=encoded.attentions,
        )
        if not stages:
            output.feature_maps = ()  # the constructor takes an empty tuple for None
        return output if as_dict else output.to_tuple()

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` with the keywords that it knows; models around a backbone pass on whatever they were given."""
        return self(*args, **{name: value for name, value in kwargs.items() if name in _KNOWN})  # type: ignore[operator]

    @property
    def stage_names(self: Any) -> list[str]:
        """`stem`, `stage1`, ..., of the config."""
        names: list[str] = self.config.stage_names
        return names

    @property
    def out_features(self: Any) -> list[str]:
        """Names of the stages that are given out; setting them sets the indices too."""
        names: list[str] = self.config.out_features
        return names

    @out_features.setter
    def out_features(self: Any, names: Sequence[str] | None) -> None:
        self.config.out_features = names

    @property
    def out_indices(self: Any) -> list[int]:
        """Indices of the stages that are given out; setting them sets the names too."""
        indices: list[int] = self.config.out_indices
        return indices

    @out_indices.setter
    def out_indices(self: Any, indices: Sequence[int] | None) -> None:
        self.config.out_indices = indices

    @property
    def num_features(self: Any) -> list[int]:
        """The width of every stage."""
        return [self.config.hidden_size] * (self.config.num_hidden_layers + 1)

    @property
    def backbone_type(self) -> enum.Enum | str:
        """That this is a backbone of transformers and not one of timm."""
        return _transformers_type()

    def _stage_indices(self: Any) -> list[int]:
        names, _ = aligned_stages(self.stage_names, self.config.out_features, self.config.out_indices)
        n_blocks = len(self.encoder.layer)
        indices = [self.stage_names.index(name) for name in names]
        if indices and indices[-1] > n_blocks:
            raise ValueError(
                f"out_features asks for {names[-1]}, but this backbone has {n_blocks} blocks; build it again from the "
                "changed config"
            )
        return indices

    def _feature_map(self: Any, tokens: Tensor, pixel_values: Tensor) -> Tensor:
        if self.config.apply_layernorm:
            tokens = self.layernorm(tokens)
        n_registers = self.count_registers()
        if not self.config.reshape_hidden_states:
            if n_registers and getattr(self.config, "drop_register_tokens", False):
                return tokens[:, [0, *range(1 + n_registers, tokens.shape[1])]]
            return tokens
        grid = self.embeddings.patch_grid(*pixel_values.shape[-2:])
        return tokens[:, 1 + n_registers :].unflatten(1, grid).permute(0, 3, 1, 2).contiguous()


def _transformers_type() -> enum.Enum | str:
    try:
        from transformers.backbone_utils import BackboneType
    except ImportError:  # transformers 4
        from transformers.utils.backbone_utils import BackboneType
    kind: enum.Enum = BackboneType.TRANSFORMERS
    return kind


# The mixin comes last: its constructor and its hooks, which differ between versions, are not needed.


class Dinov2Backbone(_Backbone, Dinov2PreTrainedModel, BackboneMixin):  # type: ignore[misc]
    """Feature maps of a DINOv2 model, for detectors and dense heads."""

    config_class = Dinov2Config
    _embeddings_class = Dinov2Embeddings
    _encoder_class = Dinov2Encoder


class Dinov2WithRegistersBackbone(_Backbone, Dinov2WithRegistersPreTrainedModel, BackboneMixin):  # type: ignore[misc]
    """Feature maps of a DINOv2 model with registers, for detectors and dense heads."""

    config_class = Dinov2WithRegistersConfig
    _embeddings_class = Dinov2WithRegistersEmbeddings
    _encoder_class = Dinov2WithRegistersEncoder

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_register_tokens = config.num_register_tokens
