"""Fixtures shared by all tests."""

import io
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import TypeAdapter
from sqlalchemy import URL, Engine, create_engine, make_url, text

from benchmarks.servers import new_database, postgresql


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the project; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("the reference material (../shared) is not here")
    return folder


@dataclass(frozen=True, eq=False)
class Made:
    """In a pickle: `name` called with `args`, by the opcode REDUCE or NEWOBJ, and given a state by BUILD."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    opcode: bytes = pickle.REDUCE


@dataclass(frozen=True, eq=False)
class Named:
    """In a pickle: a class or function."""

    name: str


@dataclass(frozen=True, eq=False)
class Referred:
    """In a pickle: a reference to what lies outside of it."""

    key: Any


class Wire:
    """Writes pickles of protocol 4 opcode by opcode, so that no class that they name has to exist.

    As a pickler does it: what is met again is not written again.
    """

    Made = Made
    Named = Named
    Referred = Referred

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x04")
        self._memo: dict[object, tuple[int, Any]] = {}

    @classmethod
    def dumps(cls, value: Any) -> bytes:
        """The pickle of None, bool, int, float, str, bytes, tuple, list, dict, Made, Named and Referred."""
        wire = cls()
        wire._put(value)
        return bytes(wire._out + pickle.STOP)

    def _put(self, value: Any) -> None:
        key = value if isinstance(value, str) else id(value)
        if key in self._memo:
            self._out += pickle.LONG_BINGET + struct.pack("<I", self._memo[key][0])
        elif value is None or isinstance(value, bool | int | float):
            self._out += pickle.dumps(value, 3)[2:-1]
        else:
            self._write(value)
            self._out += pickle.MEMOIZE
            self._memo[key] = len(self._memo), value  # kept, so that no other value gets its id
            if isinstance(value, Made) and value.state is not None:
                self._put(value.state)
                self._out += pickle.BUILD

    def _write(self, value: Any) -> None:
        match value:
            case Named():
                module, _, name = value.name.rpartition(".")
                self._all((module, name), pickle.STACK_GLOBAL)
            case Made():
                self._all((Named(value.name), value.args), value.opcode)
            case Referred():
                self._all((value.key,), pickle.BINPERSID)
            case str():
                text = value.encode()
                self._out += pickle.BINUNICODE + struct.pack("<I", len(text)) + text
            case bytes():
                self._out += pickle.BINBYTES + struct.pack("<I", len(value)) + value
            case tuple():
                self._out += pickle.MARK
                self._all(value, pickle.TUPLE)
            case list():
                self._out += pickle.EMPTY_LIST + pickle.MARK
                self._all(value, pickle.APPENDS)
            case dict():
                self._out += pickle.EMPTY_DICT + pickle.MARK
                self._all([part for item in value.items() for part in item], pickle.SETITEMS)

    def _all(self, values: Iterable[Any], opcode: bytes) -> None:
        for value in values:
            self._put(value)
        self._out += opcode


@pytest.fixture(scope="session")
def wire() -> type[Wire]:
    """Writes any pickle, also one that no pickler would write."""
    return Wire


class Nvidia:
    """Network snapshots of EDM's code base as plain data for `Wire`; tensors get random numbers of a fixed seed."""

    source = "raise RuntimeError('the source embedded in a snapshot must never be executed')"

    @classmethod
    def snapshot(
        cls, precond: str = "EDMPrecond", network: str = "SongUNet", **settings: Any
    ) -> dict[str, Any]:
        """A snapshot of a small random network; `settings` are network arguments and `attributes`."""
        import torch

        from samplers.models.dhariwal import DhariwalArchitecture, DhariwalUNet
        from samplers.models.song import SongArchitecture, SongUNet

        attributes = {"img_channels": 3, "img_resolution": 8, "label_dim": 0, **cls.levels[precond]}
        attributes |= settings.pop("attributes", {})
        buffers = settings.pop("buffers", {})
        small = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
        sides = {"img_resolution": attributes["img_resolution"], "label_dim": attributes["label_dim"]}
        channels = attributes["img_channels"]
        out = 2 * channels if precond == "iDDPMPrecond" else channels
        kwargs = {**sides, "in_channels": channels, "out_channels": out, **small, **settings}
        kind, build = (
            (SongArchitecture, SongUNet) if network == "SongUNet" else (DhariwalArchitecture, DhariwalUNet)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = build(TypeAdapter(kind).validate_python(kwargs))
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return {
            "ema": cls.persistent(
                precond,
                {"_init_args": (), "_init_kwargs": {**small, "use_fp16": False}, **attributes},
                buffers=buffers,
                modules={"model": cls.module(module, network, kwargs)},
            ),
            "loss_fn": cls.persistent("EDMLoss", {"P_mean": -1.2}),
            "augment_pipe": None,
            "dataset_kwargs": {"path": "datasets/tiny.zip", "max_size": 50000},
        }

    levels: ClassVar[dict[str, dict[str, Any]]] = {
        "EDMPrecond": {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5},
        "VPPrecond": {"sigma_min": 0.001, "sigma_max": 152.0, "beta_d": 19.9, "beta_min": 0.1, "M": 1000},
        "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
        "iDDPMPrecond": {"sigma_min": 0.0064, "sigma_max": 20291.0, "M": 1000},
    }

    @classmethod
    def module(cls, module: Any, name: str, kwargs: Mapping[str, Any] | None = None) -> Made:
        """A torch module as it stands in a snapshot."""
        children = {
            key: cls.module(child, type(child).__name__)
            for key, child in module.named_children()
            if any(True for _ in child.state_dict())
        }
        tensors = {key: cls.tensor(value) for key, value in module._parameters.items() if value is not None}
        buffers = {key: cls.tensor(value) for key, value in module._buffers.items()}
        if name == "ModuleDict":
            state = cls.state({}, {}, {}, children)
            return Made("torch.nn.modules.container.ModuleDict", (), state, pickle.NEWOBJ)
        double = Made("numpy.dtype", ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
        scale = Made("numpy.core.multiarray.scalar", (double, struct.pack("<d", 0.5)))
        attributes = {"_init_args": (), "_init_kwargs": dict(kwargs or {}), "skip_scale": scale}
        return cls.persistent(name, attributes, tensors, buffers, children)

    @classmethod
    def persistent(
        cls,
        name: str,
        attributes: Mapping[str, Any],
        parameters: Mapping[str, Any] | None = None,
        buffers: Mapping[str, Any] | None = None,
        modules: Mapping[str, Any] | None = None,
    ) -> Made:
        """An object that the official loader would make by running `source`."""
        state = cls.state(attributes, parameters or {}, buffers or {}, modules or {})
        about = {"type": "class", "version": 6, "module_src": cls.source, "class_name": name, "state": state}
        return Made("torch_utils.persistence._reconstruct_persistent_obj", (about,))

    @staticmethod
    def state(
        attributes: Mapping[str, Any],
        parameters: Mapping[str, Any],
        buffers: Mapping[str, Any],
        modules: Mapping[str, Any],
    ) -> dict[str, Any]:
        """A module's attributes."""
        hooks = Made("collections.OrderedDict")
        return {
            "training": False,
            "_parameters": dict(parameters),
            "_buffers": dict(buffers),
            "_forward_hooks": hooks,
            "_modules": dict(modules),
            **attributes,
        }

    @classmethod
    def tensor(cls, value: Any) -> Made:
        """A parameter of a module."""
        storage = Made("torch.storage._load_from_bytes", (cls.storage(value),))
        return cls.parameter(storage, 0, tuple(value.shape), tuple(value.contiguous().stride()))

    @staticmethod
    def parameter(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Made:
        """A parameter of a storage."""
        hooks = Made("collections.OrderedDict")
        tensor = Made("torch._utils._rebuild_tensor_v2", (storage, offset, size, stride, False, hooks))
        return Made("torch._utils._rebuild_parameter", (tensor, False, hooks))

    @staticmethod
    def storage(value: Any) -> bytes:
        """The numbers of a tensor as torch.save wrote them before it wrote archives."""
        import torch

        file = io.BytesIO()
        torch.save(
            value.detach().contiguous().clone()._typed_storage(), file, _use_new_zipfile_serialization=False
        )
        return file.getvalue()


@pytest.fixture(scope="session")
def nvidia() -> type[Nvidia]:
    """Parts of network snapshots in NVIDIA's format."""
    return Nvidia


@pytest.fixture
def save_snapshot(tmp_path: Path) -> Callable[..., Path]:
    """save_snapshot(precond, network, name=..., **settings): writes a small random network as NVIDIA's code would."""

    def save(
        precond: str = "EDMPrecond",
        network: str = "SongUNet",
        name: str = "network-snapshot.pkl",
        **settings: Any,
    ) -> Path:
        file = tmp_path / name
        file.write_bytes(Wire.dumps(Nvidia.snapshot(precond, network, **settings)))
        return file

    return save


class DiffusersFolders:
    """Writes tiny random networks of the diffusers library in the layout of its pipelines."""

    betas: ClassVar[dict[str, Any]] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }

    def __init__(self, root: Path) -> None:
        self.root = root

    def pipeline(
        self, *, scheduler: str = "DDPMScheduler", config: Mapping[str, Any] | None = None, **parts: Any
    ) -> Path:
        """A folder with a scheduler and `parts` (folder name → module)."""
        import diffusers

        for name, part in parts.items():
            part.save_pretrained(self.root / name)
        getattr(diffusers, scheduler)(**(config or {})).save_pretrained(self.root / "scheduler")
        return self.root

    @staticmethod
    def unet(seed: int = 0, channels: int = 3, **settings: Any) -> Any:
        """A UNet2DModel of two levels for 8×8 states."""
        import diffusers
        import torch

        torch.manual_seed(seed)
        return diffusers.UNet2DModel(
            **{
                "sample_size": 8,
                "in_channels": channels,
                "out_channels": channels,
                "layers_per_block": 1,
                "block_out_channels": (16, 32),
                "norm_num_groups": 8,
                "attention_head_dim": 8,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            }
            | settings
        ).eval()

    @staticmethod
    def conditional(seed: int = 0, **settings: Any) -> Any:
        """A UNet2DConditionModel for 8×8 latents of three channels that attends to a context of width 16."""
        import diffusers
        import torch

        torch.manual_seed(seed)
        return diffusers.UNet2DConditionModel(
            **{
                "sample_size": 8,
                "in_channels": 3,
                "out_channels": 3,
                "layers_per_block": 1,
                "block_out_channels": (16, 32),
                "norm_num_groups": 8,
                "attention_head_dim": 8,
                "cross_attention_dim": 16,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            }
            | settings
        ).eval()

    @staticmethod
    def dit(seed: int = 0, **settings: Any) -> Any:
        """A DiTTransformer2DModel with learned variance for 4×4 latents of four channels."""
        import diffusers
        import torch

        torch.manual_seed(seed)
        return diffusers.DiTTransformer2DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "sample_size": 4,
                "norm_num_groups": 4,
            }
            | settings
        ).eval()

    @staticmethod
    def vq(seed: int = 1) -> Any:
        """A VQModel with three channels of latents, at half the size of its images."""
        import diffusers
        import torch

        torch.manual_seed(seed)
        model = diffusers.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            num_vq_embeddings=32,
            norm_num_groups=4,
            scaling_factor=0.5,
        ).eval()
        torch.nn.init.normal_(model.quantize.embedding.weight)
        return model

    @staticmethod
    def kl(seed: int = 1, **settings: Any) -> Any:
        """An AutoencoderKL with four channels of latents, at half the size of its images."""
        import diffusers
        import torch

        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            **{
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4,
                "norm_num_groups": 4,
            }
            | settings
        ).eval()


@pytest.fixture
def folders(tmp_path: Path) -> DiffusersFolders:
    """Tiny pipelines of the diffusers library, in tmp_path/pipeline."""
    return DiffusersFolders(tmp_path / "pipeline")


# --- databases: a SQLite file and a real PostgreSQL, with awkward names --------------------------------------


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    """A PostgreSQL in which databases may be made: LAMTUNE_TEST_POSTGRESQL (a URL), else one started here."""
    given = os.environ.get("LAMTUNE_TEST_POSTGRESQL")
    if given:
        yield make_url(given).set(drivername="postgresql+psycopg")
        return
    pytest.importorskip("psycopg")
    try:
        with postgresql() as server:
            yield server.url
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def postgresql_database(postgresql_server: URL) -> Iterator[Engine]:
    """A database of our own in that server."""
    url = new_database(postgresql_server)
    server = create_engine(postgresql_server, isolation_level="AUTOCOMMIT")
    database = create_engine(url, pool_pre_ping=True)  # tests may end its connections
    yield database
    database.dispose()
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {url.database} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def postgresql_url(postgresql_database: Engine) -> str:
    """A PostgreSQL database, emptied: far quicker than a new one."""
    with postgresql_database.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    return postgresql_database.url.render_as_string(hide_password=False)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path}/store {{x}}%20.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind in turn."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found
