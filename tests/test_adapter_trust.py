"""Adapters from anywhere, into bases as people have them: right, or refused before any change."""

import json
import shutil

import pytest
import torch
from adapter_folder import make_adapter
from distill_run import one_thread  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny import flux_pipeline, run

import dittfast
from dittfast.distill.adapter_files import DESCRIPTION, LORA, WEIGHTS
from dittfast.pipelines.adapter import method_parameters as own_values
from dittfast.pipelines.models import is_swapped

KINDS = ("attention", "lora", "method")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder of adapters by kind."""
    folder = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        make_adapter(folder / kind, kind)
    return folder


def is_plain(x):
    return type(x.data) is torch.Tensor


def as_bytes(x):
    """To the bit; what was never written may hold NaN."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def snapshot(pipe):
    """Everything of a transformer that a refusal must leave alone."""
    model = pipe.transformer
    return (
        {
            n: x.clone() if type(x.data) is torch.Tensor else x
            for n, x in model.state_dict().items()
        },
        {n: type(m) for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        sorted(k for k in model.__dict__),
        sorted(getattr(model, "peft_config", None) or {}),
        len(model._forward_pre_hooks),
    )


def assert_unchanged(pipe, before):
    after = snapshot(pipe)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    for name, x in before[0].items():
        if is_plain(x) and x.device.type != "meta":
            assert torch.equal(as_bytes(x), as_bytes(after[0][name])), name
    assert not is_swapped(pipe.transformer)


def refused(pipe, path, message, **options):
    before = snapshot(pipe)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        dittfast.load_adapter(pipe, path, **options)
    assert "\n" not in str(found.value)
    assert_unchanged(pipe, before)
    return str(found.value)


def forge(folder, change=None, weights=None, name=WEIGHTS):
    """Change an adapter without leaving a trace in its checksums, as an earlier version's."""
    description = json.loads((folder / DESCRIPTION).read_text())
    del description["sha256"]
    if change is not None:
        change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))
    if weights is not None:
        tensors = load_file(folder / name)
        save_file(weights(tensors), folder / name)


def only(count):
    return lambda tensors: dict(list(tensors.items())[:count])


def each(change):
    return lambda tensors: {n: change(x) for n, x in tensors.items()}


def set_nan(x):
    x = x.clone()
    x.view(-1)[0] = torch.nan
    return x


def test_damaged_adapters_change_nothing(adapters, tmp_path):
    """And a whole one loads into the same pipeline afterwards."""
    pipe = flux_pipeline()
    number = [0]

    def copy(kind):
        number[0] += 1
        return shutil.copytree(adapters / kind, tmp_path / f"{number[0]}")

    for kind in KINDS:
        file = LORA if kind == "lora" else WEIGHTS
        cases = {
            r"missing \(.*is the first\)": only(1),
            r"tensors are missing": lambda tensors: dict(list(tensors.items())[1:]),
            r"dtype I64, weights are floats": each(lambda x: x.long()),
            r"holds values that are not finite": each(set_nan),
            r"is not described|has no place": lambda t: t | {"more.weight": torch.ones(1)},
            r"is \[[\d, ]+\], .* is \[": each(lambda x: torch.zeros(*x.shape, 2)),
        }
        for message, change in cases.items():
            path = copy(kind)
            forge(path, weights=change, name=file)
            refused(pipe, path, message)
        path = copy(kind)
        save_file(only(1)(load_file(path / file)), path / file)
        refused(pipe, path, "tensors are missing")
        path = copy(kind)
        save_file(each(lambda x: x + 1)(load_file(path / file)), path / file)
        assert file in refused(pipe, path, "SHA-256 differs.*verify=False")
        dittfast.load_adapter(pipe, path, verify=False)
        dittfast.unload_adapter(pipe)
        (path / file).write_bytes((path / file).read_bytes()[:-3])
        assert file in refused(pipe, path, "damaged or incomplete")
        (path / file).unlink()
        assert file in refused(pipe, path, "missing")
    dittfast.load_adapter(pipe, adapters / "lora")
    dittfast.unload_adapter(pipe)


def put(*path, value):
    def change(description):
        for key in path[:-1]:
            description = description[key]
        description[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("lora", put("lora", "rank", value=3_000_000), r"is \[3, 32\].*\[3000000, 32\]"),
        ("lora", put("lora", "targets", value=["nothing"]), "not described"),
        ("lora", put("lora", "targets", value=[]), r"rank 3 and alpha 6\.0 on \[\]"),
        ("lora", put("lora", "alpha", value=0), "rank 3 and alpha 0 on"),
        ("lora", put("lora", "alpha", value=-6.0), r"rank 3 and alpha -6\.0 on"),
        ("lora", put("lora", "alpha", value=1e300), r"rank 3 and alpha 1e\+300 on"),
        ("lora", put("lora", value=None), "contradict"),
        ("method", put("options", "downsample", value=10**9), r"is \[2, 2\].*\[1000000000, "),
        ("method", put("options", "downsample", value=2 * 10**9), "options are impossible"),
        ("method", put("options", "window", value=-1), "its method cannot be had.*window"),
        ("method", lambda d: d.update(preset="a.yaml", method="b"), "no method or preset here"),
        ("method", put("schedule", value={"dense_layers": ["x"]}), "does not fit the model"),
        ("method", put("base", "component", value="vae"), "must be one of transformer"),
        ("attention", lambda d: d.pop("base"), "has no 'base'"),
        ("attention", put("base", value=[1]), "base must be a mapping"),
        ("attention", put("trainable", value="everything"), "trainable is 'everything'"),
        ("attention", put("format", value=7), "format 7"),
    ],
)
def test_descriptions_that_cannot_be(adapters, tmp_path, kind, change, message):
    path = shutil.copytree(adapters / kind, tmp_path / "a")
    forge(path, change)
    assert str(path) in refused(flux_pipeline(), path, message)


def test_values_that_the_models_dtype_has_no_room_for(adapters, tmp_path):
    """Finite in the file, infinite in the model: bfloat16's in a float16 base, and float64's."""
    pipe = flux_pipeline().to(torch.float16)
    for kind, name in (("attention", WEIGHTS), ("lora", LORA)):
        path = shutil.copytree(adapters / kind, tmp_path / kind)
        forge(path, weights=each(lambda x: (x + 1e5).bfloat16()), name=name)
        refused(pipe, path, r"holds values that torch\.float16 has no room for; load the model in")
    path = shutil.copytree(adapters / "method", tmp_path / "method")
    forge(path, weights=each(lambda x: x.double() + 1e300))
    refused(pipe, path, r"holds values that torch\.float32 has no room for")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_values_in_another_dtype_than_the_models(tmp_path, dtype):
    """Those of a file in fp8, which every dtype holds, come out the same from all of them."""

    def in_fp8(shape):
        return (0.1 * torch.randn(shape)).to(torch.float8_e4m3fn).float()

    for kind in KINDS:
        make_adapter(tmp_path / kind, kind, in_fp8)
        found = []
        for bases in (torch.float32, torch.bfloat16):
            pipe = flux_pipeline()
            pipe.transformer.to(bases)
            for change in (None, each(lambda x: x.to(dtype))):
                shutil.copytree(tmp_path / kind, tmp_path / "copy")
                forge(tmp_path / "copy", weights=change, name=LORA if kind == "lora" else WEIGHTS)
                dittfast.load_adapter(pipe, tmp_path / "copy")
                found.append({**pipe.transformer.state_dict(), **own_values(pipe)})
                found[-1] = {n: x.clone() for n, x in found[-1].items()}
                dittfast.unload_adapter(pipe)
                shutil.rmtree(tmp_path / "copy")
        for plain, other in (found[:2], found[2:]):
            assert plain.keys() == other.keys()
            assert all(torch.equal(plain[n], other[n]) for n in plain)


@pytest.mark.parametrize(
    "dtype, message",
    [
        (torch.float8_e4m3fn, "holds values that are not finite"),
        (torch.float8_e8m0fnu, "has dtype F8_E8M0, weights are floats"),
        (torch.complex64, "has dtype C64, weights are floats"),
        (torch.bool, "has dtype BOOL, weights are floats"),
    ],
)
def test_numbers_that_are_no_weights(adapters, tmp_path, dtype, message):
    shutil.copytree(adapters / "attention", tmp_path / "a")
    forge(tmp_path / "a", weights=each(lambda x: set_nan(x).to(dtype)))
    refused(flux_pipeline(), tmp_path / "a", message)


def test_what_a_file_says_is_shown_as_text(adapters, tmp_path):
    """In one line of a bearable length, and a terminal obeys none of it."""
    hostile = "\x1b]0;title\x07\x1b[2J\nline \u202e" + "x" * 10**5
    path = shutil.copytree(adapters / "attention", tmp_path / "a")
    foreign = {"class": hostile, "shapes": "x", "values": {}}
    forge(path, lambda d: d["base"].update(model=hostile, fingerprint=foreign))
    message = refused(flux_pipeline(), path, r"trained on \\x1b\]0;title.* line \\u202ex")
    assert message.isprintable() and len(message) < 1000


CARD = """# base with local attention

| | |
|---|---|
| base model | base (FluxTransformer2DModel) |
| method | `Local({fields}, tile=(1, 4, 4), frame_window=None)` |
| schedule | `Schedule(dense_first_steps=0, dense_last_steps=0, dense_layers=(), min_tokens=0)` |
| trained | method |
"""


def test_adapters_that_name_a_yaml_file(adapters, tmp_path):
    """Earlier versions wrote the path of a user's file; its options stand in the card alone.

    Oracle: the same adapter as it is written now.
    """

    def drawn(path, **options):
        pipe = flux_pipeline()
        dittfast.load_adapter(pipe, path, **options)
        session = pipe.transformer._dittfast.session
        return session.method, session.schedule, run(pipe)

    preset = tmp_path / "mine.yaml"
    path = shutil.copytree(adapters / "method", tmp_path / "old")

    def as_before(description):
        description |= {"format": 1, "preset": str(preset), "options": {"window": 2}}
        description["schedule"] = {}

    marked = lambda x: {name.removeprefix("method."): value for name, value in x.items()}  # noqa: E731
    forge(path, as_before, marked)
    (path / "README.md").write_text(CARD.format(fields="window=2, downsample=2"))
    wanted, got = drawn(adapters / "method"), drawn(path)
    assert got[:2] == wanted[:2]
    assert torch.equal(got[2], wanted[2])
    assert drawn(path, window=3)[0].window == 3

    # Without the card, the user alone can say what was in the file.
    (path / "README.md").unlink()
    remedy = f"load_adapter(..., method={str(preset)!r}, window=2)"
    assert remedy in refused(flux_pipeline(), path, "no README.md beside it")
    preset.write_text("method: local\noptions: {downsample: 2, tile: [1, 4, 4]}\n")
    refused(flux_pipeline(), path, "no README.md beside it")  # the path may come from anybody
    got = drawn(path, method=str(preset), window=2)
    assert got[:2] == wanted[:2]
    assert torch.equal(got[2], wanted[2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("window=print('run')", "does not tell the method's options"),
        ("window=2, downsample=2, **{}", "does not tell the method's options"),
        ("window=2, width=3", "does not tell the method's options.*width"),
        ("window=-1", "does not tell the method's options.*window"),
        pytest.param("window=" + "[" * 10_000, "does not tell the method's options", id="deep"),
        ("window=2, downsample=3", r"is \[2, 2\].*\[3, 3\]"),
    ],
)
def test_cards_that_cannot_be(adapters, tmp_path, capsys, fields, message):
    path = shutil.copytree(adapters / "method", tmp_path / "a")
    forge(path, put("preset", value="mine.yaml"))
    (path / "README.md").write_text(CARD.format(fields=fields))
    refused(flux_pipeline(), path, message)
    assert capsys.readouterr().out == ""
    (path / "README.md").rename(tmp_path / "README.md")
    (path / "README.md").symlink_to(tmp_path / "README.md")
    refused(flux_pipeline(), path, "it is a link")


def test_a_description_a_thousand_levels_deep(adapters, tmp_path):
    path = shutil.copytree(adapters / "lora", tmp_path / "a")
    (path / DESCRIPTION).write_text('{"a":' * 3000 + "1" + "}" * 3000)
    assert DESCRIPTION in refused(flux_pipeline(), path, "not valid JSON")


def test_a_refused_lora_leaves_nothing_of_peft(adapters):
    """Whatever PEFT does before it fails."""
    from dittfast.distill.lora import add_lora

    pipe = flux_pipeline()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="no module of FluxTransformer2DModel is named nothing"):
        add_lora(pipe.transformer, 2, 2, ["nothing"])
    assert_unchanged(pipe, before)
    # PEFT knows no such layer: it raises when others are in already.
    with pytest.raises(ValueError):
        add_lora(pipe.transformer, 2, 2, ["to_q", "transformer_blocks"])
    assert_unchanged(pipe, before)
    dittfast.load_adapter(pipe, adapters / "lora")


# Bases as people have them.


def stock(adapters, kind):
    """What the adapter gives on a plain base."""
    pipe = flux_pipeline()
    dittfast.load_adapter(pipe, adapters / kind)
    return run(pipe)


def quantise(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def test_an_int8_base(adapters):
    pipe = flux_pipeline()
    quantise(pipe)
    plain = run(pipe)
    refused(pipe, adapters / "attention", "quantised .*; load it into the model as it was publ")
    refused(pipe, adapters / "attention", "quantised", any_base=True)
    other = flux_pipeline()
    with torch.no_grad():
        for p in other.transformer.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    quantise(other)
    refused(other, adapters / "lora", "has other values")
    for kind in ("lora", "method"):
        dittfast.load_adapter(pipe, adapters / kind)
        expected, found = stock(adapters, kind), run(pipe)
        assert (found - expected).norm() < 0.5 * (found - plain).norm()
        if kind == "lora":
            with pytest.raises(ValueError, match="merge before quantising"):
                dittfast.merge(pipe)
        dittfast.unload_adapter(pipe)
        assert torch.equal(run(pipe), plain)


def cast(pipe, dtype=torch.float8_e4m3fn):
    pipe.transformer.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_kept_in_eight_bits(adapters, kind):
    """Casting first and the adapter first come to the same."""
    first = flux_pipeline()
    dittfast.load_adapter(first, adapters / kind)
    cast(first)
    pipe = flux_pipeline()
    cast(pipe)
    plain = run(pipe)
    dittfast.load_adapter(pipe, adapters / kind)
    if kind == "lora":
        lora = [p for n, p in pipe.transformer.named_parameters() if ".dittfast." in n]
        assert {p.dtype for p in lora} == {torch.float32}
        with pytest.raises(ValueError, match=r"kept as float8_e4m3fn.*merge before"):
            dittfast.merge(pipe)
    else:
        torch.testing.assert_close(run(pipe), run(first))
    assert not torch.allclose(run(pipe), plain)
    dittfast.unload_adapter(pipe)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("kind", ["attention", "lora"])
def test_fused_projections(adapters, kind):
    pipe = flux_pipeline()
    pipe.transformer.fuse_qkv_projections()
    refused(pipe, adapters / kind, "another model|are fused")
    refused(pipe, adapters / kind, "are fused.*unfuse_qkv_projections", any_base=True)
    pipe = flux_pipeline()
    dittfast.load_adapter(pipe, adapters / kind)
    expected = run(pipe)
    pipe.transformer.fuse_qkv_projections()
    if kind == "lora":
        with pytest.raises(ValueError, match=r"the loaded adapter cannot be used.*are fused"):
            run(pipe)
    with pytest.raises(ValueError, match=r"cannot be taken out.*are fused"):
        dittfast.unload_adapter(pipe)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(run(pipe), expected)
    dittfast.unload_adapter(pipe)
    pipe.transformer.fuse_qkv_projections()
    run(pipe)


def test_a_lora_that_diffusers_fused(adapters):
    """Taken out as it is, it would stay in the weights for good."""
    pipe = flux_pipeline()
    stock = run(pipe)
    dittfast.load_adapter(pipe, adapters / "lora")
    expected = run(pipe)
    pipe.fuse_lora()
    for refused_one in (dittfast.unload_adapter, dittfast.merge):
        with pytest.raises(ValueError, match=r"added to the weights of .*unfuse_lora\(\) first"):
            refused_one(pipe)
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    dittfast.unload_adapter(pipe)
    torch.testing.assert_close(run(pipe), stock, rtol=1e-4, atol=1e-4)


def test_a_lora_that_diffusers_fused_for_good(adapters):
    """Its layers are gone, its values are not: passes are right, and nothing can undo it."""
    pipe = flux_pipeline()
    dittfast.load_adapter(pipe, adapters / "lora")
    expected = run(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)
    for refused_one in (dittfast.unload_adapter, dittfast.merge):
        with pytest.raises(ValueError, match="took away what could undo that; load the base model"):
            refused_one(pipe)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lora_that_was_taken_out_beside_us(adapters, compiled):
    """Who unloads a style would run an untrained sparse model; what was merged needs no LoRA."""
    pipe = flux_pipeline()
    plain = run(pipe)
    if compiled:
        pipe.transformer.compile(backend="eager")
    for take_out in (pipe.unload_lora_weights, lambda: pipe.delete_adapters("dittfast")):
        dittfast.load_adapter(pipe, adapters / "lora")
        expected = run(pipe)
        assert not torch.equal(expected, plain)
        take_out()
        with pytest.raises(ValueError, match=r"was taken out .*call dittfast\.unload_adapter"):
            run(pipe)
        with pytest.raises(ValueError, match="cannot be merged: its LoRA was taken out"):
            dittfast.merge(pipe)
        dittfast.unload_adapter(pipe)
        assert torch.equal(run(pipe), plain)
    dittfast.load_adapter(pipe, adapters / "lora")
    dittfast.merge(pipe)
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_elsewhere(adapters, tmp_path):
    from accelerate import cpu_offload

    pipe = flux_pipeline()
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    refused(pipe, adapters / "attention", "cannot be compared|not in memory")
    refused(pipe, adapters / "lora", "not in memory.*load the adapter first", any_base=True)
    pipe = flux_pipeline()
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "off")
    )
    refused(pipe, adapters / "attention", "another model|kept in files")
    refused(pipe, adapters / "attention", "kept in files.*load the adapter first", any_base=True)


def test_group_offloading(adapters):
    pipe = flux_pipeline()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    for kind in KINDS:
        dittfast.load_adapter(pipe, adapters / kind)
        assert torch.equal(run(pipe), stock(adapters, kind))
        dittfast.unload_adapter(pipe)


def test_another_lora_is_there(adapters):
    """It stays, and adds to what the adapter gives."""
    from peft import LoraConfig

    pipe = flux_pipeline()
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "style")
    alone = run(pipe)
    for kind in KINDS:
        expected = flux_pipeline()
        dittfast.load_adapter(expected, adapters / kind)
        torch.manual_seed(5)
        expected.transformer.add_adapter(config, "style")
        if kind == "lora":
            expected.transformer.set_adapter(["style", "dittfast"])
        dittfast.load_adapter(pipe, adapters / kind)
        torch.testing.assert_close(run(pipe), run(expected))
        assert not torch.allclose(run(pipe), alone)
        dittfast.unload_adapter(pipe)
        assert torch.equal(run(pipe), alone)
        assert list(pipe.transformer.peft_config) == ["style"]


def test_whether_parameters_train_is_restored(adapters):
    pipe = flux_pipeline()
    pipe.transformer.proj_out.requires_grad_(False)
    before = snapshot(pipe)
    dittfast.load_adapter(pipe, adapters / "lora")
    dittfast.unload_adapter(pipe)
    assert snapshot(pipe)[2] == before[2]


def test_what_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(FloatingPointError, match="no adapter is written"):
        make_adapter(tmp_path / "a", "method", lambda shape: torch.full(shape, torch.inf))
    assert not list(tmp_path.iterdir())


def test_a_model_card_shows_text(adapters, tmp_path):
    from dittfast.distill.model_card import model_card

    description = json.loads((adapters / "lora" / DESCRIPTION).read_text())
    evil = "x\n---\n![a](http://b/c.png) | `<img src=d>`"
    description["base"]["model"] = evil
    description["config"]["data"]["prompts"] = [evil]
    card = model_card(description, "Local()", "Schedule()")
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    _, front, body = card.split("---\n", 2)
    import yaml

    assert yaml.safe_load(front)["base_model"] == " ".join(evil.split())
    tokens = markdown.parse(body)
    kinds = {t.type for token in tokens for t in [token, *(token.children or [])]}
    assert not kinds & {"image", "link_open", "html_inline", "html_block", "hr"}
    assert body.count("\n| ") >= 8
