"""`/view`: files and pictures of the data folders."""

import io
import json
import zlib

import pytest
from file_kit import GRAPH, png, put, viewed
from PIL import Image
from server_kit import run, serving

from stable_cascade_nodes.host.server import files


@pytest.mark.parametrize("query", ["filename=a.png&type=input", "filename=a.png%20[input]"])
def test_view_sends_the_file_as_it_is(tmp_path, query):
    content = png(text={"prompt": GRAPH})
    put(tmp_path / "input", "a.png", content)
    status, headers, body = viewed(tmp_path, query)
    assert (status, headers["Content-Type"], body) == (200, "image/png", content)
    assert headers["Content-Disposition"].startswith("inline")


def test_view_looks_into_output_where_no_type_is_given_and_into_sub_folders(tmp_path):
    put(tmp_path / "output", "deep/er/a.png", png())
    put(tmp_path / "output", "deep/er/two..dots.png", png())
    for query in (
        "filename=a.png&subfolder=deep/er",
        "filename=deep/er/a.png",
        "filename=a.png&subfolder=deep%5Cer",
        "filename=two..dots.png&subfolder=deep/er",
    ):
        assert viewed(tmp_path, query)[0] == 200, query


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("type=input", 404),
        ("filename=&type=input", 400),
        ("filename=none.png", 404),
        ("filename=a.png&type=models", 400),
        ("filename=../input/a.png&type=output", 400),
        ("filename=/a.png&type=input", 400),
        ("filename=a.png&type=input&subfolder=..", 403),
        ("filename=a.png&type=input&subfolder=/", 403),
        ("filename=sub&type=input", 404),
    ],
)
def test_view_refuses(tmp_path, query, status):
    put(tmp_path / "input", "a.png", png())
    (tmp_path / "input" / "sub").mkdir()
    assert viewed(tmp_path, query)[::2] == (status, b"")


@pytest.mark.parametrize(
    ("preview", "form", "mode"),
    [
        ("webp;90", "WEBP", "RGBA"),
        ("webp", "WEBP", "RGBA"),
        ("jpeg;80", "JPEG", "RGB"),
        ("jpeg;nonsense", "JPEG", "RGB"),
        ("bogus;5", "WEBP", "RGBA"),
    ],
)
def test_previews(tmp_path, preview, form, mode):
    put(tmp_path / "input", "a.png", png((200, 20, 30, 255), size=(40, 30), text={"prompt": GRAPH}))
    status, headers, body = viewed(tmp_path, f"filename=a.png&type=input&preview={preview}")
    assert (status, headers["Content-Type"]) == (200, f"image/{form.lower()}")
    picture = Image.open(io.BytesIO(body))
    # WebP leaves out a transparency that is opaque everywhere.
    assert (picture.format, picture.size) == (form, (40, 30))
    assert picture.mode in {mode, "RGB"}
    pixel = picture.convert("RGB").getpixel((20, 15))
    assert all(abs(pixel[i] - (200, 20, 30)[i]) < 6 for i in range(3))
    assert b"script" not in body


def test_preview_quality_is_honoured(tmp_path):
    noise = Image.effect_noise((64, 64), 80)
    put(tmp_path / "input", "a.png", b"")
    noise.save(tmp_path / "input" / "a.png")
    sizes = [len(viewed(tmp_path, f"filename=a.png&type=input&preview=jpeg;{quality}")[2]) for quality in (10, 95)]
    assert sizes[0] * 2 < sizes[1]


def test_a_preview_keeps_what_belongs_to_the_picture_and_nothing_else(tmp_path):
    """A photo is turned the way its EXIF data says and keeps its colour profile, but not its comment."""
    (tmp_path / "input").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (8, 4), (10, 200, 30))
    photo.save(tmp_path / "input" / "a.jpg", exif=exif, comment="a comment", icc_profile=b"a profile")
    for preview in ("preview=jpeg;90", "preview=webp;90", "channel=rgb"):
        body = viewed(tmp_path, f"filename=a.jpg&type=input&{preview}")[2]
        picture = Image.open(io.BytesIO(body))
        assert (picture.size, picture.info["icc_profile"], dict(picture.getexif())) == ((4, 8), b"a profile", {})
        assert b"a comment" not in body


@pytest.mark.parametrize(
    ("channel", "mode", "pixel"),
    [("rgb", "RGB", (10, 20, 30)), ("a", "RGBA", (0, 0, 0, 40)), ("rgba", "RGBA", (10, 20, 30, 40))],
)
def test_channels(tmp_path, channel, mode, pixel):
    put(tmp_path / "input", "a.png", png((10, 20, 30, 40)))
    status, headers, body = viewed(tmp_path, f"filename=a.png&type=input&channel={channel}")
    picture = Image.open(io.BytesIO(body))
    assert (status, headers["Content-Type"], picture.mode) == (200, "image/png", mode)
    assert picture.getpixel((0, 0)) == pixel


def test_the_transparency_of_a_picture_without_one_is_opaque(tmp_path):
    put(tmp_path / "input", "a.png", png((10, 20, 30)))
    body = viewed(tmp_path, "filename=a.png&type=input&channel=a")[2]
    assert Image.open(io.BytesIO(body)).getpixel((0, 0)) == (0, 0, 0, 255)


def test_sixteen_bit_grey_is_scaled_in_previews(tmp_path):
    (tmp_path / "input").mkdir()
    Image.new("I;16", (8, 8), 32768).save(tmp_path / "input" / "a.png")
    body = viewed(tmp_path, "filename=a.png&type=input&channel=rgb")[2]
    assert Image.open(io.BytesIO(body)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("query", ["preview=webp;90", "channel=rgb"])
@pytest.mark.parametrize(
    "content",
    [b"<svg/>", b"", png()[:40], b"\x89PNG\r\n\x1a\n" + b"x" * 50],
    ids=["svg", "empty", "cut", "garbage"],
)
def test_what_is_no_picture_has_no_preview(tmp_path, query, content):
    put(tmp_path / "input", "a.png", content)
    status, _, body = viewed(tmp_path, f"filename=a.png&type=input&{query}")
    assert status == 400
    assert "a.png cannot be read as a picture" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "name",
    [
        "a.html",
        "a.HTM",
        "a.xhtml",
        "a.js",
        "a.mjs",
        "a.svg",
        "a.SVG",
        "a.svgz",
        "a.xml",
        "a.css",
        "a.pdf",
        "a",
        "a.png.html",
    ],
)
def test_what_could_run_in_a_browser_is_a_download(tmp_path, name):
    put(tmp_path / "output", name, b"<script>alert(1)</script>")
    status, headers, body = viewed(tmp_path, f"filename={name}")
    assert (status, body) == (200, b"<script>alert(1)</script>")
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Disposition"].startswith(f'attachment; filename="{name}"')
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_pictures_and_text_are_shown_but_never_sniffed(tmp_path):
    for name, kind in {
        "a.webp": "image/webp",
        "a.txt": "text/plain; charset=utf-8",
        "a.json": "application/json",
    }.items():
        put(tmp_path / "output", name, b"<script>alert(1)</script>")
        _, headers, _ = viewed(tmp_path, f"filename={name}")
        assert (headers["Content-Type"], headers["X-Content-Type-Options"]) == (kind, "nosniff")


def test_the_file_name_in_the_header_is_quoted(tmp_path):
    name = 'a"; x="é%41.html'
    put(tmp_path / "output", name, b"x")
    _, headers, _ = viewed(tmp_path, "filename=a%22%3B%20x%3D%22%C3%A9%2541.html")
    expected = "attachment; filename=\"a_; x=___41.html\"; filename*=UTF-8''a%22%3B%20x%3D%22%C3%A9%2541.html"
    assert headers["Content-Disposition"] == expected


def test_a_header_cannot_be_smuggled_in_by_a_file_name():
    assert "\n" not in files.content_disposition("inline", "a\r\nX-Evil: 1.png").replace("%0A", "")


def test_a_compressed_neighbour_is_not_sent_in_a_files_place(tmp_path):
    put(tmp_path / "output", "a.txt", b"the file")
    put(tmp_path / "output", "a.txt.gz", b"something else")
    put(tmp_path / "output", "a.txt.br", b"something else")

    async def scenario():
        async with serving({}, tmp_path) as client:
            headers = {"Accept-Encoding": "gzip, br"}
            async with client.get("/view?filename=a.txt", headers=headers) as response:
                return response.headers.get("Content-Encoding"), await response.read()

    assert run(scenario()) == (None, b"the file")


def test_unchanged_files_are_not_sent_again_and_parts_are(tmp_path):
    put(tmp_path / "output", "a.txt", b"0123456789")

    async def scenario():
        async with serving({}, tmp_path) as client:
            async with client.get("/view?filename=a.txt") as response:
                tag = response.headers["ETag"]
            async with client.get("/view?filename=a.txt", headers={"If-None-Match": tag}) as response:
                again = response.status
            async with client.get("/view?filename=a.txt", headers={"Range": "bytes=2-4"}) as response:
                return again, response.status, await response.read()

    assert run(scenario()) == (304, 206, b"234")


def test_a_picture_with_endless_text_is_refused(tmp_path):
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    plain = png()
    bomb = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 100_000_000, 9))
    put(tmp_path / "input", "a.png", plain[:33] + bomb + plain[33:])
    status, _, body = viewed(tmp_path, "filename=a.png&type=input&preview=webp;90")
    assert status == 400
    assert b"cannot be read as a picture" in body
