"""Figures of records, one module a subject.

    traces       causal traces and their averages      heat_map, text_heat_map, class_map, ...
    neurons      the neurons that carry a fact         neuron_chart
    predictions  how predictions form                  prediction_chart, refinement_chart
    reading      what the layers of a model hold       profile_lines, agreement_chart, ...
    judging      judged edits                          evaluation_chart
    curves       any lines with bands                  curves
    drawing      what the others share: colours, axes, labels, saving

Every function returns a matplotlib figure. It also saves the figure if it gets a `path`: as PNG,
SVG or PDF, by the suffix. No module uses pyplot, so nothing opens a window or changes the caller's
plotting state.
"""
