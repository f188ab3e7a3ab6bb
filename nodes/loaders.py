"""Nodes that load a stage from a file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..cascade_ops.catalog import BUNDLED, ModelFile, bundled, fingerprint, part_of
from . import files, runtime

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle

CATEGORY = "cascade/loaders"

_FILE_HELP = (
    "auto takes the best {what} it finds, by looking into the files: the published full size, then lite, then other "
    "sizes, then the tiny one that comes with these nodes. Files go into models/{folder} (combined ones into "
    "models/checkpoints)."
)
_DTYPE = (
    # As in cascade_ops.handles.DTYPES, which is not imported here because it needs PyTorch.
    ["auto", "bfloat16", "float32", "float16", "float16 (fixed weights)", "float8 weights", "int8 weights"],
    {
        "default": "auto",
        "tooltip": "Number format to run in. auto suits your device: bfloat16 on recent GPUs, float32 on CPUs. The "
        "3.6B Stage C would give black pictures in float16, so float16 rescales its last level; 'float16 (fixed "
        "weights)' takes a file as it is that was rescaled before.",
    },
)

# Weights of 8 bits are for Stage C and Stage B.
_FLOAT_DTYPE = ([name for name in _DTYPE[0] if not name.endswith(" weights")], _DTYPE[1])
_EIGHT_BITS = (
    " float8 weights and int8 weights keep the large matrices in 8 bits, little more than half the memory of bfloat16, "
    "and change the picture a little: int8 less, float8 not at all where the file is float8 already."
)
_SMALL_DTYPE = (_DTYPE[0], _DTYPE[1] | {"tooltip": _DTYPE[1]["tooltip"] + _EIGHT_BITS})


def _file_input(stage: str, what: str) -> tuple:
    tooltip = _FILE_HELP.format(what=what, folder=files.WHERE[stage])
    return (files.choices(stage), {"default": "auto", "tooltip": tooltip})


def _load(file: ModelFile, stage: str, dtype: str = "auto") -> StageHandle:
    from ..cascade_ops.handles import load_stage

    return load_stage(
        file.path,
        stage,
        dtype=dtype,
        run_on=runtime.device(stage),
        resident=lambda size: runtime.keep_on_device(stage, size),
        name=file.name,
        host_dtype=runtime.dtype,
    )


def _said(handles: list[StageHandle]) -> dict[str, list[str]]:
    from ..cascade_ops.float16 import described

    def said(handle: StageHandle) -> str:
        parts = handle.title, str(handle.dtype).removeprefix("torch."), described(handle.network)
        return ", ".join(filter(None, parts))

    return {"text": [said(handle) for handle in handles]}


class _LoadStage:
    """One stage from one file; subclasses say which."""

    STAGE = ""
    CATEGORY = CATEGORY
    FUNCTION = "load"

    def load(self, file: str, dtype: str = "auto") -> dict[str, Any]:
        handle = _load(files.find(self.STAGE, file), self.STAGE, dtype)
        return {"ui": _said([handle]), "result": (handle,)}

    @classmethod
    def IS_CHANGED(cls, file: str, **settings: object) -> str:
        return fingerprint(files.find(cls.STAGE, file).path)


class CascadeLoadStageC(_LoadStage):
    STAGE = "stage_c"
    DESCRIPTION = (
        "Loads Stage C, which turns a prompt into a small latent picture: the model that decides what is seen."
    )
    RETURN_TYPES = ("CASCADE_STAGE_C",)
    RETURN_NAMES = ("stage_c",)
    OUTPUT_TOOLTIPS = ("Stage C, for 'Cascade: empty latent' and 'Cascade: sample Stage C'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": _file_input("stage_c", "Stage C")}, "optional": {"dtype": _SMALL_DTYPE}}


class CascadeLoadStageB(_LoadStage):
    STAGE = "stage_b"
    DESCRIPTION = "Loads Stage B, which adds detail to what Stage C made."
    RETURN_TYPES = ("CASCADE_STAGE_B",)
    RETURN_NAMES = ("stage_b",)
    OUTPUT_TOOLTIPS = ("Stage B, for 'Cascade: sample Stage B'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": _file_input("stage_b", "Stage B")}, "optional": {"dtype": _SMALL_DTYPE}}


class CascadeLoadStageA(_LoadStage):
    STAGE = "stage_a"
    DESCRIPTION = "Loads Stage A, which turns the latent of Stage B into the finished picture."
    RETURN_TYPES = ("CASCADE_STAGE_A",)
    RETURN_NAMES = ("stage_a",)
    OUTPUT_TOOLTIPS = ("Stage A, for 'Cascade: decode Stage A'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": _file_input("stage_a", "Stage A")}}


class CascadeLoadTextEncoder(_LoadStage):
    STAGE = "text_encoder"
    DESCRIPTION = "Loads the text encoder (CLIP), which turns a prompt into what Stage C and Stage B read."
    RETURN_TYPES = ("CASCADE_TEXT_ENCODER",)
    RETURN_NAMES = ("text_encoder",)
    OUTPUT_TOOLTIPS = ("The text encoder, for 'Cascade: encode text'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind, options = _file_input("text_encoder", "text encoder")
        fitting = " Only text encoders that fit the Stage C which auto would take are considered."
        options = options | {"tooltip": options["tooltip"] + fitting}
        return {"required": {"file": (kind, options)}, "optional": {"dtype": _FLOAT_DTYPE}}


class CascadeLoadPreviewer(_LoadStage):
    STAGE = "previewer"
    DESCRIPTION = (
        "Loads the previewer, which shows the latent of Stage C as a small picture, cheaply and while it is made."
    )
    RETURN_TYPES = ("CASCADE_PREVIEWER",)
    RETURN_NAMES = ("previewer",)
    OUTPUT_TOOLTIPS = ("The previewer, for 'Cascade: sample Stage C' (live) and 'Cascade: preview latent'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": _file_input("previewer", "previewer")}}


class CascadeLoadLatentEncoder(_LoadStage):
    STAGE = "latent_encoder"
    DESCRIPTION = "Loads the latent encoder (EffNet), which turns a picture into a latent that Stage C understands."
    RETURN_TYPES = ("CASCADE_LATENT_ENCODER",)
    RETURN_NAMES = ("latent_encoder",)
    OUTPUT_TOOLTIPS = ("The latent encoder, for nodes that start from a picture.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": _file_input("latent_encoder", "latent encoder")}}


class CascadeLoadImageEncoder(_LoadStage):
    STAGE = "image_encoder"
    DESCRIPTION = "Loads the image encoder (CLIP vision), which turns a picture into what Stage C and IP-Adapters read."
    RETURN_TYPES = ("CASCADE_IMAGE_ENCODER",)
    RETURN_NAMES = ("image_encoder",)
    OUTPUT_TOOLTIPS = ("The image encoder, for 'Cascade: image prompt' and 'Cascade: apply IP-Adapter'.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind, options = _file_input("image_encoder", "image encoder")
        fitting = " Only image encoders that fit the Stage C which auto would take are considered."
        return {"required": {"file": (kind, options | {"tooltip": options["tooltip"] + fitting})}}


class CascadeLoadCheckpoint:
    DESCRIPTION = (
        "Loads everything from the two combined files made for ComfyUI (stable_cascade_stage_c and "
        "stable_cascade_stage_b), instead of one loader per stage."
    )
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (
        "CASCADE_STAGE_C",
        "CASCADE_TEXT_ENCODER",
        "CASCADE_STAGE_B",
        "CASCADE_STAGE_A",
        "CASCADE_PREVIEWER",
        "CASCADE_IMAGE_ENCODER",
        "CASCADE_LATENT_ENCODER",
    )
    RETURN_NAMES = (
        "stage_c",
        "text_encoder",
        "stage_b",
        "stage_a",
        "previewer",
        "image_encoder",
        "latent_encoder",
    )
    OUTPUT_TOOLTIPS = (
        "Stage C, for 'Cascade: empty latent' and 'Cascade: sample Stage C'.",
        "The text encoder, for 'Cascade: encode text'.",
        "Stage B, for 'Cascade: sample Stage B'.",
        "Stage A, for 'Cascade: decode Stage A'.",
        "The previewer, for 'Cascade: sample Stage C' (live) and 'Cascade: preview latent'.",
        "The image encoder, for 'Cascade: image prompt' and 'Cascade: apply IP-Adapter'. It is read when it is used; "
        "from a file that has none it is an error then.",
        "The latent encoder, for nodes that start from a picture. It is read when it is used; from a file that has "
        "none it is an error then.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = files.checkpoint_choices()
        found = "auto takes the best such file that it finds, else the tiny family that comes with these nodes."
        return {
            "required": {
                "stage_c_file": (
                    names,
                    {
                        "default": "auto",
                        "tooltip": "Combined file with Stage C, text encoder and previewer, and usually image encoder "
                        "and latent encoder, in models/checkpoints. " + found,
                    },
                ),
                "stage_b_file": (
                    names,
                    {
                        "default": "auto",
                        "tooltip": "Combined file with Stage B and Stage A, in models/checkpoints. " + found,
                    },
                ),
            },
            "optional": {"dtype": _SMALL_DTYPE},
        }

    # Not every such file holds them, and not everybody needs them: most of a gigabyte in the published one.
    ON_DEMAND = ("image_encoder", "latent_encoder")

    @classmethod
    def _find(cls, stage_c_file: str, stage_b_file: str) -> dict[str, ModelFile]:
        found = files.find_in_checkpoint("stage_c", ("text_encoder", "previewer"), stage_c_file)
        whole = found["stage_c"]
        more = {stage: bundled(stage) if whole.name == BUNDLED else whole for stage in cls.ON_DEMAND}
        return found | files.find_in_checkpoint("stage_b", ("stage_a",), stage_b_file) | more

    def load(self, stage_c_file: str, stage_b_file: str, dtype: str = "auto") -> dict[str, Any]:
        from ..cascade_ops.on_demand import StageOnDemand
        from ..cascade_ops.quantized import float_dtype

        found = self._find(stage_c_file, stage_b_file)
        order = ("stage_c", "text_encoder", "stage_b", "stage_a", "previewer")
        # Stage A and the previewer are small and have no dtype of their own to choose.
        small = ("stage_a", "previewer")
        chosen = {stage: "auto" if stage in small else float_dtype(stage, dtype) for stage in order}
        handles = [_load(found[stage], stage, chosen[stage]) for stage in order]
        later = [StageOnDemand(stage, partial(_load_part, found[stage], stage)) for stage in self.ON_DEMAND]
        said = _said(handles)
        said["text"] += _said_of_parts({stage: found[stage] for stage in self.ON_DEMAND})
        return {"ui": said, "result": (*handles, *later)}

    @classmethod
    def IS_CHANGED(cls, stage_c_file: str, stage_b_file: str, **settings: object) -> str:
        return "; ".join(fingerprint(file.path) for file in cls._find(stage_c_file, stage_b_file).values())


def _load_part(file: ModelFile, stage: str) -> StageHandle:
    """A part of the combined file, asked for by the node that uses it; ValueError where the file has none."""
    if file.name != BUNDLED and part_of(file.path, stage) is None:
        what = stage.replace("_", " ")
        raise ValueError(
            f"{file.name} holds no {what}, expected one for the output {stage} of 'Cascade: load checkpoint': connect "
            f"'Cascade: load {what}' in its place."
        )
    return _load(files.find(stage, BUNDLED) if file.name == BUNDLED else file, stage)


def _said_of_parts(parts: dict[str, ModelFile]) -> list[str]:
    """Which parts there are to be read when they are used, and which the file lacks."""
    found = {stage: part_of(file.path, stage) for stage, file in parts.items()}
    there = ", ".join(part.title for part in found.values() if part is not None)
    missing = ", ".join(stage.replace("_", " ") for stage, part in found.items() if part is None)
    said = {"when used": there, "not in these files": missing}
    return [f"{when}: {names}" for when, names in said.items() if names]
