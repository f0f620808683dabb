"""cxr/decode.py: any image file becomes a grey picture, or is refused with the reason."""

import struct

import faults
import numpy as np
import pytest
from faults import damage, listing, picture, put, within
from helpers import LEVELS, grey, read_probs, write_dicom
from phantoms import draw_phantom
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, JPEGLosslessSV1

import common
from cxr.decode import apply_window, decode, explain_unreadable
from cxr.files import hash_file
from cxr.folders import list_images
from cxr.patients import Xray


@pytest.fixture(scope="module")
def large_phantom():
    return draw_phantom(np.random.default_rng(3), True, 300)


# ---------------------------------------------------------------- the picture


def test_an_image_is_stretched_between_its_own_percentiles(phantom, tmp_path):
    phantom.save(tmp_path / "a.png")
    expected = ImageOps.autocontrast(phantom, cutoff=2)
    assert (grey(common.load_image(tmp_path / "a.png", 2)) == grey(expected)).all()
    assert (grey(common.load_image(tmp_path / "a.png", 0)) == grey(phantom)).all()
    dim = phantom.point([int(30 + level * 0.4) for level in range(256)])
    dim.save(tmp_path / "dim.png")
    assert np.abs(grey(common.load_image(tmp_path / "dim.png", 2)) - grey(expected)).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_sixteen_bits_give_the_picture_of_eight_and_one_bright_pixel_changes_nothing(
    spoilt, name, phantom, tmp_path
):
    levels = np.asarray(phantom, np.uint16) * 16  # 12 bits, as detectors have them
    expected = grey(ImageOps.autocontrast(phantom, cutoff=2))
    levels[5, 5] = 65535 if spoilt else levels[5, 5]
    Image.fromarray(levels).save(tmp_path / name)
    found = grey(common.load_image(tmp_path / name, 2))
    assert np.abs(found - expected).max() <= 2 + 255 * spoilt  # at that pixel, or beside
    assert np.abs(found - expected).mean() < 1


def test_the_whole_film_is_resized_and_nothing_is_cropped(tmp_path):
    film = np.full((300, 600), 100, np.uint8)
    film[:, :20] = film[:, -20:] = 200  # what a centre crop would take off
    Image.fromarray(film).save(tmp_path / "wide.png")
    found = grey(common.load_image(tmp_path / "wide.png", 0))
    assert found.shape == (224, 224)
    assert (found[:, :5] > 190).all() and (found[:, -5:] > 190).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK"])
def test_other_modes_come_out_with_their_grey_levels(phantom, mode, tmp_path):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    phantom.convert(mode).save(path)
    difference = np.abs(grey(common.load_image(path, 0)) - grey(phantom))
    assert difference.max() <= 1


def test_a_rotated_photograph_is_turned_upright(phantom, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    phantom.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert (grey(common.load_image(tmp_path / "a.png", 0)) == grey(phantom)).all()


def test_a_large_jpeg_is_decoded_small_but_never_below_what_the_network_sees(tmp_path):
    large = draw_phantom(np.random.default_rng(1), False, 1000)
    large.save(tmp_path / "a.jpeg", quality=90)
    assert decode(tmp_path / "a.jpeg", 224).grey.size == (250, 250)
    plain = large.resize((224, 224), Image.Resampling.BILINEAR)
    assert np.abs(grey(common.load_image(tmp_path / "a.jpeg", 0)) - grey(plain)).mean() < 2


def test_no_format_is_tried_that_pillow_hands_to_another_program(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(OSError, match="cannot identify"):
        decode(tmp_path / "a.png", 224)


def test_every_kind_of_file_scores_as_the_grey_picture_in_it(run_evaluate, data, tmp_path):
    with Image.open(list_images(data / "test/PNEUMONIA")[1]) as image:
        plain = image.convert("L")
    (folder := tmp_path / "kinds").mkdir()
    grey, exif = np.asarray(plain).astype(np.uint16), Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    Image.fromarray(grey * 100 + 5000).save(folder / "16.png")
    Image.fromarray(grey * 257).save(folder / "16.tiff")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tif")
    plain.convert("RGB").save(folder / "rgb.jpg", quality=100, subsampling=0)
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=exif)
    for name in ("8.png", "8.bmp", "8.pgm"):
        plain.save(folder / name)
    for mode, name in (("RGB", "rgb.ppm"), ("RGBA", "a.png"), ("P", "p.png"), ("LA", "la.png")):
        plain.convert(mode).save(folder / name)
    assert run_evaluate(folder) == 0
    probs = read_probs(tmp_path / "results/new_predictions.csv")
    assert len(probs) == 12
    for name, prob in probs.items():
        assert prob == pytest.approx(probs[str(folder / "8.png")], abs=2e-3), name


def test_no_metadata_makes_a_picture_unreadable(large_phantom, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9204] = IFDRational(-1, 2)  # an exposure bias that becomes -1/0
    large_phantom.transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a.jpeg", exif=exif, quality=95
    )
    content = (tmp_path / "a.jpeg").read_bytes()
    bias = next(b for b in (struct.pack(o + "ii", -1, 2) for o in "<>") if b in content)
    (tmp_path / "a.jpeg").write_bytes(content.replace(bias, bias.replace(b"\x02", b"\0")))
    text = PngInfo()
    text.add_text("Comment", "x" * 3_000_000, zip=True)
    large_phantom.save(tmp_path / "b.png", pnginfo=text)
    large_phantom.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c.tiff", exif=exif)
    upright = grey(common.PREPARE(large_phantom))
    for name in ("a.jpeg", "b.png", "c.tiff"):
        assert np.abs(grey(common.load_image(tmp_path / name, 0)) - upright).mean() < 3, name


# ---------------------------------------------------------------- TIFF and PPM


def patched_tiff(path, photometric, big=False):
    """LEVELS as a 16-bit TIFF whose tag 262 says `photometric`; big: big-endian, by hand."""
    if not big:
        Image.fromarray(LEVELS).save(path)
        tag = struct.Struct("<HHIHH")
        content, new = path.read_bytes(), tag.pack(262, 3, 1, photometric, 0)
        path.write_bytes(content.replace(tag.pack(262, 3, 1, 1, 0), new))
        return path
    tags = {256: 256, 257: 256, 258: 16, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 256}
    tags[279] = LEVELS.size * 2
    start = 8 + LEVELS.size * 2
    entries = [struct.pack(">HHII", key, 4, 1, value) for key, value in tags.items()]
    directory = struct.pack(">H", len(tags)) + b"".join(entries) + bytes(4)
    path.write_bytes(
        b"MM\0*" + struct.pack(">I", start) + LEVELS.astype(">u2").tobytes() + directory
    )
    return path


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_16_bits_is_read_in_both_orders_and_white_may_be_0(big, tmp_path):
    plain = grey(common.load_image(patched_tiff(tmp_path / "a.tiff", 1, big), 2))
    negative = grey(common.load_image(patched_tiff(tmp_path / "b.tiff", 0, big), 2))
    expected = grey(apply_window(common.PREPARE(Image.fromarray(LEVELS / np.float32(16))), 2))
    assert np.abs(plain - expected).max() <= 1 and plain[0, 0] == 0
    assert np.abs(negative - (255 - plain)).max() <= 1


def test_colour_of_16_bits_is_refused_in_every_format(tmp_path):
    pixels = np.repeat(LEVELS[..., None], 3, 2).astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P6\n256 256\n65535\n" + pixels)
    planes = np.repeat(LEVELS[None], 3, 0).astype("<u2").tobytes()
    tags = {256: 256, 257: 256, 258: (16, 16, 16), 259: 1, 262: 2, 273: 0, 277: 3, 278: 256}
    tags |= {279: 0, 284: 2}
    extra = {258: (16,) * 3, 273: [8 + i * 131072 for i in range(3)], 279: [131072] * 3}
    at, data, entries = 8 + len(planes), b"", []
    for key in sorted(tags):
        if key in extra:
            kind, code = ("H", 3) if key == 258 else ("I", 4)
            entries.append(struct.pack("<HHII", key, code, 3, at + len(data)))
            data += struct.pack(f"<3{kind}", *extra[key]).ljust(12, b"\0")
        else:
            entries.append(struct.pack("<HHII", key, 4, 1, tags[key]))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    start = struct.pack("<I", at + len(data))
    (tmp_path / "b.tiff").write_bytes(b"II*\0" + start + planes + data + directory)
    for name in ("a.ppm", "b.tiff"):
        with pytest.raises(ValueError, match="16 bits a channel"):
            decode(tmp_path / name, 224)


def test_where_a_picture_stands_in_its_file_does_not_matter(tmp_path):
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0).repeat(3, 2)
    tags = {256: 256, 257: 256, 258: 8, 259: 1, 262: 2, 273: 65535, 277: 3, 278: 256}
    tags[279] = pixels.size
    entries = [struct.pack("<HHII", key, 4, 1, value) for key, value in tags.items()]
    entries[2] = struct.pack("<HHII", 258, 3, 3, 8)  # 8, 8, 8 at byte 8
    content = b"II*\0" + struct.pack("<I3H", 65535 + pixels.size, 8, 8, 8)
    content = content.ljust(65535, b"\0") + pixels.tobytes() + struct.pack("<H", len(tags))
    (tmp_path / "a.tiff").write_bytes(content + b"".join(entries) + bytes(4))
    assert (np.asarray(decode(tmp_path / "a.tiff", 224).grey) == pixels[..., 0]).all()


# ---------------------------------------------------------------- DICOM


# name: (the pixels, of those in 8 and in 12 bits; the tags; the file of the same picture)
DICOMS = {
    "8 bits": (lambda eight, _: eight, {}, "8.png"),
    "8 bits, rescaled": (
        lambda eight, _: eight,
        {"RescaleSlope": 1, "RescaleIntercept": 0},
        "8.png",
    ),
    "8 bits, MONOCHROME1": (
        lambda eight, _: 255 - eight,
        {"PhotometricInterpretation": "MONOCHROME1"},
        "8.png",
    ),
    "12 bits": (lambda _, twelve: twelve, {}, "12.png"),
    "12 bits, MONOCHROME1": (
        lambda _, twelve: 4095 - twelve,
        {"PhotometricInterpretation": "MONOCHROME1"},
        "12.png",
    ),
    "12 bits, in the window of all": (
        lambda _, twelve: twelve,
        {"WindowCenter": 2048, "WindowWidth": 4096},
        "12.png",
    ),
    "12 bits, in a window that makes no sense": (
        lambda _, twelve: twelve,
        {"WindowCenter": 2048, "WindowWidth": 0},
        "12.png",
    ),
    "16 bits": (lambda _, twelve: twelve, {"BitsStored": 16, "HighBit": 15}, "12.png"),
    "signed": (
        lambda _, twelve: twelve.astype(np.int16) - 2000,
        {"RescaleSlope": 1, "RescaleIntercept": 2000},
        "12.png",
    ),
    "JPEG": (lambda eight, _: eight, {"syntax": JPEGBaseline8Bit}, "a.jpeg"),
}


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("name", DICOMS)
def test_dicom_gives_the_picture_of_the_same_pixels_as_png(name, large_phantom, tmp_path, window):
    pixels, tags, like = DICOMS[name]
    eight = np.asarray(large_phantom)
    twelve = eight.astype(np.uint16) * 16
    Image.fromarray(eight).save(tmp_path / "8.png")
    Image.fromarray(twelve).save(tmp_path / "12.png")
    large_phantom.save(tmp_path / "a.jpeg", quality=75)
    if name == "JPEG":
        tags = tags | {"encoded": encapsulate([(tmp_path / "a.jpeg").read_bytes()])}
    path = write_dicom(tmp_path / "a.dcm", pixels(eight, twelve), **tags)
    found = grey(common.load_image(path, window))
    expected = grey(common.load_image(tmp_path / like, window))
    assert np.abs(found - expected).max() <= (1 if "12" in like else 0)


def test_dicom_is_known_by_its_content_whatever_its_name(large_phantom, tmp_path):
    path = write_dicom(tmp_path / "b.png", np.asarray(large_phantom))
    expected = grey(large_phantom.resize((224, 224), 2))
    assert (grey(common.load_image(path, 0)) == expected).all()


def test_the_voi_window_and_the_padding_of_dicom_are_kept(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", LEVELS, WindowCenter=1024, WindowWidth=512)
    found = grey(common.load_image(path, 0))
    black, white = 760 * 224 // 4096, 1300 * 224 // 4096
    assert (found[:, :black] == 0).all() and (found[:, white:] >= 254).all()
    padded = LEVELS.copy()
    padded[:40] = 4095
    path = write_dicom(tmp_path / "b.dcm", padded, PixelPaddingValue=4095)
    assert (grey(common.load_image(path, 2))[:30] == 0).all()


def test_dicom_windows_that_miss_the_film_and_ranges_of_padding(tmp_path):
    plain = grey(common.load_image(write_dicom(tmp_path / "a.dcm", LEVELS), 2))
    for window in (
        {"WindowCenter": 40, "WindowWidth": 4},
        {"WindowCenter": -600, "WindowWidth": 100},
    ):
        found = grey(common.load_image(write_dicom(tmp_path / "b.dcm", LEVELS, **window), 2))
        assert (found == plain).all(), window
    film = LEVELS // 2
    padded = film.copy()
    padded[:60] = 4000 + np.arange(256) % 90
    tags = {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}
    found = grey(common.load_image(write_dicom(tmp_path / "c.dcm", padded, **tags), 2))
    assert (found[:50] == 0).all() and np.abs(found[60:] - plain[60:]).max() < 25
    header = tmp_path / "d.dcm"
    header.write_bytes(write_dicom(tmp_path / "c.dcm", LEVELS).read_bytes()[128 + 4 :])
    assert "DICM at byte 128" in explain_unreadable(header, _unidentified(header))


def _unidentified(path):
    with pytest.raises(OSError) as caught:
        decode(path, 224)
    return caught.value


REFUSED = {
    "modality CT": {"Modality": "CT"},
    "3 pictures in one file": {"NumberOfFrames": 3},
    "in RGB": {"PhotometricInterpretation": "RGB"},
    "pip install pylibjpeg": {"syntax": JPEGLosslessSV1, "encoded": encapsulate([b"\xff\xd8"])},
    "without a picture": {"pixels": np.zeros((0, 0), np.uint8)},
    "no radiograph's shape": {"Rows": 5000, "Columns": 2},
    "pixels, more than": {"Rows": 60000, "Columns": 60000},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_dicom_that_is_no_single_radiograph_is_refused_with_the_reason(reason, tmp_path):
    tags = {"pixels": LEVELS} | REFUSED[reason]
    if "NumberOfFrames" in tags:
        tags["pixels"] = np.stack([LEVELS] * 3)
    path = write_dicom(tmp_path / "a.dcm", **tags)
    item = common.Views([Xray(path, 0, hash_file(path))], 1, 2)[0]
    assert reason in item[2]


# ---------------------------------------------------------------- bad images


@pytest.mark.parametrize("name", faults.BAD_IMAGES)
def test_a_bad_image_is_told_with_its_path_by_every_script(name, refused, home):
    file, content, reason = faults.BAD_IMAGES[name]
    for script, split in (("train", "train"), ("evaluate", "test")):
        path = home / "data" / split / "NORMAL" / file
        put(path, content)
        before = listing(home / "data")
        with within(20):
            line = refused(2, script)
        assert f"{path}: " in line and reason in line and "--skip-bad" in line, line
        assert listing(home / "data") == before
    line, table = refused(2, "evaluate", path), home / "results" / "new_predictions.csv"
    assert f"{path}: " in line or reason in table.read_text()


def test_a_damaged_image_is_read_or_explained_whatever_its_format(fuzz, tmp_path, say):
    kinds = [{"form": form} for form in ("jpeg", "png", "tiff", "webp", "bmp", "ppm")]
    kinds += [{"form": "jpeg", "progressive": True}, {"form": "png", "mode": "I;16"}]
    kinds += [{"form": "tiff", "compression": "tiff_lzw"}, {"form": "webp", "lossless": True}]
    sources, count, explained = [picture(**kind) for kind in kinds], fuzz.count(200, 4000), 0
    path = tmp_path / "x.png"
    for i in range(count):
        how, content = damage(fuzz.rng, sources[i % len(sources)])
        path.write_bytes(content)
        with within(20):
            item = common.Views([Xray(path, 0, hash_file(path))], 3, 2)[0]
        how = kinds[i % len(sources)], how, item[2]
        assert item[1].shape == (3, 1, 224, 224) and len(item[2]) <= 200, how
        assert "\n" not in item[2], how
        explained += bool(item[2])
    assert 0 < explained < count
    say(f"images: {count} damaged ones tried, {explained} explained, the others decoded")
