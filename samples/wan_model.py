"""The sample's video transformer with its text encoder, called as WanImageToVideoPipeline does."""

import threading
from itertools import pairwise

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from flux_model import shift_times
from text_encoders import MAX_LENGTH, WIDTH
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel
from wan_vae import CHANNELS

HEADS = 2
HEAD_DIM = 64
LAYERS = 6
FULL_SIDE = 16  # tokens: 128 px
TIME_SHIFT = 3.0


class ChosenRope(WanRotaryPosEmbed):
    """Wan's rotary embedding, or in training that of some frames of smaller clips.

    ``chosen.frames`` [B, F] are the places in time of each clip's frames; None for the stock
    embedding. Fewer rows and columns than the full clip's are laid over its grid, each token at
    the centre of those it covers, so that going up in size keeps the meaning of every position.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.chosen = threading.local()  # training runs parts of a batch in threads

    def forward(self, hidden_states):
        frames = getattr(self.chosen, "frames", None)
        if frames is None:
            return super().forward(hidden_states)
        height, width = (n // 2 for n in hidden_states.shape[-2:])
        b, f = frames.shape
        scale = FULL_SIDE / height
        rows, columns = ((torch.arange(n) + 0.5) * scale - 0.5 for n in (height, width))
        shape = (b, f, height, width, -1)
        angles = [
            _angles(frames.flatten(), self.t_dim).view(b, f, 1, 1, -1).expand(shape),
            _angles(rows, self.h_dim).view(height, 1, -1).expand(shape),
            _angles(columns, self.w_dim).expand(shape),
        ]
        angles = torch.cat(angles, -1).flatten(1, 3).unsqueeze(2)
        return angles.cos(), angles.sin()


def _angles(positions, dim):
    """[N] -> [N, dim]: the angle of each pair of channels, twice."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.outer(positions, frequencies).repeat_interleave(2, 1)


class SampleWan(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, vocab_size):
        super().__init__()
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=2 * CHANNELS + 1,
            out_channels=CHANNELS,
            text_dim=WIDTH,
            freq_dim=128,
            ffn_dim=4 * HEADS * HEAD_DIM,
            num_layers=LAYERS,
            rope_max_seq_len=128,
        )
        self.transformer.rope = ChosenRope(HEAD_DIM, (1, 2, 2), 128)
        self.text_encoder = build_umt5(vocab_size)
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """Start from plain residual blocks whose heads look around their own place.

        Constant queries and keys make the rotary embedding a function of distance: every token
        begins by reading its neighbourhood in all frames, and has only to learn where else to
        look. The gain of the query and key norms makes that look a sharp one.
        """
        model = self.transformer
        # The noise, most of the answer, goes straight through: each token's noisy latents take
        # directions of the residual stream of their own, which the last layer reads back.
        patch = model.patch_embedding.weight.view(HEADS * HEAD_DIM, 2 * CHANNELS + 1, 4)
        noisy = nn.init.orthogonal_(torch.empty(HEADS * HEAD_DIM, CHANNELS * 4))
        noisy *= (len(noisy) / noisy.shape[1]) ** 0.5
        patch[:, :CHANNELS] = noisy.view(-1, CHANNELS, 4)
        back = noisy.view(-1, CHANNELS, 4).permute(2, 1, 0).reshape(4 * CHANNELS, -1)
        model.proj_out.weight.copy_(back * (noisy.shape[1] / len(noisy)))
        nn.init.zeros_(model.proj_out.bias)
        nn.init.zeros_(model.condition_embedder.time_proj.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.bias)
        place = torch.zeros(HEADS, HEAD_DIM)
        place[:, model.rope.t_dim :: 2] = 1.5
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.5
            for projection, norm in (
                (block.attn1.to_q, block.attn1.norm_q),
                (block.attn1.to_k, block.attn1.norm_k),
            ):
                projection.bias.copy_(place.flatten())
                norm.weight.fill_(1.6)

    def forward(self, noisy, condition, t, tokens, frames=None):
        """Velocity (noise - clip) of ``noisy`` [B, C, F, H, W] at times ``t`` [B] in [0, 1].

        ``condition`` [B, 1 + C, F, H, W] is :func:`condition_on`'s, ``tokens`` the pair of
        :func:`tokenize`; ``frames`` [B, F] are the places in time of the frames, of whole clips
        if None.
        """
        self.transformer.rope.chosen.frames = frames
        ids, mask = tokens
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(
            hidden_states=torch.cat([noisy, condition], 1),
            timestep=1000 * t,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]

    def load_pipeline(self, folder):
        """Take the weights of the pipeline saved in ``folder``."""
        for name in ("transformer", "text_encoder"):
            part = getattr(self, name)
            stored = type(part).from_pretrained(folder / name, torch_dtype=torch.float32)
            part.load_state_dict(stored.state_dict())

    def block_matrices(self):
        """The weight matrices inside the transformer blocks: what Muon updates."""
        return [p for p in self.transformer.blocks.parameters() if p.ndim == 2]


def build_umt5(vocab_size):
    """One-layer UMT5 encoder; large initial embeddings, as in ``text_encoders.build_t5``."""
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def tokenize(tokenizer, texts):
    """Token ids and mask, [B, MAX_LENGTH] each, as the pipeline makes them."""
    encoded = tokenizer(
        texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids, encoded.attention_mask


def condition_on(first, grey, frames):
    """What the pipeline puts beside the noise: a mask, the first frame, and grey frames after it.

    ``first`` [B, C, 1, H, W] latents of the first frame and ``grey`` [1, C, 1, 1, 1] those of a
    frame of zeros -> [B, 1 + C, frames, H, W].
    """
    b, c, _, h, w = first.shape
    rest = grey.expand(b, c, frames - 1, h, w)
    mask = first.new_zeros(b, 1, frames, h, w)
    mask[:, :, 0] = 1
    return torch.cat([mask, torch.cat([first, rest], 2)], 1)


@torch.no_grad()
def animate(model, condition, tokens, frames=None, steps=10, seed=0):
    """Euler sampling without guidance; returns latents [B, C, F, H, W]."""
    rng = torch.Generator().manual_seed(seed)
    clip = torch.randn(condition[:, 1:].shape, generator=rng)
    times = shift_times(torch.linspace(1, 0, steps + 1), TIME_SHIFT)
    for now, after in pairwise(times):
        velocity = model(clip, condition, now.repeat(len(clip)), tokens, frames)
        clip = clip + velocity * (after - now)
    return clip
