"""Token equality over the product of everything the engine can be set to: whatever is switched on, the tokens are mlx-lm's."""

from engine_cases import ARRIVAL, DRAWN, PRODUCT, Arrival, engine_options, play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def drawn_from(choices: dict[str, list]):
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})


arrivals = drawn_from(ARRIVAL).map(lambda chosen: Arrival(**chosen))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=drawn_from(PRODUCT | DRAWN), load=st.lists(arrivals, min_size=1, max_size=8))
def test_any_setting_and_any_load_yield_the_reference_tokens(tiny, tiny_reference, case, load):
    play(tiny, tiny_reference, engine_options(case, load), load)
