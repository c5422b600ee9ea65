"""Draws `loop.svg`, the walk of a position's numbers through one loop: `python docs/loop_picture.py`."""

from pathlib import Path

BOXES = [  # x, y, width, text, kind
    (20, 90, 90, "u", "data"),
    (140, 90, 130, "block: MLA, FFN", "outside"),
    (300, 90, 110, "+ LoRA delta", "step"),
    (440, 90, 130, "A·h + B·e + f", "step"),
    (600, 90, 110, "h'", "data"),
    (600, 170, 110, "p = σ(w·h' + b)", "step"),
    (440, 170, 130, "weight, cumulative_p,\nrunning, ponder", "step"),
    (300, 170, 110, "h_out + weight·h'", "step"),
    (440, 10, 130, "norm(h' + emb + e)", "step"),
]
ARROWS = [
    (110, 110, 140, 110),
    (270, 110, 300, 110),
    (410, 110, 440, 110),
    (570, 110, 600, 110),
    (655, 130, 655, 170),
    (600, 190, 570, 190),
    (440, 190, 410, 190),
    (655, 90, 570, 30),
    (440, 30, 65, 90),
]
FILL = {"data": "#eeeeee", "outside": "#cfe3f7", "step": "#d9f0d3"}


def svg() -> str:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 250" font-family="sans-serif" font-size="12">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for x1, y1, x2, y2 in ARROWS:
        parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="black" marker-end="url(#a)"/>')
    for x, y, width, text, kind in BOXES:
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="40" rx="4" fill="{FILL[kind]}" stroke="#555"/>')
        lines = text.split("\n")
        for i, line in enumerate(lines):
            at = y + 24 + 14 * i - 7 * (len(lines) - 1)
            parts.append(f'<text x="{x + width / 2}" y="{at}" text-anchor="middle">{line}</text>')
    parts.append(
        '<text x="20" y="240">green: one pass over (N, D), read h, e, f, h_out, write h\', h_out, u</text></svg>'
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("loop.svg").write_text(svg())
