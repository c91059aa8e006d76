"""The images of a folder: finding them, and reporting the files that are not read."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image


logger = logging.getLogger(__name__)

DATA_SUFFIXES = frozenset((".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".zip"))
_TABLES = frozenset((".arrow", ".parquet", ".tar", ".zip"))  # may contain images
_METADATA = frozenset(
    ("metadata.csv", "metadata.jsonl", "metadata.parquet")
)  # of the `imagefolder` builder of `datasets`

# Formats that PIL opens but that are not photos: documents, videos, measurements, icons, brushes.
_NO_PHOTOS = frozenset(
    "BUFR CUR EPS FITS FLI GBR GRIB HDF5 ICNS ICO IPTC MPEG WMF XBM XPM".split()  # noqa: SIM905
)
_HEIC = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
_RAW = frozenset(".3fr .arw .cr2 .cr3 .dng .erf .nef .nrw .orf .pef .raf .raw .rw2 .srw .x3f".split())
_OTHER_IMAGES = frozenset(".ai .avif .avifs .emf .eps .icns .ico .jxl .psb .svg .svgz .wmf .xcf".split())

# Other extensions ("photo.jpg_large", "IMG.jpeg_1", "J.Smith") are ambiguous, so the first bytes decide.
_NO_IMAGES = _HEIC | _RAW | _OTHER_IMAGES | DATA_SUFFIXES

_RUN_FILES = frozenset(("model_index.json", "training_config.yaml"))
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Images of a training run whose `output_dir` is the folder itself.
_RUN_FOLDERS, _RUN_IMAGES = frozenset(("audits", "samples")), frozenset(("loss_curve.png", "samples.png"))

_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # anything else is a mistyped path


def _register_heif() -> bool:
    """Let PIL read HEIC photos (iPhones) if pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the lower-case file extensions of the images that PIL can read here."""
    _register_heif()
    Image.init()
    registered = Image.registered_extensions().items()
    return frozenset(end for end, kind in registered if kind in Image.OPEN and kind not in _NO_PHOTOS)


@dataclass
class ImageFolder:
    """The contents of a folder, as found by [`list_images`].

    Args:
        root (`pathlib.Path`): The folder.
        paths (`list[pathlib.Path]`): Its images, by name: first the files of each folder, then its subfolders.
        has_tables (`bool`): Whether it also has dataset files, which may contain or describe images.
        others (`collections.Counter`): The number of other files by lower-case extension.
        unreadable (`list[str]`): Subfolders that cannot be read.
        outputs (`list[str]`): Output of training runs or pipelines.
    """

    root: Path
    paths: list[Path] = field(default_factory=list)
    has_tables: bool = False
    others: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def left_out(self) -> str:
        """Describe the files that are not read. The string is empty if all are."""
        parts = []
        for suffix, count in sorted(self.others.items()):
            hint = " (install pillow-heif)" if suffix in _HEIC else ""
            hint = " (raw photos: export them as JPEG or TIFF)" if suffix in _RAW else hint
            hint = " (`dataset_name` reads these)" if suffix in _TABLES and self.paths else hint
            parts.append(f"{count} {suffix or 'without an extension'}{hint}")
        for names, kind in (
            (self.unreadable, "that cannot be read"),
            (self.outputs, "with output of training or of a pipeline"),
        ):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                parts.append(f"{len(names)} folder{'s' if len(names) > 1 else ''} {kind} ({shown})")
        return ", ".join(parts)

    def log_left_out(self) -> None:
        """Log the files that are not read, as a warning if there may be images among them."""
        may_hold_images = _HEIC | _RAW | _OTHER_IMAGES | _TABLES | {""}
        is_warning = self.unreadable or self.outputs or may_hold_images & self.others.keys()
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # one process per machine logs it
        if text := self.left_out():
            logger.log(logging.WARNING if is_warning else logging.INFO, "Not read from %s: %s", self.root, text)


def list_images(root: Path) -> ImageFolder:
    """Find the images in a folder and its subfolders, following links and ignoring hidden files and folders.

    A file is an image by its extension or, if the extension is unknown, by its first bytes. Output of training runs
    and pipelines is skipped.

    Raises:
        ValueError: The folder itself cannot be read.
    """
    folder = ImageFolder(root)
    real_root = os.path.realpath(root)
    seen = {real_root}

    def fail(error: OSError) -> None:
        if error.filename == str(root):
            raise ValueError(f"The folder {str(root)!r} cannot be read: {error}") from error
        folder.unreadable.append(os.path.relpath(error.filename, root))

    for place, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        is_root = place == str(root)
        if _RUN_FILES & set(names) or any(_CHECKPOINT.fullmatch(name) for name in subfolders):
            if not is_root:
                folder.outputs.append(os.path.relpath(place, root))
                subfolders.clear()
                continue
            outputs = {name for name in subfolders if name in _RUN_FOLDERS or _CHECKPOINT.fullmatch(name)}
            folder.outputs += sorted(outputs | _RUN_IMAGES & set(names))
            subfolders[:] = [name for name in subfolders if name not in outputs]
            names = [name for name in names if name not in _RUN_IMAGES]
        subfolders[:] = [
            name
            for name in sorted(subfolders)
            if not name.startswith(".") and _is_new(os.path.join(place, name), real_root, seen)
        ]
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = Path(place, name)
            suffix = _suffix(name)
            if suffix in image_suffixes() or (suffix not in _NO_IMAGES and _is_image(path)):
                folder.paths.append(path)
            else:
                folder.others[suffix] += 1
                folder.has_tables |= suffix in _TABLES or name.lower() in _METADATA
    return folder


def _suffix(name: str) -> str:
    """Return the lower-case extension of a file. One that begins with a digit, as in "at 10.30.45", does not count."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix[1:2].isalpha() or suffix == ".3fr" else ""


def _is_new(path: str, real_root: str, seen: set[str]) -> bool:
    """Whether to search a subfolder. Links to folders that are searched anyway are skipped."""
    real = os.path.realpath(path)
    if real in seen:
        return False
    if os.path.islink(path):
        within = os.path.relpath(real, real_root).split(os.sep)
        if not any(part.startswith(".") for part in within):
            return False  # the folder is searched under its own name
        if real_root.startswith(os.path.join(real, "")):
            return False  # the link leads to a parent of the folder
    seen.add(real)
    return True


def _is_image(path: Path) -> bool:
    """Whether the first bytes of a file are those of a common image format."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    is_webp, is_avif = start[:4] == b"RIFF" and start[8:] == b"WEBP", start[4:] in (b"ftypavif", b"ftypavis")
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")) or is_webp or is_avif


def is_picture_folder(folder: Path) -> bool:
    """Whether a folder contains images and no dataset files.

    Raises:
        ValueError: It contains neither images nor dataset files.
    """
    return _is_plain(list_images(folder))


def _is_plain(folder: ImageFolder) -> bool:
    if not folder.paths and not DATA_SUFFIXES & folder.others.keys():
        left_out = folder.left_out()
        raise ValueError(
            f"The folder {str(folder.root)!r} contains no images ({', '.join(sorted(image_suffixes()))})."
            f"{f' Not read: {left_out}.' if left_out else ''}"
        )
    return bool(folder.paths) and not folder.has_tables


def resolve_source(dataset_name: str | None, train_data_dir: str | None) -> tuple[str, Path | None]:
    """Return the name of a dataset and, unless it is on the Hub, its local folder.

    Raises:
        ValueError: Both arguments are given, or the folder does not exist.
    """
    name = dataset_name if train_data_dir is None else train_data_dir
    if name is None or (dataset_name is not None and train_data_dir is not None):
        raise ValueError("Give either `dataset_name` or `train_data_dir`, not both.")
    path = Path(name).expanduser()
    if name and path.is_dir():
        path = path.resolve()  # `datasets` would read "." as a name
        return str(path), path
    if train_data_dir is not None:
        raise ValueError(f"`train_data_dir` must be an existing folder, got {train_data_dir!r}.")
    if not _HUB_NAME.fullmatch(name) or path.exists():
        raise ValueError(f"`dataset_name` must be an existing folder or a dataset on the Hub, got {name!r}.")
    return name, None


def find_source(dataset_name: str | None, train_data_dir: str | None, split: str) -> tuple[str, ImageFolder | None]:
    """Return the name of a dataset and, if it is a folder of images, its contents.

    `train_data_dir` is a folder of images if it contains any image. `dataset_name` is one if it contains images and no
    dataset files.

    Raises:
        ValueError: As for [`resolve_source`], or the folder contains nothing to read, or a folder of images is given
            with a `split` other than "train".
    """
    name, path = resolve_source(dataset_name, train_data_dir)
    if path is None:
        return name, None
    folder = list_images(path)
    if not _is_plain(folder) and not (train_data_dir is not None and folder.paths):
        return name, None
    if split != "train":
        raise ValueError(
            f"`split` must be 'train', got {split!r}: {name!r} is a folder of images, which has no splits."
        )
    folder.log_left_out()
    return name, folder


def shorten(problems: Sequence[str]) -> str:
    """Format the first ten problems, one per line, and the number of further ones."""
    listed = "\n".join(f"  {problem}" for problem in problems[:10])
    return listed + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
