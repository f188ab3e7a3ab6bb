"""Pictures, forms and the file routes of a server, for tests."""

import io

from aiohttp import FormData
from PIL import Image, PngImagePlugin
from server_kit import answer, run, serving

GRAPH = '{"1": {"class_type": "X", "inputs": {"text": "<script>alert(1)</script>"}}}'


def png(colour=(10, 20, 30), size=(4, 3), text=None):
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    file = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def form(content, name="q.png", **fields):
    data = FormData()
    # The picture comes first, as the editor sends it.
    data.add_field("image", content, filename=name, content_type="image/png")
    for key, value in fields.items():
        data.add_field(key, value)
    return data


async def view(client, query):
    async with client.get(f"/view?{query}") as response:
        return response.status, response.headers, await response.read()


def viewed(data_dir, query):
    async def scenario():
        async with serving({}, data_dir) as client:
            return await view(client, query)

    return run(scenario())


def uploaded(data_dir, *forms, path="/upload/image"):
    async def scenario():
        async with serving({}, data_dir) as client:
            return [await answer(client, "POST", path, data=data) for data in forms]

    return run(scenario())


def refused(data_dir, forms):
    """Statuses and texts of uploads."""

    async def scenario():
        given = []
        async with serving({}, data_dir) as client:
            for data in forms:
                async with client.post("/upload/image", data=data) as response:
                    given.append((response.status, await response.text()))
        return given

    return run(scenario())
