"""The benchmark of compiled programs reads their text."""

from benchmarks import compiled

TEXT = """
%body (p: (f32[8])) -> (f32[8]) {
  %all-reduce.2 = f32[8]{0:T(128)} all-reduce(%fusion.1), channel_id=3, to_apply=%region_0.1
}

ENTRY %main (w: f32[3,128]) -> f32[3,128] {
  %all-reduce-start = (f32[2,128]{1,0}, u32[]) all-reduce-start(%a, %b), to_apply=%region_0.1
  %all-reduce-done = (f32[2,128]{1,0}, u32[]) all-reduce-done(%all-reduce-start)
  %fusion.2 = f32[8]{0} fusion(%all-reduce.2, %all-gather.1), kind=kLoop, calls=%fused
  ROOT %all-gather.1 = pred[4,4]{1,0:T(8,128)(4,1)} all-gather(%c), dimensions={0}
}
"""


def test_collectives_and_their_bytes_are_read_from_the_text():
    assert compiled.collectives(TEXT) == (
        "2 all-reduce of 32 to 1,028 bytes, 1,060 in all; 1 all-gather of 16 to 16 bytes, 16 in all"
    )
    assert compiled.collectives("%fusion.2 = f32[8]{0} fusion(%all-reduce.2)") == ""
