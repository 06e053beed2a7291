"""Train the sample video model: from a first frame and a sentence to a clip.

    python samples/train_wan.py --data work/emoji.npz --vae work/wan-vae --out work/wan \\
        --stages 64:3:2000:16:2e-3 128:3:600:8:1.5e-3 128:9:120:4:1e-3

A stage is ``size:frames:steps:batch:learning rate``. With fewer than 9 frames a step sees the first
frame and some of the others, drawn anew for each clip; frames, and the tokens of smaller ones, keep
their places in the full clip. So learning how pictures move costs a fraction, and positions mean
the same when the last stage shows whole clips. The run saves itself every few minutes and continues
exactly where it stopped when started again with ``--resume``; the stages may be changed in between.
``--start`` takes the weights of an exported pipeline folder into a new run.
"""

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
import train_flux
from clips import FRAMES, MOTIONS, SIZE, Clips, caption, save_strips, tokenizer_corpus
from diffusers import AutoencoderKLWan
from text_encoders import build_tokenizer
from train_flux import CAPTION_DROP, learning_rate, random_times
from transformers import PreTrainedTokenizerFast
from wan_model import TIME_SHIFT, SampleWan, animate, condition_on, tokenize
from wan_vae import Codec

from dittfast.distill.muon import Muon

# Loss of latents that differ from the first frame's, against 1 for the plain background and
# FIRST for the first frame, which only has to be copied.
MOVING = 4.0
FIRST = 0.25

PREVIEWS = [
    *(("red apple", "blue"), ("lion", "white"), ("rocket", "black"), ("penguin", "purple")),
    *(("red heart", "pink"), ("balloon", "yellow"), ("sunflower", "green"), ("ghost", "red")),
]


def parse_stage(text):
    """``"64:3:2000:16:2e-3"`` -> (64, 3, 2000, 16, 0.002)."""
    *counts, lr = text.split(":")
    size, frames, steps, batch = map(int, counts)
    if not 2 <= frames <= FRAMES:
        raise ValueError(f"a stage has 2 to {FRAMES} frames, got {frames}")
    if SIZE % size or size % 8:
        raise ValueError(f"sizes are multiples of 8 that divide {SIZE}, got {size}")
    return size, frames, steps, batch, float(lr)


def loss_weights(clean):
    """Weights [B, 1, F, H, W] with mean 1 for the latents of clips."""
    moved = (clean - clean[:, :, :1]).square().mean(1, keepdim=True).sqrt() > 0.05
    weights = 1 + (MOVING - 1) * moved.float()
    weights[:, :, 0] = FIRST
    return weights / weights.mean()


class Run(train_flux.Run):
    """What differs from training on pictures: the data, the model and the loss."""

    def __init__(self, args):
        self.args = args
        torch.manual_seed(args.seed)
        # One part of the batch per thread, each on one core; see train_flux.py.
        self.pool = ThreadPoolExecutor(
            args.threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        self.rng = torch.Generator().manual_seed(args.seed)
        self.caption_rng = random.Random(args.seed)
        self.clips = Clips(args.data)
        self.codec = Codec(AutoencoderKLWan.from_pretrained(args.vae).eval())
        self.grey = self.codec.encode(torch.zeros(1, 3, 1, 4, 4))
        self.tokenizer = self._tokenizer()
        self.model = SampleWan(len(self.tokenizer))
        if args.start:
            self.model.load_pipeline(args.start)
        matrices = self.model.block_matrices()
        matrix_ids = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in matrix_ids]
        self.optimizers = [
            Muon(matrices, lr=1e-3, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.stage, self.stage_step, self.step = 0, 0, 0
        self.samples, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.losses, self.history = [], []

    def _tokenizer(self):
        folder = self.args.out / "tokenizer"
        if folder.exists():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        if self.args.start:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.args.start / "tokenizer")
        else:
            tokenizer = build_tokenizer(tokenizer_corpus(), vocab_size=1024)
        tokenizer.save_pretrained(folder)
        return tokenizer

    def gradients(self, frames, clean, noise, t, ids, mask):
        """Loss and gradients of one thread's part of the batch."""
        noisy = torch.lerp(clean, noise, t.view(-1, 1, 1, 1, 1))
        condition = condition_on(clean[:, :, :1], self.grey, clean.shape[2])
        velocity = self.model(noisy, condition, t, (ids, mask), frames)
        loss = ((velocity - (noise - clean)).square() * loss_weights(clean)).mean()
        return loss.item(), torch.autograd.grad(loss, list(self.model.parameters()))

    def train_step(self, size, frames, steps, batch, peak_lr):
        lr = learning_rate(self.stage_step, steps, peak_lr)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        order = torch.rand(batch, FRAMES - 1, generator=self.rng).argsort(1) + 1
        chosen = F.pad(order[:, : frames - 1].sort(1).values, (1, 0))
        clips, texts = self.clips.batch(batch, self.rng, self.caption_rng, chosen, size)
        clean = self.codec.encode(clips)
        texts = ["" if self.caption_rng.random() < CAPTION_DROP else text for text in texts]
        t = random_times(batch, TIME_SHIFT, self.rng)
        noise = torch.randn(clean.shape, generator=self.rng)
        ids, mask = tokenize(self.tokenizer, texts)
        n = self.args.threads
        parts = zip(*(x.chunk(n) for x in (chosen, clean, noise, t, ids, mask)))
        results = list(self.pool.map(lambda part: self.gradients(*part), parts))
        self.update(results, batch)

    @torch.no_grad()
    def preview(self, size):
        """Draw a clip of each motion with the averaged weights."""
        parameters = [p.detach() for p in self.model.parameters()]
        live = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, self.average)
        asked = [(*pair, motion) for pair, motion in zip(PREVIEWS, MOTIONS)]
        first = torch.stack([self.clips.one(*names)[:, 0] for names in asked])
        first = F.interpolate(first, size=(size, size), mode="area")[:, :, None]
        condition = condition_on(self.codec.encode(first), self.grey, FRAMES)
        tokens = tokenize(self.tokenizer, [caption(*names) for names in asked])
        frames = torch.arange(FRAMES).expand(len(asked), -1)
        clips = self.codec.decode(animate(self.model, condition, tokens, frames, steps=6))
        save_strips(clips, self.args.out / f"preview-{self.step:05d}.png")
        torch._foreach_copy_(parameters, live)

    def train_stage(self, size, frames, steps, batch, peak_lr):
        saved = logged = time.time()
        while self.stage_step < steps:
            start, cpu_start = time.time(), time.process_time()
            self.train_step(size, frames, steps, batch, peak_lr)
            now = time.time()
            self.seconds += now - start
            self.cpu_seconds += time.process_time() - cpu_start
            if self.step % self.args.log_every == 0:
                rate = self.args.log_every * batch / (now - logged)
                logged = now
                print(
                    f"{size} px, {frames} frames: step {self.stage_step}/{steps} "
                    f"(all: {self.step} steps, {self.samples} clips, {self.seconds / 60:.1f} min, "
                    f"{self.cpu_seconds / 60:.1f} CPU min) "
                    f"loss {self.mean_loss():.4f} {rate:.1f} clips/s",
                    flush=True,
                )
            if self.step % self.args.preview_every == 0:
                self.preview(size)
            if now - saved > 60 * self.args.save_minutes:
                self.save()
                saved = now
        if steps:
            self.preview(size)

    def train(self):
        for index, stage in enumerate(self.args.stages):
            if index < self.stage:
                continue
            self.train_stage(*stage)
            if index + 1 == len(self.args.stages):
                break  # stay in the last stage, so that a resumed run can make it longer
            self.history.append({"stage": stage, "loss": self.mean_loss(), "step": self.step})
            self.stage, self.stage_step, self.losses = index + 1, 0, []
            self.save()
        self.save()
        hours = self.cpu_seconds / 3600
        print(f"done: {self.step} steps, {self.samples} clips, {hours:.2f} CPU hours")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="file written by emoji_data.py")
    parser.add_argument("--vae", type=Path, required=True, help="folder written by wan_vae.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run")
    parser.add_argument(
        "--stages", type=parse_stage, nargs="+", required=True, help="size:frames:steps:batch:lr"
    )
    parser.add_argument("--start", type=Path, help="pipeline folder whose weights to begin with")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--average", type=float, default=0.998, help="decay of averaged weights")
    parser.add_argument("--save-minutes", type=float, default=3, help="time between checkpoints")
    parser.add_argument("--preview-every", type=int, default=500, help="steps between previews")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    run = Run(args)
    if args.resume:
        run.load()
    elif run.checkpoint.exists():
        parser.error(f"{run.checkpoint} exists: pass --resume or another --out")
    run.train()


if __name__ == "__main__":
    main()
