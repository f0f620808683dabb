"""cxr/decode.py: an image file becomes a grey picture, or is refused with the reason."""

import struct

import faults
import numpy as np
import pydicom
import pytest
from faults import damage, listing, picture, put, within
from helpers import LEVELS, grey, write_dicom
from phantoms import draw_phantom
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, JPEGLosslessSV1

import common
from cxr.decode import apply_window, decode
from cxr.files import hash_file
from cxr.patients import Xray, identify


@pytest.fixture
def dicom(tmp_path):
    """dicom(pixels, **tags) writes a DICOM file and returns its path."""
    return lambda *pixels, name="a.dcm", **tags: write_dicom(tmp_path / name, *pixels, **tags)


def load(path, window=0):
    """Returns the grey levels that the network sees, as int (224, 224)."""
    return grey(common.load_image(path, window))


def read_view(path, n_views=1):
    """Reads an image as in a training. Returns (its views, the reason if it cannot be read)."""
    _, views, reason = common.Views([Xray(path, 0, hash_file(path))], n_views, 2)[0]
    return views, reason


def test_the_window_alone_stretches_an_image_between_its_own_percentiles(phantom, tmp_path):
    phantom.save(tmp_path / "a.png")
    phantom.point([int(30 + level * 0.4) for level in range(256)]).save(tmp_path / "dim.png")
    stretched = grey(ImageOps.autocontrast(phantom, cutoff=2))
    assert (load(tmp_path / "a.png", window=0) == grey(phantom)).all()
    assert (load(tmp_path / "a.png", window=2) == stretched).all()
    assert np.abs(load(tmp_path / "dim.png", window=2) - stretched).max() <= 3


@pytest.mark.parametrize("has_bright_pixel", [False, True])
@pytest.mark.parametrize(
    ("suffix", "deepen"),
    [
        (".png", lambda levels: levels * 16),  # 12 bits
        (".tiff", lambda levels: levels * 16),
        (".png", lambda levels: levels * 100 + 5000),  # a part of 16 bits
        (".tiff", lambda levels: levels * 257),  # 16 bits
        (".tif", lambda levels: levels / np.float32(255)),
    ],
)
def test_16_bits_give_the_picture_of_8_bits(has_bright_pixel, suffix, deepen, phantom, tmp_path):
    levels = deepen(np.asarray(phantom, np.uint16))
    if has_bright_pixel:
        levels[5, 5] = 65535
    Image.fromarray(levels).save(tmp_path / f"a{suffix}")
    stretched = grey(ImageOps.autocontrast(phantom, cutoff=2))
    difference = np.abs(load(tmp_path / f"a{suffix}", 2) - stretched)
    assert difference.max() <= 2 + 255 * has_bright_pixel  # at that pixel, or next to it
    assert difference.mean() < 1


@pytest.mark.parametrize("size", [(600, 300), (300, 224), (224, 400), (150, 131)])
def test_the_whole_image_is_resized_and_nothing_is_cropped(size, phantom, tmp_path):
    film = phantom.resize(size)
    film.save(tmp_path / "a.png")
    expected = grey(film.resize((224, 224), Image.Resampling.BILINEAR))
    assert (load(tmp_path / "a.png") == expected).all()


PNGS = ["RGB.png", "RGBA.png", "LA.png", "P.png"]


@pytest.mark.parametrize("name", [*PNGS, "CMYK.tiff", "L.bmp", "L.pgm", "RGB.ppm", "RGB.jpg"])
def test_other_modes_and_formats_keep_their_grey_levels(name, phantom, tmp_path):
    phantom.convert(name.split(".")[0]).save(tmp_path / name, quality=100)
    assert np.abs(load(tmp_path / name) - grey(phantom)).max() <= 1


def test_a_large_jpeg_is_decoded_small_but_not_below_the_size_of_the_input(tmp_path):
    large = draw_phantom(np.random.default_rng(1), False, 1000)
    large.save(tmp_path / "a.jpeg", quality=90)
    assert decode(tmp_path / "a.jpeg", 224).grey.size == (250, 250)
    expected = grey(large.resize((224, 224), Image.Resampling.BILINEAR))
    assert np.abs(load(tmp_path / "a.jpeg") - expected).mean() < 2


def test_formats_that_pillow_opens_with_another_program_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(OSError, match="cannot identify"):
        decode(tmp_path / "a.png", 224)


def save_rotated(image, path, exposure_bias=0):
    """Saves a picture on its side, with EXIF data that say: rotate it by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    if exposure_bias:
        exif[0x8769] = {0x9204: exposure_bias}
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def save_with_impossible_exif(image, path):
    save_rotated(image, path, IFDRational(-1, 2))
    content = path.read_bytes()
    for kind in ("<ii", ">ii"):
        content = content.replace(struct.pack(kind, -1, 2), struct.pack(kind, -1, 0))
    assert content != path.read_bytes()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "save"),
    [("a.jpeg", save_with_impossible_exif), ("a.png", save_rotated), ("a.tiff", save_rotated)],
)
def test_metadata_may_turn_a_picture_but_not_make_it_unreadable(name, save, phantom, tmp_path):
    save(phantom, tmp_path / name)
    difference = np.abs(load(tmp_path / name) - grey(phantom))
    assert difference.mean() <= (3 if name == "a.jpeg" else 0)


def write_tiff(path, pixels, photometric, order="<", start=1024):
    """Writes a TIFF of a kind that Pillow cannot write.

    pixels: 256 x 256, (256, 256, 3) or three planes (3, 256, 256); photometric: 0 (white is 0),
    1 (black is 0) or 2 (RGB); order: "<" little-endian, ">" big-endian; start: byte of the pixels.
    """
    channels, bits = (1 if pixels.ndim == 2 else 3), 8 * pixels.itemsize
    n_strips = 3 if len(pixels) == 3 else 1
    size = pixels.nbytes // n_strips
    strips = [start + i * size for i in range(n_strips)]
    tags = {256: [256], 257: [256], 258: [bits] * channels, 259: [1], 262: [photometric]}
    tags |= {273: strips, 277: [channels], 278: [256], 279: [size] * n_strips}
    tags[284] = [2 if n_strips == 3 else 1]
    entries, arrays = b"", b""
    for tag, values in tags.items():
        content = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:  # then the entry holds their position, after the entries
            position = 14 + 12 * len(tags) + len(arrays)
            arrays += content
            content = struct.pack(f"{order}I", position)
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + content
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    header = (header + entries + bytes(4) + arrays).ljust(start, b"\0")
    path.write_bytes(header + pixels.astype(pixels.dtype.newbyteorder(order)).tobytes())
    return path


def test_a_16_bit_tiff_is_read_in_both_byte_orders_and_white_may_be_0(tmp_path):
    expected = grey(apply_window(common.PREPARE(Image.fromarray(LEVELS / np.float32(16))), 2))
    for order in "<>":
        plain = load(write_tiff(tmp_path / "a.tiff", LEVELS, 1, order), 2)
        assert np.abs(plain - expected).max() <= 1 and plain[0, 0] == 0
    negative = load(write_tiff(tmp_path / "b.tiff", LEVELS, 0), 2)
    assert np.abs(negative - (255 - plain)).max() <= 1


def test_the_rare_files_that_pillow_cannot_read_are_refused_with_a_reason(phantom, tmp_path):
    path = write_tiff(tmp_path / "a.tiff", LEVELS, 0, ">")  # big-endian, white is 0
    assert read_view(path)[1] == "not an image, or in an unknown format"
    comment = PngInfo()
    comment.add_text("Comment", "x" * 3_000_000, zip=True)
    phantom.save(tmp_path / "a.png", pnginfo=comment)
    assert "data too large" in read_view(tmp_path / "a.png")[1]


def test_16_bits_per_channel_are_refused_in_ppm_and_tiff(tmp_path):
    pixels = np.repeat(LEVELS[..., None], 3, 2).astype(">u2").tobytes()
    put(tmp_path / "a.ppm", b"P6\n256 256\n65535\n" + pixels)
    write_tiff(tmp_path / "a.tiff", np.stack([LEVELS] * 3), 2)
    for name in ("a.ppm", "a.tiff"):
        with pytest.raises(ValueError, match="16 bits per channel"):
            decode(tmp_path / name, 224)


def test_a_picture_that_begins_at_byte_65535_is_not_taken_for_16_bits(tmp_path):
    pixels = np.tile(np.arange(256, dtype=np.uint8)[:, None], (256, 1, 3))
    path = write_tiff(tmp_path / "a.tiff", pixels, 2, start=65535)
    assert (grey(decode(path, 224).grey) == pixels[..., 0]).all()


NEGATIVE = {"PhotometricInterpretation": "MONOCHROME1"}
# name: (the file with the same picture, tags of the DICOM file)
DICOMS = {
    "8 bits": ("8.png", {}),
    "8 bits, rescaled": ("8.png", {"RescaleSlope": 1, "RescaleIntercept": 0}),
    "8 bits, MONOCHROME1": ("8.png", NEGATIVE),
    "12 bits": ("12.png", {}),
    "12 bits, MONOCHROME1": ("12.png", NEGATIVE),
    "12 bits, full window": ("12.png", {"WindowCenter": 2048, "WindowWidth": 4096}),
    "12 bits, impossible window": ("12.png", {"WindowCenter": 2048, "WindowWidth": 0}),
    "16 bits": ("12.png", {"BitsStored": 16, "HighBit": 15}),
    "signed": ("12.png", {"RescaleSlope": 1, "RescaleIntercept": 2000}),
    "JPEG": ("a.jpeg", {"syntax": JPEGBaseline8Bit}),
}


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("name", DICOMS)
def test_dicom_of_any_name_gives_the_picture_of_the_same_png(name, window, dicom, tmp_path):
    reference, tags = DICOMS[name]
    large = draw_phantom(np.random.default_rng(3), True, 300)
    pixels = np.asarray(large)
    if reference == "12.png":
        pixels = pixels.astype(np.uint16) * 16
    if reference == "a.jpeg":
        large.save(tmp_path / reference, quality=75)
        tags = tags | {"encoded": encapsulate([(tmp_path / reference).read_bytes()])}
    else:
        Image.fromarray(pixels).save(tmp_path / reference)
    if tags is NEGATIVE:
        pixels = (4095 if reference == "12.png" else 255) - pixels
    if name == "signed":
        pixels = pixels.astype(np.int16) - 2000
    path = dicom(pixels, name="dicom.png", **tags)
    difference = np.abs(load(path, window) - load(tmp_path / reference, window))
    assert difference.max() <= (1 if reference == "12.png" else 0)


def windowed(levels, center, width, low, high):
    """Returns the grey levels of a VOI window, as DICOM PS3.3 C.11.2.1.2.1 defines it."""
    scaled = ((levels - (center - 0.5)) / (width - 1) + 0.5) * (high - low) + low
    scaled[levels <= center - 0.5 - (width - 1) / 2] = low
    scaled[levels > center - 0.5 + (width - 1) / 2] = high
    return scaled


def lut(first, bits, table):
    """Returns a LUT Sequence that maps `first`, first + 1, ... to the numbers of a table."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS", [len(table), first, bits])
    item.add_new("LUTData", "US", list(table))
    return pydicom.Sequence([item])


def noise(low, high, dtype):
    """Returns noise of `dtype` between two values; both occur, and many values between do not."""
    pixels = np.random.default_rng(0).integers(low, high, (90, 80), dtype, endpoint=True)
    pixels[0, :2] = low, high
    return pixels


CURVE = [level * level // 255 for level in range(256)]
NOISE12, NOISE8 = noise(100, 4000, np.uint16), noise(0, 250, np.uint8)
SIGNED, WIDE = noise(-(2**15), 2**15 - 1, np.int16), noise(0, 2**31, np.uint32)
DEEP = {"BitsStored": 16, "HighBit": 15}
SLOPE = {"RescaleSlope": "0.3", "RescaleIntercept": "-7.7"}
PADDED = np.where(NOISE12 < 2000, 4095, NOISE12)
# name: (stored values, tags, the grey levels that they mean, computed for each pixel)
GREY_LEVELS = {
    "12 bits": (NOISE12, {}, NOISE12),
    "MONOCHROME1": (NOISE12, NEGATIVE, 4095 - NOISE12.astype(float)),
    "8 bits and MONOCHROME1": (NOISE8, NEGATIVE, 255 - NOISE8.astype(float)),
    "slope": (NOISE12, SLOPE, NOISE12 * 0.3 - 7.7),
    "signed, all 16 bits, slope": (SIGNED, DEEP | SLOPE, SIGNED * 0.3 - 7.7),
    "window": (
        NOISE12,
        {"WindowCenter": 2000, "WindowWidth": 1001},
        windowed(NOISE12.astype(float), 2000, 1001, 0, 4095),
    ),
    "window and slope": (
        NOISE12,
        SLOPE | {"WindowCenter": 500, "WindowWidth": 400},
        windowed(NOISE12 * 0.3 - 7.7, 500, 400, -7.7, 4095 * 0.3 - 7.7),
    ),
    "VOI LUT": (NOISE8, {"VOILUTSequence": lut(0, 8, CURVE)}, np.array(CURVE)[NOISE8]),
    "padding": (PADDED, {"PixelPaddingValue": 4095}, np.where(PADDED == 4095, 2000, PADDED)),
    "32 bits": (WIDE, {"BitsStored": 32, "HighBit": 31}, WIDE),
}


@pytest.mark.parametrize("name", GREY_LEVELS)
def test_each_pixel_of_a_dicom_file_has_the_grey_level_that_its_value_means(name, dicom):
    stored, tags, expected = GREY_LEVELS[name]
    grey_levels = np.asarray(decode(dicom(stored, **tags), 224).grey)
    assert (grey_levels == expected.astype(grey_levels.dtype)).all()
    assert grey_levels.dtype == (np.uint8 if stored.itemsize == 1 else np.float32)


def test_a_window_is_not_applied_to_few_pixels_even_if_they_have_most_of_the_values(dicom):
    stored = np.full(7200, 10, np.uint16)
    stored[:3000] = 1500
    stored[3000:3200] = np.arange(1000, 1200)  # 3 % of the pixels, 200 of the 202 values
    path = dicom(stored.reshape(90, 80), WindowCenter=1100, WindowWidth=300)
    assert (np.asarray(decode(path, 224).grey) == stored.reshape(90, 80)).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_lookup_table_that_inverts_is_applied(name, bits, dicom):
    table = [(4095 - value) * 2**bits // 4096 for value in range(4096)]
    grey_levels = np.asarray(decode(dicom(NOISE12, **{name: lut(0, bits, table)}), 224).grey)
    assert (grey_levels == np.array(table)[NOISE12]).all()


@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_lookup_table_of_one_byte_for_each_entry_is_applied(name, dicom):
    table = bytes(range(255, -1, -1))
    sequence = lut(0, 8, table)
    sequence[0]["LUTData"].VR = "OW"
    sequence[0].LUTData = table
    grey_levels = np.asarray(decode(dicom(NOISE8, **{name: sequence}), 224).grey)
    assert (grey_levels == 255 - NOISE8).all()


INVERTING = {"ModalityLUTSequence": lut(0, 16, range(4095, -1, -1))}
INVERSE, IDENTITY = {"PresentationLUTShape": "INVERSE"}, {"PresentationLUTShape": "IDENTITY"}
# name: (tags, whether the stored values are inverted)
INVERSIONS = {
    "MONOCHROME2": ({}, False),
    "MONOCHROME2, IDENTITY": (IDENTITY, False),
    "MONOCHROME2, INVERSE": (INVERSE, True),
    "MONOCHROME1": (NEGATIVE, True),
    "MONOCHROME1, INVERSE": (NEGATIVE | INVERSE, True),
    "MONOCHROME2, a table that inverts": (INVERTING, True),
    "MONOCHROME2, a table that inverts, INVERSE": (INVERTING | INVERSE, False),
    "MONOCHROME1, a table that inverts": (INVERTING | NEGATIVE, False),
}


@pytest.mark.parametrize("name", INVERSIONS)
def test_a_dicom_file_is_inverted_exactly_as_often_as_its_header_says(name, dicom):
    tags, is_inverted = INVERSIONS[name]
    expected = 4095 - NOISE12 if is_inverted else NOISE12
    assert (np.asarray(decode(dicom(NOISE12, **tags), 224).grey) == expected).all()


def test_the_window_of_dicom_is_applied_unless_it_is_outside_the_pixels(dicom):
    pixels = load(dicom(LEVELS, WindowCenter=1024, WindowWidth=512))
    black, white = 760 * 224 // 4096, 1300 * 224 // 4096
    assert (pixels[:, :black] == 0).all() and (pixels[:, white:] >= 254).all()
    plain = load(dicom(LEVELS), 2)
    for center, width in ((40, 4), (-600, 100)):
        assert (load(dicom(LEVELS, WindowCenter=center, WindowWidth=width), 2) == plain).all()


def test_the_padding_of_dicom_is_black_and_does_not_change_the_picture(dicom):
    plain, padded = load(dicom(LEVELS), 2), LEVELS // 2
    padded[:60] = 4000 + np.arange(256) % 90
    pixels = load(dicom(padded, PixelPaddingValue=4000, PixelPaddingRangeLimit=4095), 2)
    assert (pixels[:50] == 0).all() and np.abs(pixels[60:] - plain[60:]).max() < 25
    padded[:60] = 4095
    assert (load(dicom(padded, PixelPaddingValue=4095), 2)[:50] == 0).all()


def strip_beginning(path, vr):
    """Writes a DICOM file again without its first 132 bytes, or also without its file metadata.

    vr: of the file without its metadata, "explicit" or "implicit"; None keeps the metadata.
    """
    if vr is None:
        path.write_bytes(path.read_bytes()[128 + 4 :])
        return
    file = pydicom.dcmread(path)
    file.preamble, file.file_meta = None, pydicom.dataset.FileMetaDataset()
    file.save_as(path, implicit_vr=vr == "implicit", little_endian=True)


@pytest.mark.parametrize("vr", [None, "explicit", "implicit"])
def test_a_dicom_file_without_its_beginning_is_read_and_its_patient_known(vr, dicom):
    path = dicom(NOISE12, PatientID="P-1", VOILUTSequence=lut(0, 12, range(4095, -1, -1)))
    patient = identify(path, 0, "train", {}).patient
    strip_beginning(path, vr)
    assert (np.asarray(decode(path, 224).grey) == 4095 - NOISE12).all()
    assert patient and identify(path, 0, "train", {}).patient == patient


def test_a_dcm_file_that_is_not_dicom_is_explained(tmp_path):
    put(tmp_path / "a.dcm", b"Patient: P-1" * 100)
    assert "DICM at byte 128" in read_view(tmp_path / "a.dcm")[1]
    put(tmp_path / "b.dcm", b"\x08\x00\x05\x00" + bytes(1000))
    assert read_view(tmp_path / "b.dcm")[1]


@pytest.mark.parametrize("modality", ["OT", "SC", "ot", ""])
def test_a_grey_capture_of_a_film_is_read(modality, dicom):
    grey_levels = np.asarray(decode(dicom(NOISE12, Modality=modality), 224).grey)
    assert (grey_levels == NOISE12).all()


PACKAGES = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
REFUSED = {
    "modality CT, expected CR, DX, RG, OT, SC": {"Modality": "CT"},
    "in PALETTE COLOR": {"Modality": "SC", "PhotometricInterpretation": "PALETTE COLOR"},
    "3 pictures in one file": {"NumberOfFrames": 3, "pixels": np.stack([LEVELS] * 3)},
    "in RGB": {"PhotometricInterpretation": "RGB"},
    PACKAGES: {"syntax": JPEGLosslessSV1, "encoded": encapsulate([b"\xff\xd8"])},
    "without a picture": {"pixels": np.zeros((0, 0), np.uint8)},
    "not the shape of a radiograph": {"Rows": 5000, "Columns": 2},
    "pixels, expected at most": {"Rows": 60000, "Columns": 60000},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_dicom_that_is_not_one_radiograph_is_refused_with_the_reason(reason, dicom):
    path = dicom(**({"pixels": LEVELS} | REFUSED[reason]))
    assert reason in read_view(path)[1]


@pytest.mark.parametrize("name", faults.BAD_IMAGES)
def test_a_bad_image_is_named_with_the_reason_by_every_script(name, refused, home):
    file, content, reason = faults.BAD_IMAGES[name]
    for script, split in (("train", "train"), ("evaluate", "test")):
        path = home / "data" / split / "NORMAL" / file
        put(path, content)
        before = listing(home / "data")
        with within(20):
            line = refused(2, script)
        assert f"{path}: " in line and reason in line and "--skip-bad" in line, line
        assert listing(home / "data") == before
    assert f"{path}: " in refused(2, "evaluate", path)


def test_a_damaged_image_is_read_or_explained_in_every_format(fuzz, tmp_path, say):
    kinds = [{"form": form} for form in ("jpeg", "png", "tiff", "webp", "bmp", "ppm")]
    kinds += [{"form": "jpeg", "progressive": True}, {"form": "png", "mode": "I;16"}]
    kinds += [{"form": "tiff", "compression": "tiff_lzw"}, {"form": "webp", "lossless": True}]
    sources, count, n_explained = [picture(**kind) for kind in kinds], fuzz.count(200, 4000), 0
    for i in range(count):
        how, content = damage(fuzz.rng, sources[i % len(sources)])
        put(tmp_path / "x.png", content)
        with within(20):
            views, reason = read_view(tmp_path / "x.png", n_views=3)
        case = kinds[i % len(sources)], how, reason
        assert views.shape == (3, 1, 224, 224), case
        assert len(reason) <= 200 and "\n" not in reason, case
        n_explained += bool(reason)
    assert 0 < n_explained < count
    say(f"images: {count} damaged ones tried, {n_explained} explained, the others decoded")
