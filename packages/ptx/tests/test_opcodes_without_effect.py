"""Opcodes that change no result here run and leave registers and memory alone; clocks go forward."""

from __future__ import annotations

import torch

from tests.helpers.programs import run

WITHOUT_EFFECT = """
    nanosleep.u32 20;
    prefetch.global.L2 [%rd100];
    prefetch.L1 [%rd100];
    discard.global.L2 [%rd101], 128;
    applypriority.global.L2::evict_normal [%rd101], 128;
    griddepcontrol.wait;
    griddepcontrol.launch_dependents;
    setmaxnreg.inc.sync.aligned.u32 64;
    fence.mbarrier_init.release.cluster;
    fence.proxy.alias;
    fence.acq_rel.gpu;
    membar.gl;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
"""


def test_opcodes_without_effect():
    words, untouched = torch.zeros(32, dtype=torch.int32), torch.arange(64, dtype=torch.int32)
    launch = run(f"mov.u32 %r10, %r1; {WITHOUT_EFFECT} st.global.u32 [%rd100], %r10; ret;", words, untouched)
    assert launch.findings == []
    assert words.tolist() == list(range(32))
    assert untouched.tolist() == list(range(64))


def test_clocks_go_forward():  # mov of %clock and %clock64: rows clock.b32 and clock.b64
    words = torch.zeros(32, dtype=torch.int64)
    run(
        """
        mov.u32 %r10, %clock; mov.u64 %rd110, %clock64;
        add.u32 %r11, %r10, %r10;
        mov.u32 %r12, %clock; mov.u64 %rd111, %clock64;
        setp.gt.u32 %p2, %r12, %r10;
        setp.gt.u64 %p3, %rd111, %rd110;
        and.pred %p2, %p2, %p3;
        selp.u64 %rd112, 1, 0, %p2;
        mad.wide.u32 %rd113, %r0, 8, %rd0;
        st.global.u64 [%rd113], %rd112;
        """,
        words,
    )
    assert words.tolist() == [1] * 32
