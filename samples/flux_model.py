"""The sample's transformer with its text encoders, and the token layout FluxPipeline uses."""

from itertools import pairwise

import torch
from diffusers import FluxTransformer2DModel
from text_encoders import MAX_LENGTH, WIDTH, build_clip, build_t5
from torch import nn

FULL_SIZE = 256
VAE_FACTOR = 4
LATENT_CHANNELS = 8


class SampleFlux(nn.Module):
    """Transformer and both text encoders, trained together."""

    def __init__(self, vocab_size):
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        )
        self.clip = build_clip(vocab_size)
        self.t5 = build_t5(vocab_size)
        # adaLN-zero: every block starts as the identity, and the model by predicting zero.
        for name, p in self.transformer.named_parameters():
            if ("norm" in name and ".linear." in name) or name.startswith("proj_out"):
                nn.init.zeros_(p)
        self.register_buffer("txt_ids", torch.zeros(MAX_LENGTH, 3), persistent=False)

    def forward(self, tokens, t, img_ids, text_tokens):
        """Velocity (noise - image) for noisy ``tokens`` [B, N, 32] at times ``t`` [B] in [0, 1]."""
        return self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=self.t5(text_tokens)[0],
            pooled_projections=self.clip(text_tokens).pooler_output,
            timestep=t,
            img_ids=img_ids,
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]

    def block_matrices(self):
        """The weight matrices inside the transformer blocks: what Muon updates."""
        return [
            p
            for name, p in self.transformer.named_parameters()
            if p.ndim == 2 and "transformer_blocks" in name
        ]


def pack(latents):
    """[B, C, H, W] -> [B, HW/4, 4C], 2x2 latents per token as in FluxPipeline."""
    b, c, h, w = latents.shape
    latents = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(b, h * w // 4, 4 * c)


def unpack(tokens):
    """Inverse of :func:`pack` for square pictures."""
    b, n, c = tokens.shape
    side = round(n**0.5)
    tokens = tokens.view(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(b, c // 4, 2 * side, 2 * side)


def image_ids(size):
    """RoPE positions of a ``size`` px picture, laid over the grid of the full-size one.

    At 256 px these are FluxPipeline's own; smaller pictures put each token at the centre of the
    full-size tokens it covers, so that going up a stage keeps every position's meaning.
    """
    side = size // (2 * VAE_FACTOR)
    scale = FULL_SIZE / size
    position = (torch.arange(side) + 0.5) * scale - 0.5
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = position[:, None]
    ids[..., 2] = position[None, :]
    return ids.view(-1, 3)


def shift_times(t, shift):
    """Move flow-matching times towards noise, as the scheduler's ``shift`` does."""
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def draw(model, tokenize_texts, prompts, size, steps=20, cfg=3.0, shift=3.0, seed=0):
    """Euler sampling with true CFG; returns latents [B, C, H, W] as the model sees them."""
    rng = torch.Generator().manual_seed(seed)
    ids = image_ids(size)
    tokens = torch.randn(len(prompts), len(ids), 4 * LATENT_CHANNELS, generator=rng)
    text = tokenize_texts(list(prompts) + [""] * len(prompts))
    times = shift_times(torch.linspace(1, 0, steps + 1), shift)
    for now, after in pairwise(times):
        both = model(torch.cat([tokens, tokens]), now.repeat(2 * len(prompts)), ids, text)
        conditional, unconditional = both.chunk(2)
        velocity = unconditional + cfg * (conditional - unconditional)
        tokens = tokens + velocity * (after - now)
    return unpack(tokens)
