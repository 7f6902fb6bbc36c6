"""What is read from the machine code, on text made for the test."""

from __future__ import annotations

from tools.compiled.machine_code import Loop, innermost_loops, main_loop, repeated

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/                   MUFU.EX2 R3, R3 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   S2R R0, SR_TID.X ;
.L_x_3:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/              @!P1 MUFU.EX2 R3, R3 ;
        /*0070*/                   MUFU.TANH R3, R3 ;
        /*0080*/                   ISETP.GE.AND P2, PT, R0, R4, PT ;
        /*0090*/              @!P2 BRA `(.L_x_3) ;
        /*00a0*/               @P3 BRA `(.L_x_2) ;
        /*00b0*/                   EXIT ;
"""
TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [%s], instrShape = [16, 64, 16]}>
    %%5 = ttng.warp_group_dot %%a, %%b, %%c : tensor<64x64xbf16> * !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32, #mma>
"""


def test_loops_are_told_apart() -> None:
    assert innermost_loops(SASS) == [Loop(3, 1, 1), Loop(5, 1, 2)]


def test_the_main_loop_is_that_of_whole_tiles() -> None:
    plain, masked, edge = Loop(320, 8, 34), Loop(450, 8, 34), Loop(214, 5, 10)
    assert main_loop([plain, masked], (128, 64), 64) == main_loop([masked, plain], (128, 64), None) == plain
    assert main_loop([plain, edge], (128, 64), 16) == plain
    assert main_loop([Loop(268, 4, 32), Loop(86, 8, 8)], (64, 64), 16) == Loop(268, 4, 32)  # of smaller instructions it has more
    assert main_loop([Loop(860, 8, 16), Loop(429, 16, 8)], (32, 32), 32) == Loop(429, 16, 8)  # two passes
    assert main_loop([Loop(320, 0, 34)], (32, 32), 16) is None
    assert main_loop([], (64, 64), None) is None


def test_warps_beyond_the_tile_repeat_it() -> None:
    assert repeated(TTGIR % "4, 1") == 1
    assert repeated(TTGIR % "8, 1") == 2
    assert repeated(TTGIR % "4, 2") == 2
    assert repeated("no product") == 1
