import pytest

from . import grid

TALLY = grid.Tally()


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: a point of a peer's grid that Triton takes part in")


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(getattr(item, "function", None), "row"):
            item.user_properties.append(("row", list(item.function.row)))


@pytest.fixture(autouse=True)
def _interpreted(request):
    grid.INTERPRETED[0] = request.node.get_closest_marker("interpreted") is not None


def pytest_runtest_logreport(report):
    TALLY.add(report)


def pytest_sessionfinish(session):
    """The table is of the whole grid and nothing less; under xdist the controller sees every report."""
    config = session.config
    if (
        grid.WHOLE
        and not hasattr(config, "workerinput")
        and not config.option.keyword
        and config.args == ["tests/peers"]
    ):
        grid.TABLE.write_text(TALLY.markdown())
