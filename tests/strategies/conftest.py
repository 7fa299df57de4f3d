import pytest

from tests.strategies.worker import Pair

# the last ends both processes
SCENARIOS = (
    *("per_example", "scalar", "taken_over", "uneven", "counted", "half", "odd_weights", "running_statistics", "added_group"),
    *("split_low_rank", "split_gaussian", "split_with_the_rule", "split_one_sided", "not_finite", "not_finite_split"),
    *("stacked_on_one", "strategies", "accumulated", "checkpoints", "buckets", "dies_second"),
)


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Pair:
    """Two processes that have run all scenarios."""
    pair = Pair(tmp_path_factory.mktemp("pair"), *SCENARIOS)
    pair.codes = pair.wait(240)
    return pair
