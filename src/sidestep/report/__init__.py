"""The report: any set of results as one HTML page, as figures for papers and as tables for a README.

From the results up: `estimates` has means over seeds, and `mixed` what differs between lines. `rows` and `load` make
rows of lines. `tables` and `ratios` make cells of rows, and `scatter`, `bars`, `curves` and `figures` charts. `choice`,
`verdict`, `chance` and `quick` say which contender to take. `page`, `markdown` and `files` write it all.
"""
