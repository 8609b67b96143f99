"""Decoding: what becomes of each kind of image, and of files that are not what they say."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from task_files import picture, png

from layerprobe.errors import BrokenFileError
from layerprobe.tasks.images import decode_image


def test_png_pixels_come_back_as_they_were() -> None:
    for gray in (False, True):
        pixels = picture(1, gray=gray)
        decoded = decode_image(png(pixels), "x.png")
        assert np.array_equal(decoded, pixels)
        assert not decoded.flags.writeable


def test_palette_transparency_and_bilevel_images_become_plain() -> None:
    colour = Image.fromarray(picture(2))
    for image in (colour.convert("P"), colour.convert("RGBA"), colour.convert("CMYK")):
        stream = io.BytesIO()
        image.save(stream, "TIFF" if image.mode == "CMYK" else "PNG")
        assert np.array_equal(decode_image(stream.getvalue(), "x"), np.asarray(image.convert("RGB")))
    bilevel = decode_image(png(picture(2, gray=True) > 127), "x")
    assert bilevel.shape == (6, 6)
    assert set(np.unique(bilevel)) == {0, 255}


def test_sixteen_bit_grayscale_is_scaled_not_clipped() -> None:
    deep = np.array([[0, 257, 65535], [128 * 257, 300, 1000]], dtype=np.uint16)
    assert decode_image(png(deep), "x").tolist() == [[0, 1, 255], [128, 1, 4]]


def test_orientation_of_the_camera_is_applied() -> None:
    pixels = np.zeros((4, 8), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", exif=exif, quality=100)
    turned = decode_image(stream.getvalue(), "x")
    assert turned.shape == (8, 4)
    assert turned[:3].min() > 200
    assert turned[-3:].max() < 50


XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_orientation_noted_in_xmp_alone_is_applied_as_well(kind: str, orientation: int) -> None:
    pixels = picture(7)[:4]  # 4 × 6
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        6: np.rot90(pixels, -1),
        8: np.rot90(pixels),
    }
    note = XMP.format(orientation)
    options: dict[str, object] = {"xmp": note.encode()}
    if kind == "PNG":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", note)
    elif kind == "TIFF":
        options = {"tiffinfo": {700: note.encode()}}
    elif kind == "WEBP":
        options["lossless"] = True
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    decoded = decode_image(stream.getvalue(), "x")
    assert decoded.shape == upright[orientation].shape
    if kind != "JPEG":
        assert np.array_equal(decoded, upright[orientation])


def test_integers_of_32_bits_are_refused_and_of_16_are_not() -> None:
    for dtype, white in ((np.int32, 255), (np.int32, 65535), (np.int32, 2**31 - 1), (np.uint16, 65535)):
        stream = io.BytesIO()
        Image.fromarray(np.array([[0, white]], dtype=dtype)).save(stream, "TIFF")
        if dtype == np.uint16:
            assert decode_image(stream.getvalue(), "x.tif").tolist() == [[0, 255]]
            continue
        with pytest.raises(BrokenFileError, match=r"x\.tif: 32-bit integer pixels have no stated range"):
            decode_image(stream.getvalue(), "x.tif")
    portable = b"P5 2 1 65535\n" + np.array([[0, 65535]], ">u2").tobytes()
    assert decode_image(portable, "x.pgm").tolist() == [[0, 255]]


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims width × height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decompression_bombs_are_refused_unread(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(BrokenFileError, match=r"bomb\.png is refused.*67,108,864 pixels"):
            decode_image(bomb(side, side), "bomb.png")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image at all",
        png(picture(3))[:60],
        png(picture(3, side=64))[:-400],
        png(picture(3)).replace(b"IDAT", b"IDAX"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    ],
    ids=["empty", "text", "short", "truncated", "chunk", "postscript"],
)
def test_what_is_no_whole_image_is_named(content: bytes) -> None:
    with pytest.raises(BrokenFileError, match=r"^cannot read the image cats/17\.png: [^\n]+$"):
        decode_image(content, "cats/17.png")


def test_random_damage_never_raises_anything_else() -> None:
    whole = np.frombuffer(png(picture(4, side=16)), np.uint8)
    random = np.random.default_rng(0)
    failures = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
        try:
            decode_image(damaged.tobytes(), "x.png")
        except BrokenFileError:
            failures += 1
    assert failures > 100
