"""Statistics of real images: every kind of source, what is refused, and the cache."""

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from objectives.features import NetworkExtractor, load_extractor
from objectives.reference import (
    Reference,
    compute_reference,
    has_images,
    load_features,
    load_reference,
    read_images,
)
from samplers.errors import InputError

SHAPE = (3, 6, 4)  # C, H, W
COUNT = 12


class Blocks(nn.Module):
    """The mean of each channel's upper and lower half."""

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        return x.double().reshape(n, channels, 2, height // 2 * width).mean(3).flatten(1)


@pytest.fixture
def extractor() -> NetworkExtractor:
    return NetworkExtractor("blocks", Blocks(), 6, "f" * 64, channels=3, chunk=5)


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 6, 4, 3), dtype=np.uint8)


@pytest.fixture
def members(images: NDArray[np.uint8]) -> dict[str, bytes]:
    """PNG files in two classes, named so that their sorted order is that of `images`."""
    return {f"class{i // 6}/{i:02}.png": png(image) for i, image in enumerate(images)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def png(pixels: NDArray[Any], mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(members: dict[str, bytes], folder: Path) -> Path:
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zip_of(members: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_of(members: dict[str, bytes], path: Path, mode: Any) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def expected(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    features = Blocks()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def check(reference: Reference, images: NDArray[np.uint8]) -> None:
    mean, cov = expected(images)
    np.testing.assert_allclose(reference.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(reference.cov, cov, rtol=1e-9)
    assert (reference.n, reference.fingerprint, reference.shape) == (len(images), "f" * 64, SHAPE)


# --- sources of images


def test_a_folder_a_zip_and_tars_of_the_same_images_give_the_same_statistics(
    images: NDArray[np.uint8], members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    sources = [
        folder_of(members, tmp_path / "folder"),
        zip_of(members, tmp_path / "a.zip"),
        tar_of(members, tmp_path / "a.tar", "w"),
        tar_of(dict(reversed(members.items())), tmp_path / "a.tar.gz", "w:gz"),
        tar_of(members, tmp_path / "a.tar.xz", "w:xz"),
    ]
    digests = set()
    for source in sources:
        reference = compute_reference(source, extractor, SHAPE)
        check(reference, images)
        assert reference.source == source.name
        digests.add(reference.digest)
    assert len(digests) == 1


def test_an_npz_of_images_gives_their_statistics(
    images: NDArray[np.uint8], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(COUNT))
    check(load_reference(tmp_path / "images.npz", extractor, SHAPE), images)


def test_more_images_than_one_batch_are_all_counted_and_reported(
    extractor: NetworkExtractor, tmp_path: Path
) -> None:
    images = np.random.default_rng(1).integers(0, 256, (1100, 6, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    seen: list[tuple[int, int]] = []
    reference = compute_reference(
        tmp_path / "images.npz", extractor, SHAPE, progress=lambda done, total: seen.append((done, total))
    )
    check(reference, images)
    assert seen == [(500, 1100), (1000, 1100), (1100, 1100)]


def test_images_are_read_in_batches_and_in_order(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (1100, 6, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    batches = list(read_images(tmp_path / "images.npz", SHAPE))
    assert [len(batch) for batch in batches] == [500, 500, 100]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("most", "chosen"), [(3, [0, 4, 8]), (5, [0, 2, 4, 7, 9]), (12, range(12)), (99, range(12))]
)
def test_some_of_the_images_are_spread_over_all_classes(
    members: dict[str, bytes], images: NDArray[np.uint8], tmp_path: Path, most: int, chosen: list[int]
) -> None:
    (batch,) = read_images(folder_of(members, tmp_path / "f"), SHAPE, most=most)
    np.testing.assert_array_equal(batch.numpy(), images[list(chosen)].transpose(0, 3, 1, 2))


def test_files_that_are_no_images_and_hidden_ones_are_left_out(
    images: NDArray[np.uint8], members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    extra = {"README.txt": b"hello", "class0/._00.png": b"resource fork", "labels.json": b"{}"}
    for source in (folder_of(members | extra, tmp_path / "f"), zip_of(members | extra, tmp_path / "a.zip")):
        check(compute_reference(source, extractor, SHAPE), images)


def test_linked_folders_are_followed_once(
    images: NDArray[np.uint8], members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    folder_of(members, tmp_path / "elsewhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(folder)
    check(compute_reference(folder, extractor, SHAPE), images)


def test_members_with_outside_paths_are_read_and_nothing_is_written(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    outside = {f"../../{name}": content for name, content in members.items()}
    folder = tmp_path / "two" / "down"
    folder.mkdir(parents=True)
    for source in (zip_of(outside, folder / "a.zip"), tar_of(outside, folder / "a.tar", "w")):
        before = sorted(tmp_path.rglob("*"))
        assert compute_reference(source, extractor, SHAPE).n == COUNT
        assert sorted(tmp_path.rglob("*")) == before


def test_grey_models_get_luminance_and_colour_models_get_repeated_greys(tmp_path: Path) -> None:
    grey = np.random.default_rng(2).integers(0, 256, (3, 6, 4), dtype=np.uint8)
    folder = folder_of({f"{i}.png": png(image) for i, image in enumerate(grey)}, tmp_path / "grey")
    for channels in (1, 3):
        extractor = NetworkExtractor("blocks", Blocks(), 2 * channels, "0", channels, chunk=9)
        reference = compute_reference(folder, extractor, (channels, 6, 4))
        halves = grey.reshape(3, 2, 12).mean(2)
        np.testing.assert_allclose(reference.mean, np.tile(halves.mean(0), channels), rtol=1e-12)


def test_palettes_and_alpha_become_plain_colours(tmp_path: Path, extractor: NetworkExtractor) -> None:
    plain = np.zeros((6, 4, 3), np.uint8)
    plain[:3] = (255, 0, 0)
    opaque = np.dstack([plain, np.full((6, 4), 255, np.uint8)])
    contents = {"a.png": png(plain), "b.png": png(opaque), "c.png": png(plain, "P")}
    reference = compute_reference(folder_of(contents, tmp_path / "f"), extractor, SHAPE)
    np.testing.assert_array_equal(reference.mean, [255, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(reference.cov, np.zeros((6, 6)))


# --- sizes


def test_images_of_another_size_are_refused_with_both_sizes(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    members["class1/big.png"] = png(np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(InputError, match=r"big\.png is 20×10, but the model makes 4×6.*dataset\.resize"):
        load_reference(zip_of(members, tmp_path / "a.zip"), extractor, SHAPE)


def test_resizing_halves_by_box_averages_and_crops_the_centre(
    extractor: NetworkExtractor, tmp_path: Path
) -> None:
    # 32×24 (W×H) → 8×6 by two halvings, in which the chequers average out → the four columns in the middle.
    small = np.random.default_rng(3).integers(10, 240, (6, 8, 3), dtype=np.uint8)
    chequers = np.where(np.add.outer(np.arange(24), np.arange(32)) % 2, 5, -5)[:, :, None]
    large = (small.repeat(4, 0).repeat(4, 1) + chequers).astype(np.uint8)
    source = folder_of({"a.png": png(large), "b.png": png(large)}, tmp_path / "f")
    reference = compute_reference(source, extractor, SHAPE, resize=True)
    np.testing.assert_allclose(reference.mean, expected(small[None, :, 2:6].repeat(2, 0))[0])


def test_resizing_enlarges_small_images_and_leaves_fitting_ones(
    images: NDArray[np.uint8], members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    source = folder_of(members, tmp_path / "f")
    check(compute_reference(source, extractor, SHAPE, resize=True), images)
    flat = folder_of({f"{i}.png": png(np.full((3, 2, 3), 9, np.uint8)) for i in range(2)}, tmp_path / "g")
    np.testing.assert_array_equal(compute_reference(flat, extractor, SHAPE, resize=True).mean, np.full(6, 9))


# --- images that cannot be used


def test_a_corrupt_image_is_named(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    members["class0/03.png"] = members["class0/03.png"][:60]
    for source in (folder_of(members, tmp_path / "f"), tar_of(members, tmp_path / "a.tar", "w")):
        with pytest.raises(InputError, match=rf"{source.name}: class0/03\.png cannot be decoded"):
            compute_reference(source, extractor, SHAPE)


def test_sixteen_bit_images_are_refused_rather_than_clipped(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    members["deep.png"] = png(np.full((6, 4), 40000, np.uint16))
    with pytest.raises(InputError, match=r"deep\.png has pixels of mode I;16"):
        compute_reference(folder_of(members, tmp_path / "f"), extractor, SHAPE)


def test_a_cut_off_archive_is_refused(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    tarball = tar_of(members, tmp_path / "a.tar.xz", "w:xz")
    tarball.write_bytes(tarball.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"a\.tar\.xz"):
        compute_reference(tarball, extractor, SHAPE)


def test_links_in_a_tar_are_refused_rather_than_left_out(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    path = tar_of(members, tmp_path / "a.tar", "w")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("class0/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(InputError, match=r"class0/link\.png is a link"):
        compute_reference(path, extractor, SHAPE)


def test_an_oversized_member_is_refused_before_it_is_unpacked(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("objectives.reference._LARGEST", 1 << 20)
    members["bomb.png"] = bytes((1 << 20) + 1)
    for source in (zip_of(members, tmp_path / "a.zip"), tar_of(members, tmp_path / "a.tar.gz", "w:gz")):
        with pytest.raises(InputError, match=r"bomb\.png has 1048577 bytes, more than the 1048576 allowed"):
            compute_reference(source, extractor, SHAPE)
    np.savez_compressed(tmp_path / "zeros.npz", mu=np.zeros(2), sigma=np.zeros((1 << 10, 1 << 8)))
    with pytest.raises(
        InputError, match=r"zeros\.npz: sigma has 2097280 bytes, more than the 1048576 allowed"
    ):
        load_reference(tmp_path / "zeros.npz", extractor, SHAPE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "no such file or folder"),
        ("notes.txt", b"hello", "neither a folder, a zip, a tar nor an .npz"),
        ("broken.npz", b"PK\x03\x04 cut off", "cannot be read as an .npz"),
        ("nothing.npz", b"", "cannot be read as an .npz"),
    ],
)
def test_sources_that_cannot_be_used_are_named(
    name: str, content: bytes | None, message: str, extractor: NetworkExtractor, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        load_reference(tmp_path / name, extractor, SHAPE)


def test_one_image_is_too_few(extractor: NetworkExtractor, tmp_path: Path) -> None:
    source = folder_of({"a.png": png(np.zeros((6, 4, 3), np.uint8))}, tmp_path / "f")
    with pytest.raises(InputError, match="1 images found, at least 2 are needed"):
        load_reference(source, extractor, SHAPE)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "has the arrays images; it needs mu and sigma"),
        ({"arr_0": np.zeros((2, 6, 4, 3))}, "arr_0 is float64"),
        ({"arr_0": np.zeros((2, 3, 6, 4), np.uint8)}, "with C = 1 or 3"),
        ({"arr_0": np.array([{}], dtype=object)}, "the array arr_0 cannot be read"),
        ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.nan)}, "NaN"),
        ({"mu": np.zeros(6), "sigma": np.triu(np.ones((6, 6)))}, "not symmetric"),
        ({"mu": np.zeros(6), "sigma": np.zeros((6, 5))}, r"\(6, 5\)"),
        ({"mu": np.zeros(6, int), "sigma": np.eye(6)}, "mu is int64"),
        ({"mu": np.zeros(2048), "sigma": np.eye(6)}, "statistics of 2048 features, but blocks has 6"),
    ],
)
def test_an_npz_of_the_wrong_content_is_refused(
    arrays: dict[str, Any], message: str, extractor: NetworkExtractor, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=rf"a\.npz: .*{message}"):
        load_reference(tmp_path / "a.npz", extractor, SHAPE)


# --- stored statistics


def test_statistics_of_adm_and_edm_are_read_and_carry_no_claim_of_their_extractor(
    images: NDArray[np.uint8], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    mean, cov = expected(images)
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=cov)
    np.savez(tmp_path / "adm.npz", arr_0=images[:2], mu=mean, sigma=cov, mu_s=np.zeros(9), sigma_s=np.eye(9))
    edm, adm = (load_reference(tmp_path / f"{name}.npz", extractor, SHAPE) for name in ("edm", "adm"))
    for reference in (edm, adm):
        np.testing.assert_array_equal(reference.mean, mean)
        np.testing.assert_array_equal(reference.cov, cov)
        assert (reference.n, reference.fingerprint, reference.shape) == (None, None, None)
    assert edm.digest == adm.digest


def test_images_beside_statistics_of_another_dimension_are_used_instead(
    images: NDArray[np.uint8], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(2048), sigma=np.eye(8))
    check(load_reference(tmp_path / "adm.npz", extractor, SHAPE), images)


def test_saved_statistics_come_back_unchanged(
    images: NDArray[np.uint8], members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    computed = compute_reference(zip_of(members, tmp_path / "a.zip"), extractor, SHAPE)
    computed.save(tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as arrays:
        assert {"mu", "sigma", "n", "fingerprint"} <= set(arrays.files)
    loaded = load_reference(tmp_path / "stats.npz", extractor, SHAPE)
    check(loaded, images)
    assert np.array_equal(loaded.mean, computed.mean)
    assert np.array_equal(loaded.cov, computed.cov)
    assert loaded.digest == computed.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "stats.npz"]


def test_statistics_of_another_extractor_or_image_shape_are_refused(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    path = tmp_path / "stats.npz"
    compute_reference(folder_of(members, tmp_path / "f"), extractor, SHAPE).save(path)
    with pytest.raises(InputError, match=r"stats\.npz: .*shape \(3, 6, 4\), but the model makes \(3, 8, 8\)"):
        load_reference(path, extractor, (3, 8, 8))
    extractor.fingerprint = "0" * 64
    with pytest.raises(InputError, match=r"stats\.npz: .*fingerprint ffffffffffff…\) than blocks \(0000"):
        load_reference(path, extractor, SHAPE)


def test_a_gaussian_of_the_statistics_has_their_numbers(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    reference = compute_reference(folder_of(members, tmp_path / "f"), extractor, SHAPE)
    gaussian = reference.gaussian()
    np.testing.assert_array_equal(gaussian.mean.numpy(), reference.mean)
    np.testing.assert_array_equal(gaussian.cov.numpy(), reference.cov)


# --- the cache


def test_cached_statistics_are_used_until_an_image_changes(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path, cache: Path
) -> None:
    folder = folder_of(members, tmp_path / "f")
    first = load_reference(folder, extractor, SHAPE)
    assert [path.stem for path in cache.iterdir()] == [first.digest]
    extractor.network = nn.Identity()  # would fail if it were asked
    again = load_reference(zip_of(members, tmp_path / "a.zip"), extractor, SHAPE)
    assert again.digest == first.digest
    assert np.array_equal(again.cov, first.cov)
    extractor.network = Blocks()
    (folder / "class0/00.png").write_bytes(png(np.zeros((6, 4, 3), np.uint8)))
    assert not np.array_equal(load_reference(folder, extractor, SHAPE).mean, first.mean)
    assert len(list(cache.iterdir())) == 2


def test_the_features_of_all_images_are_computed_once_and_a_damaged_file_of_them_anew(
    members: dict[str, bytes],
    extractor: NetworkExtractor,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = folder_of(members, tmp_path / "images")
    features, digest = load_features(folder, extractor, SHAPE)
    statistics = load_reference(folder, extractor, SHAPE)
    assert digest == statistics.digest
    torch.testing.assert_close(features.mean(0), statistics.gaussian().mean)
    torch.testing.assert_close(features, torch.cat([extractor(b) for b in read_images(folder, SHAPE)]))
    assert has_images(folder)
    assert not has_images(cache / f"{digest}.npz")
    with monkeypatch.context() as patch:
        patch.setattr("objectives.reference.read_images", lambda *_, **__: pytest.fail("read again"))
        assert torch.equal(load_features(folder, extractor, SHAPE)[0], features)
    file = cache / f"{digest}.npy"
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(load_features(folder, extractor, SHAPE)[0], features)


def test_cached_statistics_are_kept_apart_by_extractor_and_treatment(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path, cache: Path
) -> None:
    source = zip_of(members, tmp_path / "a.zip")
    digests = {load_reference(source, extractor, SHAPE, resize=resize).digest for resize in (False, True)}
    extractor.fingerprint = "e" * 64
    digests.add(load_reference(source, extractor, SHAPE).digest)
    assert len(digests) == len(list(cache.iterdir())) == 3


def test_a_damaged_cache_file_is_computed_anew(
    images: NDArray[np.uint8],
    members: dict[str, bytes],
    extractor: NetworkExtractor,
    tmp_path: Path,
    cache: Path,
) -> None:
    source = zip_of(members, tmp_path / "a.zip")
    file = cache / f"{load_reference(source, extractor, SHAPE).digest}.npz"
    file.write_bytes(file.read_bytes()[:100])
    check(load_reference(source, extractor, SHAPE), images)
    assert load_reference(file, extractor, SHAPE).n == COUNT


def test_cache_folder_is_the_argument_or_follows_xdg(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = zip_of(members, tmp_path / "a.zip")
    load_reference(source, extractor, SHAPE, cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine" / "references").glob("*.npz"))) == 1
    monkeypatch.delenv("LAMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_reference(source, extractor, SHAPE)
    assert len(list((tmp_path / "xdg" / "lamtune" / "references").glob("*.npz"))) == 1


def test_a_cache_folder_that_cannot_be_made_is_named_before_anything_is_computed(
    members: dict[str, bytes], extractor: NetworkExtractor, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    extractor.network = nn.Identity()  # would fail if it were asked
    with pytest.raises(InputError, match=r"cannot be made .*LAMTUNE_CACHE"):
        load_reference(zip_of(members, tmp_path / "a.zip"), extractor, SHAPE, cache=tmp_path / "file")


# --- real images


def test_real_jpegs_are_decoded_as_pillow_does(shared: Path, tmp_path: Path) -> None:
    extractor = load_extractor(shared / "models" / "cifar10-features.pt", (3, 32, 32))
    members: dict[str, bytes] = {}
    with tarfile.open(shared / "data" / "cifar10-jpeg.tar.xz") as archive:
        for member in archive:
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
            if len(members) == 20:
                break
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in members.values()])
    features = extractor(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).double().numpy()
    reference = compute_reference(tar_of(members, tmp_path / "a.tar.xz", "w:xz"), extractor, (3, 32, 32))
    np.testing.assert_allclose(reference.mean, features.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reference.cov, np.cov(features, rowvar=False), rtol=1e-4, atol=1e-6)
