"""What the name of a model stands for; nothing here asks the network."""

import json
import sys
from pathlib import Path

import pytest
import torch

import dinov2.checkpoints.locate
from dinov2.checkpoints.locate import locate_checkpoint
from dinov2.errors import MissingDependency, UnknownRelease, WeightsError
from dinov2.models.releases import release


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that were asked for; each becomes an empty file."""
    urls: list[str] = []

    def download(url, **options):
        urls.append(url)
        path = tmp_path / url.rpartition("/")[2]
        path.touch()
        return path

    monkeypatch.setattr(dinov2.checkpoints.locate, "download", download)
    monkeypatch.chdir(tmp_path)
    return urls


def test_a_release_is_fetched_and_brings_its_architecture(fetched):
    found = locate_checkpoint("dinov2_vits14_reg")
    assert fetched == [release("dinov2_vits14_reg").url]
    assert (found.name, found.path.name, found.head) == ("dinov2_vits14_reg", "dinov2_vits14_reg4_pretrain.pth", None)
    assert found.config.num_register_tokens == 4 and found.config.img_size == (518, 518)


@pytest.mark.parametrize("layers, file", [(4, "dinov2_vitb14_linear4_head.pth"), (1, "dinov2_vitb14_linear_head.pth")])
def test_a_classifier_is_a_backbone_and_a_head(fetched, layers, file):
    found = locate_checkpoint("dinov2_vitb14_lc", layers=layers)
    assert found.path.name == "dinov2_vitb14_pretrain.pth" and found.head.name == file
    assert len(fetched) == 2


def test_a_url_is_fetched(fetched):
    assert locate_checkpoint("https://example.org/weights/mine.pth").path.name == "mine.pth"
    assert fetched == ["https://example.org/weights/mine.pth"]


def test_an_existing_path_wins_over_every_name(fetched, tmp_path):
    (tmp_path / "dinov2_vits14").write_bytes(b"x")
    assert locate_checkpoint("dinov2_vits14").path == Path("dinov2_vits14")
    assert fetched == []


def test_a_hugging_face_folder_is_one_and_a_run_is_asked_for_its_teacher(tmp_path, fetched):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    assert locate_checkpoint(folder).path == folder
    teacher = tmp_path / "run" / "eval" / "training_9" / "teacher_checkpoint.pth"
    teacher.parent.mkdir(parents=True)
    torch.save({}, teacher)
    found = locate_checkpoint(tmp_path / "run")
    assert (found.path, found.name) == (teacher, "run/training_9")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("", "no model was named"),
        ("nowhere.pth", "there is no weight file nowhere.pth; check the path"),
        ("./nowhere", "there is no weight file ./nowhere"),
        ("empty", "holds no exported teacher"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, fetched, source, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=reason):
        locate_checkpoint(source)
    assert fetched == []


@pytest.mark.parametrize(
    "typo, meant", [("dinov2_vits14_regs", "dinov2_vits14_reg"), ("dinov2_vitb_14", "dinov2_vitb14")]
)
def test_a_misspelt_release_is_answered_with_the_nearest_name(fetched, typo, meant):
    with pytest.raises(UnknownRelease, match=f"'{meant}'"):
        locate_checkpoint(typo)
    assert fetched == []


def test_a_depth_head_is_no_model_to_load(fetched):
    with pytest.raises(WeightsError, match="dinov2_vits14_nyu_linear_head is a depth head"):
        locate_checkpoint("dinov2_vits14_nyu_linear_head")


def test_a_hugging_face_id_needs_its_library(fetched, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match="huggingface_hub"):
        locate_checkpoint("somebody/some-model")


def test_without_network_a_mistyped_folder_is_still_explained(fetched, monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(identifier, **options):
        raise LocalEntryNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightsError, match="there is no file or folder runs/mein, and Hugging Face cannot be asked"):
        locate_checkpoint("runs/mein")
