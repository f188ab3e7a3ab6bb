"""The example workflows themselves, one file per theme."""

from .controls import CANNY, FACE_IDENTITY, SUPER_RESOLUTION
from .explore import EXPLORE_THEN_FINISH
from .few_steps import LCM
from .high_resolution import HIGH_RESOLUTION
from .image_prompts import IMAGE_VARIATION
from .image_to_image import IMAGE_TO_IMAGE, INPAINT, OUTPAINT, RECONSTRUCTION
from .ip_adapters import COMBINED, IP_ADAPTER, IP_ADAPTER_STYLE_AND_LAYOUT
from .loras import LORA, LORA_NEW_TOKEN
from .speed import FAST_STAGE_B
from .text import CHANGE_THE_PROMPT, CHECKPOINT_FILES, PREVIEW_FIRST, TEXT_TO_IMAGE
from .training import TRAIN_LORA

WORKFLOWS = (
    TEXT_TO_IMAGE,
    PREVIEW_FIRST,
    CHECKPOINT_FILES,
    CHANGE_THE_PROMPT,
    TRAIN_LORA,
    EXPLORE_THEN_FINISH,
    LCM,
    IMAGE_TO_IMAGE,
    RECONSTRUCTION,
    INPAINT,
    OUTPAINT,
    IP_ADAPTER,
    IP_ADAPTER_STYLE_AND_LAYOUT,
    COMBINED,
    CANNY,
    SUPER_RESOLUTION,
    FACE_IDENTITY,
    IMAGE_VARIATION,
    LORA,
    LORA_NEW_TOKEN,
    HIGH_RESOLUTION,
    FAST_STAGE_B,
)
