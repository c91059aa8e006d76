"""All images of a source as a dataset, decoded and resized."""

import logging

import PIL

from .cache import cached
from .dataset import FaceDataset
from .folders import find_source, shorten
from .images import CROPS, MAX_IMAGE_PIXELS, MODES
from .sources import dataset_source, drawn_source, folder_source


logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # of what a cache holds and how it is decoded


def load_faces(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    resolution: int | tuple[int, int] = 64,
    channels: int = 3,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    num_drawn_images: int = 4096,
    max_images: int | None = None,
    crop: str = "center",
    skip_unreadable: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> FaceDataset:
    """Open all pictures of a source, decoded and resized; this is done once, by whoever asks first.

    Args:
        dataset_name (`str`, *optional*):
            A dataset on the Hub, or a local folder of shards or archives, of what `save_to_disk` writes, or of images
            alone.
        train_data_dir (`str`, *optional*):
            A local folder of images. It is searched in depth and along links for all kinds of images that Pillow
            reads; whatever else lies there is left out and named in the log. A folder without images may be a dataset.
        resolution (`int` or `(int, int)`, defaults to 64): Side, or height and width, in pixels.
        channels (`int`, defaults to 3): 1 (grey), 3 (RGB) or 4 (RGBA).
        dataset_config_name (`str`, *optional*): Configuration of the data set.
        split (`str`, defaults to `"train"`): Split of the dataset; a folder of images has no other.
        image_column (`str`, *optional*): Column of the pictures; by default the first that holds any.
        label_column (`str`, *optional*):
            Column of the classes: class labels; or integers, strings or truth values, of which all that occur are
            classes, in their order. For a folder of pictures, `"folder"`: the names of its subfolders. For drawn
            faces, one of their attributes.
        cache_dir (`str`, *optional*):
            Where decoded pictures are kept, and what `datasets` downloads; by default `ddpm-faces` beside the Hub's
            cache. Whatever lies there may be deleted between runs.
        num_drawn_images (`int`, defaults to 4096): Number of faces to draw where no source is given.
        max_images (`int`, *optional*): Read the first so many only.
        crop (`str`, defaults to `"center"`):
            `"center"`: each picture is cropped about its centre to the shape of `resolution`. `"random"`: it is kept
            whole, for [`~FaceDataset.fetch`] to crop.
        skip_unreadable (`bool`, defaults to `False`):
            Leave out pictures that cannot be read or have no label, and list them.
        max_image_pixels (`int`, defaults to 2**29):
            Width times height of the largest images that are read; larger ones are unreadable. 2**29 pixels take 2 GiB
            of memory while they are decoded, and images beyond 179 megapixels are decoded one at a time.

    Returns:
        [`FaceDataset`]

    Raises:
        ValueError: Two sources, a folder that is missing or empty, a column that holds no pictures or no classes,
            pictures that cannot be read, by their names, or a disk without room for the decoded ones.
    """
    if channels not in MODES:
        raise ValueError(f"`channels` must be one of {', '.join(map(str, MODES))}, got {channels}.")
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`resolution` must be a side or (height, width) in pixels, got {resolution}.")
    if max_images is not None and max_images < 1:
        raise ValueError(f"`max_images` must be at least 1 or None, got {max_images}.")
    if max_image_pixels < 1:
        raise ValueError(f"`max_image_pixels` must be at least 1, got {max_image_pixels}.")
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {', '.join(map(repr, CROPS))}, got {crop!r}.")

    if dataset_name is None and train_data_dir is None:
        source = drawn_source(num_drawn_images, max(size), label_column)
    else:
        name, folder = find_source(dataset_name, train_data_dir, split)
        if folder is not None:
            source = folder_source(folder, label_column)
        else:
            source = dataset_source(name, dataset_config_name, split, image_column, label_column, cache_dir)
    num_images = min(source.num_images, max_images or source.num_images)
    if num_images == 0:
        raise ValueError("The data set is empty: it holds no pictures.")

    settings = {
        "version": [CACHE_VERSION, PIL.__version__],
        "source": [source.identity, source.num_images],  # of which all count for the classes
        "num_images": num_images,
        "size": size,
        "channels": channels,
        "crop": crop,
        "label_column": label_column,
        "skip_unreadable": skip_unreadable,
        "max_image_pixels": max_image_pixels,
    }
    dataset = cached(source, settings, cache_dir)
    if dataset.unreadable:
        logger.warning(
            "%d pictures cannot be read and are left out:\n%s", len(dataset.unreadable), shorten(dataset.unreadable)
        )
    return dataset
