"""Decodes an image file into a grey picture. Files are decoded here and nowhere else."""

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from PIL import ImageChops, ImageMode, ImageOps

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # for others, Pillow may start programs
CAPTURES = ("OT", "SC")  # modalities of DICOM: pictures of a film or screen
MODALITIES = ("CR", "DX", "RG", *CAPTURES)  # that can be radiographs
MAX_TINT = 10  # grey levels by which the channels of a grey picture may differ
SIZE = 224  # pixels, height and width of the network's input
MAX_PIXELS = 50_000_000  # radiographs have up to 20 million; a decompression bomb has more

EXIF_ORIENTATION, TIFF_BITS, TIFF_PHOTOMETRIC = 274, 258, 262  # numbers of metadata tags
UPRIGHT = {  # EXIF orientation: what turns the picture upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
    """The pixels of an X-ray, and properties of its file."""

    grey: PIL.Image.Image  # upright; mode L, or mode F if 8 bits are not enough
    size: tuple  # width and height in the file, in pixels
    mode: str  # L, RGB, I;16, MONOCHROME1, ...
    bits: int  # per pixel, all channels together
    format: str  # JPEG, DICOM, ...
    quality: int  # of a JPEG, 1 to 100 on libjpeg's scale; 0 for other formats
    has_colours: bool = False  # False also for RGB with equal channels


def decode(source, size):
    """Decodes an image file. source: a path, or the content of a file as bytes.

    size: a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but never below `size` pixels.
    Raises an error with the reason if the file is damaged, or cannot be one radiograph.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual metadata; damaged pixels raise an error
        try:
            return decode_dicom(content) if is_dicom(content) else decode_with_pillow(content, size)
        except AttributeError as error:
            raise ValueError(f"the header is not complete: {error}") from None


def is_dicom(content):
    """Returns True if bytes (at least the first 132) are the beginning of a DICOM file."""
    # Some programs leave out these 132 bytes. Then an element of group 0002 or 0008 comes first.
    return content[128:132] == b"DICM" or bool(re.match(rb"[\2\x08]\0.\0", content, re.DOTALL))


def check_shape(width, height):
    """Raises ValueError if a picture is too large, or too narrow, to be a radiograph."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, expected at most {MAX_PIXELS:,}")
    if max(width, height) > 20 * min(width, height):
        raise ValueError(f"{width}x{height} pixels, which is not the shape of a radiograph")


def check_levels(low, high):
    """Raises ValueError if the lowest grey level of a picture is also its highest one."""
    if low == high:
        raise ValueError("all pixels have the same grey level")


def decode_with_pillow(content, size):
    """Decodes all formats except DICOM."""
    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
        # Read these first: draft, convert and transpose change or lose them.
        mode, shape, file_format = image.mode, image.size, image.format
        tables = getattr(image, "quantization", None)  # of a JPEG
        check_pillow_image(image)
        image.draft(None, (size, size))
        is_deep = mode[0] in "IF"  # integers of 16 or 32 bits, or floats
        has_colours = not is_deep and mode not in ("L", "LA") and channels_differ(image)
        grey = image.convert("F" if is_deep else "L")
        # If white is 0 in a TIFF, Pillow inverts 8-bit pictures, but not deeper ones.
        if is_deep and file_format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == 0:
            low, high = grey.getextrema()
            grey = PIL.Image.fromarray(low + high - np.asarray(grey))
        # A KeyError means that it is upright. Damaged metadata does no harm either.
        with contextlib.suppress(Exception):
            grey = grey.transpose(UPRIGHT[image.getexif()[EXIF_ORIENTATION]])
    check_levels(*grey.getextrema())
    pillow_mode = ImageMode.getmode(mode)
    bytes_per_channel = int(pillow_mode.typestr[-1])
    bits = 8 * bytes_per_channel * len(pillow_mode.bands)
    quality = 0
    if tables:
        # Exact from 20 to 99 for libjpeg. At 50, its luminance table sums to about 3685.
        scale = 100 * sum(tables[min(tables)]) / 3685
        quality = 100 - scale / 2 if scale <= 100 else 5000 / scale
        quality = min(100, max(1, round(quality)))
    return Decoded(grey, shape, mode, bits, file_format, quality, has_colours)


def channels_differ(image):
    """Returns True if the red, green and blue of a picture differ by more than rounding."""
    red, green, blue = image.convert("RGB").split()
    differences = [ImageChops.difference(red, other).getextrema() for other in (green, blue)]
    return max(high for _, high in differences) > MAX_TINT


def check_pillow_image(image):
    """Raises ValueError for a wrong shape, two colours, 16-bit colour or several pictures."""
    check_shape(*image.size)
    if image.mode == "1":
        raise ValueError("a picture of two colours, expected grey levels")
    bits = max(getattr(image, "tag_v2", {}).get(TIFF_BITS, (8,)))
    # How Pillow decodes the file: for example "RGB;16B" in TIFF and PNG, ("RGB", 65535) in PPM.
    decoders = [tile.args for tile in image.tile]
    has_16_bits = bits > 8 or re.search(";16[BLN]", str(decoders)) or ("RGB", 65535) in decoders
    if image.mode[0] not in "IF" and has_16_bits:
        raise ValueError("16 bits per channel, but Pillow reads only 8; save it as 16-bit grey")
    n_pictures = getattr(image, "n_frames", 1)
    if n_pictures > 1 and image.format != "MPO":  # MPO: a JPEG with a preview
        raise ValueError(f"{n_pictures} pictures in one file, expected one")


def decode_dicom(content):
    """Decodes a DICOM file. Source: DICOM PS3.3, C.7.6.3 and C.11."""
    import pydicom

    file = pydicom.dcmread(io.BytesIO(content), force=True)  # also without DICM at byte 128
    if "TransferSyntaxUID" not in file.file_meta:  # a compressed file always has it
        is_implicit = file.original_encoding[0]
        uids = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian
        file.file_meta.TransferSyntaxUID = uids[is_implicit]
    check_dicom(file)
    # A grey level depends only on the stored value. So it is computed once for each value, and
    # every pixel looks it up: this takes a third of the time for a film of 3000x2500 pixels.
    values, counts, places = count_values(file.pixel_array)
    levels = grey_levels(values, counts, file)
    check_levels(levels.min(), levels.max())
    grey = PIL.Image.fromarray(levels[places])
    shape, mode = (file.Columns, file.Rows), file.PhotometricInterpretation
    return Decoded(grey, shape, mode, file.BitsAllocated, "DICOM", 0)


def check_dicom(file):
    """Raises ValueError if a DICOM file is not exactly one readable radiograph in grey levels."""
    from pydicom.pixels import get_decoder

    modality = file.get("Modality") or "CR"
    if modality.upper() not in MODALITIES:
        raise ValueError(f"DICOM of modality {modality:.16}, expected {', '.join(MODALITIES)}")
    if "PixelData" not in file:
        raise ValueError("DICOM without a picture")
    n_pictures = int(file.get("NumberOfFrames") or 1)
    if n_pictures > 1:
        raise ValueError(f"{n_pictures} pictures in one file, expected one")
    colours = file.get("PhotometricInterpretation")
    if colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"DICOM in {colours}, expected MONOCHROME1 or MONOCHROME2")
    check_shape(file.Columns, file.Rows)
    syntax = file.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        command = ".venv/bin/pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        raise ValueError(f"DICOM in {syntax.name}, which needs more packages: {command}")


def count_values(stored):
    """Counts the values of an array of integers.

    Returns (values, int64 how often each occurs, the place of each pixel's value in `values`). A
    place that no pixel has holds the lowest value again, with count 0.
    """
    low, high = int(stored.min()), int(stored.max())
    if high - low >= 2**16:  # 32 bits per pixel
        values, places, counts = np.unique(stored, return_inverse=True, return_counts=True)
        return values, counts, places.reshape(stored.shape)
    # If a difference is too large for a signed type, it is right as an unsigned number.
    places = (stored - stored.min()).view(f"u{stored.itemsize}")
    # bincount copies its argument to int64, and a part of the picture fits into the CPU's cache.
    parts = np.array_split(places, 100)
    counts = sum(np.bincount(part.ravel(), minlength=high - low + 1) for part in parts)
    values = np.where(counts > 0, np.arange(low, high + 1), low).astype(stored.dtype)
    return values, counts, places


def grey_levels(values, counts, file):
    """Computes the grey level of each stored value: uint8, or float32 if 8 bits are not enough.

    values, counts: see count_values. White is the highest grey level.
    """
    levels = apply_dicom_window(values, counts, file)
    # MONOCHROME1: white is 0. DICOM requires INVERSE with it: both together invert only once.
    is_negative = file.PhotometricInterpretation == "MONOCHROME1"
    if is_negative or file.get("PresentationLUTShape") == "INVERSE":
        levels = 2**file.BitsStored - 1 - levels.astype(np.float64)
    levels = blacken_padding(levels, values, file)
    if file.BitsStored <= 8 and levels.min() >= 0 and levels.max() <= 255:
        return levels.round().astype(np.uint8)
    return np.float32(levels)


def apply_dicom_window(values, counts, file):
    """Applies the modality LUT or rescale values, then the VOI LUT or window.

    A step is left out if the header contradicts itself or if the result makes no sense.
    """
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    correct_lookup_tables(file)
    levels = values
    with contextlib.suppress(Exception):  # the header contradicts itself
        levels = apply_modality_lut(values, file)
        windowed = apply_voi_lut(levels, file)
        is_between = (windowed > windowed.min()) & (windowed < windowed.max())
        # If nearly all pixels lie outside the window, the picture would be black or white.
        if counts[is_between].sum() / counts.sum() > 0.1:
            levels = windowed
    return levels


def correct_lookup_tables(file):
    """Declares 16 bits for lookup tables that pydicom 3.0 would ignore, or apply modulo 256.

    It ignores modality LUTs of 9 to 15 bits, and those of 8 bits with one byte for each entry. A
    VOI LUT of 8 bits with more than 256 entries would give a wrong picture. The numbers in the
    tables stay the same.
    """
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        for item in file.get(name) or []:
            with contextlib.suppress(Exception):  # the header is not complete
                data = item.LUTData
                if isinstance(data, bytes) and len(data) == item.LUTDescriptor[0]:
                    item["LUTData"].VR, item.LUTDescriptor[2] = "OW", 16
                    item.LUTData = np.frombuffer(data, np.uint8).astype("<u2").tobytes()
                if item.LUTDescriptor[2] > 8 or name == "VOILUTSequence":
                    item.LUTDescriptor[2] = 16


def blacken_padding(levels, values, file):
    """Sets the pixels outside the X-ray (PixelPaddingValue) to the lowest level of the others."""
    padding = file.get("PixelPaddingValue")
    if padding is not None:
        low, high = sorted((padding, file.get("PixelPaddingRangeLimit", padding)))
        is_padding = (values >= low) & (values <= high)
        if not is_padding.all():
            levels = np.where(is_padding, levels[~is_padding].min(), levels)
    return levels


def apply_window(image, window):
    """Stretches a grey picture between two of its own grey levels. Returns PIL, mode L.

    window: per cent of the pixels that become black, and the same at the white end. 0 leaves an
    8-bit picture unchanged, and stretches a 16-bit picture from its minimum to its maximum.
    """
    # The absolute grey level of a radiograph means nothing: exposure and display decide it.
    if image.mode == "L":
        return ImageOps.autocontrast(image, cutoff=window) if window else image
    pixels = np.asarray(image)
    if not np.isfinite(pixels).all():
        raise ValueError("some pixels are not finite")
    low, high = np.percentile(pixels, (window, 100 - window))
    pixels = ((pixels - low) / max(high - low, 1e-6) * 255).clip(0, 255)
    # autocontrast cuts decimals off, so do it here: 8 and 16 bits give the same picture.
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def explain_unreadable(path, error):
    """Explains in a few words why an image could not be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError as open_error:
        return open_error.strerror or str(open_error)
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the image (run git lfs pull)"
    if start[:5].lower() in (b"<!doc", b"<html"):
        return "a web page, not an image"
    if isinstance(error, PIL.UnidentifiedImageError):
        hint = " (a DICOM file has DICM at byte 128)" if Path(path).suffix.lower() == ".dcm" else ""
        return f"not an image, or in an unknown format{hint}"
    return " ".join(str(error).split())[:200] or type(error).__name__
