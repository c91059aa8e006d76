"""Loading of all images of a source as a dataset, decoded and resized."""

import logging

import PIL

from .alignment import FaceAligner
from .cache import cached
from .dataset import FaceDataset
from .folders import find_source, shorten
from .images import CROPS, MAX_IMAGE_PIXELS, MODES
from .sources import dataset_source, drawn_source, folder_source


logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # of the cache format and the decoder


def load_faces(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    resolution: int | tuple[int, int] = 64,
    channels: int = 3,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
    num_drawn_images: int = 4096,
    max_images: int | None = None,
    crop: str = "center",
    skip_unreadable: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    align: FaceAligner | None = None,
) -> FaceDataset:
    """Open all images of a source, decoded and resized. The first process to ask decodes them into a cache.

    Args:
        dataset_name (`str`, *optional*):
            A dataset on the Hub, or a local folder of shards, archives, the output of `save_to_disk`, or just images.
        train_data_dir (`str`, *optional*):
            A local folder of images. Its subfolders and links are searched for every kind of image that Pillow reads.
            Other files are ignored and reported in the log. A folder without images may be a dataset.
        resolution (`int` or `(int, int)`, defaults to 64): Side, or height and width, in pixels.
        channels (`int`, defaults to 3): 1 (grayscale), 3 (RGB) or 4 (RGBA).
        dataset_config_name (`str`, *optional*): Configuration of the dataset.
        split (`str`, defaults to `"train"`): Split of the dataset. A folder of images has no other split.
        image_column (`str`, *optional*): Column of the images; defaults to the first that contains images.
        label_column (`str`, *optional*):
            Column of the classes: class labels, or integers, strings or booleans, whose sorted distinct values become
            the classes. Use `"folder"` for the names of the subfolders of a folder of images, and the name of an
            attribute for drawn faces.
        caption_column (`str`, *optional*):
            Column of the captions: texts, or lists of texts. Use `"txt"` for a folder of images with text files of the
            same names, one caption in a line, and `"caption"` for drawn faces.
        cache_dir (`str`, *optional*):
            Folder for decoded images and for downloads of `datasets`; defaults to `ddpm-faces` beside the Hub's cache.
            You may delete it between runs.
        num_drawn_images (`int`, defaults to 4096): Number of faces to draw when no source is given.
        max_images (`int`, *optional*): Number of images to read, counted from the first; defaults to all.
        crop (`str`, defaults to `"center"`):
            `"center"` center-crops each image to the aspect ratio of `resolution`. `"random"` keeps images uncropped
            for [`~FaceDataset.fetch`] to crop.
        skip_unreadable (`bool`, defaults to `False`):
            Whether to skip and list images that cannot be read or have no label, instead of raising an error.
        max_image_pixels (`int`, defaults to 2**29):
            Upper limit of width times height; larger images count as unreadable. 2**29 pixels take 2 GiB of memory
            while they are decoded. Images above 179 megapixels are decoded one at a time.
        align ([`FaceAligner`], *optional*):
            Find the faces in the images, which may be several, and cut them out; by default, each image is one face.

    Returns:
        [`FaceDataset`]

    Raises:
        ValueError: There are two sources, the folder is missing or empty, a column contains no images, classes or
            texts, images cannot be read (the message names them), or the disk has no room for the decoded images.
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
        source = drawn_source(num_drawn_images, max(size), label_column, caption_column)
    else:
        name, folder = find_source(dataset_name, train_data_dir, split)
        if folder is not None:
            source = folder_source(folder, label_column, caption_column)
        else:
            source = dataset_source(
                *(name, dataset_config_name, split, image_column, label_column, cache_dir, caption_column)
            )
    if align is not None:
        source = align(source, size, max_images, max_image_pixels)
    num_images = min(source.num_images, max_images or source.num_images)
    if num_images == 0:
        raise ValueError("The dataset is empty: it contains no images.")

    settings = {
        "version": [CACHE_VERSION, PIL.__version__],
        "source": [source.identity, source.num_images],  # classes come from all images
        "num_images": num_images,
        "size": size,
        "channels": channels,
        "crop": crop,
        "label_column": label_column,
        "skip_unreadable": skip_unreadable,
        "max_image_pixels": max_image_pixels,
    }
    if caption_column is not None:  # without captions, caches of earlier versions stay valid
        settings["caption_column"] = caption_column
    dataset = cached(source, settings, cache_dir)
    if dataset.unreadable:
        logger.warning(
            "Skipped %d images that cannot be read:\n%s", len(dataset.unreadable), shorten(dataset.unreadable)
        )
    return dataset
