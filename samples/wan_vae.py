"""An AutoencoderKLWan whose weights are computed, not trained: principal components of patches.

    python samples/wan_vae.py --data work/emoji.npz --out work/wan-vae

Each 4x4 px patch of a frame becomes 12 latents, its first principal components over sample clips.
The stock class can hold that exactly. A convolution with only its middle tap projects; a large
constant channel makes the RMS norm a division by a constant; and each component is carried twice,
with both signs, because silu(x) - silu(-x) = x. The residual branches are zero.

Its price: it compresses 4x in each direction but not in time, where Wan's own VAE compresses 4x
(and 8x in space). A frame is a latent frame.
"""

import argparse
import random
from pathlib import Path

import torch
from clips import Clips, save_strips
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResidualBlock,
    patchify,
)

PATCH = 4
CHANNELS = 12
WIDTH = 32
STEADY = 300.0  # the constant channel; components are near 1
# Latents are divided by a power of their deviation: 0 would leave fine components tiny next to
# the noise, 1 would spend as much of the model on them as on the coarse ones.
EVENING = 0.4


def principal_components(clips):
    """Mean [48], orthonormal rows [CHANNELS, 48] and deviations [CHANNELS] of the patches."""
    patches = patchify(clips, PATCH).transpose(0, 1).flatten(1)
    mean = patches.mean(1)
    covariance = torch.cov(patches.double())
    variance, vectors = torch.linalg.eigh(covariance)
    order = variance.argsort(descending=True)[:CHANNELS]
    return mean, vectors[:, order].T.float(), variance[order].sqrt().float()


@torch.no_grad()
def build_vae(mean, components, deviation):
    """The stock class, set to project on ``components`` and back."""
    patch_values = components.shape[1]
    unit = deviation[0]
    latents_std = (deviation / unit) ** EVENING
    vae = AutoencoderKLWan(
        base_dim=WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        patch_size=PATCH,
        in_channels=patch_values,
        out_channels=patch_values,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
        latents_mean=[0.0] * CHANNELS,
        latents_std=latents_std.tolist(),
    ).eval()
    plus, minus = slice(0, CHANNELS), slice(CHANNELS, 2 * CHANNELS)
    _silence(vae.encoder)
    weight, bias = _reset(vae.encoder.conv_in)
    weight[plus] = components / unit
    weight[minus] = -components / unit
    bias[plus] = -components @ mean / unit
    bias[minus] = components @ mean / unit
    bias[2 * CHANNELS] = STEADY
    weight, bias = _reset(vae.encoder.conv_out)
    weight[plus, plus] = torch.eye(CHANNELS) * _after_norm(WIDTH)
    weight[plus, minus] = -torch.eye(CHANNELS) * _after_norm(WIDTH)
    bias[minus] = -8.0  # log-variance
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        weight, _ = _reset(convolution)
        weight.copy_(torch.eye(len(weight)))
    set_decoder(vae.decoder, components.T * unit, mean)
    return vae


@torch.no_grad()
def set_decoder(decoder, matrix, mean):
    """Make a decoder of any width ``matrix`` [48, CHANNELS] @ latents + ``mean`` [48]."""
    plus, minus = slice(0, CHANNELS), slice(CHANNELS, 2 * CHANNELS)
    _silence(decoder)
    weight, bias = _reset(decoder.conv_in)
    weight[plus] = torch.eye(CHANNELS)
    weight[minus] = -torch.eye(CHANNELS)
    bias[2 * CHANNELS] = STEADY
    weight, bias = _reset(decoder.conv_out)
    after_norm = _after_norm(decoder.conv_in.out_channels)
    weight[:, plus] = matrix * after_norm
    weight[:, minus] = -matrix * after_norm
    bias.copy_(mean)


@torch.no_grad()
def widen(vae, width):
    """A VAE with the encoder of one built here, and its decoder ``width`` channels wide.

    Nothing changes in what it computes, but it can be trained: behind their norms, which the
    constant channel makes harmless, the residual branches see components near 1, and what they
    add is 0. Taps in time are 0 but for the present frame.
    """
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    wide = AutoencoderKLWan.from_config({**config, "decoder_base_dim": width}).eval()
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        getattr(wide, name).load_state_dict(getattr(vae, name).state_dict())
    old = vae.decoder.conv_out
    matrix = old.weight[:, :CHANNELS, -1, 1, 1] / _after_norm(old.in_channels)
    set_decoder(wide.decoder, matrix, old.bias)
    for block in wide.decoder.modules():
        if isinstance(block, WanResidualBlock):
            block.norm1.gamma.fill_(_after_norm(width))
            block.norm1.gamma[2 * CHANNELS] = 0
            block.conv1.weight[:, :, :-1] = 0
            block.conv1.weight.mul_(3**0.5)  # as large as if the present were all there is
    return wide


def _silence(half):
    """Make an encoder's or a decoder's residual branches add nothing."""
    for module in half.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.zero_(), module.conv2.bias.zero_()
        if isinstance(module, WanAttentionBlock):
            module.proj.weight.zero_(), module.proj.bias.zero_()


def _reset(convolution):
    """Zero a convolution; its middle tap and bias, to be set."""
    convolution.weight.zero_(), convolution.bias.zero_()
    middle = (slice(None), slice(None), -1, *(k // 2 for k in convolution.kernel_size[1:]))
    return convolution.weight[middle], convolution.bias


def _after_norm(width):
    """What undoes the division by the norm of ``width`` channels, one of them STEADY."""
    return STEADY / width**0.5


class Codec:
    """Normalised latents of a VAE built here, by one matrix: what its ``encode`` gives, faster."""

    def __init__(self, vae):
        weight, bias = vae.encoder.conv_in.weight, vae.encoder.conv_in.bias
        std = torch.tensor(vae.config.latents_std)
        self.vae = vae
        self.matrix = weight[:CHANNELS, :, -1, 1, 1].detach() / std[:, None]
        self.offset = bias[:CHANNELS].detach() / std
        self.std = std.view(1, -1, 1, 1, 1)

    def encode(self, clips):
        """[B, 3, F, H, W] in [-1, 1] -> [B, CHANNELS, F, H/4, W/4], as the transformer sees it."""
        latents = torch.einsum("zp,bpfhw->bzfhw", self.matrix, patchify(clips, PATCH))
        return latents + self.offset.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def decode(self, latents):
        """Inverse of :meth:`encode`, through the VAE itself."""
        return self.vae.decode(latents * self.std).sample


def psnr(a, b):
    """Of clips in [-1, 1], in dB."""
    return float(-10 * torch.log10(((a - b) / 2).square().mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="file written by emoji_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--clips", type=int, default=96, help="clips to take patches from")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args()
    rng, caption_rng = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    source = Clips(args.data)
    some = torch.tensor([[0, 3, 6]]).expand(args.clips, -1)
    seen, _ = source.batch(args.clips, rng, caption_rng, some)
    vae = build_vae(*principal_components(seen))
    vae.save_pretrained(args.out)
    fresh, _ = source.batch(8, rng, caption_rng)
    with torch.no_grad():
        again = vae.decode(vae.encode(fresh).latent_dist.mean).sample
    save_strips(torch.stack([fresh[:4], again[:4]], 1).flatten(0, 1), args.out / "clips.png")
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"{args.out}: {psnr(fresh, again):.1f} dB on new clips, {parameters / 1e6:.2f} M")


if __name__ == "__main__":
    main()
