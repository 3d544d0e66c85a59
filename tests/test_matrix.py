"""Token equality over the product of everything the engine can be set to: whatever is switched on,
the tokens are mlx-lm's.
"""

import pytest
from engine_cases import ARRIVAL, DRAWN, PRODUCT, Arrival, engine_options, play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def drawn_from(choices: dict[str, list]):
    return st.fixed_dictionaries(
        {name: st.sampled_from(values) for name, values in choices.items()}
    )


arrivals = drawn_from(ARRIVAL).map(lambda chosen: Arrival(**chosen))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=drawn_from(PRODUCT | DRAWN), load=st.lists(arrivals, min_size=1, max_size=8))
def test_any_setting_and_any_load_yield_the_reference_tokens(tiny, tiny_reference, case, load):
    play(tiny, tiny_reference, engine_options(case, load), load)


@pytest.mark.parametrize("number", range(12))
def test_twelve_cases_that_touch_each_value_yield_the_default_models_tokens(
    smollm2, smollm2_reference, number
):
    case = {name: values[number % len(values)] for name, values in (PRODUCT | DRAWN).items()}
    load = [
        Arrival(
            **{name: values[(3 * number + i) % len(values)] for name, values in ARRIVAL.items()}
            | {"max_tokens": 6}
        )
        for i in range(3)
    ]
    if number == 11:
        load.append(Arrival(400, 0, 1600, 3))
    play(smollm2[0], smollm2_reference, engine_options(case, load), load)


def test_the_twelve_cases_touch_each_value():
    assert max(map(len, (PRODUCT | DRAWN).values())) <= 12


def test_sampled_tokens_are_the_default_models_after_a_second_turn(smollm2, smollm2_reference):
    """One of them lies where two tokens' parts of the cumulated probabilities meet."""
    play(smollm2[0], smollm2_reference, {"num_blocks": 64}, [Arrival(40, 2, 1, 6, seed=7, turns=2)])
