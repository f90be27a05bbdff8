"""The report of an evaluation: an HTML page, Markdown, and the record that both show.

page      report_page, report_markdown
record    Report
tables    the tables of one run
charts    the charts of the page
meanings  what each number means
"""
