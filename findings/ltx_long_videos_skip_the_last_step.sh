#!/usr/bin/env bash
# LTXI2VLongMultiPromptPipeline runs one step fewer than asked for
#
# Versions: diffusers 0.42.1, transformers 5.23.0, torch 2.14.1; seen on 2026-11-29
#
# num_inference_steps=8 is documented as the denoising steps of each window. The transformer is
# called seven times, at times 1000 to 143.7; the scheduler has gone seven of its eight steps when
# the latents are returned. The loop runs over timesteps[:-1], which is right only for a list of
# sigmas that the caller ends with zero. With one step nothing is denoised at all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from diffusers import (
    AutoencoderKLLTXVideo, LTXEulerAncestralRFScheduler, LTXI2VLongMultiPromptPipeline, LTXVideoTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

torch.manual_seed(0)
words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "cat": 2}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
eight = (8, 8, 8, 8)
pipe = LTXI2VLongMultiPromptPipeline(
    scheduler=LTXEulerAncestralRFScheduler(),
    vae=AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=eight, decoder_block_out_channels=eight,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    ),
    text_encoder=T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=16)).eval(),
    tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"),
    transformer=LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=16,
    ),
)
pipe.set_progress_bar_config(disable=True)
times = []
pipe.transformer.register_forward_pre_hook(
    lambda model, args, kwargs: times.append(kwargs["timestep"].flatten()[0].item()), with_kwargs=True
)


def run(steps):
    times.clear()
    pipe(
        prompt="cat", height=64, width=64, num_frames=9, num_inference_steps=steps, output_type="latent",
        max_sequence_length=4,
    )
    return len(times)


passes = run(8)
print(f"8 steps: {passes} passes, times {[round(time, 1) for time in times]}, scheduler at step {pipe.scheduler.step_index}")
assert passes == 7 and pipe.scheduler.step_index == 7
assert run(1) == 0
PYTHON
