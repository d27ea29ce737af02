from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tqstack.models.plan import Plan

sizes = st.integers(0, 10**12)


@given(sizes, sizes, st.integers(1, 10**6), sizes, sizes, sizes)
def test_the_longest_sequence_that_fits_is_the_longest_that_fits(
    budget, weights, per_token, recurrent, workspace, held
):
    plan = Plan(budget, weights, per_token, 4 * per_token, recurrent, workspace)
    most = plan.max_tokens(held)
    assert not plan.fits(most + 1, held)
    assert most == 0 or plan.fits(most, held)


def test_qwen35_35b_needs_5320_bytes_a_token_at_4_bits():
    per_token = 10 * 2 * 2 * 130
    plan = Plan(32 * 10**9, 20 * 10**9, per_token, 20_480, 66 * 10**6, 10**9)
    assert plan.per_token_fp16 / plan.per_token > 3.9
    assert plan.fits(262_144)
