"""Train the sample's AutoencoderKL: 4x smaller, 8 latent channels, 0.66 M parameters.

python samples/train_vae.py --data work/emoji.npz --out work/vae --minutes 10
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS
from diffusers import AutoencoderKL
from emoji_data import compose, save_grid

from dittfast.distill.muon import Muon

CROP = 64
PEAK_LR = 4e-3


def build_vae():
    """A small stock AutoencoderKL; scaling and shift are measured after training."""
    channels = (16, 32, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def random_batch(labelled, others, size, rng):
    """``size`` crops of 64 px, from pictures at 256 px (half), 128 px or 64 px (a quarter each)."""
    n_labelled = round(size * 0.75)
    picks = torch.cat(
        [
            labelled[torch.randint(len(labelled), (n_labelled,), generator=rng)],
            others[torch.randint(len(others), (size - n_labelled,), generator=rng)],
        ]
    )
    images = compose(picks, torch.randint(len(BACKGROUNDS), (size,), generator=rng))
    side = (256, 256, 128, 64)[int(torch.randint(4, (), generator=rng))]
    if side < 256:
        images = F.interpolate(images, size=(side, side), mode="area")
    crops = []
    for image in images:
        top, left = torch.randint(side - CROP + 1, (2,), generator=rng).tolist()
        crops.append(image[:, top : top + CROP, left : left + CROP])
    return torch.stack(crops).to(memory_format=torch.channels_last)


def edges(images):
    """Horizontal and vertical differences of neighbouring pixels."""
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def vae_loss(reconstruction, images, posterior):
    """L1 + L2 + half the L1 of the edges + a light pull of the latents to N(0, 1)."""
    difference = reconstruction - images
    edge_loss = sum((a - b).abs().mean() for a, b in zip(edges(reconstruction), edges(images)))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return difference.abs().mean() + difference.square().mean() + 0.5 * edge_loss + 1e-4 * kl


def psnr(reconstruction, images):
    """Peak signal-to-noise ratio in dB for images in [-1, 1]."""
    return 10 * math.log10(4 / F.mse_loss(reconstruction.clamp(-1, 1), images).item())


@torch.no_grad()
def finish(vae, labelled, out):
    """Measure scale, shift and quality on whole 256 px pictures, then save."""
    which = torch.arange(0, len(labelled), 2)
    images = compose(labelled[which], which // 2 % len(BACKGROUNDS))
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(8)])
    decoded = torch.cat([vae.decode(z).sample for z in latents.split(8)])
    vae.register_to_config(
        scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean())
    )
    vae.save_pretrained(out)
    save_grid(torch.stack([images[:16], decoded[:16]], 1).flatten(0, 1), f"{out}.png")
    print(f"saved {out}: {psnr(decoded, images):.2f} dB at 256 px", flush=True)


def train(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    data = np.load(args.data)
    labelled, others = torch.from_numpy(data["labelled"]), torch.from_numpy(data["others"])

    vae = build_vae().to(memory_format=torch.channels_last)
    kernels = [p for p in vae.parameters() if p.ndim == 4 and min(p.shape[:2]) >= 8]
    kernel_ids = {id(p) for p in kernels}
    rest = [p for p in vae.parameters() if id(p) not in kernel_ids]
    optimizers = [
        Muon(kernels, PEAK_LR),
        torch.optim.AdamW(rest, PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4),
    ]
    average = [p.detach().clone() for p in vae.parameters()]
    start, step, budget, recent = time.time(), 0, args.minutes * 60, []
    while (elapsed := time.time() - start) < budget:
        cosine = 0.5 * (1 + math.cos(math.pi * elapsed / budget))
        lr = PEAK_LR * min(1, (step + 1) / 30) * (0.02 + 0.98 * cosine)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        images = random_batch(labelled, others, args.batch, rng)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = vae_loss(reconstruction, images, posterior)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in vae.parameters()], 1 - decay)
        recent.append(psnr(reconstruction.detach(), images))
        if step % 50 == 0:
            mean = sum(recent[-50:]) / 50
            print(f"step {step} {elapsed:.0f}s loss {loss.item():.4f} {mean:.2f} dB", flush=True)
    with torch.no_grad():
        for p, value in zip(vae.parameters(), average):
            p.copy_(value)
    finish(vae.eval(), labelled, args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="file written by emoji_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained VAE")
    parser.add_argument("--minutes", type=float, default=10, help="training time")
    parser.add_argument("--batch", type=int, default=16, help="64 px crops per step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
