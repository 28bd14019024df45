"""What int8 breaks: the layers by damage, coloured by what causes it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from search.report_page import Section, folded, paragraph, plot, table
from search.tables import layer_rows

if TYPE_CHECKING:
    from search.analysis import Layer, Sensitivity

BARS = 20
ROWS = 40
NONE = "no single cause"
# Eight hues that differ also for most colour-blind eyes (Okabe and Ito, 2008), light and dark alike.
COLOURS = {
    "weight_channel_spread": ("#0072b2", "weights: channels of very different range"),
    "weight_outliers": ("#56b4e9", "weights: a few outliers set the range"),
    "dead_channels": ("#9c6b4e", "channels that are always zero"),
    "bias_overflow": ("#7f3c8d", "biases beyond int32 steps"),
    "activation_channel_spread": ("#d55e00", "activations: channels of very different range"),
    "activation_outliers": ("#e69f00", "activations: a few outliers set the range"),
    "shared_range": ("#009e73", "different values share one range"),
    "saturating_input": ("#cc79a7", "values beyond the calibrated range"),
    NONE: ("#b0b0b0", NONE),
}


def layers_section(sensitivity: Sensitivity | None) -> Section:
    """Bars and a table."""
    title = "What int8 breaks, and why"
    if sensitivity is None or not sensitivity.layers:
        return Section("layers", title, "")
    first = sensitivity.layers[0]
    said = (
        f"Damage of each layer alone in int8, the {min(BARS, len(sensitivity.layers))} most harmful of "
        f"{len(sensitivity.layers)}; the first is {first.layer} with {first.damage:.3g}"
    )
    how = (
        f"Each layer alone in int8, all others in float; {sensitivity.layer_samples} samples, engine "
        f"{sensitivity.engine}. Where there is no drop, the damage is an estimate. Colours: the strongest cause."
    )
    answered = table(*layer_rows(sensitivity, ROWS))
    body = plot("layers-plot", layers_figure(sensitivity).to_json(), said, how)
    return Section(
        "layers",
        title,
        body
        + folded("The layers as a table, with the rules that answer them", answered)
        + _meanings(sensitivity),
    )


def layers_figure(sensitivity: Sensitivity) -> Any:
    """A plotly Figure: horizontal bars, most harmful on top, one trace for each cause."""
    import plotly.graph_objects as go

    fig: Any = go.Figure()
    shown = sensitivity.layers[:BARS]
    for cause in dict.fromkeys(_cause(d) for d in shown):
        group = [d for d in shown if _cause(d) == cause]
        fig.add_trace(
            go.Bar(
                name=COLOURS.get(cause, COLOURS[NONE])[1] if cause in COLOURS else cause,
                orientation="h",
                y=[d.layer for d in group],
                x=[d.damage for d in group],
                marker_color=COLOURS.get(cause, COLOURS[NONE])[0],
                text=[_hover(d, sensitivity) for d in group],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
        )
    longest = max(len(d.layer) for d in shown)
    fig.update_layout(
        template="none",
        height=110 + 24 * len(shown),
        margin={"l": min(320, 30 + 7 * longest), "r": 20, "t": 10, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 12},
        bargap=0.25,
        hoverlabel={"align": "left", "namelength": -1},
        legend={"orientation": "h", "y": -0.08 - 1.2 / len(shown), "yanchor": "top"},
        xaxis={"title": "damage of this layer alone", "rangemode": "tozero"},
        yaxis={"categoryorder": "array", "categoryarray": [d.layer for d in reversed(shown)]},
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
        f"<br>causes: {escape(', '.join(layer.causes) or NONE)}"
        f"<br>answers: {escape(', '.join(layer.answers[:4]))}"
    )


def _cause(layer: Layer) -> str:
    return layer.causes[0] if layer.causes else NONE


def _meanings(sensitivity: Sensitivity) -> str:
    named = dict.fromkeys(c for d in sensitivity.layers[:ROWS] for c in d.causes)
    said = [f"{c}: {COLOURS[c][1]}" for c in named if c in COLOURS]
    return paragraph("Causes. " + "; ".join(said) + ".") if said else ""
