"""Names, presets, YAML and schedules: strict, and helpful when wrong."""

import pytest

from dittfast.config import presets, resolve
from dittfast.methods import METHODS, Local, Radial
from dittfast.schedule import Schedule


def test_names_objects_and_options():
    assert resolve("radial", decay_factor=0.5, dense_first_steps=2) == (
        Radial(decay_factor=0.5),
        Schedule(dense_first_steps=2),
    )
    assert resolve(Local(window=4), window=6) == (Local(window=6), Schedule())
    given = Schedule(dense_layers=(0, 1), min_tokens=7)
    assert resolve("local", given, min_tokens=0)[1] == Schedule(dense_layers=(0, 1), min_tokens=0)


def test_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: local\noptions: {window: 5}\nschedule: {dense_layers: [0, '2-3'], min_tokens: 0}\n"
    )
    method, schedule = resolve(str(path), dense_last_steps=1)
    assert method == Local(window=5)
    assert schedule == Schedule(dense_last_steps=1, dense_layers=(0, "2-3"), min_tokens=0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("method: local\noption: {window: 5}\n", "option.*'options'"),
        ("method: local\noptions: {windo: 5}\n", "windo.*'window'"),
        ("method: locl\n", "locl.*'local'"),
        ("method: local\nschedule: {dense_layer: [0]}\n", "dense_layer.*'dense_layers'"),
        ("options: {window: 5}\n", "no 'method'"),
        ("- local\n", "mapping"),
        ("method: [\n", "not valid YAML"),
        ("method: local\noptions: 5\n", "'options' must be a mapping"),
        ("method: local\noptions: {window: -1}\n", "-1"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        resolve(path)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'radail'.*Did you mean 'radial'"):
        resolve("radail")
    with pytest.raises(ValueError, match=r"decay_facter.*'decay_factor'"):
        resolve("radial", decay_facter=1.0)
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        resolve("missing.yaml")
    with pytest.raises(ValueError, match="int"):
        resolve(3)


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves(name):
    method, schedule = resolve(name)
    assert METHODS[name.split("/")[0]] is type(method)
    assert isinstance(schedule, Schedule)


NAMES = [f"blocks.{i}.attn1" for i in range(6)]


@pytest.mark.parametrize(
    "layers, expected",
    [
        ((0, -1), {0, 5}),
        (("3", "-1"), {3, 5}),
        (("1-3",), {1, 2, 3}),
        (("blocks.4.*", 2), {2, 4}),
        (("*",), set(range(6))),
        ((), set()),
    ],
)
def test_dense_layers(layers, expected):
    found = Schedule(dense_layers=layers).dense_layer_names(NAMES)
    assert found == {NAMES[i] for i in expected}


@pytest.mark.parametrize("entry", [6, -7, "6", "--5", "3-9", "4-2", "transformer_blocks.*"])
def test_dense_layers_that_do_not_exist(entry):
    with pytest.raises(ValueError, match=r"6 self-attention layers, 0\.\.5"):
        Schedule(dense_layers=(entry,)).dense_layer_names(NAMES)


@pytest.mark.parametrize(
    "fields", [dict(dense_first_steps=-1), dict(min_tokens=1.5), dict(dense_layers=(1.5,))]
)
def test_bad_schedules(fields):
    with pytest.raises(ValueError, match=r"-1|1\.5"):
        Schedule(**fields)


def test_dense_steps():
    schedule = Schedule(dense_first_steps=2, dense_last_steps=1)
    assert [schedule.is_dense_step(i, 5) for i in range(5)] == [True, True, False, False, True]


def test_every_preset_names_the_transformers_it_is_for():
    from dittfast.config import _read, check_fits
    from dittfast.pipelines.families import FAMILIES

    for name in presets():
        meant = _read(name)["transformers"]
        assert meant and set(meant) <= set(FAMILIES), name
        check_fits(name, meant)
        with pytest.raises(ValueError, match=rf"{meant[0]}, and this model is UNet.*--any-model"):
            check_fits(name, ["UNet"])


def test_settings_for_another_model_are_taken_with_a_warning(tmp_path, caplog):
    from dittfast.config import check_fits

    check_fits("radial/wan2.1", ["WanTransformer3DModel", "FluxTransformer2DModel"], True)
    assert "this model is FluxTransformer2DModel; taken all the same" in caplog.text
    check_fits("radial", ["UNet"])
    path = tmp_path / "mine.yaml"
    path.write_text("method: local\n")
    check_fits(str(path), ["UNet"])
    path.write_text("method: local\ntransformers: FluxTransformer2DModel\n")
    with pytest.raises(ValueError, match="'transformers' must be a list of class names"):
        check_fits(str(path), ["UNet"])


@pytest.mark.parametrize("method", ["[local]", "{local: 1}", "8", "null"])
def test_a_file_whose_method_is_no_name(tmp_path, method):
    (tmp_path / "a.yaml").write_text(f"method: {method}\n")
    with pytest.raises(ValueError, match=r"a\.yaml: 'method' must be a name, got"):
        resolve(str(tmp_path / "a.yaml"))


def test_aliases_of_yaml_do_not_multiply(tmp_path):
    """Few lines that anybody's machine would fill its memory with; and what people use them for."""
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 6)]
    merged = [line.replace("[", "{<<: [").replace("]", "]}") for line in lines[1:]]
    merged.insert(0, "- &a0 {x: y}")
    path = tmp_path / "mine.yaml"
    for text in (
        "method: local\noptions:\n" + "\n".join(lines),
        "rules:\n" + "\n".join(lines),
        f"source: &long {'x' * 1000}\nmethod: [{', '.join(['*long'] * 150)}]",
        "rules:\n" + "\n".join(merged),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.yaml is not valid YAML \(its aliases unfold"):
            resolve(str(path))
    path.write_text("method: local\noptions: &a [*a]")
    with pytest.raises(ValueError, match=r"\*a stands for nothing that ends before it"):
        resolve(str(path))
    path.write_text(
        "rules:\n- {layers: [0], method: local, options: &shared {window: 3}}\n"
        "- {layers: [1], method: local, options: {<<: *shared, tile: [1, 4, 4]}}\n"
        "- {layers: [2], method: local, options: *shared}\n"
    )
    rules = resolve(str(path))[0].rules
    assert [rule.method for rule in rules] == [Local(3), Local(3, tile=(1, 4, 4)), Local(3)]
