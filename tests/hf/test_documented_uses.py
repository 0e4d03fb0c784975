"""What the documents of transformers show users doing, item by item, for both families; offline with random weights.

`use n` counts the documented uses. Those that need released weights or an address stand on the documentation pages,
and run from there with `-m network`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dinov2.hf as hf
from tests.hf.common_cases import EVERY_CLASS, EVERY_FAMILY, LABELS, our_class, picture, saved_folder
from tests.hf.model_cases import difference, images, our_model, settings
from tests.test_docs import blocks

IMPLEMENTATIONS = ("eager", "sdpa")


def pixels(folder: Path) -> Tensor:
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    return processor(images=picture(), return_tensors="pt").pixel_values


# Use 1.
@EVERY_FAMILY
def test_a_pipeline_classifies_in_half_precision(family: str, tmp_path: Path) -> None:
    folder = saved_folder(tmp_path, family)
    classify = hf.pipeline("image-classification", model=str(folder), dtype=torch.float16)
    assert type(classify.model) is our_class(family, "ForImageClassification")
    assert classify.model.dtype == torch.float16
    answers = classify(picture())
    assert len(answers) == len(LABELS)
    assert {answer["label"] for answer in answers} == set(LABELS)
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-2)


# Use 2.
@EVERY_FAMILY
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_processor_and_classifier_name_the_class(family: str, implementation: str, tmp_path: Path) -> None:
    folder = saved_folder(tmp_path, family)
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    model = hf.AutoModelForImageClassification.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", attn_implementation=implementation
    )
    assert model.dtype == torch.float16
    inputs = processor(images=picture(), return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, len(LABELS))
    assert model.config.id2label[logits.argmax(-1).item()] in LABELS


# Use 3 stands in test_quantisation.py.


# Uses 4, 7 and 12.
@EVERY_FAMILY
def test_the_embedding_of_a_picture_has_a_grid_of_patches(family: str, tmp_path: Path) -> None:
    folder = saved_folder(tmp_path, family, "Model")
    model = hf.AutoModel.from_pretrained(folder)
    pixel_values = pixels(folder)
    assert pixel_values.shape == (1, 3, 224, 224)
    with torch.no_grad():
        outputs = model(pixel_values)
    tokens = outputs[0]
    n_registers = getattr(model.config, "num_register_tokens", 0)
    height, width = (side // model.config.patch_size for side in pixel_values.shape[-2:])
    assert list(tokens.shape) == [1, 1 + n_registers + 16 * 16, model.config.hidden_size]
    cls_token = tokens[:, 0]
    grid = tokens[:, 1 + n_registers :].unflatten(1, (height, width))
    assert grid.shape == (1, 16, 16, 32)
    assert torch.equal(cls_token, outputs.pooler_output)
    backbone = hf.AutoBackbone.from_pretrained(folder)
    with torch.no_grad():
        (feature_map,) = backbone(pixel_values).feature_maps
    assert torch.equal(grid.permute(0, 3, 1, 2), feature_map)


# Use 5 stands in test_defects_recording.py.


# Use 6.
@EVERY_CLASS
def test_a_model_keeps_the_config_that_it_was_built_from(family: str, kind: str) -> None:
    assert getattr(hf, family + "Config")().hidden_size == 768
    config = getattr(hf, family + "Config")(**settings(family))
    assert our_class(family, kind)(config).config is config


# Use 10.
@EVERY_FAMILY
@pytest.mark.parametrize("where", ["absolute", "relative", "one word"])
def test_a_backbone_loads_from_a_folder(
    family: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_folder(tmp_path / "mine", family, "Model", num_hidden_layers=4)
    monkeypatch.chdir(tmp_path)
    folder = {"absolute": str(tmp_path / "mine"), "relative": "./mine", "one word": "mine"}[where]
    backbone = hf.AutoBackbone.from_pretrained(folder, out_features=["stage1", "stage3", "stage4"])
    assert type(backbone) is our_class(family, "Backbone")
    with torch.no_grad():
        maps = backbone(pixels(tmp_path / "mine")).feature_maps
    assert [list(one.shape) for one in maps] == [[1, 32, 16, 16]] * 3


# Use 10 without a network stands in test_auto.py.


# Use 11: states and maps stand in test_common_outputs.py, plain tuples in test_defects.py.


# Use 11.
@EVERY_FAMILY
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_a_head_mask_switches_heads_off(family: str, shape: tuple[int, ...]) -> None:
    model = our_model(family, "Model")
    mask = torch.ones(shape)
    mask[..., 1] = 0
    output = model(images(), head_mask=mask, output_attentions=True)
    assert all(not weights[:, 1].any() and weights[:, 0].any() for weights in output.attentions)
    assert difference(output.last_hidden_state, model(images()).last_hidden_state) > 1e-3


# Use 11.
@EVERY_FAMILY
def test_masked_patches_are_not_seen(family: str) -> None:
    model = our_model(family, "Model")
    x = images(2, 32, 32)
    changed = x.clone()
    changed[:, :, :8, :8] = 100
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 0] = True
    outputs = [model(one, bool_masked_pos=mask).last_hidden_state for one in (x, changed)]
    assert difference(*outputs) == 0
    assert difference(model(x).last_hidden_state, outputs[0]) > 1e-3


# Use 11.
@EVERY_FAMILY
@pytest.mark.parametrize("num_labels", [1, 5])
def test_labels_give_a_loss_for_regression_and_classification(family: str, num_labels: int) -> None:
    model = our_model(family, "ForImageClassification", num_labels=num_labels)
    labels = torch.tensor([0.5, -1.0]) if num_labels == 1 else torch.tensor([4, 0])
    output = model(images(), labels=labels)
    if num_labels == 1:
        expected = (output.logits[:, 0] - labels).square().mean()
    else:
        expected = -output.logits.log_softmax(dim=1)[[0, 1], labels].mean()
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output[0], output.loss)


# Use 13 stands in test_trainer.py.


# Use 14.
@EVERY_FAMILY
def test_attention_maps_of_a_classifier_are_tokens_by_tokens(family: str) -> None:
    model = our_model(family, "ForImageClassification")
    n_tokens = 1 + getattr(model.config, "num_register_tokens", 0) + 35
    for weights in model(images(), output_attentions=True).attentions:
        assert weights.shape == (2, 4, n_tokens, n_tokens)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, n_tokens))


# Uses 1, 2, 4, 7, 8, 9 and 10 as they are written, with released weights.
@pytest.mark.network
@pytest.mark.parametrize("block", [block for block in blocks("py") if "huggingface" in block.where], ids=str)
def test_documented_uses_of_released_weights_run(block: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.where, "exec"), {"__name__": "docs"})


RELEASED_VALUES = {
    "facebook/dinov2-base": (
        [[-2.1747, -0.4729, 1.0936], [-3.2780, -0.8269, -0.9210], [-2.9129, 1.1284, -0.7306]],
        {"position_interpolation": "original"},  # the values are of a version that resized positions as in training
    ),
    "facebook/dinov2-with-registers-base": (
        [[-0.4638, -1.4563, -0.0289], [-1.4736, -0.8866, 0.3005], [0.0720, -0.2406, -1.5943]],
        {},
    ),
}


@pytest.mark.network
@pytest.mark.parametrize("name", RELEASED_VALUES)
def test_released_weights_give_the_published_values(name: str) -> None:
    import io
    import urllib.request

    from PIL import Image

    values, changes = RELEASED_VALUES[name]
    with urllib.request.urlopen("http://images.cocodataset.org/val2017/000000039769.jpg") as answer:
        cats = Image.open(io.BytesIO(answer.read()))
    processor = hf.AutoImageProcessor.from_pretrained(name, backend="pil")
    model = hf.AutoModel.from_pretrained(name, **changes)
    with torch.inference_mode():
        tokens = model(**processor(images=cats, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(tokens[0, :3, :3], torch.tensor(values), atol=1e-4, rtol=0)
