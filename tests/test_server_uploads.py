"""`/upload/image` and `/upload/mask` of the server."""

import asyncio
import errno
import json
import os

import pytest
from file_kit import GRAPH, form, png, put, refused, uploaded, view
from PIL import Image
from server_kit import answer, run, serving

from stable_cascade_nodes.host.server import context, files


def test_an_upload_keeps_what_is_there(tmp_path):
    red, blue = png((255, 0, 0)), png((0, 0, 255))
    names = [body["name"] for _, body in uploaded(tmp_path, *map(form, (red, red, blue, blue, red)))]
    assert names == ["q.png", "q.png", "q (1).png", "q (1).png", "q.png"]
    assert (tmp_path / "input" / "q.png").read_bytes() == red
    assert (tmp_path / "input" / "q (1).png").read_bytes() == blue
    assert list((tmp_path / "temp").iterdir()) == []


@pytest.mark.parametrize("overwrite", ["true", "1"])
def test_an_upload_replaces_where_asked(tmp_path, overwrite):
    answers = uploaded(tmp_path, form(b"one"), form(b"two", overwrite=overwrite))
    assert answers[1] == (200, {"name": "q.png", "subfolder": "", "type": "input"})
    assert (tmp_path / "input" / "q.png").read_bytes() == b"two"
    assert os.listdir(tmp_path / "input") == ["q.png"]


@pytest.mark.parametrize("kind", ["input", "output", "temp"])
def test_an_upload_goes_where_its_fields_say(tmp_path, kind):
    assert uploaded(tmp_path, form(b"x", type=kind, subfolder="a/b")) == [
        (200, {"name": "q.png", "subfolder": "a/b", "type": kind})
    ]
    assert (tmp_path / kind / "a" / "b" / "q.png").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["s/q.png", "../q.png", "s/", ".", ""])
def test_the_name_of_an_upload_is_that_of_a_file(tmp_path, name):
    content = f'--b\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\nx\r\n--b--\r\n'

    async def scenario():
        async with serving({}, tmp_path) as client:
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            return (await answer(client, "POST", "/upload/image", data=content.encode(), headers=headers))[0]

    assert run(scenario()) == 400
    assert os.listdir(tmp_path) == ["temp"]


def test_uploads_of_one_name_at_once_all_stay(tmp_path):
    contents = [bytes([number]) * 1000 for number in range(20)]

    async def scenario():
        async with serving({}, tmp_path) as client:
            posts = (answer(client, "POST", "/upload/image", data=form(content)) for content in contents)
            return await asyncio.gather(*posts)

    answers = run(scenario())
    stored = {body["name"]: (tmp_path / "input" / body["name"]).read_bytes() for _, body in answers}
    assert sorted(stored.values()) == contents
    assert [stored[body["name"]] for _, body in answers] == contents


def test_an_upload_that_is_too_large_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "MAX_UPLOAD_SIZE", 1000)
    large = form(b"x" * 1001)
    announced = form(b"x" * 200_000)
    fits = form(b"x" * 1000)
    endless_field = form(b"x", subfolder="y" * 65_537)
    statuses = [status for status, _ in refused(tmp_path, (large, announced, fits, endless_field))]
    assert statuses == [413, 413, 200, 413]
    assert os.listdir(tmp_path / "input") == ["q.png"]
    assert os.listdir(tmp_path / "temp") == []


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path):
    async def scenario():
        async with serving({}, tmp_path) as client:
            head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="q.png"\r\n\r\n' + b"x" * 100_000
            _, writer = await asyncio.open_connection("127.0.0.1", client.server.port)
            writer.write(
                b"POST /upload/image HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + head
            )
            await writer.drain()
            while not (tmp_path / "temp").is_dir() or not os.listdir(tmp_path / "temp"):
                await asyncio.sleep(0.005)
            writer.close()
            while os.listdir(tmp_path / "temp"):
                await asyncio.sleep(0.005)
            assert (await view(client, "filename=q.png&type=input"))[0] == 404

    run(scenario())


def test_an_upload_to_a_full_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, target):
        with files.disk_errors():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Incoming, "place", full)
    [(status, text)] = refused(tmp_path, [form(b"x")])
    assert status == 500
    assert "No space left on device" in text
    assert os.listdir(tmp_path / "temp") == []


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=b", "text/plain"])
def test_a_broken_form_is_the_clients_mistake(tmp_path, content_type):
    async def scenario():
        async with serving({}, tmp_path) as client:
            for body in (b"", b"--b", b"--b\r\n\r\nx", b"--b--", b"\0" * 100):
                async with client.post("/upload/image", data=body, headers={"Content-Type": content_type}) as response:
                    assert response.status == 400, body

    run(scenario())


def test_a_mask_goes_into_the_original_and_keeps_its_text(tmp_path):
    put(tmp_path / "output", "s/o.png", png((10, 20, 30), text={"prompt": GRAPH, "note": "grün ☂"}))
    reference = json.dumps({"filename": "o.png", "subfolder": "s", "type": "output"})
    mask = form(png((200, 200, 200, 70)), "mask.png", original_ref=reference, subfolder="clipspace")
    assert uploaded(tmp_path, mask, path="/upload/mask") == [
        (200, {"name": "mask.png", "subfolder": "clipspace", "type": "input"})
    ]
    with Image.open(tmp_path / "input" / "clipspace" / "mask.png") as picture:
        assert picture.format == "PNG"
        assert picture.getpixel((0, 0)) == (10, 20, 30, 70)
        assert picture.text == {"prompt": GRAPH, "note": "grün ☂"}
    with Image.open(tmp_path / "output" / "s" / "o.png") as original:
        assert original.mode == "RGB"


def test_a_mask_on_a_turned_photo_fits_the_way_it_is_shown(tmp_path):
    (tmp_path / "input").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), (10, 200, 30)).save(tmp_path / "input" / "o.jpg", exif=exif)
    mask = form(png((0, 0, 0, 9), size=(4, 8)), "m.png", original_ref='{"filename": "o.jpg", "type": "input"}')
    assert uploaded(tmp_path, mask, path="/upload/mask")[0][0] == 200
    with Image.open(tmp_path / "input" / "m.png") as picture:
        assert (picture.size, picture.getpixel((0, 0))[3], dict(picture.getexif())) == ((4, 8), 9, {})


@pytest.mark.parametrize(
    "reference",
    [
        None,
        "nonsense",
        "[" * 60_000,
        "[]",
        '{"filename": 5}',
        '{"filename": "o.png", "type": ["input"]}',
        '{"filename": "o.png", "type": "input", "subfolder": 7}',
        '{"filename": "o.png", "type": "output"}',
        '{"filename": "text.png", "type": "input"}',
        '{"filename": "large.png", "type": "input"}',
    ],
    ids=range(10),
)
def test_a_mask_without_a_fitting_original_is_refused(tmp_path, reference):
    put(tmp_path / "input", "o.png", png())
    put(tmp_path / "input", "large.png", png(size=(9, 9)))
    put(tmp_path / "input", "text.png", b"no picture")
    fields = {} if reference is None else {"original_ref": reference}
    [(status, body)] = uploaded(tmp_path, form(png((0, 0, 0, 9)), "m.png", **fields), path="/upload/mask")
    assert (status, body["error"]["type"]) == (400, "invalid_request")
    assert sorted(os.listdir(tmp_path / "input")) == ["large.png", "o.png", "text.png"]


@pytest.mark.parametrize(
    ("name", "subfolder"),
    [
        ("../o.png", ""),
        ("o.png", ".."),
        ("OUTSIDE/o.png", ""),
        ("o.png", "OUTSIDE"),
        ("link.png", ""),
        ("o.png", "link"),
    ],
)
def test_a_mask_is_not_put_into_a_picture_outside(tmp_path, name, subfolder):
    data = tmp_path / "data"
    put(tmp_path, "o.png", png(text={"prompt": "secret"}))
    put(data, "o.png", png(text={"prompt": "secret"}))
    (data / "input").mkdir()
    (data / "input" / "link.png").symlink_to(tmp_path / "o.png")
    (data / "input" / "link").symlink_to(tmp_path)
    reference = {"filename": name, "subfolder": subfolder, "type": "input"}
    reference = json.dumps(reference).replace("OUTSIDE", str(tmp_path))
    [(status, _)] = uploaded(data, form(png((0, 0, 0, 9)), "m.png", original_ref=reference), path="/upload/mask")
    assert status == 400
    assert sorted(os.listdir(data / "input")) == ["link", "link.png"]


def test_a_mask_that_is_no_picture_is_refused(tmp_path):
    put(tmp_path / "input", "o.png", png())
    fields = {"original_ref": '{"filename": "o.png", "type": "input"}'}
    [(status, body)] = uploaded(tmp_path, form(b"no picture", "m.png", **fields), path="/upload/mask")
    assert (status, os.listdir(tmp_path / "input")) == (400, ["o.png"])
    assert "uploaded mask cannot be read" in body["error"]["message"]


def test_the_text_in_a_png_is_data(tmp_path):
    """Graphs in a picture are neither run nor read by the server, whatever they say."""
    text = {"prompt": '{"1": {"class_type": "Echo", "inputs": {}}}', "workflow": "__import__('os').abort()"}
    content = png(text=text)

    async def scenario():
        async with serving({}, tmp_path) as client:
            assert (await answer(client, "POST", "/upload/image", data=form(content)))[0] == 200
            status, _, body = await view(client, "filename=q.png&type=input")
            assert (status, body) == (200, content)
            preview = (await view(client, "filename=q.png&type=input&preview=webp;90"))[2]
            assert b"abort" not in preview
            assert await answer(client, "GET", "/queue") == (200, {"queue_running": [], "queue_pending": []})
            assert await answer(client, "GET", "/history") == (200, {})

    run(scenario())
