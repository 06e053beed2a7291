"""Wrong inputs on the command line: one line each, with the value that was wrong and a remedy."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dittfast.cli import main

ASK = 'generate "a red cat" -o {out}/a.png'
FIDELITY = "evaluate fidelity -m local -o {out}/eval"
LATENCY = "evaluate latency -m local"
HUNT = "hunt --objective colorfulness -o {out}/hunt"
BENCH = "bench attention -m local"
VIDEO = 'generate "a car moves right" --model sample-video'
PLAN = "plan --method local --height 4 --width 4"

# (the command, the value that its message shows, the remedy that it shows).
WRONG = [
    # The command itself.
    ("generat", "generat", "--help"),
    ("", "COMMAND", "--help"),
    ("--verison", "COMMAND", "--help"),
    ("--debug doctor", "--debug", "write it after dittfast doctor"),
    ("doctor ''", "unrecognized", "dittfast doctor --help lists the options"),
    # generate: what to draw, and where to.
    ("generate -o {out}/a.png", "prompt is missing", "dittfast generate"),
    ('generate " " -o {out}/a.png', "prompt is empty", "describe the picture"),
    ('generate "a cat"', "-o FILE is missing", "say where"),
    ('generate "a cat" -o {out}/a.txt', "'.txt'", ".png"),
    ('generate "a cat" -o {out}/a', "no ending", ".png"),
    ('generate "a cat" -o {out}/no/a.png', "{out}/no", "mkdir -p"),
    ('generate "a cat" -o {out}/folder.png', "folder.png", "name a file"),
    ('generate "a cat" -o {out}/text.txt/a.png', "text.txt", "is not a folder"),
    (ASK + " --json {out}/no/a.json", "{out}/no", "mkdir -p"),
    (ASK + " --heigth 64", "--heigth", "did you mean --height"),
    (ASK + " --methd local", "--methd", "did you mean --method"),
    (ASK + " --frobnicate", "--frobnicate", "dittfast generate --help lists the options"),
    (ASK + " extra words", "extra words", "--help"),
    # generate: sizes and counts.
    (ASK + " --height abc", "abc", "--help"),
    (ASK + " --height 1.5", "1.5", "--help"),
    (ASK + " --height", "--height", "expected one argument"),
    (ASK + " --height 0", "got 0", "at least 1"),
    (ASK + " --height -64", "got -64", "at least 1"),
    (ASK + " --width 0", "got 0", "at least 1"),
    (ASK + " --num-frames 0", "got 0", "at least 1"),
    (ASK + " --num-frames x", "'x'", "--help"),
    (ASK + " --steps 0", "got 0", "at least 1"),
    (ASK + " --steps -3", "got -3", "at least 1"),
    (ASK + " --steps 1000000000", "1,000,000,000", "at most 100,000"),
    (ASK + " --steps ten", "'ten'", "--help"),
    (ASK + " --max-sequence-length 0", "got 0", "at least 1"),
    (ASK + " --max-sequence-length 1000000000", "1,000,000,000", "512"),
    (ASK + " --height 1000000 --width 1000000", "1,000,000", "draw it smaller"),
    (ASK + " --height 16384 --width 16384 --num-frames 1000", "16,384", "draw it smaller"),
    (ASK + " --num-frames 1000000000 --height 512 --width 512", "1,000,000,000", "smaller"),
    (ASK + " --seed -1", "got -1", "0..9223372036854775807"),
    (ASK + " --seed 99999999999999999999", "99999999999999999999", "0..9223372036854775807"),
    (ASK + " --seed x", "'x'", "--help"),
    (ASK + " --runs 0", "got 0", "at least 1"),
    (ASK + " --runs 1000000", "1,000,000", "at most 10,000"),
    (ASK + " --fps 0", "got 0", "at least 1"),
    ('generate "a cat" -o {out}/a.gif --fps 60', "fps 60", "write an .mp4"),
    # generate: files that are one, or cannot be written.
    (ASK + " -o {out}/b.png", "{out}/b.png", "give it once"),
    (ASK + " --json {out}/a.png", "-o and --json", "a file of its own"),
    (ASK + " --json {out}/../{name}/a.png", "-o and --json", "a file of its own"),
    (ASK + " --json {out}/a.json", "the record beside -o and --json", "a file of its own"),
    (ASK + " --json {out}", "{out}", "name a file"),
    (ASK + " --json ''", "--json must not be empty", "leave it out"),
    (ASK + " --json /sys/a.json", "/sys/a.json", "name another"),
    ('generate "a cat" -o /proc/a.png', "/proc/a.png", "name another"),
    ('generate "a cat" -o {out}/{long}.png', "{long}.png", "name another"),
    ('generate "a cat" -o {out}/whole.png --image {out}/whole.png', "whole.png", "another file"),
    (ASK + " --config {out}/wan.yaml --json {out}/wan.yaml", "--config", "another file"),
    ('generate "a cat" -o {out}/a.mp4', "sample-flux draws one picture", "name it .png"),
    ('generate "a cat" -o {out}/a.gif', "sample-flux draws one picture", "name it .png"),
    (ASK + " --numbered", "--numbered", "leave out --numbered"),
    (VIDEO + " -o {out}/a.png", "sample-video draws a video", "--numbered"),
    (VIDEO + " -o {out}/a.mp4 --num-frames 1", "got 1", "nearest is 4"),
    (VIDEO + " -o {out}/a.mp4 --numbered", "a.mp4", "name it .png"),
    (VIDEO + " -o {out}/a.mp4 --stages 64,128", "--stages", "leave it out"),
    (ASK + " --fps 20", "20", "leave it out"),
    (ASK + " --save-all", "--save-all", "add --compare"),
    (ASK + " --backend cpu", "--backend cpu", "--method local"),
    (ASK + " --height 60", "got 60", "nearest is 56 or 64"),
    (ASK + " --num-frames 5", "num_frames", "leave out --num-frames"),
    (ASK + " --method local --method radial", "'radial'", "give it once"),
    (ASK + " --method ''", "--method must not be empty", "leave it out"),
    (ASK + " --method local --set dense_layers=[99]", "99", "0..5"),
    # generate: guidance.
    (ASK + " --guidance-scale -1", "'-1'", "at least 0"),
    (ASK + " --guide-heads 99.0", "layer 99", "0..5"),
    (ASK + " --guide-heads 1.99", "head 99", "0..1"),
    (ASK + " --guide-heads 1.1 --guide-scale nan", "nan", "finite"),
    (ASK + " --guide-heads 1.1 --guide-steps 5:5", "5:5", "A below B"),
    (ASK + " --guidance-scale nan", "nan", "finite"),
    (ASK + " --guidance-scale inf", "inf", "finite"),
    (ASK + " --guidance-scale x", "'x'", "--help"),
    (ASK + " --true-cfg-scale nan", "nan", "finite"),
    (ASK + " --guidance-scale-2 inf", "inf", "finite"),
    (ASK + " --guide {out}/no.json", "{out}/no.json", "heads.json"),
    (ASK + " --guide-heads x", "'x'", "3.1,5.0"),
    (ASK + " --guide-heads 3", "'3'", "3.1,5.0"),
    (ASK + " --guide-heads ,", "','", "3.1,5.0"),
    (ASK + " --guide-heads 1.1 --guide {out}/h.json", "--guide", "not allowed with"),
    (ASK + " --guide-scale 2", "no heads", "--guide-heads 3.1,5.0"),
    (ASK + " --guide-heads 1.1 --guide-steps 4", "'4'", "2:10"),
    (ASK + " --guide-heads 1.1 --guide-strength 2", "2", "0"),
    (ASK + " --guide-heads 1.1 --guide-rows text", "'text'", "image"),
    # generate: pictures to begin with.
    (ASK + " --image {out}/none.png", "{out}/none.png", "no picture at"),
    (ASK + " --image {out}/text.txt", "text.txt", "no picture that can be read"),
    (ASK + " --image {out}/half.png", "half.png", "no picture that can be read"),
    (ASK + " --image {out}/moving.gif", "moving.gif", "save the frame"),
    (ASK + " --image {out}/float.npy", "float64", "uint8"),
    # The model.
    (ASK + " --model sample-fluks", "'sample-fluks'", "sample-flux"),
    (ASK + " --model {out}", "{out}", "model_index.json"),
    (ASK + " --model {out}/text.txt", "text.txt", "name the folder"),
    (ASK + " --model {out}/broken", "model_index.json", "save the pipeline again"),
    (ASK + " --device gpu", "'gpu'", "cuda"),
    (ASK + " --device cuda:99", "cuda:99", "found cpu"),
    (ASK + " --dtype int8", "'int8'", "bfloat16"),
    (ASK + " --dtype float64", "'float64'", "float32"),
    (ASK + " --examples --model {flux}", "tiny-flux", "no list of prompts"),
    # The method.
    (ASK + " --method locl", "'locl'", "Did you mean 'local'"),
    (ASK + " --method local/fluks", "'local/fluks'", "Did you mean 'local/flux'"),
    (ASK + " --method radial/wan2.1", "FluxTransformer2DModel", "--any-model"),
    (ASK + " --method rectified/hunyuan", "HunyuanVideoTransformer3DModel", "--any-model"),
    (ASK + " --model {wan} --method local/sample-flux", "WanTransformer3DModel", "--any-model"),
    (ASK + " --method local --set windw=3", "'windw'", "Did you mean 'window'"),
    (ASK + " --method local --set window=-1", "-1", "above 0"),
    (ASK + " --method local --set window=abc", "abc", "window"),
    (ASK + " --method local --set window", "'window'", "window=8"),
    (ASK + " --method local --set =3", "'=3'", "window=8"),
    (ASK + " --method local --set window=3 --set window=4", "window", "twice"),
    (ASK + " --method local --set window=[", "window", "YAML"),
    (ASK + " --method local --set min_tokens=-1", "-1", "at least 0"),
    (ASK + " --method local --set dense_first_steps=x", "'x'", "at least 0"),
    (ASK + " --method log_linear --set block_size=0", "0", "block_size"),
    (ASK + " --method log_linear --set topk=0", "0", "topk"),
    (ASK + " --method radial --set decay_factor=-1", "-1", "decay_factor"),
    (ASK + " --method local --backend tritn", "'tritn'", "Did you mean 'triton'"),
    (ASK + " --set window=3", "--set", "--method local"),
    (ASK + " --compare", "--compare", "--method local"),
    (ASK + " --config {out}/no.yaml", "{out}/no.yaml", "no config file"),
    (ASK + " --config {out}/text.txt", "text.txt", ".yaml"),
    (ASK + " --config {out}/list.yaml", "list.yaml", "method"),
    (ASK + " --config {out}/typo.yaml", "'optons'", "'options'"),
    (ASK + " --config {out}/wan.yaml", "WanTransformer3DModel", "--any-model"),
    (ASK + " --method local --config {out}/typo.yaml", "--config", "not allowed with"),
    # Large pictures.
    (ASK + " --strength 0.5", "--strength", "--stages"),
    (ASK + " --ntk-factor 2", "--ntk-factor", "--stages"),
    (ASK + " --stages 256,abc", "'abc'", "256,512"),
    (ASK + " --stages 256,512 --height 64", "--height", "--stages"),
    (ASK + " --position-until 0.5", "0.5", "--position-scale"),
    (ASK + " --position-scale wide", "'wide'", "--help"),
    (ASK + " --position-scale 0", "'0'", "above 0"),
    (ASK + " --position-scale nan", "'nan'", "finite"),
    (ASK + " --position-scale 0.5 --position-until 1", "'1'", "below 1"),
    (ASK + " --stages 256", "256", "at least two"),
    (ASK + " --stages 512,256", "256 x 256 follows 512 x 512", "larger"),
    (ASK + " --stages 256,256", "256 x 256 follows 256 x 256", "larger"),
    (ASK + " --stages 256x256,512x1024", "512 x 1024", "keep the picture's shape"),
    (ASK + " --stages 256,1000000", "1,000,000", "draw it smaller"),
    (ASK + " --stages 256,500", "got 500", "nearest is"),
    (ASK + " --stages 256,512 --strength 0", "'0'", "above 0"),
    (ASK + " --stages 256,512 --strength 3", "'3'", "at most 1"),
    (ASK + " --stages 256,512 --strength nan", "nan", "finite"),
    (ASK + " --stages 256,512 --ntk-factor 0", "'0'", "above 0"),
    # What is put into the pipeline.
    (ASK + " --lora {out}/lora.safetensors --lora {out}/lora.safetensors", "lora", "give it once"),
    (ASK + " --adapter {out}/none", "{out}/none", "folder"),
    (ASK + " --adapter {out}", "{out}", "no adapter"),
    (ASK + " --adapter {out} --method local", "--method", "--set"),
    (ASK + " --adapter {out} --quantize int8", "--quantize", "leave out"),
    (ASK + " --lora {out}/none.safetensors", "{out}/none.safetensors", "FILE:SCALE"),
    (ASK + " --lora {out}/text.txt", "text.txt", ".safetensors only"),
    (ASK + " --lora {out}/bad.safetensors", "bad.safetensors", "safetensors file"),
    (ASK + " --lora {out}/plain.safetensors", "plain.safetensors", "holds no LoRA"),
    (ASK + " --lora {out}/lora.safetensors:1e9", "1000000000.0", "between -100 and 100"),
    (ASK + " --lora {out}/lora.safetensors:nan", "nan", "between -100 and 100"),
    (ASK + " --lora-2 {out}/lora.safetensors", "transformer_2", "leave out --lora-2"),
    (ASK + " --offload disk", "'disk'", "model"),
    (ASK + " --offload model --device cpu", "--offload model", "leave it out"),
    (ASK + " --offload sequential --device cpu", "sequential", "leave it out"),
    (ASK + " --quantize int7", "'int7'", "Did you mean 'int8'"),
    (ASK + " --quantize int8:x", "'int8:x'", "takes no file"),
    (ASK + " --attention-backend flsh", "'flsh'", "Did you mean 'flash'"),
    # evaluate.
    ("evaluate", "TASK", "--help"),
    ("evaluate fidelty", "fidelty", "fidelity"),
    ("evaluate fidelity -m local", "-o", "--help"),
    ("evaluate fidelity -o {out}/eval", "no method", "--method local"),
    (FIDELITY + " -m local", "'local'", "give it once"),
    (FIDELITY + " -m local=radial", "'local'", "LABEL=NAME"),
    (FIDELITY + " -m dense=local", "'dense'", "belongs to"),
    (FIDELITY + " -m a/b=local", "'a/b'", "letters"),
    (FIDELITY + " -m far=locl", "'locl'", "Did you mean 'local'"),
    (FIDELITY + " -m radial/wan2.1", "FluxTransformer2DModel", "--any-model"),
    (FIDELITY + " --pair local", "local", "A:B"),
    (FIDELITY + " --pair local:far", "'far'", "labels: local"),
    (FIDELITY + " --pair local:local", "local:local", "two different labels"),
    (FIDELITY + " -m r=radial --pair local:r --pair r:local", "r:local", "each pair once"),
    (FIDELITY + " --json {out}/eval/fidelity.json", "fidelity.json", "a file of its own"),
    (FIDELITY + " --save {out}/eval/fidelity", "fidelity.json", "a file of its own"),
    (FIDELITY + " --prompts {out}/one.txt --json {out}/one.txt", "one.txt", "another file"),
    (FIDELITY + " -m far=local --set far.dense_layers=[99]", "99", "0..5"),
    (FIDELITY + " --set far.window=3", "'far'", "labels: local"),
    (FIDELITY + " --prompts {out}/none.txt", "{out}/none.txt", "one prompt per line"),
    (FIDELITY + " --prompts {out}/empty.txt", "empty.txt", "one per line"),
    (FIDELITY + " --prompts {out}/bad.json", "bad.json", "JSON"),
    (FIDELITY + " --prompts {out}/latin.txt", "latin.txt", "UTF-8"),
    (FIDELITY + " -n 0", "got 0", "at least 1"),
    (FIDELITY + " -n 1000000000", "1,000,000,000", "at most"),
    (FIDELITY + " --config {out}/no.yaml", "{out}/no.yaml", "no config file"),
    (FIDELITY + " --model {flux}", "tiny-flux", "--prompts FILE"),
    (FIDELITY + " --height 1000000 --width 1000000", "1,000,000", "draw it smaller"),
    (FIDELITY + " --offload sequential", "sequential", "group"),
    (FIDELITY + " --seed -1", "got -1", "0.."),
    ("evaluate fidelity -m local -o {out}/text.txt", "text.txt", "name a folder"),
    (FIDELITY + " --adapter {out}/none", "{out}/none", "no adapter"),
    ("evaluate latency", "no method", "--method local"),
    (LATENCY + " --pear 3", "--pear", "dittfast evaluate latency --help lists the options"),
    ("evaluate --no-verify latency", "--no-verify", "write it after dittfast evaluate latency"),
    (LATENCY + " --pairs 0", "got 0", "1..10000"),
    (LATENCY + " --pairs x", "'x'", "--help"),
    (LATENCY + " --pairs 1000000000", "1000000000", "1..10000"),
    (LATENCY + " --dense-kernel fast", "'fast'", "flash"),
    (LATENCY + " --model {flux}", "tiny-flux", "--prompt TEXT"),
    (LATENCY + " --save {out}/no/table", "{out}/no", "mkdir -p"),
    ("evaluate fid {out}", "--against", "--dataset"),
    ("evaluate fid {out}/none --against {out} --features sample", "{out}/none", "name one"),
    ("evaluate fid {out}/empty --against {out} --features sample", "{out}/empty", "png"),
    ("evaluate fid {out}/few --against {out}/few --features sample", "has 2 pictures", "Draw 63"),
    ("evaluate fid {out}/mixed --against {out}/few --features sample", "mixes", "--mixed-sizes"),
    ("evaluate fid {out}/float --against {out}/few --features sample", "float64", "remove or"),
    ("evaluate fid {out}/few --against {out}/few --features none", "none", "train_features.py"),
    ("evaluate fid {out}/few --dataset coco", "'coco'", "NAME:SPLIT:RESOLUTION"),
    ("evaluate fid {out}/few --against {out}/few --features sample --batch-size 0 --allow-few",
     "got 0", "at least 1"),
    ("evaluate fid {out}/few {out}/few --against {out}/few", "{out}/few twice", "each once"),
    ("report {out}/none --pictures 0", "got 0", "1..10000"),
    ("report {out}/none --size -1", "got -1", "1..4096"),
    ("report {out}/none", "{out}/none", "evaluate fidelity"),
    ("report {out}", "{out}", "evaluate fidelity"),
    # hunt.
    ("hunt --objective colorfulness", "-o FOLDER is missing", "say where"),
    ("hunt -o {out}/hunt", "--objective is missing", "colorfulness"),
    ("hunt --objective colourfullness -o {out}/hunt", "colourfullness", "colorfulness"),
    (HUNT + " --layers a", "'a'", "0-3"),
    (HUNT + " --heads 3", "'3'", "3.1,5.0"),
    (HUNT + " --heads 1.1 --layers 1", "--layers", "not allowed with"),
    (HUNT + " --seeds x", "'x'", "0,1"),
    (HUNT + " --seeds 1,1", "1 twice", "name each once"),
    (HUNT + " --seeds ,", "','", "0,1"),
    (HUNT + " --seeds 3-1", "'3-1'", "0-3"),
    (HUNT + " --holdout-seeds 2 --prompts {out}/one.txt", "--holdout-seeds", "--holdout FILE"),
    (HUNT + " --topk 0", "got 0", "at least 1"),
    (HUNT + " --topk 13", "13", "12 heads"),
    (HUNT + " --rounds 0", "got 0", "at least 1"),
    (HUNT + " --rounds -1", "got -1", "at least 1"),
    (HUNT + " --batch-size 0", "got 0", "at least 1"),
    (HUNT + " --screen 0 --keep 1", "got 0", "at least 1"),
    (HUNT + " --screen 1 --keep 0", "got 0", "at least 1"),
    (HUNT + " --screen 1", "screen=1", "keep"),
    (HUNT + " --topk 3 --screen 2 --keep 2", "got 2", "at least topk"),
    (HUNT + " --layers 9", "layer 9", "0..5"),
    (HUNT + " --layers 1,1", "1 twice", "name each once"),
    (HUNT + " --heads 9.0", "head 9.0", "0..5"),
    (HUNT + " --heads 1.1,1.1", "named twice", "name"),
    (HUNT + " --guide-rows text", "'text'", "image"),
    ("hunt --objective colorfulness -o /proc/hunt", "/proc/hunt", "name another"),
    (HUNT + " --prompts {out}/none.txt", "{out}/none.txt", "prompts"),
    (HUNT + " --prompts {out}/empty.txt", "empty.txt", "one per line"),
    (HUNT + " --model {flux}", "tiny-flux", "--prompts FILE"),
    (HUNT + " --adapter {out}/none", "{out}/none", "folder"),
    (HUNT + " --steps 0", "got 0", "at least 1"),
    ("hunt --objective colorfulness -o {out}/text.txt", "text.txt", "folder"),
    # The rest.
    ("estimate wan3", "'wan3'", "wan2.1-14b"),
    ("estimate flux.1-dev --method radial/wan2.1", "FluxTransformer2DModel", "--any-model"),
    ("estimate wan2.1-14b --set window=3", "--set", "--method radial"),
    ("estimate flux.1-dev --text -3", "got -3", "at least 1"),
    ("methods locl", "'locl'", "Did you mean 'local'"),
    ("plan --method local --width 4", "--height is missing", "in tokens"),
    ("plan --height 4 --width 4", "method is missing", "--method radial"),
    (PLAN + " --heads 0", "got 0", "at least 1"),
    ("plan --method rectified --height 4 --width 4", "rectified", "dittfast probe"),
    ("probe", "method is missing", "--method rectified"),
    ("probe --method local --steps 0", "got 0", "at least 1"),
    ("probe --method local --seed -5", "got -5", "0.."),
    ("probe --method local --prompt ''", "prompt is empty", "describe the picture"),
    ("probe --method radial/hunyuan", "FluxTransformer2DModel", "--any-model"),
    ("probe --method rectified --layers a", "'a'", "0,3"),
    ("probe --method rectified --layers 6", "got 6", "0..5"),
    ("probe --method rectified --layers 0,0", "0 twice", "name each once"),
    ("probe --method rectified --steps 4 --step 4", "got 4", "0..3"),
    ("probe --method rectified -o {out}/k.png --json {out}/k.png", "k.png", "a file of its own"),
    (PLAN + " -o {out}/k.png --json {out}/k.png", "k.png", "a file of its own"),
    (PLAN + " --frames 0", "got 0", "at least 1"),
    (PLAN + " --text -1", "got -1", "at least 0"),
    ("plan -m local --height 100000 --width 100000", "10,000,000,000 tokens", "the limit here"),
    ("estimate flux.1-dev --height 1600000 --width 1600000", "10,000,000,512", "the limit here"),
    (BENCH + " --tokens 1000000000000", "1,000,000,000,000 tokens", "the limit here"),
    (BENCH + " --height 100000 --width 100000", "10,000,000,000 tokens", "the limit here"),
    (BENCH, "give the size", "--tokens"),
    (BENCH + " --tokens 64 --repeats 0", "got 0", "1..100000"),
    (BENCH + " --tokens 64 --device gpu", "'gpu'", "cuda"),
    (BENCH + " --tokens 64 --backend tritn", "'tritn'", "Did you mean 'triton'"),
    (BENCH + " --tokens 64 --method local", "'local'", "give it once"),
    (BENCH + " --tokens 64 --table --backward", "--backward", "leave out"),
    ("bench break-even -m dense", "--method dense", "--method local"),
    ("bench break-even -m local --tokens 64 64", "64 twice", "name each once"),
    ("bench growth -m local --tokens 0", "got 0", "at least 1"),
    ("bench growth -m local --plot {out}/g.png --json {out}/g.png", "g.png", "a file of its own"),
    ("bench overhead --model sd", "'sd'", "flux, wan"),
    ("bench overhead --layers 0", "got 0", "at least 1"),
    ("parity --family wam", "'wam'", "Did you mean 'wan'"),
    ("parity --markdown {out}/m.md --json {out}/m.md", "m.md", "a file of its own"),
    ("ui --port 70000", "got 70000", "0..65535"),
    ("distill", "configuration is missing", "--list"),
    ("distill {out}/none.yaml", "{out}/none.yaml", "yaml"),
    ("distill clear_sample --json {out}/a.json", "a.json", "--dry-run"),
    ("distill clear_sample --dry-run --resume latest", "latest", "leave out"),
    ("distill prepare clear_sample --resume latest", "latest", "leave out"),
    ("distill clear_sample --list", "clear_sample", "leave out"),
    ("distill clear_sample train.lr=1 train.lr=2", "train.lr", "twice"),
]  # fmt: skip


def words(line: str) -> list[str]:
    import shlex

    return shlex.split(line)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with files that are wrong in some way, and two folders of models without weights."""
    from safetensors.torch import save_file

    out = tmp_path_factory.mktemp("wrong")
    for name in ("folder.png", "empty", "few", "mixed", "float", "broken", "tiny-flux", "tiny-wan"):
        (out / name).mkdir()
    (out / "text.txt").write_text("words")
    (out / "empty.txt").write_text("# nothing\n")
    (out / "latin.txt").write_bytes(b"caf\xe9")
    (out / "bad.json").write_text("{")
    (out / "bad.safetensors").write_bytes(b"\x00" * 9)
    (out / "list.yaml").write_text("[1, 2]")
    (out / "typo.yaml").write_text("method: local\noptons: {window: 3}\n")
    (out / "wan.yaml").write_text("method: local\ntransformers: [WanTransformer3DModel]\n")
    save_file({"weight": torch.zeros(2)}, out / "plain.safetensors")
    save_file({"x.lora_A.weight": torch.zeros(2)}, out / "lora.safetensors")
    Image.new("RGB", (8, 8)).save(out / "whole.png")
    (out / "half.png").write_bytes((out / "whole.png").read_bytes()[:40])
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 200)]
    frames[0].save(out / "moving.gif", save_all=True, append_images=frames[1:])
    np.save(out / "float.npy", np.zeros((8, 8, 3)))
    np.save(out / "float" / "a.npy", np.zeros((8, 8, 3)))
    for number, size in enumerate((8, 8, 9)):
        folders = ("mixed",) if size == 9 else ("mixed", "few")
        for folder in folders:
            Image.new("RGB", (size, size)).save(out / folder / f"{number}.png")
    (out / "broken" / "model_index.json").write_text("{")
    for name, model in (
        ("tiny-flux", "FluxTransformer2DModel"),
        ("tiny-wan", "WanTransformer3DModel"),
    ):
        index = {"_class_name": "Pipeline", "transformer": ["diffusers", model]}
        (out / name / "model_index.json").write_text(json.dumps(index))
    (out / "one.txt").write_text("a cat")
    more = {"name": out.name, "long": "a" * 300}
    return more | {"out": str(out), "flux": str(out / "tiny-flux"), "wan": str(out / "tiny-wan")}


def test_there_are_enough_of_them():
    assert len({command for command, _, _ in WRONG}) == len(WRONG) >= 150


@pytest.mark.parametrize("command, value, remedy", WRONG, ids=[w[0][-60:] or "-" for w in WRONG])
def test_it_is_said_in_a_line(command, value, remedy, places, capsys, monkeypatch):
    from dittfast.pipelines.runs import sources

    monkeypatch.setattr(sources, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    fill = lambda text: text.format(**places) if "{" in text else text  # noqa: E731
    code = main([fill(word) for word in words(command)])
    out = capsys.readouterr()
    errors = [line for line in out.err.splitlines() if line.startswith("dittfast: error: ")]
    assert code == 2 and len(errors) == 1, out.err
    assert "Traceback" not in out.err
    assert fill(value) in errors[0] and fill(remedy) in errors[0], errors[0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger than"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_ends_in_a_remedy(error, places, capsys, monkeypatch):
    from dittfast.cli import generate

    def fails(args):
        raise error

    monkeypatch.setattr(generate, "run", fails)
    assert main(words('generate "a cat" -o a.png')) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dittfast: error: out of memory on ") and "--offload" in line
    if isinstance(error, torch.OutOfMemoryError):
        assert "20.00 GiB" in line and "the device" in line


def test_other_faults_keep_their_traceback(monkeypatch):
    from dittfast.cli import generate

    def fails(args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(generate, "run", fails)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(words('generate "a cat" -o a.png'))
