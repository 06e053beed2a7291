"""Reads a prepared set: a fixed order from the seed, batches ahead of time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dittfast.disk.problems import FileProblem, reading
from dittfast.disk.records import digest_of, read_record
from dittfast.disk.tensors import read_headers, read_tensors

from .conditioning import unflatten
from .noise import NoiseProcess, generator
from .prepare import (
    AGAIN,
    MANIFEST,
    NEGATIVE,
    SHARD_FORM,
    read_manifest,
    read_process,
    record_name,
    shard_name,
)

# What a first frame gives; a sample keeps it when its prompt is dropped.
_OF_THE_PICTURE = ("hidden_states", "encoder_hidden_states_image")


@dataclass
class Batch:
    """Samples of one shape.

    Attributes:
        latents: ``[B, ...]`` fp32, clean.
        arguments: the transformer's other forward arguments; ``hidden_states`` among them is what
            is appended to the noisy latents' channels.
    """

    latents: torch.Tensor
    arguments: dict

    def to(self, device) -> Batch:
        return Batch(self.latents.to(device), _to(self.arguments, device))


def _to(value, device):
    if torch.is_tensor(value):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _to(x, device) for name, x in value.items()}
    return tuple(_to(x, device) for x in value) if isinstance(value, tuple) else value


class Dataset:
    """A folder that ``dittfast distill prepare`` wrote.

    Each file is compared with its SHA-256 when it is read first.

    Args:
        verify: False leaves that out.

    Raises:
        FileNotFoundError: no set there.
        ValueError: shards are missing or damaged, or another version wrote them.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self._verify = verify
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no training set in {self.folder}; make it first: "
                "dittfast distill prepare CONFIG.yaml"
            )
        self.manifest = read_manifest(path, verify)
        self.shard_size = self.manifest["shard_size"]
        shards = -(-len(self) // self.shard_size)
        self._names = [NEGATIVE, *(shard_name(i) for i in range(shards))]
        needed = list(self._names)
        if self.manifest.get("records"):
            needed += map(record_name, self._names)
        missing = [name for name in needed if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(needed)} files of the set in {self.folder} are missing "
                f"({missing[0]} is the first); run dittfast distill prepare again, it goes on "
                "where it stopped"
            )
        self._records = {
            name: read_record(
                self.folder / record_name(name), SHARD_FORM, verify=verify, remedy=AGAIN
            )
            for name in self._names
            if (self.folder / record_name(name)).is_file()
        }
        self._good: set[str] = set()
        self._shared: dict[str, torch.Tensor] | None = None
        self.shapes = [shape for i in range(shards) for shape in self._shapes(i)]

    def __len__(self) -> int:
        return len(self.manifest["prompts"])

    @property
    def process(self) -> NoiseProcess:
        return read_process(self.manifest)

    @property
    def identity(self) -> str:
        """A digest of what the set is: its prompts, seeds, sizes, model."""
        return digest_of({k: v for k, v in self.manifest.items() if k != "records"})

    @property
    def contents(self) -> str | None:
        """A digest of all samples; None of sets of earlier versions, which do not know it."""
        if len(self._records) < len(self._names):
            return None
        return digest_of({name: record.sums.get(name) for name, record in self._records.items()})

    def _path(self, name: str) -> Path:
        """A file of the set, compared with its digest before it is read first."""
        if name not in self._good and name in self._records:
            self._records[name].check(name, AGAIN)
        self._good.add(name)
        return self.folder / name

    def _shapes(self, shard: int) -> list[tuple]:
        """What must agree in a batch, for each sample of a shard."""
        path = self.folder / shard_name(shard)
        headers = read_headers(path, AGAIN)
        samples: dict[int, list] = defaultdict(list)
        with reading(path, "it is no shard of this set", AGAIN):
            for key in sorted(headers):
                index, _, name = key.partition("/")
                if index != "shared":
                    samples[int(index)].append((name, *headers[key].shape))
            count = min(self.shard_size, len(self) - shard * self.shard_size)
            if sorted(samples) != list(range(count)):
                raise ValueError(f"it holds {len(samples)} samples, not {count}")
            if not all(f"{i}/latents" in headers for i in range(count)):
                raise ValueError("a sample in it has no latents")
        return [tuple(samples[i]) for i in sorted(samples)]

    def _tensors(self, name: str, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors of a file whose names begin with ``prefix``, without it."""
        path = self._path(name)
        names = [key for key in read_headers(path, AGAIN) if key.startswith(prefix)]
        if not names:
            return {}
        return {k[len(prefix) :]: x for k, x in read_tensors(path, names, AGAIN).items()}

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one sample; ``latents`` among them."""
        shard, place = divmod(index, self.shard_size)
        return self._tensors(shard_name(shard), f"{place}/")

    def negative(self) -> dict[str, torch.Tensor]:
        """The tensors of the negative prompt."""
        return self._tensors(NEGATIVE, "0/")

    def shared(self) -> dict[str, torch.Tensor]:
        """Tensors that belong to every sample; the same objects at every call."""
        if self._shared is None:
            self._shared = self._tensors(shard_name(0), "shared/")
        return self._shared

    def batch(self, indices: list[int], without_prompt: list[bool] | None = None) -> Batch:
        """Samples of one shape, in this order; where asked, with the negative prompt for theirs.

        Raises:
            ValueError: the negative prompt's tensors have other shapes.
        """
        samples = [self.sample(i) for i in indices]
        latents = torch.cat([s.pop("latents").float() for s in samples])
        if without_prompt and any(without_prompt):
            negative = self.negative()
            for at, dropped in enumerate(without_prompt):
                if not dropped:
                    continue
                kept = {name: x for name, x in samples[at].items() if name in _OF_THE_PICTURE}
                for name, x in samples[at].items():
                    if name not in negative:
                        path = self.folder / NEGATIVE
                        raise FileProblem(path, f"it has no {name}", AGAIN)
                    if negative[name].shape != x.shape:
                        raise ValueError(
                            f"{name} of the negative prompt is {list(negative[name].shape)}, of a "
                            f"sample {list(x.shape)}; train.drop_prompt must be 0 for this set"
                        )
                samples[at] = {**negative, **kept}
        own = {name: torch.cat([s[name] for s in samples]) for name in samples[0]}
        constants = self.manifest["constants"]
        return Batch(latents, unflatten({**constants, **self.shared(), **own}))


def global_batches(shapes: list, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of ``size`` samples of one shape, the whole set in a new order each epoch.

    What does not fill a batch at the end of an epoch opens the next one, so every sample is seen
    equally often.
    """
    waiting: dict[object, list[int]] = defaultdict(list)
    epoch = 0
    while True:
        order = torch.randperm(len(shapes), generator=generator("order", seed, epoch)).tolist()
        for index in order:
            bucket = waiting[shapes[index]]
            bucket.append(index)
            if len(bucket) == size:
                yield list(bucket)
                bucket.clear()
        epoch += 1


def mixed_batches(
    sets: list[list], shares: list[float], size: int, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Endless batches from several sets: which set, and the samples as :func:`global_batches`.

    Args:
        sets: the shapes of each set's samples.
        shares: how often a batch comes from each set, in any unit.
    """
    orders = [global_batches(shapes, size, seed) for shapes in sets]
    turn = [0.0] * len(sets)
    while True:
        # The set that is furthest behind its share; of equals the first.
        chosen = min(range(len(sets)), key=lambda i: (turn[i] + 1) / shares[i])
        turn[chosen] += 1
        yield chosen, next(orders[chosen])


class Prefetch:
    """Results of ``make(i)`` for i = first, first + 1, ...; the next one is made in a thread."""

    def __init__(self, make, first: int):
        self._make = make
        self._next = first
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dittfast-data")
        self._future = self._pool.submit(make, first)

    def __next__(self):
        result = self._future.result()
        self._next += 1
        self._future = self._pool.submit(self._make, self._next)
        return result

    def close(self) -> None:
        self._future.cancel()
        self._pool.shutdown()
