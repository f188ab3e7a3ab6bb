"""Runs inside ComfyUI's interpreter: loads the pack through ComfyUI's own loader, then every check in `CHECKS`.

    python comfyui_inside.py CHECKOUT BASE PACK_FOLDER GRAPHS.json ANSWERS.json

writes what each check came to: null, or the traceback.
"""

import asyncio
import gc
import importlib
import inspect
import json
import os
import sys
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Inside:
    """ComfyUI in this process: its modules, its nodes, its executor."""

    def __init__(self, checkout, base, folder, graphs):
        sys.path.insert(0, checkout)
        os.chdir(checkout)
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args

        args.cpu, args.base_directory, args.disable_api_nodes = True, base, True
        import utils.extra_config  # noqa: F401 (before the nodes put a folder with another `utils` into the path)

        self.arguments = args
        self.base = Path(base)
        self.graphs = graphs
        self.core, self.execution = importlib.import_module("nodes"), importlib.import_module("execution")
        self.management = importlib.import_module("comfy.model_management")
        self.patchers = importlib.import_module("comfy.model_patcher")
        self.comfy_utils = importlib.import_module("comfy.utils")
        asyncio.run(self._load(str(self.base / "custom_nodes" / folder)))
        self.messages, self.previews, self.on_progress = [], [], None
        self.comfy_utils.set_progress_bar_global_hook(self._progress)
        self.executor = self.new_executor()

    async def _load(self, pack):
        await self.core.init_public_apis()
        await self.core.init_builtin_extra_nodes()
        assert await self.core.load_custom_node(pack, set(self.core.NODE_CLASS_MAPPINGS), "custom_nodes")
        self.pack_name = pack.replace(".", "_x_")

    def pack(self, name):
        return importlib.import_module(f"{self.pack_name}.{name}")

    def _progress(self, value, total, preview, **more):
        if preview is not None:
            self.previews.append(preview[1].size)
        if self.on_progress:
            self.on_progress(value, total)

    def new_executor(self):
        server = SimpleNamespace(
            client_id="test", last_node_id=None, last_prompt_id=None, sockets_metadata={}, send_sync=self._sent
        )
        executor = self.execution.PromptExecutor
        # Newer versions want limits for the other kinds of cache.
        more = {"cache_args": {"lru": 0, "ram": 0.0}} if "cache_args" in inspect.signature(executor).parameters else {}
        return executor(server, cache_type=self.execution.CacheType.CLASSIC, **more)

    def _sent(self, event, data, client=None):
        self.messages.append((event, data))

    def execute(self, graph):
        """Run a graph; returns what ComfyUI said: its message names, and the cached nodes."""
        self.messages.clear()
        valid = asyncio.run(self.execution.validate_prompt("test", graph, None))
        assert valid[0], valid
        self.executor.execute(graph, "test", {"client_id": "test"}, valid[2])
        errors = [data["exception_message"] for event, data in self.messages if event == "execution_error"]
        assert not errors, errors
        cached = next(set(data["nodes"]) for event, data in self.messages if event == "execution_cached")
        return [event for event, _ in self.messages], cached

    def run(self, name, **inputs):
        """Call one node; returns its outputs."""
        node = self.core.NODE_CLASS_MAPPINGS[name]
        if hasattr(node, "define_schema"):
            return node.execute(**inputs).args
        answer = getattr(node(), node.FUNCTION)(**inputs)
        return answer["result"] if isinstance(answer, dict) else answer

    def attachments(self):
        """Handles of a ControlNet, an IP-Adapter and what makes their input, for the bundled Stage C."""
        models = self.pack("cascade_ops.models")
        stages = {"latent_encoder": self.load("LatentEncoder"), "image_encoder": self.load("ImageEncoder")}
        own = {
            "controlnet": models.ControlNet(4, 128, [0, 11], "effnet", [8] * 7 + [16], [1] * 6),
            "maps": models.ControlNet(16, 128, [0, 5], "large", large_widths=[32, 16, 24], large_blocks=1),
            "ip_adapter": models.IPAdapter(96, 128, [128] * 12),
        }
        for name, network in own.items():
            for weight in network.parameters():
                self.torch.nn.init.normal_(weight, std=0.1)
            stage = "ip_adapter" if name == "ip_adapter" else "controlnet"
            info = SimpleNamespace(title=name, parameters=1, size="tiny", rank=3, control={}, defaults={})
            handle = self.pack("cascade_ops.handles").StageHandle
            stages[name] = handle(stage, network.eval().requires_grad_(False), info, name)
        return stages

    def load(self, stage):
        return self.run(f"CascadeLoad{stage}", file="auto")[0]

    def conditions(self, text="a large red circle on a blue background"):
        encoder = self.load("TextEncoder")
        return [self.run("CascadeEncodeText", text_encoder=encoder, text=words)[0] for words in (text, "")]


def near(ours, theirs, most=1e-3):
    """Equal but for the rounding of another order of sums."""
    difference = (ours - theirs).abs().max().item()
    assert difference <= most, f"differs by {difference}, values up to {theirs.abs().max().item()}"


def differ(ours, theirs):
    assert (ours - theirs).abs().max() > 0.01


def refused(message, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


SETTINGS = {"seed": 3, "steps": 4, "guidance": 2.0, "sampler": "ddim"}


def sampled_c(inside, stage_c, positive, negative, **changes):
    latent = (
        changes.pop("latent", None)
        or inside.run("CascadeEmptyLatent", stage_c=stage_c, width=0, height=0, batch_size=1)[0]
    )
    inputs = {"stage_c": stage_c, "positive": positive, "negative": negative, "latent": latent, **SETTINGS}
    return inside.run("CascadeSampleStageC", **inputs | changes)[0]


def chain(inside, stages, conditions):
    """Latents of Stage C and Stage B, and the picture; with live previews."""
    latent_c = sampled_c(inside, stages["stage_c"], *conditions, previewer=stages["previewer"])
    positive, negative = conditions
    inputs = {"stage_b": stages["stage_b"], "stage_a": stages["stage_a"], "positive": positive, "negative": negative}
    latent_b = inside.run("CascadeSampleStageB", latent=latent_c, **inputs, **SETTINGS)[0]
    picture = inside.run("CascadeDecodeStageA", stage_a=stages["stage_a"], latent=latent_b)[0]
    preview = inside.run("CascadePreviewLatent", previewer=stages["previewer"], latent=latent_c)[0]
    return [latent_c["samples"], latent_b["samples"], picture, preview]


def all_stages(inside):
    names = {"stage_c": "StageC", "stage_b": "StageB", "stage_a": "StageA", "previewer": "Previewer"}
    return {stage: inside.load(name) for stage, name in names.items()} | {"text_encoder": inside.load("TextEncoder")}


# Memory --------------------------------------------------------------------------------------------------------


@check
def graphs_run_and_are_cached_the_second_time(inside):
    for name, graph in inside.graphs.items():
        inside.previews.clear()
        events, cached = inside.execute(graph)
        assert "execution_success" in events, (name, events)
        assert not set(cached) & {number for number, node in graph.items() if node["class_type"] == "SaveImage"}
        assert inside.previews, name
        inside.previews.clear()
        events, cached = inside.execute(graph)
        assert cached == set(graph), (name, set(graph) - cached)
        assert "execution_success" in events and not inside.previews
        (inside.base / name).mkdir()
        for picture in (inside.base / "output").glob("*.png"):
            picture.rename(inside.base / name / picture.name)


@check
def a_run_is_stopped_half_way_and_the_next_one_works(inside):
    graph = inside.graphs["text_to_image"]
    sampler = next(number for number, node in graph.items() if node["class_type"] == "CascadeSampleStageC")
    other = graph | {sampler: graph[sampler] | {"inputs": graph[sampler]["inputs"] | {"seed": 99}}}
    seen = []

    def stop(value, total):
        seen.append(value)
        if value == 2 and total == 5:
            inside.management.interrupt_current_processing()

    inside.on_progress = stop
    events, _ = inside.execute(other)
    inside.on_progress = None
    assert "execution_interrupted" in events and "execution_success" not in events, events
    assert seen[-1] == 2
    inside.management.interrupt_current_processing(False)
    events, _ = inside.execute(other)
    assert "execution_success" in events


@check
def memory_is_given_back(inside):
    inside.execute(inside.graphs["text_to_image"])
    models, management = inside.pack("nodes.comfyui_models"), inside.management
    loaded = [entry.model.model for entry in management.current_loaded_models]
    assert sum(isinstance(model, models.StableCascadeModel) for model in loaded) == 5
    del loaded
    entries = list(models._managed.items())
    assert len(entries) == 5
    networks = [weakref.ref(network) for network, _ in entries]
    kept = [weakref.ref(entry.patcher) for _, entry in entries]
    kept += [weakref.ref(weight) for network, _ in entries for weight in network.parameters()]
    del entries
    # "Unload models": the weights leave the device, the handles stay in the cache.
    management.unload_all_models()
    assert not management.current_loaded_models
    gc.collect()
    assert all(reference() is not None for reference in networks)
    # "Free memory": the cache goes, and with it everything else.
    inside.executor.reset()
    inside.messages.clear()
    gc.collect()
    alive = sum(reference() is not None for reference in (*networks, *kept))
    assert alive == 0 and not models._managed, f"{alive} of {len(networks) + len(kept)} are left"
    # A dropped handle frees without being unloaded first, too.
    handle = inside.load("StageA")
    inside.run("CascadeDecodeStageA", stage_a=handle, latent={"samples": inside.torch.zeros(1, 4, 8, 8)})
    assert len(management.current_loaded_models) == 1
    reference = weakref.ref(handle.network)
    del handle
    gc.collect()
    assert reference() is None
    management.cleanup_models()
    assert not management.current_loaded_models


@check
def offloaded_weights_are_streamed_and_give_the_same_picture(inside):
    torch, models = inside.torch, inside.pack("nodes.comfyui_models")
    runtime = inside.pack("nodes.runtime")
    stages, conditions = all_stages(inside), inside.conditions()
    with runtime.using(runtime.PlainBackend()):
        plain = chain(inside, stages, conditions)
        text = inside.run("CascadeEncodeText", text_encoder=stages["text_encoder"], text="a (red:1.2) star")[0]
    entries = {stage: models.managed(handle) for stage, handle in stages.items()}
    load = inside.management.load_models_gpu
    for share in (None, 0.0, 0.5):
        for stage, entry in entries.items():
            entry.patcher.detach()
            if share is None:
                continue
            size = entry.patcher.model_size()
            entry.patcher.partially_load(torch.device("cpu"), extra_memory=max(1, int(share * size)))
            assert entry.patcher.loaded_size() <= share * size, stage
            streamed = [getattr(layer, "comfy_cast_weights", False) for layer in entry.network.modules()]
            # Else nothing was left to fetch, and this tests nothing.
            assert any(streamed), stage
            assert share == 0 or not all(streamed)
        inside.management.load_models_gpu = load if share is None else lambda *a, **k: None
        try:
            for ours, theirs in zip(chain(inside, stages, conditions), plain, strict=True):
                near(ours, theirs)
            ours = inside.run("CascadeEncodeText", text_encoder=stages["text_encoder"], text="a (red:1.2) star")[0]
            near(ours[0][0], text[0][0])
            near(ours[0][1]["pooled_output"], text[0][1]["pooled_output"])
        finally:
            inside.management.load_models_gpu = load
    for entry in entries.values():
        entry.patcher.detach()


@check
def every_weight_goes_where_the_input_is(inside):
    """With the weights left in main memory and the input elsewhere, here on a device without memory."""
    torch, models = inside.torch, inside.pack("nodes.comfyui_models")
    stages = all_stages(inside) | inside.attachments()
    networks = {stage: models.managed(handle).network for stage, handle in stages.items()}
    for stage, handle in stages.items():
        models.managed(handle).patcher.load(torch.device("meta"), lowvram_model_memory=0.1)
        assert {weight.device.type for weight in networks[stage].parameters()} == {"cpu"}

    def empty(*shape):
        return torch.empty(shape, device="meta")

    results = {
        "stage_c": networks["stage_c"](empty(2, 16, 6, 6), empty(2), empty(2, 77, 128), empty(2, 128), empty(2, 96)),
        "stage_b": networks["stage_b"](empty(2, 4, 64, 64), empty(2), empty(2, 16, 6, 6), empty(2, 1, 128)),
        "stage_a": networks["stage_a"].decode(empty(1, 4, 8, 8)),
        "previewer": networks["previewer"](empty(1, 16, 6, 6)),
        "latent_encoder": networks["latent_encoder"](empty(1, 3, 64, 64)),
        "image_encoder": networks["image_encoder"](pixel_values=empty(2, 3, 224, 224)).image_embeds,
        "controlnet": networks["controlnet"](empty(1, 4, 64, 64))[11],
        "maps": networks["maps"](empty(1, 16, 6, 6))[5],
        "ip_adapter": networks["ip_adapter"].attention(empty(2, 1, 96)).key_values[0],
    }
    encoder = type(stages["text_encoder"].module)(networks["text_encoder"], runs_on=torch.device("meta"))
    results["text_encoder"] = encoder.encode("a (red:1.2) star").hidden
    assert {stage: result.device.type for stage, result in results.items()} == dict.fromkeys(networks, "meta")


@check
def what_stage_c_carries_is_placed_with_it(inside):
    torch, runtime = inside.torch, inside.pack("nodes.runtime")
    attachments, control_inputs = inside.pack("cascade_ops.attachments"), inside.pack("cascade_ops.control_inputs")
    carried, conditions, stage_c = inside.attachments(), inside.conditions(), inside.load("StageC")
    control = control_inputs.ControlInput("inpainting", torch.rand(1, 4, 192, 192))
    handle = attachments.apply_control(stage_c, carried["controlnet"], control)
    handle = attachments.apply_ip_adapter(handle, carried["ip_adapter"], torch.rand(1, 1, 96))
    asked, load = [], inside.management.load_models_gpu
    inside.management.load_models_gpu = lambda models, **options: (
        asked.append((models, options)) or load(models, **options)
    )
    try:
        managed = sampled_c(inside, handle, *conditions)["samples"]
        alone = sampled_c(inside, stage_c, *conditions)["samples"]
    finally:
        inside.management.load_models_gpu = load
    assert [len(models) for models, _ in asked] == [3, 1]
    assert asked[0][1]["memory_required"] > asked[1][1]["memory_required"]
    with runtime.using(runtime.PlainBackend()):
        near(managed, sampled_c(inside, handle, *conditions)["samples"])
    differ(managed, alone)
    refused("which ComfyUI's own nodes cannot follow", inside.run, "CascadeToModel", stage=handle)


@check
def weights_are_shared_and_their_dtype_is_kept(inside):
    torch, models = inside.torch, inside.pack("nodes.comfyui_models")
    handle = inside.run("CascadeLoadStageC", file="auto", dtype="bfloat16")[0]
    network = models.managed(handle).network
    ours = {id(weight) for weight in handle.network.parameters()}
    assert ours == {id(weight) for weight in network.parameters()}
    before = [weight.clone() for weight in handle.network.parameters()]
    runtime = inside.pack("nodes.runtime")
    conditions = inside.conditions()
    managed = sampled_c(inside, handle, *conditions)["samples"]
    models.managed(handle).patcher.partially_load(torch.device("cpu"), extra_memory=1)
    assert all(torch.equal(*pair) for pair in zip(before, handle.network.parameters(), strict=True))
    assert handle.dtype == torch.bfloat16 and {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    with runtime.using(runtime.PlainBackend()):
        near(managed, sampled_c(inside, handle, *conditions)["samples"], 0.02)


@check
def room_is_asked_for_and_the_patcher_is_the_running_one(inside):
    asked = []
    load = inside.management.load_models_gpu

    class Own(inside.patchers.ModelPatcher):
        pass

    given = getattr(inside.patchers, "CoreModelPatcher", None)
    inside.patchers.CoreModelPatcher = Own
    inside.management.load_models_gpu = lambda models, **options: (
        asked.append((models, options)) or load(models, **options)
    )
    try:
        chain(inside, all_stages(inside), inside.conditions())
    finally:
        inside.management.load_models_gpu = load
        if given is None:
            del inside.patchers.CoreModelPatcher
        else:
            inside.patchers.CoreModelPatcher = given
    assert [len(models) for models, _ in asked] == [1, 1, 2, 2, 1, 1]
    assert all(type(patcher) is Own for models, _ in asked for patcher in models)
    # The largest part of Stage C's tensors alone.
    assert asked[2][1]["memory_required"] > 2 * 36 * 128 * 4 * 10


@check
def previews_follow_comfyuis_setting(inside):
    method = importlib.import_module("comfy.cli_args").LatentPreviewMethod
    conditions, stage_c, previewer = inside.conditions(), inside.load("StageC"), inside.load("Previewer")
    before = inside.arguments.preview_method
    try:
        for setting, connected, sizes in (
            (method.NoPreviews, {}, []),
            (method.Auto, {}, [(256, 256)] * 4),
            (method.Latent2RGB, {}, [(256, 256)] * 4),
            (method.NoPreviews, {"previewer": previewer}, [(48, 48)] * 4),
        ):
            inside.arguments.preview_method = setting
            inside.previews.clear()
            sampled_c(inside, stage_c, *conditions, **connected)
            assert inside.previews == sizes, (setting, inside.previews)
    finally:
        inside.arguments.preview_method = before


def main(checkout, base, folder, graphs, answers):
    import torch

    inside = Inside(checkout, base, folder, json.loads(Path(graphs).read_text()))
    inside.torch = torch
    importlib.import_module("comfyui_wires")
    importlib.import_module("comfyui_bridge")
    importlib.import_module("comfyui_explore")
    importlib.import_module("comfyui_quantized")
    found = {}
    for function in CHECKS:
        gc.collect()
        try:
            with torch.inference_mode():
                function(inside)
            found[function.__name__] = None
        except Exception:
            found[function.__name__] = traceback.format_exc()
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    # The other files of checks ask for this one by its name.
    sys.modules["comfyui_inside"] = sys.modules["__main__"]
    main(*sys.argv[1:])
