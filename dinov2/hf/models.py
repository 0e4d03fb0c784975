"""`Dinov2Model`, `Dinov2ForImageClassification`, `Dinov2Backbone` and their siblings with registers.

They build on `PreTrainedModel`, so that loading, saving, devices, quantisers, adapters and `Trainer` work; what they
compute is `dinov2.layers`. States and attention weights are collected by the models themselves and not by hooks.
"""

import enum
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)

from dinov2.hf.configuration import Config, Dinov2Config, Dinov2WithRegistersConfig, align_stages
from dinov2.hf.encoder import (
    Dinov2Embeddings,
    Dinov2Encoder,
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersEncoder,
    States,
    encode_images,
    state_indices,
)
from dinov2.hf.pretrained import Dinov2PreTrainedModel, Dinov2WithRegistersPreTrainedModel

try:
    from transformers.backbone_utils import BackboneMixin, BackboneType
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneMixin, BackboneType

__all__ = [
    "Dinov2Backbone",
    "Dinov2ForImageClassification",
    "Dinov2Model",
    "Dinov2WithRegistersBackbone",
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersModel",
]

_Tuple = tuple[Tensor, ...]
_CALL = ("attention_mask", "head_mask", "output_attentions", "output_hidden_states", "return_dict")


class _Trunk(Dinov2PreTrainedModel):
    """`embeddings`, `encoder` and `layernorm` of a config."""

    _embeddings_class: ClassVar[type[Dinov2Embeddings]] = Dinov2Embeddings
    _encoder_class: ClassVar[type[Dinov2Encoder]] = Dinov2Encoder

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = self._embeddings_class(config)
        self.encoder = self._encoder_class(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config_prunes := getattr(config, "pruned_heads", None):  # before weights are loaded
            self.prune_heads(config_prunes)
        self.post_init()


class _Model(_Trunk):
    """Images -> tokens after the final norm, for both families."""

    _more_arguments = ("bool_masked_pos",)
    _signatures = (
        ("bool_masked_pos", "attention_mask"),
        ("bool_masked_pos", "output_hidden_states"),
        ("bool_masked_pos", "head_mask", "output_hidden_states"),
        ("bool_masked_pos", "head_mask", "output_attentions", "output_hidden_states", "return_dict"),
    )

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        bool_masked_pos: Tensor | Sequence[Tensor | None] | None = None,
        *values: object,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPooling | _Tuple | list[BaseModelOutputWithPooling] | list[_Tuple]:
        """All tokens of images `[B, C, H, W]`, with hidden states and attention weights on request.

        Args:
            pixel_values: images; their type becomes that of the weights. A list of batches or single images
                `[C, H, W]` of different sizes gives a list of outputs from one packed pass.
            bool_masked_pos: `[B, N]`, bool or 0 and 1: patches to replace by the mask token.
            attention_mask: `[B, T]`, 1 where a token (class token, registers, patches) is attended to, or a prepared
                4-D mask.
            head_mask: `[heads]` or `[layers, heads]`, factors of the attention weights, 0 masks a head.
            output_attentions: also return the weights of every layer, whatever computes attention otherwise.
            output_hidden_states: True for all L + 1 states, or the indices of those wanted.
            return_dict: False gives a tuple; None, as for the other flags, the config's value.

        Returns:
            `last_hidden_state` `[B, T, D]` after the final norm, `pooler_output` `[B, D]` (its class token),
            `hidden_states` before that norm, `attentions` `[B, heads, T, T]`.

        Raises:
            ValueError: no images, or shapes that do not fit.
            TypeError: an unknown keyword, or a positional argument that versions of transformers read differently.
        """
        given, as_dict = self.read_arguments(
            pixel_values,
            (bool_masked_pos, *values) if values else (),
            kwargs,
            attention_mask=attention_mask,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        given.pop("bool_masked_pos", None)
        options = self.encoder_options(given)
        if isinstance(pixel_values, (list, tuple)):
            encoded = encode_images(self.embeddings, self.encoder, pixel_values, bool_masked_pos, **options)
            outputs = [self._output(one) for one in encoded]
            return outputs if as_dict else [output.to_tuple() for output in outputs]
        tokens = self.embeddings(self.required(pixel_values), bool_masked_pos=bool_masked_pos)
        output = self._output(self.encoder(tokens, **options))
        return output if as_dict else output.to_tuple()

    def _output(self, encoded: BaseModelOutput) -> BaseModelOutputWithPooling:
        normed = self.layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=normed,
            pooler_output=normed[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


class Dinov2Model(_Model):
    """The DINOv2 backbone: images `[B, C, H, W]` -> class token and patch tokens."""

    config_class = Dinov2Config


class Dinov2WithRegistersModel(_Model, Dinov2WithRegistersPreTrainedModel):
    """The DINOv2 backbone with registers: class token, registers and patch tokens."""

    config_class = Dinov2WithRegistersConfig
    _embeddings_class = Dinov2WithRegistersEmbeddings
    _encoder_class = Dinov2WithRegistersEncoder


class _Classifier(Dinov2PreTrainedModel):
    """Class token and mean of the patch tokens -> logits, for both families."""

    _model_class: ClassVar[type[nn.Module]] = Dinov2Model
    _more_arguments = ("bool_masked_pos",)
    _signatures = (
        ("labels", "attention_mask"),
        ("head_mask", "labels"),
        ("head_mask", "labels", "output_attentions", "output_hidden_states", "return_dict"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self._model_class(config))
        self.classifier = (
            nn.Linear(config.hidden_size * 2, config.num_labels) if config.num_labels > 0 else nn.Identity()
        )
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: object, **kwargs: Any
    ) -> Any:
        """As in transformers; says in one sentence when the checkpoint holds no classifier."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        _warn_about_fresh_head(pretrained_model_name_or_path, info["missing_keys"])
        return (model, info) if wants_info else model

    def forward(
        self,
        pixel_values: Tensor | None = None,
        *values: object,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        bool_masked_pos: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> ImageClassifierOutput | _Tuple:
        """Logits `[B, num_labels]` of images `[B, C, H, W]`, and the loss when `labels` are given.

        Args:
            labels: class numbers `[B]` or `[B, 1]` of any integer type (-100 is ignored), targets `[B]` or
                `[B, num_labels]` of a regression, or 0 and 1 `[B, num_labels]` for several classes an image; which of
                them is told by `config.problem_type`, else by `num_labels` and the type of the labels.
            num_items_in_batch: what to divide the summed loss by, where gradients are accumulated.

        The other arguments are those of the model. Returns `loss`, `logits`, `hidden_states`, `attentions`.
        """
        given, as_dict = self.read_arguments(
            pixel_values,
            values,
            kwargs,
            labels=labels,
            attention_mask=attention_mask,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        targets = given.pop("labels")
        outputs = self.base_model(self.required(pixel_values), bool_masked_pos, return_dict=True, **given)
        tokens = outputs.last_hidden_state
        patches = tokens[:, 1 + self.n_registers :]
        logits = self.classifier(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))
        loss = None
        if targets is not None and hasattr(self, "_loss_function"):  # assigned to `model.loss_function`
            items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(targets, logits, self.config, **items)
        elif targets is not None:
            loss = _classification_loss(
                logits, targets, problem_type=self.config.problem_type, num_items=num_items_in_batch
            )
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if as_dict else output.to_tuple()


class Dinov2ForImageClassification(_Classifier):
    """The backbone with a linear classifier on class token and mean of the patch tokens."""

    config_class = Dinov2Config


class Dinov2WithRegistersForImageClassification(_Classifier, Dinov2WithRegistersPreTrainedModel):
    """The backbone with registers and a linear classifier on class token and mean of the patch tokens."""

    config_class = Dinov2WithRegistersConfig
    _model_class = Dinov2WithRegistersModel


# The mixin comes last: its constructor and its hooks, which differ between versions, are not needed.
class _Backbone(_Trunk, BackboneMixin):  # type: ignore[misc]
    """Images -> feature maps of the stages in `out_features`; blocks behind the last of them are not run."""

    has_attentions = True
    use_timm_backbone = False
    _signatures = (
        ("attention_mask",),
        ("output_hidden_states",),
        ("output_hidden_states", "output_attentions", "return_dict"),
    )

    def forward(
        self,
        pixel_values: Tensor,
        *values: object,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> BackboneOutput | _Tuple:
        """Feature maps of images `[B, C, H, W]`, in the order of the stages.

        Each is `[B, D, h, w]`, or with `reshape_hidden_states=False` all tokens `[B, T, D]` (class token, registers,
        patches; without the registers when `config.drop_register_tokens` is set, as heads for models without registers
        expect); after the final norm when `apply_layernorm` is set. The other arguments are those of the model.
        """
        pixel_values = self.required(pixel_values)
        given, as_dict = self.read_arguments(
            pixel_values,
            values,
            kwargs,
            attention_mask=attention_mask,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        options = self.encoder_options(given)
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
            hidden_states=asked if states_asked else None,
            attentions=encoded.attentions,
        )
        if not stages:
            output.feature_maps = ()  # the constructor takes an empty tuple for None
        return output if as_dict else output.to_tuple()

    def forward_with_filtered_kwargs(self, *args: object, **kwargs: object) -> BackboneOutput | _Tuple:
        """`forward` with the keywords that it knows; models around a backbone pass on whatever they were given."""
        return self(*args, **{name: value for name, value in kwargs.items() if name in _CALL})

    @property
    def stage_names(self) -> list[str]:
        """`stem`, `stage1`, ..., of the config."""
        return self.config.stage_names

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that are given out; setting them sets the indices too."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: Sequence[str] | None) -> None:
        self.config.out_features = names

    @property
    def out_indices(self) -> list[int]:
        """Indices of the stages that are given out; setting them sets the names too."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, indices: Sequence[int] | None) -> None:
        self.config.out_indices = indices

    @property
    def num_features(self) -> list[int]:
        """The width of every stage."""
        return [self.config.hidden_size] * (self.config.num_hidden_layers + 1)

    @property
    def backbone_type(self) -> enum.Enum:
        """That this is a backbone of transformers and not one of timm."""
        return BackboneType.TRANSFORMERS

    def _stage_indices(self) -> list[int]:
        names, _ = align_stages(self.stage_names, self.config.out_features, self.config.out_indices)
        n_blocks = len(self.encoder.layer)
        indices = [self.stage_names.index(name) for name in names]
        if indices and indices[-1] > n_blocks:
            raise ValueError(
                f"out_features asks for {names[-1]}, but this backbone has {n_blocks} blocks; build it again from the "
                "changed config"
            )
        return indices

    def _feature_map(self, tokens: Tensor, pixel_values: Tensor) -> Tensor:
        if self.config.apply_layernorm:
            tokens = self.layernorm(tokens)
        n_registers = self.n_registers
        if not self.config.reshape_hidden_states:
            if n_registers and getattr(self.config, "drop_register_tokens", False):
                return tokens[:, [0, *range(1 + n_registers, tokens.shape[1])]]
            return tokens
        grid = self.embeddings.patch_grid(*pixel_values.shape[-2:])
        return tokens[:, 1 + n_registers :].unflatten(1, grid).permute(0, 3, 1, 2).contiguous()


class Dinov2Backbone(_Backbone):
    """Feature maps of a DINOv2 model, for detectors and dense heads."""

    config_class = Dinov2Config


class Dinov2WithRegistersBackbone(_Backbone, Dinov2WithRegistersPreTrainedModel):
    """Feature maps of a DINOv2 model with registers, for detectors and dense heads."""

    config_class = Dinov2WithRegistersConfig
    _embeddings_class = Dinov2WithRegistersEmbeddings
    _encoder_class = Dinov2WithRegistersEncoder

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_register_tokens = config.num_register_tokens


def _classification_loss(
    logits: Tensor,  # [B, C]
    labels: Tensor,
    *,
    problem_type: str | None,
    num_items: Tensor | int | None,
) -> Tensor:  # []
    """Mean squared error, cross entropy or binary cross entropy, the mean of it or the sum over `num_items`.

    Without a problem type it follows from the type of the labels and the width of the head; nothing is written into the
    config. Raises `ValueError` for an unknown problem type, or labels whose number does not fit the logits.
    """
    labels = labels.to(logits.device)
    num_labels = logits.shape[-1]
    if problem_type is None:
        is_float = labels.is_floating_point()
        problem_type = "multi_label_classification" if is_float else "single_label_classification"
        problem_type = "regression" if num_labels == 1 else problem_type
    reduction = "mean" if num_items is None else "sum"
    if problem_type == "single_label_classification":
        predicted, targets = logits.reshape(-1, num_labels), labels.flatten().long()
        if len(predicted) != len(targets):
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit logits {list(logits.shape)}; give one class number "
                "an image, or 0 and 1 for every class with problem_type='multi_label_classification'"
            )
        loss = F.cross_entropy(predicted, targets, reduction=reduction)
    elif problem_type in ("regression", "multi_label_classification"):
        is_flat = problem_type == "regression" and num_labels == 1
        predicted, targets = (logits.flatten(), labels.flatten()) if is_flat else (logits, labels)
        if predicted.shape != targets.shape:
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit predictions of shape {list(predicted.shape)}; "
                "give one number for every prediction"
            )
        function = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
        loss = function(predicted, targets.to(logits.dtype), reduction=reduction)
    else:
        raise ValueError(
            f"config.problem_type is {problem_type!r}; choose regression, single_label_classification, "
            "multi_label_classification, or None to tell by the labels"
        )
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)


def _warn_about_fresh_head(source: str | os.PathLike[str] | None, missing: Iterable[str]) -> None:
    """Warn when a checkpoint had no classifier, and name the repository that has one."""
    if not any(key.startswith("classifier.") for key in missing):
        return
    name = "the given state dict" if source is None else str(source).rstrip("/")
    is_released = name.startswith("facebook/dinov2") and "imagenet1k" not in name
    advice = (
        f"{name}-imagenet1k-1-layer has one for the classes of ImageNet"
        if is_released
        else "the released ones are in the repositories called facebook/dinov2-...-imagenet1k-1-layer"
    )
    warnings.warn(
        f"{name} holds a backbone and no classifier, so the classifier has random weights and its answers mean nothing "
        f"before it is trained; {advice}",
        UserWarning,
        stacklevel=3,
    )
