import json
from typing import Any

from tools.dashboard.__main__ import FILE
from tools.dashboard.grafana import dashboard_json, expression
from tools.dashboard.panels import ROWS


def test_the_file_is_what_the_script_writes() -> None:
    assert FILE.read_text() == dashboard_json(), "run python -m tools.dashboard"


def test_every_panel_is_there_with_its_queries_and_none_covers_another() -> None:
    board: dict[str, Any] = json.loads(FILE.read_text())
    panels = {panel["title"]: panel for panel in board["panels"]}
    assert list(panels) == [title for row in ROWS for title in (row.title, *(panel.title for panel in row.panels))]
    covered = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & covered, panel["title"]
        covered |= cells
    for row in ROWS:
        for panel in row.panels:
            asked = [target["expr"] for target in panels[panel.title]["targets"]]
            assert asked == [expression(query.expr) for query in panel.queries]


def test_every_query_asks_for_the_chosen_app_or_its_machines_only() -> None:
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                assert query.expr.count("ray_") == query.expr.count("{$app}") + query.expr.count("{$cluster}")
