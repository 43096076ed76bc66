"""search.blocks: features survive on the disk, and a bad disk costs its block and nothing else."""

import os
from pathlib import Path

import numpy as np
import pytest

from search.blocks import FeatureCache, trim


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the features of these tests are kept."""
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path))
    return tmp_path / "features"


def features(images: int = 4, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(images).normal(size=(images, 3)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_block_survives_to_the_last_bit_and_in_its_type(dtype: type) -> None:
    FeatureCache("k1").save(0, features(dtype=dtype))
    found = FeatureCache("k1").load(0, 4)
    assert found is not None
    assert found.dtype == dtype
    assert np.array_equal(found, features(dtype=dtype))


def test_other_blocks_keys_and_numbers_of_images_are_not_there() -> None:
    FeatureCache("k1").save(0, features())
    assert FeatureCache("k1").load(1, 4) is None
    assert FeatureCache("k2").load(0, 4) is None
    assert FeatureCache("k1").load(0, 5) is None


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array", None, "pickle"])
def test_a_damaged_file_costs_its_block_until_it_is_written_again(folder: Path, content: object) -> None:
    cache = FeatureCache("k1")
    cache.save(0, features())
    cache.save(1, features())
    (file,) = folder.glob("*/k1/0.npy")
    if content is None:
        file.write_bytes(file.read_bytes()[:-5])
    elif content == "pickle":
        np.save(file, np.array([object()]), allow_pickle=True)
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
    assert cache.load(0, 4) is None
    assert cache.load(1, 4) is not None
    cache.save(0, features())
    assert cache.load(0, 4) is not None


def test_nothing_half_written_stays_behind(folder: Path) -> None:
    FeatureCache("k1").save(0, features())
    assert [file.name for file in folder.glob("*/k1/*")] == ["0.npy"]


def test_a_disk_that_takes_nothing_is_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        FeatureCache("k1").save(0, features())
    assert FeatureCache("k1").load(0, 4) is None
    assert list(folder.glob("*/k1/*")) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "file"))  # a folder cannot be made there
    FeatureCache("k1").save(0, features())
    assert FeatureCache("k1").load(0, 4) is None
    trim()


def test_trimming_deletes_the_oldest_keys_first_until_the_rest_fits(folder: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        FeatureCache(name).save(0, features(100))
        (key,) = folder.glob(f"*/{name}")
        os.utime(key, (1e9 - age, 1e9 - age))
    size = next(folder.glob("*/new/0.npy")).stat().st_size
    trim(3 * size)
    assert len(list(folder.glob("*/*"))) == 3
    trim(2 * size)
    assert {key.name for key in folder.glob("*/*")} == {"new", "middle"}
    trim(2 * size - 1)
    assert {key.name for key in folder.glob("*/*")} == {"new"}
    trim(0)
    assert list(folder.glob("*/*")) == []
