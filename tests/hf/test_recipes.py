"""The recipes of the documentation, on tiny models: export by named sizes, adapters, images of several sizes.

The pages run their own code, and test_defects_recording.py compiles and exports every class.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import dinov2.hf as hf
from tests.hf.common_cases import EVERY_FAMILY, leaves
from tests.hf.model_cases import difference, images, our_model

SIZES = ((32, 32), (40, 56), (16, 64))


def outputs(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return leaves(model(x))


@pytest.mark.slow
@EVERY_FAMILY
def test_an_exported_program_takes_any_batch_and_size(family: str) -> None:
    model = our_model(family, "Backbone")
    batch, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "rows", "columns"))
    shapes = ({0: batch, 2: 8 * rows, 3: 8 * columns},)
    program = torch.export.export(model, (images(2, 40, 56),), dynamic_shapes=shapes)
    for index, size in enumerate(SIZES):
        x = images(2 + index, *size)
        assert difference(outputs(program.module(), x), outputs(model, x)) < 1e-5


@EVERY_FAMILY
def test_adapters_are_trained_saved_loaded_and_merged(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    our_model(family, "ForImageClassification").save_pretrained(tmp_path / "base")
    load = hf.AutoModelForImageClassification.from_pretrained
    base = load(tmp_path / "base")
    before = outputs(base, images())
    settings = peft.LoraConfig(
        r=4, target_modules=["query", "value", "fc1", "fc2"], modules_to_save=["classifier"], lora_alpha=8
    )
    adapted = peft.get_peft_model(base, settings).train()
    trainable, everything = adapted.get_nb_trainable_parameters()
    assert 0 < trainable < 0.25 * everything
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(pixel_values=images(), labels=torch.tensor([1, 3])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    trained = outputs(adapted, images())
    assert difference(trained, before) > 1e-3
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert difference(outputs(again, images()), trained) < 1e-5
    assert difference(outputs(again.merge_and_unload(), images()), trained) < 1e-4


@EVERY_FAMILY
def test_images_of_different_sizes_go_through_in_one_call(family: str) -> None:
    model = our_model(family, "Model")
    x = images(2)
    smaller = x[0, :, :, :24]
    together = model([x, smaller])
    with torch.no_grad():
        assert difference(together[0].last_hidden_state, model(x).last_hidden_state) < 1e-5
        assert difference(together[1].last_hidden_state, model(smaller[None]).last_hidden_state) < 1e-5
