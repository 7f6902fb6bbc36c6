"""What is read from the machine code, on text made for the test."""

from tools.compiled.machine_code import Loop, innermost_loops, main_loop, repeated, waits

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
WAIT = "        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [%s], instrShape = [16, 64, 16]}>
    %%5 = ttng.warp_group_dot %%a, %%b, %%c : tensor<64x64xbf16> * !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32, #mma>
"""


def test_loops_are_told_apart() -> None:
    assert innermost_loops(SASS) == [Loop(3, 1), Loop(5, 1)]


def test_the_main_loop_has_most_products_and_no_masks() -> None:
    plain, masked, edge = Loop(320, 8), Loop(450, 8), Loop(214, 5)
    assert main_loop([plain, masked]) == main_loop([masked, plain]) == main_loop([plain, edge]) == plain
    assert main_loop([Loop(860, 8), Loop(429, 16)]) == Loop(429, 16)  # two passes
    assert main_loop([Loop(320, 0)]) is None
    assert main_loop([]) is None


def test_waits_for_products_are_counted() -> None:
    copies = SASS + "        /*00c0*/                   LDGDEPBAR ;\n        /*00d0*/                   DEPBAR.LE SB0, 0x0 ;\n"
    assert waits(copies) == {"products": 2, "waits": 0}
    assert waits(copies + WAIT) == {"products": 2, "waits": 1}


def test_warps_beyond_the_tile_repeat_it() -> None:
    assert repeated(TTGIR % "4, 1") == 1
    assert repeated(TTGIR % "8, 1") == 2
    assert repeated(TTGIR % "4, 2") == 2
    assert repeated("no product") == 1
