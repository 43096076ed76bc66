"""Pictures of evaluations as Optuna's artifacts, kept in the database, which every process of a search and its
dashboard reach. Knows nothing of what they show.
"""

import io
from typing import TYPE_CHECKING, BinaryIO

from storage.errors import NotInStore

if TYPE_CHECKING:
    from storage.store import Store


class Pictures:
    """An artifact store of Optuna (its ArtifactStore protocol): ids and contents, each once written.

    evaluation_id: whose pictures are written; None: to read only.
    """

    def __init__(self, store: "Store", evaluation_id: int | None = None) -> None:
        self._store, self._evaluation_id = store, evaluation_id

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The content; Optuna's ArtifactNotFound where there is none."""
        from optuna.artifacts.exceptions import ArtifactNotFound

        try:
            return io.BytesIO(self._store.picture(artifact_id))
        except NotInStore as error:
            raise ArtifactNotFound(str(error)) from None

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keep a picture of the evaluation."""
        assert self._evaluation_id is not None, "to read only"
        self._store.add_picture(self._evaluation_id, artifact_id, content_body.read())

    def remove(self, artifact_id: str) -> None:
        """Refused: what was measured stays."""
        raise PermissionError(f"the picture {artifact_id} belongs to an evaluation")
