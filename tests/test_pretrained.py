"""From a run or a file to a backbone with its preprocessing: what is loaded, and what is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2
from dinov2.checkpoints.files import save_teacher, write_tensors
from dinov2.configs import load_config, to_yaml
from dinov2.errors import ConfigError, DataError, WeightsError
from dinov2.models.config import BackboneConfig
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import digest_of_files, load
from tests.golden.loading import golden_json
from tests.golden.recipe import fill, images
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "run")


def small(**changes) -> DinoVisionTransformer:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "block_chunks": 0}
    return fill(DinoVisionTransformer(**{**options, **changes})).eval()


def test_a_run_gives_its_newest_teacher_by_number_and_not_by_name(run):
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["training_11", "training_4", "training_9"]
    loaded = load(run)
    assert loaded.source == str(run / "eval" / "training_11" / "teacher_checkpoint.pth")
    assert loaded.name == "run/training_11"
    assert loaded.has_digest(hashlib.sha256(Path(loaded.source).read_bytes()).hexdigest())  # as manifests once had it
    assert loaded.has_digest(load(Path(loaded.source).with_name("backbone.safetensors")).digest)
    assert not loaded.backbone.training
    assert not any(flag for flag in (module.training for module in loaded.backbone.modules()))


def test_a_run_in_the_home_folder_is_found(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    monkeypatch.setenv("USERPROFILE", str(run.parent))
    assert Path(load(f"~/{run.name}").source).parents[2] == run


def test_the_transform_is_that_of_the_training(tmp_path):
    model = small(img_size=40, in_chans=1)
    teacher = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    save_teacher(tmp_path / "t.pth", teacher, BackboneConfig.from_model(model, mean=[0.1], std=[0.7]))
    transform = load(tmp_path / "t.pth").transform
    assert (transform.crop_size, transform.mean, transform.std) == (40, (0.1,), (0.7,))


@pytest.mark.parametrize("native, size", [(518, 224), (224, 224), (98, 98), (32, 32)])
def test_bare_weights_get_the_releases_normalisation_and_at_most_224_pixels(tmp_path, native, size):
    patch = 8 if native == 32 else 14
    torch.save(small(img_size=native, patch_size=patch).state_dict(), tmp_path / "w.pth")
    transform = load(tmp_path / "w.pth").transform
    assert transform.crop_size == size
    assert transform.mean == pytest.approx((0.485, 0.456, 0.406))
    assert transform.std == pytest.approx((0.229, 0.224, 0.225))


def test_bare_weights_compute_what_they_did(tmp_path):
    model = small(num_register_tokens=2, interpolate_offset=0.0, interpolate_antialias=True)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    x = images(2, 48, 32)
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path / "w.pth")).backbone(x), model(x))


@pytest.mark.parametrize("name", ["vits14", "vits14_reg"])
def test_a_released_file_loads_as_it_is_and_with_its_packaged_configuration(tmp_path, name):
    shapes = golden_json(f"backbone_{name}.keys")
    # One number stands for each tensor, so that the file is small.
    torch.save({key: torch.tensor(0.25).expand(shape) for key, shape in shapes.items()}, tmp_path / "w.pth")
    bare = load(tmp_path / "w.pth")
    configured = load(tmp_path / "w.pth", cfg=load_config(f"eval/{name.replace('_reg', '_reg4')}_pretrain"))
    for loaded in (bare, configured):
        assert loaded.report.matched == len(shapes) and loaded.report.resized == ()
        assert loaded.transform.crop_size == 224
        assert bool((loaded.backbone.pos_embed == 0.25).all())
    differing = {key for key in bare.table if bare.table[key] != configured.table[key]}
    assert differing <= {"mean", "std"}  # said by the configuration, assumed for the bare file
    assert bare.transform.describe() == configured.transform.describe()


def test_an_untrained_twin_has_the_same_shape_other_weights_and_draws_nothing_from_the_caller(run):
    loaded = load(run)
    state = torch.get_rng_state()
    first, again, other = loaded.untrained(), loaded.untrained(), loaded.untrained(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    shapes = {key: value.shape for key, value in loaded.backbone.state_dict().items()}
    assert {key: value.shape for key, value in first.state_dict().items()} == shapes
    assert torch.equal(first.cls_token, again.cls_token)
    assert not torch.equal(first.cls_token, other.cls_token)
    assert not torch.equal(first.cls_token, loaded.backbone.cls_token)


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["student.num_register_tokens=4"], "missing register_tokens. The file is of a model without registers"),
        (["student.ffn_layer=swiglu"], "One of the two has a SwiGLU feed-forward network"),
        (["student.depth=12"], "The depths differ"),
        (["student.arch=vit_small", "student.embed_dim=null", "student.num_heads=null"], "wanted [1, 1, 384]"),
        (["student.patch_size=16"], "wanted [64, 3, 16, 16]"),
    ],
)
def test_a_configuration_decides_and_weights_that_do_not_fit_it_are_refused(run, overrides, reason):
    cfg = load_config(str(run / "config.yaml"), overrides)
    with pytest.raises(WeightsError) as refusal:
        load(run, cfg=cfg)
    assert reason in str(refusal.value)


def test_a_configuration_says_what_tensors_do_not(run, tmp_path):
    own = load_config(str(run / "config.yaml"))
    assert load(run, cfg=own).table == load(run).table
    torch.save(load(run).backbone.state_dict(), tmp_path / "bare.pth")
    (tmp_path / "c.yaml").write_text(to_yaml(own))
    cfg = load_config(
        str(tmp_path / "c.yaml"),
        [
            "student.num_heads=4",
            "student.interpolate_offset=0.0",
            "crops.mean=[0.1,0.2,0.3]",
            "crops.global_crops_size=64",
        ],
    )
    loaded = load(tmp_path / "bare.pth", cfg=cfg)
    assert loaded.backbone.num_heads == 4 and loaded.backbone.interpolate_offset == 0.0
    assert loaded.transform.mean == (0.1, 0.2, 0.3) and loaded.transform.crop_size == 64
    assert loaded.report.resized == ("pos_embed 16 -> 64 patches",)


def test_a_configuration_that_describes_no_model_is_refused(run):
    cfg = load_config(str(run / "config.yaml"), ["student.arch=vit_enormous", "student.num_heads=null"])
    with pytest.raises(ConfigError, match="vit_enormous"):
        load(run, cfg=cfg)


# Features.


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    model = small(num_register_tokens=2, interpolate_offset=0.0, interpolate_antialias=True)
    teacher = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    save_teacher(path, teacher, BackboneConfig.from_model(model, mean=[0.5] * 3, std=[0.25] * 3))
    return path


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_package_s_load_is_this_one():
    assert dinov2.load is load


def test_features_of_one_image_are_its_tokens_without_a_batch(file, tmp_path):
    model = load(file, precision="fp32")
    picture(50, 40).save(tmp_path / "a.png")
    features = model.features(tmp_path / "a.png", layers=[0])
    assert (features.cls.shape, features.registers.shape, features.patches.shape) == ((64,), (2, 64), (4, 4, 64))
    assert features.size == (32, 32) and features.layers[0].patches.shape == (4, 4, 64)
    with torch.no_grad():
        output = model.backbone.forward_features(model.transform(picture(50, 40))[None])
    assert torch.allclose(features.cls, output["x_norm_clstoken"][0], atol=1e-6)
    assert torch.allclose(features.patches.flatten(0, 1), output["x_norm_patchtokens"][0], atol=1e-6)


def test_different_sizes_in_one_call_equal_one_by_one(file):
    model = load(file, precision="fp32")
    pictures = [picture(width, height) for width, height in ((32, 32), (70, 33), (41, 90), (32, 32), (9, 5))]
    together = model.features(pictures, fit="pad", batch_size=4)
    for image, features in zip(pictures, together, strict=True):
        alone = model.features(image, fit="pad")
        assert features.size == alone.size and features.patches.shape == alone.patches.shape
        for ours, theirs in zip((features.cls, features.patches), (alone.cls, alone.patches), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert [features.size for features in together] == [(32, 32), (40, 72), (96, 48), (32, 32), (8, 16)]


def test_a_batch_of_normalised_tensors_goes_through_as_it_is(file):
    model = load(file, precision="fp32")
    x = images(3, 32, 48)
    features = model.features(x, batch_size=2)
    with torch.no_grad():
        assert torch.allclose(torch.stack([f.cls for f in features]), model.backbone(x), atol=1e-5)


def test_sides_that_are_no_multiple_of_the_patch_are_filled_up(file):
    model = load(file, precision="fp32")
    assert model.encode(images(2, 30, 41)).patches.shape == (2, 4, 6, 64)
    assert model.features(images(1, 30, 41)[0]).size == (32, 48)


def test_features_are_numbers_that_can_be_trained_on(file):
    features = load(file).features(picture(32, 32))
    assert not features.cls.is_inference() and features.cls.dtype == torch.float32
    (features.cls * torch.ones(64, requires_grad=True)).sum().backward()


def test_bfloat16_gives_float32_features_near_the_exact_ones(file):
    exact, fast = (load(file, precision=precision).features(picture(32, 32)) for precision in ("fp32", "bf16"))
    assert fast.cls.dtype == torch.float32
    assert not torch.equal(fast.cls, exact.cls)
    assert torch.nn.functional.cosine_similarity(fast.cls, exact.cls, dim=0) > 0.999


def test_an_unknown_device_or_precision_is_refused_before_anything_is_read():
    for options in ({"device": "tpu"}, {"precision": "fp8"}):
        with pytest.raises(ConfigError):
            load("nowhere.pth", **options)


def test_a_peer_has_the_same_face(monkeypatch, tmp_path):
    (tmp_path / "peer_model.py").write_text(
        "from dinov2.models.vision_transformer import DinoVisionTransformer\n"
        "def build():\n"
        "    return DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load("peer_model:build", precision="fp32")
    assert (model.embed_dim, model.patch_size, model.name) == (64, 14, "peer_model:build")
    assert model.features(picture(300, 300)).cls.shape == (64,)
    assert len(model.digest) == 64
    with pytest.raises(ConfigError, match="no classifier"):
        model.classify(images(1, 28, 28))
    with pytest.raises(ConfigError, match="of another library"):
        model.untrained()


@pytest.mark.parametrize("layers", [1, 4])
def test_a_classifier_reads_the_blocks_of_its_head(tmp_path, layers):
    backbone = small(depth=4)
    head = {"weight": torch.randn(5, (1 + layers) * 64), "bias": torch.randn(5)}
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    torch.save({**state, **{f"linear_head.{key}": value for key, value in head.items()}}, tmp_path / "lc.pth")
    model = load(tmp_path / "lc.pth", precision="fp32")
    x = images(2, 32, 32)
    with torch.no_grad():
        blocks = backbone.get_intermediate_layers(x, layers, return_class_token=True)
        read = torch.cat([*(cls for _, cls in blocks), blocks[-1][0].mean(dim=1)], dim=1)
        assert torch.allclose(model.classify(x), read @ head["weight"].T + head["bias"], atol=1e-4)


def test_bare_weights_for_other_channels_get_a_normalisation_of_as_many(tmp_path):
    torch.save(small(in_chans=2).state_dict(), tmp_path / "w.pth")
    model = load(tmp_path / "w.pth", precision="fp32")
    assert model.transform.mean == (0.5, 0.5)
    assert model.features(torch.zeros(2, 40, 40, dtype=torch.uint8)).cls.shape == (64,)


def test_the_identity_of_a_model_is_that_of_its_tensors_and_not_of_its_file(tmp_path):
    model = small(num_heads=2)
    config = BackboneConfig.from_model(model)
    table = config.table()
    save_teacher(tmp_path / "t.pth", {f"backbone.{key}": value for key, value in model.state_dict().items()}, config)
    torch.save({"extra": 1, "model": table, "teacher": model.state_dict()}, tmp_path / "other.pth")
    digests = {load(tmp_path / name).digest for name in ("t.pth", "backbone.safetensors", "other.pth")}
    assert len(digests) == 1
    # What no tensor tells belongs to it: the same tensors with another number of heads compute something else.
    torch.save({"model": {**table, "num_heads": 1}, "teacher": model.state_dict()}, tmp_path / "heads.pth")
    with torch.no_grad():
        model.norm.bias[0] += 1e-3
    torch.save({"model": table, "teacher": model.state_dict()}, tmp_path / "changed.pth")
    digests |= {load(tmp_path / name).digest for name in ("heads.pth", "changed.pth")}
    assert len(digests) == 3


def test_a_digest_of_the_files_is_still_known(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth")
    assert loaded.has_digest(loaded.digest) and loaded.has_digest(digest_of_files([tmp_path / "w.pth"]))
    assert not loaded.has_digest("0" * 64)


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    """Tensors of a safetensors file are mapped into memory; a model has its own."""
    write_tensors(tmp_path / "w.safetensors", small().state_dict(), BackboneConfig.from_model(small()).table())
    loaded = load(tmp_path / "w.safetensors")
    before = loaded.backbone.norm.weight.clone()
    with open(tmp_path / "w.safetensors", "r+b") as file:
        file.write(bytes((tmp_path / "w.safetensors").stat().st_size))
    assert torch.equal(loaded.backbone.norm.weight, before)


def test_patches_larger_than_224_pixels_have_images_of_one_patch(tmp_path):
    torch.save(small(img_size=256, patch_size=256).state_dict(), tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").transform.crop_size == 256


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_that_are_not_finite_are_refused(tmp_path, value):
    state = small().state_dict()
    state["blocks.1.mlp.fc2.bias"][0] = value
    torch.save(state, tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth", device="cpu")
    pixels = torch.zeros(2, 3, 32, 32)
    for call in (
        lambda: loaded.encode(pixels),
        lambda: loaded.features(pixels),
        lambda: loaded.features(images(2, 32, 32)),
    ):
        with pytest.raises(DataError, match=r"w\.pth gives NaN or infinite features for 2 of 2 images"):
            call()
    with pytest.raises(DataError, match="NaN or infinite features for 1 of 1 images"):
        loaded.features([torch.zeros(3, 32, 32), torch.zeros(3, 40, 32)])  # two sizes, one packed pass


def test_a_smaller_stride_gives_denser_patches_and_another_identity(file):
    coarse, dense = load(file, precision="fp32"), load(file, precision="fp32", stride=4)
    image = picture(48, 32)
    plain, fine = coarse.features(image, fit="aspect"), dense.features(image, fit="aspect")
    assert plain.patches.shape[:2] == (4, 6) and fine.patches.shape[:2] == (7, 11)
    assert plain.size == fine.size == (32, 48)
    assert dense.stride == 4 and coarse.stride == 8 and dense.patch_grid(32, 48) == (7, 11)
    assert dense.digest != coarse.digest == load(file, stride=8).digest
    assert dense.features(image, fit="aspect", max_tokens=40).patches.shape[:2] <= (5, 8)
    with pytest.raises(ConfigError, match="one of 1, 2, 4, 8"):
        load(file, stride=3)


def test_a_wrapped_patch_projection_counts_as_one_without_overlap(file):
    model, image = load(file, precision="fp32"), picture(48, 32)
    expected = model.features(image, fit="aspect")
    model.backbone.patch_embed.proj = torch.nn.Sequential(model.backbone.patch_embed.proj)
    assert model.stride == 8 and model.patch_grid(32, 48) == (4, 6)
    torch.testing.assert_close(model.features(image, fit="aspect").patches, expected.patches)


def test_what_encode_and_classify_return_may_enter_the_training_of_a_head(file):
    model, head = load(file, precision="fp32"), torch.nn.Linear(64, 3)
    tokens = model.encode(torch.randn(2, 3, 32, 32), layers=[0])
    for features in (tokens.cls, tokens.patches, tokens.layers[0].cls):
        assert not features.is_inference()
        head(features).sum().backward()
        features += 1


def test_any_module_may_take_the_place_of_the_head(file):
    model = load(file, precision="fp32")
    model.head, model.head_layers = torch.nn.Sequential(torch.nn.Linear(3 * 64, 5)), 2
    assert model.classify(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    model.head, model.head_layers = torch.nn.Identity(), 1
    assert model.classify(torch.randn(2, 3, 32, 32)).shape == (2, 2 * 64)
