"""Our models beside the stock ones: the newest version here, older ones in processes of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

import dinov2.hf as hf
from tests.hf.model_cases import (
    CLASSES,
    FAMILIES,
    NETWORKS,
    config_files_agree,
    difference,
    folders_are_exchanged,
    images,
    our_model,
    output_differences,
    reading_differences,
    stock_and_ours,
    write_reference,
)
from tests.hf.stock_versions import OLDER_VERSIONS, run_under

REPOSITORY = Path(__file__).resolve().parents[2]

# Files of tests that ask nothing of a certain version.
PROMISES = ("defects", "defects_arguments", "defects_labels", "defects_recording", "configuration", "checkpoints")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_outputs_equal_those_of_the_installed_version() -> None:
    found = output_differences()
    assert len(found) > 200
    assert {case: value for case, value in found.items() if not value <= 1e-5} == {}


def test_config_files_are_the_same_bytes_as_those_of_the_installed_version(tmp_path: Path) -> None:
    found = config_files_agree(tmp_path)
    assert len(found) == 26
    assert [case for case, agrees in found.items() if not agrees] == []


def test_what_either_side_saves_the_other_reads_without_a_missing_key(tmp_path: Path) -> None:
    found = folders_are_exchanged(tmp_path)
    assert len(found) >= 2 * 2 * 3 * 3
    assert {case: fault for case, fault in found.items() if fault} == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_is_as_near_to_float32_as_the_stock_class(family: str, network: str) -> None:
    theirs, ours = stock_and_ours(family, "Model", **NETWORKS[network])
    x = images(4)
    with torch.inference_mode():
        exact = ours(x).last_hidden_state
        outputs = [model.bfloat16()(x).last_hidden_state for model in (theirs, ours)]
    errors = [float((output.float() - exact).abs().mean()) for output in outputs]
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    assert 0 < errors[1] <= 1.1 * errors[0]
    assert difference(*outputs) < 0.1


@pytest.fixture(scope="module", params=OLDER_VERSIONS)
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What an older version finds beside ours and in folders written here, and the folder with what it wrote."""
    folder = tmp_path_factory.mktemp("older")
    for family in FAMILIES:
        for network, changes in NETWORKS.items():
            for kind in CLASSES:
                model, name = our_model(family, kind, **changes), f"{family}{kind} {network}"
                model.save_pretrained(folder / "new" / name)
                write_reference(model, folder / "new" / name)
    script = """
    from tests.hf import model_cases as cases
    here = pathlib.Path(".").resolve()
    result = {
        "outputs": cases.output_differences(),
        "configs": cases.config_files_agree(here),
        "exchanged": cases.folders_are_exchanged(here / "exchanged"),
        "written": cases.write_stock_folders(here / "old"),
        "read": cases.reading_differences(here / "new", transformers),
    }
    """
    return run_under(request.param, script, folder), folder


@pytest.mark.slow
def test_older_versions_agree_as_the_newest_does(older: tuple[dict[str, Any], Path]) -> None:
    found, _ = older
    assert len(found["outputs"]) > 200
    assert {case: value for case, value in found["outputs"].items() if not value <= 1e-5} == {}
    assert len(found["configs"]) == 26
    assert [case for case, agrees in found["configs"].items() if not agrees] == []
    assert len(found["exchanged"]) >= 24
    assert {case: fault for case, fault in found["exchanged"].items() if fault} == {}


@pytest.mark.slow
def test_folders_travel_between_versions_in_both_directions(older: tuple[dict[str, Any], Path]) -> None:
    found, folder = older
    read_here = reading_differences(folder / "old", hf)
    assert sorted(read_here) == sorted(found["written"])
    assert len(found["read"]) == 12
    for read in (read_here, found["read"]):
        assert {name: told for name, told in read.items() if told["missing"] or told["unexpected"]} == {}
        assert {name: told for name, told in read.items() if not told["difference"] <= 1e-5} == {}


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER_VERSIONS)
def test_all_that_is_promised_with_the_newest_version_holds_with_older_ones(version: str, tmp_path: Path) -> None:
    script = f"""
    import os, pytest
    here = os.getcwd()
    os.chdir({str(REPOSITORY)!r})
    # Plugins of packages that transformers has imported by now would come too late, which is a warning.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    files = [f"tests/hf/test_{{name}}.py" for name in {PROMISES!r}]
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", here + "/pytest", "-m", "not slow"]
    assert pytest.main([*options, *files]) == 0
    os.chdir(here)
    result = transformers.__version__
    """
    assert run_under(version, script, tmp_path) == version
