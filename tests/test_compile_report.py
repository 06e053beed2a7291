"""Triton kernels compiled without a GPU: none spills registers or wants too much shared memory."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import PYTHON

pytest.importorskip("triton")

from dittfast.cli import kernels as command
from dittfast.cli import main
from dittfast.kernels import capabilities, compile_report, triton_backend
from dittfast.kernels.launch_sizes import KernelConfig, launch_config, takes_descriptors
from dittfast.kernels.machine_code import read_sass
from dittfast.kernels.multiprocessors import MULTIPROCESSORS

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), "gfx942", "gfx90a"]


EVERYTHING = "--head-dims", "64", "128", "256", "--features", *compile_report.FEATURES


def python(*arguments):
    """A process of its own: the tests' process interprets kernels and cannot compile them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [*PYTHON, *arguments],
        capture_output=True, text=True, env=environment, timeout=3600, check=False,
    )  # fmt: skip


def assert_all_fit(count, *arguments):
    done = python("-m", "dittfast", "bench", "kernels", "--static", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["kernels"]) == count
    assert found["spilled"] == found["do_not_fit"] == 0
    return found["kernels"]


@pytest.mark.compile
def test_a_rule_fits_every_target():
    targets = "--targets", "sm_80", "sm_90", "sm_100", "gfx942"
    rest = "--kernels", "dkv", "--head-dims", "64", "--dtypes", "bf16", "--features", "video_rule"
    rows = assert_all_fit(4, *targets, *rest)
    assert [row["target"] for row in rows] == ["sm_80", "sm_90", "sm_100", "gfx942"]
    assert [row["matrix_unit"] for row in rows] == ["mma", "wgmma", "tcgen05", "mfma"]
    assert all(row["async_loads"] for row in rows if row["target"] != "gfx942")
    assert not any(row["serialized"] for row in rows)


TOO_LARGE = """
from dittfast.cli import main
from dittfast.kernels import triton_backend
from dittfast.kernels.launch_sizes import KernelConfig, LaunchConfig

arguments = "bench kernels --static --targets sm_80 --kernels forward --head-dims 64"
arguments += " --dtypes fp16 --features plain"
for sizes in (128, 128, 4, 2), (64, 64, 4, 16):
    config = LaunchConfig(*[KernelConfig(*sizes)] * 4)
    triton_backend.launch_config = lambda *_: config
    print(main(arguments.split()))
"""


@pytest.mark.compile
def test_sizes_that_do_not_fit_are_found():
    done = python("-c", TOO_LARGE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [x["spilled"] for x in found] == [1, 0]
    assert [x["do_not_fit"] for x in found] == [0, 1]
    assert [line for line in lines if len(line) == 1] == ["1", "1"]


@pytest.mark.compile
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_fits(target, dtype):
    count = len(compile_report.KERNELS) * len(compile_report.FEATURES) * 3
    assert_all_fit(count, "--targets", target, "--dtypes", dtype, *EVERYTHING)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_120"])
def test_every_kernel_fits_a_consumer_gpu(target, dtype):
    count = len(compile_report.KERNELS) * len(compile_report.FEATURES) * 3
    assert_all_fit(count, "--targets", target, "--dtypes", dtype, *EVERYTHING)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_head_dims_that_are_no_power_of_two_fit(target, dtype):
    arguments = ["--head-dims", "48", "80", "192", "--features", "plain", "rule", "video_rule"]
    assert_all_fit(36, "--targets", target, "--dtypes", dtype, *arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_launch_sizes_are_sizes_that_triton_takes(capability, dtype):
    for head_dim in range(16, 257, 16):
        config = launch_config(head_dim, dtype, capability)
        for name, kernel in config._asdict().items():
            tiles = [kernel.block_m] if name == "delta" else [kernel.block_m, kernel.block_n]
            for tile in (*tiles, kernel.rule_tile, kernel.num_warps):
                assert tile & (tile - 1) == 0
            assert min(tiles) >= 16 and kernel.rule_tile >= 16 and kernel.num_stages >= 1
            # Each compiler knows one of these options, and refuses the other.
            is_amd = isinstance(capability, str)
            for has_rule in (False, True):
                options = kernel.options(has_rule)
                assert ("matrix_instr_nonkdim" in options) == is_amd
                assert not (is_amd and "maxnreg" in options)
        rounded_up = next(size for size in (64, 128, 256) if size >= head_dim)
        larger = launch_config(rounded_up, dtype, capability)
        padded = 64 < head_dim <= 112 if capability == (9, 0) else is_amd and head_dim <= 48
        if dtype.itemsize == 2 and padded:
            # The mask for padded channels leaves registers for fewer rows of a partial block.
            larger = larger._replace(forward=larger.forward._replace(rule_tile=16))
        assert config == larger


@pytest.mark.parametrize(
    "capability, name", [((7, 5), "7.5"), ((11, 0), "11.0"), ("gfx1100", "gfx1100")], ids=str
)
def test_devices_that_no_sizes_fit_are_refused(capability, name):
    """With the sizes of their next of kin the kernels spill there."""
    with pytest.raises(ValueError, match=f"to fit compute capability {name} .*backend='cpu'"):
        launch_config(64, torch.float16, capability)


def test_attend_says_why_a_device_is_refused(monkeypatch):
    asked = capabilities.Demand(torch.device("cuda"), torch.float16, 64)
    monkeypatch.setattr(capabilities, "architecture_of", lambda device: "sm_75")
    (reason,) = capabilities.refusals(triton_backend, asked)
    assert "it knows the architectures sm_80, " in reason and reason.endswith(", not sm_75")
    monkeypatch.setattr(capabilities, "architecture_of", lambda device: "sm_90")
    assert capabilities.refusals(triton_backend, asked) == []


def test_descriptors_where_the_hardware_has_them():
    takes = {
        capability: [
            kernel
            for kernel in ("forward", "dq", "dkv")
            if takes_descriptors(capability, torch.bfloat16, kernel)
        ]
        for capability in CAPABILITIES
    }
    assert takes.pop((9, 0)) == ["forward", "dq"]
    assert takes.pop((10, 0)) == takes.pop((10, 3)) == ["forward", "dq", "dkv"]
    assert not any(takes.values())
    assert not takes_descriptors((9, 0), torch.float32, "forward")


@pytest.mark.parametrize("feature", compile_report.FEATURES)
def test_a_limit_of_registers_may_be_for_plans_without_a_rule(feature):
    """With it the rule of a video spills on sm_100, and without it plain blocks do."""
    features = compile_report.FEATURES[feature]
    calls = compile_report.calls_for(256, torch.float32, features, (10, 0))
    has_rule = feature in ("rule", "video_rule", "local", "raster", "box")
    assert ("maxnreg" in calls["dq"].options()) == (not has_rule)
    assert calls["forward"].options()["maxnreg"] == 255


def test_launch_sizes_differ_by_architecture_and_dtype():
    half = {launch_config(128, torch.float16, capability) for capability in CAPABILITIES}
    assert len(half) == 5
    assert launch_config(128, torch.float16, (8, 9)) == launch_config(128, torch.bfloat16, (12, 0))
    assert launch_config(64, torch.float16, (8, 9)) != launch_config(64, torch.bfloat16, (12, 0))
    assert launch_config(64, torch.float32, (9, 0)) not in half


PTXAS = """ptxas info    : Compiling entry function 'forward_kernel' for 'sm_90a'
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


def fake_compiled(**assembly):
    ttgir = "%1 = scf.for {\n ttg.warp_group_dot\n}"
    return SimpleNamespace(metadata=SimpleNamespace(shared=4096), asm={"ttgir": ttgir} | assembly)


@pytest.mark.parametrize("stack, spill, bytes_", [(0, 0, 0), (16, 12, 16), (8, 40, 40)])
def test_spills_are_read_from_the_assembler(stack, spill, bytes_):
    log = PTXAS.format(stack=stack, spill=spill)
    found = compile_report.measure(fake_compiled(ptx="wgmma.mma_async.sync"), log)
    assert (found["spilled_bytes"], found["registers"]) == (bytes_, 168)
    assert (found["matrix_unit"], found["shared_bytes"]) == ("wgmma", 4096)


@pytest.mark.parametrize("private, spilled, bytes_", [(0, 0, 0), (132, 20, 132), (0, 3, 12)])
def test_spills_are_read_from_amd_assembly(private, spilled, bytes_):
    amdgcn = (
        f".private_segment_fixed_size: {private}\n.vgpr_count: 301\n"
        f".vgpr_spill_count: {spilled}\nv_mfma_f32_16x16x16_f16"
    )
    found = compile_report.measure(fake_compiled(amdgcn=amdgcn), "")
    assert (found["spilled_bytes"], found["registers"]) == (bytes_, 301)
    assert found["matrix_unit"] == "mfma"


LOAD = "%3 = tt.load %2 : tensor<64x128x!tt.ptr<f16>, #blocked>"
COPY = "%3 = ttg.async_copy_global_to_local %2, %b : tensor<64x128x!tt.ptr<f16>, #blocked>"
SMALL = "%4 = tt.load %5 : tensor<64x!tt.ptr<i32>, #slice>"


@pytest.mark.parametrize(
    "loops, expected",
    [
        ([["ttng.warp_group_dot", COPY, SMALL]], True),
        ([["ttng.warp_group_dot", LOAD]], False),
        ([["ttng.warp_group_dot", COPY, LOAD]], False),
        ([["ttng.tc_gen5_mma", COPY], ["tt.dot", LOAD]], False),
        ([["ttng.tc_gen5_mma", COPY], [LOAD]], True),
        ([[LOAD]], False),
    ],
)
def test_async_loads_are_told_from_loads_through_registers(loops, expected):
    text = "".join(
        f"  %{n} = scf.for %i = %a to %b {{\n" + "".join(f"    {x}\n" for x in body) + "  }\n"
        for n, body in enumerate(loops)
    )
    assert compile_report.has_async_loads(text) == expected


def row_of(**values):
    row = dict.fromkeys(compile_report.Compiled.__dataclass_fields__, 0)
    loop = dict.fromkeys(compile_report.Loop.__dataclass_fields__, 0) | {"tile": "64x32"}
    row |= {"target": "sm_90", "blocks": 1, "loops": (compile_report.Loop(**loop),)} | values
    return compile_report.Compiled(**row)


@pytest.mark.parametrize("values, code", [({}, 0), ({"spilled_bytes": 8}, 1), ({"blocks": 0}, 1)])
def test_exit_code_and_last_line(values, code, monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "report", lambda *_: [row_of(**values)])
    wanted = ["--targets", "sm_75", "sm_90", "gfx1100"]
    assert main(["bench", "kernels", "--static", *wanted]) == code
    *refused, names, cells, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in refused] == ["sm_75", "gfx1100"]
    assert all("refused: no launch sizes are known to fit" in line for line in refused)
    assert cells.split()[0] == "sm_90" and len(cells.split()) == len(names.split())
    found = json.loads(last)
    assert found["kernels"][0]["loops"][0]["tile"] == "64x32"
    assert list(found["refused"]) == ["sm_75", "gfx1100"]


def test_it_measures_nothing(capsys):
    assert main(["bench", "kernels"]) == 2
    assert "needs --static" in capsys.readouterr().err


def test_the_command_knows_what_there_is_to_compile():
    for name in ("TARGETS", "KERNELS", "DTYPES", "FEATURES"):
        assert getattr(command, name) == tuple(getattr(compile_report, name))
    assert set(MULTIPROCESSORS) == {x for x in command.TARGETS if not compile_report.refusal(x)}


LOOP = """
.L_x_{n}:
{body}
        /*0090*/               @P0 BRA `(.L_x_{n}) ;
"""
MMA = "        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;\n"
EXP = "        /*0000*/                   MUFU.EX2 R4, R8 ;\n"


def loops_of(*bodies, kernel="forward", metric=0, num_warps=4):
    """What is read from loops of 16 x 16 tiles, and 16 x 8 ones under a rule."""
    code = "".join(LOOP.format(n=n, body=body) for n, body in enumerate(bodies))
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 128, "METRIC": metric, "RULE_BLOCK": 8}
    call = SimpleNamespace(arguments=sizes, config=KernelConfig(16, 16, num_warps, 2))
    one = MULTIPROCESSORS["sm_80"]
    return compile_report.inner_loops(kernel, call, read_sass(code), "mma", num_warps, one)


def test_what_is_said_of_a_loop():
    # Two products of 16 x 16 x 128: 32 instructions of 16 x 8 x 16, 8 for each of four warps.
    (loop,) = loops_of(8 * MMA + 10 * EXP)
    assert (loop.walk, loop.tile, loop.steps) == ("full", "16x16", 1)
    assert (loop.instructions, loop.matrix, loop.special) == (19, 8, 10)
    assert loop.cycles == {"issue": 19, "special": 80, "vector": 0, "matrix": 64}
    assert (loop.of_peak, loop.of_peak_apart) == (64 / 80, 64 / 144)
    # The same, unrolled once, is the same for each step but for the jump.
    (twice,) = loops_of(16 * MMA + 20 * EXP)
    assert (twice.steps, twice.instructions, twice.of_peak) == (2, 18.5, 64 / 80)


def test_loops_under_a_rule_and_of_other_kernels():
    full, partial = loops_of(8 * MMA, 4 * MMA + 30 * EXP, metric=1)
    assert (full.walk, partial.walk, partial.tile) == ("full", "partial", "16x8")
    assert full.of_peak == 1 and partial.of_peak == 32 / 240
    full, partial = loops_of(16 * MMA, 8 * MMA, kernel="dkv", metric=1)
    assert (full.tile, partial.tile) == ("16x16", "8x16")
    assert loops_of(kernel="delta") == ()


@pytest.mark.parametrize("bodies, metric", [((8 * MMA,), 1), ((8 * MMA,) * 2, 0), ((MMA,), 0)])
def test_other_loops_than_the_kernel_has_are_not_read(bodies, metric):
    with pytest.raises(RuntimeError, match=r"expected|operations, not"):
        loops_of(*bodies, metric=metric)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
def test_interpreted_kernels_are_not_compiled():
    feature = compile_report.FEATURES["plain"]
    call = compile_report.calls_for(64, torch.float16, feature, (8, 0))["forward"]
    assert isinstance(call, triton_backend.Call)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_report.compile_call(call, compile_report.TARGETS["sm_80"])
