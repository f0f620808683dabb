"""Decodes an image file into a grey picture."""

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from PIL import ImageMode, ImageOps, PngImagePlugin, TiffImagePlugin

FORMATS = "BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP"  # others Pillow may hand to other programs
MODALITIES = "CR", "DX", "RG"  # of a radiograph in DICOM
MAX_PIXELS = 50_000_000  # more is a decompression bomb; radiographs reach about 20 million
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long text is no bad picture
# white is 0, big-endian, 16 bits: Pillow knows it little-endian only
TiffImagePlugin.OPEN_INFO[(b"MM", 0, (1,), 1, (16,), ())] = ("I;16B", "I;16B")
UPRIGHT = dict(zip((2, 4, 8, 3, 6, 5, 7), PIL.Image.Transpose, strict=True))  # by orientation


def is_dicom(start):
    return start[128:132] == b"DICM"


class Decoded(NamedTuple):
    """A decoded radiograph, and what its file is."""

    grey: PIL.Image.Image  # upright; mode L, or F where a pixel has more bits than 8
    size: tuple  # width and height of the file, pixels
    mode: str  # L, RGB, I;16, MONOCHROME1, ...
    bits: int  # a pixel
    format: str  # JPEG, DICOM, ...
    quality: int  # of a JPEG, 1 to 100 as libjpeg counts, else 0


def decode(source, size):
    """The Decoded at `source`, a path or the bytes of a file. Files are decoded here and only here.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled DCT), never below
    `size` pixels.
    Raises OSError or ValueError with the reason, rather than give a picture that is not the file's.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; damaged pixels raise
        try:
            scan = decode_dicom(content) if is_dicom(content) else decode_with_pillow(content, size)
        except AttributeError as error:
            raise ValueError(f"a header that is not complete: {error}") from None
    low, high = scan.grey.getextrema()
    if low == high:
        raise ValueError("one single grey level, no picture")
    return scan


def check_shape(width, height):
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > 20 * min(width, height):
        raise ValueError(f"{width}x{height} pixels, no radiograph's shape")


def decode_with_pillow(content, size):
    """The Decoded of what Pillow reads."""
    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
        check_shape(*image.size)
        mode, shape, kind = image.mode, image.size, image.format
        if mode == "1":
            raise ValueError("a picture of two colours, expected grey levels")
        bits = max(getattr(image, "tag_v2", {}).get(258, (8,)))  # of TIFF
        how = [tile.args for tile in image.tile]  # to decode it: "RGB;16B", or PPM's ("RGB", 65535)
        sixteen = bits > 8 or re.search(";16[BLN]", str(how)) or ("RGB", 65535) in how
        if mode[0] not in "IF" and sixteen:
            raise ValueError("16 bits a channel, of which 8 would be lost; save it as 16-bit grey")
        if kind != "MPO" and (pages := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"{pages} pictures in one file, expected one")
        tables = getattr(image, "quantization", None)
        negative = kind == "TIFF" and mode[0] in "IF" and image.tag_v2.get(262) == 0
        image.draft(None, (size, size))
        grey = image.convert("F" if mode[0] in "IF" else "L")
        if negative:  # Pillow turns 8 bits itself
            grey = PIL.Image.fromarray(sum(grey.getextrema()) - np.asarray(grey))
        with contextlib.suppress(Exception):  # no metadata makes a picture unreadable
            grey = grey.transpose(UPRIGHT[image.getexif()[0x0112]])
    about = ImageMode.getmode(mode)
    bits = 8 * int(about.typestr[-1]) * len(about.bands)
    return Decoded(grey, shape, mode, bits, kind, jpeg_quality(tables) if tables else 0)


def jpeg_quality(tables):
    """1 to 100 as libjpeg counts, from the quantisation tables; exact from 20 to 99."""
    scale = 100 * sum(tables[min(tables)]) / 3685  # the sum of the luminance table at quality 50
    return min(100, max(1, round(100 - scale / 2 if scale <= 100 else 5000 / scale)))


def decode_dicom(content):
    """The Decoded of a DICOM file: rescaled, in its VOI window, MONOCHROME1 turned (C.7.6.3)."""
    import pydicom
    from pydicom.pixels import apply_rescale, apply_voi_lut, get_decoder

    file = pydicom.dcmread(io.BytesIO(content))
    modality, mode = file.get("Modality") or "CR", file.get("PhotometricInterpretation")
    if modality.upper() not in MODALITIES:
        raise ValueError(f"DICOM of modality {modality}, expected {', '.join(MODALITIES)}")
    if "PixelData" not in file:
        raise ValueError("DICOM without a picture")
    if (frames := int(file.get("NumberOfFrames") or 1)) > 1:
        raise ValueError(f"{frames} pictures in one file, expected one")
    if mode not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"DICOM in {mode}, expected MONOCHROME1 or MONOCHROME2")
    check_shape(file.Columns, file.Rows)
    syntax = file.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        packages = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        raise ValueError(f"DICOM in {syntax.name}: .venv/bin/pip install {packages}")
    pixels = stored = file.pixel_array
    with contextlib.suppress(Exception):  # a header that makes no sense
        pixels = apply_rescale(stored, file)
        seen = apply_voi_lut(pixels, file)
        if ((seen > seen.min()) & (seen < seen.max())).mean() > 0.1:  # else it misses the film
            pixels = seen
    if mode == "MONOCHROME1":
        pixels = 2**file.BitsStored - 1 - pixels.astype(np.float64)
    if (padding := file.get("PixelPaddingValue")) is not None:
        ends = sorted((padding, file.get("PixelPaddingRangeLimit", padding)))
        outside = (stored >= ends[0]) & (stored <= ends[1])
        if not outside.all():
            pixels = np.where(outside, pixels[~outside].min(), pixels)
    eight = file.BitsStored <= 8 and pixels.min() >= 0 and pixels.max() <= 255
    grey = PIL.Image.fromarray(pixels.round().astype(np.uint8) if eight else np.float32(pixels))
    return Decoded(grey, (file.Columns, file.Rows), mode, file.BitsAllocated, "DICOM", 0)


def apply_window(image, window):
    """The grey image, PIL mode L, stretched between two of its own grey levels.

    An absolute grey level means nothing on a radiograph: exposure, export and windowing set it.
    window: per cent of the pixels that turn black, and as many that turn white; 0 leaves an 8-bit
    image as it is, and stretches one of 16 bits from its minimum to its maximum.
    """
    if image.mode == "L":
        return ImageOps.autocontrast(image, cutoff=window) if window else image
    pixels = np.asarray(image)
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are not finite")
    low, high = np.percentile(pixels, (window, 100 - window))
    pixels = ((pixels - low) / max(high - low, 1e-6) * 255).clip(0, 255)
    return PIL.Image.fromarray(pixels.astype(np.uint8))  # not rounded, as autocontrast does not


def explain_unreadable(path, error):
    """Why an image could not be read, in a few words."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError as failed:
        return failed.strerror or str(failed)
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the image (git lfs pull)"
    if start[:5].lower() in (b"<!doc", b"<html"):
        return "a web page, not an image"
    if isinstance(error, PIL.UnidentifiedImageError):
        dicom = " (DICOM has DICM at byte 128)" * (Path(path).suffix.lower() == ".dcm")
        return f"no image, or of an unknown format{dicom}"
    return " ".join(str(error).split())[:150] or type(error).__name__
