"""The one list of model families: a format's name and what the job file says of it → a `Model`.

To add a family, write its adapter and enter its name here. Knows nothing of what is inside the adapters.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from samplers.errors import InputError
from samplers.models.adm import load_adm
from samplers.models.diffusers_folder import load_diffusers
from samplers.models.digits import load_digits
from samplers.models.edm import load_edm, load_pfgmpp
from samplers.models.ideal import load_ideal
from samplers.models.protocol import Model
from samplers.models.python import load_python

Options = Mapping[str, object]


def _adm(path: str | None, options: Options, folder: Path) -> Model:
    return load_adm(folder / _needed("adm", path, "the checkpoint"), options, folder)


def _diffusers(path: str | None, options: Options, folder: Path) -> Model:
    return load_diffusers(folder / _needed("diffusers", path, "the folder"), options, folder)


def _edm(path: str | None, options: Options, folder: Path) -> Model:
    return load_edm(folder / _needed("edm", path, "the snapshot"), options)


def _pfgmpp(path: str | None, options: Options, folder: Path) -> Model:
    return load_pfgmpp(folder / _needed("pfgmpp", path, "the snapshot"), options)


def _python(path: str | None, options: Options, folder: Path) -> Model:
    return load_python(_needed("python", path, "file.py:factory or package.module:factory"), options, folder)


def _ideal(path: str | None, options: Options, folder: Path) -> Model:
    return load_ideal(None if path is None else folder / path, options)


def _digits(path: str | None, options: Options, folder: Path) -> Model:
    if path is not None:
        raise InputError("model.path: format 'digits' is bundled and takes no path; leave it out")
    return load_digits(options)


_FAMILIES: Mapping[str, Callable[[str | None, Options, Path], Model]] = {
    "adm": _adm,
    "diffusers": _diffusers,
    "digits": _digits,
    "edm": _edm,
    "ideal": _ideal,
    "pfgmpp": _pfgmpp,
    "python": _python,
}
FORMATS = tuple(_FAMILIES)


def load_model(family: str, path: str | None, options: Options, folder: Path = Path()) -> Model:
    """The model that a job file's `model:` section describes, on the CPU.

    family: its `format`, one of FORMATS. path: file (or, for "python", the factory); None where the family
    needs none. Relative paths, also those in the options, start in `folder`, that of the job file. Raises
    InputError that names the key or file at fault.
    """
    if family not in _FAMILIES:
        raise InputError(f"model.format must be one of {', '.join(FORMATS)}, not {family!r}")
    return _FAMILIES[family](path, options, folder)


def _needed(family: str, path: str | None, what: str) -> str:
    if not path:
        raise InputError(f"model.path is missing: format {family!r} needs {what}")
    return path
