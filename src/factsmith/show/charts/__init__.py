"""Charts of records for pages and notebooks: Vega-Lite specifications with their rows.

    chart           Chart: a specification without data, and the rows that it draws
    traces          causal traces and their averages       heat_map, class_map
    predictions     how a prediction forms                 next_tokens, layer_words, part_bars
    neurons         neurons and their cards                neuron_bars, promoted_bars, trigger_bars
    keeping         patches, their proof and their record  proof_chart, norm_bars, count_bars
    judging         judged edits                           share_chart
    axes            what the others share: labels and scales

A notebook shows a chart as it is. The studio shows the same chart. A specification names no colour:
the page chooses a light or a dark theme, and the colours with it.
"""
