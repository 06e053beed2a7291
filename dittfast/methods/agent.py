"""Agent attention: a few pooled queries between queries and keys (Han et al., arXiv:2312.08874)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from ..layout import Grid, Layout
from ..plan import Plan
from .base import Call, Method
from .checks import check_flag, check_integer, check_positive, is_number
from .dynamic import match_heads, wide_dtype
from .linear import key_weights

AXES = ("frames", "rows", "columns")
# Published: biases have so many places along an axis, and are interpolated to the grid.
PLACES = 7
# Biases along frames, rows and columns, and over the plane of rows and columns.
_BIASES = 3 * PLACES + PLACES**2
_PARAMETERS = ("gather_bias", "spread_bias", "kernel")
# Kernels take head dims that are multiples of this.
_CHANNELS = 16


class _Segment(NamedTuple):
    """One segment of the layout: its tokens, and its agents.

    Attributes:
        tokens, agents: where they stand in the sequence, and among all agents.
        shape: frames, rows and columns of a grid; None of context.
        pools: of a grid for each axis ``[agents, tokens]`` fp64, means over windows.
        bases: of a grid for each axis ``[tokens, PLACES]`` fp64, how biases are interpolated.
        place: of a grid ``[agents]`` int64, which of the parameters' agents each is.
    """

    tokens: slice
    agents: slice
    shape: tuple[int, int, int] | None
    pools: tuple[torch.Tensor, ...] = ()
    bases: tuple[torch.Tensor, ...] = ()
    place: torch.Tensor | None = None


class _Geometry(NamedTuple):
    segments: tuple[_Segment, ...]
    gather: Plan  # agents see all keys
    spread: Plan  # queries see all agents


@dataclass(frozen=True)
class Agent(Method):
    """Attention by way of agents: a few queries gather from all keys, and all queries from them.

    With agents A, the means of the queries in windows of the grid, time and memory grow with the
    number of tokens and not with its square::

        V_A = softmax(scale · A kᵀ + B₁) v          out = softmax(scale^sharpness · q Aᵀ + B₂) V_A
                                                          + w ∗ v

    Windows are those of adaptive average pooling: of n tokens, agent i of g has those from
    ⌊i n / g⌋ up to ⌈(i + 1) n / g⌉. Text takes part as it does in joint attention: it is gathered
    from, its queries see the agents, and it has agents of its own, over equal shares of its valid
    tokens. A hidden key (padding, a mask) is in no window and is not gathered from.

    Without training B₁ and B₂ are none and ``w ∗ v`` is ``shortcut · v``, as in the authors'
    AgentSD. ``trained`` adds parameters, from which training begins at just that: for each head
    and agent biases at 7 places along frames, rows and columns each and 7 x 7 over the plane,
    interpolated linearly to the grid; and a depthwise 3 x 3 convolution of v in each frame, of
    which text has the centre. The paper's trained form has ``sharpness=1`` and ``shortcut=0``.

    Source: Agent Attention, arXiv:2312.08874, and AgentSD. It leaves to us: text, which it does
    not have; grids with frames, whose agents and biases get an axis more; agents of one grid
    among several, which have biases for the tokens of their own.

    Args:
        agents: at least 1: along frames, rows and columns, and no more than the grid has there;
            one number is for each axis, a shorter tuple for the last ones, where the others have 1.
        text_agents: of each run of text tokens, at least 0.
        sharpness: above 0: the power of the softmax scale between queries and agents. Less than 1
            is sharper; AgentSD has 0.3.
        shortcut: at least 0: what is added of v; AgentSD has 0.075.
        trained: whether there are biases and a convolution.

    Raises:
        ValueError: an option out of range; a layout without a grid.
    """

    name: ClassVar[str] = "agent"

    agents: int | tuple[int, ...] = (4, 16, 16)
    text_agents: int = 16
    sharpness: float = 0.3
    shortcut: float = 0.075
    trained: bool = False

    def __post_init__(self):
        if isinstance(self.agents, (tuple, list)):
            object.__setattr__(self, "agents", tuple(self.agents))
            if not 1 <= len(self.agents) <= 3:
                raise ValueError(
                    f"agents must have 1 to 3 entries, the last of ({', '.join(AXES)}); "
                    f"got {self.agents!r}"
                )
        for axis, count in zip(AXES, self._per_axis):
            check_integer(f"agents along {axis}", count, 1)
        check_integer("text_agents", self.text_agents, 0)
        check_positive("sharpness", self.sharpness, "1 is the scale between agents and keys")
        if not is_number(self.shortcut) or not 0 <= self.shortcut < math.inf:
            raise ValueError(
                f"shortcut must be a finite number, at least 0 (0 adds none); got {self.shortcut!r}"
            )
        check_flag("trained", self.trained)

    @property
    def _per_axis(self) -> tuple[int, ...]:
        """Agents along frames, rows and columns, of a grid that is large enough."""
        if isinstance(self.agents, tuple):
            return (1,) * (3 - len(self.agents)) + self.agents
        return (self.agents,) * 3

    @property
    def needs_training(self) -> bool:
        return self.trained

    def parameters(self, heads: int | None, head_dim: int | None) -> dict[str, torch.Tensor]:
        """Biases ``[H, agents, 70]``, zero at the start, and the kernel ``[H, D, 3, 3]``; fp32.

        ``gather_bias`` is B₁ and ``spread_bias`` B₂: of the 70, 7 are places along the frames, 7
        along the rows, 7 along the columns, and the rest rows by columns. The kernel starts as
        ``shortcut`` in its centre.
        """
        if not self.trained:
            return {}
        why = "the layers do not tell their heads, which biases depend on; trained=False has none"
        check_integer("heads", heads, 1, remedy=why)
        check_integer("head_dim", head_dim, 1, remedy=why)
        bias = torch.zeros(heads, math.prod(self._per_axis), _BIASES)
        kernel = torch.zeros(heads, head_dim, 3, 3)
        kernel[:, :, 1, 1] = self.shortcut
        return dict(zip(_PARAMETERS, (bias, bias.clone(), kernel)))

    def geometry(self, layout: Layout, device: torch.device) -> _Geometry:
        layout.grid  # noqa: B018 (raises on text-only layouts)
        segments, count = [], 0
        for start, segment in layout.spans():
            tokens = slice(start, start + segment.length)
            if isinstance(segment, Grid):
                shape, own = segment.shape, self._own(segment)
                agents = slice(count, count + math.prod(own))
                made = _Segment(
                    tokens,
                    agents,
                    shape,
                    tuple(_windows(g, n).to(device) for g, n in zip(own, shape)),
                    tuple(_basis(n).to(device) for n in shape),
                    self._place(own).to(device),
                )
            else:
                agents = slice(count, count + min(self.text_agents, segment.length))
                made = _Segment(tokens, agents, None)
            segments.append(made)
            count = agents.stop
        plans = (layout.num_tokens, count), (count, layout.num_tokens)
        spread, gather = (Plan.full(*sizes).to(device) for sizes in plans)
        return _Geometry(tuple(segments), gather, spread)

    def _place(self, own: list[int]) -> torch.Tensor:
        """For each agent of a grid the one of the parameters' that lies where it does."""
        place = torch.zeros(1, dtype=torch.int64)
        for count, most in zip(own, self._per_axis):
            along = (2 * torch.arange(count) + 1) * most // (2 * count)
            place = (place[:, None] * most + along).flatten()
        return place

    def attention(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        _check(parameters, math.prod(self._per_axis), q)
        segments, gather, spread = call.geometry
        scales = self._scales(call, q)
        k, v = _without_padding(call, k, v)
        agents, alive = _agents(segments, q, _shown(call))
        local = self._local(segments, match_heads(v, q.shape[1]), parameters)
        queries, keys, values, gatherers, givers = q, k, v, agents, agents
        if parameters:
            # A bias is a product as well: of what an agent has at each place and where a token is.
            places, own = _places(segments, q), partial(_biases, segments, agents=agents)
            queries, keys = _beside(q * scales[1], places), _beside(k, places)
            gatherers = _beside(agents * scales[0], own(parameters["gather_bias"]))
            givers = _beside(agents, own(parameters["spread_bias"]))
            values, scales = F.pad(v, (0, places.shape[-1])), (1.0, 1.0)
        weight = call.kv_log_weight
        gathered = call.attend(
            gatherers, keys, values, gather, kv_log_weight=weight, scale=scales[0]
        )
        out = call.attend(queries, givers, gathered, spread, kv_log_weight=alive, scale=scales[1])
        return (out[..., : q.shape[-1]] + local).to(q.dtype)

    def formula(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        segments = call.geometry.segments
        k, v = (match_heads(x, q.shape[1]) for x in _without_padding(call, k, v))
        gather_scale, spread_scale = self._scales(call, q)
        agents, alive = _agents(segments, q, _shown(call))
        to_agents, to_queries = agents @ k.mT * gather_scale, q[:, :, rows] @ agents.mT
        to_queries = to_queries * spread_scale
        if parameters:
            places = _places(segments, q)
            biases = [_biases(segments, parameters[n], agents) @ places.mT for n in _PARAMETERS[:2]]
            to_agents, to_queries = to_agents + biases[0], to_queries + biases[1].mT[:, :, rows]
        for logits, weight in ((to_agents, call.kv_log_weight), (to_queries, alive)):
            if weight is not None:
                logits += weight[:, :, None].to(logits)
        # A row without a key is one of NaN, and gives nothing.
        gathered = torch.softmax(to_agents, -1).nan_to_num() @ v
        out = torch.softmax(to_queries, -1).nan_to_num() @ gathered
        return (out + self._local(segments, v, parameters)[:, :, rows]).to(q.dtype)

    def flops(self, layout: Layout, heads: int, head_dim: int) -> float:
        agents = pooling = 0.0
        for _, segment in layout.spans():
            if isinstance(segment, Grid):
                own, sizes = self._own(segment), list(segment.shape)
                agents += math.prod(own)
                for axis in (2, 1, 0):
                    pooling += math.prod(sizes) * own[axis]
                    sizes[axis] = own[axis]
                pooling += 9.0 * segment.length if self.trained else 0
            else:
                own = min(self.text_agents, segment.length)
                agents, pooling = agents + own, pooling + own * segment.length
        width = head_dim
        if self.trained:
            width += _num_biases(len(layout.grids), head_dim)
        return heads * (8.0 * layout.num_tokens * agents * width + 2.0 * pooling * head_dim)

    def _own(self, grid: Grid) -> list[int]:
        """Agents of a grid along its axes."""
        return [min(count, n) for count, n in zip(self._per_axis, grid.shape)]

    def _scales(self, call: Call, q: torch.Tensor) -> tuple[float, float]:
        """Of the logits between agents and keys, and between queries and agents."""
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        return scale, scale**self.sharpness

    def _local(self, segments, v: torch.Tensor, parameters: dict) -> torch.Tensor:
        """``w ∗ v [B, H, N, D]``, or ``shortcut · v``, for v with as many heads as q."""
        if not parameters:
            return self.shortcut * v
        kernel, parts = parameters["kernel"].to(v), []
        for segment in segments:
            own = v[:, :, segment.tokens]
            if segment.shape is None:
                parts.append(own * kernel[:, None, :, 1, 1])
            else:
                parts.append(_convolved(own, kernel, segment.shape))
        return torch.cat(parts, 2)


def _check(parameters: dict, agents: int, q: torch.Tensor) -> None:
    """Raise ValueError where parameters are missing, or for other heads or agents."""
    if not parameters:
        return
    missing = [name for name in _PARAMETERS if name not in parameters]
    if missing:
        raise ValueError(f"agent's parameters lack {', '.join(missing)}; give all of them, or none")
    heads, head_dim = q.shape[1], q.shape[3]
    bias = [heads, agents, _BIASES]
    for name, shape in zip(_PARAMETERS, (bias, bias, [heads, head_dim, 3, 3])):
        if list(parameters[name].shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for {heads} heads of {head_dim} and {agents} agents, got "
                f"{list(parameters[name].shape)}"
            )


def _windows(count: int, n: int) -> torch.Tensor:
    """``[count, n]`` fp64: means over the windows of adaptive average pooling."""
    first = torch.arange(count) * n // count
    end = -(-(torch.arange(count) + 1) * n // count)
    place = torch.arange(n)
    inside = (place >= first[:, None]) & (place < end[:, None])
    return inside.double() / (end - first)[:, None]


def _basis(n: int) -> torch.Tensor:
    """``[n, PLACES]`` fp64: linear interpolation from places along an axis to its n tokens."""
    places = torch.eye(PLACES, dtype=torch.float64)[None]
    return F.interpolate(places, size=n, mode="linear")[0].T.contiguous()


def _shown(call: Call) -> torch.Tensor | None:
    """``[B|1, H|1, N, 1]`` bool, False for tokens whose keys are hidden; None where none is."""
    weight = call.kv_log_weight
    return None if weight is None else (weight > -torch.inf)[..., None]


def _without_padding(call: Call, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """k and v with zeros where keys are hidden: padding may hold anything, also NaN."""
    if call.kv_log_weight is None:
        return list(tensors)
    seen = key_weights(call.kv_log_weight, tensors[0])[..., None] > 0
    return [x.masked_fill(~seen, 0) for x in tensors]


def _agents(
    segments: tuple[_Segment, ...], q: torch.Tensor, shown: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(agents [B, H, m, D], their log weights [B|1, H|1, m])``: -inf where a window is empty."""
    wide = wide_dtype(q.dtype)
    means, shares = [], []
    for segment in segments:
        own = q[:, :, segment.tokens].to(wide)
        there = None if shown is None else shown[:, :, segment.tokens]
        own = own if there is None else own.masked_fill(~there, 0)
        if segment.shape is not None:
            pool = partial(_pooled, segment)
        else:
            pool = partial(torch.matmul, _shares(segment, own, there))
        mean = pool(own)
        if there is not None:
            share = pool(there.to(wide))
            mean = mean / share.clamp_min(torch.finfo(wide).tiny)
            shares.append(share[..., 0])
        means.append(mean)
    agents = torch.cat(means, 2).to(q.dtype)
    if shown is None:
        return agents, None
    alive = torch.cat(shares, 2) > 0
    return agents, torch.zeros_like(alive, dtype=torch.float32).masked_fill(~alive, -torch.inf)


def _pooled(segment: _Segment, x: torch.Tensor) -> torch.Tensor:
    """``[B, H, agents, D]``: means of a grid's ``x [B, H, tokens, D]`` over its windows."""
    frames, rows, columns = (pool.to(x) for pool in segment.pools)
    # The axis that is pooled stands in front of all that is behind it.
    pooled = columns @ x.unflatten(2, segment.shape)
    pooled = rows @ pooled.flatten(-2)
    pooled = frames @ pooled.flatten(-2)
    return pooled.unflatten(-1, (-1, x.shape[-1])).flatten(2, 3)


def _shares(segment: _Segment, x: torch.Tensor, shown: torch.Tensor | None) -> torch.Tensor:
    """``[B|1, H|1, agents, tokens]``: means over equal shares of the text tokens that count."""
    if shown is None:
        shown = torch.ones(1, 1, x.shape[2], 1, dtype=torch.bool, device=x.device)
    shown = shown[..., 0]
    agent = torch.arange(segment.agents.stop - segment.agents.start, device=x.device)
    rank = shown.cumsum(-1) - 1
    share = rank * agent.numel() // shown.sum(-1, keepdim=True).clamp_min(1)
    member = (share[..., None, :] == agent[:, None]) & shown[..., None, :]
    return member.to(x) / member.sum(-1, keepdim=True).clamp_min(1)


def _num_biases(grids: int, head_dim: int) -> int:
    """Channels that the biases of so many grids take, with what fills them up."""
    used = grids * _BIASES
    return used + -(head_dim + used) % _CHANNELS


def _places(segments: tuple[_Segment, ...], q: torch.Tensor) -> torch.Tensor:
    """``[N, channels]``: how the biases add up at each token; zero in text."""
    grids = sum(segment.shape is not None for segment in segments)
    width, before, parts = _num_biases(grids, q.shape[-1]), 0, []
    for segment in segments:
        if segment.shape is None:
            size = segment.tokens.stop - segment.tokens.start
            parts.append(q.new_zeros(size, width))
            continue
        frames, rows, columns = (basis.to(wide_dtype(q.dtype)) for basis in segment.bases)
        plane = (rows[:, None, :, None] * columns[:, None]).flatten(-2)
        along = frames[:, None, None], rows[:, None], columns, plane
        at = torch.cat([x.expand(*segment.shape, -1) for x in along], -1).flatten(0, 2)
        parts.append(F.pad(at, (before, width - before - _BIASES)).to(q.dtype))
        before += _BIASES
    return torch.cat(parts)


def _biases(segments: tuple[_Segment, ...], bias: torch.Tensor, agents: torch.Tensor):
    """``[1, H, m, channels]``: biases ``[H, agents, 70]`` of the agents, in those of their grid."""
    grids = sum(segment.shape is not None for segment in segments)
    width, before, parts = _num_biases(grids, agents.shape[-1]), 0, []
    for segment in segments:
        if segment.shape is None:
            size = segment.agents.stop - segment.agents.start
            parts.append(bias.new_zeros(bias.shape[0], size, width))
            continue
        own = bias[:, segment.place]
        parts.append(F.pad(own, (before, width - before - _BIASES)))
        before += _BIASES
    return torch.cat(parts, 1)[None].to(agents.dtype)


def _beside(x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """``x [B, H, n, D]`` with more channels."""
    return torch.cat([x, more.expand(*x.shape[:2], *more.shape[-2:])], -1)


def _convolved(x: torch.Tensor, kernel: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """A grid's ``x [B, H, tokens, D]``, each frame and channel convolved with its own 3 x 3."""
    batch, heads, _, channels = x.shape
    planes = x.unflatten(2, shape).permute(0, 2, 1, 5, 3, 4).flatten(0, 1).flatten(1, 2)
    weight = kernel.flatten(0, 1)[:, None]
    planes = F.conv2d(planes, weight, padding=1, groups=heads * channels)
    planes = planes.unflatten(1, (heads, channels)).unflatten(0, (batch, shape[0]))
    return planes.permute(0, 2, 1, 4, 5, 3).flatten(2, 4)
