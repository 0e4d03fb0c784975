"""The released files themselves: `make test-online` fetches them (about 1 GB, into the cache) and looks at them.

Left out everywhere else; here nothing is skipped, because what could not be fetched has not been looked at. The check
values for the tokens of one photograph are those of the public tests of the same weights in the library
`transformers`.
"""

import os

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import dinov2
from dinov2.apps.releases import check_releases
from dinov2.checkpoints.download import download
from dinov2.checkpoints.files import read_file
from dinov2.errors import DinoError
from dinov2.hub import backbones, classifiers
from dinov2.models.config import BackboneConfig
from dinov2.models.releases import RELEASES, backbone_config, release

pytestmark = [pytest.mark.network, pytest.mark.slow]

NAMES = ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitb14", "dinov2_vitb14_reg"]
CACHE = os.environ.get("DINOV2_CACHE")
PHOTOGRAPH = "http://images.cocodataset.org/val2017/000000039769.jpg"  # two cats on a sofa
CATS = {281, 282, 285}  # tabby, tiger cat, Egyptian cat

# First three numbers of the first three tokens (class token, then patches or registers) after the final norm.
TOKENS = {
    "dinov2_vitb14": [[-2.1747, -0.4729, 1.0936], [-3.2780, -0.8269, -0.9210], [-2.9129, 1.1284, -0.7306]],
    "dinov2_vitb14_reg": [[-0.4638, -1.4563, -0.0289], [-1.4736, -0.8866, 0.3005], [0.0720, -0.2406, -1.5943]],
}


@pytest.fixture(autouse=True)
def _the_cache_of_the_user(_a_process_of_its_own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are too large to be fetched anew for each run."""
    if CACHE:
        monkeypatch.setenv("DINOV2_CACHE", CACHE)
    else:
        monkeypatch.delenv("DINOV2_CACHE")


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """The photograph of the check values, in the cache as well; what needs it fails where it cannot be had."""
    try:
        with Image.open(download(PHOTOGRAPH)) as image:
            return image.convert("RGB")
    except DinoError as error:
        fault = str(error)
    pytest.fail(f"the photograph {PHOTOGRAPH} could not be reached: {fault}", pytrace=False)


def test_every_address_of_the_table_answers() -> None:
    assert [(answer.release.name, answer.fault) for answer in check_releases(RELEASES) if answer.fault] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_loads_strictly_and_is_what_the_table_says(name: str) -> None:
    model = getattr(backbones, name)().eval()
    row = release(name)
    state = read_file(download(row.url))
    assert_close(dict(model.state_dict()), state, atol=0, rtol=0)
    table = backbone_config(row)
    assert BackboneConfig.from_state_dict(state, mean=table.mean, std=table.std) == table
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).isfinite().all()


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_loads_strictly(name: str, layers: int) -> None:
    model = getattr(classifiers, f"{name}_lc")(layers=layers).eval()
    head = read_file(download(release(f"{name}_linear{'4' if layers == 4 else ''}_head").url))
    assert_close(dict(model.linear_head.state_dict()), head, atol=0, rtol=0)
    assert head["weight"].shape == (1000, (1 + layers) * model.backbone.embed_dim)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in head.values())


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_sees_cats(name: str, layers: int, photograph: Image.Image) -> None:
    model = getattr(classifiers, f"{name}_lc")(layers=layers).eval()
    images = dinov2.load(name, device="cpu", precision="fp32").transform(photograph)[None]
    with torch.inference_mode():
        assert model(images).argmax().item() in CATS


@pytest.mark.parametrize("name", list(TOKENS))
def test_tokens_of_a_photograph_equal_the_public_check_values(name: str, photograph: Image.Image) -> None:
    model = dinov2.load(name, device="cpu", precision="fp32")
    with torch.inference_mode():
        features = model.backbone.forward_features(model.transform(photograph)[None])
    tokens = torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]], dim=1
    )
    # Decoders of JPEG may differ by one step of brightness.
    assert_close(tokens[0, :3, :3], torch.tensor(TOKENS[name]), atol=1e-3, rtol=0)
