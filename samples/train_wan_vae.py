"""Train the video VAE's decoder to take away what the transformer leaves: blocks and grain.

    python samples/train_wan_vae.py --data work/emoji.npz --model work/plain --out work/decoder

The encoder stays as ``wan_vae.py`` computed it, and with it every latent. The decoder is computed
again, ``WIDTH`` channels wide, which leaves room for its residual branches; they start at nothing
and are trained. What it sees are the video model's own latents: clips with noise, denoised by the
model over its last steps, beside the clips as they were. Frames are decoded one by one: of a
kernel's three taps in time only the last is trained, the others stay 0.

Both halves continue where they stopped when started again.
"""

import argparse
import copy
import json
import os
import random
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from clips import FRAMES, Clips, save_strips
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from flux_model import shift_times
from train_flux import learning_rate
from transformers import PreTrainedTokenizerFast
from wan_model import TIME_SHIFT, SampleWan, condition_on, tokenize
from wan_vae import PATCH, Codec, psnr, widen

WIDTH = 64
CROP = 16  # latents: 64 px
HELD_OUT = 10  # clips
# A clip is denoised from one of the last of so many steps, so that it still is that clip.
STEPS = 12
LAST_STEPS = (1, 2, 3, 4, 5)


@torch.no_grad()
def denoised(model, tokenizer, clean, grey, texts, steps, rng):
    """Latents ``clean`` [1, C, F, H, W] with noise, and the last ``steps`` of ``STEPS`` on them."""
    condition = condition_on(clean[:, :, :1], grey, clean.shape[2])
    tokens = tokenize(tokenizer, texts)
    times = shift_times(torch.linspace(1, 0, STEPS + 1), TIME_SHIFT)[-steps - 1 :]
    latents = torch.lerp(clean, torch.randn(clean.shape, generator=rng), times[0])
    for now, after in pairwise(times):
        latents = latents + model(latents, condition, now[None], tokens) * (after - now)
    return latents


def make_pairs(args, codec, source, file, count, seed):
    """``count`` clips as (latents of the model [N, C, F, H, W], pixels in uint8), kept in ``file``.

    Each clip has a seed of its own, so that a later start goes on with the next.
    """
    pairs = torch.load(file) if file.exists() else []
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model / "tokenizer")
    model = SampleWan(len(tokenizer)).eval()
    model.load_pipeline(args.model)
    grey = codec.encode(torch.zeros(1, 3, 1, 4, 4))
    while len(pairs) < count:
        i = len(pairs)
        rng, caption_rng = torch.Generator().manual_seed(seed + i), random.Random(seed + i)
        clip, texts = source.batch(1, rng, caption_rng)
        steps = LAST_STEPS[i % len(LAST_STEPS)]
        latents = denoised(model, tokenizer, codec.encode(clip), grey, texts, steps, rng)
        pixels = ((clip + 1) * 127.5).round().byte()
        pairs.append((latents[0].half(), pixels[0]))
        if len(pairs) % 16 == 0 or len(pairs) == count:
            _save(pairs, file)
            print(f"{file}: {len(pairs)} of {count}", flush=True)
    latents, pixels = zip(*pairs[:count])
    return torch.stack(latents), torch.stack(pixels)


def _save(state, file):
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, file)


def _one_frame(convolution, x, cache=None):
    weight, bias = convolution.weight[:, :, -1], convolution.bias
    return F.conv2d(x[:, :, 0], weight, bias, padding=weight.shape[-1] // 2)[:, :, None]


def decode_frames(vae, latents):
    """[N, C, H, W] latents -> [N, 3, 4H, 4W], each a frame by itself; gradients flow.

    What ``vae.decode`` gives where kernels are 0 but in their last tap in time, without the work
    of the others.
    """
    convolutions = [m for m in vae.modules() if isinstance(m, WanCausalConv3d)]
    for convolution in convolutions:
        convolution.forward = partial(_one_frame, convolution)
    try:
        patches = vae.decoder(vae.post_quant_conv(latents[:, :, None]))
    finally:
        for convolution in convolutions:
            del convolution.forward
    return unpatchify(patches, PATCH)[:, :, 0]


def difference(decoded, wanted):
    """Mean error of pixels, and of the steps between neighbours, where blocks show."""
    total = (decoded - wanted).abs().mean()
    for axis in (-1, -2):
        total = total + (decoded.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean()
    return total


def crops(latents, pixels, rng):
    """One window of each frame: [N, C, CROP, CROP] latents and their pixels in [-1, 1]."""
    parts = []
    for z, picture in zip(latents, pixels):
        y, x = (int(torch.randint(n - CROP + 1, (), generator=rng)) for n in z.shape[-2:])
        rows, columns = slice(PATCH * y, PATCH * (y + CROP)), slice(PATCH * x, PATCH * (x + CROP))
        parts.append((z[:, y : y + CROP, x : x + CROP], picture[:, rows, columns]))
    z, picture = (torch.stack(part) for part in zip(*parts))
    return z.float(), picture.float() / 127.5 - 1


class Run:
    """What a checkpoint holds, and the loop over it."""

    def __init__(self, args):
        self.args = args
        torch.manual_seed(args.seed)
        computed = AutoencoderKLWan.from_pretrained(args.model / "vae", torch_dtype=torch.float32)
        self.codec, self.vae = Codec(computed), widen(computed, WIDTH)
        source = Clips(args.data)
        self.held_out = make_pairs(
            args, self.codec, source, args.out / "held-out.pt", HELD_OUT, 10_000
        )
        self.pairs = make_pairs(args, self.codec, source, args.out / "train.pt", args.clips, 20_000)
        # The closed form's own weights learn as well, but for what reads the latents.
        parts = (self.vae.decoder.mid_block.resnets, self.vae.decoder.up_blocks)
        self.trained = [p for part in parts for p in part.parameters()]
        self.trained += list(self.vae.decoder.conv_out.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.lr, weight_decay=0.0)
        self.rng = torch.Generator().manual_seed(args.seed)
        self.step, self.cpu_seconds, self.losses = 0, 0.0, []
        self.untrained = psnr(*self.restored())
        if self.checkpoint.exists():
            self.load()

    @property
    def checkpoint(self):
        return self.args.out / "checkpoint.pt"

    def save(self):
        state = {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "progress": (self.step, self.cpu_seconds, self.losses),
        }
        _save(state, self.checkpoint)

    def load(self):
        state = torch.load(self.checkpoint)
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.step, self.cpu_seconds, self.losses = state["progress"]

    def train_step(self):
        args, (latents, pixels) = self.args, self.pairs
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, args.steps, args.lr)
        clip = torch.randint(len(latents), (args.batch,), generator=self.rng)
        frame = torch.randint(FRAMES, (args.batch,), generator=self.rng)
        z, wanted = crops(latents[clip, :, frame], pixels[clip, :, frame], self.rng)
        decoded = decode_frames(self.vae, z * self.codec.std[:, :, 0])
        loss = difference(decoded, wanted)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses = [*self.losses[-99:], loss.item()]

    @torch.no_grad()
    def restored(self):
        """The held-out clips, decoded, and as they were."""
        latents, pixels = self.held_out
        frames = latents.float().transpose(1, 2).flatten(0, 1) * self.codec.std[:, :, 0]
        decoded = torch.cat([decode_frames(self.vae, part) for part in frames.split(FRAMES)])
        decoded = decoded.clamp(-1, 1)  # as ``vae.decode`` does
        clips = decoded.view(-1, FRAMES, *decoded.shape[1:]).transpose(1, 2)
        return clips, pixels.float() / 127.5 - 1

    def train(self):
        saved = time.time()
        while self.step < self.args.steps:
            start = time.process_time()
            self.train_step()
            self.cpu_seconds += time.process_time() - start
            if self.step % 50 == 0:
                loss = sum(self.losses) / len(self.losses)
                print(
                    f"step {self.step}/{self.args.steps} ({self.cpu_seconds / 60:.1f} CPU min) "
                    f"loss {loss:.4f}",
                    flush=True,
                )
            if time.time() - saved > 60:
                self.save()
                saved = time.time()
        self.save()
        self.write()

    def write(self):
        """The VAE, what its training was, and the held-out clips: computed, trained, and true."""
        args, out = self.args, self.args.out
        copy.deepcopy(self.vae).half().save_pretrained(out)
        trained, wanted = self.restored()
        facts = {
            **{name: getattr(args, name) for name in ("clips", "steps", "batch", "lr", "seed")},
            "cpu_minutes_of_steps": round(self.cpu_seconds / 60, 1),
            "held_out_psnr_db": [round(self.untrained, 2), round(psnr(trained, wanted), 2)],
        }
        (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        with torch.no_grad():
            computed = self.codec.decode(self.held_out[0].float())
        rows = torch.stack([computed, trained, wanted], 1).flatten(0, 1)
        save_strips(rows.clamp(-1, 1), out / "clips.png")
        print(f"{out}: {facts}")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="file written by emoji_data.py")
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder to train for")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--clips", type=int, default=120, help="clips that the model denoises")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="crops of 64 px in a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    return parser


def main():
    args = make_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    Run(args).train()


if __name__ == "__main__":
    main()
