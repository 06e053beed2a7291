"""The cache that methods and pipelines share: bounds, order of use, threads, sizes."""

import copy
import pickle
import threading
import time

import pytest
import torch

from dittfast.cache import BytesLRU, nbytes
from dittfast.layout import Layout
from dittfast.methods import Local, LogLinear, Rectified


def test_what_was_used_longest_ago_goes_first():
    cache = BytesLRU(max_items=3, max_bytes=1 << 20)
    for key in "abc":
        cache.get(key, lambda: torch.zeros(1))
    cache.get("a", lambda: pytest.fail("is held"))
    cache.get("d", lambda: torch.zeros(1))
    assert list(cache) == ["c", "a", "d"]
    assert "b" not in cache and len(cache) == 3
    assert cache.peek("b") is None and cache.peek("a") is not None


def test_bytes_bound_what_is_kept():
    cache = BytesLRU(max_items=100, max_bytes=1000)
    for key in range(20):
        cache.get(key, lambda: torch.zeros(100, dtype=torch.uint8))
    assert list(cache) == list(range(10, 20)) and cache.nbytes == 1000
    # The newest one stays, however large: it is about to be used.
    large = cache.get("large", lambda: torch.zeros(5000, dtype=torch.uint8))
    assert list(cache) == ["large"] and cache.peek("large") is large


def test_values_that_grow_later_count_with_what_they_are():
    cache = BytesLRU(max_items=100, max_bytes=1000)
    grown = cache.get("grows", dict)
    grown["x"] = torch.zeros(900, dtype=torch.uint8)
    cache.get("next", lambda: torch.zeros(200, dtype=torch.uint8))
    assert list(cache) == ["next"]


def test_sizes_count_each_tensor_once():
    layout = Layout.image(9, 9, text=7)
    plan = Local(2, tile=(1, 3, 3)).plan(layout)
    assert plan.q_blocks is plan.kv_blocks
    rule = plan.rule
    tensors = [plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks, *plan.q_blocks]
    tensors += [rule.limits, rule.q_frame, rule.q_place, rule.kv_frame, rule.kv_place]
    expected = sum(x.nbytes for x in {id(x): x for x in tensors}.values())
    assert plan.nbytes == nbytes(plan) == nbytes((plan, [plan])) == expected
    back = plan.transpose()
    plan.worklist("some", lambda t: torch.zeros(10, dtype=torch.int32))
    assert plan.nbytes == expected + sum(x.nbytes for x in back) + 40
    assert nbytes({"a": "text", 3: None, "layout": layout}) == 0


def test_two_threads_get_one_object_and_others_do_not_wait():
    cache, made, found = BytesLRU(4, 1000), [], []
    entered, go = threading.Event(), threading.Event()

    def make():
        made.append(1)
        entered.set()
        assert go.wait(10)
        return torch.zeros(1)

    threads = [
        threading.Thread(target=lambda: found.append(cache.get("slow", make))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    cache.get("quick", lambda: torch.ones(1))  # while "slow" is being made
    go.set()
    for thread in threads:
        thread.join(10)
    assert made == [1] and len(found) == 3 and all(x is found[0] for x in found)


def test_a_failure_is_raised_and_not_kept():
    cache = BytesLRU(4, 1000)
    with pytest.raises(RuntimeError, match="no room"):
        cache.get("a", lambda: (_ for _ in ()).throw(RuntimeError("no room")))
    assert "a" not in cache and cache.get("a", lambda: 3) == 3


def test_copies_are_empty():
    cache = BytesLRU(4, 1000)
    cache.get("a", lambda: torch.zeros(1))
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(twin), twin.max_items, twin.max_bytes) == (0, 4, 1000)
    method = copy.deepcopy(LogLinear(block_size=8))
    method.prepare(Layout.image(9, 9), torch.device("cpu"))
    assert method == LogLinear(block_size=8)


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0), (-3, 5)])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match=r"max_(items|bytes) must be at least 1, got (0|-3)"):
        BytesLRU(*bounds)


def test_layout_keys_tell_layouts_apart():
    layouts = [
        *(Layout.image(4, 6), Layout.image(6, 4), Layout.video(4, 6, 1), Layout.image(4, 6, 2)),
        *(Layout.image(4, 6, 2, text_first=False), Layout.image(4, 6, 2, text_lengths=[1])),
        *(Layout.image(4, 6, 2, text_lengths=[1, 1]), Layout.image(4, 6, 2, text_lengths=[2])),
    ]
    assert len({x.key for x in layouts}) == len(layouts)
    assert Layout.image(4, 6, 2).key == Layout.image(4, 6, 2).key


@pytest.mark.parametrize("method", [LogLinear(block_size=8), Rectified(block_size=16)])
def test_forty_sizes_are_kept_and_preparing_again_is_cheap(method):
    layouts = [Layout.image(9 + n, 10, text=5, text_lengths=[3]) for n in range(40)]
    cpu = torch.device("cpu")
    for layout in layouts:
        method.prepare(layout, cpu)
    held = [method._geometry(layout, cpu) for layout in layouts]
    start = time.process_time()
    for layout in layouts:
        method.prepare(layout, cpu)
    assert time.process_time() - start < 40 * 0.001
    assert all(method._geometry(layout, cpu) is x for layout, x in zip(layouts, held))


def test_compiled_code_cannot_build_what_is_missing(monkeypatch):
    method, q = Rectified(block_size=16), torch.randn(1, 1, 63, 16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"1x7x9; call method\.prepare\(layout, device\) before"):
        method.plan(Layout.image(7, 9), q, q, q)


def test_other_sizes_do_not_recompile_what_was_compiled():
    """A graph is guarded by its own entry of the cache, not by what else is in it."""
    import torch._dynamo.testing

    method, cpu = Rectified(block_size=16, topk=2), torch.device("cpu")
    layout, counter = Layout.image(7, 9), torch._dynamo.testing.CompileCounter()
    method.prepare(layout, cpu)
    geometry = torch.compile(
        lambda x: x + method._geometry(layout, x.device).context_tokens.sum(),
        backend=counter,
        fullgraph=True,
    )
    for n in range(12):
        geometry(torch.zeros(3))
        method.prepare(Layout.image(8, 9 + n), cpu)
        method.prepare(layout, cpu)
    assert counter.frame_count == 1
