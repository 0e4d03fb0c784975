"""`Dinov2Model`, `Dinov2ForImageClassification` and their siblings with registers: transformers' classes, one by one.

They build on `PreTrainedModel`, so that loading, saving, devices, quantisers, adapters and `Trainer` work; what they
compute is `dinov2.layers`. States and attention weights are collected by the models themselves and not by hooks.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from dinov2.hf.arguments import UNSET, merged, refuse_unknown, without_none
from dinov2.hf.classification import classification_loss, warn_about_fresh_head
from dinov2.hf.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2.hf.embeddings import Dinov2Embeddings, Dinov2WithRegistersEmbeddings
from dinov2.hf.encoder import Dinov2Encoder, Dinov2WithRegistersEncoder, encode_images
from dinov2.hf.pretrained import Dinov2PreTrainedModel, Dinov2WithRegistersPreTrainedModel, Trunk

__all__ = [
    "Dinov2ForImageClassification",
    "Dinov2Model",
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersModel",
]

_CALL = ("attention_mask", "head_mask", "output_attentions", "output_hidden_states", "return_dict")


class _Model(Trunk):
    """Images -> tokens after the final norm, for both families."""

    _signatures: ClassVar[Sequence[Sequence[str]]] = (
        ("bool_masked_pos", "attention_mask"),
        ("bool_masked_pos", "output_hidden_states"),
        ("bool_masked_pos", "head_mask", "output_hidden_states"),
        ("bool_masked_pos", "head_mask", "output_attentions", "output_hidden_states", "return_dict"),
    )

    def forward(
        self: Any,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        bool_masked_pos: Tensor | Sequence[Tensor | None] | None = None,
        *values: Any,
        attention_mask: Any = UNSET,
        head_mask: Any = UNSET,
        output_attentions: Any = UNSET,
        output_hidden_states: Any = UNSET,
        return_dict: Any = UNSET,
        **kwargs: Any,
    ) -> Any:
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
        if kwargs:
            refuse_unknown(kwargs, ("bool_masked_pos", *_CALL), what=type(self).__name__)
        given = {
            "attention_mask": attention_mask,
            "head_mask": head_mask,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        if values:
            told = merged(
                (bool_masked_pos, *values), given, self._signatures, self.fits(pixel_values), what=type(self).__name__
            )
        else:
            told = {name: value for name, value in given.items() if value is not UNSET}
        told.pop("bool_masked_pos", None)
        as_dict = self.wants_dict(told.pop("return_dict", None))
        options = self.encoder_options(told)
        if isinstance(pixel_values, (list, tuple)):
            encoded = encode_images(self.embeddings, self.encoder, pixel_values, bool_masked_pos, **options)
            outputs = [self._output(one) for one in encoded]
            return outputs if as_dict else [output.to_tuple() for output in outputs]
        tokens = self.embeddings(self.required(pixel_values), bool_masked_pos=bool_masked_pos)
        output = self._output(self.encoder(tokens, **options))
        return output if as_dict else output.to_tuple()

    def _output(self: Any, encoded: Any) -> Any:
        normed = self.layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=normed,
            pooler_output=normed[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


class Dinov2Model(_Model, Dinov2PreTrainedModel):
    """The DINOv2 backbone: images `[B, C, H, W]` -> class token and patch tokens."""

    config_class = Dinov2Config
    _embeddings_class = Dinov2Embeddings
    _encoder_class = Dinov2Encoder


class Dinov2WithRegistersModel(_Model, Dinov2WithRegistersPreTrainedModel):
    """The DINOv2 backbone with registers: class token, registers and patch tokens."""

    config_class = Dinov2WithRegistersConfig
    _embeddings_class = Dinov2WithRegistersEmbeddings
    _encoder_class = Dinov2WithRegistersEncoder


class _Classifier:
    """Class token and mean of the patch tokens -> logits, for both families."""

    _model_class: ClassVar[type[nn.Module]]
    _signatures: ClassVar[Sequence[Sequence[str]]] = (
        ("labels", "attention_mask"),
        ("head_mask", "labels"),
        ("head_mask", "labels", "output_attentions", "output_hidden_states", "return_dict"),
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self._model_class(config))  # type: ignore[attr-defined]
        self.classifier = (
            nn.Linear(config.hidden_size * 2, config.num_labels) if config.num_labels > 0 else nn.Identity()
        )
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; says in one sentence when the checkpoint holds no classifier."""
        wants_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained  # type: ignore[misc]
        model, info = load(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        warn_about_fresh_head(pretrained_model_name_or_path, info["missing_keys"])
        return (model, info) if wants_info else model

    def forward(
        self: Any,
        pixel_values: Tensor | None = None,
        *values: Any,
        labels: Any = UNSET,
        attention_mask: Any = UNSET,
        head_mask: Any = UNSET,
        output_attentions: Any = UNSET,
        output_hidden_states: Any = UNSET,
        return_dict: Any = UNSET,
        bool_masked_pos: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits `[B, num_labels]` of images `[B, C, H, W]`, and the loss when `labels` are given.

        Args:
            labels: class numbers `[B]` or `[B, 1]` of any integer type (-100 is ignored), targets `[B]` or
                `[B, num_labels]` of a regression, or 0 and 1 `[B, num_labels]` for several classes an image; which of
                them is told by `config.problem_type`, else by `num_labels` and the type of the labels.
            num_items_in_batch: what to divide the summed loss by, where gradients are accumulated.

        The other arguments are those of the model. Returns `loss`, `logits`, `hidden_states`, `attentions`.
        """
        if kwargs:
            refuse_unknown(kwargs, ("labels", "bool_masked_pos", *_CALL), what=type(self).__name__)
        given = {
            "labels": labels,
            "attention_mask": attention_mask,
            "head_mask": head_mask,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        base = self.base_model
        if values:
            fits = base.fits(pixel_values, self.num_labels)
            told = merged(values, given, self._signatures, fits, what=type(self).__name__)
        else:
            told = {name: value for name, value in given.items() if value is not UNSET}
        targets = told.pop("labels", None)
        as_dict = self.wants_dict(told.pop("return_dict", None))
        outputs = base(self.required(pixel_values), bool_masked_pos, return_dict=True, **told)
        tokens = outputs.last_hidden_state
        patches = tokens[:, 1 + self.count_registers() :]
        logits = self.classifier(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))
        loss = None
        if targets is not None and hasattr(self, "_loss_function"):  # assigned to `model.loss_function`
            items = without_none(num_items_in_batch=num_items_in_batch)
            loss = self.loss_function(targets, logits, self.config, **items)
        elif targets is not None:
            loss = classification_loss(
                logits, targets, problem_type=self.config.problem_type, num_items=num_items_in_batch
            )
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if as_dict else output.to_tuple()


class Dinov2ForImageClassification(_Classifier, Dinov2PreTrainedModel):
    """The backbone with a linear classifier on class token and mean of the patch tokens."""

    config_class = Dinov2Config
    _model_class = Dinov2Model


class Dinov2WithRegistersForImageClassification(_Classifier, Dinov2WithRegistersPreTrainedModel):
    """The backbone with registers and a linear classifier on class token and mean of the patch tokens."""

    config_class = Dinov2WithRegistersConfig
    _model_class = Dinov2WithRegistersModel
