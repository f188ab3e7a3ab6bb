"""The networks of Stable Cascade, with the published tensor names.

Text goes through CLIP (``text.py``) to ``StageC``, which denoises a 16-channel latent (24 x 24 for 1024 x 1024).
``StageB`` turns that into a 4-channel latent (256 x 256), which ``StageA`` decodes to pixels. ``LatentEncoder`` makes
Stage C latents from pictures, ``Previewer`` shows them cheaply, ``ControlNet`` steers Stage C by a picture,
``IPAdapter`` lets it read one.
"""

from .controlnet import ControlNet
from .effnet import LatentEncoder
from .ip_adapter import DecoupledAttention, IPAdapter
from .previewer import Previewer
from .stage_a import StageA
from .stage_b import StageB
from .stage_c import StageC
from .unet import Prepared

__all__ = [
    "ControlNet",
    "DecoupledAttention",
    "IPAdapter",
    "LatentEncoder",
    "Prepared",
    "Previewer",
    "StageA",
    "StageB",
    "StageC",
]
