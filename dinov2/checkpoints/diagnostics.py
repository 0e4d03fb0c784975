"""Reasons why weights do not fit a model: the first differences and the likely cause."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

__all__ = ["explain_mismatch", "model_family"]

# Part of a key -> family of models, most telling first.
_FAMILIES = [
    ("decode_head.", "a depth or segmentation head"),
    ("visual.", "CLIP"),
    ("vision_model.", "CLIP or SigLIP"),
    ("rope_embed", "DINOv3"),
    ("storage_tokens", "DINOv3"),
    ("rope_embeddings", "DINOv3"),
    ("distillation_token", "DeiT"),
    ("dist_token", "DeiT"),
    ("encoder.layer.0.layernorm_before", "a ViT, DeiT or DINO in Hugging Face's format"),
    ("decoder_pos_embed", "MAE"),
    ("relative_position_bias_table", "BEiT or Swin"),
    ("layer1.0.conv1.weight", "ResNet"),
    ("downsample_layers.", "ConvNeXt"),
    ("stages.0.", "ConvNeXt or another convolutional network"),
]


def model_family(keys: Iterable[str]) -> str | None:
    """Kind of model with such state-dict keys, where it is a known one and not ours."""
    names = list(keys)
    return next((family for mark, family in _FAMILIES if any(mark in name for name in names)), None)


def explain_mismatch(source: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """One sentence on what differs between two state dicts and why that may be; None when they agree in every shape."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    shapes = [
        f"{key} is {list(given[key].shape)}, wanted {list(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    differences = [f"missing {key}" for key in missing] + [f"unexpected {key[:100]}" for key in unexpected] + shapes
    if not differences:
        return None
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    cause = _likely_cause(missing, unexpected)
    return f"{source} does not fit this model: {'; '.join(differences[:3])}{more}. {cause}"


def _likely_cause(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    if family := model_family(unexpected):
        return f"The file looks like {family}."
    if unexpected == ["register_tokens"] and not missing:
        return "The file is of a model with registers: set student.num_register_tokens."
    if missing == ["register_tokens"] and not unexpected:
        return "The file is of a model without registers: set student.num_register_tokens=0."
    if any(".mlp.w12." in key for key in unexpected) or any(".mlp.w12." in key for key in missing):
        return "One of the two has a SwiGLU feed-forward network: check student.ffn_layer."
    if set(unexpected) <= {"weight", "bias"} and unexpected:
        return "The file looks like a linear head, not a backbone."
    if unexpected and not missing and all(key.startswith(("head.", "fc_norm.")) for key in unexpected):
        return "The file has a classifier of another kind (head.*): take it out first."
    in_blocks = [key for key in [*unexpected, *missing] if key.startswith("blocks.")]
    if any(key.endswith(".norm1.weight") for key in in_blocks):
        return "The depths differ: check student.arch."
    if any(key.endswith(".ls1.gamma") for key in in_blocks):
        return "One of the two has no LayerScale: check student.layerscale."
    if in_blocks:
        return "Check student.ffn_layer, qkv_bias, proj_bias and ffn_bias."
    return "Check student.arch, patch_size and in_chans."
