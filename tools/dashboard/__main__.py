"""Write the Grafana dashboard: ``python -m tools.dashboard``."""

from pathlib import Path

from tools.dashboard.grafana import dashboard_json

FILE = Path(__file__).parents[2] / "k8s" / "components" / "monitoring" / "dashboard.json"

if __name__ == "__main__":
    FILE.write_text(dashboard_json())
