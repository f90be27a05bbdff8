"""Pictures and pages: records come in, figures, HTML and Markdown come out.

    fs.heat_map(trace, path="trace.svg")                 plots/    for a paper or a notebook
    print(fs.text_heat_map(trace, width=80))             plots/    for the terminal
    fs.card_page(fs.card(lm, index, (5, 992)), "a.html") pages/    neurons, for a browser
    fs.report_page(report, "report.html")                reports/  an evaluation, for a browser

This package computes no result. It draws what a record of `read`, `locate` or `judge` holds. The
files in `templates/` are the HTML, the style and the scripts of the pages.
"""
