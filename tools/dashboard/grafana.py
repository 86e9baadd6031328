"""The panels as a dashboard in Grafana's JSON."""

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

from tools.dashboard.panels import ROWS, Panel

APP = 'namespace=~"$namespace", application=~"$application"'
CLUSTER = 'namespace=~"$namespace"'

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_COLUMNS = 3
_WIDTH = 24 // _COLUMNS
_HEIGHT = 8
_ANY = ".*"


def dashboard_json() -> str:
    """The content of ``k8s/components/monitoring/dashboard.json``."""
    board = (
        dashboard.Dashboard("Pyramid Serve")
        .uid("pyramid-serve")
        .tags(["pyramid-serve", "ray"])
        .refresh("30s")
        .time("now-3h", "now")
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", "label_values(ray_pyramid_serve_videos_queued, namespace)"))
        .with_variable(
            _variable(
                "application",
                "App",
                'label_values(ray_pyramid_serve_videos_queued{namespace=~"$namespace"}, application)',
            )
        )
    )
    for row in ROWS:
        board = board.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            board = board.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def expression(expr: str, *, app: str = APP, cluster: str = CLUSTER) -> str:
    """A panel's query with its labels filled in."""
    return expr.replace("$app", app).replace("$cluster", cluster)


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A choice of values of a label, which also takes in what has no such label."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(_ANY)
    )


def _panel(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .min(0)
        .height(_HEIGHT)
        .span(_WIDTH)
        .datasource(_SOURCE)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    for letter, query in zip("ABCDEF", panel.queries, strict=False):
        built = built.with_target(
            prometheus.Dataquery().ref_id(letter).expr(expression(query.expr)).legend_format(query.legend)
        )
    return built
