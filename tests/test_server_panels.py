"""What the editor's panels ask for: lists of files and models, and the logs."""

import logging
import os
import sys
from pathlib import Path

from file_kit import put
from server_kit import Listener, answer, run, serving


def test_lists_of_files_are_newest_first_and_hold_files_only(tmp_path):
    for number, name in enumerate(("old.png", "new.png", "middle.png", ".hidden")):
        os.utime(put(tmp_path / "input", name, b"x"), ns=(0, {"new.png": 9}.get(name, number)))
    put(tmp_path / "input", "sub/inner.png", b"x")

    async def scenario():
        async with serving({}, tmp_path) as client:
            assert await answer(client, "GET", "/internal/files/input") == (200, ["new.png", "middle.png", "old.png"])
            assert await answer(client, "GET", "/internal/files/output") == (200, [])
            assert (await answer(client, "GET", "/internal/files/models"))[0] == 400
            _, paths = await answer(client, "GET", "/internal/folder_paths")
            assert str(tmp_path / "models" / "diffusion_models") in paths["diffusion_models"]

    run(scenario())


def test_models(tmp_path, small_family):
    vae = tmp_path / "models" / "vae" / "deep"
    vae.mkdir(parents=True)
    source = Path(small_family.paths["stage_a"])
    (vae / "a.safetensors").write_bytes(source.read_bytes())
    (vae / "broken.safetensors").write_bytes(b"\xff" * 20)
    put(tmp_path / "models", "embeddings/e.safetensors", b"x")
    put(tmp_path / "models", "unet/u.safetensors", b"x")
    put(tmp_path / "models", "secret.safetensors", source.read_bytes())
    put(tmp_path / "models", "vae/.hidden.safetensors", source.read_bytes())

    async def scenario():
        async with serving({}, tmp_path) as client:
            assert "vae" in (await answer(client, "GET", "/models"))[1]
            assert await answer(client, "GET", "/models/vae") == (
                200,
                ["deep/a.safetensors", "deep/broken.safetensors"],
            )
            assert await answer(client, "GET", "/models/unet") == (200, ["u.safetensors"])
            assert await answer(client, "GET", "/models/diffusion_models") == (200, ["u.safetensors"])
            assert await answer(client, "GET", "/embeddings") == (200, ["e"])
            status, metadata = await answer(client, "GET", "/view_metadata/vae?filename=deep/a.safetensors")
            assert (status, metadata["cascade.stage"]) == (200, "stage_a")
            for query in (
                "vae?filename=deep/broken.safetensors",
                "vae?filename=none.safetensors",
                "vae?filename=.hidden.safetensors",
                "vae?filename=../secret.safetensors",
                "vae?filename=deep/../deep/a.safetensors",
                "vae",
                "zzz?filename=deep/a.safetensors",
            ):
                assert await answer(client, "GET", f"/view_metadata/{query}") == (404, None), query
            for path in ("/experiment/models", "/api/experiment/models", "/api/experiment/models/vae"):
                assert await answer(client, "GET", path) == (404, None)

    run(scenario())


def test_logs_are_kept_and_sent_to_who_asks(tmp_path):
    async def scenario():
        stream = sys.stderr
        async with serving({}, tmp_path) as client:
            logging.getLogger("a.node").warning("a warning\nof two lines")
            sys.stderr.write("half ")
            sys.stderr.write("a line\n10%")
            sys.stderr.write("\r20%")
            sys.stderr.write("\r100%\n")
            print("printed")
            _, raw = await answer(client, "GET", "/internal/logs/raw")
            lines = ["a warning\n", "of two lines\n", "half a line\n", "100%\n", "printed\n"]
            assert [entry["m"] for entry in raw["entries"]] == lines
            assert raw["size"].keys() == {"cols", "rows"}
            _, text = await answer(client, "GET", "/internal/logs")
            assert text.endswith(" - printed\n")

            listener = await Listener.open(client, "reader")
            other = await Listener.open(client, "other")
            subscribe = {"enabled": True, "clientId": "reader"}
            assert (await answer(client, "PATCH", "/internal/logs/subscribe", json=subscribe))[0] == 200
            print("live")
            message = await listener.until(lambda m: m["type"] == "logs")
            assert [entry["m"] for entry in message["data"]["entries"]] == ["live\n"]
            subscribe["enabled"] = False
            assert (await answer(client, "PATCH", "/internal/logs/subscribe", json=subscribe))[0] == 200
            assert (await answer(client, "PATCH", "/internal/logs/subscribe", json={"enabled": 1}))[0] == 400
            await other.sync()
            assert [m for m in other.messages if m["type"] == "logs"] == []
        assert sys.stderr is stream

    run(scenario())


def test_logs_do_not_grow_for_ever(tmp_path):
    async def scenario():
        async with serving({}, tmp_path) as client:
            for number in range(3000):
                print(number)
            print("x" * 1_000_000)
            _, raw = await answer(client, "GET", "/internal/logs/raw")
            assert len(raw["entries"]) == 1000
            assert len(raw["entries"][-1]["m"]) == 10_000
            assert raw["entries"][-2]["m"] == "2999\n"

    run(scenario())
