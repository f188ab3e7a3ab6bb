"""Stable Cascade in PyTorch, without ComfyUI.

Stable Cascade (Würstchen v3) makes a picture in three stages, most of the work in a latent that is 42 times smaller
than the picture on each side:

1. CLIP encodes the prompt (``text``): one vector per token, and one pooled vector for the whole.
2. Stage C (``models.stage_c``) starts from noise of 24 x 24 x 16, for a picture of 1024 x 1024, and removes it in about
   20 steps, reading the text in every attention block. What is in the picture is decided here.
3. Stage B (``models.stage_b``) starts from noise of 256 x 256 x 4 and removes it in about 10 steps, guided by Stage C's
   latent. It adds the detail.
4. Stage A (``models.stage_a``), an autoencoder, decodes that to pixels, 4 on each side for every latent cell.

The way back exists too: ``models.effnet`` encodes a picture to a Stage C latent, and ``models.previewer`` decodes one
to a small picture. ``models.controlnet`` turns a picture into a steer for Stage C.

Read ``stages`` first: the chain as five functions. Below it lie ``denoisers`` (a network with its conditions),
``diffusion`` (noise levels, samplers, guidance), ``models`` (the networks) and ``checkpoints`` (which file is what).
``pipeline`` puts all of it behind two calls, and ``training`` makes the weights.
"""
