"""Extractors by name, by file and bundled: what they give, what identifies them, and what is refused."""

import hashlib
import os
import pickle
import urllib.error
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from objectives.features import DigitsFeatures, NetworkExtractor, load_extractor, names
from samplers.errors import InputError

RGB = (3, 32, 32)


def images(n: int, channels: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the bundled extractor of digits


@pytest.fixture
def digits_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "digits.pt"
    torch.save(DigitsFeatures().state_dict(), path)
    return path


def test_digits_features_of_an_image_do_not_depend_on_its_batch(digits_file: Path) -> None:
    extractor = load_extractor({"name": "digits", "path": str(digits_file)}, (1, 8, 8))
    batch = images(230, 1, 8)
    together = extractor(batch)
    assert together.shape == (230, extractor.dim) == (230, 64)
    assert together.dtype == torch.float64
    assert not together.requires_grad
    alone = torch.cat([extractor(batch[i : i + 1]) for i in range(0, 230, 23)])
    torch.testing.assert_close(together[::23], alone, rtol=1e-12, atol=1e-12)


def test_digits_classifier_is_a_linear_map_of_its_features() -> None:
    network = DigitsFeatures()
    batch = images(5, 1, 8)
    torch.testing.assert_close(network(batch), network.head(network.features(batch)))
    assert network(batch).shape == (5, 10)


def test_digits_pixels_are_scaled_to_minus_one_to_one() -> None:
    network = DigitsFeatures()
    seen: list[Tensor] = []
    network.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.features(torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(64).reshape(2, 1, 8, 8))
    assert set(seen[0].flatten().tolist()) == {-1.0, 1.0}


def test_digits_are_for_small_grey_images_only(digits_file: Path) -> None:
    with pytest.raises(InputError, match=r"\(1, 8, 8\).*\(3, 32, 32\)"):
        load_extractor({"name": "digits", "path": str(digits_file)}, RGB)


def test_digits_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"other\.pt cannot be used"):
        load_extractor({"name": "digits", "path": str(path)}, (1, 8, 8))


def test_fingerprint_changes_with_a_weight(digits_file: Path) -> None:
    spec = {"name": "digits", "path": str(digits_file)}
    before = load_extractor(spec, (1, 8, 8)).fingerprint
    assert before == load_extractor(spec, (1, 8, 8)).fingerprint
    assert len(before) == 64
    state = torch.load(digits_file)
    state["head.bias"][0] += 1e-6
    torch.save(state, digits_file)
    assert load_extractor(spec, (1, 8, 8)).fingerprint != before


class Recorder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = precision()
        return x.float().flatten(1)


def precision() -> tuple[str, str, bool]:
    backends: Any = torch.backends
    return (
        backends.cudnn.conv.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.deterministic,
    )


@pytest.fixture
def default_precision() -> Iterator[None]:
    """PyTorch's default for convolutions, whatever ran before in this process."""
    conv: Any = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "tf32"
    yield
    conv.fp32_precision = before


@pytest.mark.usefixtures("default_precision")
def test_features_are_taken_in_full_precision_and_the_callers_settings_come_back() -> None:
    recorder = Recorder()
    extractor = NetworkExtractor("recorder", recorder, 64, "0", channels=1, chunk=9)
    before = precision()
    assert before[0] == "tf32"
    extractor(images(1, 1, 8))
    assert recorder.seen == ("ieee", "ieee", True)
    assert precision() == before


# --- TorchScript files


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(3).flatten(1)


class Coloured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.float())
        return y.mean((2, 3))


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def scripted(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, images(2, 3, 8)), path)  # type: ignore[no-untyped-call]
    return path


def test_a_torchscript_file_is_an_extractor_of_the_dimension_that_it_shows(tmp_path: Path) -> None:
    path = scripted(Pooled(), tmp_path / "pooled.pt")
    extractor = load_extractor(path, (3, 8, 8))
    batch = images(600, 3, 8)
    assert extractor.dim == 24
    assert extractor.name == "pooled.pt"
    torch.testing.assert_close(extractor(batch), Pooled()(batch))
    assert load_extractor({"path": str(path), "sha256": sha256(path).upper()}, (3, 8, 8)).dim == 24
    assert load_extractor(str(path), (3, 4, 4)).dim == 12


def test_loading_a_torchscript_file_warns_of_nothing(tmp_path: Path) -> None:
    path = scripted(Pooled(), tmp_path / "pooled.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_extractor(path, (3, 8, 8))(images(3, 3, 8))


def test_grey_images_are_repeated_for_an_extractor_of_colours(tmp_path: Path) -> None:
    path = scripted(Coloured(), tmp_path / "coloured.pt")
    grey = images(4, 1, 8)
    colours = load_extractor(path, (3, 8, 8))(grey.repeat(1, 3, 1, 1))
    extractor = load_extractor(path, (1, 8, 8))
    torch.testing.assert_close(extractor(grey), colours)
    assert extractor.fingerprint == load_extractor(path, (3, 8, 8)).fingerprint


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Pixels(), "uint8 instead of floating"), (Maps(), r"\(2, 3, 8, 8\) instead of \(2, D\)")],
)
def test_a_torchscript_file_with_an_unfit_answer_is_named(
    network: nn.Module, reason: str, tmp_path: Path
) -> None:
    path = scripted(network, tmp_path / "unfit.pt")
    with pytest.raises(InputError, match=rf"unfit\.pt failed .*{reason}"):
        load_extractor(path, (3, 8, 8))


def test_a_file_that_is_no_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.pt"
    path.write_text("not a network")
    with pytest.raises(InputError, match=r"notes\.pt cannot be used as TorchScript"):
        load_extractor(path, RGB)


def test_the_shared_torchscript_features_are_512_dimensional(shared: Path) -> None:
    extractor = load_extractor(shared / "models" / "cifar10-features.pt", RGB)
    features = extractor(images(3, 3, 32))
    assert extractor.dim == 512
    assert features.shape == (3, 512)
    assert features.dtype == torch.float32


# --- torch-fidelity's extractors


@pytest.fixture(scope="module")
def inception() -> FeatureExtractorInceptionV3:
    """torch-fidelity's Inception with random weights instead of downloaded ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["64", "2048", "logits_unbiased"])


@pytest.fixture(scope="module")
def inception_file(inception: FeatureExtractorInceptionV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pooled(inception_file: Path) -> NetworkExtractor:
    spec = {"name": "inception-v3-compat", "path": str(inception_file), "sha256": sha256(inception_file)}
    return load_extractor(spec, RGB)


def test_inception_gives_torch_fidelitys_features(
    inception: FeatureExtractorInceptionV3, pooled: NetworkExtractor
) -> None:
    batch = images(1, 3, 32)
    assert (pooled.name, pooled.dim) == ("inception-v3-compat/2048", 2048)
    torch.testing.assert_close(pooled(batch), inception(batch)[1])


def test_the_logits_of_inceptions_features_are_torch_fidelitys(
    inception: FeatureExtractorInceptionV3, pooled: NetworkExtractor
) -> None:
    batch = images(3, 3, 32)
    logits = pooled.logits(pooled(batch))
    assert logits is not None
    assert logits.shape == (3, 1008)
    torch.testing.assert_close(logits, inception(batch)[2])


def test_another_layer_has_another_dimension_and_fingerprint(
    inception: FeatureExtractorInceptionV3, inception_file: Path, pooled: NetworkExtractor
) -> None:
    spec = {"name": "inception-v3-compat", "layer": 64, "path": str(inception_file)}
    extractor = load_extractor(spec, (1, 8, 8))
    assert extractor.dim == 64
    assert extractor.logits(torch.zeros(2, 64)) is None
    assert extractor.fingerprint != pooled.fingerprint
    grey = images(2, 1, 8)
    torch.testing.assert_close(extractor(grey), inception(grey.repeat(1, 3, 1, 1))[0])


def test_downloaded_weights_are_used_without_a_network(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    os.link(inception_file, cached)
    assert load_extractor("inception-v3-compat/64", RGB).dim == 64


def test_a_download_is_checked_against_the_sum_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(url: str, dst: str, hash_prefix: str, progress: bool) -> None:
        asked.update(url=url, dst=dst, hash_prefix=hash_prefix)
        raise RuntimeError('invalid hash value (expected "6726825d", got "0")')

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(InputError, match="invalid hash value"):
        load_extractor("inception-v3-compat", RGB)
    assert asked["hash_prefix"] == "6726825d"
    assert Path(asked["dst"]).parent == tmp_path / "checkpoints"


def test_an_impossible_download_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    expected = r"Name or service not known.*download https://github\.com/.*\.pth .*set features\.path"
    with pytest.raises(InputError, match=expected):
        load_extractor("inception-v3-compat", RGB)


def test_weights_that_are_a_pickle_with_code_are_refused_unrun(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    path = tmp_path / "evil.pth"
    torch.save({"weight": Malicious()}, path)
    with pytest.raises(InputError, match=r"evil\.pth cannot be used as weights of inception-v3-compat"):
        load_extractor({"name": "inception-v3-compat", "path": str(path)}, RGB)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(InputError, match=r"evil\.pth"):
        load_extractor({"name": "vgg16", "path": str(path)}, RGB)
    assert not marker.exists()


def test_weights_of_another_network_are_refused_by_name(digits_file: Path) -> None:
    with pytest.raises(InputError, match=r"digits\.pt cannot be used as weights of inception-v3-compat"):
        load_extractor({"name": "inception-v3-compat", "path": str(digits_file)}, RGB)


# --- what is refused before anything is loaded


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("inception-v4", "'inception-v4' is neither a file nor a known name.*digits.*inception-v3-compat"),
        ({"name": "inception-v4"}, "features.name: 'inception-v4' is not known; take one of digits"),
        ({"name": "digits", "weight": "x"}, "features.weight: no such option; there are name, path"),
        ({"sha256": "00"}, "give a name .* or the path"),
        ({"path": "nowhere.pt"}, "features.path: nowhere.pt cannot be read"),
        ("inception-v3-compat/9", "has no layer '9'; take one of 64, 192, 768, 2048"),
        ({"name": "inception-v3-compat/64", "layer": "192"}, "'192' contradicts"),
        ({"name": "digits", "layer": "64"}, "features.layer: digits has no layers"),
        ({"name": "vgg16", "sha256": "00"}, "set features.path to the file with the weights of vgg16"),
    ],
)
def test_unusable_options_are_named_with_a_next_step(spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_extractor(spec, RGB)


def test_a_wrong_checksum_is_found_before_the_file_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "garbage.pt"
    path.write_bytes(b"garbage")
    with pytest.raises(InputError, match=f"garbage.pt has the SHA-256 {sha256(path)}, not 00"):
        load_extractor({"path": str(path), "sha256": "00" * 32}, RGB)


def test_images_that_are_neither_grey_nor_rgb_are_refused() -> None:
    with pytest.raises(InputError, match="4 channels"):
        load_extractor("inception-v3-compat", (4, 32, 32))


def test_names_are_the_bundled_one_and_torch_fidelitys() -> None:
    assert {"digits", "inception-v3-compat", "vgg16", "clip-vit-b-32", "dinov2-vit-b-14"} <= set(names())
