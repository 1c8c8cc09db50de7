"""EMNIST, CIFAR-10 and CIFAR-100 through TensorFlow Datasets (TFDS), without TensorFlow.

TFDS reads and writes its `array_record` format without TensorFlow. Two things in it still need
TensorFlow: its default format (`tfrecord`), and its builders of these three sets, which open
their sources with `tf.io` and encode image arrays with `tf.image`. So this module prepares
the sets with small builders of its own, which read the same official archives (TFDS downloads
them and checks their SHA-256) and store plain `uint8` arrays:

| name       | own data set           | TFDS's own data set | training + test   | image       |
|------------|------------------------|---------------------|-------------------|-------------|
| `emnist`   | `emnist_byclass_uint8` | `emnist/byclass`    | 697 932 + 116 323 | 28 x 28 x 1 |
| `cifar10`  | `cifar10_uint8`        | `cifar10`           | 50 000 + 10 000   | 32 x 32 x 3 |
| `cifar100` | `cifar100_uint8`       | `cifar100`          | 50 000 + 10 000   | 32 x 32 x 3 |

`load_tfds` reads the own data set where there is one, else TFDS's own if that was prepared with
`file_format="array_record"` (its PNG images are decoded with Pillow). The two hold the same
examples in a different order: the own data sets keep the order of the archives, TFDS shuffles.

Nothing is ever downloaded by reading. To prepare a set, once, with a network:

    python -m fedjax_mtl.data.tfds_sets emnist --data_dir=DIR

Without a network, first put the archive into `DIR/downloads/manual` under the file name that ends
its address in `ARCHIVES`; its SHA-256 is checked there too.

Sources:
    Cohen, Afshar, Tapson and van Schaik, "EMNIST: Extending MNIST to handwritten letters", 2017.
    Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import os
import re
import shlex
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fedjax_mtl.core.checks import InputError

NAMES = ("emnist", "cifar10", "cifar100")

ARCHIVES: dict[str, str] = {
    "emnist": "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
}
"""Official archives. TFDS ships their sizes and SHA-256 and checks them on download."""

NORMALISE: dict[str, dict[str, tuple[float, ...]]] = {
    "emnist": {"mean": (0.1307,), "std": (0.3081,)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "cifar100": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
}
"""Per-channel mean and standard deviation for images scaled to [0, 1]:
`(inputs / 255 - mean) / std`. One entry per channel, so both broadcast over [..., H, W, C]."""

CIFAR100_COARSE: np.ndarray = np.array(
    [
        4, 1, 14, 8, 0, 6, 7, 7, 18, 3,
        3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
        6, 11, 5, 10, 7, 6, 13, 15, 3, 15,
        0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
        5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
        16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
        10, 3, 2, 12, 12, 16, 12, 1, 9, 19,
        2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
        16, 19, 2, 4, 6, 19, 5, 5, 8, 19,
        18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
    ],
    np.int32,
)  # fmt: skip
"""Coarse label (0..19) of each fine CIFAR-100 label (0..99), int32 [100]. Five fine labels
share each coarse one."""
CIFAR100_COARSE.setflags(write=False)


class _Set(NamedTuple):
    """What is fixed about one set: its image shape, its classes and its names on disk."""

    shape: tuple[int, int, int]
    num_classes: int
    own: str
    official: str
    description: str


_SETS: dict[str, _Set] = {
    "emnist": _Set(
        (28, 28, 1),
        62,
        "emnist_byclass_uint8",
        "emnist/byclass",
        "EMNIST ByClass: handwritten digits and letters, as uint8 arrays in the order and the "
        "(transposed) orientation of the official files.",
    ),
    "cifar10": _Set(
        (32, 32, 3),
        10,
        "cifar10_uint8",
        "cifar10",
        "CIFAR-10 as uint8 arrays in the order of the official binary files.",
    ),
    "cifar100": _Set(
        (32, 32, 3),
        100,
        "cifar100_uint8",
        "cifar100",
        "CIFAR-100 (fine labels) as uint8 arrays in the order of the official binary files.",
    ),
}

NUM_CLASSES: dict[str, int] = {name: spec.num_classes for name, spec in _SETS.items()}

FORMAT = "array_record"
_VERSION = "1.0.0"
_CHUNK = 4096  # examples read at a time, both ways


class DatasetNotPrepared(FileNotFoundError):
    """The set asked for is not on this disk in a format that can be read without TensorFlow."""


def load_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """Reads a whole prepared set, original training part first, then the original test part.

    Downloads nothing and looks at the disk only. EMNIST images keep the orientation of the
    official files, which is TFDS's too: they are transposed, so `inputs.swapaxes(1, 2)` shows
    upright characters. Classes are numbered as in the official files; EMNIST ByClass has the
    digits at 0..9, capitals at 10..35 and small letters at 36..61.

    Args:
        name: "emnist" (EMNIST ByClass), "cifar10" or "cifar100".
        data_dir: the TFDS data directory; by default the environment variable `TFDS_DATA_DIR`,
            else `~/tensorflow_datasets`, as in TFDS.

    Returns:
        `{"inputs": uint8 [num, H, W, C], "labels": int32 [num]}`, and for CIFAR-100 also
        `"coarse_labels"` int32 [num], the superclass of each label by `CIFAR100_COARSE`.

    Raises:
        InputError: for an unknown name.
        DatasetNotPrepared: where the set is absent or only there in another file format; the
            message says what was looked for and how to prepare it.
    """
    directory = find_prepared(name, data_dir)

    import tensorflow_datasets as tfds

    spec = _SETS[name]
    builder = tfds.builder_from_directory(os.fspath(directory))
    sources = [
        builder.as_data_source(split=split, file_format=FORMAT) for split in ("train", "test")
    ]
    num = sum(len(source) for source in sources)
    inputs = np.empty((num, *spec.shape), np.uint8)
    labels = np.empty((num,), np.int32)
    row = 0
    for source in sources:
        for start in range(0, len(source), _CHUNK):
            records = source.__getitems__(range(start, min(start + _CHUNK, len(source))))
            for record in records:
                inputs[row] = record["image"]
                labels[row] = record["label"]
                row += 1
    loaded: dict[str, np.ndarray] = {"inputs": inputs, "labels": labels}
    if name == "cifar100":
        loaded["coarse_labels"] = CIFAR100_COARSE[labels]
    return loaded


def find_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of the prepared set (`.../<name>/<version>`), found without TFDS.

    Args:
        name: as in `load_tfds`.
        data_dir: as in `load_tfds`.

    Returns:
        The directory that holds `dataset_info.json` and the `array_record` files: the newest
        version of the own data set, else of TFDS's own one.

    Raises:
        InputError: for an unknown name.
        DatasetNotPrepared: where there is no such directory.
    """
    spec = _check_name(name)
    root = data_root(data_dir)
    other_formats: list[str] = []
    for relative in (spec.own, spec.official):
        for directory in _versions(root / relative):
            formats = _file_formats(directory)
            if FORMAT in formats:
                return directory
            other_formats.append(f"{directory} ({', '.join(formats)})")

    folder = shlex.quote(os.fspath(root))
    if other_formats:
        found = (
            f"It was found in another file format only, which cannot be read without TensorFlow: "
            f"{'; '.join(other_formats)}; it has to be in the {FORMAT} format."
        )
    else:
        found = f"There is no {spec.own} and no {spec.official} in {folder}."
    raise DatasetNotPrepared(
        f"The data set '{name}' is not prepared. {found} Nothing is downloaded by itself. "
        f"To download and prepare it ({ARCHIVES[name]}), run:\n"
        f"    python -m fedjax_mtl.data.tfds_sets {name} --data_dir={folder}"
    )


def prepare(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Downloads the official archive and prepares the set; does nothing if that was done before.

    This is the only function here that uses the network. It needs no TensorFlow.

    Args:
        name: as in `load_tfds`.
        data_dir: as in `load_tfds`.

    Returns:
        The directory of the prepared set.
    """
    _check_name(name)

    import tensorflow_datasets as tfds

    builder = _builder_class(name)(data_dir=os.fspath(data_root(data_dir)), file_format=FORMAT)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return Path(builder.data_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `python -m fedjax_mtl.data.tfds_sets emnist --data_dir=DIR`."""
    parser = argparse.ArgumentParser(
        prog="python -m fedjax_mtl.data.tfds_sets",
        description="Download a data set and prepare it for fedjax_mtl.",
    )
    parser.add_argument("name", choices=NAMES, help="the data set to prepare")
    parser.add_argument(
        "--data_dir",
        help="TFDS data directory (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )
    args = parser.parse_args(argv)
    print(f"{args.name} is prepared in {prepare(args.name, args.data_dir)}")
    return 0


def _check_name(name: str) -> _Set:
    """The entry of `_SETS` for `name`."""
    if name not in _SETS:
        raise InputError(f"Unknown data set {name!r}; expected one of {', '.join(NAMES)}.")
    return _SETS[name]


def data_root(data_dir: str | os.PathLike[str] | None) -> Path:
    """The data directory, by TFDS's own rule but read from the environment at each call."""
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return Path(data_dir).expanduser()


def _versions(directory: Path) -> list[Path]:
    """The prepared versions below a data set's directory, newest first.

    While TFDS writes, the directory is called `incomplete.*`; such leftovers are passed over.
    """
    found = [
        (tuple(int(part) for part in path.name.split(".")), path)
        for path in directory.glob("*.*.*")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _file_formats(directory: Path) -> list[str]:
    """The file formats a prepared directory holds; TFDS leaves the word out for tfrecord."""
    info = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))
    return [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]


@functools.cache
def _builder_class(name: str) -> type[Any]:
    """The TFDS builder of a set. Made on first use, so that importing this module stays light."""
    import tensorflow_datasets as tfds

    spec = _SETS[name]
    read = _read_emnist if name == "emnist" else functools.partial(_read_cifar, name)

    # Not registered: the builders are reached through this module only, and the name on disk
    # is enough to read the data back.
    with tfds.core.registered.skip_registration():

        class FederatedImages(tfds.core.GeneratorBasedBuilder):
            """Images as uint8 tensors in the order of the official archive."""

            name = spec.own
            VERSION = tfds.core.Version(_VERSION)

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=spec.description,
                    features=tfds.features.FeaturesDict(
                        {
                            # `Image` would need TensorFlow to encode an array.
                            "image": tfds.features.Tensor(
                                shape=spec.shape, dtype=np.uint8, encoding="zlib"
                            ),
                            "label": tfds.features.ClassLabel(num_classes=spec.num_classes),
                        }
                    ),
                    supervised_keys=("image", "label"),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                # Extraction by the download manager would need TensorFlow.
                archive = os.fspath(dl_manager.download(ARCHIVES[name]))
                return {part: self._generate_examples(archive, part) for part in ("train", "test")}

            def _generate_examples(
                self, archive: str, part: str
            ) -> Iterator[tuple[int, dict[str, Any]]]:
                for index, (image, label) in enumerate(read(archive, part)):
                    yield index, {"image": image, "label": label}

    return FederatedImages


def _read_emnist(archive: str, part: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (uint8 [28, 28, 1], label) of EMNIST ByClass from the official zip of idx files."""
    stem = f"gzip/emnist-byclass-{part}"
    with zipfile.ZipFile(archive) as archive_file:
        with (
            archive_file.open(f"{stem}-labels-idx1-ubyte.gz") as packed,
            gzip.GzipFile(fileobj=packed) as stream,
        ):
            (num,) = _idx_shape(stream, 1, f"{archive}: {stem} labels")
            labels = np.frombuffer(_read_exactly(stream, num, archive), np.uint8)
        with (
            archive_file.open(f"{stem}-images-idx3-ubyte.gz") as packed,
            gzip.GzipFile(fileobj=packed) as stream,
        ):
            shape = _idx_shape(stream, 3, f"{archive}: {stem} images")
            if shape != (num, 28, 28):
                raise InputError(
                    f"{archive}: {stem} has images of shape {shape} for {num} labels; expected "
                    f"({num}, 28, 28)."
                )
            for start in range(0, num, _CHUNK):
                count = min(_CHUNK, num - start)
                data = _read_exactly(stream, count * 784, archive)
                images = np.frombuffer(data, np.uint8).reshape(count, 28, 28, 1)
                yield from zip(images, labels[start : start + count].tolist(), strict=True)


def _idx_shape(stream: IO[bytes] | gzip.GzipFile, rank: int, where: str) -> tuple[int, ...]:
    """Reads the header of an idx file of unsigned bytes: magic number, then one size per axis."""
    if _read_exactly(stream, 4, where) != bytes([0, 0, 8, rank]):
        raise InputError(f"{where}: not an idx file of unsigned bytes with {rank} axes.")
    return struct.unpack(f">{rank}I", _read_exactly(stream, 4 * rank, where))


def _read_exactly(stream: IO[bytes] | gzip.GzipFile, size: int, where: str) -> bytes:
    """`size` bytes of `stream`, or a ValueError that names the file."""
    data = stream.read(size)
    if len(data) != size:
        raise InputError(f"{where}: the file ends early ({len(data)} of {size} bytes).")
    return data


def _read_cifar(name: str, archive: str, part: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (uint8 [32, 32, 3], label) of CIFAR from the official tar of binary files.

    A record is the label (CIFAR-100: coarse label, then fine label), one byte each, and the
    image, 3072 bytes, channels first.
    """
    if name == "cifar10":
        train = [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)]
        members = train if part == "train" else ["cifar-10-batches-bin/test_batch.bin"]
        num_labels = 1
    else:
        members = [f"cifar-100-binary/{part}.bin"]
        num_labels = 2
    with tarfile.open(archive, "r:*") as archive_file:
        for member in members:
            stream = archive_file.extractfile(member) or io.BytesIO()
            records = np.frombuffer(stream.read(), np.uint8)
            if records.size == 0 or records.size % (num_labels + 3072):
                raise InputError(
                    f"{archive}: {member} has {records.size} bytes; expected a multiple of "
                    f"{num_labels + 3072}."
                )
            records = records.reshape(-1, num_labels + 3072)
            labels = records[:, num_labels - 1]
            if name == "cifar100" and not (CIFAR100_COARSE[labels] == records[:, 0]).all():
                raise InputError(
                    f"{archive}: {member} has coarse labels other than those of CIFAR-100."
                )
            images = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            yield from zip(images, labels.tolist(), strict=True)


if __name__ == "__main__":
    sys.exit(main())
