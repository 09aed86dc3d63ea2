"""Comparing recipes fairly: the same calibration data, training budget, prompts and noise for every cell of a table.

plan      which cells, in which order, and what each depends on
bench     one model set up: its data and statistics, quantizing it, sampling it
sampling  the quantized transformer that videos are sampled with, and its precision
fill      the cells one by one, each saved as it is done, until all are there or the time is up
store     the files of finished cells, which may come from other machines
table     from cells to quality.json and table.md
plots     from cells to pictures
display   progress bars and the table on a terminal
"""
