"""Real sets through TFDS: errors at once, and round trips offline with small archives."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedjax_mtl.data import tfds_sets

NUM_TRAIN, NUM_TEST = 13, 7


def images_and_labels(name: str, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 ``[num, H, W, C]``, and labels ``[num]``.

    The label 0 and the highest label are among them.
    """
    rng = np.random.default_rng(seed)
    shape, classes = ((28, 28, 1), 62) if name == "emnist" else ((32, 32, 3), int(name[5:]))
    labels = rng.integers(0, classes, num)
    labels[:2] = 0, classes - 1
    return rng.integers(0, 256, (num, *shape), np.uint8), labels


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def cifar_records(name: str, images: np.ndarray, labels: np.ndarray) -> bytes:
    columns = [labels.astype(np.uint8)[:, None], images.transpose(0, 3, 1, 2).reshape(-1, 3072)]
    if name == "cifar100":
        columns.insert(0, tfds_sets.CIFAR100_COARSE[labels].astype(np.uint8)[:, None])
    return np.concatenate(columns, axis=1).tobytes()


def write_archive(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes a small archive in the official layout; returns all images and labels in order."""
    parts = {
        part: images_and_labels(name, num, seed)
        for seed, (part, num) in enumerate({"train": NUM_TRAIN, "test": NUM_TEST}.items())
    }
    if name == "emnist":
        with zipfile.ZipFile(path, "w") as archive:
            for part, (images, labels) in parts.items():
                stem = f"gzip/emnist-byclass-{part}"
                archive.writestr(f"{stem}-images-idx3-ubyte.gz", idx(images[..., 0]))
                archive.writestr(f"{stem}-labels-idx1-ubyte.gz", idx(labels))
    else:
        if name == "cifar10":
            members = {"cifar-10-batches-bin/test_batch.bin": parts["test"]}
            cuts = [0, 3, 5, 6, 9, NUM_TRAIN]
            for number in range(5):
                rows = slice(cuts[number], cuts[number + 1])
                members[f"cifar-10-batches-bin/data_batch_{number + 1}.bin"] = (
                    parts["train"][0][rows],
                    parts["train"][1][rows],
                )
        else:
            members = {f"cifar-100-binary/{part}.bin": data for part, data in parts.items()}
        with tarfile.open(path, "w:gz") as archive:
            for member, (images, labels) in members.items():
                data = cifar_records(name, images, labels)
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    images, labels = zip(*parts.values(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Serves archives that a test puts into `tmp_path / "archives"` in place of downloads."""
    import tensorflow_datasets as tfds

    folder = tmp_path / "archives"
    folder.mkdir()

    def download(self: object, url: str) -> Path:
        path = folder / url.rsplit("/", 1)[1]
        assert path.exists(), f"no archive for {url}"
        return path

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    return folder


def archive_name(name: str) -> str:
    return tfds_sets.ARCHIVES[name].rsplit("/", 1)[1]


@pytest.mark.parametrize("name", tfds_sets.NAMES)
def test_prepared_set_is_read_back_in_the_order_of_the_archive(name, tmp_path, offline, capsys):
    images, labels = write_archive(name, offline / archive_name(name))
    data_dir = tmp_path / "data"

    assert tfds_sets.main([name, f"--data_dir={data_dir}"]) == 0
    assert str(tfds_sets.find_prepared(name, data_dir)) in capsys.readouterr().out
    loaded = tfds_sets.load_tfds(name, str(data_dir))

    assert loaded["inputs"].dtype == np.uint8 and loaded["labels"].dtype == np.int32
    np.testing.assert_array_equal(loaded["inputs"], images)
    np.testing.assert_array_equal(loaded["labels"], labels)
    if name == "cifar100":
        assert loaded["coarse_labels"].dtype == np.int32
        np.testing.assert_array_equal(loaded["coarse_labels"], tfds_sets.CIFAR100_COARSE[labels])
    else:
        assert set(loaded) == {"inputs", "labels"}
    assert "tensorflow" not in sys.modules


def test_order_is_kept_across_several_files(tmp_path, offline):
    import tensorflow_datasets as tfds

    images, labels = write_archive("cifar10", offline / archive_name("cifar10"))
    builder = tfds_sets._builder_class("cifar10")(
        data_dir=str(tmp_path / "data"), file_format="array_record"
    )
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    directory = tfds_sets.find_prepared("cifar10", tmp_path / "data")
    assert len(list(directory.glob("*train*array_record*"))) == 3
    loaded = tfds_sets.load_tfds("cifar10", tmp_path / "data")
    np.testing.assert_array_equal(loaded["inputs"], images)
    np.testing.assert_array_equal(loaded["labels"], labels)


def test_preparing_twice_does_nothing_more(tmp_path, offline):
    archive = offline / archive_name("cifar10")
    write_archive("cifar10", archive)
    first = tfds_sets.prepare("cifar10", tmp_path)
    archive.unlink()
    assert tfds_sets.prepare("cifar10", tmp_path) == first


def test_data_dir_comes_from_the_environment(tmp_path, offline, monkeypatch):
    write_archive("cifar10", offline / archive_name("cifar10"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "by_environment"))
    directory = tfds_sets.prepare("cifar10")
    assert directory.is_relative_to(tmp_path / "by_environment")
    assert len(tfds_sets.load_tfds("cifar10")["labels"]) == NUM_TRAIN + NUM_TEST


@pytest.mark.parametrize("relative", ["cifar10", "emnist/byclass"])
def test_official_array_record_data_are_read_too(relative, tmp_path):
    """Data in TFDS's own layout, with PNG images, are read too.

    TFDS's builders take Pillow images without TensorFlow.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    set_name = relative.split("/")[0]
    shape, classes = ((28, 28, 1), 62) if set_name == "emnist" else ((32, 32, 3), 10)
    parts = {
        part: images_and_labels(set_name, num, num)
        for part, num in (("train", NUM_TRAIN), ("test", NUM_TEST))
    }
    configs = [tfds.core.BuilderConfig(name="byclass")] if "/" in relative else []
    with tfds.core.registered.skip_registration():

        class Official(tfds.core.GeneratorBasedBuilder):
            name = set_name
            VERSION = tfds.core.Version("3.1.0")
            BUILDER_CONFIGS = configs

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="as TFDS has it",
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=shape),
                            "label": tfds.features.ClassLabel(num_classes=classes),
                        }
                    ),
                )

            def _split_generators(self, dl_manager):
                return {part: self._generate_examples(part) for part in parts}

            def _generate_examples(self, part):
                for index, (image, label) in enumerate(zip(*parts[part], strict=True)):
                    picture = Image.fromarray(image[..., 0] if shape[-1] == 1 else image)
                    yield index, {"image": picture, "label": int(label)}

    Official(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    assert tfds_sets.find_prepared(set_name, tmp_path) == tmp_path / relative / "3.1.0"
    loaded = tfds_sets.load_tfds(set_name, tmp_path)

    # TFDS shuffles within each part.
    def rows(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
        return sorted(
            image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)
        )

    for part, cut in (("train", slice(NUM_TRAIN)), ("test", slice(NUM_TRAIN, None))):
        assert rows(loaded["inputs"][cut], loaded["labels"][cut]) == rows(*parts[part])


def test_own_data_come_before_tfds_own_and_new_versions_before_old(tmp_path):
    def put(relative: str, file_format: str) -> Path:
        directory = tmp_path / relative
        directory.mkdir(parents=True)
        info = {"name": "x", "fileFormat": file_format}
        (directory / "dataset_info.json").write_text(json.dumps(info))
        return directory

    put("cifar10/incomplete.AB_3.0.2", "array_record")
    old = put("cifar10/3.0.2", "array_record")
    assert tfds_sets.find_prepared("cifar10", tmp_path) == old
    new = put("cifar10/3.0.10", "array_record")
    assert tfds_sets.find_prepared("cifar10", tmp_path) == new
    put("cifar10/4.0.0", "tfrecord")
    assert tfds_sets.find_prepared("cifar10", tmp_path) == new
    own = put("cifar10_uint8/1.0.0", "array_record")
    assert tfds_sets.find_prepared("cifar10", tmp_path) == own


@pytest.mark.parametrize("name", tfds_sets.NAMES)
def test_unprepared_set_is_an_error_at_once(name, tmp_path):
    start = time.perf_counter()
    with pytest.raises(tfds_sets.DatasetNotPrepared) as caught:
        tfds_sets.load_tfds(name, tmp_path / "nowhere")
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    assert f"'{name}'" in message and str(tmp_path / "nowhere") in message
    command = f"python -m fedjax_mtl.data.tfds_sets {name} --data_dir={tmp_path / 'nowhere'}"
    assert message.endswith(command)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("info", [{"fileFormat": "tfrecord"}, {}, {"fileFormat": "parquet"}])
def test_other_file_format_is_named_in_the_error(info, tmp_path):
    directory = tmp_path / "emnist" / "byclass" / "3.1.0"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text(json.dumps({"name": "emnist", **info}))
    with pytest.raises(tfds_sets.DatasetNotPrepared) as caught:
        tfds_sets.load_tfds("emnist", tmp_path)
    message = str(caught.value)
    assert f"{directory} ({info.get('fileFormat', 'tfrecord')})" in message
    assert "array_record" in message
    assert message.endswith(f"tfds_sets emnist --data_dir={tmp_path}")


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="'mnist'.*emnist, cifar10, cifar100"):
        tfds_sets.load_tfds("mnist", tmp_path)
    with pytest.raises(ValueError, match="'mnist'"):
        tfds_sets.prepare("mnist", tmp_path)
    with pytest.raises(SystemExit):
        tfds_sets.main(["mnist"])


def test_archive_with_the_wrong_checksum_is_refused(tmp_path):
    """An archive that lies where the module says is used and checked, without a network."""
    import tensorflow_datasets as tfds

    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    write_archive("cifar10", manual / archive_name("cifar10"))
    error = tfds.core.download.download_manager.NonMatchingChecksumError
    with pytest.raises(error, match="wrong checksum"):
        tfds_sets.prepare("cifar10", tmp_path)
    with pytest.raises(tfds_sets.DatasetNotPrepared):
        tfds_sets.load_tfds("cifar10", tmp_path)


def test_broken_archives_are_refused(tmp_path):
    def emnist(images: bytes, labels: bytes) -> str:
        path = tmp_path / f"broken{len(list(tmp_path.iterdir()))}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("gzip/emnist-byclass-train-images-idx3-ubyte.gz", images)
            archive.writestr("gzip/emnist-byclass-train-labels-idx1-ubyte.gz", labels)
        return str(path)

    images, labels = images_and_labels("emnist", 4, 0)
    images = images[..., 0]
    for broken, expected in (
        (emnist(idx(images[:3]), idx(labels)), r"\(4, 28, 28\)"),
        (emnist(idx(labels), idx(labels)), "not an idx file"),
        (emnist(gzip.compress(gzip.decompress(idx(images))[:-1]), idx(labels)), "ends early"),
    ):
        with pytest.raises(ValueError, match=expected):
            list(tfds_sets._read_emnist(broken, "train"))

    def cifar100(data: bytes) -> str:
        path = tmp_path / f"broken{len(list(tmp_path.iterdir()))}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("cifar-100-binary/test.bin")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        return str(path)

    data = cifar_records("cifar100", *images_and_labels("cifar100", 4, 0))
    for broken, expected in (
        (cifar100(data[:-1]), "multiple of 3074"),
        (cifar100(b""), "multiple of 3074"),
        (cifar100(bytes([19]) + data[1:]), "coarse labels"),
    ):
        with pytest.raises(ValueError, match=expected):
            list(tfds_sets._read_cifar("cifar100", broken, "test"))


def test_constants():
    coarse = tfds_sets.CIFAR100_COARSE
    assert coarse.shape == (100,)
    np.testing.assert_array_equal(np.bincount(coarse), np.full(20, 5))
    assert list(coarse[:3]) == [4, 1, 14] and list(coarse[-3:]) == [8, 14, 13]
    assert set(tfds_sets.NORMALISE) == set(tfds_sets.ARCHIVES) == set(tfds_sets.NAMES)
    for name, constants in tfds_sets.NORMALISE.items():
        channels = 1 if name == "emnist" else 3
        assert len(constants["mean"]) == len(constants["std"]) == channels


def test_command_line_and_light_import(tmp_path):
    """The module shows its help, and neither its import nor its error loads TFDS."""
    code = (
        "import sys\n"
        "from fedjax_mtl.data import tfds_sets\n"
        "try:\n"
        f"    tfds_sets.load_tfds('emnist', {str(tmp_path)!r})\n"
        "except tfds_sets.DatasetNotPrepared:\n"
        "    pass\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    root = Path(tfds_sets.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
    shown = subprocess.run(
        [sys.executable, "-m", "fedjax_mtl.data.tfds_sets", "--help"],
        check=True,
        cwd=root,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert "--data_dir" in shown.stdout
