"""Makes data/samples/ from the full datasets; run from the root of the repository: python -m report.make_samples

The choice of images is fixed by a seed, and so are the arrays; the bytes of a compressed archive may change with the
version of zlib, which is why the checksums in sha256.json are written along with the files.
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np

from common import datasets, voc
from common.files import building, replacing, sha256, write_json

SEED = 2026
VOC_SIZES = {"train": 16, "val": 24}  # official lists


def balanced(labels, count, generator):
    """Returns the sorted indices of `count` examples, the same number of every class."""
    classes = np.unique(labels)
    chosen = [generator.permutation(np.flatnonzero(labels == label))[: count // len(classes)] for label in classes]
    return np.sort(np.concatenate(chosen))


def spread_views(examples, count):
    """Returns the sorted indices of `count` smallNORB pairs, the same number of every toy.

    From one pair of a toy to the next, lighting, elevation and azimuth all change; the first views of two toys differ.
    """
    toys = np.unique(np.stack([examples.category, examples.instance], axis=1), axis=0)
    pairs = count // len(toys)
    chosen = []
    for number, (category, instance) in enumerate(toys):
        for view in range(number * pairs, (number + 1) * pairs):
            azimuths = np.flatnonzero(
                (examples.category == category)
                & (examples.instance == instance)
                & (examples.elevation == view % 9)
                & (examples.lighting == (view + view // 9) % 6)
            )
            chosen.append(azimuths[(5 * view + number) % len(azimuths)])
    return np.sort(chosen)


def sample_arrays(name, data_dir):
    """Returns the arrays of data/samples/<name>.npz: dict from "train_images" and so on, and "class_names"."""
    dataset = getattr(datasets, f"load_{name}")(data_dir)
    generator = np.random.default_rng(SEED)
    arrays = {}
    for split, count in datasets.SOURCES[name].sample_sizes.items():
        examples = getattr(dataset, split)
        stereo = name == "smallnorb"
        chosen = spread_views(examples, count) if stereo else balanced(examples.labels, count, generator)
        arrays |= {f"{split}_{field}": np.array(array[chosen]) for field, array in examples._asdict().items()}
    return {**arrays, "class_names": np.array(dataset.class_names)}


def sample_names(voc_folder):
    """Returns the names of the VOC images to copy: dict from official list to a sorted list."""
    generator = np.random.default_rng(SEED)
    lists = voc_folder / "ImageSets" / "Segmentation"
    names = {part: (lists / f"{part}.txt").read_text().split() for part in VOC_SIZES}
    return {part: sorted(generator.permutation(names[part])[:count].tolist()) for part, count in VOC_SIZES.items()}


def copy_voc(source, target):
    """Copies the chosen images, their masks and the lists of them in VOC's own layout."""
    masks = source / "SegmentationClass"
    if not masks.is_dir():  # an installation with the masks of Hariharan et al., which include the official ones
        masks = source / "SegmentationClassAug"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (target / folder).mkdir(parents=True)
    for part, names in sample_names(source).items():
        (target / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            shutil.copyfile(source / "JPEGImages" / f"{name}.jpg", target / "JPEGImages" / f"{name}.jpg")
            shutil.copyfile(masks / f"{name}.png", target / "SegmentationClass" / f"{name}.png")


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR", "data")))
    data_dir = flags.parse_args().data_dir
    for name in datasets.SOURCES:
        with replacing(datasets.SAMPLES / f"{name}.npz") as temporary:
            np.savez_compressed(temporary, **sample_arrays(name, data_dir))
    with building(datasets.SAMPLES / "VOCdevkit") as folder:
        copy_voc(voc.voc_folder(data_dir), folder / "VOC2012")
    paths = [path for path in sorted(datasets.SAMPLES.rglob("*")) if path.suffix in (".npz", ".jpg", ".png", ".txt")]
    write_json(
        datasets.SAMPLES / "sha256.json",
        {path.relative_to(datasets.SAMPLES).as_posix(): sha256(path) for path in paths},
    )
    print(f"{datasets.SAMPLES}: {sum(path.stat().st_size for path in paths) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
