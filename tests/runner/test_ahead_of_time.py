"""What is read off compiled programs, on lines that compilers wrote."""

from __future__ import annotations

import pytest

from jaxserve.runner.ahead_of_time import (
    Collective,
    aliased_parameters,
    collectives_of,
    copies_of,
    read_instructions,
)

POOL = (1000, 128, 16, 128)
SCALES = (1000, 16, 128)
TYPE = "bf16[1000,128,16,128]{3,2,1,0:T(8,128)(2,1)}"
SMALL = "bf16[64,4096]{1,0:T(8,128)(2,1)}"


def copies(line: str) -> list[str]:
    return [each.text for each in copies_of(read_instructions(line), [POOL, SCALES])]


@pytest.mark.parametrize(
    "line",
    [
        f'%copy.1 = {TYPE} copy(%param.3), metadata={{op_name="jit(step)"}}',
        f"ROOT %copy.2 = {TYPE} copy({TYPE} %param.3)",
        f"%copy-start.7 = ({TYPE}, {TYPE}, u32[]{{:S(2)}}) copy-start(%param.3)",
        f"%copy-start.8 = ({TYPE[:-1]}S(1)}}, {TYPE}, u32[]{{:S(2)}}) copy-start({TYPE} %param.3)",
        "transpose.5 = bf16[1000,16,128,128]{3,1,2,0:T(8,128)} transpose(%p), dimensions={0,2,1,3}",
        "%all-gather.1 = bf16[1000,128,128,128]{3,2,1,0} all-gather(%param.3), dimensions={2}",
        "%copy.3 = f32[1000,16,128]{2,1,0:T(8,128)} copy(%param.4)",
    ],
)
def test_copies_of_a_cache_are_found(line: str) -> None:
    assert copies(f"  {line}\n") == [line]


@pytest.mark.parametrize(
    "line",
    [
        f"%copy.1 = {SMALL} copy(%param.3)",
        f"%copy-start.1 = ({SMALL}, {SMALL}, u32[]{{:S(2)}}) copy-start(%fusion.3)",
        "%copy.4 = f32[16,1000,128]{2,1,0:T(8,128)} copy(%fusion.4)",  # as large as the scales
        f"%transpose.5 = {SMALL} transpose(%fusion.3), dimensions={{1,0}}",
        f"%all-reduce.1 = {SMALL} all-reduce(%fusion.3), to_apply=%add",
        f'%custom-call.1 = ({TYPE}, {SMALL}) custom-call(%copy.1), custom_call_target="tpu_custom_call"',
        f"%copy-done.7 = {TYPE} copy-done(%copy-start.7)",  # its start is what counts
        f"%bitcast.1 = {TYPE} bitcast(%param.3)",
    ],
)
def test_what_is_small_or_no_copy_is_left_out(line: str) -> None:
    assert copies(f"  {line}\n") == []


def test_lines_give_their_instruction_whole() -> None:
    """One instruction a line, though the last has no line break."""
    text = (
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %a = {SMALL} add(%b, %c)\n  ROOT %d = f32[8]{{0}} copy(%e)"
    )
    first, second = read_instructions(text)
    assert (first.op, first.text) == ("add", f"%a = {SMALL} add(%b, %c)")
    assert (second.op, second.text) == ("copy", "ROOT %d = f32[8]{0} copy(%e)")
    assert [array.num_bytes for array in first.arrays + second.arrays] == [2 * 64 * 4096, 32]


def test_collectives_are_counted_by_the_bytes_of_their_result() -> None:
    text = f"""
  %all-reduce.1 = {SMALL} all-reduce(%a), to_apply=%add
  %all-reduce.2 = {SMALL} all-reduce(%b), to_apply=%add
  %all-reduce-start.1 = {SMALL} all-reduce-start(%c), to_apply=%add
  %all-reduce-done.1 = {SMALL} all-reduce-done(%all-reduce-start.1)
  %all-gather.1 = (s32[64,160]{{1,0}}, f32[64,160]{{1,0}}) all-gather(%d, %e), dimensions={{1}}
"""
    assert collectives_of(read_instructions(text)) == {
        Collective("all-reduce", 64 * 4096 * 2): 3,
        Collective("all-gather", 2 * 64 * 160 * 4): 1,
    }


def test_aliases_are_read_from_the_header_only() -> None:
    header = (
        "HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (5, {}, may-alias), "
        "{1,0}: (12, {}, must-alias) }, entry_computation_layout={(f32[8]{0})->f32[8]{0}}"
    )
    body = "  %c = f32[8]{0} custom-call(%p), output_to_operand_aliasing={{}: (0, {})}"
    assert aliased_parameters(f"{header}\n{body}\n{{7}}: (7, {{}}, may-alias)") == {5, 12}
    assert aliased_parameters(f"HloModule jit_step\n{body}") == frozenset()
