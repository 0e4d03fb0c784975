"""What the public release's documentation imports and names: it resolves, or says what to use instead.

Its commands are run in tests/run.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import dinov2
from dinov2._moved import GONE, LACKING, MOVED, REMOVED_IN, Instead, install, successor

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = [
    (module, name, new) for table in (MOVED, LACKING) for module, names in table.items() for name, new in names.items()
]
SUCCESSORS = [row for row in ROWS if isinstance(row[2], str)]
ADVICE = [new.advice for _, _, new in ROWS if isinstance(new, Instead)]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


# Configs.


def test_the_release_s_config_names_import_from_where_they_were() -> None:
    from dinov2.configs import dinov2_default_config, load_and_merge_config, load_config

    assert load_config("ssl_default_config") == dinov2_default_config
    assert load_and_merge_config("eval/vitl14_pretrain").crops.global_crops_size == 518


@pytest.mark.parametrize(
    "path",
    [
        "ssl_default_config.yaml",
        *(f"train/{name}.yaml" for name in ("vitl16_short", "vitl14", "vitg14")),
        *(f"eval/vit{size}14{reg}_pretrain.yaml" for size in "sblg" for reg in ("", "_reg4")),
    ],
)
def test_a_config_file_of_the_release_lies_where_its_commands_look(path: str) -> None:
    assert (REPOSITORY / "dinov2" / "configs" / path).is_file()


# The whole import surface of the release: tests/release_names.txt.


def names_of_the_release() -> dict[str, list[str]]:
    """Names by module, from the file of facts."""
    blocks = (REPOSITORY / "tests" / "release_names.txt").read_text().split("\n\n")[1:]
    return {module: names for module, *names in map(str.split, blocks)}


SURFACE = names_of_the_release()


@pytest.mark.parametrize("module", SURFACE)
def test_a_name_of_the_release_is_here_or_says_what_to_use(module: str, recwarn: pytest.WarningsRecorder) -> None:
    for name in SURFACE[module]:
        match successor(module, name):
            case None:
                exec(f"from {module} import {name}", {})
                assert not recwarn.list, name
            case Instead():
                with pytest.raises(ImportError, match=r"is not in this package: ..."):
                    exec(f"from {module} import {name}", {})
            case str(new):
                assert hasattr(importlib.import_module(new.partition(":")[0]), new.partition(":")[2]), name


def test_every_name_with_an_answer_is_one_of_the_release() -> None:
    ours = [(module, name) for table in (MOVED, LACKING) for module, names in table.items() for name in names]
    # The private ones are in use in notebooks.
    assert [f"{module}.{name}" for module, name in ours if name not in SURFACE.get(module, ()) and name[0] != "_"] == []


@pytest.mark.parametrize("name", ["dinov2_vits14_ld", "dinov2_vitg14_dd", "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l"])
def test_an_entry_of_the_release_s_hub_that_is_not_here_says_so(name: str) -> None:
    with pytest.raises(ImportError, match=r"is not in this package: .* not in this version"):
        exec(f"from hubconf import {name}", {})
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from hubconf import no_such_name", {})


def test_modules_are_attributes_after_an_import_of_the_whole_path() -> None:
    result = run_python("import dinov2.distributed as distributed; print(distributed.get_global_size())")
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")


def test_the_readme_s_snippet_writes_the_metadata_of_all_splits(tmp_path: Path) -> None:
    for name in (
        "train/n01440764/n01440764_18.JPEG",
        "val/n01440764/ILSVRC2012_val_00000293.JPEG",
        "test/ILSVRC2012_test_00000001.JPEG",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / name, format="JPEG")
    root = extra = str(tmp_path)

    from dinov2.data.datasets import ImageNet

    for split in ImageNet.Split:
        dataset = ImageNet(split=split, root=root, extra=extra)
        dataset.dump_extra()

    assert {path.name for path in tmp_path.glob("*.npy")} >= {f"entries-{split.name}.npy" for split in ImageNet.Split}
    assert len(ImageNet(split=ImageNet.Split["TRAIN"], root=root, extra=extra)) == 1


def test_a_configuration_builds_the_models_in_the_releases_order() -> None:
    from dinov2.configs import load_and_merge_config
    from dinov2.models import build_model_from_cfg

    cfg = load_and_merge_config("eval/vits14_pretrain")
    with torch.device("meta"):
        student, teacher, width = build_model_from_cfg(cfg)
        only_teacher, same_width = build_model_from_cfg(cfg, only_teacher=True)
    assert width == same_width == teacher.embed_dim == only_teacher.embed_dim == 384
    assert student.state_dict().keys() == teacher.state_dict().keys() == only_teacher.state_dict().keys()


def test_the_training_function_takes_the_arguments_of_its_parser(tmp_path: Path) -> None:
    from dinov2.train import get_args_parser
    from dinov2.train import main as train_main

    words = ["--config-file", "vitl16_short", "--output-dir", str(tmp_path / "run"), "train.dataset_path=nowhere"]
    arguments = get_args_parser(add_help=True).parse_args(words)
    assert (arguments.eval_only, arguments.no_resume, arguments.opts) == (False, False, ["train.dataset_path=nowhere"])
    with pytest.raises(ValueError, match="nowhere"):  # of the data set: it got as far as the configuration says
        train_main(arguments)
    assert not (tmp_path / "run").exists()


def test_the_evaluation_flags_of_the_release_parse() -> None:
    from dinov2.eval.knn import get_args_parser as get_knn_args_parser
    from dinov2.eval.setup import get_args_parser as get_setup_args_parser
    from dinov2.run.submit import get_args_parser as get_submission_args_parser

    words = ["--config-file", "c.yaml", "--pretrained-weights", "w.pth", "--output-dir", "out", "--opts", "a=b", "c=d"]
    assert get_setup_args_parser(add_help=False).parse_args(words).opts == ["a=b", "c=d"]
    parser = get_knn_args_parser(parents=[get_submission_args_parser(add_help=False)], add_help=False)
    arguments = parser.parse_args(
        [*words, "--nb_knn", "10", "20", "--n-tries", "2", "--partition", "p", "--timeout", "9"]
    )
    assert (arguments.nb_knn, arguments.n_tries, arguments.partition, arguments.timeout) == ([10, 20], 2, "p", 9)
    assert (arguments.nodes, arguments.temperature, arguments.n_per_class_list) == (1, 0.07, [-1])


# Import paths that moved.


@pytest.mark.parametrize(("module", "name", "new"), SUCCESSORS)
def test_an_old_name_gives_its_successor_and_warns_once(
    module: str, name: str, new: str, recwarn: pytest.WarningsRecorder
) -> None:
    old = importlib.import_module(module)
    vars(old).pop(name, None)  # as long as nobody has asked
    assert not recwarn.list
    successor_module, _, successor_name = new.partition(":")
    with pytest.warns(
        DeprecationWarning, match=re.escape(f"{module}.{name} is now {successor_module}.{successor_name}")
    ):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(successor_module), successor_name)
    assert getattr(old, name) is found  # and any further warning would be an error


@pytest.mark.parametrize("module", LACKING)
def test_a_module_that_lacks_names_of_the_release_is_a_module_like_any_other(module: str) -> None:
    loaded = importlib.import_module(module)
    assert Path(loaded.__file__).is_file() and loaded.__doc__
    assert not hasattr(loaded, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec(f"from {module} import no_such_name", {})
    there = [name for name, new in LACKING[module].items() if isinstance(new, Instead) and name in vars(loaded)]
    assert there == [], "the name arrived, so its row can go"


@pytest.mark.parametrize("module", GONE)
def test_a_module_that_is_gone_says_what_to_use(module: str) -> None:
    with pytest.raises(ImportError, match=r"is not in this package: ..."):
        importlib.import_module(module)


@pytest.mark.parametrize(
    "module",
    ["dinov2.eval.depth.models", "dinov2.eval.segmentation_m2f.models.segmentors", "dinov2.thirdparty.CLIP.clip"],
)
def test_what_lay_below_a_gone_module_is_gone_with_it(module: str) -> None:
    with pytest.raises(ImportError, match=r"is not in this package: ..."):
        importlib.import_module(module)


@pytest.mark.parametrize("module", [*MOVED, *GONE])
def test_the_table_holds_no_module_that_exists(module: str) -> None:
    path = REPOSITORY.joinpath(*module.split("."))
    assert not path.with_suffix(".py").exists(), "the module arrived, so its row can go"
    assert not (path / "__init__.py").exists(), "the package arrived, so its row can go"


def test_advice_names_only_what_exists() -> None:
    text = " ".join([*ADVICE, *GONE.values()])
    for dotted in sorted(set(re.findall(r"\bdinov2(?:\.\w+)+", text))):
        parent, _, name = dotted.rpartition(".")
        try:
            importlib.import_module(dotted)
        except ImportError:
            assert hasattr(importlib.import_module(parent), name), dotted
    for path in re.findall(r"\bdinov2/[\w/]+\.py", text):
        assert (REPOSITORY / path).is_file(), path


def test_old_modules_look_like_modules() -> None:
    import dinov2.utils.utils as old

    assert "CosineScheduler" in dir(old)
    assert not hasattr(old, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from dinov2.utils.utils import no_such_name", {})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dinov2\.utils\.no_such_module'"):
        importlib.import_module("dinov2.utils.no_such_module")


@pytest.mark.parametrize(
    "code",
    [
        "import dinov2.logging.helpers; dinov2.logging.helpers, dinov2.logging.setup_logging",
        "import dinov2.logging.helpers as helpers; helpers.__name__",
        "from dinov2.logging import helpers, setup_logging",
        "import dinov2.logging; import dinov2.logging.helpers",
    ],
)
def test_a_plain_module_has_an_old_module_below_it(code: str) -> None:
    result = run_python(code)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_plain_module_with_an_old_one_below_it_stays_a_plain_module() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dinov2\.logging\.nothing'"):
        importlib.import_module("dinov2.logging.nothing")
    assert importlib.reload(importlib.import_module("dinov2.logging")).__file__ is not None


def test_the_warning_points_at_the_line_that_imports() -> None:
    result = run_python("import sys\n\nfrom dinov2.utils.utils import CosineScheduler\n")
    assert result.returncode == 0
    assert "<string>:3: DeprecationWarning: dinov2.utils.utils.CosineScheduler is now dinov2.engine" in result.stderr


def test_the_hook_is_installed_once() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


def test_old_paths_are_removed_when_their_version_arrives() -> None:
    version = tuple(int(part) for part in dinov2.__version__.split(".")[:2])
    assert version < tuple(int(part) for part in REMOVED_IN.split("."))
