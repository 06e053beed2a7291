"""Train the sample FLUX model and its text encoders, from small pictures up to 256 px.

    python samples/train_flux.py --data work/emoji.npz --vae work/vae --out work/flux \\
        --stages 64:5000:16:2e-3 128:1500:12:1.5e-3 256:600:4:1e-3

A stage is ``size:steps:batch:learning rate``. The run saves itself every few minutes and
continues where it stopped when started again with ``--resume``; the stages may be changed in
between, for example to train the last one longer.
"""

import argparse
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS, LABELS, caption, random_caption, tokenizer_corpus
from diffusers import AutoencoderKL
from emoji_data import compose, save_grid
from flux_model import SampleFlux, draw, image_ids, pack, shift_times
from text_encoders import build_tokenizer, tokenize
from transformers import PreTrainedTokenizerFast

from dittfast.distill.muon import Muon

# Larger pictures need more noise to be hidden as well: the time shift of each size.
TIME_SHIFT = {64: 1.0, 128: 1.7, 256: 3.0}
CAPTION_DROP = 0.1
WARM_UP = 100
DECAY_PART = 0.4
AVERAGE_EVERY = 4
PROGRESS = (
    *("stage", "stage_step", "step", "samples", "seconds", "cpu_seconds", "losses", "history"),
)


def parse_stage(text):
    """``"64:5000:16:2e-3"`` -> (64, 5000, 16, 0.002)."""
    size, steps, batch, lr = text.split(":")
    return int(size), int(steps), int(batch), float(lr)


@torch.no_grad()
def all_latents(labelled, vae, size):
    """Latents of every label on every background: [labels, backgrounds, C, H, W] float16."""
    colours = torch.arange(len(BACKGROUNDS))
    rows = []
    for rgba in labelled:
        images = compose(rgba.expand(len(colours), -1, -1, -1), colours)
        if size < images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="area")
        mean = vae.encode(images).latent_dist.mean
        rows.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half())
    return torch.stack(rows)


def random_times(n, shift, rng):
    """``n`` stratified logit-normal times in (0, 1), shifted towards noise."""
    quantile = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    quantile = quantile.clamp(1e-4, 1 - 1e-4)[torch.randperm(n, generator=rng)]
    return shift_times(torch.sigmoid(torch.special.ndtri(quantile)), shift)


def learning_rate(step, steps, peak):
    """Warm up, hold, then fall linearly to 3 % over the last part of the stage."""
    left = (1 - step / steps) / DECAY_PART
    return peak * min(1.0, (step + 1) / WARM_UP, max(0.03, left))


class Run:
    """Everything that a checkpoint must hold, and the training loop over it."""

    def __init__(self, args):
        self.args = args
        torch.manual_seed(args.seed)
        # One part of the batch per thread, each on one core: busy neighbours then cost only their
        # share, where threads that split every operation would wait for each other hundreds of
        # times a step.
        self.pool = ThreadPoolExecutor(
            args.threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        self.rng = torch.Generator().manual_seed(args.seed)
        self.caption_rng = random.Random(args.seed)
        data = np.load(args.data)
        self.labelled = torch.from_numpy(data["labelled"])
        self.vae = AutoencoderKL.from_pretrained(args.vae).eval()
        self.tokenizer = self._tokenizer(data["words"].tolist())
        self.model = SampleFlux(len(self.tokenizer))
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

    def _tokenizer(self, words):
        folder = self.args.out / "tokenizer"
        if folder.exists():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer = build_tokenizer(tokenizer_corpus(words))
        tokenizer.save_pretrained(folder)
        return tokenizer

    @property
    def checkpoint(self):
        return self.args.out / "checkpoint.pt"

    def save(self):
        """Write the checkpoint beside the old one, then swap: a kill leaves one of the two."""
        state = {
            "model": self.model.state_dict(),
            "average": dict(zip((n for n, _ in self.model.named_parameters()), self.average)),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.get_state(),
            "caption_rng": self.caption_rng.getstate(),
            "progress": {name: getattr(self, name) for name in PROGRESS},
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def load(self):
        """Continue exactly where :meth:`save` was called."""
        state = torch.load(self.checkpoint, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.average = list(state["average"].values())
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.rng.set_state(state["rng"])
        self.caption_rng.setstate(state["caption_rng"])
        for name, value in state["progress"].items():
            setattr(self, name, value)

    def mean_loss(self):
        recent = self.losses[-200:]
        return sum(recent) / max(1, len(recent))

    def latents(self, size):
        """The stage's pictures, encoded once and kept beside the checkpoint."""
        file = self.args.out / f"latents-{size}.pt"
        if not file.exists():
            temporary = file.with_suffix(".tmp")
            torch.save(all_latents(self.labelled, self.vae, size), temporary)
            os.replace(temporary, file)
        return torch.load(file)

    def gradients(self, ids, clean, noise, t, tokens):
        """Loss and gradients of one thread's part of the batch."""
        noisy = torch.lerp(clean, noise, t[:, None, None])
        loss = F.mse_loss(self.model(noisy, t, ids, tokens), noise - clean)
        return loss.item(), torch.autograd.grad(loss, list(self.model.parameters()))

    def train_step(self, latents, ids, size, steps, batch, peak_lr):
        lr = learning_rate(self.stage_step, steps, peak_lr)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        label = torch.randperm(len(LABELS), generator=self.rng)[:batch]
        colour = torch.randint(len(BACKGROUNDS), (batch,), generator=self.rng)
        clean = pack(latents[label, colour].float())
        texts = []
        for i, j in zip(label.tolist(), colour.tolist()):
            text = random_caption(list(LABELS)[i], list(BACKGROUNDS)[j], self.caption_rng)
            texts.append("" if self.caption_rng.random() < CAPTION_DROP else text)
        t = random_times(batch, TIME_SHIFT[size], self.rng)
        noise = torch.randn(clean.shape, generator=self.rng)
        tokens = tokenize(self.tokenizer, texts)
        n = self.args.threads
        parts = zip(clean.chunk(n), noise.chunk(n), t.chunk(n), tokens.chunk(n))
        results = list(self.pool.map(lambda part: self.gradients(ids, *part), parts))
        self.update(results, batch)

    def update(self, results, batch):
        """Step by the mean of the threads' (loss, gradients), and follow with the average."""
        parameters = list(self.model.parameters())
        loss = sum(part_loss for part_loss, _ in results) / len(results)
        for p, *parts in zip(parameters, *(gradients for _, gradients in results)):
            p.grad = torch.stack(parts).mean(0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.stage_step += 1
        self.samples += batch
        self.losses = [*self.losses[-199:], loss]
        if self.step % AVERAGE_EVERY == 0:
            decay = min(self.args.average**AVERAGE_EVERY, (1 + self.step) / (10 + self.step))
            now = [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_(self.average, now, 1 - decay)

    @torch.no_grad()
    def preview(self, size):
        """Draw sixteen prompts with the averaged weights."""
        live = [p.detach().clone() for p in self.model.parameters()]
        torch._foreach_copy_([p.detach() for p in self.model.parameters()], self.average)
        labels, colours = list(LABELS), list(BACKGROUNDS)
        prompts = [caption(labels[4 * i], colours[i % len(colours)]) for i in range(16)]
        latents = draw(self.model, lambda texts: tokenize(self.tokenizer, texts), prompts, size)
        config = self.vae.config
        images = self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        save_grid(images, self.args.out / f"preview-{size}-{self.step:05d}.png")
        torch._foreach_copy_([p.detach() for p in self.model.parameters()], live)

    def train_stage(self, size, steps, batch, peak_lr):
        latents, ids = self.latents(size), image_ids(size)
        saved = logged = time.time()
        while self.stage_step < steps:
            start, cpu_start = time.time(), time.process_time()
            self.train_step(latents, ids, size, steps, batch, peak_lr)
            now = time.time()
            self.seconds += now - start
            self.cpu_seconds += time.process_time() - cpu_start
            if self.step % 100 == 0:
                rate = 100 * batch / (now - logged)
                logged = now
                print(
                    f"{size} px step {self.stage_step}/{steps} (all: {self.step} steps, "
                    f"{self.samples} samples, {self.seconds / 60:.1f} min, "
                    f"{self.cpu_seconds / 60:.1f} CPU min) "
                    f"loss {self.mean_loss():.4f} {rate:.1f} samples/s",
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
        print(f"done: {self.step} steps, {self.samples} samples, {hours:.2f} CPU hours")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="file written by emoji_data.py")
    parser.add_argument("--vae", type=Path, required=True, help="folder written by train_vae.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run")
    parser.add_argument(
        "--stages", type=parse_stage, nargs="+", required=True, help="size:steps:batch:lr ..."
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--average", type=float, default=0.998, help="decay of averaged weights")
    parser.add_argument("--save-minutes", type=float, default=3, help="time between checkpoints")
    parser.add_argument("--preview-every", type=int, default=1000, help="steps between previews")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
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
