"""From files and overrides to values: what wins over what, which spellings are read, and what refusals say."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from dinov2.configs import Config, apply_overrides, differing_keys, from_dict, load_config, to_dict, to_yaml
from dinov2.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "configs.json"


def written(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(name_or_path: str | None, *overrides: str, preset: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name_or_path, overrides, preset=preset)
    return str(caught.value)


def test_no_file_and_no_override_give_the_default() -> None:
    assert load_config() == load_config("") == load_config(None, []) == Config()


def test_overrides_win_over_the_file_which_wins_over_the_preset_which_wins_over_the_default(tmp_path: Path) -> None:
    path = written(tmp_path, "optim:\n  epochs: 40\n  base_lr: 0.5\n")
    cfg = load_config(path, ["optim.base_lr=0.25", "optim.base_lr=0.125"], preset="toy")
    assert cfg.student.arch == "vit_nano"  # preset
    assert cfg.optim.epochs == 40  # file over preset
    assert cfg.optim.base_lr == 0.125  # last override over file
    assert cfg.optim.adamw_beta2 == 0.999  # default


def test_lists_are_replaced_whole(tmp_path: Path) -> None:
    path = written(tmp_path, "crops:\n  mean: [0.1, 0.2, 0.3]\n")
    assert load_config(path, ["crops.mean=[0.5]"]).crops.mean == (0.5,)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.min_lr=1e-6", 1e-6),  # text to a YAML 1.1 parser
        ("optim.min_lr='1e-6'", 1e-6),
        ("optim.min_lr=0", 0.0),
        ("optim.epochs=1e2", 100),
        ("optim.clip_grad=null", 0.0),
        ("student.depth=null", None),
        ("student.depth=4", 4),
        ("ibot.separate_head=yes", True),
        ("ibot.separate_head=1", True),
        ("crops.local_crops_scale=[0.1,1]", (0.1, 1.0)),
        ("MODEL.WEIGHTS=", ""),
        ("MODEL.WEIGHTS=null", ""),
        ("train.dataset_path=ImageNet:split=TRAIN:root=/a:extra=/b", "ImageNet:split=TRAIN:root=/a:extra=/b"),
        ("train.dataset_path=/pictures: mine #1", "/pictures: mine #1"),
        ("train.dataset_path=2024", "2024"),
        ("train.dataset_path=[a", "[a"),
        (r"train.dataset_path=C:\pictures\new", r"C:\pictures\new"),
        ("train.dataset_path='in quotes'", "in quotes"),
        ("train.device=cuda:1", "cuda:1"),
    ],
)
def test_an_override_is_read_as_what_its_key_holds(override: str, value: object) -> None:
    cfg = load_config(None, [override])
    section, name = override.partition("=")[0].split(".")
    found = getattr(getattr(cfg, section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size_per_gpu=many", "train.batch_size_per_gpu is 'many'; write a whole number"),
        ("train.batch_size_per_gpu=2.5", "train.batch_size_per_gpu is 2.5; write a whole number"),
        ("train.batch_size_per_gpu=true", "train.batch_size_per_gpu is true; write a whole number"),
        ("train.batch_size_per_gpu=null", "train.batch_size_per_gpu is null; write a whole number"),
        ("optim.base_lr=fast", "optim.base_lr is 'fast'; write a number"),
        ("optim.base_lr=.inf", "optim.base_lr is inf; write a number"),
        ("optim.epochs=[1]", "optim.epochs is [1]; write a whole number"),
        ("ibot.separate_head=maybe", "ibot.separate_head is 'maybe'; write true or false"),
        ("ibot.separate_head=2", "ibot.separate_head is 2; write true or false"),
        ("student.depth=deep", "student.depth is 'deep'; write a whole number or null"),
        ("crops.global_crops_scale=0.3", "crops.global_crops_scale is 0.3; write a list of 2 numbers"),
        ("crops.global_crops_scale=[0.3]", "crops.global_crops_scale is [0.3]; write a list of 2 numbers"),
        ("crops.mean=[]", "crops.mean is []; write a list of numbers"),
        ("crops.mean=[a]", "crops.mean is ['a']; write a list of numbers"),
    ],
)
def test_a_wrong_type_is_one_sentence_about_the_key(override: str, message: str) -> None:
    assert refusal(None, override) == message


def test_a_wrong_type_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "train:\n  dataset_path: 7\n")
    assert refusal(path) == f"train.dataset_path is 7 in {path}; write text"
    assert load_config(path, ["train.dataset_path=7"]).train.dataset_path == "7"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.batchsize=3", "train.batch_size_per_gpu"),
        ("optim.batch_size_per_gpu=3", "train.batch_size_per_gpu"),
        ("epochs=3", "optim.epochs"),
        ("optim.lr_base=3", "optim.base_lr"),
        ("MODEL.weights=x", "MODEL.WEIGHTS"),
        ("model.WEIGHTS=x", "MODEL.WEIGHTS"),
        ("evalution.knn_k=3", "evaluation.knn_k"),
        ("train.official_epoch_length=3", "train.OFFICIAL_EPOCH_LENGTH"),
    ],
)
def test_an_unknown_key_is_refused_with_its_nearest_neighbour(override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    assert refusal(None, override) == f"there is no key {key}; the nearest is {nearest}"


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "optim:\n  epoch: 3\n")
    assert refusal(path) == f"there is no key optim.epoch in {path}; the nearest is optim.epochs"
    assert "the sections are MODEL, compute_precision" in refusal(written(tmp_path, "zzz: {q: 1}\n"))


def test_a_dotted_key_in_a_file_says_how_to_write_it(tmp_path: Path) -> None:
    assert "write epochs: below optim:" in refusal(written(tmp_path, "optim.epochs: 3\n"))


@pytest.mark.parametrize("override", ["--output-dir", "-x", "--config-file=a.yaml"])
def test_an_option_among_the_overrides_is_refused(override: str) -> None:
    assert "options go before overrides" in refusal(None, "optim.epochs=20", override, "out")


@pytest.mark.parametrize("override", ["optim.epochs", "=3", "optim..epochs=3", ".epochs=3", ""])
def test_what_is_no_override_is_refused(override: str) -> None:
    assert "write key=value" in refusal(None, override)


@pytest.mark.parametrize("override", ["crops.mean.0=0.5", "crops.mean[0]=0.5"])
def test_a_list_is_not_changed_entry_by_entry(override: str) -> None:
    assert "write it whole, crops.mean=<value>" in refusal(None, override)
    assert "there is no key crops.mean" in refusal(None, override)


def test_a_section_is_no_value_but_may_be_empty_or_a_table(tmp_path: Path) -> None:
    assert "crops is 3, but it is a section" in refusal(None, "crops=3")
    assert "optim is empty, but it is a section" in refusal(None, "optim=")
    assert load_config(written(tmp_path, "crops:\n#  mean: [0.5]\noptim:\n  epochs: 20\n")).optim.epochs == 20
    assert load_config(None, ["optim={epochs: 20, min_lr: 0}"]).optim.epochs == 20
    assert "optim.epochs is one value" in refusal(None, "optim.epochs={}")


def test_values_may_refer_to_other_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "optim:\n  epochs: 20\n  warmup_epochs: ${optim.epochs}\n")
    assert load_config(path, ["optim.epochs=30"]).optim.warmup_epochs == 30
    assert "cannot be resolved" in refusal(None, "optim.epochs=${optim.nothing}")
    assert "cannot be resolved" in refusal(None, "train.dataset_path=${")


@pytest.mark.parametrize(
    "text", ["a: [1,\n", "- 1\n- 2\n", "optim: {epochs: 3\n", "just words\n", "optim:\n\tepochs: 3\n"]
)
def test_a_file_that_is_no_table_of_keys_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert path in refusal(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x04\xff\xfe")
    assert "cannot be read as text" in refusal(str(path))


def test_an_unreadable_value_is_refused_with_its_override() -> None:
    assert refusal(None, "optim.epochs=[1,").startswith("the value in optim.epochs=[1, is not readable YAML")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\ufeffoptim:\n"])
def test_a_file_may_be_empty(tmp_path: Path, text: str) -> None:
    assert load_config(written(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    "text",
    [
        "${a}",
        r"\${a}",
        r"\\${a}",
        "a${b}c${",
        r"C:\x\y",
        "yes",
        "010",
        "1e-3",
        "null",
        "~",
        "",
        "a: b #c",
        "'q'",
        "ü",
        "\udce9${a}",
        r"a\udce9",
    ],
)
def test_any_text_survives_yaml_dictionary_and_overrides(tmp_path: Path, text: str) -> None:
    values: dict[str, Any] = {"train": {"dataset_path": text}}
    cfg = from_dict(values)
    assert cfg.train.dataset_path == text
    assert from_dict(to_dict(cfg)) == cfg
    assert load_config(written(tmp_path, to_yaml(cfg))) == cfg
    assert apply_overrides(cfg, ["optim.epochs=200"]).train.dataset_path == text


def test_a_changed_config_survives_yaml_bit_for_bit(tmp_path: Path) -> None:
    cfg = load_config("train/vitg14", ["optim.base_lr=0.1234567890123456789", "student.depth=4", "optim.lr=3e-4"])
    assert load_config(written(tmp_path, to_yaml(cfg))) == cfg


def test_the_saved_config_of_a_release_run_loads(tmp_path: Path) -> None:
    merged = copy.deepcopy(json.loads(GOLDEN.read_text())["vitl14"])
    merged["optim"]["lr"] = 3.4641016151377546e-4  # the release writes the scaled rate back
    merged["train"]["output_dir"] = "/somewhere/else"
    cfg = load_config(written(tmp_path, json.dumps(merged)))
    assert differing_keys(cfg, load_config("train/vitl14")) == ["train.output_dir", "optim.lr"]


def test_a_dictionary_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match=r"optim\.epoch in the given dictionary; the nearest is optim\.epochs"):
        from_dict({"optim": {"epoch": 3}})
    assert from_dict({}) == Config()


def test_differing_keys_are_named_in_the_order_of_the_tree() -> None:
    other = load_config(None, ["crops.mean=[0.5]", "MODEL.WEIGHTS=x", "optim.base_lr=0.004"])
    assert differing_keys(Config(), other) == ["MODEL.WEIGHTS", "crops.mean"]
    assert differing_keys(other, other) == []


def test_overrides_leave_the_given_config_as_it_is() -> None:
    cfg = load_config("train/vitl14")
    assert apply_overrides(cfg, ["optim.epochs=200"]).optim.epochs == 200
    assert cfg.optim.epochs == 500


def test_a_config_travels_to_other_processes() -> None:
    cfg = load_config("train/vitl14")
    assert pickle.loads(pickle.dumps(cfg)) == cfg
