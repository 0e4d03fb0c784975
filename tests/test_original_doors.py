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
from dinov2._moved import GONE, LACKING, MOVED, REMOVED_IN, Instead, install

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = [(module, name) for module, names in MOVED.items() for name in names]
SUCCESSORS = [
    (module, name, new) for module, names in MOVED.items() for name, new in names.items() if isinstance(new, str)
]
REPLACED = [
    (module, name) for module, names in MOVED.items() for name, new in names.items() if isinstance(new, Instead)
]
ADVICE = [
    entry.advice
    for table in (MOVED, LACKING)
    for names in table.values()
    for entry in names.values()
    if isinstance(entry, Instead)
]


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


# What the release's README and its users' scripts import, and that is here under the same name.

BACKBONES = [f"dinov2_vit{size}14{registers}" for registers in ("", "_reg") for size in "sblg"]
CLASSIFIERS = [f"{name}_lc" for name in BACKBONES]

DOORS = {
    "dinov2.configs": "dinov2_default_config load_and_merge_config load_config",
    "dinov2.data": "DataAugmentationDINO DatasetWithEnumeratedTargets MaskingGenerator SamplerType "
    "collate_data_and_cast make_data_loader make_dataset",
    "dinov2.data.adapters": "DatasetWithEnumeratedTargets",
    "dinov2.data.augmentations": "DataAugmentationDINO",
    "dinov2.data.collate": "collate_data_and_cast",
    "dinov2.data.datasets": "ImageNet ImageNet22k",
    "dinov2.data.loaders": "SamplerType make_data_loader make_dataset",
    "dinov2.data.masking": "MaskingGenerator",
    "dinov2.data.samplers": "EpochSampler InfiniteSampler ShardedInfiniteSampler",
    "dinov2.data.transforms": "GaussianBlur IMAGENET_DEFAULT_MEAN IMAGENET_DEFAULT_STD MaybeToTensor "
    "make_classification_eval_transform make_classification_train_transform make_normalize_transform",
    "dinov2.distributed": "enable get_global_rank get_global_size get_local_rank get_local_size is_enabled "
    "is_main_process",
    "dinov2.eval.knn": "KnnModule get_args_parser",
    "dinov2.eval.setup": "get_args_parser",
    "dinov2.hub.backbones": f"Weights {' '.join(BACKBONES)}",
    "dinov2.hub.classifiers": f"Weights {' '.join(CLASSIFIERS)}",
    "dinov2.layers": "Attention Block DINOHead DropPath LayerScale MemEffAttention Mlp NestedTensorBlock PatchEmbed "
    "SwiGLUFFN SwiGLUFFNFused",
    "dinov2.layers.attention": "Attention MemEffAttention",
    "dinov2.layers.block": "Block NestedTensorBlock",
    "dinov2.logging": "setup_logging",
    "dinov2.loss": "DINOLoss KoLeoLoss iBOTPatchLoss",
    "dinov2.models": "build_model build_model_from_cfg",
    "dinov2.models.vision_transformer": "DinoVisionTransformer vit_base vit_giant2 vit_large vit_small",
    "dinov2.run.eval.knn": "main",
    "dinov2.run.submit": "get_args_parser",
    "dinov2.run.train.train": "main",
    "dinov2.train": "SSLMetaArch get_args_parser main",
    "dinov2.train.ssl_meta_arch": "SSLMetaArch",
    "hubconf": f"dependencies {' '.join(BACKBONES + CLASSIFIERS)}",
}


@pytest.mark.parametrize("module", DOORS)
def test_a_name_of_the_release_imports_without_a_warning(module: str, recwarn: pytest.WarningsRecorder) -> None:
    found: dict[str, object] = {}
    exec(f"from {module} import {', '.join(DOORS[module].split())}", found)
    assert set(DOORS[module].split()) <= found.keys()
    assert not recwarn.list


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
    module: str, name: str, new: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    old = importlib.import_module(module)
    assert not recwarn.list
    successor_module, _, successor_name = new.partition(":")
    with pytest.warns(
        DeprecationWarning, match=re.escape(f"{module}.{name} is now {successor_module}.{successor_name}")
    ):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(successor_module), successor_name)
    assert getattr(old, name) is found  # and any further warning would be an error


@pytest.mark.parametrize(("module", "name"), REPLACED)
def test_an_old_name_without_successor_says_what_to_use(module: str, name: str) -> None:
    with pytest.raises(ImportError, match=f"{module}.{name} is not in this package: ..."):
        exec(f"from {module} import {name}", {})


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in LACKING.items() for name in names])
def test_a_name_that_a_module_of_the_release_has_and_ours_has_not_says_what_to_use(module: str, name: str) -> None:
    with pytest.raises(ImportError, match=f"{module}.{name} is not in this package: ..."):
        exec(f"from {module} import {name}", {})


@pytest.mark.parametrize("module", LACKING)
def test_a_module_that_lacks_names_of_the_release_is_a_module_like_any_other(module: str) -> None:
    loaded = importlib.import_module(module)
    assert Path(loaded.__file__).is_file() and loaded.__doc__
    assert not hasattr(loaded, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec(f"from {module} import no_such_name", {})
    assert [name for name in LACKING[module] if name in vars(loaded)] == [], "the name arrived, so its row can go"


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
