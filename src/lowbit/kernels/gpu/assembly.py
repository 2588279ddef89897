"""PTX for what Triton has no words for: bytes that become 16-bit floats, two in a register.

Triton takes such bytes apart, shifts and masks each by itself and puts the results together again: 2.3
instructions a code of 4 bits where these take 1.5, 5 an e2m1 for 3, 11 an e4m3 for 4.5. Two bytes come in the
lower half of a register, two floats go out. Source of the instructions: PTX ISA 8.5, from capability 8.0 on.
Triton's interpreter runs no PTX: who calls these has another form there, and the tests run the text by
themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

# prmt.b32 with 0x4140 puts each of two bytes below a zero byte, with 0x1404 above one. lop3.b32's table 0xEA
# is a & b | c. fma.rn multiplies for capabilities that have no mul.bf16x2; adding -0 keeps a zero's sign.


@triton.constexpr_function
def assembled(lines: list[str]) -> str:
    """A block of instructions with the registers that these functions use."""
    return "\n".join(["{", ".reg .b32 a, b, f, z;", *lines, "}"])


@triton.constexpr_function
def low_bits_text(shift: int, bits: int, bfloat16: bool) -> list[str]:
    """``bits`` bits of each byte, from ``shift`` on, behind the significand of 128 (bfloat16) or 1,024."""
    mask, base = ((1 << bits) - 1) * 0x10001, 0x43004300 if bfloat16 else 0x64006400
    moved = [f"shr.u32 a, a, {shift};"] if shift else []
    return ["prmt.b32 a, $1, 0, 0x4140;", *moved, f"lop3.b32 $0, a, {mask:#010x}, {base:#010x}, 0xEA;"]


@triton.constexpr_function
def high_bits_text(place: int, bits: int) -> list[str]:
    """``bits`` bits of each byte of another plane, which the shift $3 of bytes in upper halves brings to
    ``place``, into the significand too."""
    mask = (((1 << bits) - 1) << place) * 0x10001
    return ["prmt.b32 b, $2, 0, 0x1404;", "shr.u32 b, b, $3;", f"lop3.b32 $0, b, {mask:#010x}, $0, 0xEA;"]


@triton.constexpr_function
def byte_text(bfloat16: bool) -> list[str]:
    """An int8: itself (bfloat16), or 128 more behind the significand of 1,024.

    7 bits behind the significand of 128 are as much more, and the sign makes 256 of the 128 to be subtracted.
    """
    if not bfloat16:
        return ["prmt.b32 a, $1, 0, 0x4140;", "xor.b32 $0, a, 0x64806480;"]
    return [
        "prmt.b32 a, $1, 0, 0x4140;",
        "mov.b32 f, 0x3F803F80;",
        "lop3.b32 b, a, 0x00800080, 0xC300C300, 0xEA;",
        "lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;",
        "fma.rn.bf16x2 $0, a, f, b;",
    ]


@triton.constexpr_function
def small_float_text(kind: str, field: int, bfloat16: bool) -> list[str]:
    """An e4m3, or the e2m1 in the lower (``field`` 0) or upper half of a byte, exactly.

    Sign, exponent and significand go where the 16-bit float has them; its other bias is a factor.
    """
    if kind == "e2m1":
        down, numbers, factor = (6, 0x01C001C0, 0x7E807E80) if bfloat16 else (3, 0x0E000E00, 0x74007400)
    else:
        down, numbers, factor = (4, 0x07F007F0, 0x7B807B80) if bfloat16 else (1, 0x3F803F80, 0x5C005C00)
    lifted = ["prmt.b32 a, $1, 0, 0x1404;"]
    if kind == "e2m1" and field == 0:
        lifted.append("shl.b32 a, a, 4;")
    placed = [
        f"mov.b32 f, {factor:#010x};",
        "mov.b32 z, 0x80008000;",
        f"shr.u32 b, a, {down};",
        f"and.b32 b, b, {numbers:#010x};",
        "lop3.b32 b, a, z, b, 0xEA;",
        f"fma.rn.{'bf16x2' if bfloat16 else 'f16x2'} $0, b, f, z;",
    ]
    if kind == "e2m1":
        return [*lifted, *placed]
    special = [  # 127 more than a sign is no number: one more has the upper bit, which becomes all bits
        "and.b32 a, a, 0x7F007F00;",
        "add.u32 a, a, 0x01000100;",
        "prmt.b32 a, a, 0, 0xBB99;",
        "lop3.b32 $0, a, 0x7FFF7FFF, $0, 0xEA;",
    ]
    return [*lifted, *placed, *special]


@triton.jit
def _halves(bytes, TEXT: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.bfloat16 == TYPE:
        found = tl.inline_asm_elementwise(TEXT, "=&r,r", [bytes], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        found = tl.inline_asm_elementwise(TEXT, "=&r,r", [bytes], dtype=tl.float16, is_pure=True, pack=2)
    return found


@triton.jit
def _two_plane_halves(low, high, shift, TEXT: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.bfloat16 == TYPE:
        found = tl.inline_asm_elementwise(
            TEXT, "=&r,r,r,r,r", [low, high, shift], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        found = tl.inline_asm_elementwise(
            TEXT, "=&r,r,r,r,r", [low, high, shift], dtype=tl.float16, is_pure=True, pack=2
        )
    return found


@triton.jit
def whole_halves(  # type: ignore[no-untyped-def]
    low, high, shift, SHIFT: tl.constexpr, WIDTH: tl.constexpr, MORE: tl.constexpr, TYPE: tl.constexpr
):
    """TYPE: 128 (bfloat16) or 1,024 (float16) more than WIDTH bits of uint8 ``low``, from bit SHIFT on, and
    MORE bits above them of ``high``, from bit ``shift`` on. 8 bits are int8, 128 (bfloat16) or 1,152 more."""
    BRAIN: tl.constexpr = tl.bfloat16 == TYPE
    if WIDTH == 8:
        found = _halves(low, assembled(byte_text(BRAIN)), TYPE)
    elif MORE == 0:
        found = _halves(low, assembled(low_bits_text(SHIFT, WIDTH, BRAIN)), TYPE)
    else:
        text: tl.constexpr = assembled(low_bits_text(SHIFT, WIDTH, BRAIN) + high_bits_text(WIDTH, MORE))
        found = _two_plane_halves(low, high, shift + (8 - WIDTH), text, TYPE)
    return found


@triton.jit
def small_float_halves(bytes, KIND: tl.constexpr, FIELD: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """TYPE: what uint8 ``bytes``, or a half of them, are worth as e4m3 or e2m1."""
    return _halves(bytes, assembled(small_float_text(KIND, FIELD, tl.bfloat16 == TYPE)), TYPE)
