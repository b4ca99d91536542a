"""The count of bytes moved, on a made program."""

from tests.plan.traffic import main_memory_bytes

TEXT = """HloModule jit_f

%fused (p: f32[1024], q: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %q = f32[1024]{0} parameter(1)
  ROOT %sum = f32[1024]{0} add(%p, %q)
}

%cut (r: f32[1024], s: s32[]) -> f32[256] {
  %r = f32[1024]{0} parameter(0)
  %s = s32[] parameter(1)
  %flat = f32[1024]{0} bitcast(%r)
  ROOT %piece = f32[256]{0} dynamic-slice(%flat, %s), dynamic_slice_sizes={256}
}

%step (carry: (s32[], f32[1024], f32[256])) -> (s32[], f32[1024], f32[256]) {
  %carry = (s32[], f32[1024]{0}, f32[256]{0:T(256)S(1)}) parameter(0)
  %at = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  %all = f32[1024]{0} get-tuple-element(%carry), index=1
  %taken = f32[256]{0:T(256)S(1)} fusion(%all, %at), kind=kLoop, calls=%cut
  ROOT %next = (s32[], f32[1024]{0}, f32[256]{0:T(256)S(1)}) tuple(%at, %all, %taken)
}

%more (carry.1: (s32[], f32[1024], f32[256])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[1024]{0:T(1024)S(1)} copy-done(%start)
  %slice = ((f32[1024]{0:T(1024)}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%a)
  %part = f32[256]{0:T(256)S(1)} slice-done(%slice)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %begin = (s32[], f32[1024]{0}, f32[256]{0:T(256)S(1)}) tuple(%zero, %a, %part)
  %loop = (s32[], f32[1024]{0}, f32[256]{0:T(256)S(1)}) while(%begin), CALLED
  %inside = f32[1024]{0:T(1024)S(1)} fusion(%done, %a), kind=kLoop, calls=%fused
  %view = f32[1024]{0} bitcast(%a)
  ROOT %out = f32[1024]{0:T(1024)} fusion(%inside, %view), kind=kLoop, calls=%fused
}
""".replace("CALLED", 'condition=%more, body=%step, backend_config={"known_trip_count":{"n":"4"}}')


def test_what_stays_in_vector_memory_moves_nothing():
    copied, sliced, inside, read, written = 4096, 1024, 4096, 4096, 4096
    looped = 4 * 1024
    assert main_memory_bytes(TEXT) == copied + sliced + looped + inside + read + written


def test_what_a_loop_reads_whole_counts_each_time():
    whole = TEXT.replace("dynamic-slice(%flat, %s), dynamic_slice_sizes={256}", "negate(%flat)")
    assert main_memory_bytes(whole) - main_memory_bytes(TEXT) == 4 * (4096 - 1024)


def test_what_is_fetched_for_the_next_call_counts_once():
    """A program that fetches an operand ahead at its end fetches it at its first call as well."""
    start = "%start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)"
    ahead = TEXT.replace(start, start + ", cross_program_prefetch_index=0")
    assert main_memory_bytes(ahead) == main_memory_bytes(TEXT)
    end = "  %view = f32[1024]{0} bitcast(%a)\n"
    both = ahead.replace(end, end + "  " + start.replace("%start", "%again") + "\n")
    assert main_memory_bytes(both) == main_memory_bytes(TEXT)
    unmarked = TEXT.replace(end, end + "  " + start.replace("%start", "%again") + "\n")
    assert main_memory_bytes(unmarked) == main_memory_bytes(TEXT) + 4096
