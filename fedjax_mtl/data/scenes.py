"""The rendered scenes as TFDS data sets: rendered once, and read back from ``array_record`` files.

    python -m fedjax_mtl.data.scenes --size=small --profile=small --data_dir=DIR

Nothing is downloaded: the scenes are a function of domain, split, index, size and seed (see
:mod:`fedjax_mtl.data.rendered`), so a set that is not there is made on first use.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data import rendered
from fedjax_mtl.data.tfds_sets import FORMAT, data_root

VERSION = "1.0.0"


def set_name(domain: str, size: str, profile: str, seed: int, extras: bool) -> str:
    """Returns the name of a set on disk."""
    return f"rendered_{domain.lower()}_{size}_{profile}_{seed}{'_extras' if extras else ''}"


@functools.cache
def _builder_class(domain: str, size: str, profile: str, seed: int, extras: bool) -> type[Any]:
    """Returns the TFDS builder of one set."""
    import tensorflow_datasets as tfds

    def sample(split: str, index: int) -> dict[str, np.ndarray]:
        made = rendered.preprocess(rendered.render(domain, split, index, size, seed, extras))
        return {
            name: np.asarray(value, np.float32) for name, value in made.items() if name != "meta"
        }

    shapes = {name: value.shape for name, value in sample("train", 0).items()}

    with tfds.core.registered.skip_registration():

        class RenderedScenes(tfds.core.GeneratorBasedBuilder):
            """Rendered scenes with all labels, ready for losses (255 where to be ignored)."""

            name = set_name(domain, size, profile, seed, extras)
            VERSION = tfds.core.Version(VERSION)

            def _info(self) -> Any:
                features = {
                    key: tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="zlib")
                    for key, shape in shapes.items()
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="Procedurally rendered scenes for dense prediction.",
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager
                return {split: self._generate_examples(split) for split in ("train", "test")}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
                for index in range(rendered.LENGTHS[profile][domain][split]):
                    yield index, sample(split, index)

    return RenderedScenes


def load_scenes(
    domain: str,
    *,
    size: str = "small",
    profile: str = "small",
    seed: int = 0,
    extras: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Loads the scenes of a domain; they are made and cached where they are not yet.

    Args:
        domain: ``A``, rooms, or ``B``, figures outdoors.
        size: ``tiny`` (32 x 32), ``small`` (64 x 64) or ``full``.
        profile: how many images, ``tiny``, ``small`` or ``full`` (as many as the real sets have).
        seed: of the whole set.
        extras: the Taskonomy-like labels too.
        data_dir: the TFDS data directory; default as in TFDS.

    Returns:
        ``{"train", "test"}`` of ``{"image", <labels>}``, leaves float32
        ``[images, h, w, channels]``. Images are 0..255; labels hold 255 where they are to be
        ignored.

    Raises:
        InputError: an unknown domain, size or profile.
    """
    for what, value, known in (
        ("domain", domain, rendered.TASKS),
        ("size", size, rendered.SIZES),
        ("profile", profile, rendered.LENGTHS),
    ):
        if value not in known:
            raise InputError(
                f"unknown {what} {value!r} of rendered scenes; expected one of "
                f"{', '.join(sorted(known))}"
            )
    builder = _builder_class(domain, size, profile, seed, extras)(
        data_dir=os.fspath(data_root(data_dir)), file_format=FORMAT
    )
    builder.download_and_prepare()
    loaded = {}
    for split in ("train", "test"):
        source = builder.as_data_source(split=split, file_format=FORMAT)
        records = source.__getitems__(range(len(source)))
        loaded[split] = {
            name: np.stack([record[name] for record in records]) for name in records[0]
        }
    return loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the sets of both domains: the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fedjax_mtl.data.scenes", description="Render the scenes."
    )
    parser.add_argument("--size", choices=sorted(rendered.SIZES), default="small")
    parser.add_argument("--profile", choices=sorted(rendered.LENGTHS), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data_dir",
        help="TFDS data directory (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )
    arguments = parser.parse_args(argv)
    for domain in sorted(rendered.TASKS):
        made = load_scenes(
            domain,
            size=arguments.size,
            profile=arguments.profile,
            seed=arguments.seed,
            data_dir=arguments.data_dir,
        )
        folder = Path(data_root(arguments.data_dir)) / set_name(
            domain, arguments.size, arguments.profile, arguments.seed, False
        )
        print(
            f"domain {domain}: {len(made['train']['image'])} + {len(made['test']['image'])} images "
            f"in {folder}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
