"""How a run was launched: one process, DDP or FSDP, through accelerate."""

from __future__ import annotations

import importlib.util
import os

import torch

from .config import DistillConfig

_TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def make_accelerator(config: DistillConfig):
    """accelerate's Accelerator for a run, as this process was launched.

    Raises:
        ValueError: a tracker that is not installed, fp16 on a CPU, or a launch that training does
            not know.
    """
    from accelerate import Accelerator

    for tracker in config.train.trackers:
        package = _TRACKER_PACKAGES[tracker]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"train.trackers names {tracker}, which is not installed: pip install {package}; "
                "or leave it out, metrics.jsonl is always written"
            )
    if config.train.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError(
            "train.mixed_precision=fp16 needs a GPU: on a CPU accelerate would train in float32; "
            "use bf16 or no"
        )
    accelerator = Accelerator(
        # Without this accelerate leaves processes on a CPU alone with themselves.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.accumulation,
        log_with=list(config.train.trackers) or None,
        project_dir=config.train.output,
    )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise ValueError(
            f"accelerate is set up for {kind}; training runs in one process, with DDP or with FSDP "
            "2: launch it with configs/accelerate/ddp.yaml or fsdp.yaml"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}; "
            "each would train on its own. Launch with accelerate launch, or torchrun"
        )
    return accelerator


def wants_shards(accelerator, config: DistillConfig) -> bool:
    """Whether accelerate was launched for FSDP. On CPUs it takes no notice of that, we do.

    Raises:
        ValueError: another kind of FSDP, or a configuration that does not run with it.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    kind = accelerator.distributed_type.value
    if kind != "FSDP" and not (kind == "MULTI_CPU" and parse_flag_from_env("ACCELERATE_USE_FSDP")):
        return False
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"accelerate is set up for FSDP {plugin.fsdp_version}; training runs with FSDP 2. Set "
            "fsdp_version: 2, as configs/accelerate/fsdp.yaml does"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError(
            "FSDP's offload to the CPU is not supported; set fsdp_offload_params: false"
        )
    train = config.train
    if train.optimizer != "adamw":
        raise ValueError(
            f"train.optimizer={train.optimizer} looks at all parameters at once and cannot see "
            "their shards; use adamw with FSDP, or launch with DDP"
        )
    if train.mixed_precision == "fp16":
        raise ValueError("train.mixed_precision=fp16 does not run with FSDP; use bf16")
    return True
