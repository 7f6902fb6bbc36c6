"""Descriptors of products that are computed from parameters, on machine code made for the test."""

from tools.compiled.descriptors import stale_descriptors

# As ptxas of CUDA 12.9 has it: UR6 and UR7 come from the address of shared memory, which is in UR8
RIGHT = """
        /*0000*/                   ULDC.64 UR6, c[0x0][0x218] ;
        /*0010*/                   IMAD.WIDE.U32 R4, R5, UR6, RZ ;
        /*0020*/                   S2UR UR4, SR_CgaCtaId ;
        /*0030*/                   UMOV UR8, 0x400 ;
        /*0040*/                   ULEA UR8, UR4, UR8, 0x18 ;
        /*0050*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR8 ;
        /*0060*/                   UMOV UR7, 0xc0000010 ;
        /*0070*/                   UIADD3 UR6, UP0, UR6, 0x20, URZ ;
        /*0080*/                   UIADD3.X UR7, UR7, URZ, URZ, UP0, !UPT ;
        /*0090*/                   IMAD.U32 R112, RZ, RZ, UR6 ;
        /*00a0*/                   IMAD.U32 R113, RZ, RZ, UR7 ;
.L_x_1:
        /*00b0*/                   LDG.E.64 R24, desc[UR10][R4.64] ;
        /*00c0*/                   R2UR UR22, R112 ;
        /*00d0*/                   R2UR UR23, R113 ;
        /*00e0*/                   HGMMA.64x16x16.F32 R24, R36, gdesc[UR20].tnspB, R24, gsb0 ;
        /*00f0*/               @P0 BRA `(.L_x_1) ;
        /*0100*/                   EXIT ;
"""
SHIFT = "        /*0050*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR8 ;\n"
STRIDE = "HGMMA.64x16x16.F32 R24, R36, gdesc[UR20].tnspB, R24, gsb0: ULDC.64 UR6, c[0x0][0x218]"


def test_descriptors_of_shared_memory() -> None:
    assert stale_descriptors(RIGHT) == []


def test_a_copy_that_ptxas_drops() -> None:
    """As ptxas of CUDA 12.8 compiles `_rows_kernel`: UR6 still holds a stride."""
    assert SHIFT in RIGHT
    assert stale_descriptors(RIGHT.replace(SHIFT, "")) == [STRIDE]


def test_a_copy_on_one_path_alone() -> None:
    assert stale_descriptors(RIGHT.replace(SHIFT, SHIFT.replace("    USHF", "@P1 USHF"))) == [STRIDE]
    around = f"        /*0048*/               @P1 BRA `(.L_x_0) ;\n{SHIFT}.L_x_0:\n"
    assert stale_descriptors(RIGHT.replace(SHIFT, around)) == [STRIDE]


def test_the_second_register_of_a_pair() -> None:
    """A load of 64 bits leaves its upper half in the descriptor, and CS2R clears both."""
    upper = RIGHT.replace("UMOV UR7, 0xc0000010", "UMOV UR9, 0xc0000010")
    assert stale_descriptors(upper) == [STRIDE]
    assert stale_descriptors(upper.replace("R2UR UR22, R112", "CS2R R112, SRZ")) == []


def test_both_operands_in_shared_memory() -> None:
    """Without a left operand in registers the first two registers are a descriptor, too."""
    both = RIGHT.replace("R24, R36, gdesc[UR20].tnspB, R24", "R24, gdesc[UR20], R24")
    assert stale_descriptors(both) == []
    assert stale_descriptors(both.replace("UMOV UR8, 0x400", "ULDC UR20, c[0x0][0x274]")) != []
