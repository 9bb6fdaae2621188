"""The report: any set of results as one HTML page, as figures for papers and as tables for a README.

From the results up: `estimates` (means over seeds), `mixed` (what differs between lines), `rows` and `load` (lines to
rows), `tables` and `ratios` (rows to cells), `scatter`, `bars`, `curves` and `figures` (rows to charts), `page`,
`markdown` and `files` (what is written).
"""
