"""The YAML files in the package: the release's values, names that find them, and presets that say what they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from dinov2.configs import Config, describe, list_presets, load_and_merge_config, load_config, packaged_names, to_dict
from dinov2.configs.packaged import read_packaged
from dinov2.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "configs.json"
FILES = {
    "ssl_default": "ssl_default_config",
    "vitl16_short": "train/vitl16_short",
    "vitl14": "train/vitl14",
    "vitg14": "train/vitg14",
}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values.update(flat(value, f"{prefix}{key}."))
        else:
            values[f"{prefix}{key}"] = value
    return values


@pytest.mark.parametrize("name", FILES)
def test_each_release_key_has_the_value_that_the_release_merges(name: str) -> None:
    expected = flat(json.loads(GOLDEN.read_text())[name])
    found = flat(to_dict(load_config(FILES[name])))
    assert {key: found[key] for key in expected} == expected
    assert set(expected) == {row.key for row in describe() if row.is_release_key}


@pytest.mark.parametrize("name", FILES)
def test_the_new_keys_keep_their_default_in_the_release_files(name: str) -> None:
    found, default = flat(to_dict(load_config(FILES[name]))), flat(to_dict(Config()))
    new = [row.key for row in describe() if not row.is_release_key]
    assert [key for key in new if found[key] != default[key]] == []


def test_the_default_file_and_the_schema_say_the_same() -> None:
    assert load_config("ssl_default_config") == Config()
    release_values = flat(read_packaged("ssl_default_config"))
    assert release_values == {key: flat(to_dict(Config()))[key] for key in release_values}


@pytest.mark.parametrize("registers", ["", "_reg4"])
@pytest.mark.parametrize(
    ("letter", "arch"), [("s", "vit_small"), ("b", "vit_base"), ("l", "vit_large"), ("g", "vit_giant2")]
)
def test_the_evaluation_files_describe_the_released_shapes(letter: str, arch: str, registers: str) -> None:
    expected: dict[str, Any] = {
        "student.arch": arch,
        "student.patch_size": 14,
        "crops.global_crops_size": 518,
        "crops.local_crops_size": 98,
    }
    if letter == "g":
        expected["student.ffn_layer"] = "swiglufused"
    if registers:
        expected |= {
            "student.num_register_tokens": 4,
            "student.interpolate_antialias": True,
            "student.interpolate_offset": 0.0,
        }
    name = f"vit{letter}14{registers}_pretrain"
    assert flat(to_dict(load_config(name))) == flat(to_dict(Config())) | expected


@pytest.mark.parametrize("name", ["train/vitl14", "vitl14", "vitl14.yaml", "train/vitl14.yaml", "vitl14.yml"])
def test_a_packaged_config_is_found_by_any_of_its_names(name: str) -> None:
    assert load_config(name) == load_and_merge_config("train/vitl14")


def test_the_path_in_the_release_s_commands_works_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("dinov2/configs/eval/vitg14_pretrain.yaml") == load_config("eval/vitg14_pretrain")
    assert load_config("/clone/dinov2/configs/train/vitl14.yaml") == load_config("train/vitl14")
    with pytest.raises(ConfigError):
        load_config("/clone/my/configs/train/vitl14.yaml")  # somebody's own file, mistyped


def test_an_existing_file_wins_over_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vitl14.yaml").write_text("optim:\n  epochs: 33\n")
    assert load_config("vitl14.yaml").optim.epochs == 33
    assert load_config(Path("vitl14.yaml")).optim.epochs == 33
    assert load_config("vitl14").optim.epochs == 500


def test_no_two_packaged_files_share_a_short_name() -> None:
    short = [name.rpartition("/")[2] for name in packaged_names()]
    assert len(short) == len(set(short))
    assert not [name for name in short if f"{name}.yaml" in short]


def test_a_missing_file_lists_what_is_packaged_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("vitl15.yaml")
    assert "'vitl15.yaml'; the nearest packaged name is vitl14" in str(caught.value)
    assert all(name in str(caught.value) for name in packaged_names())


def test_a_run_folder_is_answered_with_its_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path))
    assert str(tmp_path / "config.yaml") in str(caught.value)


@pytest.mark.parametrize("name", packaged_names())
def test_every_packaged_file_loads_and_says_what_it_is(name: str) -> None:
    load_config(name)
    first = Path(__file__).parents[2].joinpath("dinov2", "configs", f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")


@pytest.mark.parametrize("name", [name for name in packaged_names() if name.startswith(("train/", "presets/"))])
def test_every_recipe_states_command_cost_and_expectation(name: str) -> None:
    text = Path(__file__).parents[2].joinpath("dinov2", "configs", f"{name}.yaml").read_text()
    for word in ("# Command:  dinov2 train ", "# Cost:     ", "# Expect:   "):
        assert word in text


def test_presets_are_listed_with_their_first_words() -> None:
    presets = {preset.name: preset.summary for preset in list_presets()}
    assert {"toy", "cifar10"} <= set(presets)
    assert presets["toy"].startswith("A ")
    assert "Command" not in presets["toy"]


def test_a_preset_is_found_by_name_and_refused_with_the_list() -> None:
    assert load_config(preset="toy") == load_config(preset="presets/toy.yaml") == load_config("presets/toy")
    with pytest.raises(ConfigError, match="no preset is called 'vitl14'; write cifar10 or toy"):
        load_config(preset="vitl14")
