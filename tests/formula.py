"""Stock models whose attention is a formula, to compare enabled ones with."""

import contextlib

import torch.nn.functional as F


@contextlib.contextmanager
def attention_by(model, own, formula):
    """Inside, attention of the stock layers named in ``own`` is ``formula(own[name], q, k, v)``.

    q, k and v come as scaled_dot_product_attention gets them, in fp64; the answer takes q's dtype.
    """
    sdpa, inside = F.scaled_dot_product_attention, []

    def by_formula(query, key, value, **_):
        return formula(inside[-1], query.double(), key.double(), value.double()).to(query)

    def enter(name):
        def hook(*_):
            inside.append(own[name])
            F.scaled_dot_product_attention = by_formula

        return hook

    def leave(*_):
        F.scaled_dot_product_attention = sdpa

    modules = [model.get_submodule(name) for name in own]
    hooks = [m.register_forward_pre_hook(enter(n)) for n, m in zip(own, modules)]
    hooks += [m.register_forward_hook(leave, always_call=True) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
