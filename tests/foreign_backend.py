"""An attention backend of diffusers that stands for a kernel which is not PyTorch's."""

import pytest


@pytest.fixture
def foreign(monkeypatch):
    """The (queries, keys) of every call of the backend that goes by flex's name meanwhile."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    calls = []

    def attention(query, key, value, attn_mask=None, scale=None, _parallel_config=None):
        calls.append((query.shape[1], key.shape[1]))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (logits.softmax(-1) @ v).transpose(1, 2)

    registry, name = _AttentionBackendRegistry, AttentionBackendName.FLEX
    arguments = {"query", "key", "value", "attn_mask", "scale", "_parallel_config"}
    monkeypatch.setitem(registry._backends, name, attention)
    monkeypatch.setitem(registry._supported_arg_names, name, arguments)
    # set_attention_backend changes the process-wide choice, too.
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    return calls


def backends_of(model):
    """Every attention module's choice."""
    return [m.processor._attention_backend for m in model.modules() if hasattr(m, "processor")]
