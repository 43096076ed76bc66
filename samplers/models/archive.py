"""Opens a torch.save archive, a zip of records in one folder, where it cannot claim more than it has.

Knows nothing of what the records mean.
"""

import zipfile
from typing import BinaryIO

from samplers.errors import InputError

MAGIC = b"PK"


class Archive:
    """The records of an uncompressed archive.

    Raises InputError that begins with `source` where it is damaged ("or no `expected`"), compressed (torch.save does
    not compress, and a small file could fill the memory), names a record twice (readers differ in which one they
    take), or claims to hold more bytes than it has.
    """

    def __init__(self, file: BinaryIO, source: str, expected: str = "archive") -> None:
        self._source = source
        size = file.seek(0, 2)
        try:
            self._zip = zipfile.ZipFile(file)
            records = self._zip.infolist()
        except Exception as error:  # a damaged archive can raise anything
            raise InputError(f"{source} is damaged, or no {expected} ({type(error).__name__})") from error
        if any(r.compress_type != zipfile.ZIP_STORED for r in records):
            raise InputError(
                f"{source} has compressed records, which files of weights never have (TorchScript has)"
            )
        if sum(r.file_size for r in records) > size:
            raise InputError(f"{source} claims to hold more bytes than it has")
        self._names = {r.filename for r in records}
        if len(self._names) != len(records):
            raise InputError(f"{source} has several records of one name")
        self._folder = records[0].filename.split("/")[0] if records else ""

    def __contains__(self, name: str) -> bool:
        return f"{self._folder}/{name}" in self._names

    def record(self, name: str) -> bytes:
        """The bytes of a record; InputError if it is absent or damaged."""
        try:
            return self._zip.read(f"{self._folder}/{name}")
        except Exception as error:  # absent, or damaged
            raise InputError(f"{self._source} lacks the record {name!r} ({type(error).__name__})") from error
