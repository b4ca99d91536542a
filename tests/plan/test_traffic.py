"""The count of bytes moved, on a made program."""

from tests.plan.traffic import main_memory_bytes

TEXT = """HloModule jit_f

%fused (p: f32[4]) -> f32[4] {
  ROOT %negate = f32[4]{0} negate(%p)
}

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[1024]{0:T(1024)S(1)} copy-done(%start)
  %slice = ((f32[1024]{0:T(1024)}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%a)
  %part = f32[256]{0:T(256)S(1)} slice-done(%slice)
  %inside = f32[1024]{0:T(1024)S(1)} fusion(%done, %part), kind=kLoop, calls=%fused
  %view = bf16[2048]{0} bitcast(%a)
  ROOT %out = f32[1024]{0:T(1024)} fusion(%inside, %view), kind=kLoop, calls=%fused
}
"""


def test_what_stays_in_vector_memory_moves_nothing():
    copied, sliced, read, written = 4096, 1024, 4096, 4096
    assert main_memory_bytes(TEXT) == copied + sliced + read + written
