"""HDF5 files and zarr folders looked at before they are read: nothing outside them, nothing that is not stored."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from lingshu_cell.errors import LingshuError

_HARMLESS_BYTES = 1 << 28
_MOST_COMPRESSED = 5000  # times; gzip reaches 1,032 with zeros only, faster codecs some thousand
_CODECS_THAT_EXECUTE = ("pickle",)
_SPARSE = ("csr_matrix", "csc_matrix")


def check_hdf5(file: h5py.File, called: str) -> None:
    """Refuse an HDF5 file that leads to other files, or announces arrays that it does not hold.

    Parameters
    ----------
    file
        An open file.
    called
        Its name in errors.

    Raises
    ------
    LingshuError
        For external links, values stored in other files, virtual datasets, and arrays far larger than their bytes.
    """
    for name, dataset in _datasets(file, called):
        if dataset.external or dataset.is_virtual:
            raise _outside(called, name)
        if dataset.shape is None:
            continue
        announced = int(dataset.size) * dataset.dtype.itemsize
        if announced > max(_HARMLESS_BYTES, _MOST_COMPRESSED * dataset.id.get_storage_size()):
            raise _not_stored(called, name, announced, dataset.id.get_storage_size())


def _datasets(group: h5py.Group, called: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """Go through all datasets by hard links, which makes no circles."""
    names: list[str] = []
    group.visititems_links(lambda name, link: names.append(name) if isinstance(link, h5py.ExternalLink) else None)
    if names:
        raise _outside(called, names[0])
    found: list[tuple[str, h5py.Dataset]] = []
    group.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    yield from found


def check_folder(folder: Path) -> None:
    """Refuse a folder, of zarr or of 10x, with pipes or devices among its files, or folders elsewhere.

    Raises
    ------
    LingshuError
        For anything that is neither a file nor a folder within it, or may not be looked at.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    check_folder(Path(entry.path))
                elif not entry.is_file():
                    raise LingshuError(
                        "A folder of data holds files", f"{entry.path} is none", "Copy, download or write it again"
                    )
    except OSError as error:
        raise LingshuError("The data file must be readable", f"{folder}: {error.strerror}", "Check it") from None


def check_zarr(group: Any, called: str) -> None:
    """Refuse a zarr group that would execute code, or announces arrays that it does not hold.

    Parameters
    ----------
    group
        The open group, in a folder that :func:`check_folder` accepts.
    called
        Its name in errors.

    Raises
    ------
    LingshuError
        For pickling codecs, and arrays far larger than their bytes.
    """
    for name, array in group.members(max_depth=None):
        if not hasattr(array, "dtype"):
            continue
        if any(word in str(array.metadata.to_dict()).lower() for word in _CODECS_THAT_EXECUTE):
            finding = f"{called}: {name} is stored by a codec that would execute it"
            raise LingshuError("A data file holds data only", finding, "Write it again with AnnData.write_zarr")
        announced = int(array.nbytes)
        if announced > _HARMLESS_BYTES and announced > _MOST_COMPRESSED * (stored := array.nbytes_stored()):
            raise _not_stored(called, name, announced, stored)
        parent = group[name.rpartition("/")[0]] if "/" in name else group
        is_values = name.endswith("/data") and parent.attrs.get("encoding-type") in _SPARSE
        if is_values and array.shards is None and array.nchunks_initialized < array.nchunks:
            # A chunk of nothing but zeros may be left out, but values that are zero have no place in a sparse matrix.
            finding = f"{called}: {array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks of {name} lack"
            raise LingshuError("The data file must be whole", finding, "Copy, download or write it again")


def _outside(called: str, name: str) -> LingshuError:
    return LingshuError(
        "A data file must hold its own data",
        f"{called}: {name} leads to another file",
        "Read it with anndata and write it again with write_h5ad",
    )


def _not_stored(called: str, name: str, announced: int, stored: int) -> LingshuError:
    return LingshuError(
        "The data file must be whole",
        f"{called}: {name} announces {announced:,} bytes and holds {stored:,}",
        "Copy, download or write it again",
    )
