"""Charts of records for pages and notebooks: Vega-Lite specifications with their rows.

    chart           Chart: a specification without data, and the rows that it draws
    traces          causal traces and their averages     heat_map, class_map
    predictions     how predictions form                 next_tokens, lens_map, part_bars, ...
    neurons         neurons and their cards              neuron_bars, promoted_bars, ...
    keeping         patches and what they change         proof_chart, norm_bars, use_bars
    judging         judged edits                         share_chart
    axes            what the others share: labels, encodings and forms

A notebook shows a chart as it is. The studio shows the same chart. A specification names no colour:
the page chooses a light or a dark theme, and the colours with it.
"""
