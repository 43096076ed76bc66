"""Statistics of the real data in feature space: computed from images, read, written, cached.

Knows nothing of generated images, of the distance that is taken to the statistics, or of the model but its
shape.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from objectives.features import Extractor
from objectives.frechet import Gaussian
from objectives.moments import Moments
from samplers.cache import cache_root
from samplers.errors import InputError

DIGITS = "digits"
DIGITS_REFERENCE = Path(__file__).with_name("digits-reference.npz")
DIGITS_IMAGES = Path(__file__).with_name("digits-images.npz")

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) after each batch."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# 8 bits a channel, or fewer
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_LARGEST = 1 << 28  # bytes of one encoded image or statistic: an archive must not fill the memory
_BATCH = 500

_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)
_UNREADABLE = (OSError, EOFError, RuntimeError, *_ARCHIVE_ERRORS)

# An image as its source has it: the bytes of a file, or the pixels [H, W, C] of one in an .npz.
_Raw = bytes | NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Mean [D] and covariance [D, D] (n−1) of the features of the real images, float64 NumPy arrays.

    `digest` (hex SHA-256) names what was measured: for statistics computed here, the images, their treatment
    and the extractor, so that it is the same on every machine and for a folder and a zip of the same files;
    for foreign statistics, the numbers themselves. `n` (images), `fingerprint` (of the extractor) and `shape`
    (C, H, W) are None where a foreign file does not say. Raises InputError unless the numbers are finite and
    of fitting shapes.
    """

    mean: NDArray[np.float64]
    cov: NDArray[np.float64]
    digest: str
    source: str
    n: int | None = None
    fingerprint: str | None = None
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.cov.shape != (len(self.mean), len(self.mean)):
            raise InputError(
                f"{self.source}: mu has the shape {self.mean.shape} and sigma {self.cov.shape}; "
                "they have to be [D] and [D, D]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
            raise InputError(
                f"{self.source}: mu or sigma has NaN or infinite entries; compute the statistics anew"
            )
        if not np.allclose(self.cov, self.cov.T, rtol=1e-4, atol=1e-6 * float(np.abs(self.cov).max())):
            raise InputError(f"{self.source}: sigma is not symmetric, so it is no covariance")

    @property
    def dim(self) -> int:
        """D, the number of features of one image."""
        return len(self.mean)

    def gaussian(self) -> Gaussian:
        """The statistics as torch tensors on the CPU."""
        return Gaussian(torch.tensor(self.mean), torch.tensor((self.cov + self.cov.T) / 2))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz in EDM's layout (mu, sigma), with n, fingerprint, shape, digest and source in it.

        The file appears at once and whole, also when several processes write it.
        """
        path = Path(path)
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.cov, "digest": self.digest}
        arrays["source"] = self.source
        optional = {"n": self.n, "fingerprint": self.fingerprint, "shape": self.shape}
        arrays |= {key: value for key, value in optional.items() if value is not None}
        _whole(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_reference(
    source: str | os.PathLike[str],
    extractor: Extractor,
    shape: tuple[int, int, int],
    *,
    resize: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Reference:
    """The statistics of `source` in the features of `extractor`: read if stored, else computed and cached.

    `source` is "digits" (bundled), a folder of images (with its sub-folders), a .zip or .tar(.gz, .bz2, .xz)
    of images, or an .npz: statistics as ADM (mu, sigma, and more that is ignored), EDM (mu, sigma) or
    `Reference.save` write them, or images as uint8 [N, H, W, C] in arr_0. An .npz with both gives the
    statistics, as in ADM's evaluator, unless they are of another dimension than the extractor's. `shape` is
    the (C, H, W) of the model's images; images of another size are refused, or with `resize` scaled and
    cropped as in ADM's data loader. `cache` is a folder; without it `samplers.cache.cache_root`.

    Raises InputError that names the file (and its member) for whatever cannot be used or does not fit.
    """
    path = DIGITS_REFERENCE if source == DIGITS else Path(source)
    stored = _stored(path, extractor, shape)
    if stored is not None:
        return stored
    digest, count = _digest(path, extractor, shape, resize)
    file = cache_folder(cache) / f"{digest}.npz"
    if file.exists():
        try:
            cached = _stored(file, extractor, shape)
        except InputError:
            cached = None  # cut off by a full disk, say: computed anew below
        if cached is not None and cached.digest == digest:
            return cached
    reference = _computed(path, extractor, shape, resize, digest, count, progress)
    try:
        reference.save(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}): set LAMTUNE_CACHE elsewhere"
        ) from error
    return reference


def compute_reference(
    source: str | os.PathLike[str],
    extractor: Extractor,
    shape: tuple[int, int, int],
    *,
    resize: bool = False,
    progress: Progress | None = None,
) -> Reference:
    """The statistics of the images in `source` as in `load_reference`, always computed and never cached."""
    path = Path(source)
    digest, count = _digest(path, extractor, shape, resize)
    return _computed(path, extractor, shape, resize, digest, count, progress)


def has_images(source: str | os.PathLike[str]) -> bool:
    """Whether `source` (see `load_reference`) is more than statistics. Raises InputError where it cannot be read."""
    if source == DIGITS or Path(source).suffix != ".npz":
        return True
    with _npz(Path(source)) as arrays:
        return "arr_0" in arrays.files


def load_features(
    source: str | os.PathLike[str],
    extractor: Extractor,
    shape: tuple[int, int, int],
    *,
    resize: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, str]:
    """The features [N, D] of the images in `source` (see `load_reference`) on the CPU, and the digest of what they are
    of; computed once and cached beside the statistics. Raises InputError where there are no images.
    """
    path = DIGITS_IMAGES if source == DIGITS else Path(source)
    digest, count = _digest(path, extractor, shape, resize)
    file = cache_folder(cache) / f"{digest}.npy"
    with suppress(OSError, ValueError, EOFError):  # absent, or cut off by a full disk
        stored = torch.from_numpy(np.load(file, allow_pickle=False))
        if stored.shape == (count, extractor.dim) and stored.is_floating_point():
            return stored, digest
    parts: list[Tensor] = []
    for batch in read_images(path, shape, resize=resize):
        parts.append(extractor(batch).cpu())
        if progress is not None:
            progress(sum(map(len, parts)), count)
    features = torch.cat(parts)
    _whole(file, lambda opened: np.save(opened, features.numpy(), allow_pickle=False))
    return features, digest


def image_shape(source: str | os.PathLike[str], side: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the first image in `source` (see `load_reference`), C = 1 for grey and 3 otherwise.

    With `side` H and W are that, for images that will be resized. Raises InputError as `load_reference` does.
    """
    path = Path(source)
    name, raw = next(_images(path), (None, b""))
    if name is None:
        raise InputError(
            f"{path}: no images found; images are files that end in {', '.join(sorted(_SUFFIXES))}"
        )
    try:
        image = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else Image.fromarray(raw.squeeze())
    except Exception as error:  # Pillow's plugins raise errors of many kinds
        raise InputError(f"{path}: {name} cannot be decoded: {error}") from error
    channels = 1 if image.mode in ("1", "L", "LA") else 3
    return (channels, side or image.height, side or image.width)


def read_images(
    source: str | os.PathLike[str],
    shape: tuple[int, int, int],
    *,
    resize: bool = False,
    most: int | None = None,
) -> Iterator[Tensor]:
    """The images of `source` (see `load_reference`) in batches of up to 500, uint8 [B, *shape] on the CPU.

    "digits" has its images beside its statistics. With `most` no more than that many, spread evenly over the source:
    the first ones would all be of one class where a class has a folder. Raises InputError as `load_reference` does; no
    images are no batches.
    """
    path = DIGITS_IMAGES if source == DIGITS else Path(source)
    images = _images(path)
    if most is not None:
        count = sum(1 for _ in _images(path))
        chosen = {i * count // most for i in range(most)} if count > most else set(range(count))
        images = (image for i, image in enumerate(images) if i in chosen)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while batch := list(islice(images, _BATCH)):
            pixels = list(pool.map(lambda item: _pixels(path, item[0], item[1], shape, resize), batch))
            yield torch.from_numpy(np.stack(pixels))


def _whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file that appears at once, whoever else writes it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _computed(
    path: Path,
    extractor: Extractor,
    shape: tuple[int, int, int],
    resize: bool,
    digest: str,
    count: int,
    progress: Progress | None,
) -> Reference:
    moments: Moments | None = None
    for batch in read_images(path, shape, resize=resize):
        new = Moments.of(extractor(batch))
        moments = new if moments is None else moments + new
        if progress is not None:
            progress(moments.n, count)
    assert moments is not None, "_digest refuses a source without images"
    mean, cov = moments.mean.cpu().numpy(), moments.cov.cpu().numpy()
    return Reference(mean, cov, digest, path.name, moments.n, extractor.fingerprint, shape)


def _digest(path: Path, extractor: Extractor, shape: tuple[int, int, int], resize: bool) -> tuple[str, int]:
    """What names the statistics (see `Reference`), and the number of images.

    Every byte of the images is read: names, sizes and dates do not tell a changed image.
    """
    contents = (raw if isinstance(raw, bytes) else raw.tobytes() for _, raw in _images(path))
    hashes = sorted(hashlib.sha256(content).digest() for content in contents)
    if len(hashes) < 2:
        raise InputError(
            f"{path}: {len(hashes)} images found, at least 2 are needed; "
            f"images are files that end in {', '.join(sorted(_SUFFIXES))}"
        )
    digest = hashlib.sha256(b"".join(hashes))
    digest.update(f"{extractor.fingerprint} {shape} {resize}".encode())
    return digest.hexdigest(), len(hashes)


def _images(path: Path) -> Iterator[tuple[str, _Raw]]:
    """Name and content of every image of a folder (sorted), an archive (in its order) or an .npz."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder of images or statistics")
    try:
        if path.is_dir():
            for file in _files(path):
                yield str(file.relative_to(path)), file.read_bytes()
        elif path.suffix == ".npz":  # which is a zip too
            yield from _npz_images(path)
        elif zipfile.is_zipfile(path):
            yield from _zip_images(path)
        elif tarfile.is_tarfile(path):
            yield from _tar_images(path)
        else:
            raise InputError(f"{path}: neither a folder, a zip, a tar nor an .npz of images or statistics")
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read to its end: {error}") from error


def _files(folder: Path) -> list[Path]:
    """The image files below a folder, also behind links; a linked folder is entered once."""
    found, entered = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in entered:
            folders.clear()
            continue
        entered.add(real)
        found += [Path(parent, name) for name in names if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    # macOS puts "._cat.png" beside "cat.png" into its archives.
    member = PurePosixPath(name)
    return member.suffix.lower() in _SUFFIXES and not member.name.startswith(".")


def _zip_images(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.filename):
            if not member.is_dir() and _is_image(member.filename):
                _check_size(path, member.filename, member.file_size)
                yield member.filename, archive.read(member)


def _tar_images(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isdir() or not _is_image(member.name):
                continue
            if not member.isreg():
                raise InputError(
                    f"{path}: {member.name} is a link; pack the files with tar -h --hard-dereference"
                )
            _check_size(path, member.name, member.size)
            file = archive.extractfile(member)
            assert file is not None
            yield member.name, file.read()


def _check_size(path: Path, name: str, size: int) -> None:
    if size > _LARGEST:
        raise InputError(f"{path}: {name} has {size} bytes, more than the {_LARGEST} allowed for one image")


def _npz_images(path: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    with _npz(path) as arrays:
        if "arr_0" not in arrays:
            raise InputError(
                f"{path}: has the arrays {', '.join(arrays.files) or '(none)'}; "
                "it needs mu and sigma (statistics), or arr_0 (images)"
            )
        images = _array(path, arrays, "arr_0")
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise InputError(
            f"{path}: arr_0 is {images.dtype} {images.shape}; images are uint8 [N, H, W, C] with C = 1 or 3"
        )
    for index, image in enumerate(images):
        yield f"arr_0[{index}]", image


def _pixels(path: Path, name: str, raw: _Raw, shape: tuple[int, int, int], resize: bool) -> NDArray[np.uint8]:
    """One image as uint8 [C, H, W] of `shape`."""
    channels, height, width = shape
    try:
        if isinstance(raw, bytes):
            image: Image.Image = Image.open(io.BytesIO(raw))
        else:
            image = Image.fromarray(raw[:, :, 0] if raw.shape[2] == 1 else raw)
        # The header is enough for these two, so nothing huge is decoded in vain.
        if image.size != (width, height) and not resize:
            raise InputError(
                f"{path}: {name} is {image.size[0]}×{image.size[1]}, but the model makes {width}×{height}; "
                "give images of that size, or set dataset.resize to scale and crop them"
            )
        if image.mode not in _MODES:
            raise InputError(
                f"{path}: {name} has pixels of mode {image.mode}; convert it to 8 bits a channel"
            )
        image = image.convert("L" if channels == 1 else "RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of many kinds
        raise InputError(f"{path}: {name} cannot be decoded: {error}") from error
    if image.size != (width, height):
        image = _centre(image, width, height)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The centre of an image, in the way of ADM's data loader.

    Halved by box averages while both sides stay at least twice the target, then one bicubic step, then
    cropped.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _stored(path: Path, extractor: Extractor, shape: tuple[int, int, int]) -> Reference | None:
    """The statistics in an .npz, or None if there are none; raises InputError if they do not fit."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    with _npz(path) as arrays:
        if not {"mu", "sigma"} <= set(arrays.files):
            return None
        mean, cov = (_real(path, arrays, key) for key in ("mu", "sigma"))
        if mean.shape != (extractor.dim,) and "arr_0" in arrays:
            return None
        own = {
            key: _array(path, arrays, key) for key in ("fingerprint", "n", "shape", "digest") if key in arrays
        }
    fingerprint = str(own["fingerprint"]) if "fingerprint" in own else None
    stored_shape = tuple(int(side) for side in own["shape"].ravel()) if "shape" in own else None
    numbers = hashlib.sha256(mean.tobytes() + cov.tobytes()).hexdigest()
    digest = str(own["digest"]) if "digest" in own else numbers
    if fingerprint not in (None, extractor.fingerprint):
        raise InputError(
            f"{path}: the statistics are of another extractor (fingerprint {str(fingerprint)[:12]}…) than "
            f"{extractor.name} ({extractor.fingerprint[:12]}…); give the images, or the features they are of"
        )
    if mean.shape != (extractor.dim,):
        raise InputError(
            f"{path}: statistics of {mean.size} features, but {extractor.name} has {extractor.dim}; "
            "give statistics of this extractor or the images themselves"
        )
    if stored_shape not in (None, shape):
        raise InputError(f"{path}: statistics of images of shape {stored_shape}, but the model makes {shape}")
    n = int(own["n"]) if "n" in own else None
    return Reference(mean, cov, digest, path.name, n, fingerprint, shape if stored_shape else None)


def _npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as an .npz file: {error}") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: holds one bare array; an .npz file of named arrays is needed")
    return arrays


def _array(path: Path, arrays: np.lib.npyio.NpzFile, key: str) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = arrays[key]
    except Exception as error:  # a cut-off or pickled member
        raise InputError(f"{path}: the array {key} cannot be read: {error}") from error
    return array


def _real(path: Path, arrays: np.lib.npyio.NpzFile, key: str) -> NDArray[np.float64]:
    assert arrays.zip is not None, "the archive is open"
    if (size := arrays.zip.getinfo(f"{key}.npy").file_size) > _LARGEST:  # zeros pack to nearly nothing
        raise InputError(f"{path}: {key} has {size} bytes, more than the {_LARGEST} allowed for statistics")
    array = _array(path, arrays, key)
    if array.dtype.kind != "f":
        raise InputError(f"{path}: {key} is {array.dtype}; statistics have to be floating")
    return array.astype(np.float64)


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of cached statistics (see `load_reference`), made if need be.

    Raises InputError where it cannot be written to, so that it is known before a long computation starts.
    """
    folder = Path(cache or cache_root(), "references")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made ({error.strerror}): set LAMTUNE_CACHE elsewhere"
        ) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to: set LAMTUNE_CACHE elsewhere")
    return folder
