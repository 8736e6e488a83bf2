"""The demo: one small network, trained once with each normalization, as a table, a picture and a CSV file."""
