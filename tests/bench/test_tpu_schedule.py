from __future__ import annotations

import pytest

from bench.tpu_schedule import Bundle, Schedule, read_bundles, read_schedule

DUMP = """\
= control target key start
LB: loop body
     0   :  { %s1 = smov 0 }
  0x1 LB: > { %s2 = sld [smem:[#allocation1]] }
  0x2 LB: >> { %s3 = sld [smem:[#allocation2]] }
  0x3   : >> { %s4 = sadd.s32 1, %s3 ;;  %5 = dma.hbm_to_vmem [thread:$0] }
  0x4   : >> { %6 = sbr.rel (%p1) target = $region2 }
  0x5 PF: > { %s7 = smov 0 }
  0x6 LB: >> { %8 = dma.done.wait [#allocation3], 128 }
  0x7   : >> { %9 = sbr.rel (%p2) target = $region3 }
  0x8   : > { %v1 = vld [vmem:[#allocation4]] }
  0x9   : > { %v2 = vmatmul.mubr.bf16.gmra.mxu0 %v1 }
  0xa   : > { %10 = sbr.rel (%p3) target = $region1 }
  0xb   :  { %11 = vsyncpa }
"""


def test_bundles_have_their_address_and_loops() -> None:
    bundles = read_bundles(DUMP)
    assert bundles[0] == Bundle(0, 0, " %s1 = smov 0 }")
    assert [(bundle.address, bundle.depth) for bundle in bundles[1:4]] == [(1, 1), (2, 2), (3, 2)]
    assert len(bundles) == 12


def test_the_loop_that_multiplies_is_read() -> None:
    assert read_schedule(read_bundles(DUMP)) == Schedule(compute=3, per_page=5, starts_first=True)


def test_copies_that_start_after_the_wait_are_noticed() -> None:
    swapped = DUMP.replace("dma.hbm_to_vmem", "X").replace("dma.done.wait", "dma.hbm_to_vmem")
    swapped = swapped.replace("X", "dma.done.wait")
    assert not read_schedule(read_bundles(swapped)).starts_first


def test_a_program_without_products_is_no_schedule() -> None:
    with pytest.raises(ValueError, match="no piece of the program multiplies"):
        read_schedule(read_bundles(DUMP.replace("vmatmul", "vadd")))
