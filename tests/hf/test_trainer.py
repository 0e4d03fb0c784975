"""Fine-tuning with `Trainer`: it finds the labels, learns, saves and resumes, and scales accumulated losses right."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dinov2.hf as hf
from tests.hf.common_cases import EVERY_FAMILY, LABELS
from tests.hf.model_cases import difference, our_model

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # new names in the newest version

N_IMAGES = 8


class Pictures(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Images of one colour a class, with labels of one kind."""

    def __init__(self, problem_type: str) -> None:
        generator = torch.Generator().manual_seed(1)
        classes = torch.arange(N_IMAGES) % len(LABELS)
        colours = torch.randn(len(LABELS), 3, 1, 1, generator=generator)
        self.pixel_values = colours[classes] + 0.1 * torch.randn(N_IMAGES, 3, 32, 32, generator=generator)
        self.labels: torch.Tensor = classes
        if problem_type == "regression":
            self.labels = torch.randn(N_IMAGES, len(LABELS), generator=generator)
        elif problem_type == "multi_label_classification":
            self.labels = (torch.rand(N_IMAGES, len(LABELS), generator=generator) < 0.4).float()

    def __len__(self) -> int:
        return N_IMAGES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def classifier(family: str, problem_type: str = "single_label_classification") -> Any:
    names = dict(enumerate(LABELS))
    return our_model(
        family,
        "ForImageClassification",
        id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type=problem_type,
    )


def trainer(model: Any, folder: Path, problem_type: str = "single_label_classification", **told: Any) -> Any:
    options = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **told,
    }
    data = Pictures(problem_type)
    arguments = transformers.TrainingArguments(str(folder), **options)
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


@EVERY_FAMILY
def test_trainer_learns_evaluates_and_keeps_the_names_of_the_classes(family: str, tmp_path: Path) -> None:
    run = trainer(classifier(family), tmp_path, max_steps=12)
    before = run.evaluate()
    assert run.label_names == ["labels"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before["eval_loss"]
    predicted = run.predict(run.eval_dataset)
    assert predicted.predictions.shape == (N_IMAGES, len(LABELS))
    assert predicted.label_ids.tolist() == run.eval_dataset.labels.tolist()
    run.save_model(tmp_path / "final")
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "final")
    assert tuple(loaded.config.id2label.values()) == LABELS
    with torch.no_grad():
        logits = loaded(run.eval_dataset.pixel_values).logits
    torch.testing.assert_close(logits, torch.from_numpy(predicted.predictions), atol=1e-4, rtol=1e-4)


@EVERY_FAMILY
def test_a_resumed_run_ends_where_an_unbroken_one_does(family: str, tmp_path: Path) -> None:
    whole = trainer(classifier(family), tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    again = trainer(classifier(family), tmp_path / "again", save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 6
    ends = [list(run.model.state_dict().values()) for run in (whole, again)]
    assert difference(*ends) < 1e-6


@EVERY_FAMILY
@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression", "multi_label_classification"])
def test_accumulated_batches_train_as_one_large_batch(family: str, problem_type: str, tmp_path: Path) -> None:
    ends, losses = [], []
    for size, accumulated in ((8, 1), (2, 4)):
        model = classifier(family, problem_type)
        run = trainer(
            model,
            tmp_path / str(size),
            problem_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
        )
        run.train()
        ends.append(list(model.state_dict().values()))
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert difference(*ends) < 1e-5
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@EVERY_FAMILY
def test_trainer_switches_gradient_checkpointing_on(family: str, tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        model = classifier(family)
        folder, plain = tmp_path / str(checkpointing), {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2}
        trainer(model, folder, gradient_checkpointing=checkpointing, **plain).train()
        ends.append(list(model.state_dict().values()))
    assert difference(*ends) < 1e-5


@EVERY_FAMILY
def test_adapters_train_in_trainer(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    run = trainer(peft.get_peft_model(classifier(family), settings), tmp_path, max_steps=12, learning_rate=1e-2)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    run.save_model(tmp_path / "adapter")
    assert "adapter_config.json" in os.listdir(tmp_path / "adapter")
