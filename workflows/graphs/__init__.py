"""The example workflows themselves, one file per theme."""

from .text import CHANGE_THE_PROMPT, CHECKPOINT_FILES, PREVIEW_FIRST, TEXT_TO_IMAGE
from .training import TRAIN_LORA

WORKFLOWS = (TEXT_TO_IMAGE, PREVIEW_FIRST, CHECKPOINT_FILES, CHANGE_THE_PROMPT, TRAIN_LORA)
