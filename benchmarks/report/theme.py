"""Colors, shared by figures and page; each has enough contrast in both themes."""

from __future__ import annotations

COLORS = {
    "light": {
        "ground": "#ffffff",
        "ink": "#1f2328",
        "faint": "#6e7781",
        "line": "#d8dee4",
        "panel": "#f6f8fa",
        "upstream": "#c2410c",
        "reference": "#64748b",
        "compiled": "#9333ea",
        "ours": "#0f766e",
        "pass": "#15803d",
        "fail": "#b91c1c",
    },
    "dark": {
        "ground": "#0d1117",
        "ink": "#e6edf3",
        "faint": "#8b949e",
        "line": "#30363d",
        "panel": "#161b22",
        "upstream": "#fb923c",
        "reference": "#94a3b8",
        "compiled": "#c084fc",
        "ours": "#2dd4bf",
        "pass": "#4ade80",
        "fail": "#f87171",
    },
}
