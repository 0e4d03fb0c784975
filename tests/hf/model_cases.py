"""Side by side: the differences between our models and the installed transformers' own.

It is imported by the tests and by the scripts that they run under older versions, so that every version answers the
same questions; questions that a version does not know (attention masks before 5.18, head masks after 4) are left out.
"""

import filecmp
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import dinov2.hf as hf

__all__ = [
    "CLASSES",
    "FAMILIES",
    "NETWORKS",
    "REFERENCE",
    "config_files_agree",
    "difference",
    "folders_are_exchanged",
    "images",
    "our_model",
    "output_differences",
    "randomised",
    "reading_differences",
    "settings",
    "stock_and_ours",
    "write_stock_folders",
]

FAMILIES = ("Dinov2", "Dinov2WithRegisters")
CLASSES = ("Model", "ForImageClassification", "Backbone")
NETWORKS: dict[str, dict[str, Any]] = {"MLP": {}, "SwiGLU": {"use_swiglu_ffn": True}}

# Height and width: native, larger, as many patches as native, square, and no whole patches.
SIZES = ((32, 32), (40, 56), (16, 64), (24, 24), (39, 45))

VARIANTS: dict[str, dict[str, Any]] = {
    "no bias": {"qkv_bias": False},
    "grey": {"num_channels": 1},
    "relu": {"hidden_act": "relu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "narrow": {"mlp_ratio": 2, "layer_norm_eps": 1e-3, "layerscale_value": 0.5},
    "SwiGLU of an odd width": {"use_swiglu_ffn": True, "mlp_ratio": 3, "hidden_size": 36},
    "no labels": {"num_labels": 0},
    "one head": {"num_attention_heads": 1, "num_hidden_layers": 1},
}

BACKBONES: dict[str, dict[str, Any]] = {
    "default": {},
    "names": {"out_features": ["stem", "stage1", "stage2"]},
    "indices": {"out_indices": [0, 2]},
    "negative": {"out_indices": [-2, -1]},
    "no norm": {"out_indices": [1, 2], "apply_layernorm": False},
    "tokens": {"out_indices": [1, 2], "reshape_hidden_states": False},
    "raw tokens": {"out_indices": [0, 1], "reshape_hidden_states": False, "apply_layernorm": False},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14},
    "giant": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
    "stages": {"out_features": ["stem", "stage3"]},
    "indices": {"out_indices": [0, 4]},
    "negative": {"out_indices": [-1]},
    "labels": {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}},
    "number of labels": {"num_labels": 7, "problem_type": "multi_label_classification"},
    "unknown keys": {"interpolate_antialias": True, "interpolate_offset": 0.0, "remark": "ours"},
    "drops": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3},
    "maps": {"apply_layernorm": False, "reshape_hidden_states": False, "qkv_bias": False},
    "outputs": {"output_hidden_states": True, "return_dict": False},
    "a type": {"dtype": "float16"},
}

REFERENCE = "reference.safetensors"
"""File beside a written model: what its writer computes for `images(1)`."""


def settings(family: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a configuration for a tiny model."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    registers = {"num_register_tokens": 3} if family == "Dinov2WithRegisters" else {}
    return {**small, "num_labels": 5, **registers, **changes}


def images(batch: int = 2, height: int = 40, width: int = 56, *, channels: int = 3) -> Tensor:
    """[B, C, H, W], the same every time."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


def randomised(model: Any) -> Any:
    """The model with every parameter off its starting value, in evaluation mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def our_model(family: str, kind: str, **changes: Any) -> Any:
    """One of our models, in evaluation mode, with random weights that are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return randomised(getattr(hf, family + kind)(getattr(hf, family + "Config")(**settings(family, **changes))))


def stock_and_ours(family: str, kind: str, **changes: Any) -> tuple[Any, Any]:
    """Both models with the same weights; ours read the names that the other has in memory."""
    theirs = getattr(transformers, family + kind)
    theirs = randomised(theirs(getattr(transformers, family + "Config")(**settings(family, **changes))))
    config = getattr(hf, family + "Config").from_dict(theirs.config.to_dict())
    ours = getattr(hf, family + kind)(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def difference(first: Any, second: Any) -> float:
    """The largest absolute difference of tensors, in any nesting of tuples; infinite when the two are not alike."""
    if first is None or second is None:
        return 0.0 if first is second else float("inf")
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return float("inf")
        return float((first - second).detach().abs().max()) if first.numel() else 0.0
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second):
        return max((difference(one, two) for one, two in zip(first, second, strict=True)), default=0.0)
    return float("inf")


def output_differences() -> dict[str, float]:
    """Case -> largest difference between stock outputs and ours, for both families and both networks."""
    found: dict[str, float] = {}
    for family in FAMILIES:
        for network, changes in NETWORKS.items():
            for cases in (_model_cases, _classifier_cases):
                for case, pair in cases(family, changes):
                    found[f"{family} {network} {case}"] = difference(*pair)
        for case, pair in _variant_cases(family):
            found[f"{family} {case}"] = difference(*pair)
        for network, changes in NETWORKS.items():
            for case, pair in _backbone_cases(family, changes):
                found[f"{family} {network} backbone {case}"] = difference(*pair)
    return found


def config_files_agree(folder: Path) -> dict[str, bool]:
    """Case -> whether both sides write the same bytes, and read what the other wrote to the same settings."""
    found = {}
    for family in FAMILIES:
        ours, theirs = (getattr(side, family + "Config") for side in (hf, transformers))
        for case, changes in CONFIGS.items():
            first, second = folder / "ours", folder / "theirs"
            # A type is an attribute in version 4 and an argument in version 5.
            ours(**changes).save_pretrained(first)
            theirs(**changes).save_pretrained(second)
            same_bytes = filecmp.cmp(first / "config.json", second / "config.json", shallow=False)
            read, read_back = ours.from_pretrained(second), theirs.from_pretrained(first)
            same_settings = read.to_dict() == ours(**changes).to_dict()
            same_text = read_back.to_json_string() == read.to_json_string()
            found[f"{family} {case}"] = same_bytes and same_settings and same_text
    return found


def folders_are_exchanged(folder: Path) -> dict[str, str]:
    """Case -> what goes wrong when both sides read what the other saved; empty text where nothing does."""
    found = {}
    for family in FAMILIES:
        for network, changes in NETWORKS.items():
            for kind in CLASSES:
                for way in _ways_to_save():
                    case = f"{family}{kind} {network} {way}"
                    found[case] = _exchange(folder / case, family, kind, changes, way)
    return found


def write_stock_folders(folder: Path) -> list[str]:
    """Saves stock models in all the ways this version has, with their outputs; the names of the folders."""
    names = []
    for family in FAMILIES:
        for network, changes in NETWORKS.items():
            for kind in CLASSES:
                for way, options in _ways_to_save().items():
                    name = f"{family}{kind} {network} {way}"
                    theirs, _ = stock_and_ours(family, kind, **changes)
                    theirs.save_pretrained(folder / name, **options)
                    write_reference(theirs, folder / name)
                    names.append(name)
    return names


def write_reference(model: Any, folder: Path) -> None:
    """Puts what the model computes for `images(1)` beside its weights."""
    from safetensors.torch import save_file

    with torch.inference_mode():
        outputs = _first_outputs(model(images(1)))
    save_file({str(index): output.clone() for index, output in enumerate(outputs)}, folder / REFERENCE)


def reading_differences(folder: Path, library: Any) -> dict[str, Any]:
    """For every saved model below `folder`: the classes of `library` read it; keys that do not fit, and differences."""
    found: dict[str, Any] = {}
    for saved in sorted(path.parent for path in folder.glob("*/config.json")):
        name = json.loads((saved / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        model, info = getattr(library, name).from_pretrained(saved, output_loading_info=True)
        expected = load_file(saved / REFERENCE)
        with torch.inference_mode():
            outputs = _first_outputs(model.eval()(images(1)))
        found[saved.name] = {
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "difference": difference(outputs, [expected[str(index)] for index in range(len(expected))]),
        }
    return found


Cases = Iterator[tuple[str, tuple[Any, Any]]]


def _model_cases(family: str, changes: dict[str, Any]) -> Cases:
    theirs, ours = stock_and_ours(family, "Model", **changes)
    with torch.no_grad():
        for size in SIZES:
            x = images(2, *size)
            yield f"outputs at {size}", _both(theirs, ours, x, output_hidden_states=True)
        yield "tuple", (theirs(images(), return_dict=False), ours(images(), return_dict=False))
        x = images(2, 32, 32)
        mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
        yield "masked patches", _both(theirs, ours, x, bool_masked_pos=mask)
        known = inspect.signature(theirs.forward).parameters
        if "attention_mask" in known:
            n_tokens = 17 + (3 if family == "Dinov2WithRegisters" else 0)
            attends = torch.ones(2, n_tokens, dtype=torch.long)
            attends[1, 9:] = 0
            yield "attention mask", _both(theirs, ours, x, attention_mask=attends)
            yield "some states", _both(theirs, ours, x, output_hidden_states=[0, -1])
        theirs.set_attn_implementation("eager")
        for size in SIZES[:2]:
            x = images(2, *size)
            told = {"output_attentions": True, "output_hidden_states": True}
            yield f"attentions at {size}", _both(theirs, ours, x, **told)
        if "head_mask" in known:
            heads = torch.tensor([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0]])
            yield "head mask a layer", _both(theirs, ours, x, head_mask=heads, output_attentions=True)
            yield "head mask", _both(theirs, ours, x, head_mask=heads[0])
    yield "gradient", tuple(_pixel_gradient(model) for model in (theirs, ours))


def _classifier_cases(family: str, changes: dict[str, Any]) -> Cases:
    x = images(4)
    for n_labels, problem, labels in (
        (5, "single_label_classification", torch.tensor([0, 4, 2, 1])),
        (5, "single_label_classification", torch.tensor([[0], [4], [-100], [1]])),
        (1, "regression", torch.tensor([0.5, -1.0, 2.0, 0.0])),
        (3, "regression", torch.linspace(-1, 1, 12).view(4, 3)),
        (5, "multi_label_classification", (torch.arange(20).view(4, 5) % 3 == 0).float()),
    ):
        told = {"problem_type": problem} if n_labels == 3 else {}
        theirs, ours = stock_and_ours(family, "ForImageClassification", **changes, num_labels=n_labels, **told)
        with torch.no_grad():
            outputs = [model(x, labels=labels, output_hidden_states=True) for model in (theirs, ours)]
        yield f"{problem} {n_labels} {tuple(labels.shape)}", tuple(output.to_tuple() for output in outputs)
    with torch.no_grad():
        yield "logits", (theirs(x, return_dict=False), ours(x, return_dict=False))
        told = {"labels": labels.long(), "num_items_in_batch": 3}
        for model in (theirs, ours):
            model.config.problem_type = "single_label_classification"
        told["labels"] = torch.tensor([0, 4, 2, 1])
        yield "loss over the items of several batches", (theirs(x, **told).loss, ours(x, **told).loss)


def _variant_cases(family: str) -> Cases:
    for variant, changes in VARIANTS.items():
        theirs, ours = stock_and_ours(family, "ForImageClassification", **changes)
        x = images(channels=ours.config.num_channels)
        with torch.no_grad():
            yield variant, _both(theirs, ours, x, output_hidden_states=True)
    if family == "Dinov2":
        theirs, ours = stock_and_ours(family, "Model", use_mask_token=False)
        with torch.no_grad():
            yield "no mask token", _both(theirs, ours, images())


def _backbone_cases(family: str, changes: dict[str, Any]) -> Cases:
    for case, options in BACKBONES.items():
        theirs, ours = stock_and_ours(family, "Backbone", **changes, **options)
        with torch.no_grad():
            for size in (SIZES[0], SIZES[1], SIZES[4]):
                yield f"{case} {size}", _both(theirs, ours, images(2, *size))
            yield f"{case} and states", _both(theirs, ours, images(), output_hidden_states=True)
            theirs.set_attn_implementation("eager")
            yield f"{case} and attentions", _both(theirs, ours, images(), output_attentions=True)
        same = all(getattr(theirs, name) == getattr(ours, name) for name in _BACKBONE_ATTRIBUTES)
        yield f"{case} attributes", (None, None if same else 1)


_BACKBONE_ATTRIBUTES = (
    "stage_names", "num_features", "out_features", "out_indices", "out_feature_channels", "channels", "backbone_type",
)  # fmt: skip


def _both(theirs: Any, ours: Any, x: Tensor, **told: Any) -> tuple[Any, Any]:
    outputs = [model(x, **told) for model in (theirs, ours)]
    assert [*outputs[0]] == [*outputs[1]], f"fields {[*outputs[0]]} and {[*outputs[1]]}"
    return tuple(tuple(output.values()) for output in outputs)  # type: ignore[return-value]


def _pixel_gradient(model: Any) -> Tensor:
    x = images(2, 32, 32).requires_grad_()
    model(x).last_hidden_state.square().sum().backward()
    assert x.grad is not None
    return x.grad


def _ways_to_save() -> dict[str, dict[str, Any]]:
    ways: dict[str, dict[str, Any]] = {"whole": {}, "in shards": {"max_shard_size": "20KB"}}
    if transformers.__version__.startswith("4."):
        ways["as .bin"] = {"safe_serialization": False}
    if "save_original_format" in inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters:
        ways["by names in memory"] = {"save_original_format": False}
    return ways


def _exchange(folder: Path, family: str, kind: str, changes: dict[str, Any], way: str) -> str:
    options = _ways_to_save()[way]
    theirs, _ = stock_and_ours(family, kind, **changes)
    theirs.save_pretrained(folder / "theirs", **options)
    ours, info = getattr(hf, family + kind).from_pretrained(folder / "theirs", output_loading_info=True)
    ours.save_pretrained(folder / "ours", **options)
    back, info_back = getattr(transformers, family + kind).from_pretrained(folder / "ours", output_loading_info=True)
    for side, told in (("ours", info), ("theirs", info_back)):
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if told[what]:
                return f"{side}: {what} {sorted(told[what])[:4]}"
    x = images(1)
    with torch.inference_mode():
        expected, *outputs = (_first_outputs(model.eval()(x)) for model in (theirs, ours, back))
    if max(difference(expected, output) for output in outputs) > 1e-5:
        return "other outputs"
    written = {path.name for path in (folder / "ours").iterdir()}
    expected_files = {path.name for path in (folder / "theirs").iterdir()}
    if way == "whole":
        if written != expected_files:
            return f"other files: {written ^ expected_files}"
        for name in written:
            if not filecmp.cmp(folder / "ours" / name, folder / "theirs" / name, shallow=False):
                return f"{name} differs"
    return ""


def _first_outputs(output: Any) -> Sequence[Tensor]:
    first = next(iter(output.values()))
    return list(first) if isinstance(first, (tuple, list)) else [first]
