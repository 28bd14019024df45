"""What int8 breaks: the layers by damage, colored by what causes it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from search.report.cause_style import LOOKS, NO_CAUSE, look
from search.report.page import Section, folded, listed, paragraph, table
from search.report.rows import layer_rows

if TYPE_CHECKING:
    from search.sensitivity.run import Layer, Sensitivity, Value

BARS = 20
SHOWN = 8
KINDS = 4  # of rules that answer a layer
ROWS = 40


def layers_section(sensitivity: Sensitivity | None) -> Section:
    """Bars and a table."""
    title = "What int8 breaks, and why"
    if sensitivity is None or not sensitivity.layers:
        return Section("layers", title, "")
    how = (
        f"Each layer alone in int8, all others in float; at most {sensitivity.layer_samples} samples, engine "
        f"{sensitivity.engine}. Where there is no drop, the damage is an estimate."
    )
    answered = table(*layer_rows(sensitivity, ROWS))
    return Section(
        "layers",
        title,
        _bars(sensitivity)
        + paragraph(how)
        + (
            folded("Remarks of the analysis", listed(remarks))
            if (remarks := sensitivity.remarks)
            else ""
        )
        + folded("More layers as a table, with the rules that answer them", answered),
    )


def _bars(sensitivity: Sensitivity) -> str:
    """The most harmful layers: a bar of the damage, the cause in words, and what answers it."""
    shown = sensitivity.layers[:SHOWN]
    ends = sensitivity.uncharged()
    worst = max([d.damage for d in shown] + [v.damage for v in ends]) or 1.0
    rows = [(d.damage, d.node, d.layer, look(_cause(d)), _answers(d)) for d in shown]
    rows += [
        (
            v.damage,
            v.value,
            v.value,
            look("shared_range"),
            "no layer reads it: its one range hurts the output",
        )
        for v in ends
    ]
    items = "".join(
        f'<li data-layer="{escape(node)}"><span class="name">{escape(name)}</span>'
        f'<span class="bar" style="--part: {100 * damage / worst:.1f}%; --hue: {style.color}"></span>'
        f'<span class="number">{damage:.3g}</span>'
        f'<span class="why">{escape(style.words)}{"; " if said else ""}{escape(said)}</span></li>'
        for damage, node, name, style, said in sorted(rows, key=lambda r: -r[0])
    )
    return f'<ol class="causes" aria-label="Damage of each layer alone in int8">{items}</ol>'


def _answers(layer: Layer) -> str:
    """The kinds of rules that act at a layer, in words."""
    rules = [
        s.partition("@")[0].rstrip("0123456789").replace("_", " ").strip() for s in layer.answers
    ]
    at_it = [r for r, s in zip(rules, layer.answers, strict=True) if not s.endswith("@model")]
    kinds = list(dict.fromkeys(r for r in at_it if r != "keep float")) or at_it[:1]
    return f"answers: {', '.join(kinds[:KINDS])}" if kinds else ""


def layers_figure(sensitivity: Sensitivity) -> Any:
    """A plotly Figure: horizontal bars, most harmful on top, one trace for each cause."""
    import plotly.graph_objects as go

    fig: Any = go.Figure()
    shown = sensitivity.layers[:BARS]
    for cause in dict.fromkeys(_cause(d) for d in shown):
        group = [d for d in shown if _cause(d) == cause]
        fig.add_trace(
            go.Bar(
                name=LOOKS[cause].words if cause in LOOKS else cause,
                orientation="h",
                y=[d.layer for d in group],
                x=[d.damage for d in group],
                marker_color=look(cause).color,
                text=[_hover(d, sensitivity) for d in group],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
        )
    ends = sensitivity.uncharged()
    if ends:
        fig.add_trace(
            go.Bar(
                name="the one range of a value that no layer reads",
                orientation="h",
                y=[v.value for v in ends],
                x=[v.damage for v in ends],
                marker={"color": look("shared_range").color, "pattern": {"shape": "/"}},
                text=[_end_said(v) for v in ends],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
        )
    rows = [(d.damage, d.layer) for d in shown] + [(v.damage, v.value) for v in ends]
    names = [name for _, name in sorted(rows, key=lambda row: row[0])]
    longest = max(map(len, names))
    fig.update_layout(
        template="none",
        height=110 + 24 * len(names),
        margin={"l": min(320, 30 + 7 * longest), "r": 20, "t": 10, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 12},
        bargap=0.25,
        hoverlabel={"align": "left", "namelength": -1},
        legend={"orientation": "h", "y": -0.08 - 1.2 / len(names), "yanchor": "top"},
        xaxis={"title": "damage of this layer alone", "rangemode": "tozero"},
        yaxis={"categoryorder": "array", "categoryarray": names},
        showlegend=True,
    )
    return fig


def _hover(layer: Layer, sensitivity: Sensitivity) -> str:
    lost = (
        ""
        if layer.drop is None
        else f"<br>{sensitivity.metric} {-100 * layer.drop:+.2f} points with this layer alone in int8"
    )
    return (
        f"<b>{escape(layer.layer)}</b> ({escape(layer.kind)}, {layer.macs / 1e6:.2f} M MACs)"
        f"<br>damage {layer.damage:.4g}{'' if layer.exact else ', estimated'}{lost}"
        f"<br>causes: {escape(', '.join(layer.causes) or NO_CAUSE.words)}"
        f"<br>answers: {escape(', '.join(layer.answers[:4]))}"
    )


def _end_said(value: Value) -> str:
    made = f", made by {escape(value.layer)}" if value.layer else ""
    return (
        f"<b>{escape(value.value)}</b>{made}: read by no layer<br>damage of its range alone "
        f"{value.damage:.4g}"
    )


def _cause(layer: Layer) -> str:
    return layer.causes[0] if layer.causes else NO_CAUSE.words
