"""Nodes that turn text into what the models read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import files, runtime

if TYPE_CHECKING:
    from ..cascade_ops.handles import StageHandle


class CascadeEncodeText:
    DESCRIPTION = (
        "Turns a prompt into conditioning for Stage C and Stage B. (word:1.2) weighs words, embedding:name uses a "
        "learned embedding, and prompts may be longer than 75 tokens."
    )
    CATEGORY = "cascade/conditioning"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The encoded prompt, for positive or negative of the sampling nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder": (
                    "CASCADE_TEXT_ENCODER",
                    {"tooltip": "The text encoder, from 'Cascade: load text encoder'."},
                ),
                "text": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "What the picture should show, or, for a negative prompt, what it should not. May "
                        "be empty.",
                    },
                ),
            }
        }

    def encode(self, text_encoder: StageHandle, text: str) -> tuple[list]:
        from ..cascade_ops import catalog, stages, wires

        find_embedding = catalog.embedding_finder(files.embeddings())
        (text_encoder,) = runtime.placed([text_encoder])
        return (wires.write_condition(*stages.encode_text(text_encoder, text, find_embedding)),)
