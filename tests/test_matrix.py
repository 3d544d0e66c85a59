"""Tokens equal mlx-lm's under every combination of the engine's settings."""

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
def test_any_setting_and_any_load_give_the_reference_tokens(tiny, tiny_reference, case, load):
    play(tiny, tiny_reference, engine_options(case, load), load)


@pytest.mark.cpu  # near ties are measured in float32, which SmolLM2 has on the CPU only
@pytest.mark.parametrize("number", range(12))
def test_twelve_cases_give_the_reference_tokens_of_smollm2(smollm2, smollm2_reference, number):
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


def test_the_twelve_cases_contain_every_value_of_every_setting():
    assert max(map(len, (PRODUCT | DRAWN).values())) <= 12


@pytest.mark.cpu  # near ties are measured in float32, which SmolLM2 has on the CPU only
def test_tokens_sampled_over_two_turns_are_the_reference_tokens_of_smollm2(
    smollm2, smollm2_reference
):
    """One of the tokens is a near tie: u lies where two intervals of probabilities meet."""
    play(smollm2[0], smollm2_reference, {"num_blocks": 64}, [Arrival(40, 2, 1, 6, seed=7, turns=2)])
