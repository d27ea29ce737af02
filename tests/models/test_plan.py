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


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=9), st.integers(1, 9), sizes)
def test_every_prompt_that_is_being_processed_has_a_workspace_of_its_own(lengths, prefills, spare):
    needed = 10**9 + sum(lengths) * 5200 + len(lengths) * 11 * 10**7 + prefills * 2 * 10**9
    plan = Plan(needed, 10**9, 5200, 20_480, 10**8, 2 * 10**9, tail=10**7)
    assert plan.fits_together(lengths, 0, prefills)
    assert not plan.fits_together(lengths, 1, prefills)
    assert plan.fits_together(lengths, spare, prefills - 1) == (spare <= 2 * 10**9)


def test_sequences_of_mlx_lms_own_cache_take_the_longest_ones_room():
    plan = Plan(10_000, 0, 10, 10, 0, 0, padded=True)
    assert plan.fits_together([500, 500]) and not plan.fits_together([501, 1])
