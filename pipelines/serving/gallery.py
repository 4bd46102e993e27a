"""Gallery of known faces.

A gallery is a Parquet file with a row for each picture of a known person: ``person``, ``file``, ``embedding``; its
metadata name the model. Beside a large one lies an index, ``GALLERY.faiss``, which is rebuilt when the gallery grows.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datamodules.forms import FaceForm
from pipelines.engine.disk import whole

LARGE = 50_000  # pictures from which on a gallery is searched through an index
PROBES = 64  # cells of the index that a search looks into

Floats = NDArray[np.float32]


class Gallery:
    """Embeddings of known people.

    Args:
        model: address of the registered model that made them.
        people: name of the person on each picture, N.
        files: the pictures, N.
        embeddings: float32 N×D, of length one.
        form: how faces were cut out of the pictures; None for whole pictures.
    """

    def __init__(
        self, model: str, people: list[str], files: list[str], embeddings: Floats, form: FaceForm | None = None
    ) -> None:
        self.model, self.people, self.files, self.embeddings, self.form = model, people, files, embeddings, form
        self._index: Any = None

    def __len__(self) -> int:
        return len(self.people)

    @classmethod
    def read(cls, file: str | Path) -> "Gallery":
        """Reads a gallery that `write` wrote.

        Raises:
            ValueError: there is no such file, or it is no gallery.
        """
        if not Path(file).is_file():
            raise ValueError(f"There is no gallery {Path(file).resolve()}: make one with enrol.")
        try:
            table = pq.read_table(file)
            said = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            form: Any = said.get("fovea.faces")
            column = table["embedding"].combine_chunks()
            embeddings = column.values.to_numpy().reshape(len(table), -1).astype(np.float32, copy=False)
            people, files = table["person"].to_pylist(), table["file"].to_pylist()
            gallery = cls(said["fovea.model"], people, files, embeddings, form)
        except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{Path(file).resolve()} is not a gallery of Fovea's: {error!r:.200}.") from None
        index = Path(f"{file}.faiss")
        if len(gallery) >= LARGE and index.is_file():
            gallery._index = faiss.read_index(str(index))
            gallery._index.nprobe = PROBES
        return gallery

    def write(self, file: str | Path) -> None:
        """Writes the gallery, and its index if it is large, atomically."""
        size = self.embeddings.shape[1]
        column = pa.FixedSizeListArray.from_arrays(pa.array(self.embeddings.ravel()), size)
        table = pa.table({"person": self.people, "file": self.files, "embedding": column})
        said = {"fovea.model": self.model} | ({"fovea.faces": self.form} if self.form else {})
        Path(f"{file}.faiss").unlink(missing_ok=True)  # which would be of other rows after a kill
        with whole(file) as part:
            pq.write_table(table.replace_schema_metadata(said), part)
        if len(self) >= LARGE:
            with whole(f"{file}.faiss") as part:
                faiss.write_index(self.index, str(part))

    @property
    def index(self) -> Any:
        """faiss index over inner products: exact for a small gallery, inverted lists for a large one."""
        if self._index is None or self._index.ntotal != len(self):
            size = self.embeddings.shape[1]
            self._index = faiss.IndexFlatIP(size)
            if len(self) >= LARGE:
                cells = int(len(self) ** 0.5)
                self._index = faiss.IndexIVFFlat(self._index, size, cells, faiss.METRIC_INNER_PRODUCT)
                self._index.cp.niter, self._index.cp.max_points_per_centroid = 8, 64
                self._index.train(self.embeddings)
                self._index.nprobe = PROBES
            self._index.add(self.embeddings)
        return self._index

    def search(self, embeddings: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Finds the nearest gallery picture for each of M embeddings, float32 M×D.

        Returns:
            Squared distances and places in the gallery, M each.
        """
        product, place = self.index.search(np.ascontiguousarray(embeddings, np.float32), 1)
        return (2 - 2 * product[:, 0]).clip(0, 4), place[:, 0]
