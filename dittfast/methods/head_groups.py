"""Groups of heads of one layer, each under a method of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from ..layout import Layout
from .amount import Amount, mean_amount
from .base import Call, Method


class Group(NamedTuple):
    """Some heads and what they run.

    Attributes:
        heads: their numbers, in rising order.
        method: what they run.
        key: what the names of its parameters begin with.
    """

    heads: tuple[int, ...]
    method: Method
    key: str = ""


@dataclass(frozen=True)
class HeadGroups(Method):
    """Heads of one layer in groups: each attends under its own method, by a call of its own.

    A rule of a mixture that names heads makes one, and so does an option that is given as a list
    with a value for each head (:meth:`Method.by_head`).

    Args:
        groups: a :class:`Group` each; together they have every head once.

    Raises:
        ValueError: a head that no group has, or two.
    """

    name: ClassVar[str] = "head_groups"
    needs_grid: ClassVar[bool] = False

    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "groups", tuple(self.groups))
        every = sorted(head for group in self.groups for head in group.heads)
        if every != list(range(len(every))) or not every:
            raise ValueError(f"groups must have each head 0, 1, ... once, got {every}")
        order = [head for group in self.groups for head in group.heads]
        back = sorted(range(len(order)), key=order.__getitem__)
        object.__setattr__(self, "_back", None if order == every else back)

    @property
    def parts(self) -> tuple[Method, ...]:
        return tuple(group.method for group in self.groups)

    @property
    def needs_hidden_states(self) -> bool:
        return any(method.needs_hidden_states for method in self.parts)

    @property
    def losses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for method in self.parts for name in method.losses))

    def words(self) -> str:
        return ", ".join(f"{g.method.words()} in heads {head_words(g.heads)}" for g in self.groups)

    def to_dict(self) -> dict:
        groups = [{"heads": list(g.heads), **g.method.to_dict()} for g in self.groups]
        return {"name": self.name, "groups": groups}

    def attention(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        outs = []
        for group, kept in zip(self.groups, call.geometry):
            mine = self.parameters_of(group, parameters)
            qkv = (select_heads(x, group.heads, q.shape[1]) for x in (q, k, v))
            outs.append(
                call.inner(group.method, layout, *qkv, kept=kept, heads=group.heads, **mine)
            )
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        return out if self._back is None else out[:, self._back]

    def parameters_of(self, group: Group, parameters: dict) -> dict:
        """Those of a layer's parameters that are of one group, by their names in its method."""
        key = group.key
        return {n.removeprefix(key): x for n, x in parameters.items() if n.startswith(key)}

    def geometry(self, layout: Layout, device: torch.device) -> tuple:
        return tuple(method.keep(layout, device) for method in self.parts)

    def prepare(self, layout: Layout, device: torch.device) -> None:
        for method in self.parts:
            method.prepare(layout, device)

    def parameters(
        self, heads: int, head_dim: int, channels: int | None = None
    ) -> dict[str, torch.Tensor]:
        return {
            group.key + name: x
            for group in self.groups
            for name, x in group.method.layer_parameters(
                len(group.heads), head_dim, channels
            ).items()
        }

    def amount(self, layout, heads, head_dim, kept=None, observed=None) -> Amount:
        amounts = []
        for n, group in enumerate(self.groups):
            mine = None if kept is None else kept.geometry[n]
            size = len(group.heads)
            amounts.append((size, group.method.amount(layout, size, head_dim, mine, observed)))
        return mean_amount(amounts)

    def least(self) -> HeadGroups:
        return HeadGroups(tuple(g._replace(method=g.method.least()) for g in self.groups))


def value_lists(method: Method) -> dict[str, tuple]:
    """The options of a method that have one value for each head."""
    return {n: x for n in method.per_head if isinstance(x := getattr(method, n), tuple)}


def by_head(method: Method, heads: int | None) -> Method:
    """A method for a layer with so many heads: groups of heads where an option is a list.

    Heads with the same values are one group. A method's ``per_head`` says which options may be
    lists.

    Raises:
        ValueError: a list with another number of values than there are heads.
    """
    lists = value_lists(method)
    if not lists:
        return method
    for name, values in lists.items():
        if len(values) != heads:
            raise ValueError(
                f"{name} has {len(values)} values, one for each head, and there are "
                f"{'unknown' if heads is None else heads} heads"
            )
    groups: dict[tuple, list[int]] = {}
    for head, values in enumerate(zip(*lists.values())):
        groups.setdefault(values, []).append(head)
    return HeadGroups(
        tuple(
            Group(tuple(own), replace(method, **dict(zip(lists, values))), f"group{n}_")
            for n, (values, own) in enumerate(groups.items())
        )
    )


def split(method: Method, heads: int) -> list[Group]:
    """What the heads of a layer run: groups within groups spread out, one group for most methods.

    Their keys lead to a layer's parameters.
    """
    whole = by_head(method, heads)
    if not isinstance(whole, HeadGroups):
        return [Group(tuple(range(heads)), whole)]
    groups = []
    for group in whole.groups:
        for inner in split(group.method, len(group.heads)):
            own = tuple(group.heads[head] for head in inner.heads)
            groups.append(Group(own, inner.method, group.key + inner.key))
    return groups


def select_heads(x: torch.Tensor, heads: tuple[int, ...], num_queries: int) -> torch.Tensor:
    """``x [B, H, ...]`` for some of the query heads; with grouped queries, the keys they share.

    Args:
        num_queries: query heads of the layer, a multiple of H.
    """
    each = num_queries // x.shape[1]
    own = [head // each for head in heads]
    if each > 1 and len(heads) % each == 0:
        whole = own[::each]
        if own == [head for head in whole for _ in range(each)]:
            own = whole  # the group has all queries of these keys
    if own == list(range(own[0], own[0] + len(own))):
        return x[:, own[0] : own[0] + len(own)]
    return x[:, own]


def head_words(heads: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for head in heads:
        if parts and head == parts[-1][1] + 1:
            parts[-1][1] = head
        else:
            parts.append([head, head])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
