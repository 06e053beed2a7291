"""Loops and instructions in machine code that was written by hand, and what follows from them."""

import pytest

from dittfast.kernels.machine_code import counted, matrix_loops, read_amdgcn, read_sass
from dittfast.kernels.multiprocessors import MULTIPROCESSORS

# A loop with a wait whose retries stand behind the end, and with another loop that only waits.
SASS = """
	code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], RZ, !UPT ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0040*/              @!P0 BRA `(.L_x_4) ;
.L_x_5:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], RZ, !UPT ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, R24 ;
        /*0070*/                   MUFU.EX2 R3, R4 ;
        /*0080*/                   FFMA R3, R4, R5, -R6 ;
        /*0090*/              @!P4 LDGSTS.E.BYPASS.128 [R107], desc[UR14][R88.64] ;
        /*00a0*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*00b0*/               @P1 BRA `(.L_x_6) ;
        /*00c0*/                   FADD R3, R4, R5 ;
.L_x_6:
        /*00d0*/                   IMAD.WIDE R2, R0, R6, RZ ;
        /*00e0*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_2:
        /*00f0*/                   FFMA R3, R4, R5, -R6 ;
.L_x_3:
        /*0100*/                   MUFU.RCP R3, R4 ;
        /*0110*/              @!P0 BRA `(.L_x_3) ;
        /*0120*/                   EXIT ;
.L_x_4:
        /*0130*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0140*/              @!P0 BRA `(.L_x_4) ;
        /*0150*/                   BRA `(.L_x_5) ;
.L_x_7:
        /*0160*/                   BRA `(.L_x_7) ;
        /*0170*/                   NOP ;
"""


def test_a_loop_of_sass():
    code = read_sass(SASS)
    assert len(code) == 24
    (body,) = matrix_loops(code)
    # 12 in the loop and the jump back to it from the retries; these themselves are another loop.
    assert counted(body) == {
        "instructions": 13, "matrix": 2, "async_loads": 2, "special": 1, "vector": 2,
    }  # fmt: skip
    # A quarter of 64 x 64 x 16 and of 64 x 128 x 16 for each of four warps.
    assert [x.flops for x in body if x.is_matrix] == [32768, 65536]


def test_nested_loops_count_by_themselves():
    inner = SASS.replace("@P1 BRA `(.L_x_6)", "@P1 BRA `(.L_x_5)")
    (body,) = matrix_loops(read_sass(inner))
    # From .L_x_5 to that jump; the loop around it multiplies nowhere else.
    assert counted(body)["instructions"] == 7
    assert matrix_loops(read_sass(SASS.replace("GMMA", "XXXX"))) == []
    both = SASS.replace("FADD R3, R4, R5", "BRA `(.L_x_1)")
    (body,) = matrix_loops(read_sass(both))
    assert counted(body)["instructions"] == 13 and counted(body)["vector"] == 1


AMDGCN = """
	.text
forward_kernel:                         ; @forward_kernel
.Lfunc_begin0:
	s_load_dwordx2 s[4:5], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Loop Header: Depth=1
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	v_mfma_f32_32x32x8_f16 a[0:15], v[4:5], v[6:7], a[0:15]
	v_exp_f32_e32 v1, v2
	v_pk_mul_f32 v[2:3], v[4:5], v[6:7]
	buffer_load_dwordx4 v1, s[8:11], 0 offen lds
	buffer_load_dwordx4 v[0:3], v1, s[8:11], 0 offen
	ds_read_b128 v[0:3], v4
	s_cbranch_vccnz .LBB0_1
; %bb.2:
	v_fma_f32 v1, v2, v3, v4
.LBB0_3:
	s_endpgm
.Lfunc_end0:
	.size	forward_kernel, .Lfunc_end0-forward_kernel
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
"""


def test_a_loop_of_amd():
    code = read_amdgcn(AMDGCN)
    assert len(code) == 12 and code[-2].flops == 128 and not code[-1].falls_through
    (body,) = matrix_loops(code)
    assert counted(body) == {
        "instructions": 8, "matrix": 2, "async_loads": 1, "special": 1, "vector": 2,
    }  # fmt: skip
    assert [x.flops for x in body if x.is_matrix] == [8192, 16384]


@pytest.mark.parametrize(
    "text, flops",
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 4096),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 2048),
        ("UTCHMMA gdesc[UR24], gdesc[UR4], tmem[UR21], tmem[UR28], idesc[UR29], !UPT", None),
        ("FFMA R1, R2, R3, R4", 64),
        ("FFMA2 R2, R4.F32x2.HI_LO, R6.F32x2.HI_LO, R8.F32x2.HI_LO", 128),
        ("FMUL R1, R2, R3", 0),
    ],
)
def test_operations_of_an_instruction(text, flops):
    (one,) = read_sass(f"        /*0000*/                   {text} ;")
    assert one.flops == flops


BLOCKS = [
    # target, warps, registers, shared bytes, tensor columns, blocks; what is scarce
    ("sm_80", 8, 32, 0, 0, 8),  # 64 warps
    ("sm_80", 8, 128, 0, 0, 2),  # 65,536 registers
    ("sm_80", 8, 129, 0, 0, 1),  # which come in eights for each thread
    ("sm_80", 4, 168, 0, 0, 3),
    ("sm_80", 4, 32, 54_000, 0, 3),  # 164 KiB, of which a block takes 1 KiB more than it asks for
    ("sm_80", 4, 32, 55_000, 0, 2),
    ("sm_80", 4, 32, 163 * 1024, 0, 1),
    ("sm_80", 4, 32, 163 * 1024 + 1, 0, 0),
    ("sm_80", 1, 16, 0, 0, 32),  # blocks
    ("sm_86", 1, 16, 0, 0, 16),
    ("sm_86", 8, 40, 0, 0, 6),  # 48 warps
    ("sm_89", 1, 16, 0, 0, 24),
    ("sm_90", 8, 168, 100_000, 0, 1),
    ("sm_90", 4, 128, 110_000, 0, 2),
    ("sm_100", 4, 64, 1000, 256, 2),  # 512 columns of tensor memory
    ("sm_120", 8, 80, 50_000, 0, 2),
    ("gfx942", 4, 128, 16_384, 0, 4),  # 512 registers, 64 KiB
    ("gfx942", 4, 129, 0, 0, 3),
    ("gfx942", 4, 325, 32_768, 0, 1),
    ("gfx942", 4, 32, 0, 0, 8),  # eight waves for each scheduler
    ("gfx942", 4, 32, 65_537, 0, 0),
]


@pytest.mark.parametrize("target, warps, registers, shared, columns, blocks", BLOCKS)
def test_blocks_of_a_multiprocessor(target, warps, registers, shared, columns, blocks):
    one = MULTIPROCESSORS[target]
    assert one.blocks_at_once(warps, registers, shared, columns) == blocks


def test_cycles_of_a_loop():
    (body,) = matrix_loops(read_sass(SASS))
    flops = 4 * (32768 + 65536)
    # Of four warps each scheduler has one; eight exponentials take as long as 64 others.
    expected = {"issue": 13, "special": 8, "vector": 2, "matrix": flops / 4096}
    assert MULTIPROCESSORS["sm_90"].cycles(body, 4, flops, True) == expected
    expected = {"issue": 26, "special": 16, "vector": 8, "matrix": flops / 128}
    assert MULTIPROCESSORS["sm_80"].cycles(body, 8, flops, False) == expected
    (body,) = matrix_loops(read_amdgcn(AMDGCN))
    expected = {"issue": 8, "special": 16, "vector": 20, "matrix": 2048 / 2048}
    assert MULTIPROCESSORS["gfx942"].cycles(body, 4, 2048, True) == expected


def test_matrix_rates_are_those_of_the_data_sheets():
    """Multiprocessors and boost clocks, against TFLOPS that are published for whole GPUs."""
    for target, tflops, count, clock in (
        ("sm_80", 312, 108, 1.41), ("sm_86", 71, 82, 1.695), ("sm_89", 165.2, 128, 2.52),
        ("sm_90", 989, 132, 1.83), ("sm_100", 2250, 148, 1.85), ("sm_120", 209.5, 170, 2.407),
        ("gfx942", 1307.4, 304, 2.1),
    ):  # fmt: skip
        rate = MULTIPROCESSORS[target].matrix_flops * count * clock / 1e3
        assert rate == pytest.approx(tflops, rel=0.02)
