"""LoRA files: in which dialect one is, reading it, writing it.

``comfyui`` is what ComfyUI's own loader takes, ``reference`` the layout of the reference's trainer, ``diffusers``
PEFT's names on diffusers' modules, ``onetrainer`` OneTrainer's names. Older and newer forms of these are read too.
"""

from .files import DIALECTS, dialect_of, read_lora, read_tokens, write_lora

__all__ = ["DIALECTS", "dialect_of", "read_lora", "read_tokens", "write_lora"]
